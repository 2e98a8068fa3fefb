"""Image files become the tensor that the model takes, or an error that says why not."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from deployments.errors import BadRequest, TooLarge, UnfitTensor, UnknownMedia
from deployments.images import decode, parts
from guard.types import InputSpec

SPEC = InputSpec(3, 4, 6)


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_file_of_the_right_size_is_exact(kind: str, options: dict[str, object]) -> None:
    """PNG and lossless WebP give the pixels divided by 255, channels first."""
    raw = pixels()
    got = decode(file(Image.fromarray(raw), kind, **options), SPEC, max_pixels=100)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, raw.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_a_larger_file_is_averaged_down() -> None:
    """Resizing is antialiased: a fine checkerboard becomes grey, not black and white."""
    board = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)
    got = decode(file(Image.fromarray(board).convert("RGB")), SPEC, max_pixels=10_000)
    assert got.shape == (3, 4, 6)
    assert np.abs(got - 0.5).max() < 0.05


def test_the_exif_orientation_is_applied() -> None:
    """A file that says "rotate me by 180 degrees" is read upright."""
    raw = pixels()
    exif = Image.Exif()
    exif[0x0112] = 3
    got = decode(file(Image.fromarray(raw), exif=exif), SPEC, max_pixels=100)
    np.testing.assert_array_equal(got, raw[::-1, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_one_channel_models_get_grey() -> None:
    """A model of one channel gets the luma of a coloured file."""
    got = decode(file(Image.new("RGB", (6, 4), (255, 0, 0))), InputSpec(1, 4, 6), max_pixels=100)
    assert got.shape == (1, 4, 6)
    np.testing.assert_allclose(got, 0.299, atol=1 / 255)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_pixel_modes_are_converted(mode: str) -> None:
    """Grey, palette, transparent and bilevel files are read as RGB."""
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(file(Image.new(mode, (6, 4)), kind), SPEC, max_pixels=100).shape == (3, 4, 6)


def big_header() -> bytes:
    """A PNG that claims 60,000 × 60,000 pixels: some 10 GB when decoded."""
    data = bytearray(file(Image.new("L", (6, 4))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", BadRequest),
        (b"GIF89a not one of ours", UnknownMedia),
        (file(Image.new("RGB", (6, 4)), "GIF"), UnknownMedia),
        (file(Image.fromarray(pixels(64, 64)))[:-2000], BadRequest),
        (file(Image.fromarray(pixels(64, 64)), "JPEG")[:700], BadRequest),
        (file(Image.fromarray(pixels(64, 64)), "WEBP")[:300], BadRequest),
        (file(Image.new("RGB", (200, 200))), TooLarge),
        (big_header(), TooLarge),
        (file(Image.fromarray(np.zeros((4, 6), np.uint16))), UnfitTensor),
    ],
    ids=["empty", "text", "gif", "short png", "short jpeg", "short webp", "large", "bomb", "16 bit"],
)
def test_a_bad_file_is_refused(data: bytes, error: type[BadRequest]) -> None:
    """Every kind of bad file gives its own error, which names the image."""
    with pytest.raises(error) as caught:
        decode(data, SPEC, max_pixels=10_000)
    assert type(caught.value) is error
    assert caught.value.field == "image"


def test_multipart_payloads_come_out_as_they_went_in() -> None:
    """Two payloads, with line ends and dashes inside, are given back byte for byte."""
    payloads = [b"\r\n--\x00\xff\r\n", b"--boun"]
    body = b"".join(
        b'--bound\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n' + payload + b"\r\n"
        for payload in payloads
    )
    assert parts(body + b"--bound--\r\n", 'multipart/form-data; boundary="bound"') == payloads


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--b\r\n\r\nx\r\n--b--", "multipart/form-data"),
        (b"--b\r\n\r\nx", "multipart/form-data; boundary=b"),
        (b"--b\r\nno blank line\r\n--b--", "multipart/form-data; boundary=b"),
        (b"", "multipart/form-data; boundary=b"),
    ],
)
def test_a_broken_multipart_body_is_refused(body: bytes, content_type: str) -> None:
    """A missing boundary, end or blank line is an error, never an empty or shortened file."""
    with pytest.raises(BadRequest):
        parts(body, content_type)
