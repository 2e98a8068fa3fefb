"""How good a guard is on images that it was not fitted on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from guard.data import Data, batches, check_images, check_labels
from guard.detector import Guard, join
from guard.errors import BadSetting
from guard.progress import Progress, silent
from guard.rules import Disagreement
from guard.types import Verdict
from guard.versions import versions

Target = int | Literal["all2all"]
RATES = (0.005, 0.01, 0.05)


@dataclass(frozen=True)
class Evaluation:
    """figures: the JSON of ``guard evaluate``. clean, triggered: the verdicts. successful: bool, of the triggered."""

    figures: dict[str, Any]
    clean: Verdict
    triggered: Verdict | None
    successful: Tensor | None


def evaluate(
    guard: Guard,
    clean: Data,
    triggered: Data | None = None,
    target: Target | None = None,
    *,
    batch_size: int = 64,
    progress: Progress = silent,
) -> Evaluation:
    """Measure accuracy, attack success and detection.

    Args:
        guard: fitted on other images than these.
        clean: images and true classes.
        triggered: images that bear the trigger, with their *true* classes; those of the target class are left out.
        target: the attacker's class, or "all2all" (class c is sent to c + 1 mod K). Needed with ``triggered``.

    Returns:
        figures with these keys; a figure that needs triggered images is None without them:
        ``original | corrected | guarded``: ``acc`` (clean, decided right), ``asr`` (triggered, decided as the target),
        ``pacc`` (triggered, decided as their true class), for the original network, the corrected network on every
        input (bna: on every input that it is asked about), and the online rule. ``detection``: ``auroc`` (one-sided; a
        larger score is more suspicious), ``tpr`` and ``fpr`` at the guard's threshold, ``fpr_target`` (among the clean
        images that the original network sends to a class that the method suspects, or where it suspects none to
        ``target``), ``nominal_fpr``, ``tpr_at_fpr`` (threshold set on these clean images), ``auroc_successful`` (over
        triggered images that the original network sends to the target). ``n``, ``seconds``, ``versions``.
    """
    begun = time.perf_counter()
    count = len(guard.classes)
    clean_labels = check_labels(clean.labels, len(clean), count)
    if triggered is not None and target is None:
        raise BadSetting("target: triggered images need the attacker's class, a number or all2all.", field="target")
    if isinstance(target, int) and not 0 <= target < count:
        raise BadSetting(f"target: expected a class from 0 to {count - 1}, got {target}.", field="target")
    verdict = run(guard, clean.images, batch_size=batch_size, progress=progress, what="clean images")
    hit = _shares(verdict, clean_labels)
    fpr = float(verdict.flagged.double().mean())
    figures: dict[str, Any] = {
        **{name: {"acc": value, "asr": None, "pacc": None} for name, value in hit.items()},
        "detection": {
            "auroc": None,
            "tpr": None,
            "fpr": fpr,
            "fpr_target": None,
            "nominal_fpr": guard.threshold,
            "tpr_at_fpr": {f"{rate:g}": None for rate in RATES},
            "auroc_successful": None,
        },
        "n": {"clean": len(clean), "sent_to_target": 0, "triggered": 0, "successful": 0},
    }
    suspected = list(guard.rule.targets) if isinstance(guard.rule, Disagreement) else []
    suspected = suspected or ([target] if isinstance(target, int) else [])
    sent = torch.isin(verdict.label, torch.tensor(suspected, dtype=torch.long))
    if sent.any():
        figures["detection"]["fpr_target"] = float(verdict.flagged[sent].double().mean())
        figures["n"]["sent_to_target"] = int(sent.sum())
    bearing, successful = None, None
    if triggered is not None and target is not None:
        labels = check_labels(triggered.labels, len(triggered), count)
        wanted = (labels + 1) % count if target == "all2all" else torch.full_like(labels, int(target))
        rows = (labels != wanted).nonzero().squeeze(1)
        if not len(rows):
            raise BadSetting("target: all triggered images are of the target class; ASR is undefined.", field="target")
        labels, wanted = labels[rows], wanted[rows]
        attacked = Data(triggered.images[rows], labels, triggered.classes, triggered.source)
        bearing = run(guard, attacked.images, batch_size=batch_size, progress=progress, what="triggered images")
        successful = bearing.label == wanted
        for name, value in _shares(bearing, wanted).items():
            figures[name]["asr"] = value
        for name, value in _shares(bearing, labels).items():
            figures[name]["pacc"] = value
        low, high = verdict.score.numpy(), bearing.score.numpy()
        figures["detection"] |= {
            "auroc": auroc(low, high),
            "tpr": float(bearing.flagged.double().mean()),
            "tpr_at_fpr": {f"{rate:g}": tpr_at_fpr(low, high, rate) for rate in RATES},
            "auroc_successful": auroc(low, high[successful.numpy()]) if successful.any() else None,
        }
        figures["n"] |= {"triggered": len(rows), "successful": int(successful.sum())}
    figures |= {"seconds": round(time.perf_counter() - begun, 2), "versions": versions()}
    return Evaluation(figures, verdict, bearing, successful)


def run(guard: Guard, images: Tensor, *, batch_size: int, progress: Progress, what: str) -> Verdict:
    """The verdict on every image [N, C, H, W]."""
    images = check_images(images, guard.spec)
    verdicts = []
    with progress(f"run {len(images)} {what}", len(images)) as advance:
        for batch in batches(images, batch_size):
            verdicts.append(guard(batch))
            advance(len(batch))
    return join(verdicts)


def auroc(clean: NDArray[np.float64], triggered: NDArray[np.float64]) -> float:
    """P(triggered > clean) + ½ P(equal): the area under the ROC, by ranks (Mann-Whitney). One-sided."""
    ranks = rankdata(np.concatenate([clean, triggered]))[len(clean) :]
    return float((ranks.sum() - len(triggered) * (len(triggered) + 1) / 2) / (len(clean) * len(triggered)))


def tpr_at_fpr(clean: NDArray[np.float64], triggered: NDArray[np.float64], rate: float) -> float:
    """Share of triggered scores above the lowest threshold that at most ``rate`` of the clean scores exceed."""
    allowed = int(np.floor(rate * len(clean) + 1e-9))
    threshold = np.sort(clean)[::-1][min(allowed, len(clean) - 1)]
    return float((triggered > threshold).mean())


def _shares(verdict: Verdict, wanted: Tensor) -> Mapping[str, float]:
    """Share of rows decided as ``wanted``: by the original network, the corrected one, and the online rule."""
    decided = {
        "original": verdict.label,
        "corrected": verdict.corrected_logits.argmax(1),
        "guarded": verdict.corrected_label,
    }
    return {name: float((labels == wanted).double().mean()) for name, labels in decided.items()}
