"""A guard that asks its corrected networks about some images only: who waits, what runs, what is told."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from hand import HandSuspicion, RealSuspicion, ask, image, one_batch, serve

from deployments.engine.catalogue import Catalogue
from deployments.errors import NoVerdict
from deployments.http.ingress import build_http_app

ANT = image(0.3, 0.1, 0.0)  # logits [3, 1, 0]: ant, the suspected class; its corrected network agrees: score −0.5
BEE = image(0.1, 0.3, 0.0)  # logits [1, 3, 0]: bee; no corrected network is asked: score −2
TRIGGERED = image(1.0, 0.2, 0.1)  # logits [10, 2, 1]: ant; its corrected network says bee: score 0.5


@pytest.fixture(params=[HandSuspicion, RealSuspicion])
def suspicion(request) -> type[HandSuspicion]:
    """A guard that suspects class 0 (ant) alone: worked out by hand, and computed by a real network."""
    return request.param


def test_who_needs_no_corrected_network_does_not_wait(make_classifier, count, suspicion) -> None:
    """Of one batch, the requests without suspects are answered and counted while the others' corrected pass is still
    blocked; then those are answered too."""
    classifier = make_classifier(suspicion(), mode="flag")

    async def scenario(c):
        c.guard.corrected_gate.clear()
        flagged, clear, mixed, two = await one_batch(c, TRIGGERED, BEE, np.concatenate([BEE, ANT]), BEE, first=BEE)
        early = await asyncio.gather(clear, two)
        assert not flagged.done()
        assert not mixed.done()
        assert count("guard_requests_total", mode="flag", verdict="clean") == 3
        assert count("guard_score_count") == 3
        c.guard.corrected_gate.set()
        return early, await asyncio.gather(flagged, mixed)

    early, late = serve(classifier, scenario)
    assert classifier.guard.batches[-1] == 5
    assert [answer.label.tolist() for answer in early] == [[1], [1]]
    assert [answer.flagged.tolist() for answer in (*early, *late)] == [[False], [False], [True], [False, False]]
    assert [answer.corrected_label.tolist() for answer in late] == [[1], [1, 0]]
    assert count("guard_requests_total", mode="flag", verdict="clean") == 4
    assert count("guard_requests_total", mode="flag", verdict="flagged") == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 0


def test_a_corrected_network_sees_its_suspects_alone(make_classifier, suspicion) -> None:
    """Each of two corrected networks runs once a batch, on the images sent to its class and no others."""
    classifier = make_classifier(suspicion(targets=(0, 1)), mode="flag")
    cat = image(0, 0, 0.3)

    async def scenario(c):
        c.guard.corrected_batches.clear()
        requests = [ANT, np.concatenate([cat, TRIGGERED, BEE]), cat, np.concatenate([ANT, cat])]
        return await asyncio.gather(*await one_batch(c, *requests, first=cat))

    answers = serve(classifier, scenario)
    assert sorted(classifier.guard.corrected_batches) == [(0, 3), (1, 1)]
    assert [answer.flagged.tolist() for answer in answers] == [[False], [False, True, False], [False], [False, False]]


def test_without_suspects_the_later_stages_do_not_exist(make_classifier, count, suspicion) -> None:
    """A request without suspects is one visit to the network's thread: its later stages are not run, nor timed."""
    classifier = make_classifier(suspicion(), mode="correct", threads=1)

    async def scenario(c):
        visits = []
        thread = c._passes._first
        submit = thread.submit
        thread.submit = lambda *given: visits.append(given) or submit(*given)
        await ask(c, np.concatenate([BEE, BEE]))
        without = len(visits)
        await ask(c, ANT)
        return without, len(visits) - without

    assert serve(classifier, scenario) == (1, 2)
    for stage, visits in (("original", 2), ("corrected", 1), ("statistic", 1)):
        assert count("guard_stage_seconds_count", stage=stage) == visits


def test_nothing_detected_is_nothing_corrected(make_classifier, count, suspicion) -> None:
    """A guard that suspects no class answers every image as the original does, flags none, and corrects nothing."""
    classifier = make_classifier(suspicion(targets=()), mode="reject")

    async def scenario(c):
        tasks = await one_batch(c, TRIGGERED, np.concatenate([ANT, BEE]), first=BEE)
        return await asyncio.gather(*tasks)

    answers = serve(classifier, scenario)
    assert classifier.guard.corrected_batches == []
    assert [answer.label.tolist() for answer in answers] == [[0], [0, 1]]
    assert count("guard_inputs_total", verdict="clean") == 4
    assert count("guard_stage_seconds_count", stage="corrected") == 0


@pytest.mark.parametrize(
    ("mode", "label", "corrected_label", "logits"),
    [
        ("observe", 0, None, [10, 2, 1]),
        ("flag", 0, 1, [10, 2, 1]),
        ("reject", -1, -1, [0, 0, 0]),
        ("correct", 1, 1, [0, 2, 1]),
    ],
)
def test_each_mode_answers_a_disagreement(
    make_classifier, count, suspicion, mode, label, corrected_label, logits
) -> None:
    """An image on which the corrected network decides otherwise is observed, told, withheld or corrected, and counted;
    its neighbours in the same request pass."""
    classifier = make_classifier(suspicion(), mode=mode)
    answer = serve(classifier, lambda c: ask(c, np.concatenate([TRIGGERED, BEE, ANT])))
    assert answer.label.tolist() == [label, 1, 0]
    assert answer.logits[0].tolist() == pytest.approx(logits, abs=1e-5)
    assert answer.logits[1:].ravel().tolist() == pytest.approx([1, 3, 0, 3, 1, 0], abs=1e-5)
    if mode == "observe":
        assert answer.flagged is None
    else:
        assert answer.flagged.tolist() == [True, False, False]
        assert answer.corrected_label.tolist() == [corrected_label, 1, 0]
    assert count("guard_requests_total", mode=mode, verdict="flagged") == 1
    assert count("guard_flagged_total", predicted_class="ant") == 1
    assert count("guard_inputs_total", verdict="clean") == 2
    assert count("guard_corrected_total") == (mode == "correct")
    assert count("guard_rejected_total") == (mode == "reject")


def test_observe_counts_those_without_suspects_too(make_classifier, count, suspicion) -> None:
    """In observe mode no answer waits for a corrected network, and every verdict reaches the metrics, once."""
    classifier = make_classifier(suspicion(), mode="observe")

    async def scenario(c):
        c.guard.corrected_gate.clear()
        answers = await asyncio.gather(*await one_batch(c, TRIGGERED, BEE, first=BEE))
        assert count("guard_requests_total", mode="observe", verdict="clean") == 2
        assert count("guard_requests_total", mode="observe", verdict="flagged") == 0
        c.guard.corrected_gate.set()
        return answers

    assert [answer.label.tolist() for answer in serve(classifier, scenario)] == [[0], [1]]
    assert count("guard_requests_total", mode="observe", verdict="flagged") == 1
    assert count("guard_inputs_total", verdict="clean") == 2


@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_a_failing_corrected_network_fails_its_suspects_alone(make_classifier, count, suspicion, on_failure) -> None:
    """When a corrected network raises on one request, the others of the batch have their verdicts, each counted once;
    the one is answered unguarded, or refused."""
    classifier = make_classifier(suspicion(), mode="flag", on_failure=on_failure)
    bad = image(0.7, 0.0, 0.1)

    async def scenario(c):
        c.guard.fail["corrected"] = 0.7
        tasks = await one_batch(c, BEE, bad, TRIGGERED, np.concatenate([BEE, ANT]), first=BEE)
        return await asyncio.gather(*tasks, return_exceptions=True)

    clear, failed, flagged, mixed = serve(classifier, scenario)
    assert clear.flagged.tolist() == [False]
    assert flagged.flagged.tolist() == [True]
    assert mixed.flagged.tolist() == [False, False]
    if on_failure == "open":
        assert (failed.unguarded, failed.label.tolist(), failed.flagged) == (True, [0], None)
    else:
        assert isinstance(failed, NoVerdict)
    assert count("guard_failures_total", stage="corrected", outcome=on_failure) == 1
    for verdict, requests in (("error", 1), ("flagged", 1), ("clean", 3)):
        assert count("guard_requests_total", mode="flag", verdict=verdict) == requests
    for verdict, images in (("error", 1), ("flagged", 1), ("clean", 4)):
        assert count("guard_inputs_total", verdict=verdict) == images


def test_a_failing_statistic_is_told_as_such(make_classifier, count, suspicion) -> None:
    """A verdict that cannot be worked out on a request without suspects is a failure of that stage, not of the
    network: with on_failure open the request is answered."""
    classifier = make_classifier(suspicion(), mode="flag", on_failure="open")
    classifier.guard.fail["statistic"] = 0.2
    answer = serve(classifier, lambda c: ask(c, image(0.2, 0.5, 0.0)))
    assert (answer.unguarded, answer.label.tolist()) == (True, [1])
    assert count("guard_failures_total", stage="statistic", outcome="open") == 1


def test_a_late_corrected_network_leaves_the_others_alone(make_classifier, count, suspicion) -> None:
    """Beyond its deadline a corrected pass has failed for the requests that wait for it, and for no other."""
    classifier = make_classifier(suspicion(), mode="flag", corrected_deadline_s=0.05)

    async def scenario(c):
        c.guard.corrected_gate.clear()
        answers = await asyncio.gather(*await one_batch(c, ANT, BEE, first=BEE))
        c.guard.corrected_gate.set()
        return answers

    late, clear = serve(classifier, scenario)
    assert late.unguarded
    assert clear.flagged.tolist() == [False]
    assert count("guard_failures_total", stage="corrected", outcome="open") == 1


def test_who_has_gone_is_not_counted(make_classifier, count, suspicion) -> None:
    """A client that leaves while its request runs is no verdict, whether or not the request has suspects."""
    classifier = make_classifier(suspicion(), mode="flag")

    async def scenario(c):
        c.guard.gate.clear()
        for images in (BEE, ANT):
            held = asyncio.create_task(ask(c, images))
            await asyncio.sleep(0.02)
            held.cancel()
        c.guard.gate.set()
        await ask(c, BEE)

    serve(classifier, scenario)
    assert count("guard_requests_total", mode="flag", verdict="clean") == 1
    assert count("guard_requests_total", mode="flag", verdict="error") == 2
    assert count("guard_score_count") == 1


def test_every_corrected_network_is_warm_before_the_first_request(make_classifier, suspicion) -> None:
    """Black images are of class 0; still the corrected networks of classes 1 and 2 have run in both batch sizes."""
    classifier = make_classifier(suspicion(targets=(1, 2)), max_batch_size=8)

    async def nothing(_classifier):
        pass

    serve(classifier, nothing)
    assert classifier.guard.batches == [1, 8]
    assert sorted(classifier.guard.corrected_batches) == [(0, 1), (0, 8), (1, 1), (1, 8)]


def test_one_corrected_network_is_warmed_up_once_a_size(make_classifier) -> None:
    """A guard that sends every class to the same corrected network does not pay for each class."""
    classifier = make_classifier(max_batch_size=8)

    async def nothing(_classifier):
        pass

    serve(classifier, nothing)
    assert classifier.guard.corrected_batches == [(0, 1), (0, 8)]


@pytest.mark.parametrize("images", [BEE, TRIGGERED])
def test_a_p_value_that_is_not_there_is_left_out(make_classifier, count, suspicion, images) -> None:
    """With expose_scores both protocols show the score and no p-value, even asked for by name; neither the metadata
    nor the metrics tell of a threshold."""
    classifier = make_classifier(suspicion(), mode="flag", expose_scores=True)
    app = build_http_app(Catalogue([classifier]), "9.9")
    tensor = {"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": images.ravel().tolist()}
    score = 0.5 if images is TRIGGERED else -2.0

    async def main():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://g") as http,
        ):
            infer = "/v2/models/hand/infer"
            every = (await http.post(infer, json={"inputs": [tensor]})).json()
            named = [{"name": "p_value"}, {"name": "score"}]
            asked = (await http.post(infer, json={"inputs": [tensor], "outputs": named})).json()
            plain = (await http.post("/v1/models/hand:predict", json={"instances": images.tolist()})).json()
            about = (await http.get("/v2/models/hand")).json()
        return every, asked, plain, about

    every, asked, plain, about = asyncio.run(main())
    assert [one["name"] for one in every["outputs"]] == ["logits", "label", "flagged", "corrected_label", "score"]
    assert [(one["name"], one["data"]) for one in asked["outputs"]] == [("score", pytest.approx([score], abs=1e-5))]
    (row,) = plain["predictions"]
    assert row["score"] == pytest.approx(score, abs=1e-5)
    assert "p_value" not in row
    assert about["parameters"]["guard_method"] == "bna"
    assert "guard_threshold" not in about["parameters"]
    assert count("guard_score_count") == 3
    assert count("guard_p_value_count") == 0
    assert count("guard_threshold") is None
    assert count("guard_nominal_false_positive_ratio") is None
