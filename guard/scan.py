"""Is this classifier backdoored, and towards which class? Estimated triggers, and which of them are too small.

A trigger that was trained in is far smaller than what it takes to send images to a class by other means. So the
smallest trigger of each class (or ordered pair of classes) is estimated on clean images, and the reciprocals of their
norms are looked through for outliers by the median absolute deviation (arXiv 2308.09850, Sec. 4.2 and Apdx C). A larger
score is more suspicious.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from guard.capture import Captured
from guard.checks import accuracy, check_accuracy, logits_of
from guard.config import at_least, between
from guard.data import as_float, check_images, check_labels
from guard.errors import BadModel, BadSetting
from guard.executors import Advance, Executor
from guard.inversion import KINDS, InversionSettings, Problem, Trigger, Work, invert, largest_norm, local, memory
from guard.margin import margin
from guard.progress import Progress, silent
from guard.surrogates import maximise_margins
from guard.versions import versions

Floats = NDArray[np.float64]
FEW = 10  # clean images a class under which estimates are known to be poor
FLOOR = 0.1  # of the median: the least deviation that scores are measured in, see `anomaly_scores`
INTRINSIC = 2.0  # arXiv 2308.09850, Apdx C names no factor: there it was 27.18 for both sources, 3.02 and 7.95 for each
MOVED = 0.5  # share of a class's images that a target's trigger must move for the class to be a source
SUSPICIOUS = 0.05  # of the second opinion's p-value, as its authors have it


@dataclass(frozen=True)
class ScanSettings:
    """What `scan` does.

    kinds: of triggers. pairs: a trigger for each ordered pair of classes instead of one for each target with all other
    classes pooled: K − 1 times the work, and the only way to see attacks whose target depends on the source.
    threshold: of the anomaly score; 7 is Apdx C's of arXiv 2308.09850, chosen there on other networks. starts, steps,
    step_size: margin maxima a class of the second opinion, and their ascent (`guard.surrogates`).
    min_accuracy: the model's least accuracy on the clean set; None asks for clearly better than chance.
    """

    kinds: tuple[str, ...] = KINDS
    pairs: bool = False
    threshold: float = 7.0
    starts: int = 10
    steps: int = 60
    step_size: float = 0.1
    min_accuracy: float | None = None
    inversion: InversionSettings = field(default_factory=InversionSettings)

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise BadSetting(
                f"kinds: expected some of {', '.join(KINDS)}, each once; got {self.kinds!r}.", field="kinds"
            )
        between("threshold", self.threshold, 0.0, 1e6)
        at_least("starts", self.starts, 1)
        at_least("steps", self.steps, 1)
        between("step_size", self.step_size, 0.0, 1.0)
        if self.min_accuracy is not None:
            between("min_accuracy", self.min_accuracy, 0.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Entry(NamedTuple):
    """What gets a score: a target with all its sources pooled, or with one."""

    target: int
    sources: tuple[int, ...]


class Opinion(NamedTuple):
    """Another method's word (see `second_opinion`). margins: float [K], the largest found of each class, in logits.

    label: the class of the largest. p_value: None where the margins allow no fit.
    """

    label: int
    p_value: float | None
    margins: Floats

    @property
    def suspicious(self) -> bool:
        return self.p_value is not None and self.p_value < SUSPICIOUS


@dataclass(frozen=True, eq=False)
class Scan:
    """What a scan found.

    targets: the attacker's classes; pairs: (source, target). norms, scores: per kind, float [K] by target or, in pairs
    mode, [K, K] by source and target; a score is NaN where there is none, a norm is inf where no trigger was found.
    restarts: per kind, for each restart the entries that it alone would have detected. stability: for each detected
    target (or pair) the share of restarts which agree. triggers: the smallest of each detected target and kind.
    memory: bytes that the inversion held at its peak, estimated.
    """

    targets: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    norms: dict[str, Floats]
    scores: dict[str, Floats]
    restarts: dict[str, list[list[Any]]]
    stability: dict[Any, float]
    triggers: tuple[Trigger, ...]
    opinion: Opinion
    accuracy: float
    warnings: tuple[str, ...]
    settings: ScanSettings
    per_class: tuple[int, ...]
    memory: int
    seconds: float

    @property
    def backdoored(self) -> bool:
        return bool(self.targets)

    @property
    def agrees(self) -> bool | None:
        """Whether the second opinion comes to the same verdict; None where it has none."""
        if self.opinion.p_value is None:
            return None
        return self.opinion.suspicious == self.backdoored and (
            not self.backdoored or self.opinion.label in self.targets
        )

    @property
    def above(self) -> list[int]:
        """Targets whose score exceeds the threshold but not half of the largest, so that they are not detected."""
        if self.settings.pairs:
            return []
        high = {int(t) for values in self.scores.values() for t in np.flatnonzero(values > self.settings.threshold)}
        return sorted(high - set(self.targets))

    @property
    def closest(self) -> tuple[float, str, Any]:
        """The largest score, its kind, and its target or pair."""
        kind = max(self.scores, key=lambda kind: float(np.nanmax(self.scores[kind])))
        at = np.unravel_index(int(np.nanargmax(self.scores[kind])), self.scores[kind].shape)
        return float(self.scores[kind][at]), kind, int(at[0]) if len(at) == 1 else [int(part) for part in at]

    def to_json(self) -> dict[str, Any]:
        score, kind, where = self.closest
        return {
            "backdoored": self.backdoored,
            "targets": list(self.targets),
            "pairs": [list(pair) for pair in self.pairs],
            "scores": {kind: _plain(values) for kind, values in self.scores.items()},
            "norms": {kind: _plain(values) for kind, values in self.norms.items()},
            "threshold": self.settings.threshold,
            "above_threshold": self.above,
            "stability": {
                "detected": [
                    {"target" if isinstance(key, int) else "pair": key, "share_of_restarts": share}
                    for key, share in self.stability.items()
                ],
                "by_restart": self.restarts,
                "largest_score": {"kind": kind, "pair" if self.settings.pairs else "target": where, "score": score},
            },
            "triggers": [
                {
                    "kind": trigger.problem.kind,
                    "target": trigger.problem.target,
                    "sources": list(trigger.problem.sources),
                    "norm": trigger.norm,
                    "success": trigger.success,
                }
                for trigger in self.triggers
            ],
            "second_opinion": {
                "method": "maximum margins (MM-BD)",
                "class": self.opinion.label,
                "p_value": self.opinion.p_value,
                "suspicious": self.opinion.suspicious,
                "agrees": self.agrees,
                "margins": _plain(self.opinion.margins),
            },
            "accuracy": self.accuracy,
            "settings": self.settings.to_json(),
            "memory_bytes": self.memory,
            "seconds": self.seconds,
            "n": {
                "images": sum(self.per_class),
                "images_per_class": list(self.per_class),
                "classes": len(self.per_class),
                "restarts": self.settings.inversion.restarts,
            },
            "warnings": list(self.warnings),
            "versions": versions(),
        }


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
@torch.autocast("cuda", enabled=False)  # type: ignore[untyped-decorator]
def scan(
    captured: Captured,
    images: Tensor,
    labels: Tensor,
    settings: ScanSettings | None = None,
    *,
    progress: Progress = silent,
    executor: Executor | None = None,
) -> Scan:
    """Look for a backdoor with clean images alone.

    Args:
        captured: the classifier, K ≥ 4 classes. images: clean images [N, C, H, W], uint8 or float32 in [0, 1];
            labels: int64 [N], their true classes; 10 a class work, 50 are better.
        executor: where the chunks of the inversion run; None: in threads, as many as there are cores, on a GPU one.

    Raises:
        BadModel: fewer than 4 classes. BadData: images or labels do not fit, or the model is not right about them.
    """
    begun = time.perf_counter()
    settings = settings or ScanSettings()
    if captured.classes < 4:
        raise BadModel(
            f"model: it has {captured.classes} classes; a scan compares them with each other and needs at least 4.",
            field="model",
        )
    images = check_images(images, captured.spec).cpu()
    labels = check_labels(labels, len(images), captured.classes).cpu()
    reached = _accuracy(captured, images, labels, settings)
    check_gradient(captured, images)
    executor = executor or local(captured)
    per_class = torch.bincount(labels, minlength=captured.classes).tolist()
    entries = _entries(per_class, settings.pairs)
    restarts = settings.inversion.restarts
    problems = [
        Problem(kind, entry.target, entry.sources, restart)
        for kind in settings.kinds
        for entry in entries
        for restart in range(restarts)
    ]
    solved = iter(invert(captured, images, labels, problems, settings.inversion, progress=progress, executor=executor))
    found = {kind: [[next(solved) for _ in range(restarts)] for _ in entries] for kind in settings.kinds}

    norms: dict[str, Floats] = {}
    scores: dict[str, Floats] = {}
    alone: dict[str, list[list[int]]] = {}
    detected: dict[int, dict[str, Trigger]] = {}  # position of the entry → kind → its smallest trigger
    for kind, triggers in found.items():
        values = np.array([[trigger.norm for trigger in row] for row in triggers])
        largest = largest_norm(kind, captured.spec)
        norms[kind], scores[kind] = values.min(1), anomaly_scores(values.min(1), largest)
        alone[kind] = [detections(anomaly_scores(column, largest), settings) for column in values.T]
        for position in detections(scores[kind], settings):
            detected.setdefault(position, {})[kind] = triggers[position][int(values[position].argmin())]
    if not settings.pairs:
        detected = {position: kinds for position, kinds in detected.items() if corroborated(position, scores, settings)}
    if settings.pairs:
        kept, best = _without_intrinsic(captured, images, labels, entries, detected, settings, progress, executor)
        pairs = sorted((entries[position].sources[0], entries[position].target) for position in kept)
    else:
        kept = sorted(detected)
        best = [trigger for position in kept for trigger in detected[position].values()]
        pairs = _moved(captured, images, labels, best, settings)

    def name(position: int) -> Any:
        entry = entries[position]
        return (entry.sources[0], entry.target) if settings.pairs else entry.target

    opinion = second_opinion(captured, images, labels, settings, progress=progress, executor=executor)
    targets = tuple(sorted({entries[position].target for position in kept}))
    return Scan(
        targets=targets,
        pairs=tuple(pairs),
        norms={kind: _spread(values, entries, settings, captured.classes) for kind, values in norms.items()},
        scores={kind: _spread(values, entries, settings, captured.classes) for kind, values in scores.items()},
        restarts={kind: [[name(position) for position in row] for row in rows] for kind, rows in alone.items()},
        stability={
            name(position): max(sum(position in row for row in alone[kind]) / restarts for kind in detected[position])
            for position in kept
        },
        triggers=tuple(best),
        opinion=opinion,
        accuracy=reached,
        warnings=tuple(_warnings(per_class, targets, settings)),
        settings=settings,
        per_class=tuple(per_class),
        memory=memory(captured, settings.inversion, executor.workers),
        seconds=round(time.perf_counter() - begun, 2),
    )


def anomaly_scores(norms: Floats, largest: float) -> Floats:
    """How far each trigger is stronger than the usual one: (1/norm − median) / MAD, arXiv 2308.09850, Apdx C.

    The MAD is the plain median of absolute deviations. It is taken as at least a tenth of the median: reciprocals of a
    few clean classes can lie so close together that chance makes one of them an outlier. With the threshold at 7, a
    trigger that is found out is thus at most 1/1.7 of the usual size.

    Args:
        norms: float [n], inf where no trigger was found. largest: the norm that always suffices, taken instead.

    Returns:
        float [n]; a larger score is more suspicious, negative ones are weaker than the usual.
    """
    strength = 1.0 / np.clip(norms, 1e-9, largest)
    median = np.median(strength)
    deviation = np.median(np.abs(strength - median))
    return np.asarray((strength - median) / max(deviation, FLOOR * median))


def detections(scores: Floats, settings: ScanSettings) -> list[int]:
    """Positions of the scores above the threshold and, of targets, above half of the largest.

    A trigger that was trained in for one target often helps others along, whose scores then rise too. Not so for pairs:
    the pairs of an all-to-all attack have triggers of different sizes by right, and `_without_intrinsic` looks at them.
    """
    least = settings.threshold if settings.pairs else max(settings.threshold, float(scores.max()) / 2)
    return [int(position) for position in np.flatnonzero(scores > least)]


def corroborated(position: int, scores: dict[str, Floats], settings: ScanSettings) -> bool:
    """Whether a detected target stands: it is the largest of a kind, or every kind detects it.

    A trained-in trigger often makes another class easy to reach as well, to one kind more than to the other.
    """
    top = any(int(values.argmax()) == position and values[position] > settings.threshold for values in scores.values())
    return top or all(position in detections(values, settings) for values in scores.values())


def second_opinion(
    captured: Captured,
    images: Tensor,
    labels: Tensor,
    settings: ScanSettings,
    *,
    progress: Progress = silent,
    executor: Executor | None = None,
) -> Opinion:
    """Maximum margins (Wang et al., MM-BD, IEEE S&P 2024): a backdoor lets its class be surer than any other.

    Needs no clean image (they only travel along). It knows nothing of the trigger, so it may see kinds that inversion
    does not, and does not see attacks that keep margins low. It has no part in the verdict.
    """
    executor = executor or local(captured)
    work = Work(captured, images, labels, settings.inversion)
    chunks = [Ascent(label, settings.starts, settings.steps, settings.step_size) for label in range(captured.classes)]
    margins = np.empty(captured.classes)
    with (
        progress("second opinion: margins", captured.classes * settings.steps) as advance,
        contextlib.closing(executor.run(largest_margin, work, chunks, advance)) as results,  # type: ignore[type-var]
    ):
        for label, value in results:
            margins[label] = value
    return Opinion(int(margins.argmax()), margin_p_value(margins), margins)


class Ascent(NamedTuple):
    """Margin maxima of one class."""

    label: int
    starts: int
    steps: int
    step_size: float


def largest_margin(work: Work, ascent: Ascent, advance: Advance) -> float:
    """The largest margin of a class that ascents from ``starts`` random images reach, in logits."""
    labels = torch.full((ascent.starts,), ascent.label, device=work.captured.device)
    generator = torch.Generator().manual_seed(work.settings.seed * 1_000_003 % 2**62 + ascent.label)
    shape = work.captured.spec.shape
    reached = maximise_margins(
        work.network, labels, shape, steps=ascent.steps, step_size=ascent.step_size, generator=generator
    )
    advance(ascent.steps)
    with torch.no_grad():
        return float(margin(work.network(reached), labels).max())


def margin_p_value(margins: Floats) -> float | None:
    """The chance that the largest of K margins is as large as this one, if it were like the others.

    1 − F(r_max)^K, with F the gamma law of the K − 1 others (the authors' published code, univ_bd.py; it also fits the
    law's location, which nine values hardly support: it is 0 here). None where the others are no positive numbers that
    differ.
    """
    others = np.delete(margins, margins.argmax())
    if not np.isfinite(margins).all() or others.min() <= 0.0 or np.ptp(others) < 1e-9 * others.max():
        return None
    shape, _, scale = stats.gamma.fit(others, floc=0.0)
    tail = float(stats.gamma.sf(margins.max(), shape, scale=scale))
    return float(-np.expm1(len(margins) * np.log1p(-tail))) if tail < 1.0 else 1.0


def _accuracy(captured: Captured, images: Tensor, labels: Tensor, settings: ScanSettings) -> float:
    logits = logits_of(captured.module(), images, settings.inversion.images_at_once, captured.device)
    reached = accuracy(logits, labels)
    check_accuracy(captured, images, labels, reached, settings.min_accuracy)
    return reached


def check_gradient(captured: Captured, images: Tensor) -> None:
    """Refuse a classifier whose logits have no gradient towards the image: no trigger can be estimated.

    Rounding or a threshold in forward changes no answer, and would make every estimate come to nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():
        some = as_float(images[:30]).to(captured.device).clone().requires_grad_()
        logits = captured.module()(some)
        slope = torch.zeros(1)
        if logits.requires_grad:
            slope = torch.autograd.grad(margin(logits, logits.argmax(1)).sum(), some)[0]
    if not bool(slope.abs().max() > 0):
        raise BadModel(
            "model: its logits have no gradient towards the image (rounding, a threshold, or detach in forward), so no "
            "trigger can be estimated. Remove that step, or guard the model with the method mmdf.",
            field="model",
        )


def _entries(per_class: Sequence[int], pairs: bool) -> list[Entry]:
    present = [label for label, count in enumerate(per_class) if count]
    if pairs:
        return [Entry(t, (s,)) for s in present for t in range(len(per_class)) if s != t]
    pooled = [Entry(t, tuple(s for s in present if s != t)) for t in range(len(per_class))]
    return [entry for entry in pooled if entry.sources]


def _without_intrinsic(
    captured: Captured,
    images: Tensor,
    labels: Tensor,
    entries: Sequence[Entry],
    detected: dict[int, dict[str, Trigger]],
    settings: ScanSettings,
    progress: Progress,
    executor: Executor,
) -> tuple[list[int], list[Trigger]]:
    """Positions of the detected pairs that belong to an attack, and the best triggers of its targets.

    Two sources of one target share their trigger, so one of about the same size works for both. Where the smallest for
    all of a target's sources together is far larger, the others are similar classes by nature, and only the
    pair of the smallest norm stays (arXiv 2308.09850, Apdx C).
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for position, kinds in detected.items():
        for kind in kinds:
            groups.setdefault((kind, entries[position].target), []).append(position)
    several = {key: positions for key, positions in groups.items() if len(positions) > 1}
    pooled: dict[tuple[str, int], Trigger] = {}
    problems = [
        Problem(kind, target, tuple(sorted(entries[position].sources[0] for position in positions)), restart)
        for (kind, target), positions in several.items()
        for restart in range(settings.inversion.restarts)
    ]
    if problems:
        for trigger in invert(
            captured, images, labels, problems, settings.inversion, progress=progress, executor=executor
        ):
            key = trigger.problem.kind, trigger.problem.target
            if key not in pooled or trigger.norm < pooled[key].norm:
                pooled[key] = trigger
    kept: set[int] = set()
    best = []
    for (kind, target), positions in groups.items():
        single = {position: detected[position][kind] for position in positions}
        if (kind, target) in pooled:
            if pooled[kind, target].norm <= INTRINSIC * max(trigger.norm for trigger in single.values()):
                kept |= set(positions)
                best.append(pooled[kind, target])
                continue
            single = dict([min(single.items(), key=lambda item: item[1].norm)])
        kept |= set(single)
        best += single.values()
    return sorted(kept), sorted(best, key=lambda trigger: (trigger.problem.target, -KINDS.index(trigger.problem.kind)))


@torch.no_grad()
def _moved(
    captured: Captured, images: Tensor, labels: Tensor, triggers: Sequence[Trigger], settings: ScanSettings
) -> list[tuple[int, int]]:
    """(s, t): the classes s of which a detected target's trigger sends at least half of the images to t."""
    network = captured.module()
    pairs = set()
    for trigger in triggers:
        target = trigger.problem.target
        for source in trigger.problem.sources:
            chosen = images[labels == source]
            sent = sum(
                int((network(trigger(as_float(batch).to(captured.device))).argmax(1) == target).sum())
                for batch in chosen.split(settings.inversion.images_at_once)
            )
            if sent >= MOVED * len(chosen):
                pairs.add((source, target))
    return sorted(pairs)


def _spread(values: Floats, entries: Sequence[Entry], settings: ScanSettings, classes: int) -> Floats:
    """Values of the entries by target [K], or by source and target [K, K]; NaN where there is none."""
    spread = np.full((classes, classes) if settings.pairs else (classes,), np.nan)
    for entry, value in zip(entries, values, strict=True):
        spread[(entry.sources[0], entry.target) if settings.pairs else entry.target] = value
    return spread


def _plain(values: Floats) -> list[Any]:
    """Nested lists for JSON, rounded; None for NaN and inf."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def _warnings(per_class: Sequence[int], targets: Sequence[int], settings: ScanSettings) -> list[str]:
    warnings = []
    absent = [label for label, count in enumerate(per_class) if not count]
    few = [count for count in per_class if 0 < count < FEW]
    if absent:
        warnings.append(
            f"{len(absent)} of {len(per_class)} classes have no clean image ({', '.join(map(str, absent[:8]))}"
            f"{' …' if len(absent) > 8 else ''}): attacks from them alone cannot be seen."
        )
    if few:
        warnings.append(
            f"{len(few)} classes have fewer than {FEW} clean images, which makes poor estimates; give {FEW} to 50."
        )
    if not settings.pairs and not targets:
        warnings.append(
            "One trigger a target was looked for, for all other classes together: attacks whose target depends on the "
            "source (all-to-all) cannot be seen that way. Scan again with --pairs to look for them."
        )
    return warnings
