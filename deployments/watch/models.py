"""What is watched of one model: evidence of an attack, drift, and how both went."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deployments.series import CLASSES, OTHER, P_VALUES
from deployments.watch.counters import Counters, Histogram
from deployments.watch.facts import SHAPES, Facts, Shape
from guard.drift import Window
from guard.evidence import Bets, Evidence, power_bets, share_bets

K = TypeVar("K")
SETTLE_S = 10.0
POINTS = 180  # of the history, that the page draws
FEATURES = ("brightness", "contrast")


class Moment(NamedTuple):
    """What has been counted so far. p_values: by the upper end of their bins. flagged, predicted: by class. shapes:
    score, brightness and contrast, each by the upper end of its bins."""

    p_values: dict[float, float]
    flagged: dict[str, float]
    predicted: dict[str, float]
    shapes: dict[str, dict[float, float]]


class Watched:
    """One model, from its first look on: what came before is no evidence, since nobody knows when it came."""

    def __init__(self, facts: Facts, *, every_s: float, keep_s: float = 1800.0) -> None:
        self.history: deque[dict[str, float]] = deque(maxlen=int(keep_s / every_s))
        self.seen = time.monotonic()  # when its counters were last taken in
        self._before: Moment | None = None
        self._take(facts, settled=-math.inf)

    def _take(self, facts: Facts, settled: float) -> None:
        """Begin anew: of another artifact or threshold nothing is known yet. Before the time ``settled`` batches that
        began under the one before may still be counted."""
        self.facts = facts
        self._settled = settled
        everything: Bets | None = None
        if facts.support is not None:
            everything = power_bets(P_VALUES, least=facts.support)
        self.evidence = Evidence(
            everything,
            {label: share_bets(share) for label, share in facts.nominal.items()},
            new=None if facts.threshold is None else share_bets(facts.threshold),
            most=CLASSES + 1 if OTHER in facts.labels else None,
        )
        self._windows: dict[str, Window] = {}

    def look(self, counters: Counters, facts: Facts | None, now: float) -> None:
        """Take in what was counted since the last look. facts: None while replicas do not agree, which says nothing."""
        moment = _moment(counters)
        before, self._before = self._before, moment  # whatever fails below, nothing is bet on twice
        self.seen = self.seen if facts is None else time.monotonic()
        if facts is not None and _but_shapes(facts) != _but_shapes(self.facts):
            self._take(facts, settled=now + SETTLE_S)
        elif facts is not None:
            self._reshape(facts)
            if before is not None and now > self._settled:
                self._update(before, moment)
        self.history.append(
            {
                "time": now,
                "evidence": self.evidence.value,
                "images": sum(moment.predicted.values()),
                "flagged": sum(moment.flagged.values()),
            }
        )

    def _reshape(self, facts: Facts) -> None:
        """The same artifact, in other bins perhaps: of those nothing is known yet."""
        for name in SHAPES:
            if getattr(facts, name) != getattr(self.facts, name):
                self._windows.pop(name, None)
        self.facts = facts

    def _update(self, before: Moment, after: Moment) -> None:
        bins = _increase(before.p_values, after.p_values)
        shapes = {
            name: _increase(before.shapes.get(name, {}), counts)
            for name, counts in after.shapes.items()
            if getattr(self.facts, name) is not None
        }
        self.evidence.update(
            np.array([bins.get(bound, 0.0) for bound in P_VALUES]),
            _increase(before.flagged, after.flagged),
            _increase(before.predicted, after.predicted),
        )
        for name, counts in shapes.items():
            bounds = (*getattr(self.facts, name).bounds, math.inf)
            if any(number for bound, number in counts.items() if bound not in bounds):
                self._windows.pop(name, None)  # a replica has other bins, those of the artifact that it began with
            else:
                window = self._windows.setdefault(name, Window(len(bounds)))
                window.update(np.array([counts.get(bound, 0.0) for bound in bounds]))

    def drift(self, name: str) -> float | None:
        """Of "score", "brightness" or "contrast": see `guard.drift.Window.excess`; None while it is not known."""
        clean: Shape | None = getattr(self.facts, name)
        window = self._windows.get(name)
        if clean is None or window is None:
            return None
        if name != "score":
            return window.excess(np.asarray(clean.shares), clean.images)
        kept = _unflagged(clean, self.facts.score_limit)
        shares = np.asarray(clean.shares)[:kept]
        return window.first(kept).excess(shares / shares.sum(), clean.images) if shares.sum() else None


def _moment(counters: Counters) -> Moment:
    shapes = {}
    for name, series in (("score", "guard_score"), *((one, f"guard_input_{one}") for one in FEATURES)):
        histogram = counters.histogram(series)
        if histogram is not None:
            shapes[name] = _by_bound(histogram)
    p_values = counters.histogram("guard_p_value")
    return Moment(
        {} if p_values is None else _by_bound(p_values),
        {label: value for (label,), value in counters.by("guard_flagged_total", "predicted_class").items()},
        {label: value for (label,), value in counters.by("guard_predicted_total", "predicted_class").items()},
        shapes,
    )


def _but_shapes(facts: Facts) -> Facts:
    return facts.model_copy(update=dict.fromkeys(SHAPES))


def _by_bound(histogram: Histogram) -> dict[float, float]:
    return dict(zip(histogram.bounds.tolist(), histogram.counts.tolist(), strict=True))


def _increase(before: Mapping[K, float], after: Mapping[K, float]) -> dict[K, float]:
    """What was added; counters that fell back, as after a wiped folder, have added nothing."""
    return {key: max(value - before.get(key, 0.0), 0.0) for key, value in after.items()}


def _unflagged(shape: Shape, limit: float | None) -> int:
    """How many bins hold only scores that are not flagged."""
    return sum(1 for _ in itertools.takewhile(lambda bound: limit is None or bound <= limit, shape.bounds))


def summary(watched: Watched, counters: Counters) -> dict[str, Any]:
    """What the built-in page shows of a model."""
    facts = watched.facts
    flagged = counters.by("guard_flagged_total", "predicted_class")
    predicted = counters.by("guard_predicted_total", "predicted_class")
    evidence = watched.evidence.by_class
    return {
        "model": facts.model,
        "version": facts.version,
        "method": facts.method,
        "fingerprint": facts.fingerprint,
        "calibrated_at": facts.calibrated_at,
        "threshold": facts.threshold,
        "evidence": watched.evidence.value,
        "drift": {name: watched.drift(name) for name in ("score", *FEATURES)},
        "requests": _table(counters.by("guard_requests_total", "mode", "verdict"), "mode", "verdict"),
        "inputs": _table(counters.by("guard_inputs_total", "verdict"), "verdict"),
        "failures": _table(counters.by("guard_failures_total", "stage", "outcome"), "stage", "outcome"),
        "corrected": counters.value("guard_corrected_total") or 0.0,
        "rejected": counters.value("guard_rejected_total") or 0.0,
        "classes": [
            {
                "label": label,
                "predicted": predicted.get((label,), 0.0),
                "flagged": flagged.get((label,), 0.0),
                "evidence": evidence.get(label, 0.0),
            }
            for (label,) in sorted(predicted)
        ],
        "score": _picture(counters.histogram("guard_score"), facts.score) | {"limit": facts.score_limit},
        "p_value": _picture(counters.histogram("guard_p_value"), None),
        "stages": {
            stage: _picture(counters.histogram("guard_stage_seconds", stage=stage), None)
            for (stage,) in counters.by("guard_stage_seconds_count", "stage")
        },
        "history": list(watched.history)[:: -max(1, len(watched.history) // POINTS)][::-1],
    }


def _table(values: dict[tuple[str, ...], float], *names: str) -> list[dict[str, Any]]:
    return [dict(zip(names, key, strict=True)) | {"count": value} for key, value in sorted(values.items())]


def _picture(histogram: Histogram | None, clean: Shape | None) -> dict[str, Any]:
    """bounds without the infinite one, counts [B], sum, and the clean set's shares [B] where they are known."""
    if histogram is None:
        return {"bounds": [], "counts": [], "sum": 0.0, "clean": None}
    return {
        "bounds": histogram.bounds[:-1].tolist(),
        "counts": histogram.counts.tolist(),
        "sum": histogram.total,
        "clean": None if clean is None else list(clean.shares),
    }
