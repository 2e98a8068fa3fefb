"""What the flagged images of one class have in common, beside clean images: pixels, and activation sites."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.artifact import Artifact
from guard.corrections import Clip
from guard.data import Data, batches, check_images, check_labels
from guard.errors import BadData
from guard.observe import observe
from guard.progress import Progress, silent

FEW = 5
STEP = 1 / 255  # what 8 bits resolve: no deviation counts as smaller
BATCH = 64
Map = NDArray[np.float64]


class Excess(NamedTuple):
    """How often a site's channels go beyond their bounds: the share of (image, channel), in [0, 1].

    site: its index. label: module path and operator. flagged, clean: of whose images. channels: those that differ most,
    first.
    """

    site: int
    label: str
    flagged: float
    clean: float
    channels: tuple[int, ...]


class Explanation(NamedTuple):
    """Of the flagged images decided as ``label``.

    flagged, clean, clean_of_class: numbers of images. flagged_mean, clean_mean, class_mean: [C, H, W] in [0, 1], of the
    flagged images, of all clean ones, of the clean ones of the class. deviation: [H, W], across flagged images, root
    mean square over channels. consistency: [H, W]: by how much the flagged mean differs from that of all clean images,
    in deviations; high where flagged images agree on what clean ones do not show. sites: those with bounds, the one
    that differs most first; None where the method bounds none.
    """

    label: int
    name: str
    flagged: int
    clean: int
    clean_of_class: int
    flagged_mean: Map
    clean_mean: Map
    class_mean: Map
    deviation: Map
    consistency: Map
    sites: tuple[Excess, ...] | None

    @property
    def peak(self) -> tuple[int, int]:
        """(row, column) where the consistency is largest."""
        row, column = np.unravel_index(int(self.consistency.argmax()), self.consistency.shape)
        return int(row), int(column)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right), ends included, of the pixels with at least half of the largest consistency."""
        rows, columns = np.nonzero(self.consistency >= self.consistency.max() / 2)
        return int(rows.min()), int(columns.min()), int(rows.max()), int(columns.max())

    def to_json(self) -> dict[str, Any]:
        difference = np.abs(self.flagged_mean - self.class_mean)
        return {
            "class": self.name,
            "label": self.label,
            "images": {"flagged": self.flagged, "clean": self.clean, "clean_of_class": self.clean_of_class},
            "difference": {"largest": float(difference.max()), "mean": float(difference.mean())},
            "deviation": {"smallest": float(self.deviation.min()), "mean": float(self.deviation.mean())},
            "consistency": {
                "largest": float(self.consistency.max()),
                "median": float(np.median(self.consistency)),
                "peak": list(self.peak),
                "box": list(self.box),
            },
            "sites": None if self.sites is None else [site._asdict() for site in self.sites],
        }


def explain(
    artifact: Artifact, images: NDArray[np.uint8], label: int, clean: Data, progress: Progress = silent
) -> Explanation:
    """Compare flagged images, all decided as ``label``, with clean ones.

    Args:
        artifact: of the model that decided. images: uint8 [N, C, H, W]. clean: with true classes.

    Raises:
        BadData: fewer than a few flagged images, none of the class among the clean ones, or images that do not fit the
            model.
    """
    manifest = artifact.manifest
    if len(images) < FEW:
        raise BadData(
            f"quarantine: {len(images)} flagged images of class {manifest['classes'][label]}; expected at least {FEW} "
            "to see what they have in common.",
            field="quarantine",
        )
    spec = artifact.captured.spec
    flagged = check_images(images, spec)
    ordinary = check_images(clean.images, spec)
    labels = check_labels(clean.labels, len(ordinary), len(manifest["classes"]))
    own = ordinary[labels == label]
    if len(own) == 0:
        raise BadData(
            f"clean: it has no image of class {manifest['classes'][label]}; give some, to compare with.", field="clean"
        )
    mean, variance = _moments(flagged)
    usual, _ = _moments(ordinary)
    deviation = np.sqrt(variance.mean(0))
    return Explanation(
        label=label,
        name=str(manifest["classes"][label]),
        flagged=len(flagged),
        clean=len(ordinary),
        clean_of_class=len(own),
        flagged_mean=mean,
        clean_mean=usual,
        class_mean=_moments(own)[0],
        deviation=deviation,
        consistency=np.sqrt(((mean - usual) ** 2).mean(0)) / np.maximum(deviation, STEP),
        sites=_sites(artifact, flagged, ordinary, progress),
    )


def _moments(images: Tensor) -> tuple[Map, Map]:
    """(mean, variance), [C, H, W] each, of uint8 or float images; a batch at a time, for they may be many."""
    total = torch.zeros(images.shape[1:], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for batch in batches(images, BATCH):
        values = batch.double()
        total += values.sum(0)
        squares += values.square().sum(0)
    mean = total / len(images)
    return mean.numpy(), (squares / len(images) - mean.square()).clamp(min=0.0).numpy()


def _sites(artifact: Artifact, flagged: Tensor, clean: Tensor, progress: Progress) -> tuple[Excess, ...] | None:
    clips = {index: one for index, one in artifact.networks[0].items() if isinstance(one, Clip)}
    if not clips:
        return None
    shares = [_beyond(artifact, clips, images, progress) for images in (flagged, clean)]
    found = []
    for index in clips:
        ours, usual = shares[0][index], shares[1][index]
        order = torch.argsort(ours - usual, descending=True, stable=True)[:5].tolist()
        label = artifact.captured.site(index).label
        found.append(Excess(index, label, float(ours.mean()), float(usual.mean()), tuple(order)))
    return tuple(sorted(found, key=lambda site: site.clean - site.flagged))


def _beyond(artifact: Artifact, clips: dict[int, Clip], images: Tensor, progress: Progress) -> dict[int, Tensor]:
    """Site → [channels], the share of images in which the channel goes beyond its bounds anywhere."""
    seen = observe(artifact.captured, images, batch_size=BATCH, progress=progress)
    shares = {}
    for index, clip in clips.items():
        bounds = clip.tensors()
        beyond = seen.maxima[index].cpu() > bounds["upper"].cpu()
        if "lower" in bounds:
            beyond |= seen.minima[index].cpu() < bounds["lower"].cpu()
        shares[index] = beyond.double().mean(0)
    return shares
