"""Settings of a fit: values that check themselves when they are built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from guard.errors import BadSetting
from guard.null import LAWS

BOUNDS = ("quantile", "learned")
REFINEMENTS = ("tv", "js", "kl", "closed")


def between(name: str, value: float, low: float, high: float) -> None:
    """Refuse a setting that is no number strictly between ``low`` and ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise BadSetting(f"{name}: expected a number between {low:g} and {high:g}, got {value!r}.", field=name)


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a setting that is no whole number from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadSetting(f"{name}: expected a whole number of at least {least}, got {value!r}.", field=name)


@dataclass(frozen=True)
class LearningSettings:
    """How MMAC learns bounds (paper 2308.04617, Algorithm 1; see `guard.methods.mmac.learn_bounds`).

    steps: descent steps (T_max). batch: clean images a step. learning_rate: of Adam, in units of each channel's
    spread over the clean set. accuracy: π, the share of the original's accuracy on the clean set to be kept.
    weight: λ at the start. weight_factor: α. weight_every: steps between changes of λ.
    surrogates: J, margin maxima a class. ascent_steps, ascent_step_size: of the margin maximisation.
    refresh: T, steps between new margin maxima. classes: classes drawn at each refresh; the cost is linear in it.
    """

    steps: int = 60
    batch: int = 125
    learning_rate: float = 0.02
    accuracy: float = 0.95
    weight: float = 0.1
    weight_factor: float = 1.2
    weight_every: int = 5
    surrogates: int = 5
    ascent_steps: int = 30
    ascent_step_size: float = 0.1
    refresh: int = 30
    classes: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "weight_every", "surrogates", "ascent_steps", "refresh"):
            at_least(name, getattr(self, name), 1)
        at_least("batch", self.batch, 2)
        at_least("classes", self.classes, 2)
        between("accuracy", self.accuracy, 0.0, 1.0)
        between("learning_rate", self.learning_rate, 0.0, 10.0)
        between("weight", self.weight, 0.0, 1e6)
        between("weight_factor", self.weight_factor, 1.0, 100.0)
        between("ascent_step_size", self.ascent_step_size, 0.0, 1.0)


@dataclass(frozen=True)
class BnaSettings:
    """How BNA corrects activation distributions (paper 2308.09850; see `guard.methods.bna`).

    targets: the attacker's classes, if a scan found them before; None scans. restarts: triggers of each kind that are
    estimated a target. images: clean images a step of that. rows: clean images that distributions are matched on, in
    one pass: this and ``batch`` (with gradients) decide the memory of a fit.
    quantiles: the clips to choose from, as tail shares of the clean activations. max_fpr_target: largest share of the
    clean set's images sent to a target that its corrected network may send elsewhere.
    refine: "tv", "js" or "kl": descend that divergence from the closed-form match; "closed": stay there.
    epochs, batch, learning_rate (of Adam, in units of each channel's deviation), bins, positions (sampled of a feature
    map): of the descent.
    """

    targets: tuple[int, ...] | None = None
    restarts: int = 3
    images: int = 20
    rows: int = 450
    quantiles: tuple[float, ...] = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04)
    max_fpr_target: float = 0.125
    refine: str = "tv"
    epochs: int = 10
    batch: int = 90
    learning_rate: float = 0.01
    bins: int = 64
    positions: int = 32

    def __post_init__(self) -> None:
        classes = self.targets
        if classes is not None and (
            not isinstance(classes, (tuple, list))
            or not classes
            or any(type(target) is not int or target < 0 for target in classes)
            or len(set(classes)) < len(classes)
        ):
            raise BadSetting(f"targets: expected different class indices, or None; got {classes!r}.", field="targets")
        for name in ("restarts", "images", "rows", "epochs", "positions"):
            at_least(name, getattr(self, name), 1)
        for name in ("batch", "bins"):
            at_least(name, getattr(self, name), 2)
        between("max_fpr_target", self.max_fpr_target, 0.0, 1.0)
        between("learning_rate", self.learning_rate, 0.0, 10.0)
        shares = self.quantiles
        if (
            not isinstance(shares, (tuple, list))
            or not shares
            or not all(isinstance(q, (int, float)) and 0.0 <= q < 0.5 for q in shares)
        ):
            raise BadSetting(f"quantiles: expected shares from 0 to below 0.5, got {shares!r}.", field="quantiles")
        if self.refine not in REFINEMENTS:
            raise BadSetting(f"refine: expected one of {', '.join(REFINEMENTS)}; got {self.refine!r}.", field="refine")


@dataclass(frozen=True)
class FitSettings:
    """What `guard.fit` does.

    fpr: θ, the nominal false-positive rate; a p-value below it flags. null: the law of the score on clean images.
    bounds: "quantile" (one pass over the clean set) or "learned" (MMAC). quantile: of each channel's spatial
    maximum over the clean set; where learned bounds start, too. folds: of the cross-fit. start: the first site
    that is corrected, as a share of the sites; later is cheaper and repairs less. dtype: "float32" or "bfloat16",
    for calibration and serving alike. batch_size: images a forward pass. seed: of every random draw.
    min_accuracy: the model's least accuracy on the clean set; None asks for clearly better than chance.
    fpr, null, bounds, quantile, folds, start and learning are of the method mmdf, bna of bna.
    """

    fpr: float = 0.005
    null: str = "exponential"
    bounds: str = "quantile"
    quantile: float = 0.95
    folds: int = 5
    start: float = 0.0
    dtype: str = "float32"
    batch_size: int = 64
    seed: int = 0
    min_accuracy: float | None = None
    learning: LearningSettings = field(default_factory=LearningSettings)
    bna: BnaSettings = field(default_factory=BnaSettings)

    def __post_init__(self) -> None:
        between("fpr", self.fpr, 0.0, 0.5)
        between("quantile", self.quantile, 0.0, 1.0)
        at_least("folds", self.folds, 2)
        at_least("batch_size", self.batch_size, 1)
        at_least("seed", self.seed, 0)
        between("seed", self.seed, -1, 2**63 - 1)
        for name, options in (("null", tuple(LAWS)), ("bounds", BOUNDS), ("dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in options:
                raise BadSetting(
                    f"{name}: expected one of {', '.join(options)}; got {getattr(self, name)!r}.", field=name
                )
        if not isinstance(self.start, (int, float)) or not 0.0 <= self.start < 1.0:
            raise BadSetting(f"start: expected a share from 0 to below 1, got {self.start!r}.", field="start")
        if self.min_accuracy is not None:
            between("min_accuracy", self.min_accuracy, 0.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists instead of tuples
        return plain
