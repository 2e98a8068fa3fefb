"""Tensors as raw bytes, compressed bodies and trace headers: what is read, what is refused, and with which sentence."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import tracemalloc
import zlib

import httpx
import numpy as np
import pytest
from starlette.responses import PlainTextResponse

from deployments.config import Limits
from deployments.errors import BadRequest, TooLarge, UnknownMedia
from deployments.http.encodings import inflate
from deployments.http.traces import TraceEcho, traceparent
from deployments.policy import Answer
from deployments.protocol import v2
from deployments.protocol.bodies import Ask, Model
from guard.types import InputSpec

MODEL = Model("hand", "1", InputSpec(3, 4, 4), ("ant", "bee", "cat"))
LIMITS = Limits(body_bytes=20_000, images=3)
IMAGES = np.linspace(0, 1, 96, dtype=np.float32).reshape(2, 3, 4, 4)
ANSWER = Answer(
    "flag",
    logits=np.array([[3, 1, 0], [10, 2, 1]], np.float32),
    label=np.array([0, -1]),
    flagged=np.array([False, True]),
    corrected_label=np.array([0, 1]),
)


def body(
    images: np.ndarray, datatype: str = "FP32", *, raw: bytes | None = None, parameters=None, **changes
) -> tuple[bytes, str]:
    """A request with raw bytes, and the length of its JSON. ``parameters`` are the tensor's; ``changes`` replace keys
    of the request."""
    raw = images.tobytes() if raw is None else raw
    parameters = {"binary_data_size": len(raw)} if parameters is None else parameters
    one = {"name": "images", "shape": list(images.shape), "datatype": datatype, "parameters": parameters}
    changes["parameters"] = changes.pop("request_parameters", None)
    head = json.dumps({"inputs": [one], **changes}).encode()
    return head + raw, str(len(head))


def parse(request: tuple[bytes, str | None]) -> Ask:
    return v2.parse_infer(request[0], MODEL, LIMITS, json_length=request[1])


@pytest.mark.parametrize("padding", range(4))
def test_raw_fp32_is_read_where_it_lies(padding: int) -> None:
    """The images share their memory with the body, at whatever offset they start."""
    request = body(IMAGES, id="x" * padding)
    images = parse(request).images
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, IMAGES)
    assert np.shares_memory(images, np.frombuffer(request[0], np.uint8))


def test_raw_bytes_and_numbers_are_the_same_images() -> None:
    """UINT8 in both forms, and FP32 in both, give equal images."""
    as_bytes = (IMAGES * 255).round().astype(np.uint8)
    for images, datatype in ((as_bytes, "UINT8"), (IMAGES, "FP32")):
        one = {"name": "images", "shape": [2, 3, 4, 4], "datatype": datatype, "data": images.tolist()}
        numbers = parse((json.dumps({"inputs": [one]}).encode(), None)).images
        np.testing.assert_array_equal(parse(body(images, datatype)).images, numbers)


def test_the_order_of_bytes_is_little_endian() -> None:
    """The first value is the first four bytes, the lowest first."""
    values = [i / 64 for i in range(48)]
    images = parse(body(IMAGES[:1], raw=struct.pack("<48f", *values))).images
    assert images.ravel().tolist() == values


def size(value) -> dict:
    return {"parameters": {"binary_data_size": value}}


SIZE = "images.parameters.binary_data_size"
JSON_LENGTH = "inference-header-content-length"
OUTPUT = "outputs[0].parameters.binary_data"
CLASSES = "outputs[0].parameters.classification"
TENSOR = {"name": "images", "shape": [2, 3, 4, 4], "datatype": "FP32"}
BAD_RAW = [
    ("short", body(IMAGES, raw=IMAGES.tobytes()[:-1]), SIZE),
    ("long", body(IMAGES, raw=IMAGES.tobytes() + b"\0"), SIZE),
    ("empty", body(IMAGES, raw=b""), SIZE),
    ("wrong type", body(IMAGES, "UINT8"), SIZE),
    ("less than follows", body(IMAGES, **size(383)), SIZE),
    ("more than follows", body(IMAGES, **size(385)), SIZE),
    ("negative", body(IMAGES, **size(-384)), SIZE),
    ("beyond 64 bits", body(IMAGES, **size(2**64 + 384)), SIZE),
    ("fractional", body(IMAGES, **size(384.0)), SIZE),
    ("truth value", body(IMAGES, **size(True)), SIZE),
    ("text", body(IMAGES, **size("384")), SIZE),
    ("null", body(IMAGES, **size(None)), SIZE),
    ("no header", (body(IMAGES, raw=b"", **size(0))[0], None), SIZE),
    ("nobody's bytes", body(IMAGES, parameters={}), "body"),
    ("bytes behind numbers", body(IMAGES, inputs=[TENSOR | {"data": IMAGES.tolist()}]), "body"),
    ("no data at all", body(IMAGES, raw=b"", parameters={}), "images.data"),
    ("both", body(IMAGES, inputs=[TENSOR | {"data": [0] * 96} | size(384)]), "images.data"),
    ("parameters a list", body(IMAGES, parameters=[1]), "images.parameters"),
    ("shared memory", body(IMAGES, parameters={"shared_memory_region": "r"}), "images.parameters.shared_memory_region"),
    ("not finite", body(np.full_like(IMAGES, np.nan)), "images.data"),
    ("infinite", body(np.full_like(IMAGES, -np.inf)), "images.data"),
    ("out of range", body(IMAGES * 2), "images.data"),
    ("too many", body(np.zeros((4, 3, 4, 4), np.float32)), "images.shape"),
    ("huge shape", body(IMAGES, inputs=[TENSOR | {"shape": [2**62, 3, 4, 4]} | size(0)]), "images.shape"),
    ("JSON longer than the body", (body(IMAGES)[0], "100000"), JSON_LENGTH),
    ("JSON of no length", (body(IMAGES)[0], "0"), JSON_LENGTH),
    ("JSON of negative length", (body(IMAGES)[0], "-5"), JSON_LENGTH),
    ("JSON of a length in words", (body(IMAGES)[0], "ten"), JSON_LENGTH),
    ("JSON of an empty length", (body(IMAGES)[0], ""), JSON_LENGTH),
    ("JSON of a length of many digits", (body(IMAGES)[0], "9" * 5000), JSON_LENGTH),
    ("JSON cut short", (body(IMAGES)[0], "20"), "body"),
    ("output in words", body(IMAGES, outputs=[{"name": "label", "parameters": {"binary_data": "yes"}}]), OUTPUT),
    ("outputs in words", body(IMAGES, request_parameters={"binary_data_output": 1}), "parameters.binary_data_output"),
    ("request parameters a list", body(IMAGES, request_parameters=[1]), "parameters"),
    ("classes asked for", body(IMAGES, outputs=[{"name": "logits", "parameters": {"classification": 2}}]), CLASSES),
]


@pytest.mark.parametrize(("request_", "field"), [case[1:] for case in BAD_RAW], ids=[case[0] for case in BAD_RAW])
def test_raw_bytes_that_do_not_fit_are_refused_with_their_field(request_, field: str) -> None:
    """Sizes, headers and values that contradict one another, or the model, are named; nothing overflows."""
    with pytest.raises(BadRequest, match=f"^{field.replace('[', '.')[:9]}") as caught:
        parse(request_)
    assert caught.value.field == field
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("asked", "raw"),
    [
        ({}, []),
        ({"request_parameters": {"binary_data_output": False}}, []),
        ({"request_parameters": {"binary_data_output": True}}, ["logits", "label", "flagged", "corrected_label"]),
        ({"request_parameters": {"binary_data_output": True}, "outputs": [{"name": "label"}]}, ["label"]),
        (
            {
                "request_parameters": {"binary_data_output": True, "priority": 2, "unheard_of": "x"},
                "outputs": [{"name": "flagged"}, {"name": "label", "parameters": {"binary_data": False}}],
            },
            ["flagged"],
        ),
        ({"outputs": [{"name": "label", "parameters": {"binary_data": True}}, {"name": "flagged"}]}, ["label"]),
        ({"outputs": [{"name": "score", "parameters": {"binary_data": True}}]}, []),
    ],
)
def test_outputs_come_raw_where_they_are_asked_for_so(asked, raw: list[str]) -> None:
    """An output's own wish counts before the request's. The raw ones follow the JSON in its order; all is as long as
    it is said to be; unknown parameters are ignored."""
    ask = parse(body(IMAGES, **asked))
    content, json_length = v2.render_infer(ANSWER, ask, MODEL)
    plain = json.loads(v2.render_infer(ANSWER, ask._replace(binary=frozenset()), MODEL).content)
    assert (json_length is not None) == bool(raw)
    head, rest = json.loads(content[:json_length]), content[json_length:] if json_length else b""
    assert [one["name"] for one in head["outputs"]] == [one["name"] for one in plain["outputs"]]
    for one, expected in zip(head["outputs"], plain["outputs"], strict=True):
        if one["name"] in raw:
            assert "data" not in one
            taken = one.pop("parameters")["binary_data_size"]
            kind = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}[one["datatype"]]
            one["data"], rest = np.frombuffer(rest[:taken], kind).tolist(), rest[taken:]
        assert one == expected
    assert rest == b""


def test_a_truth_value_is_one_byte_of_zero_or_one() -> None:
    """``flagged`` of two images is two bytes."""
    outputs = [{"name": "flagged", "parameters": {"binary_data": True}}]
    content, json_length = v2.render_infer(ANSWER, parse(body(IMAGES, outputs=outputs)), MODEL)
    assert content[json_length:] == b"\x00\x01"


GZIP, ZLIB = gzip.compress(b"x" * 1000, mtime=0), zlib.compress(b"x" * 1000)


def test_a_compressed_body_is_what_it_was() -> None:
    """gzip and deflate, to the very limit."""
    assert inflate(GZIP, "gzip", 1000) == inflate(ZLIB, "deflate", 1000) == b"x" * 1000
    assert inflate(gzip.compress(b""), "gzip", 1000) == b""


@pytest.mark.parametrize(
    ("data", "encoding", "kind", "field"),
    [
        (GZIP, "br", UnknownMedia, "content-encoding"),
        (GZIP, "gzip,gzip", UnknownMedia, "content-encoding"),
        (GZIP, "deflate", BadRequest, "body"),
        (ZLIB, "gzip", BadRequest, "body"),
        (b"", "gzip", BadRequest, "body"),
        (GZIP[:-1], "gzip", BadRequest, "body"),
        (ZLIB[:-4], "deflate", BadRequest, "body"),
        (GZIP[:-8] + b"\0" * 8, "gzip", BadRequest, "body"),
        (GZIP + GZIP, "gzip", BadRequest, "body"),
        (gzip.compress(b"x" * 1001, mtime=0), "gzip", TooLarge, "body"),
    ],
)
def test_a_compressed_body_that_is_none_is_refused(data: bytes, encoding: str, kind, field: str) -> None:
    """Another encoding, another than the one named, cut off, damaged, followed by more, or too long once inflated."""
    with pytest.raises(kind, match=f"^{field}: ") as caught:
        inflate(data, encoding, 1000)
    assert type(caught.value) is kind
    assert caught.value.field == field


def test_a_bomb_is_not_inflated() -> None:
    """200 MB in 200 KB cost no more memory than the limit, about."""
    bomb = zlib.compress(bytes(200_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            inflate(bomb, "deflate", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ([TRACE], True),
        (["cc" + TRACE[2:] + "-what.the-future-holds"], True),
        ([TRACE + "-more"], False),
        (["ff" + TRACE[2:]], False),
        ([TRACE.upper()], False),
        ([TRACE + "\n"], False),
        (["00-" + "0" * 32 + TRACE[35:]], False),
        ([TRACE[:36] + "0" * 16 + "-01"], False),
        ([TRACE[:-1]], False),
        ([TRACE, TRACE], False),
        ([""], False),
        ([], False),
    ],
)
def test_a_valid_traceparent_comes_back(given: list[str], valid: bool) -> None:
    """As W3C Trace Context defines valid: versions, zeros, lower case, and just one."""
    assert traceparent(given) == (given[0] if valid else None)


@pytest.mark.parametrize(("given", "echoed"), [(TRACE, TRACE), ("nonsense", None), (None, None)])
def test_answers_carry_the_trace_of_their_request(given: str | None, echoed: str | None) -> None:
    """The middleware sets the header on whatever leaves."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(TraceEcho(PlainTextResponse("as ever")))
        async with httpx.AsyncClient(transport=transport, base_url="http://guard") as client:
            return await client.get("/", headers={} if given is None else {"traceparent": given})

    answer = asyncio.run(ask())
    assert answer.text == "as ever"
    assert answer.headers.get("traceparent") == echoed
