"""The images that networks are trained and judged on."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cifar10 import read_tar
from guard.capture import fingerprint
from guard.data import Data, load_data
from guard.errors import BadData
from guard.progress import Progress, silent

SIDES = {"CIFAR10": 32, "CIFAR100": 32, "GTSRB": 32, "Imagenette": 256}


@dataclass(frozen=True)
class Dataset:
    """train, test: uint8 images and labels. classes: K."""

    name: str
    train: Data
    test: Data
    classes: int

    @cached_property
    def fingerprint(self) -> str:
        """Of every pixel and label, 16 hexadecimal digits."""
        parts = {"train": self.train, "test": self.test}
        tensors = {f"{name} images": part.images for name, part in parts.items()}
        tensors |= {f"{name} labels": part.labels for name, part in parts.items()}
        return fingerprint(tensors)[:16]


def load(source: str, *, progress: Progress = silent) -> Dataset:
    """The data set that ``source`` names: a tar with train/CLASS/*.jpg and test/CLASS/*.jpg (the JPEG CIFAR-10), a
    folder with train/CLASS/ and test/CLASS/ (Tiny ImageNet, sorted so), or torchvision:DATASET:ROOT (CIFAR10, CIFAR100,
    GTSRB, Imagenette; never downloaded).

    Raises:
        BadData: what was found instead, and the remedy.
    """
    if source.startswith("torchvision:"):
        name = source.split(":")[1]
        side = SIDES.get(name, 32)
        splits = ("train", "val") if name == "Imagenette" else ("train", "test")
        train, test = (load_data(f"{source}:{split}", size=(side, side)) for split in splits)
    elif Path(source).is_dir():
        name = Path(source).name
        train, test = (load_data(str(Path(source) / split)) for split in ("train", "test"))
    elif Path(source).is_file():
        name = "CIFAR10-JPEG"
        train, test = (read_tar(Path(source), split, progress=progress) for split in ("train", "test"))
    else:
        raise BadData(
            f"data: {source!r} is neither a tar file, a folder with train and test, nor torchvision:DATASET:ROOT.",
            field="data",
        )
    return Dataset(name, train, test, int(train.labels.max()) + 1)


def jpeg(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W], through JPEG of quality 50 and back."""
    through = []
    for image in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=50)
        through.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(through)).permute(0, 3, 1, 2).contiguous()


def brighter(images: Tensor, factor: float = 1.3) -> Tensor:
    """uint8 images, ``factor`` times as bright."""
    return (images.float() * factor).round().clamp(0.0, 255.0).to(torch.uint8)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "jpeg": jpeg,
    "bright": brighter,
    "dark": partial(brighter, factor=0.7),
}  # what D may have been through that production has not


class Rows(NamedTuple):
    """Of the test images, int64 each. clean: D, what the defender has. rest: what everything is measured on."""

    clean: Tensor
    rest: Tensor


def split(labels: Tensor, per_class: int, seed: int, evaluated: int | None = None) -> Rows:
    """D: ``per_class`` test images of each class, drawn by ``seed``; rest: ``evaluated`` of the others (None: all)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        picked[(shuffled == label).nonzero()[:per_class, 0]] = True
    return Rows(order[picked], order[~picked][:evaluated])


def rows_of(data: Data, rows: Tensor) -> Data:
    """The images ``rows`` of a data set."""
    return Data(data.images[rows], data.labels[rows], data.classes, data.source)
