"""The words that the rooms of the library share: input specification, activation site, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InputSpec:
    """What the captured classifier takes: float32 [N, channels, height, width] in [0, 1].

    ``mean`` and ``std`` (one value a channel, or None) are applied inside the captured graph, so that
    callers never normalise.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, self.height, self.width)

    def to_json(self) -> dict[str, Any]:
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean) if self.mean else None,
            "std": list(self.std) if self.std else None,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> InputSpec:
        mean, std = value.get("mean"), value.get("std")
        return cls(
            channels=int(value["channels"]),
            height=int(value["height"]),
            width=int(value["width"]),
            mean=tuple(mean) if mean else None,
            std=tuple(std) if std else None,
        )


@dataclass(frozen=True, slots=True)
class Site:
    """One call of an activation function, or the output of one batch norm, in the captured graph.

    index: position among the sites, in execution order; two calls of one module are two sites. Batch norms are
    numbered on from the activations.
    node: name of the graph node. label: module path and operator, for people.
    axis: dimension of the output that holds the channels; channels: its length; ndim: number of dimensions.
    bounded_below: False for activations without a lower bound (LeakyReLU), which get one, and for batch norms.
    """

    index: int
    node: str
    label: str
    axis: int
    channels: int
    ndim: int
    bounded_below: bool


class Verdict(NamedTuple):
    """What the guard says of a batch of B images with K classes. A larger score is more suspicious.

    logits: float32 [B, K] of the original network. corrected_logits: float32 [B, K] of the corrected one.
    label: int64 [B], the original network's decision c*.
    corrected_label: int64 [B], the online rule: c* where not flagged, else the corrected network's
    decision without c* (MMAC paper, Sec. 4).
    score: float64 [B], in logits: the margin change S (mmdf, Eq. 4), or by how much the corrected network prefers
    another class (bna). p_value: float64 [B] in [0, 1], the chance of a score at least this large on a clean image;
    None where the method has none. flagged: bool [B].
    """

    logits: Tensor
    corrected_logits: Tensor
    label: Tensor
    corrected_label: Tensor
    score: Tensor
    p_value: Tensor | None
    flagged: Tensor
