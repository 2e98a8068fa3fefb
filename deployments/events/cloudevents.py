"""Flagged requests as CloudEvents 1.0 in JSON: a verdict of our own type, and payloads as KServe's logger names them.

The events of one request share their ``id``; each has a ``source`` of its own, so that source and id together name one
event, as CloudEvents wants, and a consumer can drop what it got twice.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

from deployments import policy
from deployments.events.flagged import Flagged, png
from deployments.events.settings import EventSettings
from deployments.protocol import v2
from deployments.protocol.bodies import Ask

MEDIA = "application/cloudevents+json"
VERDICT = "org.backdoor-guard.verdict"
REQUEST = "org.kubeflow.serving.inference.request"
RESPONSE = "org.kubeflow.serving.inference.response"
PAYLOADS = (REQUEST, RESPONSE)


def events_of(flagged: Flagged, settings: EventSettings) -> list[dict[str, Any]]:
    """The events of one request, JSON-able; the verdict first."""
    one = str(uuid.uuid4())  # not the client's, which may come twice
    events = [_event(VERDICT, one, flagged, settings, _verdict(flagged))]
    if settings.payloads:
        events.append(_event(REQUEST, one, flagged, settings, _request(flagged)))
        events.append(_event(RESPONSE, one, flagged, settings, _response(flagged)))
    return events


def count_of(settings: EventSettings) -> int:
    """How many events a request has."""
    return 1 + len(PAYLOADS) * settings.payloads


def _event(kind: str, one: str, flagged: Flagged, settings: EventSettings, data: Any) -> dict[str, Any]:
    model = flagged.model
    attributes = {
        "specversion": "1.0",
        "id": one,
        "source": f"/v2/models/{model.name}#{kind.rpartition('.')[2]}",
        "type": kind,
        "time": flagged.moment,
        "datacontenttype": "application/json",
        "component": settings.component,
        "endpoint": settings.endpoint,
        "inferenceservicename": settings.service or model.name,
        "namespace": settings.namespace,
        "traceparent": flagged.trace,
        "model": model.name,
        "version": model.version,
        "mode": flagged.live.mode,
        "fingerprint": flagged.fingerprint,
        "data": data,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _verdict(flagged: Flagged) -> dict[str, Any]:
    """What is known of every image of the request: for administrators alone."""
    rows = range(len(flagged.scored.label))
    return {"request": flagged.request_id, "images": [flagged.verdict(row) for row in rows]}


def _request(flagged: Flagged) -> dict[str, Any]:
    """The images as the networks got them, in 8 bits a channel."""
    return {
        "inputs": [
            {
                "name": "images",
                "shape": list(flagged.images.shape),
                "datatype": "BYTES",
                "parameters": {"content_type": "image/png;base64"},
                "data": [base64.b64encode(png(image)).decode() for image in flagged.images],
            }
        ]
    }


def _response(flagged: Flagged) -> Any:
    """What was answered, in the form of ``infer``, whichever route was asked."""
    answer = policy.decide(flagged.scored, flagged.live)
    ask = Ask(flagged.images, None, flagged.request_id)
    return json.loads(v2.render_infer(answer, ask, flagged.model).content)
