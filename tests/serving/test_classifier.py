"""Queue, networks, policy and counters together, around a guard that can be worked out by hand."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import numpy as np
import pytest
from hand import HandGuard, ask, ask_together, serve

from deployments.errors import NoVerdict, PassFailed, QueueFull
from guard.errors import BadArtifact


def test_a_batch_gives_every_request_its_own_rows(make_classifier, clean, triggered) -> None:
    """Requests of different sizes that run as one batch get the answers that they would get alone."""
    classifier = make_classifier(mode="flag", expose_scores=True)
    requests = [clean, np.concatenate([triggered, clean]), triggered]
    answers = serve(classifier, lambda c: ask_together(c, *requests))
    assert classifier.guard.batches[-1] == 4
    assert [a.flagged.tolist() for a in answers] == [[False], [True, False], [True]]
    assert [a.corrected_label.tolist() for a in answers] == [[0], [1, 0], [1]]
    assert answers[2].score.tolist() == pytest.approx([7.0], abs=1e-5)
    assert answers[2].p_value.tolist() == pytest.approx([math.exp(-7)], rel=1e-4)


def test_one_bad_request_fails_alone(make_classifier, count, clean, triggered, paint) -> None:
    """When the network raises for one request of a batch, that one fails and the others are answered and counted."""
    classifier = make_classifier(mode="flag")
    classifier.guard.fail["original"] = 0.7
    good, bad, flagged = serve(classifier, lambda c: ask_together(c, clean, paint(0.7, 0, 0), triggered))
    assert good.label.tolist() == [0]
    assert flagged.flagged.tolist() == [True]
    assert isinstance(bad, PassFailed)
    assert count("guard_requests_total", mode="flag", verdict="error") == 1
    assert count("guard_requests_total", mode="flag", verdict="clean") == 2
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1
    assert count("guard_failures_total", stage="original", outcome="closed") == 1


@pytest.mark.parametrize("stage", ["corrected", "statistic"])
def test_open_answers_without_a_verdict(make_classifier, count, paint, stage) -> None:
    """If a later stage fails and on_failure is open, the original's answer leaves and says that it is unguarded."""
    classifier = make_classifier(mode="correct", on_failure="open")
    classifier.guard.fail[stage] = 0.7
    answer = serve(classifier, lambda c: ask(c, paint(0.7, 0.1, 0)))
    assert answer.label.tolist() == [0]
    assert answer.flagged is None
    assert answer.unguarded
    assert count("guard_failures_total", stage=stage, outcome="open") == 1
    assert count("guard_requests_total", mode="correct", verdict="error") == 1
    assert count("guard_inputs_total", verdict="error") == 1


@pytest.mark.parametrize("stage", ["corrected", "statistic"])
def test_closed_refuses_without_a_verdict(make_classifier, count, paint, stage) -> None:
    """If a later stage fails and on_failure is closed, the request is refused, and counted once."""
    classifier = make_classifier(mode="flag", on_failure="closed")
    classifier.guard.fail[stage] = 0.7
    with pytest.raises(NoVerdict, match=stage):
        serve(classifier, lambda c: ask(c, paint(0.7, 0.1, 0)))
    assert count("guard_failures_total", stage=stage, outcome="closed") == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 1


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2])
def test_a_late_verdict_is_a_failed_one(make_classifier, count, clean, monkeypatch, threads) -> None:
    """A corrected network that exceeds its deadline leaves the request unguarded; once it has ended, the next ones are
    judged."""
    classifier = make_classifier(mode="flag", corrected_deadline_s=0.05, threads=threads)

    async def scenario(c):
        prompt = c.guard.corrected
        monkeypatch.setattr(c.guard, "corrected", lambda *given: time.sleep(0.2) or prompt(*given))
        late = await ask(c, clean)
        monkeypatch.setattr(c.guard, "corrected", prompt)
        await asyncio.sleep(0.3)
        return late, await ask(c, clean)

    late, prompt = serve(classifier, scenario)
    assert late.unguarded
    assert not prompt.unguarded
    assert count("guard_failures_total", stage="corrected", outcome="open") == 1


@pytest.mark.alone
def test_observe_answers_before_the_second_pass(make_classifier, count, triggered, monkeypatch) -> None:
    """In observe mode the answer does not wait for the corrected network, and the verdict still reaches the metrics."""
    classifier = make_classifier(mode="observe")

    async def scenario(c):
        prompt = c.guard.corrected
        monkeypatch.setattr(c.guard, "corrected", lambda *given: time.sleep(0.2) or prompt(*given))
        started = time.perf_counter()
        answer = await ask(c, triggered)
        return answer, time.perf_counter() - started

    answer, seconds = serve(classifier, scenario)
    assert answer.flagged is None
    assert answer.label.tolist() == [0]
    assert seconds < 0.15
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1
    assert count("guard_flagged_total", predicted_class="ant") == 1


@pytest.mark.parametrize(("mode", "corrected", "rejected"), [("flag", 0, 0), ("reject", 0, 2), ("correct", 2, 0)])
def test_the_counters_tell_what_was_done(make_classifier, count, clean, triggered, mode, corrected, rejected) -> None:
    """Two flagged images and a clean one in two requests: every counter has the value counted by hand."""
    classifier = make_classifier(mode=mode)

    async def scenario(c):
        await ask(c, np.concatenate([triggered, clean, triggered]))
        await ask(c, clean)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode=mode, verdict="flagged") == 1
    assert count("guard_requests_total", mode=mode, verdict="clean") == 1
    assert count("guard_requests_total", mode=mode, verdict="error") == 0
    assert count("guard_inputs_total", verdict="flagged") == 2
    assert count("guard_inputs_total", verdict="clean") == 2
    assert count("guard_flagged_total", predicted_class="ant") == 2
    assert count("guard_corrected_total") == corrected
    assert count("guard_rejected_total") == rejected
    assert count("guard_score_count") == 4
    assert count("guard_score_bucket", le="0.5") == 2
    assert count("guard_p_value_sum") == pytest.approx(2 + 2 * math.exp(-7), abs=1e-4)
    for stage in ("queue", "original", "corrected", "statistic"):
        assert count("guard_stage_seconds_count", stage=stage) == 2


def test_requests_that_run_together_count_as_alone(make_classifier, count, clean, triggered) -> None:
    """One batch of six requests, after the one that kept the networks busy, is counted request by request."""
    classifier = make_classifier(mode="correct", max_batch_size=32)
    many = np.concatenate([clean, triggered, clean, clean, clean, clean])
    requests = [clean, many, triggered, clean, np.concatenate([triggered, triggered]), clean]
    serve(classifier, lambda c: ask_together(c, *requests))
    assert classifier.guard.batches[-1] == 12
    assert count("guard_requests_total", mode="correct", verdict="flagged") == 3
    assert count("guard_requests_total", mode="correct", verdict="clean") == 4
    assert count("guard_inputs_total", verdict="flagged") == count("guard_flagged_total", predicted_class="ant") == 4
    assert count("guard_inputs_total", verdict="clean") == 9
    assert count("guard_predicted_total", predicted_class="ant") == 13
    assert count("guard_corrected_total") == 4
    assert count("guard_score_count") == count("guard_p_value_count") == 13
    assert count("guard_input_brightness_count") == count("guard_input_contrast_count") == 11  # four of the six
    assert count("guard_stage_seconds_count", stage="queue") == 7


def test_counting_that_fails_costs_no_answer(make_classifier, count, clean, triggered, monkeypatch) -> None:
    """Each request of the batch has its verdict, and none counts twice."""
    classifier = make_classifier(mode="flag")
    images = classifier.metrics.images

    def fail(*requests: object) -> None:
        images(*requests)
        raise OSError("no room")

    monkeypatch.setattr(classifier.metrics, "images", fail)
    answers = serve(classifier, lambda c: ask_together(c, clean, triggered, clean))
    assert [answer.flagged.tolist() for answer in answers] == [[False], [True], [False]]
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1
    assert count("guard_requests_total", mode="flag", verdict="clean") == 3  # one kept the networks busy
    assert count("guard_requests_total", mode="flag", verdict="error") == 0


def test_a_report_that_fails_costs_no_answer(make_classifier, count, triggered, monkeypatch) -> None:
    """The flagged request is answered and counted all the same, once."""
    classifier = make_classifier(mode="flag")

    def fail(*_arguments: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(classifier._reports, "offer", fail)
    answer = serve(classifier, lambda c: ask(c, triggered))
    assert answer.flagged.tolist() == [True]
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 0
    assert count("guard_inputs_total", verdict="error") == 0


def test_shedding_is_an_error_that_is_counted(make_classifier, count, clean) -> None:
    """A request beyond the queue's capacity is refused at once, and counts as an error."""
    classifier = make_classifier(mode="flag", limits={"queued_images": 1})

    async def scenario(c):
        c.guard.gate.clear()
        tasks = []
        for _ in range(2):
            tasks.append(asyncio.create_task(ask(c, clean)))
            await asyncio.sleep(0.02)
        with pytest.raises(QueueFull):
            await ask(c, clean)
        c.guard.gate.set()
        await asyncio.gather(*tasks)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="flag", verdict="error") == 1
    assert count("guard_requests_total", mode="flag", verdict="clean") == 2


def test_a_stuck_pass_is_unhealthy(make_classifier, clean) -> None:
    """While a pass takes longer than it may, the health check raises; afterwards it passes again."""
    classifier = make_classifier(stuck_after_s=0.05)

    async def scenario(c):
        c.check()
        c.guard.gate.clear()
        task = asyncio.create_task(ask(c, clean))
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="running for more than"):
            c.check()
        c.guard.gate.set()
        await task
        await asyncio.sleep(0.01)
        c.check()

    serve(classifier, scenario)


def test_switching_is_per_request(make_classifier, triggered) -> None:
    """A request keeps the settings that it came under, whatever is switched while it waits."""
    classifier = make_classifier(mode="flag")

    async def scenario(c):
        c.guard.gate.clear()
        before = asyncio.create_task(ask(c, triggered))
        await asyncio.sleep(0.02)
        c.switch({"mode": "reject"})
        after = asyncio.create_task(ask(c, triggered))
        await asyncio.sleep(0.02)
        c.guard.gate.set()
        return await asyncio.gather(before, after)

    before, after = serve(classifier, scenario)
    assert (before.mode, before.label.tolist()) == ("flag", [0])
    assert (after.mode, after.label.tolist()) == ("reject", [-1])


def test_a_bad_switch_changes_nothing(make_classifier) -> None:
    """Settings that do not check are refused without an exception, which would cost the replica."""
    classifier = make_classifier(mode="flag", expose_scores=True)
    before = classifier.live
    for values in ({"mode": "block"}, {"mod": "flag"}, {"expose_scores": "perhaps"}):
        classifier.switch(values)
        assert classifier.live is before


def test_both_networks_run_at_the_same_time(make_classifier, clean) -> None:
    """Where every image takes the corrected network and there are two threads, it starts before the original is
    finished."""
    guard = HandGuard()
    guard.eager = True
    classifier = make_classifier(guard, mode="flag", threads=2)

    async def scenario(c):
        finish = c.guard.finish
        started = threading.Event()
        corrected = c.guard.corrected
        c.guard.corrected = lambda *given: started.set() or corrected(*given)
        c.guard.finish = lambda shared: started.wait(5) and finish(shared)
        return await ask(c, clean)

    assert serve(classifier, scenario).label.tolist() == [0]


def test_a_threshold_flags_in_place_of_the_artifacts(make_classifier, paint) -> None:
    """Requests of one batch under different thresholds are each judged by their own."""
    classifier = make_classifier(mode="flag")
    weak = paint(0.5, 0.2, 0.1)  # score 3 − 1 = 2 above 3 − 2 = 1: S = 2, p = exp(−2)

    async def scenario(c):
        c.guard.gate.clear()
        held = asyncio.create_task(ask(c, weak))
        await asyncio.sleep(0.02)
        strict = asyncio.create_task(ask(c, weak))
        await asyncio.sleep(0.02)
        c.switch({"mode": "flag", "threshold": 0.5})
        loose = asyncio.create_task(ask(c, weak))
        await asyncio.sleep(0.02)
        c.guard.gate.set()
        return await asyncio.gather(held, strict, loose)

    assert [bool(answer.flagged[0]) for answer in serve(classifier, scenario)] == [False, False, True]


def test_a_sample_is_judged_and_the_rest_is_counted(make_classifier, count, triggered, monkeypatch) -> None:
    """In observe mode a share of the requests gets no verdict, takes no corrected network, and counts as skipped."""
    classifier = make_classifier(mode="observe", sample=0.5)
    draws = iter([0.1, 0.9, 0.9, 0.2])
    monkeypatch.setattr("random.random", lambda: next(draws))

    async def scenario(c):
        return [await ask(c, triggered) for _ in range(4)]

    assert [answer.label.tolist() for answer in serve(classifier, scenario)] == [[0]] * 4
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 2
    assert count("guard_requests_total", mode="observe", verdict="skipped") == 2
    assert count("guard_inputs_total", verdict="skipped") == 2
    assert [size for _, size in classifier.guard.corrected_batches] == [1, 32, 2]  # warm-up, then the two drawn


def test_a_new_artifact_takes_over_without_a_pause(make_classifier, count, triggered) -> None:
    """Requests before, during and after a change are answered; the version and the series change with the artifact."""
    classifier = make_classifier(mode="flag")

    async def scenario(c):
        asking = [asyncio.create_task(ask(c, triggered)) for _ in range(3)]
        new = HandGuard()
        new.fingerprint = "f" * 64
        await c.replace(new, "2")
        asking += [asyncio.create_task(ask(c, triggered)) for _ in range(3)]
        return await asyncio.gather(*asking)

    answers = serve(classifier, scenario)
    assert [answer.flagged.tolist() for answer in answers] == [[True]] * 6
    assert classifier.model.version == "2"
    assert classifier.facts()["guard_fingerprint"] == "f" * 64
    old, new = HandGuard.fingerprint, "f" * 64
    assert count("guard_artifact_info", method="mmdf", fingerprint=old, version="1") == 0
    assert count("guard_artifact_info", method="mmdf", fingerprint=new, version="2") == 1


def test_an_artifact_of_another_model_is_refused(make_classifier, triggered) -> None:
    """Other classes under the same name would turn the answers' meaning: the old artifact serves on."""
    classifier = make_classifier(mode="flag")

    async def scenario(c):
        new = HandGuard()
        new.classes = ("ant", "bee", "dog")
        with pytest.raises(BadArtifact, match="classes: hand serves"):
            await c.replace(new, "2")
        return await ask(c, triggered)

    assert serve(classifier, scenario).flagged.tolist() == [True]
    assert classifier.model.version == "1"


def test_an_answer_names_the_version_that_gave_it(make_classifier, triggered) -> None:
    """A request that came before a change and ran after it is answered by the new artifact, under its name."""
    classifier = make_classifier(mode="flag")

    async def scenario(c):
        c.guard.gate.clear()
        held = asyncio.create_task(ask(c, triggered))
        await asyncio.sleep(0.02)
        queued = asyncio.create_task(ask(c, triggered))
        await asyncio.sleep(0.02)
        old = c.guard
        await c.replace(HandGuard(), "2")
        old.gate.set()
        return await asyncio.gather(held, queued)

    assert [answer.version for answer in serve(classifier, scenario)] == ["1", "2"]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_wedged_corrected_network_is_unhealthy(make_classifier, clean, threads) -> None:
    """Answers may go on unguarded meanwhile; the health check says that something is wrong."""
    classifier = make_classifier(mode="flag", corrected_deadline_s=0.02, stuck_after_s=0.1, threads=threads)

    async def scenario(c):
        c.guard.corrected_gate.clear()
        try:
            answer = await ask(c, clean)
            await asyncio.sleep(0.15)
            with pytest.raises(RuntimeError, match="has been running for more than"):
                c.check()
        finally:
            c.guard.corrected_gate.set()
        return answer

    assert serve(classifier, scenario).unguarded


def test_swaps_without_traffic_free_what_they_replace(make_classifier) -> None:
    """A replaced artifact is let go at once where no batch runs."""
    classifier = make_classifier(mode="flag")

    async def scenario(c):
        for number in range(3):
            await c.replace(HandGuard(), str(number))
        return len(c._retired)

    assert serve(classifier, scenario) == 0


def test_a_threshold_that_flags_nothing_is_not_taken(make_classifier, caplog) -> None:
    """The settings in force stay, and the log says why."""
    classifier = make_classifier(mode="flag")
    classifier.guard.manifest = {**classifier.guard.manifest, "threshold": {"p_value_floor": 0.004, "score": 1.0}}
    before = classifier.live
    classifier.switch({"mode": "flag", "threshold": 0.004})
    assert classifier.live == before
    assert "below 0.004 no image is flagged" in caplog.text


def test_the_threshold_in_force_is_told(make_classifier, count) -> None:
    """A live threshold shows in the metadata and in its series."""
    classifier = make_classifier(mode="flag")
    classifier.switch({"mode": "flag", "threshold": 0.001})
    assert classifier.facts()["guard_threshold"] == 0.001
    assert count("guard_threshold") == 0.001
