"""From the bytes of a PNG, JPEG or WebP file to the tensor that the model takes.

The size is read from the header and checked before a pixel is decoded. An image is turned upright by its EXIF tag,
converted to RGB (or grey, for a model of one channel; 16 bits are scaled to 8, transparency is dropped, of an animation
the first frame stays), and resized to the model's height and width, whatever its shape, with an antialiased bilinear
filter.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header

from deployments.errors import BadRequest, TooLarge, UnknownMedia
from guard.pictures import upright
from guard.types import InputSpec

FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
PILLOW_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, spec: InputSpec, *, max_pixels: int, field: str = "image") -> NDArray[np.float32]:
    """One image file as float32 [C, H, W] in [0, 1]. ``field`` names it in errors."""
    if spec.channels not in PILLOW_MODES:
        raise UnknownMedia(
            f"{field}: this model takes {spec.channels} channels, a file has 1 or 3: send a tensor to /v2/…/infer",
            field=field,
        )
    image = _open(data, max_pixels, field)
    try:
        pixels = upright(image, PILLOW_MODES[spec.channels])
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise whatever comes up
        raise BadRequest(
            f"{field}: the {image.format} file is truncated or damaged: send the whole file", field=field
        ) from error
    if pixels.size != (spec.width, spec.height):
        pixels = pixels.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, dtype=np.float32) / np.float32(255)
    return array[None] if spec.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _open(data: bytes, max_pixels: int, field: str) -> Image.Image:
    """The image with its header read and nothing decoded."""
    if not data:
        raise BadRequest(f"{field}: empty: send the bytes of a PNG, JPEG or WebP file", field=field)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UnknownMedia(f"{field}: not a PNG, JPEG or WebP file", field=field) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"{field}: more than the {max_pixels} pixels that this server decodes", field=field) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise BadRequest(f"{field}: the header of the image file is damaged", field=field) from error
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(
            f"{field}: {width}×{height} pixels, more than the {max_pixels} that this server decodes: scale it down",
            field=field,
        )
    return image


def decode_all(given: Sequence[tuple[str, bytes]], spec: InputSpec, *, max_pixels: int) -> NDArray[np.float32]:
    """Files as float32 [n, C, H, W]; given: (name in errors, bytes). All of them together hold at most max_pixels."""
    left = max_pixels
    for field, data in given:
        image = _open(data, max_pixels, field)
        left -= image.width * image.height
        if left < 0:
            raise TooLarge(
                f"{field}: with those before it more than {max_pixels} pixels: send them in parts", field=field
            )
    return np.stack([decode(data, spec, max_pixels=max_pixels, field=field) for field, data in given])


def parts(body: bytes, content_type: str) -> list[bytes]:
    """The files of a multipart/form-data body, in order; fields that are no files are passed over."""
    media, options = parse_options_header(content_type)
    if not options.get(b"boundary"):
        raise BadRequest("content-type: multipart without a boundary", field="content-type")
    found: list[bytes] = []
    ended: list[bool] = []

    def keep(file: File) -> None:
        file.file_object.seek(0)
        found.append(file.file_object.read())

    try:
        parser = FormParser(
            media.decode("latin-1"),
            on_field=None,
            on_file=keep,
            on_end=lambda: ended.append(True),
            boundary=options[b"boundary"],
            config={"MAX_MEMORY_FILE_SIZE": math.inf},
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"body: not a multipart body: {error}", field="body") from error
    if not ended:
        raise BadRequest("body: the multipart body does not end with its boundary: send all of it", field="body")
    return found
