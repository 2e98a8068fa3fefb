"""Drift: silent on what looks like the clean set, loud on what does not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from guard.drift import LEAST, Window, brightness_and_contrast

BOUNDS = np.linspace(0.1, 0.9, 9)
SHARES = np.full(10, 0.1)


def counts(values: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(BOUNDS, values), minlength=10).astype(float)


def test_it_says_nothing_of_few() -> None:
    window = Window(10)
    window.update(counts(np.random.default_rng(0).random(int(LEAST) - 10)))
    assert window.excess(SHARES, 500) is None


def test_the_clean_sets_law_is_no_drift() -> None:
    """Of 300 windows over the same law, compared with a clean set of 300 drawn from it, few exceed chance."""
    rng = np.random.default_rng(1)
    loud = 0
    for _ in range(300):
        window = Window(10)
        window.update(counts(rng.random(1000)))
        clean = counts(rng.random(300)) / 300
        excess = window.excess(clean, 300)
        assert excess is not None
        loud += excess > 0
    assert loud <= 3 + 3 * 3**0.5


def test_a_shift_is_the_statistic_less_chance() -> None:
    """With bins as fine as the sample's grid: scipy's statistic, less the band."""
    rng = np.random.default_rng(2)
    here = ((rng.beta(2, 1, 2000) * 10).astype(int) + 0.5).round(1) / 10
    window = Window(10, half_life=np.inf)
    window.update(counts(here))
    grid = np.repeat((np.arange(10) + 0.5).round(1) / 10, 100)
    distance = scipy.stats.ks_2samp(here, grid).statistic
    excess = window.excess(SHARES, 1000)
    assert window.size == 2000
    assert excess == pytest.approx(distance - 1.63 * (1 / 2000 + 1 / 1000) ** 0.5)
    assert excess > 0.1


def test_the_past_fades() -> None:
    """After a shift a window of half-life 2,000 shows it within 2,000 images; after 10,000 clean ones it is gone."""
    rng = np.random.default_rng(3)
    window = Window(10)
    for _ in range(100):
        window.update(counts(rng.random(100)))
    assert window.excess(SHARES, 500) == 0.0
    assert window.size < 7000
    for _ in range(20):
        window.update(counts(rng.random(100) ** 2))
    shifted = window.excess(SHARES, 500)
    assert shifted is not None
    assert shifted > 0.02
    for _ in range(100):
        window.update(counts(rng.random(100)))
    assert window.excess(SHARES, 500) == 0.0


def test_the_first_bins_alone() -> None:
    window = Window(10, half_life=np.inf)
    window.update(np.arange(100.0, 110.0))
    part = window.first(4)
    assert part.size == pytest.approx(100 + 101 + 102 + 103)
    assert part.excess(np.full(4, 0.25), 1000) == 0.0


def test_brightness_and_contrast_are_numpys() -> None:
    images = np.random.default_rng(4).random((3, 3, 224, 224), dtype=np.float32)
    images[2] = 0.25
    brightness, contrast = brightness_and_contrast(images)
    np.testing.assert_allclose(brightness, images.reshape(3, -1).mean(1), rtol=1e-6)
    np.testing.assert_allclose(contrast, images.reshape(3, -1).std(1), atol=1e-3)
