"""From a classifier and a clean set to an artifact: capture, correction, cross-fitted null, threshold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.artifact import FORMAT, FORMAT_VERSION, Artifact
from guard.capture import Captured, capture
from guard.config import FitSettings
from guard.data import as_float, batches, check_images, check_labels
from guard.detector import DTYPES
from guard.errors import BadData, BadSetting
from guard.margin import margin_change
from guard.methods import METHODS, Estimator, Fitted
from guard.null import NullLaw, fit_law
from guard.progress import Progress, silent
from guard.twin import build_twin
from guard.versions import versions

FEW = 100  # clean images under which the threshold is known to be unreliable


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
@torch.autocast("cuda", enabled=False)  # type: ignore[untyped-decorator]
def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    method: str = "mmdf",
    settings: FitSettings | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> Artifact:
    """Fit a guard for a classifier on clean images.

    Args:
        model: maps [N, C, H, W] to logits [N, K]; captured in eval mode and never changed.
        images: clean images [N, C, H, W], float32 in [0, 1] or uint8; 50 a class are plenty, 10 still work.
        labels: int64 [N], their true classes.
        method: "mmdf". settings: see `FitSettings`. mean, std: if the model wants normalised images, one value
            a channel. classes: K names. device: None takes the model's own. progress: see `guard.progress`.

    Raises:
        BadData, BadModel, BadSetting: what is wrong, and the remedy.
    """
    begun = time.perf_counter()
    settings = settings or FitSettings()
    if method not in METHODS:
        raise BadSetting(f"method: expected one of {', '.join(METHODS)}; got {method!r}.", field="method")
    images = check_images(images)
    captured = capture(model, images.shape[1:], mean=mean, std=std, device=device)
    labels = check_labels(labels, len(images), captured.classes)
    names = _names(classes, captured.classes)
    warnings = _sizes(labels, captured.classes, settings)

    estimator = METHODS[method](captured, images, labels, settings, progress)
    accuracy = _accuracy(estimator.logits, labels)
    _check_accuracy(captured, images, labels, accuracy, settings)
    scores, folds = cross_fit(captured, estimator, images, settings, progress)
    law = fit_law(settings.null, scores)
    if settings.fpr <= law.floor:
        raise BadSetting(
            f"fpr: {len(scores)} clean images support no {settings.null} p-value below {law.floor:.3g}, so none could "
            f"fall below {settings.fpr:g}. Use at least {int(np.ceil(1 / settings.fpr))} images, a larger fpr, or "
            "the exponential law.",
            field="fpr",
        )
    fitted = estimator.correction(torch.arange(len(images)), progress)
    corrected = _logits(captured, fitted, images, settings)[1]
    if fitted.report["bounds"] != settings.bounds:
        warnings.append(
            f"The {settings.bounds} bounds never kept the accuracy on the clean set; the quantile bounds they started "
            "from are used instead."
        )
    unconverged = sum(report["bounds"] != settings.bounds for report in folds)
    if unconverged:
        warnings.append(f"In {unconverged} of {len(folds)} folds of the cross-fit the bounds did not converge.")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": captured.fingerprint(),
        "input": captured.spec.to_json(),
        "classes": names,
        "settings": settings.to_json(),
        "null": law.to_json(),
        "threshold": _threshold(law, settings),
        "fit": {
            "images": len(images),
            "images_per_class": torch.bincount(labels, minlength=captured.classes).tolist(),
            "accuracy": {"original": accuracy, "corrected": _accuracy(corrected, labels)},
            "scores": [float(f"{score:.6g}") for score in np.sort(scores)],
            "score_quantiles": {str(q): float(np.quantile(scores, q)) for q in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)},
            "correction": fitted.report,
            "seconds": round(time.perf_counter() - begun, 2),
        },
        "warnings": warnings,
        "versions": versions(),
    }
    return Artifact(captured, fitted.modules, law, manifest)


def cross_fit(
    captured: Captured, estimator: Estimator, images: Tensor, settings: FitSettings, progress: Progress
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[dict[str, Any]]]:
    """Scores [N] of clean images under corrections that were fitted without them, and each fold's fit report.

    Bounds and null from the same images would bias the null: bounds fit their own images better than others.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    scores = np.empty(len(images))
    reports: list[dict[str, Any]] = []
    with progress(f"cross-fit {settings.folds} folds", settings.folds) as advance:
        for fold in range(settings.folds):
            held_out = order[fold :: settings.folds]
            rest = torch.ones(len(images), dtype=torch.bool)
            rest[held_out] = False
            fitted = estimator.correction(rest.nonzero().squeeze(1), silent)
            scores[held_out.numpy()] = margin_change(*_logits(captured, fitted, images[held_out], settings)).numpy()
            reports.append(fitted.report)
            advance(1)
    return scores, reports


def _logits(captured: Captured, fitted: Fitted, images: Tensor, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """Both logits, float32 [N, K], by the code path and in the numeric type that serve."""
    dtype = DTYPES[settings.dtype]
    twin = build_twin(captured, fitted.modules).to(device=captured.device, dtype=dtype)
    with torch.inference_mode():
        pairs = [twin(batch.to(captured.device, dtype)) for batch in batches(images, settings.batch_size)]
    original, corrected = (torch.cat(part).float().cpu() for part in zip(*pairs, strict=True))
    return original, corrected


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1).cpu() == labels).double().mean())


def _names(classes: Sequence[str] | None, count: int) -> list[str]:
    if classes is None:
        return [str(index) for index in range(count)]
    if len(classes) != count:
        raise BadSetting(f"classes: the model has {count} classes, {len(classes)} names were given.", field="classes")
    return [str(name) for name in classes]


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


def _check_accuracy(captured: Captured, images: Tensor, labels: Tensor, accuracy: float, settings: FitSettings) -> None:
    """A model that scores far below its owner's expectation is fed in the wrong range or order: say so."""
    chance = 1.0 / captured.classes
    least = settings.min_accuracy if settings.min_accuracy is not None else chance + 0.1 * (1.0 - chance)
    if accuracy >= least:
        return
    module = captured.module()
    hints = []
    some = as_float(images[:256]).to(captured.device)
    tries = {"the channels in reverse order (BGR)": some.flip(1), "pixel values in [0, 255]": some * 255.0}
    tries |= {"pixel values in [-1, 1]": some * 2.0 - 1.0}
    with torch.inference_mode():
        for what, changed in tries.items():
            better = _accuracy(module(changed), labels[:256])
            if better > max(least, 1.5 * accuracy):
                hints.append(f"With {what} it reaches {better:.1%}.")
    raise BadData(
        f"clean: the model is right on only {accuracy:.1%} of {len(labels)} clean images (expected at least "
        f"{least:.1%}). "
        + (" ".join(hints) or "Check --mean and --std, the order of channels, and the order of the classes.")
        + (" Check --mean and --std." if hints else ""),
        field="clean",
    )


def _threshold(law: NullLaw, settings: FitSettings) -> dict[str, float]:
    """p_value: flag below it. score: the same as a score. p_value_floor: the smallest p-value the law can give.

    p_value_support: 1 / (n + 1), the smallest that the data supports without extrapolation.
    """
    return {
        "p_value": settings.fpr,
        "score": law.threshold(settings.fpr),
        "p_value_floor": law.floor,
        "p_value_support": 1.0 / (law.n + 1),
    }
