"""The counters of a folder, added up over the processes that wrote them, as numbers to calculate with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

Values = NDArray[np.float64]


class Sample(NamedTuple):
    """One series' value: its name, with ``_bucket`` and its like, and its labels but ``model``."""

    name: str
    labels: Mapping[str, str]
    value: float


class Histogram(NamedTuple):
    """bounds: upper ends of the bins, the last one infinite. counts: [B], items in each bin. total: the sum of the
    items."""

    bounds: Values
    counts: Values
    total: float


class Counters:
    """One model's series at one moment."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for sample in samples:
            self._samples.setdefault(sample.name, []).append(sample)

    def by(self, name: str, *labels: str, **wanted: str) -> dict[tuple[str, ...], float]:
        """Values of ``name`` by these labels, added up over all others; only samples with the labels ``wanted``."""
        found: dict[tuple[str, ...], float] = {}
        for sample in self._matching(name, wanted):
            key = tuple(sample.labels[label] for label in labels)
            found[key] = found.get(key, 0.0) + sample.value
        return found

    def value(self, name: str, **wanted: str) -> float | None:
        """The sum of the matching samples; None where there is none."""
        values = [sample.value for sample in self._matching(name, wanted)]
        return sum(values) if values else None

    def histogram(self, name: str, **wanted: str) -> Histogram | None:
        """None where nothing exports it."""
        cumulated = {float(le): value for (le,), value in self.by(f"{name}_bucket", "le", **wanted).items()}
        if not cumulated:
            return None
        bounds = np.array(sorted(cumulated))
        counts = np.diff([0.0, *(cumulated[bound] for bound in bounds)])
        return Histogram(bounds, np.maximum(counts, 0.0), self.value(f"{name}_sum", **wanted) or 0.0)

    def _matching(self, name: str, wanted: Mapping[str, str]) -> Iterator[Sample]:
        for sample in self._samples.get(name, ()):
            if all(sample.labels.get(label) == value for label, value in wanted.items()):
                yield sample


def counters(registry: CollectorRegistry) -> dict[str, Counters]:
    """model → its counters."""
    found: dict[str, list[Sample]] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = dict(sample.labels)
            model = labels.pop("model", None)
            if model is not None:
                found.setdefault(model, []).append(Sample(sample.name, labels, float(sample.value)))
    return {model: Counters(samples) for model, samples in found.items()}
