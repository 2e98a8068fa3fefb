"""What an image file shows: read alike by the doors of the library and by the server."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by channels
ORIENTATION = 0x0112  # the EXIF tag, and what its values ask for
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, mode: str) -> Image.Image:
    """``image`` decoded, upright, in Pillow's ``mode``; a copy only where it has to be one, for it may be large."""
    image.load()
    turn = _turn(image)
    image.info.pop("transparency", None)
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip; of coloured ones it keeps the high byte
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns ``image`` upright; none by an EXIF block that cannot be read, for the pixels may be right."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:
        return None
