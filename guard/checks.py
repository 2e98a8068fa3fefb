"""Checks of a classifier together with its clean set, which every offline command makes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guard.capture import Captured
from guard.data import as_float, batches
from guard.errors import BadData, BadSetting


@torch.inference_mode()
def logits_of(network: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Logits float32 [N, K], on the CPU, of a network on ``device`` for images [N, C, H, W], a batch at a time."""
    return torch.cat([network(batch.to(device)).float().cpu() for batch in batches(images, batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits [N, K] that decide as labels [N] say."""
    return float((logits.argmax(1).cpu() == labels).double().mean())


def check_accuracy(
    captured: Captured, images: Tensor, labels: Tensor, reached: float, min_accuracy: float | None
) -> None:
    """A model that scores far below its owner's expectation is fed in the wrong range or order: say so."""
    chance = 1.0 / captured.classes
    least = min_accuracy if min_accuracy is not None else chance + 0.1 * (1.0 - chance)
    if reached >= least:
        return
    module = captured.module()
    hints = []
    some = as_float(images[:256]).to(captured.device)
    tries = {"the channels in reverse order (BGR)": some.flip(1), "pixel values in [0, 255]": some * 255.0}
    tries |= {"pixel values in [-1, 1]": some * 2.0 - 1.0}
    with torch.inference_mode():
        for what, changed in tries.items():
            better = accuracy(module(changed), labels[:256])
            if better > max(least, 1.5 * reached):
                hints.append(f"With {what} it reaches {better:.1%}.")
    raise BadData(
        f"clean: the model is right on only {reached:.1%} of {len(labels)} clean images (expected at least "
        f"{least:.1%}). "
        + (" ".join(hints) or "Check --mean and --std, the order of channels, and the order of the classes.")
        + (" Check --mean and --std." if hints else ""),
        field="clean",
    )


def names(classes: Sequence[str] | None, count: int) -> list[str]:
    """The K names of the classes: those given, or their numbers."""
    if classes is None:
        return [str(index) for index in range(count)]
    if len(classes) != count:
        raise BadSetting(f"classes: the model has {count} classes, {len(classes)} names were given.", field="classes")
    return [str(name) for name in classes]
