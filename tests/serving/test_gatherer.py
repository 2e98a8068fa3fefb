"""What nobody waits for is gathered: nothing is lost, nothing waits for ever."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from hand import HandGuard, ask, serve

from deployments.engine.gatherer import Gatherer


def gathered(entries: list[tuple[int, int]], *, pause: float = 0.0, **settings: float) -> list[list[int]]:
    """The batches in which entries (name, size) were run."""
    ran: list[list[int]] = []

    async def run(batch: list[int]) -> None:
        await asyncio.sleep(pause)
        ran.append(list(batch))

    async def scenario() -> None:
        gatherer: Gatherer[int] = Gatherer(run, **{"enough": 4, "patience_s": 60, "capacity": 8} | settings)
        for name, size in entries:
            await gatherer.put(name, size)
        await gatherer.close()

    asyncio.run(scenario())
    return ran


def test_entries_run_together_in_their_order() -> None:
    """Ten entries of one image each, five being enough: at most four runs, in order, none twice."""
    ran = gathered([(name, 1) for name in range(10)], enough=5)
    assert [name for batch in ran for name in batch] == list(range(10))
    assert len(ran) <= 4


def test_what_waits_runs_at_the_end_without_patience() -> None:
    """Closing does not wait for company."""
    begun = time.perf_counter()
    assert gathered([(0, 1)]) == [[0]]
    assert time.perf_counter() - begun < 5


def test_the_oldest_waits_no_longer_than_its_patience() -> None:
    """A lone entry runs once its patience is over."""

    async def scenario() -> float:
        done = asyncio.Event()

        async def run(_batch: list[int]) -> None:
            done.set()

        gatherer: Gatherer[int] = Gatherer(run, enough=4, patience_s=0.1, capacity=8)
        begun = time.perf_counter()
        await gatherer.put(0, 1)
        await asyncio.wait_for(done.wait(), 10)
        seconds = time.perf_counter() - begun
        await gatherer.close()
        return seconds

    assert 0.09 < asyncio.run(scenario()) < 5


def test_no_more_waits_than_there_is_room_for() -> None:
    """While a run takes its time, no more than the capacity is taken in; an entry larger than that passes alone."""
    sizes = {0: 3, 1: 3, 2: 3, 3: 20, 4: 1}
    seen: list[int] = []

    async def scenario() -> None:
        gatherer: Gatherer[int]

        async def run(batch: list[int]) -> None:
            seen.append(sum(sizes[name] for name in batch))
            await asyncio.sleep(0.02)

        gatherer = Gatherer(run, enough=1, patience_s=60, capacity=6)
        for name, size in sizes.items():
            await gatherer.put(name, size)
            assert gatherer._size <= max(6, size)
        await gatherer.close()

    asyncio.run(scenario())
    assert sum(seen) == 30
    assert 20 in seen


def test_a_failing_run_is_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """What comes after a run that raised is run all the same, and the log tells."""
    ran: list[int] = []

    async def run(batch: list[int]) -> None:
        if 0 in batch:
            raise RuntimeError("told to fail")
        ran.extend(batch)

    async def scenario() -> None:
        gatherer: Gatherer[int] = Gatherer(run, enough=1, patience_s=0, capacity=1)
        for name in range(3):
            await gatherer.put(name, 1)
        await gatherer.close()

    asyncio.run(scenario())
    assert ran == [1, 2]
    assert "told to fail" in caplog.text


def test_observed_requests_share_corrected_passes(make_classifier, count, clean, triggered) -> None:
    """Twelve requests one after the other, answered at once: their verdicts take at most three corrected passes, and
    each is counted as its own."""
    classifier = make_classifier(mode="observe", max_batch_size=8)

    async def scenario(c) -> None:
        before = len(c.guard.corrected_batches)
        for index in range(12):
            await ask(c, triggered if index % 3 == 0 else clean)
        await c._later.close()
        assert len(c.guard.corrected_batches) - before <= 3

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 4
    assert count("guard_requests_total", mode="observe", verdict="clean") == 8
    assert count("guard_flagged_total", predicted_class="ant") == 4


def test_one_bad_verdict_fails_alone(make_classifier, count, clean, triggered, paint) -> None:
    """Of gathered requests one whose corrected pass fails is counted as failed open, and the others keep theirs."""
    classifier = make_classifier(mode="observe")
    classifier.guard.fail["corrected"] = 0.7

    async def scenario(c) -> None:
        answers = [await ask(c, image) for image in (clean, paint(0.7, 0.1, 0), triggered)]
        assert all(answer.label.tolist() == [0] for answer in answers)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="observe", verdict="clean") == 1
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1
    assert count("guard_requests_total", mode="observe", verdict="error") == 1
    assert count("guard_failures_total", stage="corrected", outcome="open") == 1


def test_a_new_artifact_does_not_judge_what_came_before(make_classifier, count, triggered) -> None:
    """Requests that wait for their verdict while the artifact is replaced get that of the one that answered them."""
    first, second = HandGuard(), HandGuard()
    second.threshold = 1e-9
    classifier = make_classifier(first, mode="observe", max_batch_size=64)

    async def scenario(c) -> None:
        for _ in range(3):
            await ask(c, triggered)
        await c.replace(second, "2")
        for _ in range(2):
            await ask(c, triggered)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 3
    assert count("guard_requests_total", mode="observe", verdict="clean") == 2


def test_values_that_are_not_by_rows_run_batch_by_batch(make_classifier, count, triggered, monkeypatch) -> None:
    """Where what the networks share cannot be joined, every batch has a pass of its own, and nothing is lost."""
    classifier = make_classifier(mode="observe")
    guard = classifier.guard
    finish, corrected = guard.finish, guard.corrected
    shared = guard.shared
    monkeypatch.setattr(guard, "shared", lambda images: (shared(images), 7))
    monkeypatch.setattr(guard, "finish", lambda values: finish(values[0]))
    monkeypatch.setattr(guard, "corrected", lambda logits, values: corrected(logits, values[0]))

    async def scenario(c) -> None:
        for _ in range(3):
            await ask(c, np.concatenate([triggered, triggered]))

    serve(classifier, scenario)
    assert count("guard_inputs_total", verdict="flagged") == 6


def test_what_the_sample_leaves_out_takes_no_pass(make_classifier, count, clean, triggered, monkeypatch) -> None:
    """Of four requests of one batch of which two are drawn, the corrected network sees these two images alone."""
    classifier = make_classifier(mode="observe", sample=0.5)
    draws = iter([0.9, 0.1, 0.9, 0.1])
    monkeypatch.setattr("random.random", lambda: next(draws))

    async def scenario(c) -> None:
        before = len(c.guard.corrected_batches)
        c.guard.gate.clear()
        asking = [asyncio.create_task(ask(c, image)) for image in (clean, clean, triggered, triggered)]
        await asyncio.sleep(0.05)
        c.guard.gate.set()
        await asyncio.gather(*asking)
        await c._later.close()
        assert sum(size for _, size in c.guard.corrected_batches[before:]) == 2

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1
    assert count("guard_requests_total", mode="observe", verdict="clean") == 1
    assert count("guard_requests_total", mode="observe", verdict="skipped") == 2


def test_what_nobody_waits_for_has_no_deadline(make_classifier, count, triggered, monkeypatch) -> None:
    """A gathered pass that takes longer than the deadline of answers still gives its verdicts."""
    classifier = make_classifier(mode="observe", corrected_deadline_s=0.01)

    async def scenario(c) -> None:
        corrected = c.guard.corrected
        monkeypatch.setattr(c.guard, "corrected", lambda *given: time.sleep(0.1) or corrected(*given))
        for _ in range(3):
            await ask(c, triggered)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 3
    assert count("guard_requests_total", mode="observe", verdict="error") == 0


def test_a_broken_correction_leaves_the_original_alone(make_classifier, count, paint) -> None:
    """Where corrected passes fail, each request is counted as failed, and the original network runs once for each."""
    classifier = make_classifier(mode="observe")
    classifier.guard.fail["corrected"] = 0.7
    image = paint(0.7, 0.1, 0)

    async def scenario(c) -> int:
        before = len(c.guard.batches)
        for _ in range(4):
            await ask(c, image)
        await c._later.close()
        return len(c.guard.batches) - before

    assert serve(classifier, scenario) == 4
    assert count("guard_requests_total", mode="observe", verdict="error") == 4
    assert count("guard_failures_total", stage="corrected", outcome="open") == 4


def test_an_artifact_that_went_is_freed_once_its_verdicts_are_there(make_classifier, clean) -> None:
    """The passes of a replaced artifact stay while verdicts are to come from them, and no longer."""
    classifier = make_classifier(mode="observe")

    async def scenario(c) -> None:
        await ask(c, clean)
        old = c._passes
        await c.replace(HandGuard(), "2")
        assert c._retired == [old]
        await c._later.close()
        c._close_retired()
        assert c._retired == []

    serve(classifier, scenario)
