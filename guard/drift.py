"""Drift: whether what comes still looks like the clean set, as far as a histogram tells."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEAST = 300.0  # images, under which nothing is said
BAND = 1.63  # of the Kolmogorov-Smirnov statistic of two samples: 99% of samples of one law stay below


class Window:
    """Counts of B bins in which older items fade: after ``half_life`` more items one counts half."""

    def __init__(self, bins: int, half_life: float = 2000.0) -> None:
        self._half_life = half_life
        self._counts = np.zeros(bins)
        self._squares = 0.0  # the sum of squared weights, for the size of an unfaded sample that says as much

    def update(self, counts: Values) -> None:
        """counts: [B], the items of a moment."""
        fade = 0.5 ** (counts.sum() / self._half_life)
        self._counts = self._counts * fade + counts
        self._squares = self._squares * fade**2 + counts.sum()

    @property
    def size(self) -> float:
        """Items that an unfaded sample of the same precision has."""
        return float(self._counts.sum() ** 2 / self._squares) if self._squares else 0.0

    def first(self, bins: int) -> Window:
        """The same of the items in the first ``bins`` bins alone."""
        part = Window(bins, self._half_life)
        part._counts = self._counts[:bins].copy()
        part._squares = self._squares * float(part._counts.sum() / max(self._counts.sum(), 1e-12))
        return part

    def excess(self, shares: Values, sample: int) -> float | None:
        """By how much the bins' distribution differs from ``shares`` beyond chance, in [0, 1].

        The largest difference of the cumulated shares (Kolmogorov-Smirnov), less what 99% of pairs of samples of one
        law show. None before `LEAST` items.

        Args:
            shares: [B], of a sample of ``sample`` items; they sum to 1.
        """
        if self.size < LEAST:
            return None
        here = np.cumsum(self._counts / self._counts.sum())
        distance = float(np.abs(here - np.cumsum(shares)).max())
        return max(0.0, distance - BAND * float(np.sqrt(1.0 / self.size + 1.0 / sample)))


def brightness_and_contrast(images: NDArray[np.float32]) -> tuple[Values, Values]:
    """Mean and standard deviation of each image's values: [n] each, of images [n, C, H, W] in [0, 1]."""
    flat = images.reshape(len(images), -1)
    size = flat.shape[1]
    mean = np.add.reduce(flat, 1).astype(np.float64) / size
    square = np.vecdot(flat, flat).astype(np.float64) / size
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))
