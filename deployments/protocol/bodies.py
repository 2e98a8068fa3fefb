"""What every kind of body shares: the request once read, and the checks of its numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.config import Limits
from deployments.errors import BadRequest, TooLarge, UnfitTensor
from guard.types import InputSpec


class Ask(NamedTuple):
    """A request that has been read. images: may lie in its body, read-only. outputs: the tensors that it wants (None:
    all). id: echoed in the answer. binary: the tensors that it wants as raw bytes."""

    images: NDArray[np.float32]
    outputs: tuple[str, ...] | None = None
    id: str | None = None
    binary: frozenset[str] = frozenset()


class Model(NamedTuple):
    """What bodies need to know of the model."""

    name: str
    version: str
    spec: InputSpec
    classes: tuple[str, ...]


def json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except RecursionError as error:
        raise BadRequest("body: JSON is nested too deeply", field="body") from error
    except ValueError as error:
        raise BadRequest(f"body: not JSON: {error}", field="body") from error
    if not isinstance(value, dict):
        raise BadRequest("body: expected a JSON object", field="body")
    return value


def check_count(count: int, limits: Limits, field: str) -> None:
    if count < 1:
        raise UnfitTensor(f"{field}: no image: send at least one", field=field)
    if count > limits.images:
        raise TooLarge(f"{field}: {count} images, at most {limits.images} a request: send them in parts", field=field)


def numbers(data: Sequence[Any], field: str) -> NDArray[Any]:
    """``data`` as an integer or float array; ragged lists, text and truth values are refused."""
    try:
        values = np.asarray(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest(f"{field}: lists of unequal length, or not numbers", field=field) from error
    if values.dtype.kind not in "iuf" or _holds_truth(data):
        raise BadRequest(f"{field}: expected numbers", field=field)
    return values


def _holds_truth(data: Any) -> bool:
    """Whether a truth value is among the nested lists ``data``; beside numbers, numpy takes it for one."""
    kinds = set(map(type, data)) if isinstance(data, list) else {type(data)}
    return bool in kinds or (list in kinds and any(map(_holds_truth, data)))


def bytes_range(values: NDArray[Any], field: str) -> NDArray[np.float32]:
    if values.dtype.kind == "f":
        raise UnfitTensor(f"{field}: UINT8 takes whole numbers: send FP32 for values in [0, 1]", field=field)
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > 255):
        raise UnfitTensor(f"{field}: UINT8 takes 0 to 255, got {values.min()} to {values.max()}", field=field)
    return values.astype(np.float32) / np.float32(255)


def unit_range(values: NDArray[Any], field: str) -> NDArray[np.float32]:
    """``values`` themselves where they are float32."""
    low, high = values.min(), values.max()  # not a number, if one is among them
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnfitTensor(f"{field}: values that are not finite", field=field)
    if low < 0 or high > 1:
        raise UnfitTensor(
            f"{field}: FP32 takes 0 to 1, got {low:g} to {high:g}: divide pixels by 255, or send them as UINT8; do not "
            "normalise, the model does",
            field=field,
        )
    return values.astype(np.float32, copy=False)
