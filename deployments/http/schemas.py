"""The bodies of requests and answers as JSON Schema (2020-12), for the OpenAPI document of one server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from deployments.config import MODES, Limits
from deployments.protocol.bodies import Model
from deployments.protocol.tensors import DATATYPES, INPUT

Schema = dict[str, Any]
NUMBERS = {
    "FP32": {"type": "number", "minimum": 0, "maximum": 1},
    "UINT8": {"type": "integer", "minimum": 0, "maximum": 255, "description": "Without a decimal point."},
}
VALUES = {"FP32": {"type": "number"}, "INT64": {"type": "integer"}, "BOOL": {"type": "boolean"}}
# As str.isprintable has it: what a log or a header may hold.
PRINTABLE = r"^([^\p{C}\p{Z}]| )*$"


class Offer(NamedTuple):
    """A model of the server, and the most that one request to it may hold. upstream: its original network runs
    elsewhere, and can fail there."""

    model: Model
    limits: Limits
    upstream: bool = False


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def schemas(offers: Sequence[Offer]) -> dict[str, Schema]:
    """All schemas by name; those of images and tensors fit one of the models."""
    flags = {"type": "object", "description": "Unknown ones are ignored.", "properties": {}}
    return {
        "Error": _object(
            {"error": {"type": "string"}, "field": {"type": ["string", "null"]}},
            required=("error", "field"),
            description="What was expected, what came, the remedy; and the field, tensor or header that is meant.",
        ),
        "Live": _object({"live": {"const": True}}, required=("live",)),
        "Ready": _object({"ready": {"type": "boolean"}}, required=("ready",)),
        "Server": _object(
            {"name": {"const": "guard"}, "version": {"type": "string"}, "extensions": _list({"type": "string"})},
            required=("name", "version", "extensions"),
        ),
        "Models": _object({"models": _list(_name(offers))}, required=("models",)),
        "IndexRequest": {
            "type": "object",
            "properties": {"ready": {"type": "boolean", "description": "Only models that are ready."}},
        },
        "Index": _list(
            _object(
                {
                    "name": _name(offers),
                    "version": {"type": "string"},
                    "state": {"enum": ["READY", "UNAVAILABLE"]},
                    "reason": {"type": "string"},
                },
                required=("name", "version", "state", "reason"),
            )
        ),
        "TensorMetadata": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "datatype": {"enum": ["UINT8", "FP32", "INT64", "BOOL"]},
                "shape": _list({"type": "integer", "minimum": -1}, description="-1: the number of images."),
                "parameters": {"type": "object"},
            },
            "required": ["name", "datatype", "shape"],
        },
        "Model": _object(
            {
                "name": _name(offers),
                "versions": _list({"type": "string"}),
                "platform": {"type": "string"},
                "inputs": _list(ref("TensorMetadata")),
                "outputs": _list(ref("TensorMetadata")),
                "parameters": {"type": "object", "description": "Classes, mode and facts of the artifact: guard_…"},
            },
            required=("name", "versions", "platform", "inputs", "outputs", "parameters"),
        ),
        "InferRequest": {
            "type": "object",
            "properties": {
                "id": {"type": ["string", "null"], "pattern": PRINTABLE, "description": "Comes back in the answer."},
                "parameters": flags
                | {
                    "properties": {
                        "binary_data_output": {"type": "boolean", "description": "All outputs as raw bytes."}
                    }
                },
                "inputs": _list(_any([ref(f"Tensor.{one.model.name}") for one in offers]), minItems=1, maxItems=1),
                "outputs": _list(
                    {
                        "type": "object",
                        "properties": {
                            "name": {"enum": list(DATATYPES)},
                            "parameters": flags
                            | {"properties": {"binary_data": {"type": "boolean", "description": "As raw bytes."}}},
                        },
                        "required": ["name"],
                    },
                    description="The outputs wanted, in this order. Those that mode or settings withhold are left out.",
                ),
            },
            "required": ["inputs"],
        },
        **{f"Tensor.{one.model.name}": _tensor(one) for one in offers},
        "InferAnswer": _object(
            {
                "id": {"type": "string"},
                "model_name": _name(offers),
                "model_version": {"type": "string"},
                "parameters": {
                    "type": "object",
                    "properties": {
                        "guard_mode": {"enum": list(MODES)},
                        "guard_flagged": {"type": "integer", "minimum": 0, "description": "How many images."},
                        "guard_unguarded": {"const": True, "description": "There was no verdict."},
                    },
                    "required": ["guard_mode"],
                },
                "outputs": _list({"oneOf": [_output(datatype) for datatype in VALUES]}),
            },
            required=("model_name", "model_version", "parameters", "outputs"),
        ),
        "PredictRequest": {
            "type": "object",
            "properties": {
                "instances": _any(
                    [
                        _images(one, ref(kind), description=description)
                        for one in offers
                        for kind, description in ((f"Pixels.{one.model.name}", "Tensors"), ("ImageFile", "Image files"))
                    ]
                )
            },
            "required": ["instances"],
        },
        **{f"Pixels.{one.model.name}": _pixels(one, "FP32") for one in offers},
        "ImageFile": {
            "type": "object",
            "properties": {
                "b64": {"type": "string", "contentEncoding": "base64", "description": "A PNG, JPEG or WebP file."}
            },
            "required": ["b64"],
        },
        "Predictions": _object({"predictions": _list(ref("Prediction"))}, required=("predictions",)),
        "Prediction": _prediction(offers),
    }


def _tensor(offer: Offer) -> Schema:
    """One input [B, C, H, W], its values flat or nested, or raw behind the JSON."""
    one = math.prod(offer.model.spec.shape)
    kinds = []
    for datatype, number in NUMBERS.items():
        flat = _list(number, minItems=one, maxItems=one * offer.limits.images, description="Flat: B·C·H·W values.")
        nested = _images(offer, _pixels(offer, datatype), description="Nested as the shape says.")
        kinds.append({"properties": {"datatype": {"const": datatype}, "data": _any([nested, flat])}})
    first = {"type": "integer", "minimum": 1, "maximum": offer.limits.images}
    return {
        "type": "object",
        "properties": {
            "name": {"const": INPUT},
            "shape": {
                "type": "array",
                "prefixItems": [first, *({"const": size} for size in offer.model.spec.shape)],
                "items": False,
                "minItems": 4,
                "maxItems": 4,
            },
            "datatype": {"enum": list(NUMBERS)},
            "parameters": {
                "type": "object",
                "properties": {
                    "binary_data_size": {
                        "type": "integer",
                        "description": "Instead of data: how many raw bytes, little-endian, follow the JSON.",
                    }
                },
            },
        },
        "required": ["name", "shape", "datatype"],
        "oneOf": kinds,
    }


def _images(offer: Offer, image: Schema, *, description: str) -> Schema:
    return _list(image, minItems=1, maxItems=offer.limits.images, description=description)


def _pixels(offer: Offer, datatype: str) -> Schema:
    """One image as nested lists [C][H][W]."""
    schema: Schema = NUMBERS[datatype]
    for size in reversed(offer.model.spec.shape):
        schema = _list(schema, minItems=size, maxItems=size)
    return schema


def _output(datatype: str) -> Schema:
    return _object(
        {
            "name": {"enum": [name for name, kind in DATATYPES.items() if kind == datatype]},
            "datatype": {"const": datatype},
            "shape": _list({"type": "integer", "minimum": 0}),
            "data": _list(VALUES[datatype], description="Flat."),
            "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
        },
        required=("name", "datatype", "shape"),
    )


def _prediction(offers: Sequence[Offer]) -> Schema:
    label, of_class = {"type": ["integer", "null"], "minimum": 0}, {"type": ["string", "null"]}
    return _object(
        {
            "label": label | {"description": "Null where the mode reject withholds it."},
            "class": of_class,
            "flagged": {"type": ["boolean", "null"], "description": "Not in observe; null without a verdict."},
            "corrected_label": label,
            "corrected_class": of_class,
            "score": {"type": "number", "description": "Where exposed. Larger is more suspicious."},
            "p_value": {"type": "number", "description": "Where exposed, and where the method has one."},
            "unguarded": {"const": True, "description": "There was no verdict."},
            "model": _name(offers),
            "mode": {"enum": list(MODES)},
        },
        required=("label", "class", "model", "mode"),
    )


def _name(offers: Sequence[Offer]) -> Schema:
    return {"enum": [one.model.name for one in offers]} if offers else {"type": "string"}


def _object(properties: dict[str, Schema], *, required: Sequence[str], description: str = "") -> Schema:
    """An object with these keys and no others."""
    about = {"description": description} if description else {}
    return {
        "type": "object",
        **about,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _any(choices: list[Schema]) -> Schema:
    """One of ``choices``; anything where there are none yet."""
    return choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {}
