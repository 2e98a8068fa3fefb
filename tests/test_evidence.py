"""Evidence of an attack: the promise about false alarms, and how soon an attack is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.random import Generator

from deployments.series import P_VALUES
from guard.evidence import CEILING, Bets, Detector, Evidence, power_bets, share_bets

ALPHA, SUPPORT, CLASSES, TPR = 0.005, 1 / 501, 10, 0.95
LEVEL = 9.0  # of the alert
POWER, SHARE = power_bets(P_VALUES, least=SUPPORT), share_bets(ALPHA)
WIDTHS = np.diff([0.0, *P_VALUES])


def streams(rng: Generator, count: int, length: int, *, attack: float = 0.0, flags: float = ALPHA) -> tuple:
    """(bin of the p-value, class, flagged), each [count, length]. flags: how often a clean image is flagged."""
    shape = (count, length)
    p = rng.random(shape)
    p = np.where(rng.random(shape) < flags, p * ALPHA, ALPHA + p * (1 - ALPHA))
    hit = np.where(rng.random(shape) < TPR, rng.random(shape) * 1e-3, ALPHA + rng.random(shape) * (1 - ALPHA))
    triggered = rng.random(shape) < attack
    p = np.where(triggered, hit, p)
    label = np.where(triggered, 0, rng.integers(0, CLASSES, shape))
    return np.searchsorted(P_VALUES, p), label, p < ALPHA


def slow_evidence(bins: np.ndarray, label: np.ndarray, flagged: np.ndarray) -> np.ndarray:
    """log10 of the capital after each image of each stream [count, length], image by image: another implementation."""
    count, length = bins.shape
    every, by_class = np.ones((count, len(POWER.logs))), np.ones((count, CLASSES, len(SHARE.logs)))
    rows, out = np.arange(count), np.empty(bins.shape)
    for item in range(length):
        every = np.minimum(np.maximum(every, 1.0) * np.exp(POWER.logs[:, bins[:, item]].T), 10**CEILING)
        mine = by_class[rows, label[:, item]]
        gained = np.maximum(mine, 1.0) * np.exp(SHARE.logs[:, flagged[:, item].astype(int)].T)
        by_class[rows, label[:, item]] = np.minimum(gained, 10**CEILING)
        out[:, item] = np.log10(0.5 * every.mean(1) + 0.5 * by_class.mean(2).mean(1))
    return np.clip(out, 0.0, CEILING)


def fast(bins: np.ndarray, label: np.ndarray, flagged: np.ndarray, *, chunk: int = 1) -> list[float]:
    """What `Evidence` says of one stream, each [length], in chunks."""
    evidence, values = Evidence(POWER, {str(index): SHARE for index in range(CLASSES)}), []
    for start in range(0, len(bins), chunk):
        part = slice(start, start + chunk)
        counts = np.bincount(bins[part], minlength=len(P_VALUES)).astype(float)
        predicted = {str(index): float((label[part] == index).sum()) for index in range(CLASSES)}
        hits = {str(index): float((flagged[part] & (label[part] == index)).sum()) for index in range(CLASSES)}
        evidence.update(counts, hits, predicted)
        values.append(evidence.value)
    return values


@pytest.mark.parametrize("tolerance", [1.0, 2.0, 5.0])
def test_power_bets_are_fair(tolerance: float) -> None:
    """The mean factor is at most 1 for uniform p-values, and for those that are ``tolerance`` times as often small."""
    for least in (1e-4, 0.01, 0.3):
        factors = np.exp(power_bets(P_VALUES, least=least, tolerance=tolerance).logs)
        for times in {1.0, tolerance}:
            reached = np.minimum(np.cumsum(WIDTHS) * times, 1.0)
            assert (factors @ np.diff([0.0, *reached]) <= 1 + 1e-12).all()


@pytest.mark.parametrize("nominal", [0.001, 0.005, 0.1, 0.6, 0.95, 0.995])
def test_share_bets_are_fair(nominal: float) -> None:
    """At most 1 for any share of flags up to three times the nominal one (and nine tenths), exactly 1 there."""
    factors = np.exp(share_bets(nominal).logs)
    limit = max(min(3 * nominal, 0.9), nominal)
    for share in np.linspace(0, limit, 7):
        assert (factors @ [1 - share, share] <= 1 + 1e-12).all()
    np.testing.assert_allclose(factors @ [1 - limit, limit], 1.0)


def test_it_is_the_slow_one() -> None:
    """Image by image, the same as the plain products."""
    bins, label, flagged = streams(np.random.default_rng(0), 1, 1500, attack=0.02)
    np.testing.assert_allclose(fast(bins[0], label[0], flagged[0]), slow_evidence(bins, label, flagged)[0], atol=1e-9)


def test_chunks_never_say_more() -> None:
    """Counts of many images at once: no larger than what one would read image by image at the same moments."""
    bins, label, flagged = streams(np.random.default_rng(1), 1, 2000, attack=0.004)
    one = fast(bins[0], label[0], flagged[0])
    assert 0.5 < max(one) < CEILING - 1  # what is capped on the way may end lower
    for chunk in (10, 100):
        at_once = fast(bins[0], label[0], flagged[0], chunk=chunk)
        assert all(a <= b + 1e-9 for a, b in zip(at_once, one[chunk - 1 :: chunk], strict=True))


@pytest.mark.parametrize("flags", [ALPHA, 2 * ALPHA])
def test_false_alarms_keep_the_bound(flags: float) -> None:
    """1,000 clean streams of 2,000 images, also where clean images are flagged twice as often as promised: at most
    n / c of them ever reach c."""
    reached = slow_evidence(*streams(np.random.default_rng(2), 1000, 2000, flags=flags)).max(1)
    for level in (3.5, 4.0, 5.0):
        assert (reached >= level).mean() <= 2000 / 10**level
    assert reached.max() < LEVEL


def until_alarm(attack: float, length: int, count: int = 41) -> float:
    """Median number of requests until the alert's level is reached."""
    values = slow_evidence(*streams(np.random.default_rng(3), count, length, attack=attack))
    first = [float(np.argmax(row >= LEVEL)) + 1 if row.max() >= LEVEL else math.inf for row in values]
    return float(np.median(first))


def test_attacks_are_seen() -> None:
    """TPR 0.95, FPR 0.5%, ten classes: an attack on one request in ten within 150 requests, one in a hundred within
    3,000; one in a thousand hides below the tolerance."""
    found = {attack: until_alarm(attack, length) for attack, length in ((0.1, 400), (0.01, 5000), (0.001, 5000))}
    print(f"median requests until the alarm: {found}")
    assert found[0.1] < 150
    assert found[0.01] < 3000
    assert found[0.001] == math.inf


def test_an_alarm_ends() -> None:
    """Evidence is capped, so that clean traffic brings it down again within some thousand requests."""
    rng = np.random.default_rng(4)
    attacked, after = streams(rng, 1, 5000, attack=0.5), streams(rng, 1, 12000)
    parts = [np.concatenate([a[0], b[0]]) for a, b in zip(attacked, after, strict=True)]
    values = fast(*parts, chunk=100)
    assert CEILING - 1 < max(values) <= CEILING
    assert values[-1] < LEVEL


def test_without_p_values() -> None:
    """A method without p-values bets on the flags of the classes it corrects alone."""
    evidence = Evidence(None, {"ant": share_bets(0.05)})
    evidence.update(None, {}, {"ant": 50.0, "bee": 500.0})
    assert evidence.value == 0.0
    evidence.update(None, {"ant": 60.0}, {"ant": 80.0})
    assert evidence.value > LEVEL
    assert evidence.by_class.keys() == {"ant"}
    assert Evidence(None, {}).value == 0.0


def test_bad_bets_are_refused() -> None:
    with pytest.raises(ValueError, match="bounds"):
        power_bets((0.5, 0.2, 1.0), least=0.1)
    with pytest.raises(ValueError, match="bounds"):
        power_bets((0.5, 0.9), least=0.1)
    with pytest.raises(ValueError, match="nominal"):
        share_bets(0.0)
    with pytest.raises(ValueError, match="logs"):
        Bets(np.full((2, 2), -np.inf))
    assert Detector(SHARE).log_capital == 0.0
