"""The protocol's public client library, as it is, against our server over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue
from types import ModuleType
from typing import Any, NamedTuple

import grpc as grpcio
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import uvicorn
from google.protobuf.descriptor import Descriptor
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from deployments.engine.catalogue import Catalogue
from deployments.engine.classifier import Classifier
from deployments.grpc.messages import MESSAGES, SERVICE, message
from deployments.grpc.service import GrpcServer
from deployments.http.ingress import build_http_app
from deployments.keys import Keys, parse_variable
from guard.errors import BadSetting

ROLES = ("inference", "scores")
TRIED = ("logits", "label", "flagged", "corrected_label")


class Client(NamedTuple):
    """One of the two libraries and a connection of it."""

    kind: str
    library: ModuleType
    connection: Any

    def images(self, images: np.ndarray, datatype: str, *, raw: bool = True) -> list[Any]:
        one = self.library.InferInput("images", list(images.shape), datatype)
        if self.kind == "http":
            one.set_data_from_numpy(images, binary_data=raw)
        elif raw:
            one.set_data_from_numpy(images)
        else:  # the library has no way to fill the typed fields
            tensor = one._get_tensor()
            field = {"FP32": "fp32_contents", "UINT8": "uint_contents"}[datatype]
            getattr(tensor.contents, field).extend(images.ravel().tolist())
        return [one]

    def wanted(self, *names: str, raw: bool = True) -> list[Any]:
        options = {"binary_data": raw} if self.kind == "http" else {}
        return [self.library.InferRequestedOutput(name, **options) for name in names]

    def infer(self, images: np.ndarray, datatype: str = "FP32", *, raw: bool = True, **options) -> Any:
        return self.connection.infer("hand", self.images(images, datatype, raw=raw), **options)


class Served(NamedTuple):
    """A running server."""

    classifier: Classifier
    http: str
    grpc: str
    loop: asyncio.AbstractEventLoop
    services: list[GrpcServer]

    def run(self, coroutine) -> Any:
        """The result of ``coroutine`` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def truth(self, images: np.ndarray, **options) -> dict[str, np.ndarray]:
        """What the JSON route answers, by output."""
        tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
        body = {"inputs": [tensor]}
        answer = httpx.post(f"http://{self.http}/v2/models/hand/infer", json=body, **options)
        assert answer.status_code == 200, answer.text
        kinds = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
        return {
            one["name"]: np.array(one["data"], kinds[one["datatype"]]).reshape(one["shape"])
            for one in answer.json()["outputs"]
        }


@contextmanager
def running(classifier: Classifier, keys: Keys | None = None) -> Iterator[Served]:
    """Both servers over ``classifier``, on free ports and one event loop in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    models = Catalogue([classifier])
    web = uvicorn.Server(
        uvicorn.Config(build_http_app(models, "9.9", keys), log_level="error", ws="none", timeout_graceful_shutdown=1)
    )
    service = GrpcServer(models, "9.9", host="127.0.0.1", port=0, keys=keys)
    started: Queue[asyncio.AbstractEventLoop | BaseException] = Queue()

    async def serve() -> None:
        serving = asyncio.create_task(web.serve([listener]))
        while not web.started:
            await asyncio.sleep(0.01)
        await service.start()
        started.put(asyncio.get_running_loop())
        await serving

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            started.put(error)
            raise

    thread = threading.Thread(target=work)
    thread.start()
    loop = started.get(timeout=20)
    assert isinstance(loop, asyncio.AbstractEventLoop), loop
    port = listener.getsockname()[1]
    served = Served(classifier, f"127.0.0.1:{port}", f"127.0.0.1:{service.port}", loop, [service])
    try:
        yield served
    finally:
        classifier.guard.gate.set()
        for one in served.services:
            served.run(one.stop(0))
        web.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def start(make_classifier) -> Iterator[Callable[..., Served]]:
    """Servers with the given settings and small limits."""
    with ExitStack() as stack:

        def make(keys: Keys | None = None, **settings) -> Served:
            limits = {"body_bytes": 20_000, "images": 3}
            return stack.enter_context(running(make_classifier(limits=limits, **settings), keys))

        yield make


@pytest.fixture(params=["http", "grpc"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def connect(kind: str) -> Iterator[Callable[[Served], Client]]:
    """A client of a server, over the protocol of this test."""
    library = {"http": tritonclient.http, "grpc": tritonclient.grpc}[kind]
    with ExitStack() as stack:

        def make(served: Served) -> Client:
            url = {"http": served.http, "grpc": served.grpc}[kind]
            return Client(kind, library, stack.enter_context(library.InferenceServerClient(url)))

        yield make


def same(result: Any, truth: dict[str, np.ndarray], names=TRIED) -> None:
    for name in names:
        got = result.as_numpy(name)
        assert got.dtype == truth[name].dtype
        np.testing.assert_array_equal(got, truth[name], err_msg=name)


def test_it_is_live_and_ready(start, connect) -> None:
    """Server and model say so; another model or version is not there."""
    served = start()
    connection = connect(served).connection
    assert connection.is_server_live()
    assert connection.is_server_ready()
    assert connection.is_model_ready("hand")
    assert connection.is_model_ready("hand", "1")


def test_it_is_not_ready_once_its_worker_has_ended(start, connect) -> None:
    """Alive, and not ready, by server and by model; the index has the reason."""
    served = start()
    client = connect(served)
    served.run(served.classifier.close())
    assert client.connection.is_server_live()
    assert not client.connection.is_server_ready()
    assert not client.connection.is_model_ready("hand")
    index = client.connection.get_model_repository_index()
    (one,) = index if client.kind == "http" else [{"state": one.state, "reason": one.reason} for one in index.models]
    assert (one["state"], one["reason"]) == ("UNAVAILABLE", "starting, or shutting down")
    with pytest.raises(InferenceServerException, match="shutting down"):
        client.infer(np.zeros((1, 3, 4, 4), np.float32))


def test_metadata_is_the_same_over_both(start) -> None:
    """Server, model and index, over HTTP and over gRPC."""
    served = start()
    with (
        tritonclient.http.InferenceServerClient(served.http) as http,
        tritonclient.grpc.InferenceServerClient(served.grpc) as grpc,
    ):
        about = http.get_server_metadata()
        assert about == grpc.get_server_metadata(as_json=True)
        assert about["extensions"] == ["binary_tensor_data", "guard", "model_repository"]
        over_http, over_grpc = http.get_model_metadata("hand", "1"), grpc.get_model_metadata("hand", "1")
        for key in ("name", "platform"):
            assert over_http[key] == getattr(over_grpc, key)
        assert over_http["versions"] == list(over_grpc.versions) == ["1"]
        for key in ("inputs", "outputs"):
            rows = [(one["name"], one["datatype"], one["shape"]) for one in over_http[key]]
            assert rows == [(one.name, one.datatype, list(one.shape)) for one in getattr(over_grpc, key)]
        assert http.get_model_repository_index() == [{"name": "hand", "version": "1", "state": "READY", "reason": ""}]
        assert grpc.get_model_repository_index(as_json=True) == {
            "models": [{"name": "hand", "version": "1", "state": "READY"}]
        }
        assert httpx.get(f"http://{served.http}/v2/models").json() == {"models": ["hand"]}
        with pytest.raises(InferenceServerException, match="config: there is no such file"):
            http.get_model_config("hand")
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            grpc.get_model_config("hand")


@pytest.mark.parametrize("mode", ["observe", "flag", "reject", "correct"])
@pytest.mark.parametrize("raw", [True, False])
def test_answers_are_those_of_the_json_route(start, connect, clean, triggered, mode: str, raw: bool) -> None:
    """FP32 and UINT8, as raw bytes and as numbers, in every mode."""
    served = start(mode=mode, expose_scores=True)
    client = connect(served)
    both = np.concatenate([clean, triggered]).astype(np.float32)
    as_bytes = (both * 255).round().astype(np.uint8)
    truth = served.truth(both)
    same(client.infer(both, raw=raw), truth, truth)
    exact = (as_bytes / np.float32(255)).astype(np.float32)
    same(client.infer(as_bytes, "UINT8", raw=raw), served.truth(exact), truth)
    assert ("score" in truth) == (mode != "observe")


def test_ids_versions_parameters_and_outputs(start, connect, clean) -> None:
    """The id comes back, an output is left out that was not asked for or is withheld, and unknown parameters are
    ignored."""
    served = start()
    client = connect(served)
    for raw in (True, False):
        wanted = client.wanted("label", "score", "logits", raw=raw)
        options = {"request_id": "a1", "model_version": "1", "priority": 1, "timeout": 5, "parameters": {"mine": "x"}}
        result = client.infer(clean, outputs=wanted, **options)
        response = result.get_response(**({"as_json": True} if client.kind == "grpc" else {}))
        assert response["id"] == "a1"
        assert (response["model_name"], response["model_version"]) == ("hand", "1")
        assert [one["name"] for one in response["outputs"]] == ["label", "logits"]
        same(result, served.truth(clean), ("label", "logits"))
        assert result.as_numpy("score") is None
        facts = response["parameters"]
        expected = {"guard_mode": "flag", "guard_flagged": 0}
        if client.kind == "grpc":
            expected = {"guard_mode": {"string_param": "flag"}, "guard_flagged": {"int64_param": "0"}}
        assert facts == expected


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_requests(start, connect, triggered, coding: str) -> None:
    """Both directions asked for: requests are inflated, answers may stay as they are."""
    served = start()
    client = connect(served)
    options = {"compression_algorithm": coding}
    if client.kind == "http":
        options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    for raw in (True, False):
        same(client.infer(triggered, raw=raw, **options), served.truth(triggered))


def test_many_at_once(start, connect, clean, triggered) -> None:
    """The library's asynchronous calls."""
    served = start()
    client = connect(served)
    batch = [clean, triggered] * 8
    results: Queue[Any] = Queue()
    if client.kind == "grpc":
        for i, images in enumerate(batch):
            given = client.images(images, "FP32")
            client.connection.async_infer(
                "hand", given, lambda result, error: results.put((result, error)), request_id=str(i)
            )
        answers = {}
        for _ in batch:
            result, error = results.get(timeout=10)
            assert error is None
            answers[int(result.get_response().id)] = result
    else:
        pending = [client.connection.async_infer("hand", client.images(images, "FP32")) for images in batch]
        answers = {i: one.get_result(timeout=10) for i, one in enumerate(pending)}
    truths = [served.truth(images) for images in batch[:2]]
    for i, answer in answers.items():
        same(answer, truths[i % 2])
    assert len(answers) == len(batch)


FP32 = np.full((1, 3, 4, 4), 0.5, np.float32)
BAD = [
    ("other model", {"model_name": "other"}, FP32, "404", "NOT_FOUND", "^.* model_name: expected hand, got 'other'"),
    ("version", {"model_version": "7"}, FP32, "404", "NOT_FOUND", "model_version: hand is served as version '1'"),
    ("range", {}, FP32 * 4, "422", "INVALID_ARGUMENT", "images.data: FP32 takes 0 to 1, got 2 to 2"),
    ("not finite", {}, FP32 * np.nan, "422", "INVALID_ARGUMENT", "images.data: values that are not finite"),
    ("shape", {}, FP32[:, :, :2], "422", "INVALID_ARGUMENT", r"images.shape: expected \[B, 3, 4, 4\]"),
    ("count", {}, np.repeat(FP32, 4, 0), "413", "RESOURCE_EXHAUSTED", "images.shape: 4 images, at most 3"),
    ("length", {}, np.repeat(FP32, 120, 0), "413", "RESOURCE_EXHAUSTED", "20000"),
    ("output", {"outputs": ["secret"]}, FP32, "400", "INVALID_ARGUMENT", r"outputs\[0\].name: expected one of"),
    ("type", {}, FP32.astype(np.float64), "400", "INVALID_ARGUMENT", "images.datatype: expected UINT8"),
    ("id", {"request_id": "a\nb"}, FP32, "400", "INVALID_ARGUMENT", "id: expected a string of printable characters"),
]


@pytest.mark.parametrize(
    ("options", "images", "status", "code", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_bad_request_is_told_so(start, connect, options, images, status: str, code: str, sentence: str) -> None:
    """The library raises its own error with our sentence, and the server lives on."""
    served = start()
    client = connect(served)
    datatype = "FP64" if images.dtype == np.float64 else "FP32"
    options = {"model_name": "hand"} | options
    if "outputs" in options:
        options["outputs"] = client.wanted(*options["outputs"])
    with pytest.raises(InferenceServerException, match=sentence) as caught:
        client.connection.infer(inputs=client.images(images, datatype), **options)
    assert caught.value.status() == (status if client.kind == "http" else f"StatusCode.{code}")
    same(client.infer(FP32), served.truth(FP32))


def test_failures_and_refusals_say_nothing_of_the_inside(start, connect, paint, monkeypatch) -> None:
    """A closed failure is unavailable, a failing network internal, and so is a defect of ours."""
    served = start(mode="flag", on_failure="closed")
    served.classifier.guard.fail |= {"corrected": 0.7, "original": 0.9}
    client = connect(served)
    status = ["503", "500", "500"]
    if client.kind == "grpc":
        status = ["StatusCode.UNAVAILABLE", "StatusCode.INTERNAL", "StatusCode.INTERNAL"]
    for images, expected, sentence in (
        (paint(0.7, 0, 0), status[0], "no verdict: the corrected stage failed"),
        (paint(0.9, 0, 0), status[1], "the classifier failed on this request: its log has the reason"),
    ):
        with pytest.raises(InferenceServerException, match=sentence) as caught:
            client.infer(images)
        assert caught.value.status() == expected

    async def broken(*_args):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(served.classifier, "infer", broken)
    with pytest.raises(InferenceServerException, match="internal error: the server's log has the reason") as caught:
        client.infer(FP32)
    assert caught.value.status() == status[2]
    assert "secret" not in str(caught.value)


def test_keys_open_what_their_roles_allow(start, connect, clean) -> None:
    """Health needs no key, answers and metadata do, scores one of their role."""
    keys = Keys(parse_variable(",".join(f"{role}:{role}-of-the-test" for role in ROLES)))
    served = start(keys)
    client = connect(served)
    assert client.connection.is_server_ready()
    assert client.connection.is_model_ready("hand")
    refused = "401" if client.kind == "http" else "StatusCode.UNAUTHENTICATED"
    for call in (
        client.connection.get_server_metadata,
        lambda: client.connection.get_model_metadata("hand"),
        client.connection.get_model_repository_index,
        lambda: client.infer(clean),
        lambda: client.infer(clean, headers={"x-api-key": "nobody-has-this-one"}),
    ):
        with pytest.raises(InferenceServerException, match="API key") as caught:
            call()
        assert caught.value.status() == refused
    for role, header in (("inference", "x-api-key"), ("scores", "authorization")):
        value = f"{role}-of-the-test"
        headers = {header: f"Bearer {value}" if header == "authorization" else value}
        truth = served.truth(clean, headers=headers)
        assert ("score" in truth) == (role == "scores")
        same(client.infer(clean, headers=headers), truth, truth)


def test_the_trace_of_a_request_comes_back_on_any_answer(start) -> None:
    """On one that is there and on one that is not."""
    served = start()
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
    for path, status in (("/v2", 200), ("/v2/models/other", 404), ("/nowhere", 404)):
        answer = httpx.get(f"http://{served.http}{path}", headers=trace)
        assert (answer.status_code, answer.headers["traceparent"]) == (status, trace["traceparent"])


# --- gRPC alone


@pytest.fixture
def channel() -> Iterator[Callable[[Served], grpcio.Channel]]:
    with ExitStack() as stack:
        yield lambda served: stack.enter_context(grpcio.insecure_channel(served.grpc))


def infer_message(images: np.ndarray = FP32, **changes) -> Any:
    request = message("ModelInferRequest")(model_name="hand", raw_input_contents=[images.tobytes()])
    request.inputs.add(name="images", datatype="FP32", shape=images.shape)
    for key, value in changes.items():
        setattr(request, key, value)
    return request


def two_raw(request: Any) -> None:
    request.raw_input_contents.append(b"")


def raw_and_typed(request: Any) -> None:
    request.inputs[0].contents.fp32_contents.extend([0.5] * 48)


def no_values(request: Any) -> None:
    del request.raw_input_contents[:]


def wrong_field(request: Any) -> None:
    no_values(request)
    request.inputs[0].contents.fp64_contents.extend([0.5] * 48)


def short_raw(request: Any) -> None:
    request.raw_input_contents[0] = bytes(191)


def short_typed(request: Any) -> None:
    no_values(request)
    request.inputs[0].contents.fp32_contents.extend([0.5] * 47)


def byte_too_large(request: Any) -> None:
    no_values(request)
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].contents.uint_contents.extend([2**32 - 1] * 48)


def negative_shape(request: Any) -> None:
    request.inputs[0].shape[0] = -1


def no_input(request: Any) -> None:
    del request.inputs[:]


def shared_memory(request: Any) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"


def classes(request: Any) -> None:
    request.outputs.add(name="logits").parameters["classification"].int64_param = 2


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (two_raw, "images.contents: FP32 takes fp32_contents, or raw_input_contents of one tensor, got raw_input"),
        (raw_and_typed, "images.contents: .* got fp32_contents and raw_input_contents"),
        (no_values, "images.contents: .* got neither"),
        (wrong_field, "images.contents: .* got fp64_contents"),
        (short_raw, r"raw_input_contents\[0\]: \[1, 3, 4, 4\] of FP32 needs 192 bytes, got 191"),
        (short_typed, r"images.data: \[1, 3, 4, 4\] needs 48 values, got 47"),
        (byte_too_large, "images.data: UINT8 takes 0 to 255, got 4294967295"),
        (negative_shape, "images.shape: expected a list of four sizes"),
        (no_input, 'inputs: expected one tensor named "images", got 0'),
        (shared_memory, "images.parameters.shared_memory_region: this server does not offer it"),
        (classes, r"outputs\[0\].parameters.classification: this server does not offer it"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_message_that_contradicts_itself_is_refused(start, channel, spoil, sentence: str) -> None:
    """What no library sends, sent by hand."""
    request = infer_message()
    spoil(request)
    call = channel(start()).unary_unary(f"/{SERVICE}/ModelInfer")
    with pytest.raises(grpcio.RpcError, match=sentence) as caught:
        call(request.SerializeToString())
    assert caught.value.code() is grpcio.StatusCode.INVALID_ARGUMENT


def test_noise_is_no_message(start, channel) -> None:
    """Bytes that are no protobuf are the caller's fault; a method that is not there is not implemented."""
    here = channel(start())
    for method, body, code in (
        ("ModelInfer", b"\xff" * 100, grpcio.StatusCode.INVALID_ARGUMENT),
        ("ModelInfer", b"", grpcio.StatusCode.INVALID_ARGUMENT),
        ("ModelStreamInfer", b"", grpcio.StatusCode.UNIMPLEMENTED),
    ):
        with pytest.raises(grpcio.RpcError) as caught:
            here.unary_unary(f"/{SERVICE}/{method}")(body)
        assert caught.value.code() is code, method


def test_a_bomb_of_a_message_is_refused(start, channel) -> None:
    """A message that inflates beyond the limit."""
    call = channel(start()).unary_unary(f"/{SERVICE}/ModelInfer")
    with pytest.raises(grpcio.RpcError) as caught:
        call(bytes(10_000_000), compression=grpcio.Compression.Gzip)
    assert caught.value.code() is grpcio.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.alone
def test_who_cancels_gives_up_the_place_in_the_queue(start, channel) -> None:
    """A cancelled call and one past its deadline never reach the network."""
    served = start()
    guard = served.classifier.guard
    guard.gate.clear()
    call = channel(served).unary_unary(f"/{SERVICE}/ModelInfer")
    held = call.future(infer_message().SerializeToString())
    settle(lambda: waiting(served) == 0 and served.classifier._batcher.busy_since is not None)
    cancelled = call.future(infer_message().SerializeToString())
    late = call.future(infer_message().SerializeToString(), timeout=0.3)
    settle(lambda: waiting(served) == 2)
    cancelled.cancel()
    settle(lambda: waiting(served) == 0)
    with pytest.raises(grpcio.RpcError):
        late.result()
    guard.gate.set()
    assert held.result(timeout=10)
    before = list(guard.batches)
    call(infer_message().SerializeToString())
    assert guard.batches == [*before, 1]


def test_a_server_that_stops_answers_what_is_under_way(start, channel) -> None:
    """A call in the queue gets its answer within the grace; a new one is refused."""
    served = start()
    guard = served.classifier.guard
    guard.gate.clear()
    call = channel(served).unary_unary(f"/{SERVICE}/ModelInfer")
    held = call.future(infer_message().SerializeToString())
    settle(lambda: served.classifier._batcher.busy_since is not None)
    stopping = asyncio.run_coroutine_threadsafe(served.services[0].stop(10), served.loop)
    settle(lambda: refused(served))
    guard.gate.set()
    answer = message("ModelInferResponse").FromString(held.result(timeout=10))
    assert [one.name for one in answer.outputs] == list(TRIED)
    stopping.result(10)


def refused(served: Served) -> bool:
    """Whether a new call gets no answer. In the moment that a server begins to stop, gRPC itself says CANCELLED."""
    with grpcio.insecure_channel(served.grpc) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/ServerLive")(b"")
        except grpcio.RpcError as error:
            return error.code() in (grpcio.StatusCode.UNAVAILABLE, grpcio.StatusCode.CANCELLED)
    return False


def waiting(served: Served) -> int:
    return len(served.classifier._batcher._waiting)


def settle(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    pause = threading.Event()
    for _ in range(500):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to hold")


def test_servers_share_a_port_and_a_wrong_address_is_told(start, make_classifier) -> None:
    """Two servers listen on one port, as two replicas do; an address of another host is a setting that is wrong."""
    served = start()
    models = Catalogue([served.classifier])
    port = served.services[0].port

    async def second(host: str) -> GrpcServer:
        server = GrpcServer(models, "9.9", host=host, port=port)
        await server.start()
        return server

    served.services.append(served.run(second("127.0.0.1")))
    assert served.services[1].port == port
    served.run(served.services[0].stop(0))
    with tritonclient.grpc.InferenceServerClient(served.grpc) as connection:
        assert connection.is_server_live()
    with pytest.raises(BadSetting, match=f"^grpc.port: cannot listen on 192.0.2.1:{port}"):
        served.run(second("192.0.2.1"))


# --- Messages


def fields(described: Descriptor) -> dict[str, tuple[Any, ...]]:
    """Every field of a message and of those within it: number, type, what it repeats or holds, and which choice it
    belongs to."""
    found = {}
    for one in described.fields:
        kind = one.message_type and one.message_type.full_name
        choice = one.containing_oneof and one.containing_oneof.name
        found[one.full_name] = (one.number, one.type, one.is_repeated, kind, choice)
    for inner in described.nested_types:
        assert inner.GetOptions().map_entry == inner.name.endswith("Entry")
        found |= fields(inner)
    return found


@pytest.mark.parametrize("name", [name for name in MESSAGES if "." not in name])
def test_our_messages_are_the_published_ones(name: str) -> None:
    """Each field has the name, number and type that the client library has; ours are in a pool of their own."""
    ours, theirs = message(name).DESCRIPTOR, service_pb2.DESCRIPTOR.message_types_by_name[name]
    assert fields(ours) == fields(theirs)
    assert ours.file.pool is not theirs.file.pool
    assert next(iter(service_pb2.DESCRIPTOR.services_by_name.values())).full_name == SERVICE
