"""The watch: what the counters of all replicas, added up, say of the traffic."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine.metrics import Metrics, input_buckets, score_buckets
from deployments.events import shelf
from deployments.series import CLASSES, OTHER
from deployments.watch import kept
from deployments.watch.counters import Counters, Sample, counters
from deployments.watch.facts import Facts, began, facts_of, read_facts, shape
from deployments.watch.models import Watched, summary
from deployments.watch.watch import Watch, merged
from guard.null import ExponentialTail

ALPHA, LEVEL, CLEAN = 0.005, 9.0, 500
NAMES = tuple(f"class {index}" for index in range(10))


def manifest(method: str = "mmdf", **fit: Any) -> dict[str, Any]:
    """As a fit on 500 clean images whose scores are normal and whose brightness is uniform would write it."""
    scores = np.sort(np.random.default_rng(0).normal(size=CLEAN))
    law = ExponentialTail.fit(scores)
    quantiles = {str(q): float(np.quantile(scores, q)) for q in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)}
    inputs = {"brightness": np.linspace(0, 1, 51).tolist(), "contrast": np.linspace(0.1, 0.3, 51).tolist()}
    threshold = {"p_value": ALPHA, "score": law.threshold(ALPHA), "p_value_support": 1 / (CLEAN + 1)}
    mmdf = {"null": law.to_json(), "threshold": threshold}
    return {
        "method": method,
        "fingerprint": "f" * 64,
        "created_at": "2026-11-21T09:00:00+00:00",
        "classes": list(NAMES),
        **(mmdf if method == "mmdf" else {"null": None, "threshold": None}),
        "fit": {"images": CLEAN, "scores": scores.tolist(), "score_quantiles": quantiles, "inputs": inputs} | fit,
    }


class Replica:
    """Counts as one replica does, in this process, in a registry of its own."""

    def __init__(self, said: dict[str, Any] | None = None, names: tuple[str, ...] = NAMES) -> None:
        self.said = said or manifest()
        self.registry = CollectorRegistry()
        brightness, contrast = (input_buckets(self.said, one) for one in ("brightness", "contrast"))
        self.metrics = Metrics(
            "m",
            names,
            registry=self.registry,
            score_buckets=score_buckets(self.said),
            brightness_buckets=brightness,
            contrast_buckets=contrast,
        )
        self.law = None if self.said["null"] is None else ExponentialTail.fit(np.asarray(self.said["fit"]["scores"]))

    def facts(self, **more: Any) -> Facts:
        threshold = ALPHA if self.said["method"] == "mmdf" else None
        settings = {"model": "m", "version": "1", "threshold": threshold} | more
        return facts_of(self.said, labels=self.metrics.labels, bounds=self.metrics.bounds, **settings)

    def serve(self, scores: np.ndarray, label: np.ndarray, brightness: np.ndarray | None = None) -> None:
        """Requests with these scores [n], predicted classes [n] and levels of grey [n]."""
        assert self.law is not None
        p_value = self.law.p_value(scores)
        self.metrics.verdicts(label, p_value < ALPHA)
        self.metrics.statistics(scores, p_value)
        if brightness is not None:
            rows = np.repeat(brightness[:, None], 12, axis=1).astype(np.float32).reshape(-1, 3, 2, 2)
            for row in rows:
                self.metrics.images(row[None])


def clean(rng: Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.normal(size=count), rng.integers(0, len(NAMES), count), rng.random(count)


def look(watched: Watched, replica: Replica, facts: Facts | None = None) -> None:
    watched.look(counters(replica.registry)["m"], facts or replica.facts(), now=0.0)


def test_clean_traffic_is_no_evidence_and_no_drift() -> None:
    """Nor is what was counted before the first look, whatever it was."""
    rng, replica = np.random.default_rng(1), Replica()
    replica.serve(np.full(200, 50.0), np.zeros(200, int))
    watched = Watched(replica.facts(), every_s=1.0)
    look(watched, replica)
    assert watched.drift("score") is None
    for _ in range(60):
        replica.serve(*clean(rng, 50))
        look(watched, replica)
    assert watched.evidence.value < 3
    drift = [watched.drift(name) for name in ("score", "brightness")]
    assert drift == [pytest.approx(0.0, abs=0.02)] * 2


def test_an_attack_is_evidence_against_its_class_and_no_drift() -> None:
    """A tenth of the requests bears a trigger that sends it to class 3, with scores as clean images never have."""
    rng, replica = np.random.default_rng(2), Replica()
    watched = Watched(replica.facts(), every_s=1.0)
    look(watched, replica)
    for _ in range(30):
        replica.serve(*clean(rng, 45))
        replica.serve(np.full(5, 20.0), np.full(5, 3))
        look(watched, replica)
    by_class = watched.evidence.by_class
    assert watched.evidence.value > LEVEL
    assert max(by_class, key=lambda name: by_class[name]) == "class 3"
    assert max(value for name, value in by_class.items() if name != "class 3") < 3
    assert watched.drift("score") == pytest.approx(0.0, abs=0.02)


def test_a_shift_is_drift_and_no_attack() -> None:
    """Scores a third of a deviation higher and darker pictures, of all classes: flags nearly triple, and spread."""
    rng, replica = np.random.default_rng(3), Replica()
    watched = Watched(replica.facts(), every_s=1.0)
    look(watched, replica)
    for _ in range(80):
        scores, label, grey = clean(rng, 50)
        replica.serve(scores + 0.33, label, grey**2)
        look(watched, replica)
    score, brightness = watched.drift("score"), watched.drift("brightness")
    assert score is not None
    assert brightness is not None
    assert score > 0.03
    assert brightness > 0.1
    assert watched.evidence.value < LEVEL


def test_another_artifact_begins_anew() -> None:
    """So does another threshold; counters that fall back, as after a wiped folder, count as nothing new."""
    replica = Replica()
    watched = Watched(replica.facts(), every_s=1.0)
    look(watched, replica)
    replica.serve(np.full(60, 20.0), np.zeros(60, int))
    look(watched, replica)
    assert watched.evidence.value > LEVEL
    look(watched, replica, replica.facts(version="2"))
    assert watched.evidence.value == 0.0
    look(watched, Replica(), replica.facts(version="2"))
    assert watched.evidence.value == 0.0
    assert watched.history[-1]["images"] == 0


def test_bna_bets_on_its_classes_alone() -> None:
    """No p-values and no clean scores; the share that the fit measured on few images is taken with doubt."""
    replica = Replica(manifest("bna", targets={"3": {"fpr_target": 0.0}}, images_per_class=[50] * 10))
    facts = replica.facts()
    assert Replica(manifest("bna", targets={"3": {}})).facts().nominal == {}
    assert facts.nominal == {"class 3": pytest.approx(1 / 52)}
    assert facts.support is None
    watched = Watched(facts, every_s=1.0)
    look(watched, replica)
    flags = np.arange(50) < 25
    replica.metrics.verdicts(np.full(50, 3), flags)
    look(watched, replica)
    assert watched.evidence.value > LEVEL


def test_many_classes_are_few_labels() -> None:
    """A class gets a label of its own with its first flagged image, up to a hundred; nothing is lost in the sum."""
    registry = CollectorRegistry()
    metrics = Metrics("m", [f"class {index}" for index in range(1000)], registry=registry)
    assert metrics.labels == (OTHER,)
    for index in range(150):
        metrics.verdicts(np.array([index, index]), np.array([True, False]))
    flagged, predicted = (
        counters(registry)["m"].by(f"guard_{what}_total", "predicted_class") for what in ("flagged", "predicted")
    )
    assert len(predicted) == CLASSES + 1
    assert (flagged.get(("class 0",), 0), flagged[OTHER,]) == (0, 150)
    metrics.verdicts(np.array([0, 149]), np.array([True, True]))
    flagged = counters(registry)["m"].by("guard_flagged_total", "predicted_class")
    assert (flagged["class 0",], flagged[OTHER,]) == (1, 151)
    assert sum(predicted.values()) == 300


def test_a_class_that_turns_up_is_watched() -> None:
    """Of a thousand classes the attacked one has its label, and its evidence, from its first flagged image on."""
    rng, replica = np.random.default_rng(6), Replica(names=tuple(f"class {index}" for index in range(1000)))
    facts = replica.facts()
    watched = Watched(facts, every_s=1.0)
    look(watched, replica, facts)
    for _ in range(30):
        scores, _label, _grey = clean(rng, 45)
        replica.serve(scores, rng.integers(0, 1000, 45))
        replica.serve(np.full(2, 20.0), np.full(2, 777))
        look(watched, replica, facts)
    assert watched.evidence.value > LEVEL
    assert watched.evidence.by_class["class 777"] > LEVEL


def test_shares_of_the_clean_set() -> None:
    """Bins end at their bounds, the last one never; no sample is no shape."""
    found = shape((1.0, 2.0), [0.5, 1.0, 1.5, 3.0], 4)
    assert found is not None
    assert found.shares == (0.5, 0.25, 0.25)
    assert shape((1.0,), None, 4) is None


def test_the_page_has_the_counters_numbers() -> None:
    rng, replica = np.random.default_rng(5), Replica()
    watched = Watched(replica.facts(), every_s=1.0)
    replica.serve(*clean(rng, 300))
    look(watched, replica)
    page = summary(watched, counters(replica.registry)["m"])
    assert sum(row["predicted"] for row in page["classes"]) == 300
    assert sum(page["score"]["counts"]) == sum(page["p_value"]["counts"]) == 300
    assert sum(page["score"]["clean"]) == pytest.approx(1.0)
    assert len(page["score"]["clean"]) == len(page["score"]["counts"]) == len(page["score"]["bounds"]) + 1


def test_replicas_that_do_not_agree() -> None:
    """While a change is under way nothing is bet on; afterwards anew, once what was in flight is through."""
    replica = Replica()
    watched = Watched(replica.facts(), every_s=1.0)
    look(watched, replica)
    replica.serve(np.full(60, 20.0), np.zeros(60, int))
    watched.look(counters(replica.registry)["m"], None, now=0.0)
    look(watched, replica)
    assert watched.evidence.value == 0.0
    changed = replica.facts(threshold=0.001)
    for now, value in ((100.0, 0.0), (105.0, 0.0), (111.0, LEVEL)):
        watched.look(counters(replica.registry)["m"], changed, now=now)
        assert watched.evidence.value >= value
        assert (value > 0) == (watched.evidence.value > 0)
        replica.serve(np.full(60, 20.0), np.zeros(60, int))


def test_what_processes_say(tmp_path: Path) -> None:
    """Those that live, while they agree; the dead are forgotten, and what cannot be read is left out."""
    facts = Replica().facts()
    facts.write(tmp_path)
    place = tmp_path / "models"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (place / f"m.{dead.pid}.json").write_text(facts.model_copy(update={"version": "0"}).model_dump_json())
    (place / f"n.{os.getpid()}.json").write_text('{"model": "n", "new_key": 1}')
    assert read_facts(tmp_path) == {"m": facts.model_copy(update={"began": 0})}
    assert not (place / f"m.{dead.pid}.json").exists()
    other = facts.model_copy(update={"began": began(os.getppid()), "score": None})
    (place / f"m.{os.getppid()}.json").write_text(other.model_dump_json())
    found = read_facts(tmp_path)["m"]
    assert found is not None
    assert (found.score, found.brightness, found.nominal) == (None, facts.brightness, facts.nominal)
    (place / f"m.{os.getppid()}.json").write_text(other.model_copy(update={"version": "2"}).model_dump_json())
    assert read_facts(tmp_path) == {"m": None}
    (place / f"m.{os.getppid()}.json").write_text(
        other.model_copy(update={"began": 1, "version": "2"}).model_dump_json()
    )
    assert read_facts(tmp_path) == {"m": facts.model_copy(update={"began": 0})}


def test_a_replica_with_other_bins() -> None:
    """One that began with another artifact: drift is not known while it counts, and evidence goes on."""
    rng, replica = np.random.default_rng(7), Replica()
    registry = CollectorRegistry()
    stranger = Metrics("m", NAMES, registry=registry, score_buckets=(0.05, 0.15), brightness_buckets=(0.33,))
    watched = Watched(replica.facts(), every_s=1.0)

    def both() -> Counters:
        found = [counters(one)["m"] for one in (replica.registry, registry)]
        samples = [sample for one in found for several in one._samples.values() for sample in several]
        bins: dict[str, dict[float, float]] = {}
        for one in found:
            for series in ("guard_score", "guard_input_brightness", "guard_input_contrast", "guard_p_value"):
                histogram = one.histogram(series)
                assert histogram is not None
                for bound, number in zip(histogram.bounds, histogram.counts, strict=True):
                    place = bins.setdefault(series, {})
                    place[bound] = place.get(bound, 0.0) + number
        samples = [sample for sample in samples if not sample.name.endswith("_bucket")]
        for series, place in bins.items():
            total = 0.0
            for bound in sorted(place):
                total += place[bound]
                samples.append(Sample(f"{series}_bucket", {"le": str(bound)}, total))
        return Counters(samples)

    watched.look(both(), replica.facts(), now=0.0)
    for _ in range(10):
        replica.serve(*clean(rng, 50))
        watched.look(both(), replica.facts(), now=0.0)
    assert watched.drift("score") is not None
    stranger.statistics(np.array([0.1]), np.array([0.5]))
    stranger.images(np.full((1, 3, 2, 2), 0.3, np.float32))
    watched.look(both(), replica.facts(), now=0.0)
    assert watched.drift("score") is watched.drift("brightness") is None
    replica.serve(np.full(60, 20.0), np.zeros(60, int))
    watched.look(both(), replica.facts(), now=0.0)
    assert watched.evidence.value > LEVEL


def test_the_same_artifact_in_other_bins() -> None:
    """Once every replica has other bins, drift begins anew; evidence goes on, and nothing is bet on twice."""
    rng, replica = np.random.default_rng(8), Replica()
    facts = replica.facts()
    assert facts.brightness is not None
    fewer = facts.brightness.model_copy(update={"bounds": facts.brightness.bounds[:2], "shares": (0.1, 0.1, 0.8)})
    watched = Watched(facts, every_s=1.0)
    look(watched, replica, facts)
    for _ in range(10):
        replica.serve(*clean(rng, 50))
        look(watched, replica, facts)
    assert watched.drift("brightness") is not None
    replica.serve(np.full(6, 20.0), np.zeros(6, int))
    for _ in range(5):
        look(watched, replica, facts.model_copy(update={"brightness": fewer}))
    assert watched.drift("brightness") is None
    assert watched.drift("score") is not None
    assert 0 < watched.evidence.value < LEVEL


def test_files_that_are_broken(tmp_path: Path) -> None:
    """What a killed process left before it wrote a byte is removed, and a quarantine that is none is left out."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"counter_{dead.pid}.db").touch()
    assert list(merged(tmp_path).collect()) == []
    assert not list(tmp_path.glob("*.db"))
    file = tmp_path / "no folder"
    file.touch()
    watch = Watch(tmp_path)
    watch._watched["m"] = Watched(Replica().facts().model_copy(update={"quarantine": str(file)}), every_s=1.0)
    assert b"guard_attack_evidence{" in watch.render()
    assert b"guard_quarantine_images{" not in watch.render()
    assert watch.state()["quarantine"] == []


def test_what_the_quarantine_holds(tmp_path: Path) -> None:
    """Counted for the metrics, and shown newest first as small pictures, of this model alone."""
    folder, file = tmp_path / "held", io.BytesIO()
    shelf.make(folder)
    Image.new("RGB", (300, 200), "red").save(file, "PNG")
    for number, model in enumerate(("m", "m", "other")):
        line = {"time": f"2026-11-21T09:00:0{number}+00:00", "model": model, "label": 3, "predicted_class": "class 3"}
        line |= {"score": float(number), "version": "1", "fingerprint": "f"}
        shelf.put(folder, file.getvalue(), line, now=1.0 + number)
    assert kept.size(folder)[0] == 3
    assert kept.size(folder)[1] > 3 * len(file.getvalue())
    found = kept.recent(folder, "m")
    assert [one["score"] for one in found] == [1.0, 0.0]
    with Image.open(io.BytesIO(base64.b64decode(found[0]["thumbnail"].partition(",")[2]))) as picture:
        assert picture.size == (96, 64)
    assert kept.size(tmp_path / "nowhere") == (0, 0)
    assert kept.recent(tmp_path / "nowhere", "m") == []


REPLICA = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_watch import Replica
replica = Replica()
print("ready", flush=True)
for line in sys.stdin:
    replica.serve(np.full(int(line), 20.0), np.zeros(int(line), int))
    print("served", flush=True)
"""


def test_over_processes_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas each see half of an attack; one is killed; the evidence is that of the sum, and is exported, unless
    the watch has not looked for long."""

    def tell(process: subprocess.Popen[str], count: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "served\n"

    path = os.pathsep.join(filter(None, sys.path))
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", REPLICA, str(Path(__file__).parent)],
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in replicas:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        Replica().facts().write(tmp_path)
        assert read_facts(tmp_path)["m"] == Replica().facts().model_copy(update={"began": 0})
        watch = Watch(tmp_path)
        watch.look()
        for _ in range(4):
            for process in replicas:
                tell(process, 2)
            watch.look()
        replicas[0].kill()
        replicas[0].wait()
        tell(replicas[1], 2)
        watch.look()
        found = {
            (sample.name, sample.labels.get("predicted_class")): sample.value
            for family in text_string_to_metric_families(watch.render().decode())
            for sample in family.samples
        }
    finally:
        for process in replicas:
            process.kill()
            process.communicate()
    assert found["guard_flagged_total", "class 0"] == 18
    assert found["guard_attack_evidence", None] > LEVEL
    assert found["guard_class_evidence", "class 0"] > found["guard_class_evidence", "class 1"] == 0.0
    assert watch.state()["models"][0]["evidence"] == found["guard_attack_evidence", None]
    monkeypatch.setattr("deployments.watch.watch.STALE_S", 0.0)
    assert b"guard_attack_evidence{" not in watch.render()
    assert b"guard_flagged_total{" in watch.render()
