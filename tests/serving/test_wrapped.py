"""A classifier whose original's logits come from elsewhere: joined per request, and never held by one another."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hand import HandGuard, HandSuspicion, ask, image, serve
from prometheus_client import CollectorRegistry

from deployments.config import ModelConfig
from deployments.engine.classifier import Classifier
from deployments.engine.comparison import UpstreamMismatch
from deployments.engine.metrics import Metrics
from deployments.engine.wrapped import Wrapped
from deployments.errors import NoVerdict, ShuttingDown, UpstreamBusy, UpstreamFailed, UpstreamUnfit

BEE = image(0.1, 0.3, 0.0)


class HandOriginal:
    """`HandGuard`'s logits, times ``factor``. ``error`` is raised instead, ``gates`` holds the requests with a red of
    that value, ``down`` is what `check` raises; ``asked`` records the sizes of the requests, ``headers`` theirs."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.error: Exception | None = None
        self.down: Exception | None = None
        self.gates: dict[float, asyncio.Event] = {}
        self.asked: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.closed = False

    async def logits(self, images, headers):
        self.asked.append(len(images))
        self.headers.append(dict(headers))
        for red, gate in self.gates.items():
            if abs(float(images[0, 0, 0, 0]) - red) < 1e-6:
                await gate.wait()
        if self.error is not None:
            raise self.error
        return (images.mean((2, 3)) * 10 * self.factor).astype(np.float32)

    async def check(self) -> None:
        if self.down is not None:
            raise self.down

    async def close(self) -> None:
        self.closed = True


def eager(**fail: float) -> HandGuard:
    guard = HandGuard(**fail)
    guard.eager = True
    return guard


@pytest.fixture
def original() -> HandOriginal:
    return HandOriginal()


@pytest.fixture
def wrap(registry: CollectorRegistry, original: HandOriginal) -> Callable[..., Wrapped]:
    """A classifier named "hand" around ``original``; keywords are settings."""

    def make(guard: HandGuard | None = None, tolerance: float | None = None, **settings) -> Wrapped:
        metrics = Metrics("hand", HandGuard.classes, registry=registry)
        config = ModelConfig(artifact="artifacts/hand", **settings)
        return Wrapped(guard or eager(), config, metrics, original, tolerance=tolerance, watch_s=0.02)

    return make


@pytest.mark.parametrize("kind", [eager, HandGuard])
def test_the_verdict_is_that_of_both_networks_together(wrap, make_classifier, clean, triggered, kind) -> None:
    """Label, flag, score and correction are those of a classifier that runs both networks itself."""
    images = np.concatenate([clean, triggered, BEE])
    wrapped = serve(wrap(kind(), mode="correct", expose_scores=True), lambda c: ask(c, images))
    assert wrapped.flagged.tolist() == [False, True, False]
    assert wrapped.label.tolist() == [0, 1, 1]
    assert wrapped.score.tolist() == pytest.approx([0, 7, 0], abs=1e-5)
    assert wrapped.p_value[1] == pytest.approx(math.exp(-7), rel=1e-4)


def test_the_same_as_a_classifier_that_runs_both(wrap, clean, triggered) -> None:
    """Every field of the answer agrees with that of `Classifier` on the same images, where only some are suspects."""
    images = np.concatenate([clean, triggered, BEE])
    wrapped = serve(wrap(HandSuspicion(), mode="flag", expose_scores=True), lambda c: ask(c, images))
    config = ModelConfig(artifact="artifacts/hand", mode="flag", expose_scores=True)
    metrics = Metrics("other", HandGuard.classes, registry=CollectorRegistry())
    own = serve(Classifier(HandSuspicion(), config, metrics), lambda c: ask(c, images))
    for name, ours, theirs in zip(own._fields, own, wrapped, strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_allclose(theirs, ours, atol=1e-5, err_msg=name)
        else:
            assert ours == theirs, name


def test_the_corrected_network_runs_while_the_original_is_asked(wrap, original, clean) -> None:
    """Where every image takes the corrected network, it has run before the original's answer is there."""
    original.gates[0.3] = asyncio.Event()
    guard = eager()
    ran = threading.Event()

    async def scenario(c):
        inside = guard.corrected
        guard.corrected = lambda *given: (inside(*given), ran.set())[0]
        task = asyncio.create_task(ask(c, clean))
        assert await asyncio.to_thread(ran.wait, 5)
        assert not task.done()
        original.gates[0.3].set()
        return await task

    assert serve(wrap(guard, mode="flag"), scenario).flagged.tolist() == [False]


def test_a_slow_answer_holds_nobody_else(wrap, original, count, clean, triggered) -> None:
    """While the original's answer to one request is awaited, the others get theirs, verdict included."""
    original.gates[0.3] = asyncio.Event()

    async def scenario(c):
        slow = asyncio.create_task(ask(c, clean))
        quick = await asyncio.gather(*(ask(c, triggered) for _ in range(5)))
        assert not slow.done()
        original.gates[0.3].set()
        return quick, await slow

    quick, slow = serve(wrap(mode="flag"), scenario)
    assert [answer.flagged.tolist() for answer in quick] == [[True]] * 5
    assert slow.flagged.tolist() == [False]
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 5
    assert count("guard_stage_seconds_count", stage="upstream") == 6


def test_only_suspects_take_a_corrected_network(wrap, original, count) -> None:
    """A guard that suspects one class sees the logits first, and runs nothing for images of the others."""
    guard = HandSuspicion()

    async def scenario(c):
        guard.batches.clear()
        without = await ask(c, np.concatenate([BEE, BEE]))
        assert guard.batches == []
        mixed = await ask(c, np.concatenate([BEE, image(1.0, 0.2, 0.1), BEE]))
        return without, mixed

    without, mixed = serve(wrap(guard, mode="flag"), scenario)
    assert guard.batches == [1]
    assert without.flagged.tolist() == [False, False]
    assert mixed.flagged.tolist() == [False, True, False]
    assert mixed.corrected_label.tolist() == [1, 1, 1]
    assert count("guard_inputs_total", verdict="clean") == 4


@pytest.mark.parametrize("kind", [eager, HandSuspicion])
def test_observe_answers_with_the_logits(wrap, original, count, triggered, kind) -> None:
    """In observe mode the answer leaves while the corrected network is held; its verdict still reaches the metrics."""
    guard = kind()

    async def scenario(c):
        guard.corrected_gate.clear()
        answer = await ask(c, triggered)
        assert count("guard_requests_total", mode="observe", verdict="flagged") == 0
        guard.corrected_gate.set()
        return answer

    answer = serve(wrap(guard, mode="observe"), scenario)
    assert (answer.label.tolist(), answer.flagged) == ([0], None)
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1
    assert original.closed


def test_what_follows_an_answer_is_bounded(wrap, count, triggered) -> None:
    """In observe mode no more verdicts are pending than the queue holds; the others are given up and counted, and
    every answer leaves."""
    guard = eager()

    async def scenario(c):
        guard.corrected_gate.clear()
        answers = [await ask(c, triggered) for _ in range(20)]
        await asyncio.sleep(0.02)
        assert len(c._verdicts) <= 4
        guard.corrected_gate.set()
        return answers

    limits = {"queued_images": 3}
    answers = serve(wrap(guard, mode="observe", max_batch_size=1, limits=limits), scenario)
    assert [answer.label.tolist() for answer in answers] == [[0]] * 20
    followed = count("guard_requests_total", mode="observe", verdict="flagged")
    given_up = count("guard_failures_total", stage="queue", outcome="open")
    assert 3 <= followed <= 5
    assert followed + given_up == 20


def test_a_sample_leaves_the_rest_alone(wrap, original, count, triggered, monkeypatch) -> None:
    """In observe mode who is not drawn gets the original's answer and takes no corrected network."""
    draws = iter([0.9, 0.1])
    monkeypatch.setattr("random.random", lambda: next(draws))
    guard = eager()

    async def scenario(c):
        guard.corrected_batches.clear()
        return [await ask(c, triggered) for _ in range(2)]

    serve(wrap(guard, mode="observe", sample=0.5), scenario)
    assert guard.corrected_batches == [(0, 1)]
    assert count("guard_requests_total", mode="observe", verdict="skipped") == 1
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1


@pytest.mark.parametrize("mode", ["flag", "observe"])
@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_without_the_original_there_is_no_answer(wrap, original, count, clean, mode, on_failure) -> None:
    """If the original cannot be asked, on_failure changes nothing: its error reaches the client, counted once."""

    async def scenario(c):
        original.error = UpstreamBusy("busy", 7)
        with pytest.raises(UpstreamBusy) as caught:
            await ask(c, clean)
        return caught.value.retry_after_s

    assert serve(wrap(mode=mode, on_failure=on_failure), scenario) == 7
    assert count("guard_failures_total", stage="upstream", outcome="closed") == 1
    assert count("guard_requests_total", mode=mode, verdict="error") == 1
    assert count("guard_inputs_total", verdict="error") == 1
    assert count("guard_stage_seconds_count", stage="upstream") == 1


@pytest.mark.parametrize("stage", ["corrected", "statistic"])
@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_without_a_verdict_on_failure_decides(wrap, count, paint, stage, on_failure) -> None:
    """If the guard's half fails, the original's answer leaves unguarded, or the request is refused; counted once."""
    guard = eager(**{stage: 0.7})
    bad = paint(0.7, 0.1, 0)

    async def scenario(c):
        return (await asyncio.gather(ask(c, bad), return_exceptions=True))[0]

    answer = serve(wrap(guard, mode="flag", on_failure=on_failure), scenario)
    if on_failure == "closed":
        assert isinstance(answer, NoVerdict)
    else:
        assert (answer.unguarded, answer.label.tolist(), answer.flagged) == (True, [0], None)
    assert count("guard_failures_total", stage=stage, outcome=on_failure) == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 1
    assert count("guard_inputs_total", verdict="error") == 1


def test_one_bad_request_fails_alone(wrap, count, clean, triggered, paint) -> None:
    """Of requests whose corrected passes run as one batch, the one that makes it raise is answered unguarded."""
    guard = eager(corrected=0.7)

    async def scenario(c):
        guard.gate.clear()
        held = asyncio.create_task(ask(c, clean))
        await asyncio.sleep(0.02)
        tasks = [asyncio.create_task(ask(c, images)) for images in (clean, paint(0.7, 0, 0), triggered)]
        await asyncio.sleep(0.02)
        guard.gate.set()
        await held
        return await asyncio.gather(*tasks)

    good, bad, flagged = serve(wrap(guard, mode="flag"), scenario)
    assert 3 in guard.batches
    assert good.flagged.tolist() == [False]
    assert bad.unguarded
    assert flagged.flagged.tolist() == [True]


def test_a_late_verdict_is_a_failed_one(wrap, count, clean) -> None:
    """Beyond its deadline the corrected network leaves the request unguarded."""
    guard = eager()

    async def scenario(c):
        guard.corrected_gate.clear()
        answer = await ask(c, clean)
        guard.corrected_gate.set()
        return answer

    assert serve(wrap(guard, mode="flag", corrected_deadline_s=0.05), scenario).unguarded
    assert count("guard_failures_total", stage="corrected", outcome="open") == 1


def test_who_leaves_takes_both_halves_along(wrap, original, count, clean, triggered) -> None:
    """A client that goes away while the original is asked is an error, no verdict, and leaves nothing in the queue."""
    original.gates[0.3] = asyncio.Event()
    guard = eager()

    async def scenario(c):
        guard.gate.clear()
        tasks = [asyncio.create_task(ask(c, clean)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        guard.gate.set()
        guard.batches.clear()
        await ask(c, triggered)

    serve(wrap(guard, mode="flag", max_batch_size=1), scenario)
    assert len(guard.batches) <= 2
    assert count("guard_requests_total", mode="flag", verdict="error") == 3
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1
    assert count("guard_failures_total", stage="upstream", outcome="closed") == 0


def test_headers_reach_the_original(wrap, original, clean) -> None:
    """What the request came with is there for the original to choose from."""

    async def scenario(c):
        with c.visit() as live:
            await c.infer(clean, live, {"traceparent": "00-1"})
            await c.infer(clean, live)

    serve(wrap(mode="flag"), scenario)
    assert original.headers == [{"traceparent": "00-1"}, {}]


def test_another_network_does_not_start(wrap, original) -> None:
    """An original with other logits than the guard's is refused at start, with what to do."""
    original.factor = 0.8
    with pytest.raises(UpstreamMismatch, match="tolerance 5%"):
        serve(wrap(tolerance=0.05), lambda c: None)
    assert original.closed


def test_an_answer_of_another_form_does_not_start(wrap, original) -> None:
    """An original whose answers cannot be read is refused at start, with the field that is wrong."""
    original.error = UpstreamUnfit("upstream: no tensor", field="upstream.output")
    with pytest.raises(UpstreamMismatch) as caught:
        serve(wrap(tolerance=0.05), lambda c: None)
    assert caught.value.field == "upstream.output"


def test_an_original_that_comes_later_is_waited_for(wrap, original, count, clean, triggered) -> None:
    """Without the original the model starts, is not ready, and refuses; once it is there, it is compared, and used."""
    original.down = UpstreamFailed("upstream: it cannot be reached")

    async def scenario(c):
        assert not c.ready
        c.check()
        with pytest.raises(UpstreamFailed, match="cannot be reached"):
            await ask(c, clean)
        assert original.asked == []
        original.down = None
        await until(lambda: c.ready)
        assert sum(original.asked) == 8
        return await ask(c, triggered)

    assert serve(wrap(tolerance=0.05), scenario).flagged.tolist() == [True]
    assert count("guard_failures_total", stage="upstream", outcome="closed") == 1


def test_an_original_that_comes_back_is_compared_again(wrap, original, clean) -> None:
    """While it is away the model is not ready; if another network comes back, requests are refused until the right one
    does."""

    async def scenario(c):
        assert c.ready
        original.down = UpstreamFailed("upstream: it cannot be reached")
        await until(lambda: not c.ready)
        original.factor, original.down = 2.0, None
        await until(lambda: not c._trusted)
        with pytest.raises(UpstreamFailed, match="not the network"):
            await ask(c, clean)
        assert not c.ready
        original.factor = 1.0
        await until(lambda: c.ready)
        return await ask(c, clean)

    assert serve(wrap(tolerance=0.05), scenario).label.tolist() == [0]


def test_a_new_artifact_is_compared_before_it_serves(wrap, original, triggered) -> None:
    """One for another network is refused, and the old one serves on; the right one takes over."""

    async def scenario(c):
        wrong = eager()
        finish = wrong.finish
        wrong.finish = lambda shared: finish(shared) * 2
        with pytest.raises(UpstreamMismatch):
            await c.replace(wrong, "2")
        assert c.model.version == "1"
        await c.replace(HandSuspicion(), "3")
        return await ask(c, triggered)

    classifier = wrap(tolerance=0.05, mode="flag")
    assert serve(classifier, scenario).flagged.tolist() == [True]
    assert classifier.model.version == "3"


def test_a_closed_one_refuses(wrap, clean) -> None:
    """After close a request is told to go elsewhere, whatever on_failure says."""
    classifier = wrap(mode="flag", on_failure="open")

    async def scenario(c):
        pass

    serve(classifier, scenario)
    with pytest.raises(ShuttingDown):
        asyncio.run(ask(classifier, clean))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)
