"""The series: there from the start, and right when several processes write them."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.metrics import Distribution, Metrics, score_buckets
from deployments.watch.watch import merged

REPLICA = """
import os, sys, time
import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from deployments.engine.metrics import Metrics
metrics = Metrics("m", ["ant", "bee"], registry=CollectorRegistry())
metrics.artifact(method="mmdf", fingerprint="f", version="1", threshold=0.005, created_at="2026-11-21T09:00:00+00:00")
metrics.requests("flag", "clean").inc(int(sys.argv[1]))
metrics.statistics(np.full(3, -2.0), np.full(3, 0.25))
print("ready", flush=True)
sys.stdin.read()
"""


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) → value."""
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def replica(folder: Path, requests: int) -> subprocess.Popen[str]:
    """A process that counts ``requests`` requests and lives until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", REPLICA, str(requests)],
        env=os.environ
        | {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_and_a_crash_add_up(tmp_path: Path) -> None:
    """Counters and signed sums add over processes, one of them killed; gauges are not added, and name no process."""
    first, second = replica(tmp_path, 3), replica(tmp_path, 4)
    try:
        second.kill()
        second.communicate()
        found = samples(generate_latest(merged(tmp_path)))
    finally:
        first.communicate()
    assert found["guard_requests_total", "flag", "m", "clean"] == 7
    assert found["guard_score_sum", "m"] == -12
    assert found["guard_score_count", "m"] == 6
    assert found["guard_threshold", "m"] == 0.005
    assert found["guard_artifact_info", "f", "mmdf", "m", "1"] == 1
    assert found["guard_calibrated_timestamp_seconds", "m"] == datetime(2026, 11, 21, 9, tzinfo=UTC).timestamp()


def test_every_series_is_there_before_the_first_event(registry: CollectorRegistry) -> None:
    """Counters and histograms stand at zero for every label value that is known in advance."""
    Metrics("m", ["ant", "bee"], registry=registry)
    for name, labels in [
        *[
            ("guard_requests_total", {"mode": m, "verdict": v})
            for m in ("observe", "flag", "reject", "correct")
            for v in ("clean", "flagged", "error")
        ],
        *[("guard_inputs_total", {"verdict": v}) for v in ("clean", "flagged", "error")],
        *[("guard_flagged_total", {"predicted_class": c}) for c in ("ant", "bee")],
        *[("guard_failures_total", {"stage": "corrected", "outcome": o}) for o in ("open", "closed")],
        *[
            ("guard_stage_seconds_count", {"stage": s})
            for s in ("decode", "queue", "original", "corrected", "statistic", "total")
        ],
        ("guard_corrected_total", {}),
        ("guard_rejected_total", {}),
        ("guard_score_count", {}),
        ("guard_p_value_count", {}),
    ]:
        assert registry.get_sample_value(name, {"model": "m", **labels}) == 0, (name, labels)
    assert registry.get_sample_value("guard_batch_size_count", {"model": "m"}) == 0


@pytest.mark.parametrize("number", [1, 3, 4, 40])
def test_many_values_count_as_each_would(number: int, registry: CollectorRegistry) -> None:
    """Observed together or one by one, values fill the same buckets, those on a bound and beyond the last included."""
    bounds = (0.1, 0.25, 0.5)
    together = Distribution("together", "t", ("model",), registry=registry, buckets=bounds).labels("m")
    apart = Distribution("apart", "t", ("model",), registry=registry, buckets=bounds).labels("m")
    values = np.resize([0.25, 7.0, 0.05, 0.1, np.inf, 0.3, np.nan], number)
    for _ in range(2):
        together.observe_many(values)
        for value in values.tolist():
            apart.observe(value)
    places = [("count", {}), ("sum", {}), *(("bucket", {"le": le}) for le in ("0.1", "0.25", "0.5", "+Inf"))]
    for suffix, labels in places:
        one, other = (
            registry.get_sample_value(f"{name}_{suffix}", {"model": "m", **labels}) for name in ("together", "apart")
        )
        assert one == pytest.approx(other, nan_ok=True), (suffix, labels)


def test_an_infinite_score_does_not_spoil_the_sum(registry: CollectorRegistry) -> None:
    """A score that is infinite lands in the last bucket only, and the sum stays finite."""
    metrics = Metrics("m", ["ant"], registry=registry, score_buckets=(0.0, 1.0))
    metrics.statistics(np.array([0.5, np.inf]), np.array([0.5, 0.0]))
    assert registry.get_sample_value("guard_score_bucket", {"model": "m", "le": "1.0"}) == 1
    assert registry.get_sample_value("guard_score_count", {"model": "m"}) == 2
    assert registry.get_sample_value("guard_score_sum", {"model": "m"}) == pytest.approx(2.5)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"fit": {}},
        {"fit": {"score_quantiles": {"0.0": 1.0, "1.0": 1.0}}},
        {"fit": {}, "threshold": None},
        {"fit": {}, "threshold": {"score": float("inf")}},
    ],
)
def test_score_buckets_without_quantiles_cover_both_signs(manifest: dict[str, object]) -> None:
    """Where the artifact tells no spread of clean scores the buckets rise from negative to positive scores."""
    buckets = score_buckets(manifest)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[0] < 0 < buckets[-1]


def test_score_buckets_follow_the_clean_scores() -> None:
    """With quantiles, the buckets hold them and the threshold, and reach beyond the largest."""
    quantiles = {"0.0": -2.0, "0.5": 0.5, "1.0": 3.0}
    buckets = score_buckets({"fit": {"score_quantiles": quantiles}, "threshold": {"score": 2.8}})
    assert list(buckets) == sorted(set(buckets))
    assert {-2.0, 0.5, 3.0, 2.8} < set(buckets)
    assert buckets[-1] == 23.0


def test_score_buckets_without_a_threshold_split_at_zero() -> None:
    """Where no score is a threshold, zero is: there the corrected network begins to disagree."""
    buckets = score_buckets({"fit": {"score_quantiles": {"0.0": -9.0, "0.5": -4.0, "1.0": -1.0}}, "threshold": None})
    assert list(buckets) == sorted(set(buckets))
    assert {-9.0, -4.0, -1.0, 0.0} < set(buckets)
