"""The data doors: what they give, and a sentence for all that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from guard.data import as_float, batches, check_images, check_labels, load_data, load_images
from guard.errors import BadData
from guard.types import InputSpec

X = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 5)).astype(np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


def test_npz(tmp_path: Path) -> None:
    """An .npz gives its images and labels as they are; channels last is turned round; int32 labels become int64."""
    straight = load_data(npz(tmp_path, x=X, y=Y.astype(np.int32)))
    turned = load_data(npz(tmp_path, x=X.transpose(0, 2, 3, 1), y=Y))
    for data in (straight, turned):
        assert data.images.dtype == torch.uint8
        assert np.array_equal(data.images.numpy(), X)
        assert data.labels.tolist() == Y.tolist()
        assert data.labels.dtype == torch.int64
    scaled = load_data(npz(tmp_path, x=X.astype(np.float64) / 255, y=Y))
    assert torch.allclose(scaled.images, torch.from_numpy(X) / 255.0)
    assert torch.equal(as_float(straight.images), torch.from_numpy(X).float() / 255.0)


@pytest.mark.parametrize(
    ("x", "y", "field", "says"),
    [
        (X.astype(np.float32), Y, "images", r"\[0, 1\], got 0 to 255.*divided by 255"),
        (X.astype(np.float32) / 255 - 0.5, Y, "images", "got -0.5 to 0.5.*--mean and --std"),
        (np.where(X > 250, np.nan, X / 255), Y, "images", "NaN or infinite"),
        (np.full(X.shape, np.inf), Y, "images", "NaN or infinite"),
        (X.astype(np.int64), Y, "images", "uint8 or float32"),
        (X.astype(">u2"), Y, "images", "uint8 or float32"),
        (X.astype(complex), Y, "images", "uint8 or float32"),
        (np.array(["cat", "dog"]), Y, "images", "uint8 or float32"),
        (X[0], Y, "images", r"\[N, C, H, W\], got \[3, 8, 5\]"),
        (X[:0], Y[:0], "images", "at least one"),
        (X, Y[:5], "labels", "expected 6, one an image, got 5"),
        (X, Y.astype(np.float32), "labels", "expected integers"),
        (X, Y > 0, "labels", "expected integers"),
        (X, Y.astype(complex), "labels", "expected integers"),
        (X.astype(np.longdouble), Y, "images", "uint8 or float32"),
        (X, Y[:, None], "labels", r"shape \[N\]"),
        (X, Y - 1, "labels", "got -1 to 1"),
        (X, np.array(list("abcdef")), "labels", "integers"),
        (np.array([None] * 6), Y, "data", "cannot be read"),
        (X, np.array([{}] * 6), "data", "cannot be read"),
    ],
)
def test_bad_arrays(tmp_path: Path, x: NDArray[Any], y: NDArray[Any], field: str, says: str) -> None:
    """Arrays that are no images or labels are refused by the name of the field, with what came."""
    with pytest.raises(BadData, match=says) as caught:
        load_data(npz(tmp_path, x=x, y=y))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}:")


def broken(change: Callable[[bytearray], bytes]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.savez_compressed(folder / "data.npz", x=X.repeat(20, 0), y=Y.repeat(20))
        path = folder / "data.npz"
        path.write_bytes(change(bytearray(path.read_bytes())))
        return str(path)

    return make


def flipped(content: bytearray) -> bytes:
    for place in range(60, 1000, 40):
        content[place] ^= 0xFF
    return bytes(content)


def npy(folder: Path) -> str:
    np.save(folder / "data.npy", X)
    return str((folder / "data.npy").rename(folder / "data.npz"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: npz(folder, x=X), "no array y; it holds .'x'.*Expected x .images. and y"),
        (lambda folder: npz(folder, images=X, labels=Y), "no array x and no array y"),
        (broken(lambda content: bytes(content[: len(content) // 2])), "cannot be read"),
        (broken(lambda content: b""), "cannot be read"),
        (broken(lambda content: b"no zip archive"), "cannot be read"),
        (broken(flipped), "cannot be read"),
        (npy, "cannot be read"),
        (lambda folder: str(folder / "absent.npz"), "there is no file"),
        (lambda folder: str(folder / "absent"), "neither an .npz file, a folder"),
    ],
)
def test_bad_files(tmp_path: Path, make: Callable[[Path], str], says: str) -> None:
    """A file that is missing, damaged or of another kind is refused by name."""
    with pytest.raises(BadData, match=says) as caught:
        load_data(make(tmp_path))
    assert caught.value.field == "data"


def test_images_of_another_shape_than_the_models() -> None:
    """Images that the model does not take are refused with both shapes; labels beyond its classes with theirs."""
    with pytest.raises(BadData, match=r"takes C×H×W = 3×32×32, got 3×8×5. Resize") as caught:
        check_images(X, InputSpec(3, 32, 32))
    assert caught.value.field == "images"
    with pytest.raises(BadData, match="2 classes, so labels go from 0 to 1; got 0 to 2") as caught:
        check_labels(Y, 6, classes=2)
    assert caught.value.field == "labels"
    with pytest.raises(BadData, match=r"expected a tensor .*, got list"):
        check_images([1, 2])


def test_views_of_arrays() -> None:
    """Turned around, as from BGR to RGB, or with gaps, an array holds the same images; ragged labels are none."""
    assert torch.equal(check_images(X[:, ::-1]), check_images(X).flip(1))
    assert torch.equal(check_images(X[::2, :, ::-1]), check_images(X)[::2].flip(2))
    shown = X.transpose(0, 2, 3, 1)
    assert np.shares_memory(check_images(shown.transpose(0, 3, 1, 2)).numpy(), X)  # no copy of what can be large
    with pytest.raises(BadData, match="shape"):
        check_labels(np.array(3), 1)
    with pytest.raises(BadData, match="several lengths"):
        check_labels([[1], [1, 2]], 2)


def test_a_picture_beside_class_folders(tmp_path: Path) -> None:
    """It is not taken for all the images that there are."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    assert len(load_images(str(tmp_path))[0]) == 2
    Image.new("RGB", (8, 8)).save(tmp_path / "preview.png")
    with pytest.raises(BadData, match=r"preview.png"):
        load_images(str(tmp_path))
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    assert load_images(str(tmp_path))[1] == ("preview.png",)
    (tmp_path / ".cat").rename(tmp_path / "cat")
    with pytest.raises(BadData, match=r"image files \(preview.png\) and folders of them \(cat\)"):
        load_images(str(tmp_path))


def test_first_and_batches(tmp_path: Path) -> None:
    """`first` keeps the file's order and takes so many a class; batches in order join to the whole."""
    data = load_data(npz(tmp_path, x=X, y=np.array([2, 0, 2, 0, 0, 1])))
    part = data.first(2)
    assert part.labels.tolist() == [2, 0, 2, 0, 1]
    assert np.array_equal(part.images.numpy(), X[[0, 1, 2, 3, 5]])
    found = list(batches(data.images, 4))
    assert [len(batch) for batch in found] == [4, 2]
    assert torch.equal(torch.cat(found), as_float(data.images))
