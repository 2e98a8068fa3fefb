"""The guard in front of a server that stays where it is: real servers, and ones that misbehave in every defined way."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from hand import HandGuard, ask, image, serve
from prometheus_client import CollectorRegistry
from starlette.responses import JSONResponse, RedirectResponse, Response
from upstreams import HangsUp, Puppet, answer, later, raw_answer, serving, tomorrow, trickle

from deployments.config import ModelConfig
from deployments.document import read
from deployments.engine.catalogue import Catalogue
from deployments.engine.classifier import Classifier
from deployments.engine.comparison import UpstreamMismatch, compare, difference
from deployments.engine.metrics import Metrics
from deployments.engine.wrapped import Wrapped
from deployments.errors import UpstreamFailed
from deployments.http.ingress import build_http_app
from deployments.originals.http import UpstreamHttp
from deployments.originals.original import as_logits
from deployments.proxies import free_port
from deployments.settings import checked
from deployments.upstream import UpstreamSettings
from guard.errors import BadSetting
from guard.types import InputSpec

pytestmark = pytest.mark.alone  # timeouts of half a second
INFER = "/v2/models/hand/infer"


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    made = Puppet()
    with serving(made.app) as url:
        made.url = url
        yield made


@pytest.fixture
def wrap(registry: CollectorRegistry) -> Callable[..., Wrapped]:
    """A classifier named "hand" in front of the server at ``url``; keywords are settings of `UpstreamSettings`, or of
    `ModelConfig`."""

    return partial(wrapped, registry)


def post(classifier: Wrapped, images: np.ndarray, **headers: str) -> httpx.Response:
    """The answer of the whole HTTP application to FP32 ``images``."""
    app = build_http_app(Catalogue([classifier]), "9.9")
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://guard") as http,
        ):
            return await http.post(INFER, json={"inputs": [tensor]}, headers=headers)

    return asyncio.run(main())


@pytest.mark.parametrize("form", [{}, {"binary": False}, {"datatype": "UINT8"}, {"datatype": "UINT8", "binary": False}])
def test_a_guard_in_front_of_our_own_server(wrap, clean, triggered, form) -> None:
    """In front of a real server of the protocol, in every form of its tensors, the answers are those of a guard that
    runs both networks."""
    settings = ModelConfig(artifact="artifacts/far", name="far", mode="observe")
    far = Classifier(HandGuard(), settings, Metrics("far", HandGuard.classes, registry=CollectorRegistry()))
    images = np.concatenate([clean, triggered])
    with serving(build_http_app(Catalogue([far]), "9.9")) as url:
        got = post(wrap(url, model="far", mode="correct", **form), images)
    tensors = {one["name"]: one["data"] for one in got.json()["outputs"]}
    assert tensors["flagged"] == [False, True]
    assert tensors["label"] == [0, 1]
    assert tensors["logits"][:3] == pytest.approx([3, 1, 0], abs=0.03)


FAILURES = {
    "late": (lambda _: later(2), 504, "upstream", None),
    "a trickle": (lambda _: trickle(), 504, "upstream", None),
    "408": (lambda _: Response(status_code=408), 504, "upstream", None),
    "504": (lambda _: Response(status_code=504), 504, "upstream", None),
    "500": (lambda _: Response("a secret of the inside", 500), 502, "upstream", None),
    "302": (lambda _: RedirectResponse("http://elsewhere"), 502, "upstream", None),
    "400": (lambda _: JSONResponse({"error": "batch too large"}, 400), 502, "upstream", None),
    "401": (lambda _: Response(status_code=401), 401, "authorization", None),
    "403": (lambda _: Response(status_code=403), 403, "authorization", None),
    "404": (lambda _: Response(status_code=404), 404, "upstream.model", None),
    "429": (lambda _: Response(status_code=429, headers={"retry-after": "9"}), 503, None, "9"),
    "503": (lambda _: Response(status_code=503, headers={"retry-after": "7"}), 503, None, "7"),
    "503 and a date": (lambda _: Response(status_code=503, headers=tomorrow()), 503, None, "3600"),
    "503 and nonsense": (lambda _: Response(status_code=503, headers={"retry-after": "soon"}), 503, None, "1"),
    "not json": (lambda _: Response(b"<html>"), 502, "upstream", None),
    "no outputs": (lambda _: JSONResponse({"outputs": []}), 502, "upstream.output", None),
    "another output": (lambda x: answer(np.zeros((len(x), 3)), "features"), 502, "upstream.output", None),
    "other classes": (lambda x: answer(np.zeros((len(x), 4))), 502, "upstream.output", None),
    "fewer rows": (lambda _: answer(np.zeros((0, 3))), 502, "upstream.output", None),
    "not a number": (
        lambda _: Response(b'{"outputs": [{"name": "logits", "shape": [1, 3], "data": [NaN, 1, 2]}]}'),
        502,
        "upstream",
        None,
    ),
    "text": (
        lambda _: JSONResponse({"outputs": [{"name": "logits", "shape": [1, 3], "data": ["a", "b", "c"]}]}),
        502,
        "upstream",
        None,
    ),
    "cut off": (
        lambda _: Response(raw_answer(np.zeros((1, 3))).body[:-1], headers={"inference-header-content-length": "220"}),
        502,
        "upstream",
        None,
    ),
}


@pytest.mark.parametrize(
    ("behave", "status", "field", "retry_after"), list(FAILURES.values()), ids=[*map(str, FAILURES)]
)
def test_each_failure_has_its_answer(wrap, puppet, count, clean, behave, status, field, retry_after) -> None:
    """The status, the field, a sentence without the upstream's own words, Retry-After where there is one; each counted
    once as a failure of the stage upstream, and timed."""
    puppet.behave = behave
    got = post(wrap(puppet.url, verify=False, mode="flag"), clean)
    assert (got.status_code, got.headers.get("retry-after")) == (status, retry_after), got.text
    assert set(got.json()) == {"error", "field"}
    assert got.json()["field"] == field
    assert "secret" not in got.text
    assert count("guard_failures_total", stage="upstream", outcome="closed") == 1
    assert count("guard_stage_seconds_count", stage="upstream") == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 1


def test_nobody_there_is_a_bad_gateway(wrap, clean) -> None:
    """A port on which nobody listens is a 502 that names the upstream."""
    got = post(wrap(f"http://127.0.0.1:{free_port()}", verify=False), clean)
    assert (got.status_code, got.json()["field"]) == (502, "upstream")


def test_a_server_that_hangs_up_is_a_bad_gateway(wrap, clean) -> None:
    """A connection that is closed instead of answered is a 502, and on a fresh connection is not tried again."""
    server = HangsUp(at=1)
    try:
        classifier = wrap(server.url, verify=False)
        with pytest.raises(UpstreamFailed, match="hung up"):
            run(classifier, clean)
        assert server.connections <= 2  # one for the first look, one for the request
    finally:
        server.close()


def test_a_kept_connection_that_was_closed_is_tried_again(clean) -> None:
    """An upstream that closes an idle connection just as it is used again is asked once more, over a new one."""
    server = HangsUp(at=2)
    settings = UpstreamSettings(url=server.url, model="m")

    async def main() -> list[np.ndarray]:
        upstream = UpstreamHttp(settings, channels=3, classes=3)
        try:
            return [await upstream.logits(clean, {}) for _ in range(3)]
        finally:
            await upstream.close()

    try:
        assert [logits.tolist() for logits in asyncio.run(main())] == [[[3, 1, 0]]] * 3
        assert server.connections == 3
    finally:
        server.close()


def test_one_slow_answer_holds_no_other(wrap, puppet, clean, triggered) -> None:
    """While one request waits for its time-out, twenty others are answered."""
    puppet.behave = lambda images: later(3) if images[0, 0, 0, 0] < 0.5 else answer(images.mean((2, 3)) * 10)

    async def scenario(c):
        slow = asyncio.create_task(ask(c, clean))
        answers = await asyncio.gather(*(ask(c, triggered) for _ in range(20)))
        assert not slow.done()
        with pytest.raises(UpstreamFailed):
            await slow
        return answers

    answers = serve(wrap(puppet.url, verify=False, mode="flag", timeout_s=1.5), scenario)
    assert [one.flagged.tolist() for one in answers] == [[True]] * 20


def test_the_request_is_as_the_settings_say(wrap, puppet, clean) -> None:
    """Names, version, normalisation by hand, raw and as JSON; no output but the one that is read."""
    settings = {"version": "7", "input": "x", "output": "y", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 2.0]}
    puppet.behave = lambda images: answer(np.zeros((1, 3)), "y")
    for binary in (True, False):
        run(wrap_anew(puppet.url, binary=binary, **settings), clean)
        headers, asked, images = puppet.seen[-1]
        assert ("inference-header-content-length" in headers) is binary
        assert [one["name"] for one in asked["inputs"] + asked["outputs"]] == ["x", "y"]
        assert images[0, :, 0, 0].tolist() == pytest.approx([0.4, -0.4, -0.15], abs=1e-6)


def test_images_travel_as_bytes_exactly(puppet) -> None:
    """Each of the 256 levels of a UINT8 client arrives as it was."""
    levels = np.arange(256, dtype=np.float32).repeat(3).reshape(16, 3, 4, 4) / np.float32(255)
    run(wrap_anew(puppet.url, datatype="UINT8"), levels)
    np.testing.assert_array_equal(puppet.seen[-1][2].ravel(), np.arange(256).repeat(3))


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_raw_answers_are_read(puppet, clean, datatype) -> None:
    """Raw tensors of each type of numbers, behind another tensor."""
    puppet.behave = lambda images: raw_answer(images.mean((2, 3)) * 10, datatype)
    assert run(wrap_anew(puppet.url), clean).logits[0].tolist() == pytest.approx([3, 1, 0], abs=2e-3)


def test_only_the_listed_headers_are_passed_on(wrap, puppet, clean, monkeypatch) -> None:
    """The client's credentials stay here unless they are listed; the settings' own headers come with every request, the
    secret from the environment, and win."""
    monkeypatch.setenv("GUARD_TEST_TOKEN", "s3cret")
    client = {"authorization": "Bearer client", "x-request-id": "r1", "traceparent": "00-1", "cookie": "c"}
    settings = {"headers": {"X-Token": "t ${GUARD_TEST_TOKEN}"}, "verify": False}
    classifier = wrap(puppet.url, **settings)
    assert "s3cret" not in repr(classifier.config)
    post(classifier, clean, **client)
    sent = puppet.seen[-1][0]
    assert {name: sent.get(name) for name in (*client, "x-token")} == {
        "authorization": None,
        "x-request-id": "r1",
        "traceparent": "00-1",
        "cookie": None,
        "x-token": "t s3cret",
    }
    own = wrap_anew(puppet.url, headers={"authorization": "Bearer own"}, forward=["Authorization", "Cookie"])
    post(own, clean, **client)
    sent = puppet.seen[-1][0]
    assert (sent["authorization"], sent["cookie"]) == ("Bearer own", "c")
    assert "x-request-id" not in sent


def test_a_variable_that_is_not_set_is_refused() -> None:
    """A header whose secret is missing stops the start, with its name."""
    with pytest.raises(BadSetting, match="NOT_SET_ANYWHERE"):
        wrap_anew("http://u", headers={"authorization": "Bearer ${NOT_SET_ANYWHERE}"})


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"url": "u:8000"}, "upstream.url"),
        ({"url": "http://a:b@u"}, "upstream.url"),
        ({"url": "http://u:abc"}, "upstream.url"),
        ({"url": "http://u:99999"}, "upstream.url"),
        ({"url": "http://u u/"}, "upstream.url"),
        ({"url": "http://u\x7f/"}, "upstream.url"),
        ({"url": "http://ü..de/"}, "upstream.url"),
        ({"upstream": {}}, "upstream.upstream"),
        ({"url": "http://u/v2/models/m"}, "upstream.url"),
        ({"mean": [0.5]}, "upstream.mean"),
        ({"mean": [0.5], "std": [0]}, "upstream.std"),
        ({"mean": [0.5], "std": [1], "datatype": "UINT8"}, "upstream.datatype"),
        ({"outputs": "softmax"}, "upstream.outputs"),
        ({"forward": ["Host"]}, "upstream.forward"),
        ({"headers": {"Content-Length": "1"}}, "upstream.headers"),
        ({"timeout": 3}, "upstream.timeout"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name(settings, field) -> None:
    """What cannot be meant is refused before anything starts."""
    values = {"artifact": "a", "upstream": {"url": "http://u", "model": "m"} | settings}
    with pytest.raises(BadSetting) as caught:
        checked(ModelConfig, values)
    assert caught.value.field == field


def test_settings_survive_the_way_into_a_replica() -> None:
    """As plain values and back they are the same."""
    values = {"url": "https://u/seldon/", "model": "m", "mean": [0.5], "std": [0.25], "headers": {"a": "${B}"}}
    config = checked(ModelConfig, {"artifact": "a", "upstream": values})
    assert checked(ModelConfig, config.model_dump(mode="json")) == config
    assert config.upstream is not None
    assert config.upstream.url == "https://u/seldon"


def test_probabilities_keep_every_margin(puppet, clean, triggered) -> None:
    """From softmax outputs the guard finds the scores that it finds from the logits."""
    images = np.concatenate([clean, triggered, image(0.4, 0.9, 0.1)])
    by_logits = run(wrap_anew(puppet.url, expose_scores=True), images)
    puppet.behave = lambda x: answer(softmax(x.mean((2, 3)) * 10))
    by_probabilities = run(wrap_anew(puppet.url, outputs="probabilities", expose_scores=True, verify=True), images)
    assert by_probabilities.score.tolist() == pytest.approx(by_logits.score.tolist(), abs=1e-4)
    assert by_probabilities.label.tolist() == by_logits.label.tolist()


def test_a_probability_of_zero_is_a_margin_of_87() -> None:
    """The limit of probabilities: below the smallest float32 nothing is told apart."""
    logits = as_logits([[1.0, 0.0, 0.0]], 1, 3, "probabilities")
    assert logits[0].tolist() == pytest.approx([0, -87.3, -87.3], abs=0.1)
    with pytest.raises(UpstreamFailed, match="to logits"):
        as_logits([[3.0, 1.0, 0.0]], 1, 3, "probabilities")


def test_an_upstream_that_comes_later_is_waited_for(wrap, count, triggered) -> None:
    """A server without its upstream starts, is not ready, and answers 502; once the upstream is there, it is compared,
    and both are ready."""
    port = free_port()
    classifier = wrap(f"http://127.0.0.1:{port}", mode="flag")
    app = build_http_app(Catalogue([classifier]), "9.9")

    async def main() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://guard") as http,
        ):
            tensor = {"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": triggered.ravel().tolist()}
            statuses = [(await http.get("/v2/health/ready")).status_code]
            statuses.append((await http.post(INFER, json={"inputs": [tensor]})).status_code)
            puppet = Puppet()
            with serving(puppet.app, port):
                for _ in range(200):
                    if classifier.ready:
                        break
                    await asyncio.sleep(0.02)
                assert len(puppet.seen) == 8
                statuses.append((await http.get("/v2/health/ready")).status_code)
                statuses.append((await http.post(INFER, json={"inputs": [tensor]})).status_code)
                puppet.ready = 503
                for _ in range(200):
                    if not classifier.ready:
                        break
                    await asyncio.sleep(0.02)
                statuses.append((await http.get("/v2/models/hand/ready")).status_code)
            return statuses

    assert asyncio.run(main()) == [503, 502, 200, 200, 503]
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1


def test_a_model_of_other_classes_does_not_start(wrap, puppet, clean) -> None:
    """A mismatch that shows in the answer's form stops the start, and the sentence says so."""
    puppet.behave = lambda images: answer(np.zeros((len(images), 5)))
    with pytest.raises(UpstreamMismatch, match="other classes"):
        run(wrap(puppet.url), clean)


def test_the_page_is_right(tmp_path: Path) -> None:
    """The configuration of docs/wrap.md checks, and its table names every setting with its default."""
    page = (Path(__file__).parents[2] / "docs/wrap.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "guarded.yaml").write_text(shown)
    (model,) = read(tmp_path / "guarded.yaml", environ={}).guard.models
    assert model.upstream is not None
    assert (model.upstream.input, model.upstream.timeout_s) == ("input__0", 10)
    for name in UpstreamSettings.model_fields:
        assert f"`{name}`" in page, name


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def network(images: np.ndarray, mean=MEAN, std=STD) -> np.ndarray:
    """Logits of a network that normalises its images, with something to say on each channel."""
    x = (images - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    pooled = np.stack([x[:, 0].mean((1, 2)), np.abs(x[:, 1]).mean((1, 2)), (x[:, 2] ** 2).mean((1, 2))], axis=1)
    return (pooled @ np.array([[3, -1, 0], [0, 2, 1], [-1, 0, 2]])).astype(np.float32)


@pytest.mark.parametrize(
    ("theirs", "spec_knows", "sent", "remedy"),
    [
        (lambda x: network(x, (0, 0, 0), (1, 1, 1)), True, None, r"set upstream.mean to \[0.4, 0.5, 0.6\]"),
        (lambda x: network((x - 0.5) / 0.25), False, (0.5, 0.25), "leave upstream.mean and upstream.std out"),
        (lambda x: network(x / 255), False, None, "0 to 255"),
        (lambda x: network(x[:, ::-1]), False, None, "other order"),
        (lambda x: np.exp(network(x)) / np.exp(network(x)).sum(1, keepdims=True), False, None, "set upstream.outputs"),
        (lambda x: network(x)[:, ::-1], False, None, "another model"),
    ],
)
def test_what_is_wrong_with_an_upstream_is_named(theirs, spec_knows, sent, remedy) -> None:
    """Each usual misuse is recognised by its answers, and the sentence says what to set."""

    class Far:
        async def logits(self, images, _headers):
            return np.ascontiguousarray(theirs(images), np.float32)

    async def reference(images):
        return network(images)

    spec = InputSpec(3, 16, 16, *((MEAN, STD) if spec_knows else (None, None)))
    mean, std = (None, None) if sent is None else ((sent[0],) * 3, (sent[1],) * 3)
    with pytest.raises(UpstreamMismatch, match=remedy):
        asyncio.run(compare(Far(), reference, spec, 0.05, mean, std))


def test_what_may_differ_does_not_stop_a_start() -> None:
    """Half precision, a constant added to a row, log p, and probabilities rounded to 0 are the same network."""
    ours = np.array([[12.0, 1.0, -3.0], [0.5, 0.4, 0.3]], np.float32)
    p = softmax(ours)
    assert difference(ours, ours.astype(np.float16).astype(np.float32)) < 0.01
    assert difference(ours, ours + np.array([[5.0], [-2.0]], np.float32)) < 1e-5
    assert difference(ours, as_logits(p, 2, 3, "probabilities")) < 1e-4
    assert difference(ours, as_logits(np.round(p, 4), 2, 3, "probabilities")) < 0.05
    assert difference(ours, ours[:, ::-1]) > 0.5


def run(classifier: Wrapped, images: np.ndarray):
    """The answer of a started classifier."""
    return serve(classifier, lambda c: ask(c, images))


def wrapped(registry: CollectorRegistry, url: str, **settings) -> Wrapped:
    """See the fixture ``wrap``."""
    guard = HandGuard()
    guard.eager = True
    upstream = {key: settings.pop(key) for key in list(settings) if key in UpstreamSettings.model_fields}
    upstream = {"url": url, "model": "m", "timeout_s": 0.5} | upstream
    config = checked(ModelConfig, {"artifact": "artifacts/hand", "upstream": upstream, **settings})
    assert config.upstream is not None
    original = UpstreamHttp(config.upstream, channels=3, classes=3)
    tolerance = config.upstream.tolerance if config.upstream.verify else None
    metrics = Metrics("hand", HandGuard.classes, registry=registry)
    return Wrapped(guard, config, metrics, original, tolerance=tolerance, watch_s=0.05)


def wrap_anew(url: str, **settings) -> Wrapped:
    """Like the fixture ``wrap``, with a registry of its own, and without the comparison at start."""
    return wrapped(CollectorRegistry(), url, **{"verify": False} | settings)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("upstream", "field"),
    [
        ({"url": "http://user:secret@[::1", "model": "m"}, "upstream.url"),
        ({"url": ["http://user:secret@u"], "model": "m"}, "upstream.url"),
        ("http://user:secret@u", "upstream"),
    ],
)
def test_a_broken_address_tells_no_password(upstream: object, field: str) -> None:
    """What cannot be taken apart may hold one."""
    with pytest.raises(BadSetting) as refused:
        checked(ModelConfig, {"artifact": "a", "upstream": upstream})
    assert refused.value.field == field
    assert "secret" not in str(refused.value)
