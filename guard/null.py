"""Laws of the margin change on clean images: from a score to a p-value.

A law is fitted on the scores of the clean set, best cross-fitted ones (see `guard.fit`). A larger score has a
smaller p-value. The shape matters more than anything: S is skewed with a heavy right tail, on which the paper's
Gaussian flags several times more clean images than its nominal rate says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from guard.errors import ArtifactMismatch, BadData, BadSetting

Floats = NDArray[np.float64]
TAIL_SHARE = 0.1  # of the clean scores, the part that a tail law is fitted on
LEAST = 20  # scores that any law needs


@dataclass(frozen=True)
class NullLaw(ABC):
    """The distribution of scores on clean images. ``n``: number of clean scores it was fitted on."""

    kind: ClassVar[str]
    n: int

    @classmethod
    @abstractmethod
    def fit(cls, scores: Floats) -> NullLaw:
        """Fit to finite scores [n]."""

    @abstractmethod
    def survival(self, scores: Floats) -> Floats:
        """P(S ≥ score) for finite scores [N]."""

    def check(self) -> None:
        """Raise ValueError where numbers from a file make no law: not finite, a scale of zero, scores out of order."""
        for name, value in asdict(self).items():
            values = np.asarray(value, dtype=np.float64)
            if not np.isfinite(values).all() or (name in ("std", "scale", "n") and values <= 0):
                raise ValueError(f"null: {name} = {value!r}")
            if name == "scores" and (not values.size or (np.diff(values) < 0).any()):
                raise ValueError("null: the scores are not in order")

    @property
    def floor(self) -> float:
        """The smallest p-value that the law can give (0 for laws that extrapolate beyond the data)."""
        return 0.0

    def p_value(self, scores: Floats) -> Floats:
        """The chance, in [0, 1], of a score at least this large on a clean image; 0 for +inf and NaN."""
        scores = np.asarray(scores, dtype=np.float64)
        finite = np.isfinite(scores)
        p = np.where(scores == -np.inf, 1.0, 0.0)
        p[finite] = np.clip(self.survival(scores[finite]), self.floor, 1.0)
        return p

    def threshold(self, fpr: float) -> float:
        """The score above which the p-value falls below ``fpr`` (by bisection; +inf below the floor)."""
        if fpr <= self.floor:
            return float("inf")
        low, high = self._bracket()
        while self.p_value(np.array([high]))[0] >= fpr:
            high += high - low
        for _ in range(200):
            middle = 0.5 * (low + high)
            if self.p_value(np.array([middle]))[0] < fpr:
                high = middle
            else:
                low = middle
        return float(high)

    @abstractmethod
    def _bracket(self) -> tuple[float, float]:
        """A score with a p-value near 1, and a larger one."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}}


@dataclass(frozen=True)
class Gaussian(NullLaw):
    """Normal law by mean and standard deviation: the paper's (Sec. 4). Flags too much on a heavy tail."""

    kind: ClassVar[str] = "gaussian"
    mean: float
    std: float

    @classmethod
    def fit(cls, scores: Floats) -> Gaussian:
        return cls(len(scores), float(scores.mean()), max(float(scores.std(ddof=1)), 1e-12))

    def survival(self, scores: Floats) -> Floats:
        return np.asarray(ndtr((self.mean - scores) / self.std), dtype=np.float64)

    def _bracket(self) -> tuple[float, float]:
        return self.mean - 8 * self.std, self.mean + 8 * self.std


@dataclass(frozen=True)
class _Empirical(NullLaw):
    """The clean scores themselves, ascending; ``scores`` is [n], or the part below a tail."""

    scores: tuple[float, ...]

    def _rank(self, scores: Floats) -> Floats:
        """(1 + number of the n clean scores that are at least as large) / (n + 1)."""
        below = np.searchsorted(np.asarray(self.scores), scores, side="left")
        return np.asarray((1.0 + self.n - below) / (self.n + 1.0), dtype=np.float64)

    def _bracket(self) -> tuple[float, float]:
        return self.scores[0] - 1.0, self.scores[-1] + 1.0


@dataclass(frozen=True)
class Conformal(_Empirical):
    """Rank among the clean scores: exact for exchangeable images, and never below 1 / (n + 1)."""

    kind: ClassVar[str] = "conformal"

    @classmethod
    def fit(cls, scores: Floats) -> Conformal:
        return cls(len(scores), tuple(np.sort(scores).tolist()))

    @property
    def floor(self) -> float:
        return 1.0 / (self.n + 1)

    def survival(self, scores: Floats) -> Floats:
        return self._rank(scores)


@dataclass(frozen=True)
class _Tail(_Empirical):
    """Ranks up to the (1 − share) quantile ``start``, a tail law beyond it. ``share``: P(S > start)."""

    start: float
    share: float
    scale: float

    def survival(self, scores: Floats) -> Floats:
        beyond = scores > self.start
        p = np.maximum(self._rank(scores), self.share)
        p[beyond] = self.share * self._beyond(scores[beyond] - self.start)
        return p

    @abstractmethod
    def _beyond(self, excess: Floats) -> Floats:
        """P(S > start + excess | S > start), excess > 0."""


def _split(scores: Floats) -> tuple[tuple[float, ...], float, float, Floats]:
    """(scores up to the start of the tail, start, share of scores in the tail, excesses over start)."""
    start = float(np.quantile(scores, 1.0 - TAIL_SHARE))
    excess = scores[scores > start] - start
    if not len(excess):
        raise BadData(
            "clean: the largest tenth of the clean scores are all equal, so no tail can be fitted. "
            "Use more, and more varied, clean images, or the conformal law.",
            field="clean",
        )
    return tuple(np.sort(scores[scores <= start]).tolist()), start, len(excess) / len(scores), excess


@dataclass(frozen=True)
class ExponentialTail(_Tail):
    """Ranks, then an exponential tail by maximum likelihood (scale = mean excess). The default."""

    kind: ClassVar[str] = "exponential"

    @classmethod
    def fit(cls, scores: Floats) -> ExponentialTail:
        bulk, start, share, excess = _split(scores)
        return cls(len(scores), bulk, start, share, float(excess.mean()))

    def _beyond(self, excess: Floats) -> Floats:
        return np.asarray(np.exp(-excess / self.scale), dtype=np.float64)


@dataclass(frozen=True)
class ParetoTail(_Tail):
    """Ranks, then a generalised Pareto tail by maximum likelihood (``shape`` > 0: heavier than exponential)."""

    kind: ClassVar[str] = "pareto"
    shape: float

    @classmethod
    def fit(cls, scores: Floats) -> ParetoTail:
        bulk, start, share, excess = _split(scores)
        from scipy.stats import genpareto  # not above: it takes a second, and the command line starts here

        shape, _, scale = genpareto.fit(excess, floc=0.0)
        if shape < -0.5:  # maximum likelihood is not regular there (Smith 1985): few excesses, an end just past them
            shape, scale = 0.0, excess.mean()
        return cls(len(scores), bulk, start, share, float(scale), float(shape))

    def _beyond(self, excess: Floats) -> Floats:
        from scipy.stats import genpareto

        return np.asarray(genpareto.sf(excess, self.shape, scale=self.scale), dtype=np.float64)


LAWS: dict[str, type[NullLaw]] = {law.kind: law for law in (ExponentialTail, ParetoTail, Conformal, Gaussian)}


def fit_law(kind: str, scores: Floats) -> NullLaw:
    """Fit the law named ``kind`` to the clean scores [n].

    Raises:
        BadSetting: unknown kind. BadData: fewer than 20 scores, or scores that are not finite.
    """
    if kind not in LAWS:
        raise BadSetting(f"null: expected one of {', '.join(LAWS)}; got {kind!r}.", field="null")
    scores = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise BadData(
            f"clean: {int((~np.isfinite(scores)).sum())} of {len(scores)} clean images give logits that are not "
            "finite. Check the weights and the range of the images.",
            field="clean",
        )
    if len(scores) < LEAST:
        raise BadData(f"clean: a null law needs at least {LEAST} images; got {len(scores)}.", field="clean")
    return LAWS[kind].fit(scores)


def law_from_json(value: Mapping[str, Any]) -> NullLaw:
    """The inverse of ``NullLaw.to_json``."""
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in LAWS:
        raise ArtifactMismatch(f"null: the artifact uses the law {kind!r}; this version knows {', '.join(LAWS)}.")
    law: Any = LAWS[kind]
    return cast(NullLaw, law(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}))
