"""The Open Inference Protocol v2 over gRPC: request messages in, answers and metadata out. Pure functions.

Requests carry their values as ``raw_input_contents`` or in the field of their type; answers as ``raw_output_contents``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deployments.config import Limits
from deployments.errors import BadRequest
from deployments.grpc.messages import message
from deployments.policy import Answer
from deployments.protocol import v2
from deployments.protocol.bodies import Ask, Model
from deployments.protocol.tensors import (
    DATATYPES,
    INPUT,
    Input,
    check_id,
    check_input,
    check_output,
    check_parameters,
    from_raw,
    pixels,
    to_raw,
)

# Where the values of each type travel, if not as raw bytes. UINT8 shares its field with UINT16 and UINT32.
CONTENTS = {"UINT8": ("uint_contents", np.uint32), "FP32": ("fp32_contents", np.float32)}


def parse_infer(request: Any, model: Model, limits: Limits) -> Ask:
    """A ``ModelInferRequest``. Raw FP32 values are read where they lie in it."""
    if len(request.inputs) != 1:
        raise BadRequest(f'inputs: expected one tensor named "{INPUT}", got {len(request.inputs)}', field="inputs")
    (tensor,) = request.inputs
    given = check_input(tensor.name, tensor.datatype, list(tensor.shape), model.spec, limits)
    check_parameters(tensor.parameters, f"{INPUT}.parameters")
    for i, one in enumerate(request.outputs):
        check_output(one.name, i)
        check_parameters(one.parameters, f"outputs[{i}].parameters")
    outputs = tuple(dict.fromkeys(one.name for one in request.outputs)) or None
    values = _values(tensor, request.raw_input_contents, given)
    return Ask(pixels(values, given), outputs, check_id(request.id) or None)


def render_infer(answer: Answer, ask: Ask, model: Model) -> Any:
    """The ``ModelInferResponse``. Outputs that were asked for and are not there are left out."""
    response = message("ModelInferResponse")(model_name=model.name, model_version=model.version, id=ask.id or "")
    for key, fact in v2.parameters_of(answer).items():
        # A truth value is a number to Python as well.
        kind = "bool_param" if isinstance(fact, bool) else "int64_param" if isinstance(fact, int) else "string_param"
        setattr(response.parameters[key], kind, fact)
    for name, values in v2.asked(answer, ask):
        response.outputs.add(name=name, datatype=DATATYPES[name], shape=values.shape)
        response.raw_output_contents.append(to_raw(values, DATATYPES[name]))
    return response


def render_metadata(model: Model) -> Any:
    """The ``ModelMetadataResponse``; gRPC has no place for the facts of the artifact."""
    metadata = v2.render_metadata(model, {})
    response = message("ModelMetadataResponse")(
        name=metadata["name"], versions=metadata["versions"], platform=metadata["platform"]
    )
    for ours, theirs in ((metadata["inputs"], response.inputs), (metadata["outputs"], response.outputs)):
        for one in ours:
            theirs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
    return response


def _values(tensor: Any, raw: Any, given: Input) -> NDArray[Any]:
    """The values of the only input, flat or of its shape."""
    filled = [field.name for field, _ in tensor.contents.ListFields()]
    name, kind = CONTENTS[given.datatype]
    if not raw and filled == [name]:
        return np.array(getattr(tensor.contents, name), kind)
    if filled or len(raw) != 1:
        travelling = [*filled, *(f"raw_input_contents[{i}]" for i in range(min(len(raw), 2)))]
        raise BadRequest(
            f"{INPUT}.contents: {given.datatype} takes {name}, or raw_input_contents of one tensor, got "
            f"{' and '.join(travelling) or 'neither'}",
            field=f"{INPUT}.contents",
        )
    return from_raw(raw[0], given, "raw_input_contents[0]")
