"""Every series that the guard exports, in one table, at zero before the first event.

In a replica ``prometheus_client`` runs in its multiprocess mode: with ``PROMETHEUS_MULTIPROC_DIR`` set before the
process starts, counters live in files that survive a crash, and ``exposition`` merges them over the replicas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deployments.config import MODES

VERDICTS = ("clean", "flagged", "error", "skipped")
STAGES = ("decode", "queue", "original", "upstream", "corrected", "statistic", "total")
FAILURES = (
    ("original", "closed"),
    ("upstream", "closed"),
    ("queue", "open"),
    ("queue", "closed"),
    ("corrected", "open"),
    ("corrected", "closed"),
    ("statistic", "open"),
    ("statistic", "closed"),
)
SECONDS = (*(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2.5, 5)), 10.0)
P_VALUES = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAGNITUDES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
SCORES = (*(-size for size in reversed(MAGNITUDES)), 0.0, *MAGNITUDES)


class Metrics:
    """The series of one model. Each attribute with labels is called with their values: ``requests(mode, verdict)``.
    A request looks up a dozen of them, so that what was looked up once is kept.

    Args:
        model: the model's name, first label of nearly every series. classes: the names of its classes.
        registry: where the series register. score_buckets: rising upper bounds in logits; the score is signed.
    """

    def __init__(
        self,
        model: str,
        classes: Sequence[str],
        *,
        registry: CollectorRegistry,
        score_buckets: Sequence[float] = SCORES,
    ) -> None:
        self._classes = classes
        self._score_bounds = (min(score_buckets), max(score_buckets))

        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return cache(partial(Counter(name, text, ("model", *labels), registry=registry).labels, model))

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Callable[..., Histogram]:
            family = Histogram(name, text, ("model", *labels), registry=registry, buckets=buckets)
            return cache(partial(family.labels, model))

        def gauge(name: str, text: str, *labels: str) -> Callable[..., Gauge]:
            family = Gauge(name, text, ("model", *labels), registry=registry, multiprocess_mode="livemostrecent")
            return cache(partial(family.labels, model))

        self.requests = counter(
            "guard_requests_total",
            "Requests, by what was found (error: no verdict; skipped: not in the sample).",
            "mode",
            "verdict",
        )
        self.inputs = counter(
            "guard_inputs_total",
            "Images, by what was found (error: no verdict; skipped: not in the sample).",
            "verdict",
        )
        self.flagged = counter(
            "guard_flagged_total", "Flagged images, by the original network's class.", "predicted_class"
        )
        self.corrected = counter("guard_corrected_total", "Flagged images answered by the corrected network.")
        self.rejected = counter("guard_rejected_total", "Flagged images answered without a label.")
        self.failures = counter(
            "guard_failures_total", "Requests that a stage failed (open: answered unguarded).", "stage", "outcome"
        )
        self.score = histogram(
            "guard_score",
            "Logits, larger is more suspicious. mmdf: margin change S. bna: by how much another class is preferred.",
            score_buckets,
        )
        self.p_value = histogram(
            "guard_p_value", "Chance of a score as large on a clean image (mmdf; bna has none).", P_VALUES
        )
        self.stage_seconds = histogram("guard_stage_seconds", "Time in a stage of the answer.", SECONDS, "stage")
        self.batch_size = histogram("guard_batch_size", "Images in a pass.", SIZES)
        self._threshold = gauge("guard_threshold", "An image is flagged when its p-value is below this (mmdf).")
        self._nominal = gauge("guard_nominal_false_positive_ratio", "Share of clean images that guard_threshold flags.")
        self._calibrated = gauge("guard_calibrated_timestamp_seconds", "When the artifact was fitted, Unix time.")
        self._artifact = gauge(
            "guard_artifact_info", "The artifact that serves: 1.", "method", "fingerprint", "version"
        )
        self._served: Gauge | None = None
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        for mode in MODES:
            for verdict in VERDICTS:
                self.requests(mode, verdict)
        for verdict in VERDICTS:
            self.inputs(verdict)
        for name in self._classes:
            self.flagged(name)
        for stage, outcome in FAILURES:
            self.failures(stage, outcome)
        for stage in STAGES:
            self.stage_seconds(stage)
        for series in (self.corrected, self.rejected, self.score, self.p_value, self.batch_size):
            series()

    def artifact(
        self, *, method: str, fingerprint: str, version: str, threshold: float | None, created_at: str
    ) -> None:
        """Say which artifact serves; the one before counts 0. threshold: a p-value; None leaves its series out.
        created_at: ISO 8601 with its offset."""
        if self._served is not None:
            self._served.set(0)
        self._served = self._artifact(method, fingerprint, version)
        self._served.set(1)
        self.threshold(threshold)
        self._calibrated().set(datetime.fromisoformat(created_at).timestamp())

    def threshold(self, p_value: float | None) -> None:
        """Say below which p-value images are flagged; None leaves the series out."""
        if p_value is not None:
            self._threshold().set(p_value)
            self._nominal().set(p_value)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, whether or not it succeeds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds(name).observe(time.perf_counter() - started)

    def verdicts(self, label: NDArray[np.int64], flagged: NDArray[np.bool_]) -> None:
        """Count the images of one request: label, flagged [n]."""
        count = int(flagged.sum())
        self.inputs("flagged").inc(count)
        self.inputs("clean").inc(len(flagged) - count)
        for index in label[flagged]:
            self.flagged(self._classes[index]).inc()

    def statistics(self, score: NDArray[np.float64], p_value: NDArray[np.float64] | None) -> None:
        """Observe score and, if any, p-value [n].

        An infinite score counts just beyond the last bucket: the sum stays finite.
        """
        low, high = self._score_bounds
        for value in score.tolist():
            self.score().observe(value if math.isfinite(value) else low if value < 0 else high + 1)
        for value in () if p_value is None else p_value.tolist():
            self.p_value().observe(value)


def score_buckets(manifest: Mapping[str, Any]) -> tuple[float, ...]:
    """Bucket bounds on the scale of the clean scores that the artifact records, else ``SCORES``.

    The quantiles of the clean scores, the score above which an image is flagged (0 without a threshold), and a few
    spans beyond the largest, where triggered images lie.
    """
    quantiles = [float(value) for value in manifest.get("fit", {}).get("score_quantiles", {}).values()]
    threshold = float((manifest.get("threshold") or {"score": 0.0})["score"])
    low, high = min(quantiles, default=0.0), max(quantiles, default=0.0)
    if not math.isfinite(high - low) or high <= low:
        return SCORES
    beyond = [high + spans * (high - low) for spans in (0.5, 1, 2, 4)]
    return tuple(sorted({float(f"{bound:.3g}") for bound in (*quantiles, threshold, *beyond) if math.isfinite(bound)}))
