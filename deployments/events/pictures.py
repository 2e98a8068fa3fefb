"""The images of a quarantine as arrays, and on a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from deployments.events.shelf import Entry
from guard.errors import BadData
from guard.pictures import MODES
from guard.progress import Progress, silent

COLUMNS = 8


class Kept(NamedTuple):
    """Images uint8 [N, C, H, W] and what is known of each, oldest first."""

    entries: tuple[Entry, ...]
    images: NDArray[np.uint8]


def read(folder: Path, entries: Sequence[Entry], progress: Progress = silent) -> Kept:
    """The images of ``entries``; one that a server has removed meanwhile is left out.

    Raises:
        BadData: none is left, one cannot be decoded, or they are not of one shape.
    """
    found: list[tuple[Entry, NDArray[np.uint8]]] = []
    with progress(f"read {len(entries)} images", len(entries)) as advance:
        for entry in entries:
            pixels = _pixels(folder / entry.file)
            if pixels is not None:
                found.append((entry, pixels))
            advance(1)
    if not found:
        raise BadData(f"quarantine: {folder} has no such image.", field="quarantine")
    shapes = sorted({pixels.shape for _, pixels in found})
    if len(shapes) > 1:
        raise BadData(
            f"quarantine: {folder} holds images of different shapes, {' and '.join(map(str, shapes))} (C, H, W): "
            "choose one --class, or purge those of another model.",
            field="quarantine",
        )
    return Kept(tuple(entry for entry, _ in found), np.stack([pixels for _, pixels in found]))


def sheet(kept: Kept) -> Figure:
    """Each image with its class, score and time."""
    rows = -(-len(kept.entries) // COLUMNS)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.95 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{len(kept.entries)} flagged images, the newest last", fontsize=11)
    grid: Any = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, entry, image in zip(grid.flat, kept.entries, kept.images, strict=False):
        axes.set_axis_on()
        show(axes, image / 255.0)
        axes.set_title(entry.predicted_class[:18], fontsize=8)
        axes.set_xlabel(f"{entry.score:.3g}\n{entry.time:%m-%d %H:%M:%S}", fontsize=7)
    return figure


def show(axes: Axes, image: NDArray[np.floating]) -> None:
    """image: [C, H, W] in [0, 1]; the fourth channel is how opaque it is."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.5")  # a white trigger in a corner must be seen
    options: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "nearest"}
    axes.imshow(image[0] if len(image) == 1 else image.transpose(1, 2, 0), **options)


def _pixels(path: Path) -> NDArray[np.uint8] | None:
    """uint8 [C, H, W]; None where the file is gone."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in MODES.values():
                raise ValueError(f"its pixels are {image.mode}")
            pixels = np.asarray(image, dtype=np.uint8)
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadData(f"quarantine: {path} cannot be decoded: {error}.", field="quarantine") from error
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
