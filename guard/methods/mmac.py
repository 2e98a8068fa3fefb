"""MMAC: bounds on activations that limit the classification margins (arXiv 2308.04617, Sec. 3, Algorithm 1).

Every activation site gets an upper bound per channel, the same over a whole feature map; activations without a
lower bound get a lower one too. No weight changes. Two ways to the bounds:

- *quantile* ("zero-fit"): a quantile over the clean set of each channel's spatial maximum. One pass.
- *learned*: gradient descent on Eq. 3 from there. Mends the corrected network itself further; takes longer.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.capture import Captured
from guard.checks import accuracy, logits_of
from guard.config import FitSettings
from guard.corrections import Clip
from guard.data import as_float, batches
from guard.margin import margin
from guard.observe import observe
from guard.progress import Progress
from guard.surrogates import maximise_margins
from guard.twin import Twin, build_twin


class Bounds(NamedTuple):
    """Per site index: upper, and for activations without a lower bound lower, float32 [channels] each."""

    upper: dict[int, Tensor]
    lower: dict[int, Tensor]

    def moved(self, by: Bounds, spread: Bounds) -> Bounds:
        """Bounds plus ``by`` in units of ``spread``."""
        return Bounds(
            {index: value + spread.upper[index] * by.upper[index] for index, value in self.upper.items()},
            {index: value + spread.lower[index] * by.lower[index] for index, value in self.lower.items()},
        )


class Bounded(NamedTuple):
    """clips: site index → clip. report: JSON-able facts of the fit, for people and the manifest."""

    clips: dict[int, Clip]
    report: dict[str, Any]


class Mmac:
    """MMAC at work: it looks at the clean set once, then gives bounds fitted on any part of it.

    Args:
        captured: the classifier. images: [N, C, H, W] (uint8, or float32 in [0, 1]). labels: int64 [N].
    """

    def __init__(
        self, captured: Captured, images: Tensor, labels: Tensor, settings: FitSettings, progress: Progress
    ) -> None:
        self.captured, self.images, self.labels, self.settings = captured, images, labels, settings
        observed = observe(captured, images, batch_size=settings.batch_size, progress=progress)
        self.sites = captured.sites[int(settings.start * len(captured.sites)) :]
        self.maxima = {site.index: observed.maxima[site.index] for site in self.sites}
        self.minima = {site.index: observed.minima[site.index] for site in self.sites if not site.bounded_below}

    def correction(self, rows: Tensor, progress: Progress) -> Bounded:
        """Fit on the images ``rows`` (int64) alone."""
        bounds = self.quantile_bounds(rows)
        modules = self._clips(bounds)
        report: dict[str, Any] = {"bounds": "quantile", "quantile": self.settings.quantile, "sites": len(modules)}
        if self.settings.bounds == "learned":
            learned = learn_bounds(
                build_twin(self.captured, self._clips(bounds)),
                bounds,
                self._spread(rows),
                self.images[rows],
                self.labels[rows],
                self.settings,
                progress,
            )
            report["learning"] = learned.report
            if learned.bounds is not None:
                modules, report["bounds"] = self._clips(learned.bounds), "learned"
        return Bounded(modules, report)

    def quantile_bounds(self, rows: Tensor) -> Bounds:
        """Zero-fit bounds: a quantile over images ``rows`` of each channel's spatial extreme."""
        q = self.settings.quantile
        return Bounds(
            {index: torch.quantile(values[rows], q, dim=0) for index, values in self.maxima.items()},
            {index: torch.quantile(values[rows], 1.0 - q, dim=0) for index, values in self.minima.items()},
        )

    def _spread(self, rows: Tensor) -> Bounds:
        """Standard deviation over images ``rows`` of each channel's spatial extreme: the unit of a step."""
        return Bounds(
            {index: values[rows].std(dim=0).clamp_min(1e-3) for index, values in self.maxima.items()},
            {index: values[rows].std(dim=0).clamp_min(1e-3) for index, values in self.minima.items()},
        )

    def _clips(self, bounds: Bounds) -> dict[int, Clip]:
        return {
            site.index: Clip(bounds.upper[site.index], bounds.lower.get(site.index), axis=site.axis, ndim=site.ndim)
            for site in self.sites
        }


class Learned(NamedTuple):
    """bounds: the best feasible ones, or None where none ever was feasible. report: JSON-able facts."""

    bounds: Bounds | None
    report: dict[str, Any]


@torch.inference_mode(False)
@torch.enable_grad()
def learn_bounds(
    twin: Twin,
    start: Bounds,
    spread: Bounds,
    images: Tensor,
    labels: Tensor,
    settings: FitSettings,
    progress: Progress,
) -> Learned:
    """Minimise  MSE(f̄(x), f(x)) over correctly classified x in D  +  λ · mean of margin maxima  (Eq. 3).

    Both terms are in units of the network itself (the MSE over the variance of its logits, the margins over its
    mean margin on D), so that λ means the same for every network. λ is multiplied by α while the corrected
    network keeps the share π of the original's accuracy on D, and divided by it where not. As the authors' code
    does, and unlike their text, margins are maximised on the original network, whose maxima do not drift while the
    bounds move. The margin term is unbounded below, so a run can end collapsed: what is kept is the iterate with
    the smallest margins among those that kept the accuracy.

    Args:
        twin: its corrections are clips at ``start``; they are moved. start, spread: bounds and the unit of a step.
        images: [N, C, H, W]; labels: int64 [N].
    """
    rule, begun = settings.learning, time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    clips = {index: twin.correction(index) for index in start.upper}
    device = next(iter(start.upper.values())).device
    with torch.inference_mode():
        original = torch.cat([twin.original(batch.to(device))[0] for batch in batches(images, settings.batch_size)])
    decision = original.argmax(1).cpu()
    right = (decision == labels).nonzero().squeeze(1)
    own_accuracy = len(right) / len(labels)
    logit_unit = float(original.var(dim=0, unbiased=False).mean().clamp_min(1e-12))
    margin_unit = float(margin(original, original.argmax(1)).mean().clamp_min(1e-12))
    prefix = twin.prefix()

    shift = Bounds(*({index: torch.zeros_like(v).requires_grad_() for index, v in part.items()} for part in start))
    optimiser = torch.optim.Adam([*shift.upper.values(), *shift.lower.values()], lr=rule.learning_rate)
    weight, best, best_margin, feasible = rule.weight, None, float("inf"), 0
    history: list[dict[str, float]] = []
    wanted = torch.zeros(0, dtype=torch.long)
    frontier: tuple[Tensor, ...] = ()
    with progress("learn bounds", rule.steps) as advance:
        for step in range(rule.steps):
            if step % rule.refresh == 0:
                drawn = torch.randperm(original.shape[1], generator=generator)[: rule.classes]
                wanted = drawn.repeat_interleave(rule.surrogates).to(device)
                surrogates = maximise_margins(
                    lambda x: twin.original(x)[0],
                    wanted,
                    images.shape[1:],
                    steps=rule.ascent_steps,
                    step_size=rule.ascent_step_size,
                    generator=generator,
                )
                with torch.no_grad():
                    frontier = prefix(surrogates)
            rows = right[torch.randperm(len(right), generator=generator)[: rule.batch]]
            _place(clips, start.moved(shift, spread))
            with torch.no_grad():
                clean = prefix(as_float(images[rows]).to(device))
            squared = (twin.corrected(clean) - original[rows]).square().mean() / logit_unit
            largest = margin(twin.corrected(frontier), wanted).mean() / margin_unit
            optimiser.zero_grad()
            (squared + weight * largest).backward()
            if step % rule.weight_every == 0 or step == rule.steps - 1:
                logits = logits_of(lambda x: twin.corrected(prefix(x)), images, settings.batch_size, device)
                reached = accuracy(logits, labels)
                kept = reached >= rule.accuracy * own_accuracy
                feasible += kept
                history.append({"step": step, "squared_error": squared.item(), "margin": largest.item(),
                                "weight": weight, "accuracy": reached})  # fmt: skip
                if kept and largest.item() < best_margin:
                    best_margin = largest.item()
                    best = Bounds(*({index: v.detach().clone() for index, v in part.items()} for part in shift))
                weight = weight * rule.weight_factor if kept else weight / rule.weight_factor
            optimiser.step()
            advance(1)
    report = {
        "converged": best is not None,
        "seconds": round(time.perf_counter() - begun, 2),
        "original_accuracy": own_accuracy,
        "feasible_checks": feasible,
        "checks": len(history),
        "margin_at_start": history[0]["margin"],
        "margin": best_margin if best is not None else None,
        "history": history,
    }
    return Learned(_detached(start.moved(best, spread)) if best is not None else None, report)


def _place(clips: dict[int, Clip], bounds: Bounds) -> None:
    """Put bounds into the clips, gradients and all."""
    for index, clip in clips.items():
        clip.place(bounds.upper[index], bounds.lower.get(index))


def _detached(bounds: Bounds) -> Bounds:
    return Bounds(*({index: value.detach() for index, value in part.items()} for part in bounds))
