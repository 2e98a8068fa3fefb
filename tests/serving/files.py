"""Image files that no library would write: built chunk by chunk."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6
SAMPLES = {GREY: 1, COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, packed: bytes, *, before: bytes = b"") -> bytes:
    """A PNG of ``depth`` bits a sample. packed: the compressed lines, each after its filter byte; before: chunks that
    stand before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def deep_png(values: np.ndarray, *, before: bytes = b"") -> bytes:
    """A PNG of 16 bits: uint16 [H, W] or [H, W, samples]."""
    height, width, samples = (*values.shape, 1)[:3]
    colour = next(colour for colour, count in SAMPLES.items() if count == samples)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return png(width, height, 16, colour, zlib.compress(lines), before=before)


def black_png(side: int, *, depth: int = 1, colour: int = GREY) -> bytes:
    """A black square, small as a file however large it is."""
    line = bytes((SAMPLES[colour] * side * depth + 7) // 8 + 1)
    squeeze = zlib.compressobj(9)
    return png(side, side, depth, colour, b"".join([*(squeeze.compress(line) for _ in range(side)), squeeze.flush()]))


def plain_webp(side: int) -> bytes:
    """A lossless square of one colour in 38 bytes: where nothing varies, no bit is spent on a pixel."""
    data = bytearray(saved(Image.new("RGB", (16, 16), (9, 9, 9)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # fourteen bits of width − 1, fourteen of height − 1
    kept = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
    data[at : at + 4] = (kept | (side - 1) << 14 | (side - 1)).to_bytes(4, "little")
    return bytes(data)


def animated(kind: str, *colours: tuple[int, int, int]) -> bytes:
    """One frame of 4 × 4 pixels a colour."""
    first, *others = (Image.new("RGB", (4, 4), colour) for colour in colours)
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(first, kind, save_all=True, append_images=others, **options)
