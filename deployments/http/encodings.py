"""Compressed request bodies."""

from __future__ import annotations

import zlib

from deployments.errors import BadRequest, TooLarge, UnknownMedia

# zlib's names for what stands around the compressed data. In HTTP, deflate is the zlib format, not bare deflate.
WINDOWS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """``body`` as it was before its Content-Encoding; never holds more than ``limit`` bytes of it and one.

    Raises:
        UnknownMedia: another encoding. BadRequest: not of this encoding, cut off, or with more after its end.
        TooLarge: more than ``limit`` bytes.
    """
    window = WINDOWS.get(encoding)
    if window is None:
        raise UnknownMedia(
            f"content-encoding: expected gzip, deflate or none, got {encoding!r}", field="content-encoding"
        )
    inflater = zlib.decompressobj(window)
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"body: not {encoding}, as content-encoding says it is", field="body") from error
    if len(inflated) > limit:
        raise TooLarge(f"body: more than {limit} bytes once inflated: send fewer images a request", field="body")
    if not inflater.eof:
        raise BadRequest(f"body: the {encoding} data is cut off: send all of it", field="body")
    if inflater.unused_data:
        raise BadRequest(f"body: bytes after the end of the {encoding} data: send one stream", field="body")
    return inflated
