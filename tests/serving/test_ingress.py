"""The HTTP surface, driven in process: every route, every kind of bad request, one answer however one asks."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
from collections.abc import Callable, Iterator
from functools import partialmethod

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.engine.catalogue import Catalogue
from deployments.engine.classifier import Classifier
from deployments.http.ingress import build_http_app

INFER, PREDICT, CLASSIFY = "/v2/models/hand/infer", "/v1/models/hand:predict", "/classify"


class Client:
    """A started application, asked in process. ``classifier`` is the one behind it."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        app = build_http_app(Catalogue([classifier]), "9.9")
        self._lifespan = app.router.lifespan_context(app)
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard")
        self._runner = asyncio.Runner()
        self._runner.run(self._lifespan.__aenter__())

    def request(self, method: str, path: str, **options) -> httpx.Response:
        return self._runner.run(self._http.request(method, path, **options))

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")

    def close(self) -> None:
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.run(self._http.aclose())
        self._runner.close()


@pytest.fixture
def client(make_classifier) -> Iterator[Callable[..., Client]]:
    """Clients of a server with the given settings and small limits."""
    opened = []

    def make(**settings) -> Client:
        limits = {"body_bytes": 20_000, "images": 3, "decoded_pixels": 10_000}
        opened.append(Client(make_classifier(limits=limits, **settings)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def tensor(images: np.ndarray, **changes) -> dict:
    """A v2 body of FP32 images; ``changes`` replace keys of the tensor, None removes them."""
    one = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()} | changes
    return {"inputs": [{key: value for key, value in one.items() if value is not None}]}


def png(images: np.ndarray, kind: str = "PNG") -> bytes:
    """The first of ``images`` as a file."""
    out = io.BytesIO()
    Image.fromarray((images[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(out, kind)
    return out.getvalue()


def outputs(answer) -> dict[str, list]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one["data"] for one in answer.json()["outputs"]}


ONE = np.full((1, 3, 4, 4), 0.25, np.float32)
FOUR = np.repeat(ONE, 4, axis=0)
B64 = base64.b64encode(png(ONE)).decode()
NAN = json.dumps(tensor(ONE, data=[float("nan")] * 48))

BAD_TENSORS = [
    ("not json", b"{", 400, "body"),
    ("not an object", b"[1]", 400, "body"),
    ("not text", b"\xff\xfe\x00", 400, "body"),
    ("nested too deeply", b"[" * 19_000, 400, "body"),
    ("no inputs", {}, 400, "inputs"),
    ("two inputs", {"inputs": tensor(ONE)["inputs"] * 2}, 400, "inputs"),
    ("wrong name", tensor(ONE, name="pixels"), 400, "inputs[0].name"),
    ("wrong datatype", tensor(ONE, datatype="FP64"), 400, "images.datatype"),
    ("no shape", tensor(ONE, shape=None), 400, "images.shape"),
    ("text in shape", tensor(ONE, shape=[1, "3", 4, 4]), 400, "images.shape"),
    ("three dimensions", tensor(ONE, shape=[3, 4, 4]), 422, "images.shape"),
    ("wrong size", tensor(ONE, shape=[1, 3, 2, 8]), 422, "images.shape"),
    ("no images", tensor(ONE, shape=[0, 3, 4, 4], data=[]), 422, "images.shape"),
    ("too many images", tensor(FOUR), 413, "images.shape"),
    ("no data", tensor(ONE, data=None), 400, "images.data"),
    ("short data", tensor(ONE, data=[0.5] * 47), 400, "images.data"),
    ("transposed data", tensor(ONE, data=[[[[0.5] * 3] * 4] * 4]), 400, "images.data"),
    ("ragged data", tensor(ONE, data=[[0.5], [0.5, 0.5]]), 400, "images.data"),
    ("text data", tensor(ONE, data=["x"] * 48), 400, "images.data"),
    ("null data", tensor(ONE, data=[None] * 48), 400, "images.data"),
    ("a truth value among numbers", tensor(ONE, data=[True] + [0.5] * 47), 400, "images.data"),
    ("a nested truth value", tensor(ONE, data=[[[[0.5] * 3 + [False]] * 4] * 3]), 400, "images.data"),
    ("not a number", NAN.encode(), 422, "images.data"),
    ("infinite", NAN.replace("NaN", "1e999").encode(), 422, "images.data"),
    ("out of range", tensor(ONE, data=[255] * 48), 422, "images.data"),
    ("negative", tensor(ONE, data=[-0.1] * 48), 422, "images.data"),
    ("bytes out of range", tensor(ONE, datatype="UINT8", data=[256] * 48), 422, "images.data"),
    ("fractional bytes", tensor(ONE, datatype="UINT8", data=[0.5] * 48), 422, "images.data"),
    ("unknown output", tensor(ONE) | {"outputs": [{"name": "secret"}]}, 400, "outputs[0].name"),
    ("outputs not a list", tensor(ONE) | {"outputs": "label"}, 400, "outputs"),
    ("id not text", tensor(ONE) | {"id": 7}, 400, "id"),
    ("too long", b" " * 20_001, 413, "body"),
]


@pytest.mark.parametrize(
    ("body", "status", "field"), [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS]
)
def test_a_bad_tensor_is_refused_with_its_field(client, count, body, status: int, field: str) -> None:
    """The status, the field and a sentence that names it; the request is counted as an error."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client(mode="flag").post(INFER, content=content)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    assert answer.json()["error"].startswith(field)
    assert set(answer.json()) == {"error", "field"}
    assert count("guard_requests_total", mode="flag", verdict="error") == 1


@pytest.mark.parametrize(
    ("path", "content_type", "body", "status", "field"),
    [
        (INFER, "image/png", png(ONE), 415, "content-type"),
        (INFER, "application/octet-stream", b"\x00" * 48, 415, "content-type"),
        (CLASSIFY, "", png(ONE), 415, "content-type"),
        (CLASSIFY, "image/gif", png(ONE), 415, "content-type"),
        (CLASSIFY, "image/png", b"no image", 415, "image"),
        (CLASSIFY, "image/png", png(ONE)[:50], 400, "image"),
        (CLASSIFY, "image/png", png(np.zeros((1, 3, 101, 100))), 413, "image"),
        (PREDICT, "application/json", b"{}", 400, "instances"),
        (PREDICT, "application/json", b'{"instances": []}', 422, "instances"),
        (PREDICT, "application/json", b'{"instances": [[1, 2]]}', 422, "instances"),
        (PREDICT, "application/json", b'{"instances": [[1], [1, 2]]}', 400, "instances"),
        (PREDICT, "application/json", json.dumps({"instances": [{"b64": B64}] * 4}).encode(), 413, "instances"),
        (
            PREDICT,
            "application/json",
            json.dumps({"instances": [{"b64": B64}, {"b64": "!"}]}).encode(),
            400,
            "instances[1].b64",
        ),
        (PREDICT, "application/json", json.dumps({"instances": [{"b64": B64}, [0]]}).encode(), 400, "instances[1]"),
        (PREDICT, "application/json", json.dumps({"instances": (ONE * 1020).tolist()}).encode(), 422, "instances"),
    ],
)
def test_a_bad_plain_request_is_refused_with_its_field(client, path, content_type, body, status, field) -> None:
    """Image files and v1 instances are refused as strictly as tensors are."""
    headers = {"content-type": content_type} if content_type else {}
    answer = client().post(path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/hand/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v1/models/other:predict", 404),
        ("GET", "/nowhere", 404),
        ("GET", INFER, 405),
    ],
)
def test_a_wrong_address_is_an_error_in_json(client, method: str, path: str, status: int) -> None:
    """An unknown model, version or route, or a wrong method, is answered in JSON like every other error."""
    answer = client().request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "field"}


def test_health_and_metadata(client) -> None:
    """A started server is live and ready, and tells its inputs and outputs."""
    c = client(mode="reject")
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/hand/ready", "/v2/models/hand/versions/1/ready"):
        assert c.get(path).status_code == 200, path
    assert c.get("/v2").json() == {
        "name": "guard",
        "version": "9.9",
        "extensions": ["binary_tensor_data", "guard", "model_repository"],
    }
    about = c.get("/v2/models/hand").json()
    assert about == c.get("/v2/models/hand/versions/1").json()
    assert about["versions"] == ["1"]
    assert about["parameters"]["guard_mode"] == "reject"
    assert about["inputs"][0]["name"] == "images"
    assert about["inputs"][0]["shape"] == [-1, 3, 4, 4]
    assert {one["name"]: one["shape"] for one in about["outputs"]}["logits"] == [-1, 3]


def test_every_form_of_an_image_gives_one_answer(client, triggered) -> None:
    """Tensors of both types, flat and nested, file, base64, multipart: the same image gets the same verdict."""
    c = client(mode="correct")
    as_bytes = (triggered * 255).round().astype(int)
    for path in (INFER, "/v2/models/hand/versions/1/infer"):
        for body in (
            tensor(triggered),
            tensor(triggered, data=triggered.tolist()),
            tensor(triggered, datatype="UINT8", data=as_bytes.ravel().tolist()),
        ):
            got = outputs(c.post(path, json=body))
            assert (got["label"], got["flagged"], got["corrected_label"]) == ([1], [True], [1])
    expected = {
        "label": 1,
        "class": "bee",
        "flagged": True,
        "corrected_label": 1,
        "corrected_class": "bee",
        "model": "hand",
        "mode": "correct",
    }
    b64 = base64.b64encode(png(triggered)).decode()
    file = ("a.png", png(triggered), "image/png")
    assert c.post(CLASSIFY, content=png(triggered), headers={"content-type": "image/png"}).json() == expected
    assert c.post(CLASSIFY, files={"image": file}).json() == expected
    assert c.post(PREDICT, content=png(triggered), headers={"content-type": "image/png"}).json() == {
        "predictions": [expected]
    }
    assert c.post(PREDICT, files=[("image", file), ("image", file)]).json() == {"predictions": [expected, expected]}
    assert c.post(PREDICT, json={"instances": [{"b64": b64}]}).json() == {"predictions": [expected]}
    assert c.post(PREDICT, json={"instances": triggered.tolist()}).json() == {"predictions": [expected]}


def test_stages_are_timed(client, count, clean) -> None:
    """An answered request is timed in total and in decode; one whose body cannot be read in both as well."""
    c = client()
    c.post(INFER, json=tensor(clean))
    c.post(INFER, content=b"{")
    assert count("guard_stage_seconds_count", stage="total") == 2
    assert count("guard_stage_seconds_count", stage="decode") == 2


def test_classify_takes_one_image(client, clean) -> None:
    """Several files in one multipart body are refused at /classify, with the way to send them."""
    file = ("a.png", png(clean), "image/png")
    answer = client().post(CLASSIFY, files=[("image", file), ("image", file)])
    assert answer.status_code == 400
    assert ":predict" in answer.json()["error"]


def test_the_asked_outputs_come_in_their_order(client, clean) -> None:
    """``outputs`` selects and orders; ``id`` comes back; a withheld output is left out."""
    body = tensor(clean) | {"id": "a1", "outputs": [{"name": "label"}, {"name": "score"}, {"name": "logits"}]}
    answer = client(mode="flag").post(INFER, json=body).json()
    assert answer["id"] == "a1"
    assert [one["name"] for one in answer["outputs"]] == ["label", "logits"]
    assert [one["datatype"] for one in answer["outputs"]] == ["INT64", "FP32"]
    assert [one["shape"] for one in answer["outputs"]] == [[1], [1, 3]]


@pytest.mark.parametrize(
    ("mode", "named", "parameters"),
    [
        ("observe", ["logits", "label"], {"guard_mode": "observe"}),
        ("flag", ["logits", "label", "flagged", "corrected_label"], {"guard_mode": "flag", "guard_flagged": 1}),
        ("reject", ["logits", "label", "flagged", "corrected_label"], {"guard_mode": "reject", "guard_flagged": 1}),
        ("correct", ["logits", "label", "flagged", "corrected_label"], {"guard_mode": "correct", "guard_flagged": 1}),
    ],
)
def test_the_answer_says_what_the_mode_allows(client, clean, triggered, mode, named, parameters) -> None:
    """Each mode has its outputs and its request-level facts."""
    answer = client(mode=mode).post(INFER, json=tensor(np.concatenate([clean, triggered]))).json()
    assert [one["name"] for one in answer["outputs"]] == named
    assert answer["parameters"] == parameters
    assert (answer["model_name"], answer["model_version"]) == ("hand", "1")


def test_a_rejected_image_has_no_label_and_its_neighbour_has(client, clean, triggered) -> None:
    """In reject, within one request, the flagged image gets null and the clean one its class, with status 200."""
    b64 = [{"b64": base64.b64encode(png(one)).decode()} for one in (triggered, clean)]
    flagged, passed = client(mode="reject").post(PREDICT, json={"instances": b64}).json()["predictions"]
    assert (flagged["label"], flagged["class"], flagged["flagged"]) == (None, None, True)
    assert (passed["label"], passed["class"], passed["flagged"]) == (0, "ant", False)


def test_an_unguarded_answer_says_so(client, paint) -> None:
    """When the corrected network fails and the server answers anyway, no verdict is claimed."""
    guard_fails = paint(0.7, 0, 0)
    c = client(mode="flag", on_failure="open")
    c.classifier.guard.fail["corrected"] = 0.7
    answer = c.post(INFER, json=tensor(guard_fails)).json()
    assert [one["name"] for one in answer["outputs"]] == ["logits", "label"]
    assert answer["parameters"] == {"guard_mode": "flag", "guard_unguarded": True}
    row = c.post(PREDICT, json={"instances": guard_fails.tolist()}).json()["predictions"][0]
    assert (row["label"], row["flagged"], row["unguarded"]) == (0, None, True)


def test_refusing_and_failing_say_nothing_of_the_inside(client, paint) -> None:
    """A closed failure is a 503 with Retry-After, a failing network a 500; neither tells what was raised."""
    c = client(mode="flag", on_failure="closed")
    c.classifier.guard.fail |= {"corrected": 0.7, "original": 0.9}
    refused = c.post(INFER, json=tensor(paint(0.7, 0, 0)))
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    failed = c.post(INFER, json=tensor(paint(0.9, 0, 0)))
    assert failed.status_code == 500
    assert "told to fail" not in refused.text + failed.text


def test_a_defect_of_ours_is_a_plain_500(client, monkeypatch, clean) -> None:
    """An error that nobody foresaw becomes JSON without its text."""
    c = client()

    async def broken(*_args):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(c.classifier, "infer", broken)
    answer = c.post(INFER, json=tensor(clean))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert set(answer.json()) == {"error", "field"}


def test_the_pixels_of_all_files_of_a_request_count_together(client) -> None:
    """Two files of 60 % of the budget each are refused together, and each alone is not."""
    one = png(np.ones((1, 3, 75, 80), np.float32))
    instances = [{"b64": base64.b64encode(one).decode()}]
    server = client()
    alone = server.post(PREDICT, json={"instances": instances})
    together = server.post(PREDICT, json={"instances": instances * 2})
    assert alone.status_code == 200, alone.text
    assert together.status_code == 413
    assert together.json()["field"] == "instances[1].b64"


@pytest.mark.parametrize("name", [[], {}, None, 5])
def test_a_requested_output_must_have_a_name(client, clean, name) -> None:
    """What cannot be a name is a bad request, not a failure."""
    answer = client().post(INFER, json=tensor(clean) | {"outputs": [{"name": name}]})
    assert answer.status_code == 400
    assert answer.json()["field"] == "outputs[0].name"


def test_an_id_that_no_answer_could_carry_is_refused(client, clean) -> None:
    """A lone surrogate is valid JSON and no text."""
    body = json.dumps(tensor(clean) | {"id": "x"}).replace('"x"', '"\\ud800"')
    answer = client().post(INFER, content=body.encode())
    assert answer.status_code == 400
    assert answer.json()["field"] == "id"


@pytest.mark.parametrize("path", [INFER, PREDICT, CLASSIFY])
def test_a_compressed_body_is_read_on_every_route(client, triggered, path) -> None:
    """gzip changes no answer; what it cannot be is refused; an encoding that is no encoding is none."""
    c = client()
    content, media = json.dumps(tensor(triggered)).encode(), "application/json"
    if path != INFER:
        content, media = png(triggered), "image/png"
    headers = {"content-type": media}
    plain = c.post(path, content=content, headers=headers | {"content-encoding": "identity"})
    packed = c.post(path, content=gzip.compress(content), headers=headers | {"content-encoding": "gzip"})
    assert (plain.status_code, packed.status_code) == (200, 200), packed.text
    assert packed.json() == plain.json()
    for encoding, status, field in (("br", 415, "content-encoding"), ("deflate", 400, "body")):
        refused = c.post(path, content=gzip.compress(content), headers=headers | {"content-encoding": encoding})
        assert (refused.status_code, refused.json()["field"]) == (status, field)
    bomb = c.post(path, content=gzip.compress(bytes(20_001)), headers=headers | {"content-encoding": "gzip"})
    assert (bomb.status_code, bomb.json()["field"]) == (413, "body")


def test_the_index_lists_what_is_asked_for(client) -> None:
    """Every model with its state, or those alone that are ready; a body that is none is refused."""
    c = client()
    index = "/v2/repository/index"
    row = {"name": "hand", "version": "1", "state": "READY", "reason": ""}
    for body in (b"", b"{}", b'{"ready": true}'):
        assert c.post(index, content=body).json() == [row]
    for body, status, field in ((b"[", 400, "body"), (b'{"ready": 1}', 400, "ready"), (b" " * 5000, 413, "body")):
        refused = c.post(index, content=body)
        assert (refused.status_code, refused.json()["field"]) == (status, field)
    assert c.get("/v2/models").json() == {"models": ["hand"]}
    for path in ("/v2/models/hand/config", "/v2/models/hand/versions/1/config"):
        missing = c.get(path)
        assert missing.status_code == 404
        assert "/v2/models/hand" in missing.json()["error"]
