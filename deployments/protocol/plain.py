"""Plain bodies: image files, and v1 ``:predict``. An answer is one object an image. Pure functions."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from deployments.config import Limits
from deployments.errors import BadRequest, UnfitTensor, UnknownMedia
from deployments.policy import NO_LABEL, Answer
from deployments.protocol import images as files
from deployments.protocol.bodies import Ask, Model, check_count, json_object, numbers, unit_range


def parse_predict(body: bytes, model: Model, limits: Limits) -> Ask:
    """The JSON body of ``:predict``: instances, each [C, H, W] in [0, 1], or each {"b64": image file}."""
    instances = json_object(body).get("instances")
    if not isinstance(instances, list):
        raise BadRequest(
            'instances: expected a list of [C, H, W] numbers in [0, 1] or of {"b64": "…"}', field="instances"
        )
    check_count(len(instances), limits, "instances")
    if any(isinstance(one, dict) for one in instances):
        given = [(f"instances[{i}].b64", _b64(one, f"instances[{i}]")) for i, one in enumerate(instances)]
        return Ask(files.decode_all(given, model.spec, max_pixels=limits.decoded_pixels))
    values = numbers(instances, "instances")
    if values.shape[1:] != model.spec.shape:
        raise UnfitTensor(
            f"instances: each must be {list(model.spec.shape)}, got {list(values.shape[1:])}", field="instances"
        )
    return Ask(unit_range(values, "instances"))


def parse_images(body: bytes, model: Model, limits: Limits, *, content_type: str) -> Ask:
    """An image file as the body, or several as multipart/form-data."""
    media = content_type.partition(";")[0].strip().lower()
    if media in files.MEDIA_TYPES:
        payloads, names = [body], ["image"]
    elif media == "multipart/form-data":
        payloads = files.parts(body, content_type)
        names = [f"image[{i}]" for i in range(len(payloads))]
    else:
        raise UnknownMedia(
            f"content-type: expected {', '.join(files.MEDIA_TYPES)} or multipart/form-data, got {media or 'none'}",
            field="content-type",
        )
    check_count(len(payloads), limits, "image")
    given = list(zip(names, payloads, strict=True))
    return Ask(files.decode_all(given, model.spec, max_pixels=limits.decoded_pixels))


def parse_image(body: bytes, model: Model, limits: Limits, *, content_type: str) -> Ask:
    """The body of ``POST /classify``: just one image file."""
    ask = parse_images(body, model, limits, content_type=content_type)
    if len(ask.images) != 1:
        raise BadRequest(
            f"image: /classify takes one image, got {len(ask.images)}: send them to :predict", field="image"
        )
    return ask


def render_predict(answer: Answer, _ask: Ask, model: Model) -> dict[str, Any]:
    """The v1 answer: one object an image."""
    return {"predictions": [_row(answer, i, model) for i in range(len(answer.label))]}


def render_classify(answer: Answer, _ask: Ask, model: Model) -> dict[str, Any]:
    """The answer to one image; label and class are null where it gets no label."""
    return _row(answer, 0, model)


def _row(answer: Answer, i: int, model: Model) -> dict[str, Any]:
    row: dict[str, Any] = _named("label", "class", answer.label[i], model)
    if answer.flagged is not None and answer.corrected_label is not None:
        row |= {"flagged": bool(answer.flagged[i])}
        row |= _named("corrected_label", "corrected_class", answer.corrected_label[i], model)
    for name, values in (("score", answer.score), ("p_value", answer.p_value)):
        if values is not None:
            row[name] = float(values[i])
    if answer.unguarded:
        row |= {"flagged": None, "unguarded": True}
    return row | {"model": model.name, "mode": answer.mode}


def _named(label_key: str, class_key: str, label: int, model: Model) -> dict[str, Any]:
    known = label != NO_LABEL
    return {label_key: int(label) if known else None, class_key: model.classes[label] if known else None}


def _b64(instance: Any, field: str) -> bytes:
    if not isinstance(instance, dict) or not isinstance(instance.get("b64"), str):
        raise BadRequest(f'{field}: expected {{"b64": "…"}} like the other instances', field=field)
    try:
        return base64.b64decode(instance["b64"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"{field}.b64: not base64", field=f"{field}.b64") from error
