"""Is the original network elsewhere the one that the guard was fitted for? A few images tell, and what to change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from deployments.errors import UpstreamUnfit
from deployments.originals.original import SMALLEST, Original, like_probabilities
from guard.errors import BadSetting
from guard.types import InputSpec

FLOOR = float(np.log(SMALLEST))
TELLING = -9.0  # log p above which no upstream rounds a probability to 0
Images = NDArray[np.float32]
Logits = NDArray[np.float32]
Channels = tuple[float, ...] | None


class UpstreamMismatch(BadSetting):
    """The original elsewhere is not the network that the guard was fitted for, or is not asked as it should be."""


async def compare(
    original: Original,
    reference: Callable[[Images], Awaitable[Logits]],
    spec: InputSpec,
    tolerance: float,
    mean: Channels = None,
    std: Channels = None,
) -> None:
    """Ask the original about a few images, one by one, for it may take no more at once.

    Args:
        original: elsewhere. reference: the guard's own. spec: what both take. tolerance: see `difference`. mean, std:
            how the images are normalised on their way.

    Raises:
        UpstreamMismatch: they differ; the sentence names the remedy. UpstreamFailed, Unavailable: it does not answer.
    """
    images = pictures(spec)
    try:
        theirs = np.concatenate([await original.logits(images[i : i + 1], {}) for i in range(len(images))])
    except UpstreamUnfit as error:
        raise UpstreamMismatch(str(error), field=error.field) from error
    ours = await reference(images)
    apart = difference(ours, theirs)
    if apart <= tolerance:
        return
    remedy = (
        "it is another model or version: fit a guard for it; or it computes in low precision: raise upstream.tolerance"
    )
    if theirs.shape[1] > 1 and like_probabilities(theirs):
        remedy = "they look like probabilities: set upstream.outputs to probabilities"
    for misused, change in suspicions(images, spec, mean, std):
        if difference(await reference(misused), theirs) <= tolerance:
            remedy = change
            break
    decisions = int((ours.argmax(axis=1) != theirs.argmax(axis=1)).sum())
    raise UpstreamMismatch(
        f"upstream: on {len(images)} test images its logits are up to {apart:.0%} of their range away from those of "
        f"the network that the guard was fitted for (tolerance {tolerance:.0%}), and {decisions} decisions differ: "
        f"{remedy}",
        field="upstream",
    )


def pictures(spec: InputSpec, count: int = 8) -> Images:
    """Images [count, C, H, W] in [0, 1], the same each time: blocks of random colours with some noise."""
    draw = np.random.default_rng(0)
    channels, height, width = spec.shape
    blocks = draw.random((count, channels, 4, 4), np.float32)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    images = blocks[:, :, rows][:, :, :, columns]
    noisy = 0.8 * images + 0.2 * draw.random(images.shape, np.float32)
    # Whole numbers of 255ths, which both datatypes carry.
    return (np.round(noisy * 255) / 255).astype(np.float32)


def difference(ours: Logits, theirs: Logits) -> float:
    """The largest difference between logits [n, K], as a share of the range of ours in its row.

    A constant added to a row changes neither decision nor margin, and counts for nothing. An entry of theirs that is
    the logarithm of a probability rounded to 0 says only that it is small.
    """
    ours, theirs = (logits - logits.max(axis=1, keepdims=True) for logits in (ours, theirs))
    span = np.maximum(-ours.min(axis=1, keepdims=True), 1e-6)
    small = (theirs <= FLOOR + 1) & (ours < TELLING)
    with np.errstate(invalid="ignore"):
        apart = np.where(small, 0, np.abs(ours - theirs)) / span
    return float(np.nan_to_num(apart, nan=np.inf).max())


def suspicions(images: Images, spec: InputSpec, mean: Channels, std: Channels) -> Iterator[tuple[Images, str]]:
    """What usually is wrong: (images for which our network would answer as a so misused upstream, the remedy)."""
    if spec.mean is not None and spec.std is not None:
        yield (
            images * _channels(spec.std) + _channels(spec.mean),
            f"it expects normalised images: set upstream.mean to {list(spec.mean)} and upstream.std to "
            f"{list(spec.std)}",
        )
    if mean is not None and std is not None:
        yield (
            (images - _channels(mean)) / _channels(std),
            "it normalises images itself: leave upstream.mean and upstream.std out",
        )
    yield (
        images / np.float32(255),
        "it expects 0 to 255: set upstream.datatype to UINT8, or upstream.mean to 0 and std to 1/255",
    )
    yield (
        np.ascontiguousarray(images[:, ::-1]),
        "it expects the channels in the other order: put the conversion into the upstream",
    )


def _channels(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None, None]
