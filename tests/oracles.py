"""Slow, obvious second ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NAMES = {"relu", "relu_", "relu6", "hardtanh", "silu", "gelu", "elu", "leaky_relu", "prelu", "hardswish", "tanh"}


class Bound(NamedTuple):
    """Bounds of one call: upper [channels], lower [channels] or None, and the axis of the channels."""

    upper: Tensor
    lower: Tensor | None
    axis: int


class Calls(TorchFunctionMode):
    """Sees every call of an activation function while a module runs, in call order.

    outputs: what each call returned. bounds: per call a `Bound` to clip it by, or None to leave it alone.
    """

    def __init__(self, bounds: Sequence[Bound | None] | None = None) -> None:
        super().__init__()
        self.bounds, self.outputs = bounds, list[Tensor]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in NAMES:
            return out
        self.outputs.append(out.clone())
        bound = self.bounds[len(self.outputs) - 1] if self.bounds is not None else None
        return out if bound is None else clipped(out, bound)


def clipped(activation: Tensor, bound: Bound) -> Tensor:
    """Clip channel by channel, with a loop."""
    out = activation.clone()
    for channel in range(len(bound.upper)):
        part = out.select(bound.axis, channel)
        part.clamp_(max=float(bound.upper[channel]))
        if bound.lower is not None:
            part.clamp_(min=float(bound.lower[channel]))
    return out


def activations(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The output of each activation call of a model, in call order."""
    with torch.no_grad(), Calls() as calls:
        model(images)
    return calls.outputs


def bounded(model: nn.Module, images: Tensor, bounds: Sequence[Bound | None]) -> Tensor:
    """The model's output with each activation call clipped."""
    with torch.no_grad(), Calls(bounds) as calls:
        out: Tensor = model(images)
    assert len(calls.outputs) == len(bounds)
    return out


def extremes(activation: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(maxima, minima) over all but the batch and the channels: [N, channels] each."""
    flat = activation.movedim(axis, 1).flatten(2) if activation.ndim > 2 else activation[:, :, None]
    return flat.amax(2), flat.amin(2)
