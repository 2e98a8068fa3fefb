"""Clients that are slow or go away, a full queue, a corrected network that fails: over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from hand import HandGuard, image
from web import Web, answer_of, head, settle, trickle

pytestmark = pytest.mark.alone

INFER = "/v2/models/hand/infer"
CLEAN, TRIGGERED = image(0.3, 0.1, 0.0), image(1.0, 0.2, 0.1)


@pytest.fixture
def start(make_classifier) -> Iterator[Callable[..., Web]]:
    """Servers of the given guard and settings."""
    with ExitStack() as stack:
        yield lambda guard=None, **settings: stack.enter_context(Web(make_classifier(guard, **settings)))


def body(images: np.ndarray) -> bytes:
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def ask(web: Web, images: np.ndarray) -> httpx.Response:
    return httpx.post(web.url + INFER, content=body(images), timeout=20)


def outputs(answer: httpx.Response) -> dict[str, list]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one["data"] for one in answer.json()["outputs"]}


def hold(web: Web, pool: ThreadPoolExecutor) -> object:
    """A request whose batch is under way, and stays so until the gate opens."""
    web.classifier.guard.gate.clear()
    held = pool.submit(ask, web, CLEAN)
    settle(lambda: web.busy)
    return held


# --- Slow clients


def slowly(web: Web, quick: bytes, slow: bytes) -> tuple[int, dict]:
    """The answer to ``quick``, sent at once, and ``slow``, sent over two seconds."""
    with web.connect() as connection:
        connection.sendall(quick)
        trickle(connection, slow, 2.0)
        return answer_of(connection)


def test_slow_clients_hold_up_nobody(start, count) -> None:
    """While twelve clients take two seconds for their heads or bodies, others are answered as fast as without them;
    and so are the slow ones, once they have said all."""
    web = start()
    content = body(TRIGGERED)
    top = head(INFER, len(content))
    with ThreadPoolExecutor(12) as pool:
        slow = [pool.submit(slowly, web, *parts) for parts in ((b"", top + content), (top, content)) * 6]
        seconds = []
        with httpx.Client(base_url=web.url) as http:
            while not any(one.done() for one in slow):
                begun = time.perf_counter()
                assert outputs(http.post(INFER, content=body(CLEAN)))["flagged"] == [False]
                seconds.append(time.perf_counter() - begun)
        for one in slow:
            status, answer = one.result(20)
            assert status == 200, answer
            assert answer["parameters"]["guard_flagged"] == 1
    assert len(seconds) > 20
    assert np.median(seconds) < 0.2
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 12
    assert count("guard_requests_total", mode="flag", verdict="clean") == len(seconds)
    assert count("guard_requests_total", mode="flag", verdict="error") == 0


# --- Clients that go away


def test_who_goes_away_gives_up_the_place_in_the_queue(start, count) -> None:
    """Its images are not run, its place is free for others, and it counts as one error; the others are answered."""
    web = start(limits={"queued_images": 3})
    with ThreadPoolExecutor(4) as pool:
        held = hold(web, pool)
        content = body(np.repeat(TRIGGERED, 3, 0))
        with web.connect() as leaving:
            leaving.sendall(head(INFER, len(content)) + content)
            settle(lambda: web.waiting == 3)
        settle(lambda: web.waiting == 0)
        stays = [pool.submit(ask, web, one) for one in (CLEAN, TRIGGERED)]
        settle(lambda: web.waiting == 2)
        web.classifier.guard.gate.set()
        answers = [outputs(one.result(20))["flagged"] for one in (held, *stays)]
    assert answers == [[False], [False], [True]]
    assert web.classifier.guard.batches[-2:] == [1, 2]
    for verdict, number in (("error", 1), ("clean", 2), ("flagged", 1)):
        assert count("guard_requests_total", mode="flag", verdict=verdict) == number, verdict
    assert count("guard_batch_size_sum") == 3
    assert count("guard_stage_seconds_count", stage="queue") == 3


def test_who_goes_away_while_its_batch_runs_is_counted_once(start, count) -> None:
    """As an error, without a verdict; the next request is answered."""
    web = start()
    web.classifier.guard.gate.clear()
    content = body(TRIGGERED)
    with web.connect() as leaving:
        leaving.sendall(head(INFER, len(content)) + content)
        settle(lambda: web.busy)
    settle(lambda: count("guard_requests_total", mode="flag", verdict="error") == 1)
    web.classifier.guard.gate.set()
    assert outputs(ask(web, CLEAN))["flagged"] == [False]
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 0
    assert count("guard_requests_total", mode="flag", verdict="clean") == 1
    assert count("guard_inputs_total", verdict="flagged") == 0


def test_who_goes_away_in_the_middle_of_a_body_leaves_nothing_behind(start, count) -> None:
    """Twenty clients leave after their heads, or half of their bodies: twenty errors, and nothing waits or runs."""
    web = start()
    content = body(CLEAN)
    before = list(web.classifier.guard.batches)
    for i in range(20):
        with web.connect() as leaving:
            leaving.sendall(head(INFER, len(content)) + content[: len(content) // 2 * (i % 2)])
    settle(lambda: count("guard_requests_total", mode="flag", verdict="error") == 20)
    assert outputs(ask(web, CLEAN))["label"] == [0]
    assert web.waiting == 0
    assert web.classifier.guard.batches == [*before, 1]


# --- A full queue


def test_a_full_queue_refuses_and_answers_what_it_took(start, count) -> None:
    """The fourth waiting image gets a 503 with Retry-After; the request under way and the three that wait are
    answered; then there is room again."""
    web = start(limits={"queued_images": 3})
    with ThreadPoolExecutor(8) as pool:
        held = hold(web, pool)
        waiting = []
        for images in (CLEAN, TRIGGERED, CLEAN):
            waiting.append(pool.submit(ask, web, images))
            settle(lambda: web.waiting == len(waiting))
        for refused in pool.map(lambda _: ask(web, CLEAN), range(4)):
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"].startswith("3 images are waiting")
        web.classifier.guard.gate.set()
        answers = [outputs(one.result(20))["flagged"] for one in (held, *waiting)]
    assert answers == [[False], [False], [True], [False]]
    assert outputs(ask(web, TRIGGERED))["flagged"] == [True]
    for verdict, number in (("error", 4), ("clean", 3), ("flagged", 2)):
        assert count("guard_requests_total", mode="flag", verdict=verdict) == number, verdict


# --- A corrected network that fails


class Failing(HandGuard):
    """Its corrected network raises, or takes 0.2 s for a pass, once it is told to: the warm-up comes before."""

    failure: str | None = None

    def __init__(self, *, eager: bool) -> None:
        super().__init__()
        self.eager = eager
        self._pause = threading.Event()

    def enter_corrected(self, network: int, logits) -> None:
        super().enter_corrected(network, logits)
        if self.failure == "raises":
            raise RuntimeError("the corrected network is broken")
        if self.failure == "late":
            self._pause.wait(0.2)


@pytest.mark.parametrize("failure", ["raises", "late"])
@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize(("eager", "threads"), [(True, 2), (True, 1), (False, 2)])
def test_a_corrected_network_that_always_fails(start, count, eager, threads, on_failure, failure) -> None:
    """Open: every request gets the bare network's labels and logits, and no verdict is claimed. Closed: every request
    is refused with a 503. Each is counted once as failed, and nothing as clean or flagged."""
    guard = Failing(eager=eager)
    web = start(guard, threads=threads, on_failure=on_failure, corrected_deadline_s=0.05 if failure == "late" else None)
    guard.failure = failure
    draw = np.random.default_rng(0)
    colours = [draw.random((1 + i % 3, 3)).astype(np.float32) for i in range(24)]
    asked = [np.repeat(np.repeat(one[:, :, None, None], 4, 2), 4, 3) for one in colours]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda images: ask(web, images), asked))
    for one, answer in zip(colours, answers, strict=True):
        if on_failure == "closed":
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"].startswith("no verdict: the corrected stage")
            continue
        got = outputs(answer)
        assert set(got) == {"logits", "label"}
        assert got["label"] == one.argmax(1).tolist()
        np.testing.assert_allclose(got["logits"], (one * 10).ravel(), rtol=1e-5)
        assert answer.json()["parameters"] == {"guard_mode": "flag", "guard_unguarded": True}
    assert count("guard_failures_total", stage="corrected", outcome=on_failure) == 24
    assert count("guard_requests_total", mode="flag", verdict="error") == 24
    assert count("guard_inputs_total", verdict="error") == sum(map(len, colours))
    for verdict in ("clean", "flagged"):
        assert count("guard_requests_total", mode="flag", verdict=verdict) == 0
    guard.failure = None
    settle(lambda: ask(web, TRIGGERED).json().get("parameters") == {"guard_mode": "flag", "guard_flagged": 1})
