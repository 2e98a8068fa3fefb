"""The Open Inference Protocol v2 over HTTP: request bodies in, answers and metadata out. Pure functions.

A tensor travels as numbers in the JSON, or, by the extension for binary tensors, as raw bytes behind it; then the
header Inference-Header-Content-Length says how long the JSON is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.config import Limits
from deployments.errors import BadRequest
from deployments.policy import Answer
from deployments.protocol.bodies import Ask, Model, json_object, numbers
from deployments.protocol.tensors import (
    DATATYPES,
    INPUT,
    check_id,
    check_input,
    check_output,
    check_parameters,
    from_raw,
    pixels,
    to_raw,
)
from guard.types import InputSpec

EXTENSIONS = ("binary_tensor_data", "guard", "model_repository")
JSON_LENGTH = "inference-header-content-length"


class Body(NamedTuple):
    """An answer as bytes. json_length: how many of them are JSON, where raw tensors follow it."""

    content: bytes
    json_length: int | None


def parse_infer(body: bytes, model: Model, limits: Limits, *, json_length: str | None = None) -> Ask:
    """The body of ``POST /v2/models/{name}/infer``; ``json_length`` is the header of this name, where it was sent.

    Raw FP32 values are read where they lie in ``body``.
    """
    length = None if json_length is None else _length(json_length, len(body))
    request = json_object(body if length is None else body[:length])
    tensors = request.get("inputs")
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise BadRequest(f'inputs: expected a list of one tensor named "{INPUT}"', field="inputs")
    request_id = None if request.get("id") is None else check_id(request["id"])
    raw = None if length is None else memoryview(body)[length:]
    images = _tensor(tensors[0], raw, model.spec, limits)
    parameters = _parameters(request, "parameters")
    every = _flag(parameters.get("binary_data_output", False), "parameters.binary_data_output")
    outputs = _outputs(request.get("outputs"), binary=every)
    if not outputs:
        return Ask(images, None, request_id, frozenset(DATATYPES) if every else frozenset())
    return Ask(images, tuple(outputs), request_id, frozenset(name for name, binary in outputs.items() if binary))


def render_infer(answer: Answer, ask: Ask, model: Model) -> Body:
    """The v2 answer. Outputs that were asked for and are not there (mode, settings, failure, method) are left out."""
    outputs, raw = [], []
    for name, values in asked(answer, ask):
        output: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": DATATYPES[name]}
        if name in ask.binary:
            raw.append(to_raw(values, DATATYPES[name]))
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    head = {
        "model_name": model.name,
        "model_version": model.version,
        "parameters": parameters_of(answer),
        "outputs": outputs,
    }
    if ask.id is not None:
        head = {"id": ask.id, **head}
    text = json.dumps(head, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Body(b"".join((text, *raw)), len(text) if raw else None)


def asked(answer: Answer, ask: Ask) -> list[tuple[str, NDArray[Any]]]:
    """The outputs that were asked for and are there, in the order asked."""
    wanted = DATATYPES if ask.outputs is None else ask.outputs
    found = ((name, getattr(answer, name)) for name in wanted)
    return [(name, values) for name, values in found if values is not None]


def parameters_of(answer: Answer) -> dict[str, str | int | bool]:
    """The facts of a whole request."""
    parameters: dict[str, str | int | bool] = {"guard_mode": answer.mode}
    if answer.flagged is not None:
        parameters["guard_flagged"] = int(answer.flagged.sum())
    if answer.unguarded:
        parameters["guard_unguarded"] = True
    return parameters


def render_metadata(model: Model, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The v2 metadata of the model; ``images`` is taken as FP32 in [0, 1] or as UINT8."""

    def tensor(name: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "datatype": DATATYPES.get(name, "FP32"), "shape": [-1, *shape]}

    rows = ("label", "flagged", "corrected_label")
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "pytorch_export",
        "inputs": [tensor(INPUT, *model.spec.shape) | {"parameters": {"guard_datatypes": ["UINT8", "FP32"]}}],
        "outputs": [tensor("logits", len(model.classes)), *map(tensor, rows)],
        "parameters": {"guard_classes": list(model.classes), **parameters},
    }


def render_server(version: str) -> dict[str, Any]:
    """The v2 metadata of the server. Of the extension model_repository there is the index alone."""
    return {"name": "guard", "version": version, "extensions": list(EXTENSIONS)}


def parse_index(body: bytes) -> bool:
    """The body of ``POST /v2/repository/index``, which may be empty: whether only ready models are asked for."""
    request = json_object(body) if body else {}
    return _flag(request.get("ready", False), "ready")


def render_index(models: Iterable[tuple[Model, bool]], *, ready_only: bool) -> list[dict[str, str]]:
    """The index of (model, whether it is ready)."""
    return [
        {
            "name": model.name,
            "version": model.version,
            "state": "READY" if ready else "UNAVAILABLE",
            "reason": "" if ready else "starting, or shutting down",
        }
        for model, ready in models
        if ready or not ready_only
    ]


def _length(json_length: str, body: int) -> int:
    """The length of the JSON at the front of a body of ``body`` bytes."""
    length = int(json_length) if json_length.isdecimal() and len(json_length) < 19 else 0
    if not 1 <= length <= body:
        raise BadRequest(
            f"{JSON_LENGTH}: expected the length of the JSON, 1 to {body} as the body has {body} bytes, got "
            f"{json_length[:40]!r}",
            field=JSON_LENGTH,
        )
    return length


def _tensor(tensor: Mapping[str, Any], raw: memoryview | None, spec: InputSpec, limits: Limits) -> NDArray[np.float32]:
    """One v2 input tensor as float32 [n, C, H, W] in [0, 1]; ``raw`` is what follows the JSON."""
    given = check_input(tensor.get("name"), tensor.get("datatype"), tensor.get("shape"), spec, limits)
    parameters = _parameters(tensor, f"{INPUT}.parameters")
    check_parameters(parameters, f"{INPUT}.parameters")
    if "binary_data_size" in parameters:
        field = f"{INPUT}.parameters.binary_data_size"
        return pixels(from_raw(_raw(tensor, parameters["binary_data_size"], raw, field), given, field), given)
    if raw:
        raise BadRequest(f"body: {len(raw)} bytes after the JSON belong to no tensor", field="body")
    if "data" not in tensor:
        raise BadRequest(f"{INPUT}.data: missing: send the values, flat or nested", field=f"{INPUT}.data")
    return pixels(numbers(tensor["data"], f"{INPUT}.data"), given)


def _raw(tensor: Mapping[str, Any], size: Any, raw: memoryview | None, field: str) -> memoryview:
    """The raw bytes of the only input: all that follow the JSON."""
    if "data" in tensor:
        raise BadRequest(f"{INPUT}.data: given as JSON and as raw bytes: send one of them", field=f"{INPUT}.data")
    if raw is None:
        raise BadRequest(
            f"{field}: raw bytes follow the JSON: say in the header {JSON_LENGTH} how long that is", field=field
        )
    if type(size) is not int or size != len(raw):
        raise BadRequest(f"{field}: {len(raw)} bytes follow the JSON, got {size!r}", field=field)
    return raw


def _outputs(value: Any, *, binary: bool) -> dict[str, bool]:
    """The outputs that are asked for, and whether each is to come as raw bytes; ``binary`` where it does not say."""
    if value is None:
        return {}
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadRequest('outputs: expected a list like [{"name": "label"}]', field="outputs")
    wanted: dict[str, bool] = {}
    for i, one in enumerate(value):
        field = f"outputs[{i}].parameters"
        name = check_output(one.get("name"), i)
        parameters = _parameters(one, field)
        check_parameters(parameters, field)
        wanted.setdefault(name, _flag(parameters.get("binary_data", binary), f"{field}.binary_data"))
    return wanted


def _parameters(holder: Mapping[str, Any], field: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"{field}: expected an object", field=field)
    return parameters


def _flag(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{field}: expected true or false, got {value!r}", field=field)
    return value
