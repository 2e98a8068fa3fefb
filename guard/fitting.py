"""From a classifier and a clean set to an artifact: capture, checks, a method's fit, manifest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.artifact import FORMAT, FORMAT_VERSION, Artifact
from guard.capture import capture
from guard.checks import accuracy, check_accuracy, logits_of, names
from guard.config import FitSettings
from guard.data import batches, check_images, check_labels
from guard.detector import join
from guard.drift import brightness_and_contrast
from guard.errors import BadSetting
from guard.methods import METHODS
from guard.progress import Progress, silent
from guard.versions import versions


@torch.inference_mode(False)
@torch.enable_grad()
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
        method: "mmdf" or "bna". settings: see `FitSettings`. mean, std: if the model wants normalised images, one value
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
    images, labels = images.cpu(), check_labels(labels, len(images), captured.classes).cpu()
    class_names = names(classes, captured.classes)
    before = logits_of(captured.module(), images, settings.batch_size, captured.device)
    reached = accuracy(before, labels)
    check_accuracy(captured, images, labels, reached, settings.min_accuracy)
    fitted = METHODS[method].fit(captured, images, labels, settings, progress)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": captured.fingerprint(),
        "input": captured.spec.to_json(),
        "classes": class_names,
        "settings": settings.to_json(),
        **fitted.rule.to_manifest(),
        "fit": {
            "images": len(images),
            "inputs": _inputs(images),
            "images_per_class": torch.bincount(labels, minlength=captured.classes).tolist(),
            **fitted.report,
        },
        "warnings": fitted.warnings,
        "versions": versions(),
    }
    artifact = Artifact(captured, fitted.networks, fitted.rule, manifest)
    guard = artifact.guard()
    verdicts = join([guard(batch) for batch in batches(images, settings.batch_size)])
    manifest["fit"] |= {
        "accuracy": {"original": reached, "corrected": accuracy(verdicts.corrected_logits, labels)},
        "seconds": round(time.perf_counter() - begun, 2),
    }
    return artifact


def _inputs(images: Tensor) -> dict[str, list[float]]:
    """Brightness and contrast of the clean images, as 51 evenly spaced quantiles each: what serving compares with."""
    grid = np.linspace(0.0, 1.0, 51)
    features = [brightness_and_contrast(batch.numpy()) for batch in batches(images, 256)]
    columns = (np.concatenate(column) for column in zip(*features, strict=True))
    return {
        name: [float(f"{value:.4g}") for value in np.quantile(column, grid)]
        for name, column in zip(("brightness", "contrast"), columns, strict=True)
    }
