"""What a correction does to an activation: the seam between methods and graphs.

A correction is an ``nn.Module`` that maps the output of an activation site to a tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from guard.types import Site


class Correction(Protocol):
    """What the artifact asks of a correction, beside being an ``nn.Module``."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """What it learned, by name."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], site: Site) -> Self:
        """The inverse of ``tensors``, at a site."""
        ...


class Clip(nn.Module):
    """h̄ = max(min(h, z), l): a bound per channel, the same over a whole feature map (MMAC paper, Eq. 2).

    Args:
        upper: float32 [channels].
        lower: float32 [channels] or None: for activations without a lower bound (paper Sec. 5.3).
        axis: dimension of the activation that holds the channels.
        ndim: number of dimensions of the activation.
    """

    kind: ClassVar[str] = "clip"
    upper: Tensor
    lower: Tensor | None

    def __init__(self, upper: Tensor, lower: Tensor | None, *, axis: int, ndim: int) -> None:
        super().__init__()
        self._shape = [1] * ndim
        self._shape[axis] = upper.numel()
        self.register_buffer("upper", None)
        self.register_buffer("lower", None)
        self.place(upper, lower)

    def place(self, upper: Tensor, lower: Tensor | None) -> None:
        """Take these bounds [channels], with their gradients, in place of the present ones."""
        self.upper = upper.view(self._shape)
        self.lower = None if lower is None else lower.view(self._shape)

    def forward(self, activation: Tensor) -> Tensor:
        clipped = torch.minimum(activation, self.upper)
        return clipped if self.lower is None else torch.maximum(clipped, self.lower)

    def tensors(self) -> dict[str, Tensor]:
        """upper, and where there is one lower: float32 [channels]."""
        found = {"upper": self.upper.detach().flatten()}
        return found if self.lower is None else {**found, "lower": self.lower.detach().flatten()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], site: Site) -> Clip:
        """The inverse of ``tensors``."""
        return cls(tensors["upper"], tensors.get("lower"), axis=site.axis, ndim=site.ndim)


CORRECTIONS: dict[str, type[Clip]] = {Clip.kind: Clip}
