"""Every series that the guard exports, in one table, at zero before the first event.

In a replica ``prometheus_client`` runs in its multiprocess mode: with ``PROMETHEUS_MULTIPROC_DIR`` set before the
process starts, counters live in files that survive a crash, and ``exposition`` merges them over the replicas.
"""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deployments.config import MODES
from deployments.series import CLASSES, OTHER, SERIES, TENTHS
from guard.drift import brightness_and_contrast

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
MAGNITUDES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
FEATURED = 4  # images a request
EVENTS = ("sent", "dropped", "failed")
KEPT = ("kept", "dropped", "failed")
SCORES = (*(-size for size in reversed(MAGNITUDES)), 0.0, *MAGNITUDES)


FEW = 4  # values that are observed faster one by one


class Distribution(Histogram):
    """A histogram that takes many values at once: a batch's cost as much as a few requests' one by one."""

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """As ``observe`` for each of values [n]."""
        if len(values) < FEW:
            for value in values.tolist():
                self.observe(value)
            return
        found = np.bincount(np.searchsorted(self._upper_bounds, values), minlength=len(self._buckets))
        self._sum.inc(float(values.sum()))
        for bucket, count in zip(self._buckets, found.tolist(), strict=False):  # NaN is beyond the last
            if count:
                bucket.inc(count)


class Metrics:
    """The series of one model. Each attribute with labels is called with their values: ``requests(mode, verdict)``.
    A request looks up a dozen of them, so that what was looked up once is kept.

    Args:
        model: the model's name, first label of nearly every series. classes: the names of its classes.
        registry: where the series register. score_buckets: rising upper bounds in logits; the score is signed.

    labels: the values of ``predicted_class`` from the start on. bounds: the buckets of score, brightness and contrast.
    """

    def __init__(
        self,
        model: str,
        classes: Sequence[str],
        *,
        registry: CollectorRegistry,
        score_buckets: Sequence[float] = SCORES,
        brightness_buckets: Sequence[float] = (),
        contrast_buckets: Sequence[float] = (),
    ) -> None:
        self._classes = classes
        self.labels = tuple(classes) if len(classes) <= CLASSES else (OTHER,)
        self._own = {*self.labels}  # and those of classes that were flagged since
        self._score_bounds = (min(score_buckets), max(score_buckets))
        self.bounds = {
            "score": tuple(score_buckets),
            "brightness": tuple(brightness_buckets or TENTHS),
            "contrast": tuple(contrast_buckets or TENTHS),
        }

        def counter(name: str) -> Callable[..., Counter]:
            return lookup(Counter, name)

        def histogram(name: str, buckets: Sequence[float] = ()) -> Callable[..., Distribution]:
            return lookup(Distribution, name, buckets=buckets or SERIES[name].buckets)

        def gauge(name: str) -> Callable[..., Gauge]:
            return lookup(Gauge, name, multiprocess_mode="livemostrecent")

        def lookup(kind: Callable[..., Any], name: str, **more: Any) -> Callable[..., Any]:
            series = SERIES[name]
            family = kind(name, series.text, ("model", *series.labels), registry=registry, **more)
            return cache(partial(family.labels, model))

        self.requests = counter("guard_requests_total")
        self.inputs = counter("guard_inputs_total")
        self.predicted = counter("guard_predicted_total")
        self.flagged = counter("guard_flagged_total")
        self.corrected = counter("guard_corrected_total")
        self.rejected = counter("guard_rejected_total")
        self.failures = counter("guard_failures_total")
        self.events = counter("guard_events_total")
        self.quarantined = counter("guard_quarantined_total")
        self.score = histogram("guard_score", score_buckets)
        self.p_value = histogram("guard_p_value")
        self.stage_seconds = histogram("guard_stage_seconds")
        self.batch_size = histogram("guard_batch_size")
        self.brightness = histogram("guard_input_brightness", self.bounds["brightness"])
        self.contrast = histogram("guard_input_contrast", self.bounds["contrast"])
        self._threshold = gauge("guard_threshold")
        self._nominal = gauge("guard_nominal_false_positive_ratio")
        self._calibrated = gauge("guard_calibrated_timestamp_seconds")
        self._artifact = gauge("guard_artifact_info")
        self._served: Gauge | None = None
        self._flags_by_p_value = False
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        for mode in MODES:
            for verdict in VERDICTS:
                self.requests(mode, verdict)
        for verdict in VERDICTS:
            self.inputs(verdict)
        for label in self._own:
            self.flagged(label)
            self.predicted(label)
        for stage, outcome in FAILURES:
            self.failures(stage, outcome)
        for stage in STAGES:
            self.stage_seconds(stage)
        for outcome in EVENTS:
            self.events(outcome)
        for outcome in KEPT:
            self.quarantined(outcome)
        for series in (self.corrected, self.rejected, self.score, self.p_value, self.batch_size):
            series()
        for series in (self.brightness, self.contrast):
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
        """Say below which p-value images are flagged; None, where there are none, leaves the series out."""
        if p_value is not None or self._flags_by_p_value:
            self._threshold().set(math.nan if p_value is None else p_value)
            self._nominal().set(math.nan if p_value is None else p_value)
            self._flags_by_p_value = True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, whether or not it succeeds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds(name).observe(time.perf_counter() - started)

    def images(self, *requests: NDArray[np.float32]) -> None:
        """Observe brightness and contrast of the first few of the images [n, C, H, W] of each request."""
        features = [brightness_and_contrast(images[:FEATURED]) for images in requests]
        for series, values in zip((self.brightness(), self.contrast()), zip(*features, strict=True), strict=True):
            series.observe_many(np.concatenate(values))

    def verdicts(self, label: NDArray[np.int64], flagged: NDArray[np.bool_]) -> None:
        """Count judged images: label, flagged [n]."""
        flags = flagged.tolist()
        count = sum(flags)
        if count:
            self.inputs("flagged").inc(count)
        if count < len(flags):
            self.inputs("clean").inc(len(flags) - count)
        labels = [self._class_label(index, flag) for index, flag in zip(label.tolist(), flags, strict=True)]
        for name, number in Tally(labels).items():
            self.predicted(name).inc(number)
        if count:
            for name, flag in zip(labels, flags, strict=True):
                if flag:
                    self.flagged(name).inc()

    def _class_label(self, index: int, flagged: bool) -> str:
        """What predicted_class says of a class: its name while there are few, else after its first flagged image."""
        name = self._classes[index]
        if name in self._own:
            return name
        if flagged and len(self._own) <= CLASSES:
            self._own.add(name)  # from the next one on: this one has it for being flagged, so it tells nothing
        return OTHER

    def statistics(self, score: NDArray[np.float64], p_value: NDArray[np.float64] | None) -> None:
        """Observe score and, if any, p-value [n].

        An infinite score counts just beyond the last bucket: the sum stays finite.
        """
        low, high = self._score_bounds
        self.score().observe_many(np.where(np.isfinite(score), score, np.where(score < 0, low, high + 1)))
        if p_value is not None:
            self.p_value().observe_many(p_value)


def input_buckets(manifest: Mapping[str, Any], feature: str) -> tuple[float, ...]:
    """Tenths of the clean images by brightness or contrast; empty where the artifact does not record them."""
    quantiles = manifest.get("fit", {}).get("inputs", {}).get(feature, ())
    if not quantiles:
        return ()
    return tuple(sorted({float(f"{value:.4g}") for value in np.quantile(quantiles, np.linspace(0.1, 0.9, 9))}))


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
