"""The guard's own methods, as the laboratory judges every defence: fitted by the library, on D alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import guard
from benchmarks.lab.defences.base import Answer, Defended, Task, repaired
from guard.capture import capture
from guard.checks import logits_of
from guard.data import batches
from guard.detector import join
from guard.methods.mmac import Mmac
from guard.methods.prune import PruneSettings
from guard.methods.prune import prune as prune_filters
from guard.twin import build_twin

BATCH = 256


def mmdf(task: Task, **changed: Any) -> Defended:
    """The default: margin change against the clipped copy; a flagged input is decided by the copy without c*.

    ``changed``: settings of `guard.FitSettings`; bounds="learned" is paper 2308.04617 in full.
    """
    return _guarded(task, "mmdf", guard.FitSettings(**{"fpr": task.fpr, "seed": task.seed} | changed))


def bna(task: Task) -> Defended:
    """Targets and triggers as the scan finds them, then activation distributions corrected."""
    return _guarded(task, "bna", guard.FitSettings(seed=task.seed))


def mmac(task: Task, *, bounds: str = "learned") -> Defended:
    """The clipped network alone answers every input (paper 2308.04617, Sec. 3)."""
    captured = capture(task.network, task.images.shape[1:])
    settings = guard.FitSettings(bounds=bounds, seed=task.seed)
    bounded = Mmac(captured, task.images.cpu(), task.labels.cpu(), settings, task.progress).correction(
        torch.arange(len(task.images)), task.progress
    )
    twin = build_twin(captured, bounded.clips).to(task.images.device)

    def answer(images: Tensor) -> Answer:
        return Answer(logits_of(lambda batch: twin(batch)[1], images, BATCH, images.device).argmax(1))

    return answer


def prune(task: Task) -> Defended:
    """Suspiciousness-score pruning, then fine-tuning on D (arXiv 2311.07417)."""
    pruned = prune_filters(
        task.network, task.images, task.labels, settings=PruneSettings(seed=task.seed), progress=task.progress
    )
    module = pruned.captured.module().to(task.images.device)
    return lambda images: Answer(logits_of(module, images, BATCH, images.device).argmax(1))


def undefended(task: Task) -> Defended:
    """The suspect as it is."""
    return repaired(task.network)


def _guarded(task: Task, method: str, settings: guard.FitSettings) -> Defended:
    artifact = guard.fit(
        task.network, task.images, task.labels, method=method, settings=settings, progress=task.progress
    )
    fitted = artifact.guard()

    def answer(images: Tensor) -> Answer:
        verdict = join([fitted(batch) for batch in batches(images, BATCH)])
        return Answer(verdict.corrected_label, verdict.score, verdict.flagged)

    return answer
