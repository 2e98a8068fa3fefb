"""Evidence that an attack is under way: bets against "this is clean traffic" that nobody can win for long by luck.

Each bet multiplies its capital by a factor whose mean over clean traffic is at most 1 (an e-value). As a change
detector a bet that has lost starts again from 1: C ← max(1, C) · factor, the CUSUM e-detector of Shin, Ramdas and
Rinaldo (arXiv 2203.03532, Sec. 2), which stays below the Shiryaev-Roberts one. By Doob's inequality the weighted mean
C̄ of many such bets reaches c within n clean images with a chance of at most n / c, whenever and however often it is
read; the mean number of clean images to a false alarm at c is at least c.

What is bet on are counts, so that several servers' counts can be added up first, and no request waits for it:

- *power bets* (Vovk and Wang, arXiv 1912.06116, Sec. 2) on binned p-values: 1 + λ (κ u^(κ−1) / ρ − 1) for a p-value in
  a bin that ends at u, for several κ and λ;
- *share bets*, per class: the likelihood ratio of a share q of flagged images against a share ρ α.

ρ, the tolerance, is by how much clean traffic may exceed what the artifact promises before it counts as evidence: the
law behind the p-values is estimated on a few hundred images, and holds for all classes together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

POWERS = (0.1, 0.3, 0.5)  # κ
STAKES = (0.003, 0.01, 0.03, 0.1, 0.3)  # λ
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.95, 0.99)  # q, those above ρ α
POWER_TOLERANCE = 2.0
SHARE_TOLERANCE = 3.0
CEILING = 12.0  # log10: more would only make an alarm last longer once its cause is gone


@dataclass(frozen=True)
class Bets:
    """J bets on a stream whose items fall into B bins. logs: [J, B], what an item of a bin adds to log capital."""

    logs: Values

    def __post_init__(self) -> None:
        if self.logs.ndim != 2 or not np.isfinite(self.logs).all():
            raise ValueError(f"logs: expected finite values [bets, bins]; got {self.logs.shape}")


def power_bets(bounds: Sequence[float], *, least: float, tolerance: float = POWER_TOLERANCE) -> Bets:
    """Bets on p-values in bins (bounds[b-1], bounds[b]].

    Args:
        bounds: rising upper ends, the last one 1. least: p-values below it count as this one, in (0, 1]: what the
            clean set supports without extrapolation. tolerance: ρ ≥ 1.
    """
    upper = np.maximum(np.asarray(bounds, dtype=np.float64), least)
    if upper[-1] != 1.0 or (np.diff(bounds) <= 0).any() or not 0.0 < least <= 1.0 or tolerance < 1.0:
        raise ValueError(f"bounds must rise to 1, least be in (0, 1], tolerance at least 1; got {bounds}, {least}")
    rows = [
        np.log1p(stake * (power * upper ** (power - 1.0) / tolerance - 1.0)) for power in POWERS for stake in STAKES
    ]
    return Bets(np.stack(rows))


def share_bets(nominal: float, *, tolerance: float = SHARE_TOLERANCE) -> Bets:
    """Bets on (not flagged, flagged). nominal: α in (0, 1), the share of clean images that is flagged."""
    if not 0.0 < nominal < 1.0 or tolerance < 1.0:
        raise ValueError(f"nominal must be in (0, 1), tolerance at least 1; got {nominal}, {tolerance}")
    null = max(min(tolerance * nominal, 0.9), nominal)
    rows = [(np.log((1 - share) / (1 - null)), np.log(share / null)) for share in SHARES if share > null]
    return Bets(np.asarray(rows or [(0.0, 0.0)], dtype=np.float64))  # where nearly all is flagged there is no bet


class Detector:
    """The capital of several bets on one stream."""

    def __init__(self, bets: Bets) -> None:
        self._bets = bets
        self._log = np.full(len(bets.logs), -np.inf)

    def update(self, counts: Values) -> None:
        """counts: [B], the items of a moment, in any order."""
        gain = self._bets.logs @ np.asarray(counts, dtype=np.float64)
        if counts.any():
            self._log = np.minimum(np.maximum(self._log, 0.0) + gain, CEILING * np.log(10.0))

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the mean over the bets; 0 before the first item."""
        if np.isneginf(self._log).all():
            return 0.0
        top = float(self._log.max())
        return top + float(np.log(np.exp(self._log - top).mean()))


class Evidence:
    """Evidence against one model's traffic: half of the capital on all of it, half spread over the predicted classes.

    Args:
        everything: bets on bins of all images; None where there are no p-values to bin. by_class: label → bets on (not
            flagged, flagged) of the images predicted as it; classes whose images are never flagged are left out. new:
            bets on a class that turns up later, from the update after that: it may be here because it was flagged.
            most: how many classes there may be in the end, by default those known now.
    """

    def __init__(
        self,
        everything: Bets | None,
        by_class: Mapping[str, Bets],
        *,
        new: Bets | None = None,
        most: int | None = None,
    ) -> None:
        self._everything = None if everything is None else Detector(everything)
        self._classes = {label: Detector(bets) for label, bets in by_class.items()}
        self._new = new
        self._most = max(most or 0, len(by_class), 1)
        self._price = float(np.log(self._most))

    def update(self, counts: Values | None, flagged: Mapping[str, float], predicted: Mapping[str, float]) -> None:
        """What came since the last update.

        Args:
            counts: [B], images by bin. flagged, predicted: label → flagged images, and all judged images, of it.
        """
        if self._everything is not None and counts is not None:
            self._everything.update(counts)
        for label, detector in self._classes.items():
            hits = flagged.get(label, 0.0)
            detector.update(np.array([max(predicted.get(label, 0.0) - hits, 0.0), hits]))
        if self._new is not None:
            for label in sorted(predicted.keys() - self._classes.keys())[: max(self._most - len(self._classes), 0)]:
                self._classes[label] = Detector(self._new)

    @property
    def value(self) -> float:
        """log10 of the capital, in [0, `CEILING`]."""
        classes = [detector.log_capital - self._price for detector in self._classes.values()]
        parts = [np.logaddexp.reduce(classes)] if classes else []
        if self._everything is not None:
            parts.append(self._everything.log_capital)
        return _log10(float(np.logaddexp.reduce(parts) - np.log(len(parts)))) if parts else 0.0

    @property
    def by_class(self) -> dict[str, float]:
        """The same of each class alone, less its price: one of as many."""
        return {label: _log10(detector.log_capital - self._price) for label, detector in self._classes.items()}


def _log10(natural: float) -> float:
    return float(np.clip(natural / np.log(10.0), 0.0, CEILING))
