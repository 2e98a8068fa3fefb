"""Margin maximisation: images that a network is as sure of as it can be (MMAC paper, Algorithm 1, lines 6-9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guard.margin import margin


def maximise_margins(
    network: Callable[[Tensor], Tensor],
    labels: Tensor,
    shape: Sequence[int],
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Gradient ascent on m_c(network, x) over x in [0, 1]^(C×H×W) from random starts.

    Args:
        network: float32 [N, C, H, W] → logits [N, K]. labels: int64 [N], the class c of each image.
        steps: ascent steps. step_size: length of a step's largest change, in pixel values.
        generator: draws the starting points, uniform over the input space.

    Returns:
        float32 [N, C, H, W] in [0, 1]: the last points.
    """
    images = torch.rand(len(labels), *shape, generator=generator).to(labels.device)
    for step in range(steps):
        images.requires_grad_(True)
        (gradient,) = torch.autograd.grad(margin(network(images), labels).sum(), images)
        with torch.no_grad():
            largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
            decay = 1.0 - step / steps
            images = (images + step_size * decay * gradient / largest).clamp(0.0, 1.0)
    return images.detach()
