"""BNA: correct the distribution of activations that a trigger alters (arXiv 2308.09850, Sec. 4.2, Apdx C and D).

A scan finds the attacker's classes. For each of them triggers are estimated on the clean set, and every site of the
network gets h(z) = max(min((z − μ)/σ, ω), υ), chosen so that activations of images that bear them are distributed as
those of clean images. No weight changes. Online, images that the network sends to a detected class are decided again
by its corrected network (`guard.rules.Disagreement`).

An estimated trigger hardly resembles the true one: it is another pattern, and the weakest that works, while the true
one was trained in with a margin many times as large. So what is fitted to one estimate may do nothing against the
truth. Hence several triggers of both kinds are matched at once, each alone and all of a kind stacked on one image,
whose margin is of a true trigger's size; and the clips υ and ω, tail quantiles of clean activations, are those that
mend best the *other* kind's stack, on images that were not matched on: SIA less ASR, for the attacker's class is the
worst of the wrong answers, and the tightest among equals. All of it on the clean set alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.capture import Captured
from guard.checks import logits_of
from guard.config import FitSettings
from guard.corrections import Renormalise
from guard.data import as_float
from guard.divergence import DIVERGENCES, soft_histogram
from guard.errors import BadData, BadSetting, NotConverged
from guard.inversion import InversionSettings, Problem, Trigger, invert
from guard.methods.base import Corrections, Fitted
from guard.progress import Progress
from guard.rules import Disagreement
from guard.scan import ScanSettings, check_gradient, scan
from guard.twin import build_twin
from guard.types import Site
from guard.walk import Walk, channels, correction_sites

SCALES = (0.2, 5.0)  # bounds of σ: a channel that a trigger silences is not blown up to make up for it
DEAD = 1e-3  # deviation under which a channel counts as constant, which is left as it is
LEAST_IMAGES = 8  # of sources, to match on
LEAST_SUCCESS = 0.5  # share of clean images that an estimated trigger must move to be matched on
SAMPLE = 20_000  # activations a channel that quantiles are taken from


def fit(captured: Captured, images: Tensor, labels: Tensor, settings: FitSettings, progress: Progress) -> Fitted:
    """Scan, estimate triggers of each detected class, match. Nothing detected: no corrected network, no cost."""
    rule = settings.bna
    warnings: list[str] = []
    sources: dict[int, tuple[int, ...]] = {}
    report: dict[str, Any] = {"scan": None}
    present = torch.unique(labels).tolist()
    if rule.targets is None:
        found = scan(
            captured,
            images,
            labels,
            ScanSettings(
                min_accuracy=settings.min_accuracy,
                inversion=InversionSettings(restarts=rule.restarts, seed=settings.seed),
            ),
            progress=progress,
        )
        report["scan"] = found.to_json()
        warnings += found.warnings
        if found.above:
            warnings.append(
                f"Classes {', '.join(map(str, found.above))} are above the scan's threshold too, but below half of its "
                "largest score: a second backdoor may hide there. To correct them as well, name all with targets."
            )
        sources = {target: tuple(s for s, t in found.pairs if t == target) for target in found.targets}
        if not sources:
            warnings.append(
                "The scan found no backdoor, so nothing is corrected and no image will ever be flagged. It looks for "
                "patches and additive patterns; for other triggers fit the method mmdf."
            )
    for target in rule.targets or ():
        if not 0 <= target < captured.classes:
            raise BadSetting(
                f"targets: expected classes from 0 to {captured.classes - 1}, got {target}.", field="targets"
            )
        sources[target] = tuple(c for c in present if c != target)
    if sources:
        check_gradient(captured, images)
    networks: list[Corrections] = []
    report["targets"] = {}
    for target, origins in sources.items():
        origins = origins or tuple(c for c in present if c != target)
        count = int(torch.isin(labels, torch.tensor(origins)).sum())
        if count < LEAST_IMAGES:
            raise BadData(
                f"clean: {count} images of classes that go to class {target} are too few to match activations on; give "
                f"at least {LEAST_IMAGES}, best 10 to 50 a class.",
                field="clean",
            )
        triggers = estimate(captured, images, labels, target, origins, settings, progress)
        corrections, facts = correct(captured, images, labels, target, origins, triggers, settings, progress)
        networks.append(corrections)
        report["targets"][str(target)] = {"sources": list(origins), **facts}
        if facts["max_fpr_exceeded"]:
            warnings.append(
                f"Class {target}: even the loosest clips send {facts['fpr_target']:.0%} of the clean images of this "
                f"class elsewhere, more than the {rule.max_fpr_target:.0%} allowed."
            )
    report["correction"] = {"sites": len(correction_sites(captured)), "refine": rule.refine}
    return Fitted(tuple(networks), Disagreement(tuple(sources)), report, warnings)


def estimate(
    captured: Captured,
    images: Tensor,
    labels: Tensor,
    target: int,
    sources: Sequence[int],
    settings: FitSettings,
    progress: Progress,
) -> list[Trigger]:
    """Triggers of both kinds that send images of ``sources`` to ``target``, estimated on all of their images."""
    rule = settings.bna
    problems = [
        Problem(kind, target, tuple(sources), restart)
        for kind in ("patch", "additive")
        for restart in range(rule.restarts)
    ]
    inversion = InversionSettings(
        images=rule.images, restarts=rule.restarts, images_at_once=rule.images * rule.restarts, seed=settings.seed + 1
    )
    found = invert(captured, images, labels, problems, inversion, progress=progress)
    working = [trigger for trigger in found if trigger.success >= LEAST_SUCCESS]
    if not working:
        raise NotConverged(
            f"targets: no trigger was found that sends half of the clean images to class {target} (the best "
            f"{max(trigger.success for trigger in found):.0%}), so there is nothing to match. Leave the class out of "
            "targets, try another seed, or use the method mmdf."
        )
    return working


Bearer = Callable[[Tensor], Tensor]  # float images [N, C, H, W] → the same with a trigger


@dataclass(frozen=True)
class Stack:
    """Several triggers on one image, one after the other."""

    triggers: Sequence[Trigger]

    def __call__(self, images: Tensor) -> Tensor:
        for trigger in self.triggers:
            images = trigger(images)
        return images


class Clean(NamedTuple):
    """Clean activations at one site, per channel: mean and deviation [C]; tail quantiles: share → (lower, upper) [C];
    histogram float32 [C, bins] between the extremes."""

    mean: Tensor
    deviation: Tensor
    tails: dict[float, tuple[Tensor, Tensor]]
    histogram: Tensor


def correct(
    captured: Captured,
    images: Tensor,
    labels: Tensor,
    target: int,
    sources: Sequence[int],
    triggers: Sequence[Trigger],
    settings: FitSettings,
    progress: Progress,
) -> tuple[Corrections, dict[str, Any]]:
    """The corrected network g_t and JSON-able facts of how it was chosen.

    Args:
        images: clean images [N, C, H, W]; labels: int64 [N]. target: t. sources: the classes that triggers move.
        triggers: estimated ones, of one kind or of both.
    """
    begun, rule = time.perf_counter(), settings.bna
    bench = Bench(captured, images, labels, target, sources, settings)
    kinds = sorted({trigger.problem.kind for trigger in triggers})
    halves = [[t for t in triggers if t.problem.kind == kind] for kind in kinds]
    if len(halves) < 2:  # one kind alone: its triggers among themselves
        halves = [list(triggers[::2]), list(triggers[1::2]) or list(triggers)]
    stacks = [Stack(half) for half in halves]
    together: list[Bearer] = [*triggers, *stacks]
    trials = []
    with progress(f"choose clips for class {target}", len(rule.quantiles)) as advance:
        for quantile in rule.quantiles:
            crossed = [
                bench.recovered(bench.match(bench.even, [*half, stack], quantile), bench.odd, other)
                for half, stack, other in zip(halves, stacks, stacks[::-1], strict=True)
            ]
            trials.append(
                {
                    "quantile": quantile,
                    "sia": sum(sia for sia, _ in crossed) / len(crossed),
                    "asr": sum(asr for _, asr in crossed) / len(crossed),
                    "fpr_target": bench.fpr_target(bench.match(bench.rows, together, quantile)),
                }
            )
            advance(1)
    allowed = [trial for trial in trials if trial["fpr_target"] <= rule.max_fpr_target]
    chosen = choose(allowed, len(bench.odd) * len(halves)) if allowed else min(trials, key=lambda t: t["fpr_target"])
    corrections = bench.match(bench.rows, together, chosen["quantile"])
    facts: dict[str, Any] = {
        **chosen,
        "max_fpr_exceeded": not allowed,
        "trials": trials,
        "triggers": [
            {"kind": t.problem.kind, "norm": t.norm, "success": t.success, "restart": t.problem.restart}
            for t in triggers
        ],
        "images": len(bench.rows),
    }
    if rule.refine != "closed":
        facts["descent"] = bench.descend(corrections, together, progress)
        reached = bench.fpr_target(corrections)
        facts["descent"] |= {"fpr_target": reached, "kept": reached <= max(rule.max_fpr_target, chosen["fpr_target"])}
        if facts["descent"]["kept"]:
            facts["fpr_target"] = reached
        else:  # more false flags than allowed: back to the closed form
            corrections = bench.match(bench.rows, together, chosen["quantile"])
    facts["seconds"] = round(time.perf_counter() - begun, 2)
    return dict(corrections), facts


def choose(trials: Sequence[dict[str, float]], n: int) -> dict[str, float]:
    """The tightest clips whose SIA − ASR is within one standard error of the best (the rule of Breiman et al., CART,
    1984, Sec. 3.4.3): where images cannot tell two quantiles apart, the one that stops more of an attack.

    Args:
        trials: ``quantile``, ``sia`` and ``asr`` each. n: images that these were measured on.
    """
    best = max(trials, key=lambda trial: trial["sia"] - trial["asr"])
    gain = best["sia"] - best["asr"]
    error = math.sqrt(max(best["sia"] + best["asr"] - gain**2, 0.0) / n)  # of a mean over 1 (own), −1 (target), 0
    near = [trial for trial in trials if trial["sia"] - trial["asr"] >= gain - error]
    return max(near, key=lambda trial: trial["quantile"])


class Bench:
    """Matches one target's corrected network on the clean set and measures it there."""

    def __init__(
        self,
        captured: Captured,
        images: Tensor,
        labels: Tensor,
        target: int,
        sources: Sequence[int],
        settings: FitSettings,
    ) -> None:
        self.captured, self.target, self.settings, self.rule = captured, target, settings, settings.bna
        self.images, self.labels = images, labels
        self.sites = correction_sites(captured)
        self.generator = torch.Generator().manual_seed(settings.seed)
        rows = torch.isin(labels, torch.tensor(list(sources))).nonzero().squeeze(1)
        self.rows = rows[torch.randperm(len(rows), generator=self.generator)[: self.rule.rows]]
        self.even, self.odd = self.rows[::2], self.rows[1::2]
        self.sent = (self._decide(captured.module(), images) == target).nonzero().squeeze(1)
        self.clean: dict[int, Clean] = {}
        self._observe()

    def match(self, rows: Tensor, triggers: Sequence[Bearer], quantile: float) -> dict[int, Renormalise]:
        """Layer by layer in one pass: give the triggered images ``rows`` the clean mean and deviation at each site,
        behind the sites corrected before it, and clip at the clean tail ``quantile``. The triggers take turns."""
        corrections: dict[int, Renormalise] = {}

        def visit(site: Site, value: Tensor) -> Tensor:
            clean, there = self.clean[site.index], channels(site, value)
            scale = ((there.std(1) + DEAD) / (clean.deviation + DEAD)).clamp(*SCALES)
            mean = there.mean(1) - clean.mean * scale
            corrections[site.index] = Renormalise(mean, scale, *clean.tails[quantile], axis=site.axis, ndim=site.ndim)
            answer: Tensor = corrections[site.index](value)
            return answer

        with torch.no_grad():
            Walk(self.captured, self.sites, visit)(self._triggered(rows, triggers))
        return corrections

    def recovered(self, corrections: dict[int, Renormalise], rows: Tensor, trigger: Bearer) -> tuple[float, float]:
        """(SIA, ASR) on the clean set: shares of images ``rows``, bearing the trigger, that are decided as their own
        class and as the target."""
        decided = self._corrected(corrections, trigger(as_float(self.images[rows])))
        own, target = decided == self.labels[rows], decided == self.target
        return float(own.double().mean()), float(target.double().mean())

    def fpr_target(self, corrections: dict[int, Renormalise]) -> float:
        """Share of the clean images that the original network sends to the target and the corrected one elsewhere."""
        if not len(self.sent):
            return 0.0
        return float((self._corrected(corrections, self.images[self.sent]) != self.target).double().mean())

    def descend(
        self, corrections: dict[int, Renormalise], triggers: Sequence[Bearer], progress: Progress
    ) -> dict[str, Any]:
        """Descend the divergence between clean and corrected triggered activations over μ, σ, υ and ω of every site at
        once (Eq. 3), from where they are. The corrections are changed; JSON-able facts come back."""
        rule, divergence = self.rule, DIVERGENCES[self.rule.refine]
        start = {index: correction.tensors() for index, correction in corrections.items()}
        steps = {i: [torch.zeros_like(self.clean[i].mean).requires_grad_() for _ in range(4)] for i in corrections}
        optimiser = torch.optim.Adam([step for own in steps.values() for step in own], lr=rule.learning_rate)
        losses: list[Tensor] = []

        def place() -> None:
            for index, (mean, scale, lower, upper) in steps.items():
                was, unit = start[index], self.clean[index].deviation + DEAD
                corrections[index].place(
                    was["mean"] + unit * mean,
                    (was["scale"] * scale.exp()).clamp(*SCALES),
                    was["lower"] + unit * lower,
                    was["upper"] + unit * upper,
                )

        def visit(site: Site, value: Tensor) -> Tensor:
            clean = self.clean[site.index]
            corrected: Tensor = corrections[site.index](value)
            there = channels(site, corrected)
            wanted = min(there.shape[1], rule.positions * len(value))
            columns = torch.randint(there.shape[1], (wanted,), generator=self.generator).to(there.device)
            found = soft_histogram(there[:, columns], *clean.tails[0.0], rule.bins)
            losses.append(divergence(clean.histogram, found).mean())
            return corrected

        walk = Walk(self.captured, self.sites, visit)
        history: list[float] = []
        with torch.inference_mode(False), torch.enable_grad(), progress("descend divergence", rule.epochs) as advance:
            for _ in range(rule.epochs):
                order = self.rows[torch.randperm(len(self.rows), generator=self.generator)]
                total = 0.0
                for rows in order.split(rule.batch):
                    losses.clear()
                    place()
                    walk(self._triggered(rows, triggers))
                    loss = torch.stack(losses).mean()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    total += loss.item() * len(rows) / len(order)
                history.append(total)
                advance(1)
        place()
        for correction in corrections.values():
            mean, scale, lower, upper = (tensor.detach().clone() for tensor in correction.tensors().values())
            correction.place(mean, scale, torch.minimum(lower, upper), torch.maximum(lower, upper))
        return {"divergence": rule.refine, "history": history}

    def _observe(self) -> None:
        """Statistics of the clean images ``rows`` at every site."""
        rule = self.rule

        def visit(site: Site, value: Tensor) -> Tensor:
            there = channels(site, value)
            columns = torch.randint(there.shape[1], (min(SAMPLE, there.shape[1]),), generator=self.generator)
            some = there[:, columns.to(there.device)]
            low = there.amin(1)
            high = there.amax(1).maximum(low + DEAD + 1e-5 * low.abs())  # a channel may be constant, and large
            tails = {0.0: (low, high)}
            inner = sorted(set(rule.quantiles) - {0.0})
            levels = torch.tensor([*inner, *(1.0 - q for q in inner)], device=there.device)
            found = torch.quantile(some, levels, dim=1)  # one sort for all of them
            tails |= {q: (found[place], found[len(inner) + place]) for place, q in enumerate(inner)}
            deviation = there.std(1)
            histogram = soft_histogram(some, *tails[0.0], rule.bins)
            self.clean[site.index] = Clean(there.mean(1), deviation, tails, histogram)
            return value

        with torch.no_grad():
            Walk(self.captured, self.sites, visit)(as_float(self.images[self.rows]).to(self.captured.device))

    def _triggered(self, rows: Tensor, triggers: Sequence[Bearer]) -> Tensor:
        """Images ``rows`` on the classifier's device, the triggers taking turns."""
        parts = [trigger(as_float(self.images[rows[turn :: len(triggers)]])) for turn, trigger in enumerate(triggers)]
        return torch.cat(parts).to(self.captured.device)

    def _corrected(self, corrections: dict[int, Renormalise], images: Tensor) -> Tensor:
        twin = build_twin(self.captured, corrections)
        return self._decide(lambda batch: twin(batch)[1], images)

    def _decide(self, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Decisions int64 [N] of a network."""
        return logits_of(network, images, self.settings.batch_size, self.captured.device).argmax(1)
