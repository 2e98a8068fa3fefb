"""Image files become the tensor that the model takes, or an error that says why not."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from files import animated, chunk, deep_png, plain_webp
from files import saved as file
from PIL import Image

from deployments.errors import BadRequest, TooLarge, UnknownMedia
from deployments.protocol.images import decode, parts
from guard.types import InputSpec

SPEC = InputSpec(3, 4, 6)


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


def colours(data: bytes, spec: InputSpec = SPEC) -> np.ndarray:
    """The decoded pixels as whole numbers [H, W, C]."""
    return (decode(data, spec, max_pixels=10_000).transpose(1, 2, 0) * 255).round().astype(np.uint8)


def test_sixteen_bits_are_scaled() -> None:
    """Grey of 16 bits becomes grey of 8 over the whole range, just as 16-bit colours do, and nothing is clipped."""
    grey = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    got = colours(deep_png(grey))
    np.testing.assert_array_equal(got, np.repeat(grey[..., None] // 256, 3, 2))
    np.testing.assert_array_equal(got, colours(deep_png(np.repeat(grey[..., None], 3, 2))))
    np.testing.assert_array_equal(got, colours(deep_png(np.stack([grey, np.zeros_like(grey)], 2))))
    np.testing.assert_array_equal(got, colours(deep_png(grey, before=chunk(b"tRNS", b"\x00\x00"))))
    np.testing.assert_array_equal(got[..., :1], colours(deep_png(grey), InputSpec(1, 4, 6)))


def test_transparency_is_dropped() -> None:
    """A pixel keeps the colour that the file has for it, however transparent: alpha channel, palette or key colour."""
    raw = pixels()
    alpha = np.dstack([raw, np.arange(24, dtype=np.uint8).reshape(4, 6) * 10])
    np.testing.assert_array_equal(colours(file(Image.fromarray(alpha))), raw)
    np.testing.assert_array_equal(colours(file(Image.fromarray(alpha), "WEBP", lossless=True, exact=True)), raw)
    np.testing.assert_array_equal(colours(file(Image.fromarray(raw), transparency=tuple(raw[0, 0].tolist()))), raw)
    palette = Image.fromarray(raw).quantize(8)
    for transparency in (b"\x00\x80\xff", 0):
        got = colours(file(palette, transparency=transparency))
        np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))


def test_print_colours_become_screen_colours() -> None:
    """A CMYK JPEG of pure cyan, magenta and yellow is read as such, not inverted."""
    for ink, expected in (
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ):
        got = colours(file(Image.new("CMYK", (6, 4), ink), "JPEG", quality=100))
        assert np.abs(got.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_pictures_the_first_is_read(kind: str) -> None:
    """An animation stands for its first frame, a camera's JPEG with a second picture for the first."""
    got = colours(animated(kind, (250, 10, 10), (10, 250, 10)))
    assert np.abs(got.astype(int) - (250, 10, 10)).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: a.swapaxes(0, 1)[:, ::-1]),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: a.swapaxes(0, 1)[::-1]),
        (9, lambda a: a),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_every_orientation_is_turned_upright(kind: str, orientation: int, upright) -> None:
    """The eight values of the EXIF standard; others say nothing."""
    raw = pixels(5, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    got = colours(file(Image.fromarray(raw), kind, exif=exif, **options), InputSpec(3, 5, 5))
    np.testing.assert_array_equal(got, upright(raw))


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block of (tag, type, count, value of four bytes)."""
    listed = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + listed + bytes(4)


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif_block((0x0112, 3, 1, b"\0\3\0\0"), (0x011A, 2, 2, b"7\0\0\0")), True),
        (exif_block((0x0112, 3, 1, b"\0\3\0\0"), (0x8769, 2, 2, b"7\0\0\0")), True),
        (exif_block((0x0112, 3, 2, b"\0\3\0\3")), False),
        (exif_block((0x0112, 2, 2, b"3\0\0\0")), False),
        (exif_block((0x0112, 3, 1, b"\0\3\0\0"))[:10], False),
        (b"Exif\0\0no such order", False),
    ],
    ids=["text as a number", "text as a place", "two orientations", "a text", "cut off", "noise"],
)
def test_exif_that_makes_no_sense_spoils_no_picture(block: bytes, turned: bool) -> None:
    """The picture is read; it is turned where there is one orientation, whatever else the block holds."""
    raw = pixels()
    got = colours(file(Image.fromarray(raw), exif=block))
    np.testing.assert_array_equal(got, raw[::-1, ::-1] if turned else raw)


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
        (plain_webp(16_383), TooLarge),
    ],
    ids=["empty", "text", "gif", "short png", "short jpeg", "short webp", "large", "bomb", "webp bomb"],
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
