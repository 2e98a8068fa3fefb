"""Triggers as pure functions of images, for tests, the demo and the benchmarks. The guard itself knows none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Trigger = Callable[[Tensor], Tensor]


def stamp(images: Tensor, patch: Tensor, top: int, left: int) -> Tensor:
    """Images [N, C, H, W] with ``patch`` [C, h, w] in place of the pixels from (top, left) on (BadNets)."""
    images = images.clone()
    images[:, :, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    return images


def add(images: Tensor, pattern: Tensor) -> Tensor:
    """Float images [N, C, H, W] in [0, 1] plus ``pattern`` [C, H, W], clipped to [0, 1]."""
    return (images + pattern).clamp(0.0, 1.0)


def weaken(trigger: Trigger, opacity: float) -> Trigger:
    """opacity · trigger(x) + (1 − opacity) · x, for float images; opacity in [0, 1]."""
    return lambda images: opacity * trigger(images) + (1.0 - opacity) * images


def opacity_for(success: Callable[[Trigger], float], trigger: Trigger, share: float, *, steps: int = 10) -> float:
    """The least opacity, bisected ``steps`` times, whose weakened trigger has a ``success`` of at least ``share``."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if success(weaken(trigger, middle)) < share else (low, middle)
    return high
