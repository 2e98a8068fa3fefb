"""Null laws against scipy, and against the false-positive rates that they promise."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from guard.errors import ArtifactMismatch, BadData, BadSetting
from guard.null import LAWS, NullLaw, fit_law, law_from_json

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
KINDS = sorted(LAWS)
SHAPES: dict[str, Draw] = {
    "exponential": lambda generator, n: generator.exponential(2.0, n) - 1.0,
    "gamma": lambda generator, n: generator.gamma(2.0, 1.0, n),
    "lognormal": lambda generator, n: generator.lognormal(0.0, 1.0, n),
    "normal": lambda generator, n: generator.normal(1.0, 2.0, n),
}


def scores(n: int = 500, shape: str = "gamma", seed: int = 0) -> NDArray[np.float64]:
    return SHAPES[shape](np.random.default_rng(seed), n)


def grid(law_scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """From far below to far above the scores, and the scores themselves."""
    spread = np.ptp(law_scores)
    wide = np.linspace(law_scores.min() - spread, law_scores.max() + 20 * spread, 2000)
    return np.sort(np.concatenate([wide, law_scores]))


def test_gaussian_is_scipys() -> None:
    """The Gaussian law is the normal survival function at the sample's mean and standard deviation."""
    s = scores()
    expected = stats.norm(s.mean(), s.std(ddof=1)).sf(grid(s))
    assert np.allclose(fit_law("gaussian", s).p_value(grid(s)), expected, rtol=1e-12)


@pytest.mark.parametrize(("kind", "law"), [("exponential", stats.expon), ("pareto", stats.genpareto)])
def test_tails_are_scipys(kind: str, law: stats.rv_continuous) -> None:
    """Beyond the 90% quantile a tail law is the tenth of the scores there times scipy's maximum-likelihood fit."""
    s = scores()
    start = np.quantile(s, 0.9)
    excess = s[s > start] - start
    frozen = law(*law.fit(excess, floc=0.0))
    x = grid(s)[grid(s) > start]
    assert np.allclose(fit_law(kind, s).p_value(x), len(excess) / len(s) * frozen.sf(x - start), rtol=1e-9)


@pytest.mark.parametrize("kind", ["exponential", "pareto", "conformal"])
def test_ranks_by_counting(kind: str) -> None:
    """In the bulk a p-value is (1 + number of clean scores at least as large) / (n + 1), ties counted."""
    s = np.round(scores(200), 1)
    law = fit_law(kind, s)
    for x in np.unique(s[s < np.quantile(s, 0.89)]):
        assert law.p_value(np.array([x]))[0] == pytest.approx((1 + sum(s >= x)) / 201)


def rates(kind: str, shape: str, *, n: int = 500, fpr: float = 0.005, runs: int = 150) -> NDArray[np.float64]:
    """The true exceedance rate of the threshold in each of many fits, known from the law that draws the scores."""
    truth = {
        "exponential": stats.expon(-1.0, 2.0),
        "gamma": stats.gamma(2.0),
        "lognormal": stats.lognorm(1.0),
        "normal": stats.norm(1.0, 2.0),
    }[shape]
    return np.array([truth.sf(fit_law(kind, scores(n, shape, seed)).threshold(fpr)) for seed in range(runs)])


@pytest.mark.parametrize(
    ("kind", "shape", "low", "high"),
    [
        ("exponential", "exponential", 0.004, 0.0065),
        ("exponential", "gamma", 0.003, 0.0065),
        ("exponential", "lognormal", 0.002, 0.011),  # a tail heavier than exponential
        ("pareto", "exponential", 0.004, 0.007),
        ("pareto", "lognormal", 0.004, 0.007),
        ("gaussian", "normal", 0.0045, 0.006),
        ("gaussian", "exponential", 0.018, 0.04),  # the paper's law on skewed scores: several times too many
        ("gaussian", "lognormal", 0.015, 0.05),
        ("conformal", "gamma", 0.003, 0.005),
        ("conformal", "lognormal", 0.003, 0.005),
    ],
)
def test_realised_rate(kind: str, shape: str, low: float, high: float) -> None:
    """At nominal 0.5% and n = 500 the mean true rate lies in the band stated; no conformal one exceeds 0.5%."""
    runs = 40 if kind == "pareto" else 150
    found = rates(kind, shape, runs=runs)
    chance = 2.0 * found.std() / np.sqrt(runs)  # two standard errors of the mean
    assert low - chance <= found.mean() <= high + chance


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_p_values_never_rise(kind: str, seed: int) -> None:
    """A larger score has no larger p-value, and every p-value lies in [floor, 1]."""
    shape = list(SHAPES)[seed % len(SHAPES)]
    s = np.round(scores(25 + 40 * seed, shape, seed), 2)
    law = fit_law(kind, s)
    p = law.p_value(grid(s))
    assert (np.diff(p) <= 0).all()
    assert p.min() >= law.floor
    assert p.max() <= 1.0
    assert p[0] > 0.9


@pytest.mark.parametrize("fpr", [0.001, 0.005, 0.05, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_is_where_flags_begin(kind: str, fpr: float) -> None:
    """A p-value is below fpr just where the score is above the threshold."""
    s = scores()
    law = fit_law(kind, s)
    at = law.threshold(fpr)
    x = np.concatenate([grid(s), [at + 1e-6, at - 1e-6] if np.isfinite(at) else []])
    x = x[np.abs(x - at) > 1e-9]
    assert ((law.p_value(x) < fpr) == (x > at)).all()


@pytest.mark.parametrize(("n", "can"), [(199, False), (200, True)])
def test_conformal_floor(n: int, can: bool) -> None:
    """The conformal rank cannot go below 1 / (n + 1): 199 scores can never flag at 0.5%, 200 can."""
    law = fit_law("conformal", scores(n))
    assert law.floor == law.p_value(np.array([1e9]))[0] == 1 / (n + 1)
    assert bool(law.p_value(np.array([1e9]))[0] < 0.005) is can
    assert np.isfinite(law.threshold(0.005)) == can


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip(kind: str) -> None:
    """A law read back from JSON text gives the same p-values, bit for bit."""
    law = fit_law(kind, scores())
    again = law_from_json(json.loads(json.dumps(law.to_json(), allow_nan=False)))
    assert again == law
    assert (again.p_value(grid(scores())) == law.p_value(grid(scores()))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_not_finite(kind: str) -> None:
    """Whatever the law, +inf and NaN are as suspicious as can be, and −inf not at all."""
    p = fit_law(kind, scores()).p_value(np.array([np.inf, np.nan, -np.inf]))
    assert p.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores(kind: str) -> None:
    """From clean scores that are all equal a law is refused with a sentence, or flags only what is larger."""
    equal = np.full(100, 1.5)
    if kind in ("exponential", "pareto"):
        with pytest.raises(BadData, match="no tail can be fitted") as caught:
            fit_law(kind, equal)
        assert caught.value.field == "clean"
    else:
        p = fit_law(kind, equal).p_value(np.array([1.5, 1.6]))
        assert p[0] >= 0.5
        assert p[1] < 0.05


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_number_of_scores(kind: str, seed: int) -> None:
    """Twenty scores are enough for any law, without a warning: the largest of them is no surprise to it."""
    s = scores(20, "lognormal", seed)
    assert fit_law(kind, s).p_value(np.array([s.max()]))[0] > 1e-6


@pytest.mark.parametrize(
    ("kind", "given", "field", "says"),
    [
        ("cauchy", scores(), "null", "expected one of exponential, pareto, conformal, gaussian"),
        ("gaussian", scores(19), "clean", "at least 20 images; got 19"),
        ("gaussian", np.append(scores(99), np.nan), "clean", "1 of 100 clean images give logits that are not finite"),
        ("exponential", np.append(scores(99), np.inf), "clean", "not finite"),
    ],
)
def test_refusals(kind: str, given: NDArray[np.float64], field: str, says: str) -> None:
    """What cannot be fitted is refused with its reason."""
    with pytest.raises((BadData, BadSetting), match=says) as caught:
        fit_law(kind, given)
    assert caught.value.field == field


def test_unknown_law_in_an_artifact() -> None:
    """A law that this version does not know is refused by name."""
    with pytest.raises(ArtifactMismatch, match="'weibull'"):
        law_from_json({"kind": "weibull", "n": 3})


def test_every_law_is_a_law() -> None:
    """The dict of laws names each by its own kind."""
    assert all(law.kind == kind and issubclass(law, NullLaw) for kind, law in LAWS.items())
