"""MMDF: detection by the margin change between a network and its MMAC-bounded copy (arXiv 2308.04617, Sec. 4).

Bounds come from `guard.methods.mmac`; here the law of the margin change on clean images is learned, cross-fitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtrc
from torch import Tensor

from guard.capture import Captured
from guard.config import FitSettings
from guard.data import batches
from guard.detector import DTYPES
from guard.errors import BadData, BadSetting
from guard.methods.base import Fitted
from guard.methods.mmac import Bounded, Mmac
from guard.null import fit_law
from guard.progress import Progress, silent
from guard.rules import MarginChange
from guard.statistic import Logits, margin_change
from guard.twin import build_twin

FEW = 100  # clean images under which the threshold is known to be unreliable
BEYOND = 0.001  # p-value below which a wrongly decided image of the clean set is strange
BY_CHANCE = 0.01  # how often a clean set without triggers may be warned of; up to 0.05 for small ones with heavy tails
SHOWN = 20  # indices of strange images


def fit(captured: Captured, images: Tensor, labels: Tensor, settings: FitSettings, progress: Progress) -> Fitted:
    """Bounds on all of the clean set; the null law from scores of images that their bounds had not seen."""
    warnings = _sizes(labels, captured.classes, settings)
    estimator = Mmac(captured, images, labels, settings, progress)
    scores, decided, folds = cross_fit(captured, estimator, images, settings, progress)
    strange, told = _strange(scores, decided, labels.numpy())
    warnings += told
    law = fit_law(settings.null, scores)
    if settings.fpr <= law.floor:
        raise BadSetting(
            f"fpr: {len(scores)} clean images support no {settings.null} p-value below {law.floor:.3g}, so none could "
            f"fall below {settings.fpr:g}. Use at least {int(np.ceil(1 / settings.fpr))} images, a larger fpr, or "
            "the exponential law.",
            field="fpr",
        )
    bounded = estimator.correction(torch.arange(len(images)), progress)
    if bounded.report["bounds"] != settings.bounds:
        warnings.append(
            f"The {settings.bounds} bounds never kept the accuracy on the clean set; the quantile bounds they started "
            "from are used instead."
        )
    unconverged = sum(report["bounds"] != settings.bounds for report in folds)
    if unconverged:
        warnings.append(f"In {unconverged} of {len(folds)} folds of the cross-fit the bounds did not converge.")
    report = {
        "scores": [float(f"{score:.6g}") for score in np.sort(scores)],
        "score_quantiles": {str(q): float(np.quantile(scores, q)) for q in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)},
        "correction": bounded.report,
        "strange": strange,
    }
    return Fitted((dict(bounded.clips),), MarginChange(law, settings.fpr), report, warnings)


def cross_fit(
    captured: Captured, estimator: Mmac, images: Tensor, settings: FitSettings, progress: Progress
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[dict[str, Any]]]:
    """Scores [N] of clean images under corrections that were fitted without them, the original network's decisions
    [N], and each fold's fit report.

    Bounds and null from the same images would bias the null: bounds fit their own images better than others.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    scores, decided = np.empty(len(images)), np.empty(len(images), dtype=np.int64)
    reports: list[dict[str, Any]] = []
    with progress(f"cross-fit {settings.folds} folds", settings.folds) as advance:
        for fold in range(settings.folds):
            held_out = order[fold :: settings.folds]
            rest = torch.ones(len(images), dtype=torch.bool)
            rest[held_out] = False
            bounded = estimator.correction(rest.nonzero().squeeze(1), silent)
            original, corrected = _logits(captured, bounded, images[held_out], settings)
            scores[held_out.numpy()] = margin_change(original, corrected)
            decided[held_out.numpy()] = original.argmax(1)
            reports.append(bounded.report)
            advance(1)
    return scores, decided, reports


def _logits(captured: Captured, bounded: Bounded, images: Tensor, settings: FitSettings) -> tuple[Logits, Logits]:
    """Both logits [N, K], by the code path and in the numeric type that serve."""
    dtype = DTYPES[settings.dtype]
    twin = build_twin(captured, bounded.clips).to(device=captured.device, dtype=dtype)
    with torch.inference_mode():
        pairs = [twin(batch.to(captured.device, dtype)) for batch in batches(images, settings.batch_size)]
    original, corrected = (torch.cat(part).float().cpu().numpy() for part in zip(*pairs, strict=True))
    return original, corrected


def _strange(
    scores: NDArray[np.float64], decided: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[list[int] | None, list[str]]:
    """Indices of images that seem to bear a trigger, and a warning of them: more than chance explains are decided
    against their labels with scores that images which are decided right hardly reach. None: that cannot be told."""
    wrong, right = np.flatnonzero(decided != labels), scores[decided == labels]
    if len(right) < FEW // 2:  # their tail would be that of a handful
        return None, []
    try:
        law = fit_law("exponential", right)
    except BadData:  # they have no tail
        return None, []
    beyond = wrong[law.p_value(scores[wrong]) < BEYOND]
    if not len(beyond) or bdtrc(len(beyond) - 1, len(wrong), BEYOND) >= BY_CHANCE:
        return [], []
    classes = ", ".join(map(str, np.unique(decided[beyond])))
    shown = ", ".join(map(str, beyond[:SHOWN])) + (", …" if len(beyond) > SHOWN else "")
    warning = (
        f"{len(beyond)} images of the clean set look as if they bore a trigger: decided against their labels (as class "
        f"{classes}), with scores far above the others'. Look at the images with the indices {shown}. If they bear a "
        "mark, the model is backdoored, and the guard takes the mark for normal: fit again without them."
    )
    return beyond.tolist(), [warning]


def _sizes(labels: Tensor, classes: int, settings: FitSettings) -> list[str]:
    """Refuse a clean set that cannot be folded; warn of one that is known to be too small."""
    if len(labels) < 4 * settings.folds:
        raise BadData(
            f"clean: {len(labels)} images are too few for {settings.folds} folds; give at least {4 * settings.folds}, "
            "best 10 to 50 a class.",
            field="clean",
        )
    warnings = []
    if len(labels) < FEW:
        warnings.append(f"{len(labels)} clean images are few: expect several times the nominal false-positive rate.")
    absent = int((torch.bincount(labels, minlength=classes) == 0).sum())
    if absent:
        warnings.append(f"{absent} of {classes} classes have no clean image; what is normal for them was not seen.")
    return warnings
