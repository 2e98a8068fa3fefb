"""The OpenAPI 3.1 document of one server: its routes, its models with their input shapes, and its errors."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from deployments.http.schemas import Offer, Schema, ref, schemas
from deployments.keys import IMPLIED, Role
from deployments.protocol.images import MEDIA_TYPES
from deployments.protocol.tensors import INPUT

# An example of more numbers than this is no help to a reader.
EXAMPLE_VALUES = 256
ABOUT = """A guard around image classifiers. It looks at each request for signs that a hidden backdoor is being used.

Every error is JSON: what was expected, what came, the remedy, and the field that is meant. A method that a route does
not know is answered with 405 and `Allow`. Bodies may be compressed (`Content-Encoding: gzip` or `deflate`), and a
`traceparent` comes back on the answer."""
ABOUT_KEYS = """

Requests need an API key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; health and readiness need none. Its role
is inference, scores (answers carry score and p-value) or administration (also the artifact's facts, and /metrics)."""
ERRORS = {
    400: ("BadRequest", "It cannot be read.", "body: not JSON: …", "body"),
    401: ("Unauthorized", "No API key, or an unknown one.", "authorization: unknown API key: …", "authorization"),
    403: ("Forbidden", "The key has not the role.", "authorization: this takes a key of the role …", "authorization"),
    404: ("NotFound", "No such model or version.", "model_name: expected …, got …", "model_name"),
    413: ("TooLarge", "More bytes, images or pixels than this server takes.", "body: more than …", "body"),
    415: ("UnknownMedia", "A medium or encoding that it does not read.", "content-type: expected …", "content-type"),
    422: ("UnfitTensor", "Readable, but not what the model takes.", "images.shape: expected …", "images.shape"),
    500: ("Failed", "The classifier failed; the server's log has the reason.", "the classifier failed …", None),
    502: ("UpstreamFailed", "The original network, which runs elsewhere, gave no answer.", "upstream: …", "upstream"),
    503: ("Unavailable", "Not now: the queue is full, or there is no verdict.", "the queue is full: …", None),
    504: ("UpstreamLate", "The original network, which runs elsewhere, took too long.", "upstream: …", "upstream"),
}
HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}, "required": True}},
}
ANSWERING = (400, 404, 413, 415, 422, 500, 503)
FROM_UPSTREAM = (401, 403, 502, 504)


def document(offers: Sequence[Offer], version: str, *, secured: bool) -> dict[str, Any]:
    """The document as plain data. ``version``: the server's. secured: API keys are required."""
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    schemes |= {"header": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "The guard", "version": version, "description": ABOUT + (ABOUT_KEYS if secured else "")},
        "servers": [{"url": "/"}],
        "paths": _paths(offers, secured),
        "components": {
            "schemas": schemas(offers),
            "responses": {ERRORS[status][0]: _error(status) for status in ERRORS},
            **({"securitySchemes": schemes} if secured else {}),
        },
    }


def _paths(offers: Sequence[Offer], secured: bool) -> dict[str, Any]:
    def get(name: str, summary: str, answers: dict[int, Any], **more: Any) -> dict[str, Any]:
        return {"get": _operation(name, summary, answers, secured=secured, **more)}

    def post(name: str, summary: str, answers: dict[int, Any], **more: Any) -> dict[str, Any]:
        return {"post": _operation(name, summary, answers, secured=secured, **more)}

    ready = {200: _json("Ready", "Ready."), 503: _waiting()}
    page = {200: _content("text/html", "A page; it asks for /metrics/state, with a key where there are keys.")}
    metadata = _json("Model", "The model: inputs, outputs, classes, mode.")
    answering = ANSWERING + (FROM_UPSTREAM if any(offer.upstream for offer in offers) else ())
    infer = {
        "bodies": _infer_bodies(offers),
        "description": "With raw tensors the JSON comes first, and the header says how long it is.",
        "errors": answering,
    }
    inferred = _json("InferAnswer", "Logits, labels and verdicts.")
    inferred["content"]["application/octet-stream"] = {"schema": {}}
    inferred["headers"] = {"Inference-Header-Content-Length": {"schema": {"type": "integer"}}}
    paths = {
        "/v2": get("server", "The server and its extensions", {200: _json("Server", "The server.")}),
        "/v2/health/live": get("live", "Is the process alive?", {200: _json("Live", "It is.")}, role=None),
        "/v2/health/ready": get("ready", "Are all models ready?", ready, role=None),
        "/v2/models": get("models", "The names of the models", {200: _json("Models", "Their names.")}),
        "/v2/repository/index": post(
            "index",
            "The models and whether they are ready",
            {200: _json("Index", "One entry a model.")},
            bodies={"application/json": {"schema": ref("IndexRequest"), "example": {"ready": True}}},
            required=False,
            errors=(400, 413, 415),
        ),
        "/v1/models/{name}:predict": post(
            "predict",
            "Images or tensors, one answer each",
            {200: _json("Predictions", "One prediction an image, in their order.")},
            parameters=[_name(offers)],
            bodies=_predict_bodies(offers),
            errors=answering,
        ),
        "/classify": post(
            "classify",
            "One image file",
            {200: _json("Prediction", "The prediction.")},
            parameters=[_model(offers)],
            bodies=_files(),
            errors=answering,
        ),
        "/openapi.json": get("openapi", "This document", {200: _content("application/json", "OpenAPI 3.1.")}),
        "/v2/docs": get("docs", "This document, to be read", {200: _content("text/html", "A page.")}),
        "/guard": get("page", "What the guard sees, to be watched in a browser", page, role=None),
        "/guard/": get("page_slash", "The same", page, role=None),
        "/metrics": get(
            "metrics",
            "What all replicas counted",
            {200: _content("text/plain", "Prometheus text format.")},
            role="administration",
            errors=(503,),
        ),
    }
    for suffix, base, parameters in (
        ("", "/v2/models/{name}", [_name(offers)]),
        ("_version", "/v2/models/{name}/versions/{version}", [_name(offers), _version(offers)]),
    ):
        about: dict[str, Any] = {"parameters": parameters, "errors": (404,)}
        paths[base] = get(f"metadata{suffix}", "The model", {200: metadata}, **about)
        paths[f"{base}/ready"] = get(f"ready_model{suffix}", "Is the model ready?", ready, role=None, **about)
        paths[f"{base}/config"] = get(f"config{suffix}", "Not here: always 404, for clients that ask", {}, **about)
        paths[f"{base}/infer"] = post(
            f"infer{suffix}",
            "Tensors in, tensors out: Open Inference Protocol v2",
            {200: inferred},
            **infer | {"parameters": [*parameters, _json_length()]},
        )
    return paths


def _operation(
    name: str,
    summary: str,
    answers: dict[int, Any],
    *,
    secured: bool,
    role: Role | None = "inference",
    parameters: Sequence[Any] = (),
    bodies: dict[str, Any] | None = None,
    required: bool = True,
    errors: Iterable[int] = (),
    description: str = "",
) -> dict[str, Any]:
    """One operation, with the errors of keys where keys are required and probes do not go without."""
    keyed = () if not secured or role is None else (401, 403) if role == "administration" else (401,)
    told = answers | {one: {"$ref": f"#/components/responses/{ERRORS[one][0]}"} for one in (*errors, *keyed)}
    operation: dict[str, Any] = {"operationId": name, "summary": summary}
    if description:
        operation["description"] = description
    if parameters:
        operation["parameters"] = list(parameters)
    if bodies is not None:
        operation["requestBody"] = {"required": required, "content": bodies}
    operation["responses"] = {str(status): told[status] for status in sorted(told)}
    if secured:
        roles = [one for one, implied in IMPLIED.items() if role in implied][:1]
        operation["security"] = [{"bearer": roles}, {"header": roles}] if role else []
    return operation


def _error(status: int) -> dict[str, Any]:
    _, description, error, field = ERRORS[status]
    example = {"error": error, "field": field}
    content = {"application/json": {"schema": ref("Error"), "example": example}}
    return {"description": description, "content": content} | (
        {"headers": HEADERS[status]} if status in HEADERS else {}
    )


def _json(schema: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": ref(schema)}}}


def _content(media: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {media: {"schema": {}}}}


def _waiting() -> dict[str, Any]:
    schema = {"anyOf": [ref("Ready"), ref("Error")]}
    return {"description": "Not ready, or closing.", "content": {"application/json": {"schema": schema}}}


def _name(offers: Sequence[Offer]) -> dict[str, Any]:
    return _one_of("name", "path", [one.model.name for one in offers], "The model.")


def _version(offers: Sequence[Offer]) -> dict[str, Any]:
    return _one_of("version", "path", [one.model.version for one in offers], "Its version.")


def _model(offers: Sequence[Offer]) -> dict[str, Any]:
    about = "The model; may be left out, or be empty, where there is one."
    return _one_of("model", "query", [one.model.name for one in offers], about) | {"required": len(offers) > 1}


def _one_of(name: str, place: str, values: list[str], description: str) -> dict[str, Any]:
    schema: Schema = {"type": "string"} | ({"enum": list(dict.fromkeys(values))} if values else {})
    return {"name": name, "in": place, "required": True, "schema": schema, "description": description}


def _json_length() -> dict[str, Any]:
    about = "Where raw tensors follow the JSON: the bytes of the JSON."
    schema = {"type": "integer", "minimum": 1}
    return {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "schema": schema,
        "description": about,
    }


def _files(most: int = 1) -> dict[str, Any]:
    """Bodies of image files: one as it is, or up to ``most`` as a form."""
    part: Schema = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP file."}
    parts = part if most == 1 else {"type": "array", "items": part, "minItems": 1, "maxItems": most}
    form = {"type": "object", "properties": {"image": parts}}
    bodies: dict[str, Any] = {media: {"schema": {}} for media in MEDIA_TYPES}
    return bodies | {"multipart/form-data": {"schema": form | {"required": ["image"]}}}


def _predict_bodies(offers: Sequence[Offer]) -> dict[str, Any]:
    body: dict[str, Any] = {"schema": ref("PredictRequest")}
    if offers:
        body["example"] = {"instances": [{"b64": _png(offers[0])}]}
    return {"application/json": body} | _files(max((offer.limits.images for offer in offers), default=1))


def _infer_bodies(offers: Sequence[Offer]) -> dict[str, Any]:
    """Tensors as JSON, with an example where it is short, or as raw bytes after JSON."""
    body: dict[str, Any] = {"schema": ref("InferRequest")}
    if offers and math.prod(shape := offers[0].model.spec.shape) <= EXAMPLE_VALUES:
        values = [0.5] * math.prod(shape)
        tensor = {"name": INPUT, "shape": [1, *shape], "datatype": "FP32", "data": values}
        body["example"] = {"inputs": [tensor], "outputs": [{"name": "label"}, {"name": "flagged"}]}
    return {"application/json": body, "application/octet-stream": {"schema": {}}}


def _png(offer: Offer) -> str:
    """A grey image of one pixel, as base64: it is resized to what the model takes."""
    out = io.BytesIO()
    Image.new("L" if offer.model.spec.channels == 1 else "RGB", (1, 1)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
