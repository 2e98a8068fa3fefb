"""The server, asked whatever its OpenAPI document makes one think of, right and wrong: all answers are as documented.

Some 900 requests as a rule; ``GUARD_FUZZ_EXAMPLES=400`` draws that many a POST route, 3,000 requests in all.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import schemathesis
import uvicorn
from hand import HandGuard
from hypothesis import strategies
from PIL import Image
from prometheus_client import CollectorRegistry
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.engine import events, from_schema

from deployments.config import ModelConfig
from deployments.engine.catalogue import Catalogue
from deployments.engine.classifier import Classifier
from deployments.engine.metrics import Metrics
from deployments.http.ingress import build_http_app
from deployments.keys import Keys, parse_variable

EXAMPLES = int(os.environ.get("GUARD_FUZZ_EXAMPLES", "40"))
KEY = "fuzz-0123456789abcdef"
LENGTH = "Inference-Header-Content-Length"
ONE = HandGuard.spec.shape


class Server(uvicorn.Server):
    """On a thread and a free port."""

    def __init__(self, app) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self.run)

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_error: object) -> None:
        self.should_exit = True
        self._thread.join(10)


@contextmanager
def running(keys: Keys | None = None, **settings: Any) -> Iterator[str]:
    """The address of a server of the hand-made classifier, with small limits."""
    metrics = Metrics("hand", HandGuard.classes, registry=CollectorRegistry())
    limits = {"images": 3, "body_bytes": 20_000, "decoded_pixels": 10_000}
    config = ModelConfig(artifact="artifacts/hand", limits=limits, **settings)
    with Server(build_http_app(Catalogue([Classifier(HandGuard(), config, metrics)]), "9.9", keys)) as url:
        yield url


def raw() -> tuple[bytes, bytes]:
    """A request with a raw tensor: its JSON, and the tensor."""
    pixels = np.full((2, *ONE), 0.25, "<f4").tobytes()
    tensor = {"name": "images", "shape": [2, *ONE], "datatype": "FP32", "parameters": {"binary_data_size": len(pixels)}}
    return json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode(), pixels


def file(red: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (red, 40, 20)).save(out, kind)
    return out.getvalue()


RAW = raw()
FILES = {kind: [file(red, kind) for red in (30, 255)] for kind in ("PNG", "JPEG", "WEBP")}
EVERY = [one for files in FILES.values() for one in files]
NEXT = cycle(EVERY)
for kind, files in FILES.items():
    schemathesis.openapi.media_type(f"image/{kind.lower()}", strategies.sampled_from(files))
schemathesis.openapi.format("binary", strategies.sampled_from(EVERY))
schemathesis.openapi.media_type("application/octet-stream", strategies.sampled_from([b"".join(RAW)]))


@schemathesis.hook("before_call")
def mend(_context, case, _kwargs) -> None:
    """What JSON Schema cannot say of a right request: sizes agree, a file is a file, the header says the length."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.operation.path.endswith("infer"):
        case.headers.pop(LENGTH, None)
        if case.media_type == "application/json":
            for tensor in case.body["inputs"]:
                mend_tensor(tensor)
            if case.body.get("id"):
                case.body["id"] = "".join(filter(str.isprintable, case.body["id"]))
        elif case.media_type == "application/octet-stream":
            case.headers[LENGTH] = str(len(RAW[0]))
    elif case.operation.path.endswith("predict") and case.media_type == "application/json":
        for instance in case.body["instances"]:
            if isinstance(instance, dict):
                instance["b64"] = base64.b64encode(next(NEXT)).decode()


@schemathesis.hook("filter_failure")
def is_failure(_context, failure, case, _response) -> bool:
    """Whether a failure is one. A body of bytes is right, whatever is said of it: files are drawn from a few good ones;
    and an empty name of a model is as good as none."""
    fine = isinstance(case.body, bytes) or case.query.get("model") == ""
    return not (isinstance(failure, AcceptedNegativeData) and fine)


def mend_tensor(tensor: dict[str, Any]) -> None:
    tensor.get("parameters", {}).pop("binary_data_size", None)
    values, size = tensor.get("data", [0] * math.prod(ONE)), math.prod(ONE)
    nested = isinstance(values[0], list)
    tensor["data"] = whole(values if nested else values[: len(values) // size * size])
    tensor["shape"] = [len(values) if nested else len(values) // size, *ONE]


def whole(values: Any) -> Any:
    """``values`` with 7.0 as 7: in JSON Schema they are one, and UINT8 takes the latter alone."""
    if isinstance(values, list):
        return [whole(one) for one in values]
    return int(values) if values == int(values) else values


def fuzz(url: str, examples: int, key: str = "") -> Counter[tuple[str, bool, int | None]]:
    """Ask; fail on the first kinds of answers that are not as documented.

    Counts by route, whether the request was meant to be right, and status (None: no answer)."""
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,
            "generation": {"deterministic": True, "max-examples": max(1, examples // 10)},
            "phases": {"stateful": {"enabled": False}},
            "operations": [{"include-method": "POST", "generation": {"max-examples": examples}}],
            "checks": {"negative_data_rejection": {"expected-statuses": [400, 401, 404, 405, 413, 415, 422]}},
            "auth": {"openapi": {"header": {"api_key": key}, "bearer": {"bearer": key}}} if key else {},
        }
    )
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config, headers={"X-API-Key": key})
    seen: Counter[tuple[str, bool, int | None]] = Counter()
    wrong = []
    for event in from_schema(document.exclude(path="/metrics")).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            wrong.append(repr(event))
        if not isinstance(event, events.ScenarioFinished):
            continue
        record = event.recorder
        for name, interaction in record.interactions.items():
            meta, response = record.cases[name].value.meta, interaction.response
            right = meta is not None and meta.generation.mode.is_positive
            seen[record.label, right, response.status_code if response else None] += 1
        for name, checks in record.checks.items():
            for info in (one.failure_info for one in checks if one.failure_info):
                response = record.interactions[name].response if name in record.interactions else None
                wrong.append(f"{record.label}: {info.failure}\n{response and response.text}\n{info.code_sample[:3000]}")
    assert not wrong, "\n\n".join(wrong[:5])
    return seen


def test_every_answer_is_as_documented() -> None:
    """No 5xx, no request without an answer, right ones get 200, wrong ones do not; wrong methods a 405 with Allow."""
    with running(mode="reject", expose_scores=True) as url:
        seen = fuzz(url, EXAMPLES)
    statuses = Counter(status for _, _, status in seen.elements())
    print(f"{seen.total()} requests:", ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items(), key=str)))
    assert not [one for one in seen if one[2] is None or one[2] >= 500]
    for route in ("/v2/models/{name}/infer", "/v1/models/{name}:predict", "/classify"):
        assert seen[f"POST {route}", True, 200] > EXAMPLES / 10, route
    assert {400, 404, 405, 415, 422} <= set(statuses)


def test_with_keys_every_answer_is_as_documented() -> None:
    """The same, asked with a key; and what the document says needs one is refused without."""
    with running(Keys(parse_variable(f"inference:{KEY}"))) as url:
        seen = fuzz(url, 10, KEY)
    assert any(status == 401 for _, _, status in seen)
