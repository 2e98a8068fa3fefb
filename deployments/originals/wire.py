"""The client's side of the Open Inference Protocol v2: one tensor of images out, one tensor back. Pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.errors import UpstreamUnfit
from deployments.protocol.v2 import JSON_LENGTH
from deployments.upstream import UpstreamSettings

RAW = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


class Body(NamedTuple):
    """A request's body and the headers that describe it."""

    content: bytes
    headers: dict[str, str]


def encode(images: NDArray[np.float32], settings: UpstreamSettings) -> Body:
    """The request for images [n, C, H, W] in [0, 1], in the form that the upstream wants them."""
    values = _as_wanted(images, settings)
    tensor: dict[str, Any] = {"name": settings.input, "shape": list(values.shape), "datatype": settings.datatype}
    output: dict[str, Any] = {"name": settings.output}
    if not settings.binary:
        content = json.dumps({"inputs": [tensor | {"data": values.ravel().tolist()}], "outputs": [output]}).encode()
        return Body(content, {"content-type": "application/json"})
    raw = values.tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    output["parameters"] = {"binary_data": True}
    head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    return Body(head + raw, {"content-type": "application/octet-stream", JSON_LENGTH: str(len(head))})


def decode(content: bytes, headers: Mapping[str, str], name: str) -> NDArray[Any]:
    """The tensor ``name`` of an answer, raw or JSON, whatever was asked for.

    Raises:
        UpstreamUnfit: the answer cannot be read, or has no such tensor.
    """
    try:
        length = int(headers.get(JSON_LENGTH, len(content)))
        answer, raw = json.loads(content[:length]), memoryview(content)[length:]
        for tensor in answer["outputs"]:
            size = tensor.get("parameters", {}).get("binary_data_size")
            if tensor["name"] == name:
                return _tensor(tensor, None if size is None else raw[:size])
            raw = raw[size or 0 :]
        names = [tensor["name"] for tensor in answer["outputs"]]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UpstreamUnfit("upstream: its answer is not one of the Open Inference Protocol v2") from error
    raise UpstreamUnfit(
        f"upstream: its answer has no tensor {name!r}, but {', '.join(map(repr, names)) or 'none'}: name one in "
        "upstream.output",
        field="upstream.output",
    )


def _as_wanted(images: NDArray[np.float32], settings: UpstreamSettings) -> NDArray[Any]:
    if settings.datatype == "UINT8":
        return (images * np.float32(255)).round().astype(np.uint8)
    if settings.mean is None or settings.std is None:
        return images.astype("<f4", copy=False)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (settings.mean, settings.std))
    return ((images - mean) / std).astype("<f4", copy=False)


def _tensor(tensor: Mapping[str, Any], raw: memoryview | None) -> NDArray[Any]:
    """One output of an answer; ValueError or LookupError where it makes no sense."""
    shape = tensor["shape"]
    values = np.asarray(tensor["data"]) if raw is None else np.frombuffer(raw, RAW[tensor["datatype"]])
    if values.size != math.prod(shape):
        raise ValueError(f"{values.size} values for the shape {shape}")
    return values.reshape(shape)
