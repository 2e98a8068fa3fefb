"""The doors for images in folders and in torchvision's datasets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from deployments.protocol.images import decode
from guard.data import load_data, load_images
from guard.errors import BadData
from guard.types import InputSpec

X = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 5)).astype(np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def write(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder_of(root: Path, sides: tuple[int, int] = (8, 5)) -> Path:
    """Class folders dog and cat, two PNG files each; the second cat has other sides."""
    for index, name in enumerate(["dog", "cat"]):
        for k in range(2):
            pixels = X[2 * index + k].transpose(1, 2, 0)
            write(root / name / f"{k}.PNG", pixels[: sides[0], : sides[1]] if (name, k) == ("cat", 1) else pixels)
    return root


def test_folder(tmp_path: Path) -> None:
    """Class folders are classes in the order of their names; pixels come as they are in the files."""
    data = load_data(str(folder_of(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(data.images.numpy(), X[[2, 3, 0, 1]])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_files_for_a_model_of_other_channels(tmp_path: Path, channels: int, mode: str) -> None:
    """Grey files for a model that takes grey, files with transparency for one that takes that; else they are RGB."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, channels, 8, 5)).astype(np.uint8)
    for index, one in enumerate(pixels):
        write(tmp_path / "ab"[index // 2] / f"{index}.png", one[0] if channels == 1 else one.transpose(1, 2, 0))
    with Image.open(tmp_path / "a" / "0.png") as first:
        assert first.mode == mode
    assert np.array_equal(load_data(str(tmp_path), channels=channels).images.numpy(), pixels)
    assert np.array_equal(load_images(str(tmp_path / "b"), channels=channels)[0].numpy(), pixels[2:])
    assert load_data(str(tmp_path)).images.shape == (4, 3, 8, 5)
    np.savez(tmp_path / "d.npz", x=pixels, y=[0, 0, 1, 1])
    with pytest.raises(BadData, match=f"holds images of {channels} channels, 3 are wanted"):
        load_data(str(tmp_path / "d.npz"), channels=3)
    with pytest.raises(BadData, match=r"1, 3 or 4, not 2: give an .npz"):
        load_data(str(tmp_path), channels=2)


def test_a_file_is_read_as_the_server_reads_it(tmp_path: Path) -> None:
    """Turned upright by its EXIF tag, and grey of 16 bits scaled instead of clipped: a guard is fitted on what it will
    see."""
    picture = Image.fromarray(X[0].transpose(1, 2, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90° clockwise
    deep = Image.fromarray((np.arange(40, dtype=np.uint16) * 1600).reshape(8, 5))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "0.png", exif=exif)
        deep.transpose(Image.Transpose.ROTATE_90).save(tmp_path / name / "1.png")
    data = load_data(str(tmp_path))
    assert data.images.shape == (4, 3, 5, 8)
    for path, image in zip(sorted(tmp_path.glob("a/*")), data.images, strict=False):
        served = decode(path.read_bytes(), InputSpec(3, 5, 8), max_pixels=1000)
        assert np.array_equal((served * 255).round().astype(np.uint8), image.numpy())
    assert data.images[1].max() == 39 * 1600 >> 8


def test_folder_of_mixed_sizes(tmp_path: Path) -> None:
    """Images of several sizes are refused with the option that resizes them, and resized with it."""
    folder_of(tmp_path, sides=(6, 5))
    with pytest.raises(BadData, match=r"1.PNG is 5×6 .* the first image 5×8 .* --size HEIGHT,WIDTH") as caught:
        load_data(str(tmp_path))
    assert caught.value.field == "data"
    resized = load_data(str(tmp_path), size=(8, 5)).images
    assert resized.shape[2:] == (8, 5)
    assert np.array_equal(resized[0].numpy(), X[2])  # those of the right size are left alone


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: (root / "cat" / "2.png").write_bytes(b"no image"), r"2.png cannot be decoded"),
        (lambda root: (root / "cat" / "2.jpg").write_bytes(b""), r"2.jpg cannot be decoded"),
        (lambda root: (root / "cat" / "2.png").mkdir(), r"2.png cannot be decoded"),
        (lambda root: (root / "owl").mkdir(), "owl holds no image"),
        (lambda root: [file.unlink() for file in (root / "dog").iterdir()], "dog holds no image"),
    ],
)
def test_bad_folder(tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    """A class folder without images, or a file that is no image, is refused by name."""
    spoil(folder_of(tmp_path))
    with pytest.raises(BadData, match=says) as caught:
        load_data(str(tmp_path))
    assert caught.value.field == "data"


def test_truncated_image(tmp_path: Path) -> None:
    """An image whose second half is missing is refused, not filled with grey."""
    file = write(folder_of(tmp_path) / "cat" / "2.png", np.repeat(X[0].transpose(1, 2, 0), 20, 0))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(BadData, match=r"2.png cannot be decoded"):
        load_data(str(tmp_path))


def test_one_folder(tmp_path: Path) -> None:
    """A folder with a single class folder is no data set of classes."""
    write(tmp_path / "cat" / "0.png", X[0].transpose(1, 2, 0))
    with pytest.raises(BadData, match="holds 1 class folders"):
        load_data(str(tmp_path))


def test_torchvision_image_folder(tmp_path: Path) -> None:
    """torchvision's ImageFolder on the same files gives what the folder door gives."""
    folder_of(tmp_path)
    ours, theirs = load_data(str(tmp_path)), load_data(f"torchvision:ImageFolder:{tmp_path}")
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.classes == theirs.classes


def test_torchvision_splits(tmp_path: Path) -> None:
    """MNIST in its own file format: grey images with one channel, the test split unless another is named."""
    grey, raw = X[:, 0], tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        x, y = grey[rows], Y[rows].astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, *x.shape) + x.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(y)) + y.tobytes())
    test, train = (load_data(f"torchvision:MNIST:{tmp_path}{split}") for split in ("", ":train"))
    assert np.array_equal(test.images.numpy(), grey[4:, None])
    assert np.array_equal(train.images.numpy(), grey[:4, None])
    assert train.labels.tolist() == Y[:4].tolist()
    assert len(train.classes or ()) == 10
    assert load_data(f"torchvision:MNIST:{tmp_path}", channels=3).images.shape == (2, 3, 8, 5)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("torchvision:CIFAR10", "expected torchvision:DATASET:ROOT"),
        ("torchvision:Nonsense:{0}", "no dataset 'Nonsense'"),
        ("torchvision:utils:{0}", "no dataset 'utils'"),
        ("torchvision:CIFAR10:{0}", "cannot be read.*Nothing is downloaded"),
        ("torchvision:CIFAR10:{0}:valid", "split of CIFAR10 is train or test, got 'valid'"),
        ("torchvision:SVHN:{0}:nonsense", "cannot be read"),
        ("torchvision:ImageFolder:{0}/absent", "cannot be read"),
    ],
)
def test_bad_torchvision(tmp_path: Path, source: str, says: str) -> None:
    """A dataset that torchvision does not have, or that is not on the disk, is refused; nothing is downloaded."""
    with pytest.raises(BadData, match=says) as caught:
        load_data(source.format(tmp_path))
    assert caught.value.field == "data"
    assert not any(tmp_path.iterdir())
