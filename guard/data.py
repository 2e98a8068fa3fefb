"""Data doors: images and labels from where people keep them, checked before anything is computed on them.

- ``FILE.npz`` with ``x`` (uint8, or float32 in [0, 1]; N×C×H×W or N×H×W×C) and ``y`` (int, [N])
- a folder of class folders with images (classes in the order of their names)
- ``torchvision:DATASET:ROOT[:SPLIT]``, for instance ``torchvision:CIFAR10:/data:test`` (never downloads)
"""

from __future__ import annotations

import inspect
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guard.errors import BadData
from guard.pictures import MODES, upright
from guard.types import InputSpec

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Data:
    """images: uint8 or float32 in [0, 1], [N, C, H, W]. labels: int64 [N]. classes: names, if the source has any."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def first(self, per_class: int) -> Data:
        """The first ``per_class`` images of each class, in the order of the file."""
        chosen = (
            torch.cat([(self.labels == c).nonzero()[:per_class, 0] for c in torch.unique(self.labels)]).sort().values
        )
        return Data(self.images[chosen], self.labels[chosen], self.classes, self.source)


def as_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Float32 batches [≤ size, C, H, W] in order."""
    for start in range(0, len(images), size):
        yield as_float(images[start : start + size]).contiguous()


def load_data(source: str, *, size: tuple[int, int] | None = None, channels: int | None = None) -> Data:
    """Open DATA as the command line names it.

    Args:
        source: see the module's docstring. size: (height, width) that images of a folder or a torchvision
            dataset are resized to (bilinear, antialiased); None wants them all of one size. channels: what such images
            are converted to, 1 (grey), 3 (RGB) or 4 (RGBA); None: RGB, or as the dataset has them.

    Raises:
        BadData: what was found instead, and the remedy.
    """
    if source.startswith("torchvision:"):
        return _torchvision(source, size, None if channels is None else _mode(channels))
    path = Path(source)
    if path.is_dir():
        return _folder(path, size, _mode(channels or 3))
    if path.suffix == ".npz":
        data = _npz(path)
        if channels not in (None, data.images.shape[1]):
            raise BadData(
                f"channels: {path} holds images of {data.images.shape[1]} channels, {channels} are wanted; arrays are "
                "not converted.",
                field="channels",
            )
        return data
    raise BadData(
        f"data: {source!r} is neither an .npz file, a folder of class folders, nor torchvision:DATASET:ROOT[:SPLIT].",
        field="data",
    )


def load_images(
    source: str, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Images [N, C, H, W] for what needs no labels, and the names of their files: a folder of image files, or what
    `load_data` takes (without names).

    Raises:
        BadData: what was found instead, and the remedy.
    """
    path = Path(source)
    files = _image_files(path) if path.is_dir() else []
    if not files:
        return load_data(source, size=size, channels=channels).images, None
    if beside := [folder for folder in path.iterdir() if _holds_images(folder)]:
        raise BadData(
            f"data: {path} holds image files ({files[0].name}) and folders of them ({min(beside).name}): which are "
            "meant? Move one or the other.",
            field="data",
        )
    mode = _mode(channels or 3)
    return _stack([(str(file), _decoded(file, size, mode)) for file in files]), tuple(file.name for file in files)


def _mode(channels: int) -> str:
    """Pillow's name for images of so many channels."""
    if channels not in MODES:
        raise BadData(f"channels: image files have 1, 3 or 4, not {channels}: give an .npz.", field="channels")
    return MODES[channels]


def check_images(given: Any, spec: InputSpec | None = None) -> Tensor:
    """Images as a tensor [N, C, H, W], uint8 or float32 in [0, 1], of the model's shape if ``spec`` is given.

    Raises:
        BadData: wrong type, rank, range or shape; values that are not finite; no images.
    """
    images = _tensor(given, "images: expected uint8 or float32 in [0, 1]", "images")
    if not isinstance(images, Tensor):
        raise BadData(f"images: expected a tensor [N, C, H, W], got {type(images).__name__}.", field="images")
    images = images.detach()
    if images.ndim != 4:
        raise BadData(f"images: expected shape [N, C, H, W], got {list(images.shape)}.", field="images")
    if len(images) == 0:
        raise BadData("images: expected at least one image, got none.", field="images")
    if spec is not None and tuple(images.shape[1:]) != spec.shape:
        raise BadData(
            f"images: the model takes C×H×W = {'×'.join(map(str, spec.shape))}, "
            f"got {'×'.join(map(str, images.shape[1:]))}. Resize the images, or reorder them to channels first.",
            field="images",
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise BadData(f"images: expected uint8 or float32 in [0, 1], got {images.dtype}.", field="images")
    images = images.float()
    low, high = float(images.min()), float(images.max())
    if not (torch.isfinite(images).all()):
        raise BadData("images: some values are NaN or infinite.", field="images")
    if low < 0.0 or high > 1.0:
        raise BadData(
            f"images: expected float values in [0, 1], got {low:.3g} to {high:.3g}. Give raw pixels: uint8, or divided "
            "by 255; normalisation belongs to the model (--mean and --std).",
            field="images",
        )
    return images


def _tensor(given: Any, expected: str, field: str) -> Any:
    """An array as a tensor of the machine's byte order; anything else as it is."""
    if not isinstance(given, np.ndarray):
        return given
    try:
        if given.dtype.kind not in "biuf":
            raise TypeError(given.dtype)
        turned = any(stride < 0 for stride in given.strides)  # as in images[:, ::-1]: torch has no such views
        return torch.from_numpy(given.astype(given.dtype.newbyteorder("="), order="C" if turned else "K", copy=turned))
    except TypeError:
        raise BadData(f"{expected}, got {given.dtype}.", field=field) from None


def check_labels(given: Any, count: int, classes: int | None = None) -> Tensor:
    """Labels as int64 [count], each from 0 to ``classes`` − 1.

    Raises:
        BadData: wrong type, length or range.
    """
    try:
        array = np.asarray(given) if isinstance(given, (list, tuple)) else given
    except ValueError:
        raise BadData("labels: expected integers of shape [N], got lists of several lengths.", field="labels") from None
    labels = _tensor(array, "labels: expected integers of shape [N]", "labels")
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        shape = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise BadData(f"labels: expected integers of shape [N], got {shape}.", field="labels")
    if len(labels) != count:
        raise BadData(f"labels: expected {count}, one an image, got {len(labels)}.", field="labels")
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        raise BadData(
            "labels: "
            + (f"the model has {classes} classes, so labels" if classes else "they")
            + (f" go from 0 to {classes - 1}; " if classes else " start at 0; ")
            + f"got {low} to {high}.",
            field="labels",
        )
    return labels


def _npz(path: Path) -> Data:
    try:
        with path.open("rb") as file:  # opened here: np.load leaves a broken archive open
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array (.npy)")
            missing = [key for key in ("x", "y") if key not in archive]
            if missing:
                raise BadData(
                    f"data: {path} has no array {' and no array '.join(missing)}; it holds {sorted(archive)}. "
                    "Expected x (images) and y (labels).",
                    field="data",
                )
            x, y = archive["x"], archive["y"]
    except FileNotFoundError:
        raise BadData(f"data: there is no file {path}.", field="data") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadData(f"data: {path} cannot be read as .npz: {error}.", field="data") from error
    if x.ndim == 4 and x.shape[1] not in MODES and x.shape[3] in MODES:
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    images = check_images(x)
    return Data(images, check_labels(y, len(images)), None, str(path))


def _folder(path: Path, size: tuple[int, int] | None, mode: str) -> Data:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if len(folders) < 2:
        raise BadData(
            f"data: {path} holds {len(folders)} class folders; expected one folder a class with images in it.",
            field="data",
        )
    arrays, labels = [], []
    for label, folder in enumerate(folders):
        files = _image_files(folder)
        if not files:
            raise BadData(
                f"data: the class folder {folder} holds no image ({', '.join(sorted(SUFFIXES))}).", field="data"
            )
        arrays += [(str(file), _decoded(file, size, mode)) for file in files]
        labels += [label] * len(files)
    return Data(_stack(arrays), torch.tensor(labels), tuple(folder.name for folder in folders), str(path))


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _holds_images(folder: Path) -> bool:
    with suppress(PermissionError):
        return not folder.name.startswith(".") and folder.is_dir() and bool(_image_files(folder))
    return False


def _decoded(file: Path, size: tuple[int, int] | None, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [C, H, W]."""
    try:
        with Image.open(file) as image:
            return _pixels(upright(image, mode), size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadData(f"data: {file} cannot be decoded: {error}.", field="data") from error


def _torchvision(source: str, size: tuple[int, int] | None, mode: str | None) -> Data:
    import torchvision

    parts = source.split(":", 3)
    if len(parts) < 3:
        raise BadData(f"data: expected torchvision:DATASET:ROOT[:SPLIT], got {source!r}.", field="data")
    name, root, split = parts[1], parts[2], parts[3] if len(parts) > 3 else "test"
    factory: Any = getattr(torchvision.datasets, name, None)
    if not isinstance(factory, type):
        raise BadData(f"data: torchvision has no dataset {name!r}.", field="data")
    accepted = inspect.signature(factory).parameters
    options: dict[str, Any] = {}
    if "train" in accepted:
        if split not in ("train", "test"):
            raise BadData(f"data: the split of {name} is train or test, got {split!r}.", field="data")
        options["train"] = split == "train"
    elif "split" in accepted:
        options["split"] = split
    dataset: Any
    try:
        dataset = factory(root, **options)
        arrays = []
        labels = []
        for index in range(len(dataset)):
            image, label = dataset[index]
            arrays.append((f"image {index}", _pixels(image if mode is None else image.convert(mode), size)))
            labels.append(label)
    except (RuntimeError, OSError, ValueError, TypeError, AttributeError, ImportError, LookupError) as error:
        raise BadData(f"data: {source} cannot be read: {error}. Nothing is downloaded here.", field="data") from error
    names = getattr(dataset, "classes", None)
    images = _stack(arrays)
    classes = tuple(str(name) for name in names) if isinstance(names, Sequence) else None
    return Data(images, check_labels(labels, len(images)), classes, source)


def _pixels(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [C, H, W]."""
    if image.mode not in MODES.values():
        image = image.convert("RGB")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _stack(arrays: list[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]) -> Tensor:
    first = arrays[0][1].shape
    for name, array in arrays:
        if array.shape != first:
            raise BadData(
                f"data: {name} is {array.shape[2]}×{array.shape[1]} with {array.shape[0]} channels, the first image "
                f"{first[2]}×{first[1]} with {first[0]}. Give --size HEIGHT,WIDTH to resize them all.",
                field="data",
            )
    return torch.from_numpy(np.stack([array for _, array in arrays]))
