"""The tensors of the Open Inference Protocol, however they travel: names, types, sizes, and raw little-endian bytes."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.config import Limits
from deployments.errors import BadRequest, UnfitTensor
from deployments.protocol.bodies import bytes_range, check_count, unit_range
from guard.types import InputSpec

INPUT = "images"
DATATYPES = {
    "logits": "FP32",
    "label": "INT64",
    "flagged": "BOOL",
    "corrected_label": "INT64",
    "score": "FP32",
    "p_value": "FP32",
}
RAW: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
}
# Parameters of a tensor that change where or what it is: ignored, they would give an answer that nobody asked for.
NOT_OFFERED = ("shared_memory_region", "classification")


class Input(NamedTuple):
    """What an input says of itself, checked. shape: (B, C, H, W)."""

    datatype: str
    shape: tuple[int, ...]


def check_input(name: Any, datatype: Any, shape: Any, spec: InputSpec, limits: Limits) -> Input:
    """What every input must be: ``images``, UINT8 or FP32, as a list [B, C, H, W] with B within the limits."""
    if name != INPUT:
        raise BadRequest(f'inputs[0].name: expected "{INPUT}", got {name!r}', field="inputs[0].name")
    if datatype not in ("UINT8", "FP32"):
        raise BadRequest(
            f"{INPUT}.datatype: expected UINT8 (0 to 255) or FP32 (0 to 1), got {datatype!r}", field=f"{INPUT}.datatype"
        )
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise BadRequest(f"{INPUT}.shape: expected a list of four sizes [B, C, H, W]", field=f"{INPUT}.shape")
    if len(shape) != 4 or tuple(shape[1:]) != spec.shape:
        raise UnfitTensor(
            f"{INPUT}.shape: expected [B, {', '.join(map(str, spec.shape))}], got {shape}", field=f"{INPUT}.shape"
        )
    check_count(shape[0], limits, f"{INPUT}.shape")
    return Input(datatype, tuple(shape))


def check_parameters(parameters: Container[str], field: str) -> None:
    """Refuse what changes the meaning of a tensor and is not offered here; other unknown parameters are ignored."""
    for key in NOT_OFFERED:
        if key in parameters:
            raise BadRequest(
                f"{field}.{key}: this server does not offer it: leave it out, tensors travel in the body",
                field=f"{field}.{key}",
            )


def check_id(request_id: Any) -> str:
    if not isinstance(request_id, str) or not request_id.isprintable():
        raise BadRequest("id: expected a string of printable characters", field="id")
    return request_id


def check_output(name: Any, i: int) -> str:
    """The name of the requested output ``i``."""
    if not isinstance(name, str) or name not in DATATYPES:
        raise BadRequest(
            f"outputs[{i}].name: expected one of {', '.join(DATATYPES)}, got {name!r}", field=f"outputs[{i}].name"
        )
    return name


def pixels(values: NDArray[Any], given: Input) -> NDArray[np.float32]:
    """The values of an input, flat or of its shape, as float32 [n, C, H, W] in [0, 1]."""
    field, needed = f"{INPUT}.data", math.prod(given.shape)
    if values.size != needed or (values.ndim > 1 and values.shape != given.shape):
        raise BadRequest(
            f"{field}: {list(given.shape)} needs {needed} values, got {values.size} as {list(values.shape)}",
            field=field,
        )
    values = values.reshape(given.shape)
    return bytes_range(values, field) if given.datatype == "UINT8" else unit_range(values, field)


def from_raw(raw: bytes | memoryview, given: Input, field: str) -> NDArray[Any]:
    """``raw`` as the values of an input, without a copy and hence read-only; ``field`` names it in errors."""
    needed = math.prod(given.shape) * RAW[given.datatype].itemsize
    if len(raw) != needed:
        raise BadRequest(
            f"{field}: {list(given.shape)} of {given.datatype} needs {needed} bytes, got {len(raw)}", field=field
        )
    return np.frombuffer(raw, RAW[given.datatype]).reshape(given.shape)


def to_raw(values: NDArray[Any], datatype: str) -> bytes:
    """The bytes of a tensor, rows first; a truth value is one byte."""
    return values.astype(RAW[datatype], copy=False).tobytes()
