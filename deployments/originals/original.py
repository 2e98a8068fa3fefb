"""The original network's logits from elsewhere: who gives them, and what their answer must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deployments.errors import UpstreamUnfit
from deployments.upstream import Outputs

SMALLEST = np.finfo(np.float32).tiny  # of the probabilities; its logarithm, −87.3, stands for all below
SUM_SLACK = 0.02  # half-precision probabilities of many classes add up to 1 within this


class Original(Protocol):
    """An original network that runs somewhere else.

    Raises, in ``logits`` and ``check``:
        UpstreamFailed: it cannot be reached, failed, or answered nonsense. Unavailable: it is busy.
    """

    async def logits(self, images: NDArray[np.float32], headers: Mapping[str, str]) -> NDArray[np.float32]:
        """Logits [n, K] of images [n, C, H, W] in [0, 1]; ``headers``: of the request that they came with."""

    async def check(self) -> None:
        """Raise if it is not ready."""

    async def close(self) -> None: ...


def as_logits(answer: Any, images: int, classes: int, outputs: Outputs) -> NDArray[np.float32]:
    """``answer`` as logits float32 [images, classes], a copy; log p of probabilities p, which keeps every margin.

    Raises:
        UpstreamUnfit: another shape, no numbers, not a number, or no probabilities where they are expected.
    """
    try:
        with np.errstate(over="ignore"):
            values = np.array(answer, np.float32)
    except (TypeError, ValueError) as error:
        raise UpstreamUnfit("upstream: its answer is no array of numbers") from error
    if values.size == images * classes and (images == 1 or values.shape[0] == images):
        values = values.reshape(images, classes)  # some servers keep dimensions of size 1
    if values.shape != (images, classes):
        raise UpstreamUnfit(
            f"upstream: expected {outputs} of shape {[images, classes]}, got {list(values.shape)}: the guard was "
            "fitted for a model with other classes, or upstream.output names another tensor",
            field="upstream.output",
        )
    if np.isnan(values).any():
        raise UpstreamUnfit("upstream: its answer is not a number in places")
    if outputs == "logits":
        return values
    if not like_probabilities(values):
        raise UpstreamUnfit(
            "upstream: expected probabilities, got rows that are below 0 or do not add up to 1: set upstream.outputs "
            "to logits",
            field="upstream.outputs",
        )
    return np.log(np.maximum(values, SMALLEST))


def like_probabilities(values: NDArray[np.float32]) -> bool:
    """Whether each row of [n, K] is a distribution."""
    return bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) <= SUM_SLACK).all())
