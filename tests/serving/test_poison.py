"""Poisoned requests over real HTTP, in one queue with good ones: each bad one fails alone, and costs little."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import torch
from files import animated, black_png, deep_png, plain_webp, saved
from hand import HandGuard
from PIL import Image
from web import Web

from deployments.http.ingress import READERS

INFER, PREDICT, CLASSIFY = "/v2/models/hand/infer", "/v1/models/hand:predict", "/classify"
LENGTH = "inference-header-content-length"
ONE = np.full((1, 3, 4, 4), 0.25, np.float32)
NAN, ENDLESS, MANY = ONE * np.nan, ONE * np.inf, np.repeat(ONE, 10_000, 0)


class Post(NamedTuple):
    """A request: where to, with which headers, and what."""

    path: str
    headers: dict[str, str]
    content: bytes

    def send(self, http: httpx.Client) -> httpx.Response:
        return http.post(self.path, headers=self.headers, content=self.content)


def numbers(images: np.ndarray, **changes: object) -> Post:
    """A tensor as JSON; ``changes`` replace its keys."""
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return Post(INFER, {"content-type": "application/json"}, json.dumps({"inputs": [tensor | changes]}).encode())


def raw(images: np.ndarray, **changes: object) -> Post:
    """A tensor as raw bytes behind its JSON; ``changes`` replace keys of the JSON."""
    pixels = images.tobytes()
    size = {"binary_data_size": len(pixels)}
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "parameters": size} | changes
    text = json.dumps({"inputs": [tensor]}).encode()
    headers = {"content-type": "application/octet-stream", LENGTH: str(len(text))}
    return Post(INFER, headers, text + pixels)


def instances(images: list) -> Post:
    return Post(PREDICT, {"content-type": "application/json"}, json.dumps({"instances": images}).encode())


def file(content: bytes, media: str = "image/png", path: str = CLASSIFY) -> Post:
    return Post(path, {"content-type": media}, content)


def encoded(*contents: bytes) -> Post:
    return instances([{"b64": base64.b64encode(content).decode()} for content in contents])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
GIF = animated("GIF", (255, 0, 0), (0, 255, 0))
BOMB, WEBP_BOMB = black_png(30_000), plain_webp(16_383)

BAD = [
    ("nan", numbers(NAN), 422, "images.data"),
    ("raw nan", raw(NAN), 422, "images.data"),
    ("infinite", numbers(ENDLESS), 422, "images.data"),
    ("raw infinite", raw(-ENDLESS), 422, "images.data"),
    ("nan instances", instances(NAN.tolist()), 422, "instances"),
    ("wrong shape", numbers(ONE, shape=[1, 4, 4, 3]), 422, "images.shape"),
    ("raw wrong shape", raw(ONE, shape=[1, 3, 4, 5]), 422, "images.shape"),
    ("wrong shape of instances", instances(ONE[:, :, :3].tolist()), 422, "instances"),
    ("wrong type", raw(ONE.astype(np.float64), datatype="FP64"), 400, "images.datatype"),
    ("raw, of another type", raw(ONE, datatype="UINT8"), 400, "images.parameters.binary_data_size"),
    ("texts", numbers(ONE, data=["x"] * 48), 400, "images.data"),
    ("no image", numbers(ONE[:0]), 422, "images.shape"),
    ("raw, no image", raw(ONE[:0]), 422, "images.shape"),
    ("no instance", instances([]), 422, "instances"),
    ("ten thousand", numbers(MANY), 413, "images.shape"),
    ("raw, ten thousand", raw(MANY), 413, "images.shape"),
    ("ten thousand instances", instances(MANY.round(2).tolist()), 413, "instances"),
    ("a bomb", file(BOMB), 413, "image"),
    ("a bomb among instances", encoded(saved(NOISE), BOMB), 413, "instances[1].b64"),
    ("a webp bomb", file(WEBP_BOMB, "image/webp"), 413, "image"),
    ("truncated jpeg", file(saved(NOISE, "JPEG")[:1500], "image/jpeg"), 400, "image"),
    ("truncated png", file(saved(NOISE)[:-2000]), 400, "image"),
    ("truncated webp", file(saved(NOISE, "WEBP")[:500], "image/webp"), 400, "image"),
    ("a gif", file(GIF, "image/gif"), 415, "content-type"),
    ("a gif that claims to be a png", file(GIF), 415, "image"),
    ("a gif among instances", encoded(GIF), 415, "instances[0].b64"),
    ("a text that claims to be a jpeg", file(b"<html></html>", "image/jpeg"), 415, "image"),
    ("an image that claims to be json", file(saved(NOISE), "application/json", PREDICT), 400, "body"),
    ("an empty file", file(b""), 400, "image"),
    ("an empty instance", encoded(b""), 400, "instances[0].b64"),
]


def good(seed: int) -> tuple[Post, np.ndarray]:
    """A request of one to four plain images in one of four forms, and the images as the network gets them."""
    draw = np.random.default_rng(seed)
    colours = draw.integers(0, 256, (seed % 4 + 1, 3), dtype=np.uint8)
    images = np.repeat(np.repeat(colours[:, :, None, None], 4, 2), 4, 3)
    exact = images / np.float32(255)
    files = [saved(Image.fromarray(one.transpose(1, 2, 0))) for one in images]
    post = (
        lambda: numbers(exact),
        lambda: raw(exact),
        lambda: raw(images, datatype="UINT8"),
        lambda: encoded(*files),
    )[seed // 4 % 4]()
    return post, exact


def verdict(answer: httpx.Response) -> tuple[list[int], list[bool]]:
    """Labels and flags, of either kind of answer."""
    assert answer.status_code == 200, answer.text
    if "predictions" in answer.json():
        rows = answer.json()["predictions"]
        return [row["label"] for row in rows], [row["flagged"] for row in rows]
    outputs = {one["name"]: one["data"] for one in answer.json()["outputs"]}
    return outputs["label"], outputs["flagged"]


def oracle(images: np.ndarray) -> tuple[list[int], list[bool]]:
    guard = HandGuard()
    shared = guard.shared(torch.from_numpy(images))
    found = guard.verdict(guard.finish(shared), guard.corrected(None, shared))
    return found.label.tolist(), found.flagged.tolist()


@contextmanager
def growth() -> Iterator[list[int]]:
    """By how many bytes at most this process was larger within the block than before it: one item, after its end."""
    found: list[int] = []
    ended = threading.Event()
    before = peak = resident()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append(peak - before)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def web(make_classifier) -> Iterator[Web]:
    """Mode flag, limits as they are by default."""
    with Web(make_classifier()) as one:
        yield one


def send_all(web: Web, posts: list[Post]) -> list[httpx.Response]:
    """Answers in order, of posts that go out over sixteen connections."""
    with httpx.Client(base_url=web.url, timeout=30) as http, ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda post: post.send(http), posts))


def test_bad_requests_fail_alone_beside_good_ones(web, count) -> None:
    """Every good answer is the oracle's; every bad request gets its own 4xx with its field; the counters agree, and no
    bad image has reached the network."""
    goods = [good(seed) for seed in range(6 * len(BAD))]
    cases = [(post, images) for post, images in goods] + [(case[1], case) for case in BAD] * 2
    random.Random(0).shuffle(cases)
    for (_, expected), answer in zip(cases, send_all(web, [post for post, _ in cases]), strict=True):
        if isinstance(expected, np.ndarray):
            assert verdict(answer) == oracle(expected)
            continue
        name, _, status, field = expected
        assert (answer.status_code, answer.json()["field"]) == (status, field), f"{name}: {answer.text}"
        assert answer.json()["error"].startswith(field)
    flagged = [any(oracle(images)[1]) for _, images in goods]
    for kind, expected in (("error", 2 * len(BAD)), ("flagged", sum(flagged)), ("clean", len(goods) - sum(flagged))):
        assert count("guard_requests_total", mode="flag", verdict=kind) == expected
    assert count("guard_batch_size_sum") == sum(len(images) for _, images in goods)
    assert 0 < sum(flagged) < len(goods)


@pytest.mark.alone
def test_bombs_cost_neither_memory_nor_time(web) -> None:
    """Files that claim 900 and 268 million pixels are refused by their headers: forty at once, in under 100 MB and in
    the time of small requests."""
    assert len(BOMB) < 200_000
    assert len(WEBP_BOMB) < 100
    send_all(web, [good(seed)[0] for seed in range(32)])
    bombs = [file(BOMB), file(WEBP_BOMB, "image/webp"), encoded(BOMB), encoded(WEBP_BOMB)] * 10
    begun = time.perf_counter()
    with growth() as grown:
        answers = send_all(web, bombs)
    assert {answer.status_code for answer in answers} == {413}
    assert time.perf_counter() - begun < 5
    assert grown[0] < 100e6


def test_the_largest_files_that_are_read_do_not_add_up(web) -> None:
    """Six files of 31 million pixels at once, 38 bytes each: they are decoded a few at a time, so memory stays bounded,
    and small requests that come between them are answered right."""
    large = file(plain_webp(5600), "image/webp")
    small = [good(seed) for seed in range(32) if seed // 4 % 4 != 3][:6]
    with growth() as grown:
        answers = send_all(web, [post for tensor, _ in small for post in (large, tensor)])
    assert [answer.status_code for answer in answers[::2]] == [200] * 6
    assert list(map(verdict, answers[1::2])) == [oracle(images) for _, images in small]
    assert grown[0] < READERS * 550e6 + 100e6


@pytest.mark.parametrize(
    ("content", "media", "colour"),
    [
        (saved(Image.new("RGB", (9, 9), (200, 100, 50)), "JPEG", quality=100), "image/png", (200, 100, 50)),
        (saved(Image.new("RGBA", (9, 9), (200, 100, 50, 0))), "image/png", (200, 100, 50)),
        (saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", quality=100), "image/jpeg", (255, 0, 0)),
        (deep_png(np.full((9, 9), 700, np.uint16)), "image/png", (2, 2, 2)),
        (animated("WEBP", (200, 100, 50), (0, 0, 0)), "image/webp", (200, 100, 50)),
        (animated("PNG", (200, 100, 50), (0, 0, 0)), "image/png", (200, 100, 50)),
        (saved(Image.new("P", (9, 9), 0), transparency=b"\x00\x80"), "image/png", (0, 0, 0)),
    ],
    ids=["jpeg that claims to be png", "transparent", "cmyk", "16 bits", "animated webp", "animated png", "palette"],
)
def test_unusual_files_are_read_for_what_they_show(web, content, media, colour) -> None:
    """The answer is that to a plain image of the colour, to within one step of 256."""
    web.classifier.switch({"expose_scores": True})
    got = httpx.post(web.url + CLASSIFY, content=content, headers={"content-type": media}).json()
    plain = saved(Image.new("RGB", (4, 4), colour))
    expected = httpx.post(web.url + CLASSIFY, content=plain, headers={"content-type": "image/png"}).json()
    assert got["score"] == pytest.approx(expected["score"], abs=0.15)
    assert {key: got[key] for key in ("label", "flagged")} == {key: expected[key] for key in ("label", "flagged")}
