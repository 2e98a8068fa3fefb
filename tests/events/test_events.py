"""Events for flagged requests: what they say, that they arrive, and that no answer waits for them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand import HandGuard, ask, image, serve
from PIL import Image
from web import settle

from deployments.config import ModelConfig
from deployments.engine.metrics import Metrics
from deployments.engine.wrapped import Wrapped
from deployments.events.sender import Sender
from deployments.events.settings import EventSettings
from deployments.events.sinks import FileSink
from deployments.settings import checked
from guard.errors import BadSetting

CLEAN, TRIGGERED = image(0.3, 0.1, 0.0), image(1.0, 0.2, 0.1)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
HEADERS = {"Traceparent": TRACE, "X-Request-ID": "order 66"}


async def send(classifier, images, headers=HEADERS):
    with classifier.visit() as live:
        return await classifier.infer(images, live, headers)


def test_a_verdict_says_what_an_administrator_asks(make, receiver, counted) -> None:
    """One flagged image of two: one event with every attribute, and both images' figures, though answers have none."""
    classifier = make(mode="reject", version="3", events={"url": receiver.url, "service": "shop"})
    answer = serve(classifier, lambda c: send(c, np.concatenate([CLEAN, TRIGGERED])))
    assert answer.score is None
    ((headers, event),) = receiver.got
    assert headers["content-type"] == "application/cloudevents+json"
    data, identity = event.pop("data"), event.pop("id")
    moment = event.pop("time")
    assert len(identity) == 36
    assert moment.endswith("Z")
    assert event == {
        "specversion": "1.0",
        "source": "/v2/models/hand#verdict",
        "type": "org.backdoor-guard.verdict",
        "datacontenttype": "application/json",
        "component": "predictor",
        "endpoint": "default",
        "inferenceservicename": "shop",
        "namespace": "default",
        "traceparent": TRACE,
        "model": "hand",
        "version": "3",
        "mode": "reject",
        "fingerprint": HandGuard.fingerprint,
    }
    assert data["request"] == "order 66"
    clean, flagged = data["images"]
    assert (clean["flagged"], flagged["flagged"]) == (False, True)
    assert (flagged["label"], flagged["predicted_class"], flagged["corrected_label"]) == (0, "ant", 1)
    assert flagged["score"] == pytest.approx(7.0, abs=1e-5)
    assert flagged["p_value"] == pytest.approx(np.exp(-7), rel=1e-4)
    assert counted("guard_events_total") == {"sent": 1}


def test_attribute_names_are_those_that_cloudevents_allow(make, receiver) -> None:
    """Lower-case letters and digits, of 20 at most, and no empty value."""
    serve(make(events={"url": receiver.url, "payloads": True}), lambda c: send(c, TRIGGERED))
    assert len(receiver.events) == 3
    for event in receiver.events:
        assert all(name.isalnum() and name == name.lower() and len(name) <= 20 for name in event)
        assert all(isinstance(event[name], str) and event[name] for name in event if name != "data")


def test_payloads_are_pairs_that_the_id_joins(make, receiver, counted) -> None:
    """The images as PNG, and the answer as it left; source and id together are never the same."""
    serve(make(mode="correct", events={"url": receiver.url, "payloads": True}), lambda c: send(c, TRIGGERED))
    verdict, request, response = receiver.events
    assert request["type"] == "org.kubeflow.serving.inference.request"
    assert response["type"] == "org.kubeflow.serving.inference.response"
    assert verdict["id"] == request["id"] == response["id"]
    assert len({event["source"] for event in receiver.events}) == 3
    (tensor,) = request["data"]["inputs"]
    assert tensor["shape"] == [1, 3, 4, 4]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(tensor["data"][0]))))
    assert pixels.shape == (4, 4, 3)
    assert pixels[0, 0].tolist() == [255, 51, 26]
    outputs = {output["name"]: output["data"] for output in response["data"]["outputs"]}
    assert outputs["label"] == [1]
    assert "score" not in outputs
    assert response["data"]["id"] == "order 66"
    assert counted("guard_events_total") == {"sent": 3}


def test_clean_requests_are_no_events(make, receiver, counted) -> None:
    """Nobody is told of what is not flagged, payloads or not."""
    classifier = make(events={"url": receiver.url, "payloads": True})
    serve(classifier, lambda c: send(c, np.concatenate([CLEAN] * 5)))
    assert receiver.got == []
    assert counted("guard_events_total") == {}


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {},
        {"traceparent": "rubbish", "x-request-id": "a\x1b[2Jb"},
        {"traceparent": TRACE + "-x"},
        {"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"},
        {"x-request-id": "9" * 999},
    ],
)
def test_headers_that_cannot_be_told_are_left_out(make, receiver, headers) -> None:
    """An id with control characters, or without end, and a trace that is none."""
    serve(make(events={"url": receiver.url}), lambda c: send(c, TRIGGERED, headers))
    (event,) = receiver.events
    assert "traceparent" not in event
    assert event["data"]["request"] is None


def test_a_wrapped_original_has_events_too(registry, receiver) -> None:
    """In mode observe the verdict follows the answer, and its event the verdict, even as the server closes."""

    class Elsewhere:
        async def logits(self, images, headers):
            return (images.mean((2, 3)) * 10).astype(np.float32)

        async def check(self) -> None: ...

        async def close(self) -> None: ...

    config = ModelConfig(artifact="artifacts/hand", mode="observe", events={"url": receiver.url})
    wrapped = Wrapped(HandGuard(), config, Metrics("hand", HandGuard.classes, registry=registry), Elsewhere())
    assert serve(wrapped, lambda c: send(c, TRIGGERED)).flagged is None
    (event,) = receiver.events
    assert (event["mode"], event["traceparent"]) == ("observe", TRACE)
    assert event["data"]["images"][0]["flagged"]


def test_an_infinite_score_is_told_as_a_number(make, receiver) -> None:
    """JSON knows no infinity."""

    class Boundless(HandGuard):
        def verdict(self, logits, corrected_logits, *, threshold=None):
            found = super().verdict(logits, corrected_logits, threshold=threshold)
            return found._replace(score=found.score * float("inf"))

    serve(make(Boundless(), events={"url": receiver.url}), lambda c: send(c, TRIGGERED))
    assert receiver.events[0]["data"]["images"][0]["score"] > 1e38


def test_secrets_of_headers_come_from_the_environment(make, receiver, monkeypatch) -> None:
    """They are sent, and neither shown by the settings nor repeated in an error."""
    monkeypatch.setenv("BROKER", "s3cret")
    classifier = make(events={"url": receiver.url, "headers": {"Authorization": "Bearer ${BROKER}"}})
    serve(classifier, lambda c: send(c, TRIGGERED))
    assert receiver.got[0][0]["authorization"] == "Bearer s3cret"
    assert "BROKER" not in repr(classifier.config)
    with pytest.raises(BadSetting, match=r"events\.headers\.a: the environment has no NOT_SET"):
        Sender("hand", checked(EventSettings, {"url": "http://u", "headers": {"a": "${NOT_SET}"}}), lambda *_: None)
    with pytest.raises(BadSetting) as caught:
        checked(ModelConfig, {"artifact": "a", "events": {"url": "http://u", "headers": {"a": ["s3cret"]}}})
    assert "s3cret" not in str(caught.value)


def test_what_may_pass_is_tried_again(make, receiver, counted, monkeypatch) -> None:
    """A server that is busy gets the event once more; one that refuses it does not."""
    monkeypatch.setattr("deployments.events.sinks.BACKOFF_S", 0.01)
    receiver.statuses = [503, 429, 202, 400, 202]

    async def three(c):
        for _ in range(3):
            await send(c, TRIGGERED)

    serve(make(events={"url": receiver.url}), three)
    assert counted("guard_events_total") == {"sent": 2, "failed": 1}
    assert len(receiver.got) == 5
    assert len({event["id"] for event in receiver.events[:3]}) == 1


@pytest.mark.alone
def test_a_slow_sink_delays_no_answer(make, receiver, counted) -> None:
    """While the sink holds the first event, 50 flagged requests are answered in the time that they take without it;
    what does not fit into the queue is dropped and counted, and closing takes no longer than the flush."""
    receiver.gate.clear()

    async def fifty(c):
        began = time.perf_counter()
        for _ in range(50):
            assert (await send(c, TRIGGERED)).flagged.all()
        return time.perf_counter() - began

    without = serve(make_quiet(), fifty)
    began = time.perf_counter()
    held = serve(make(events={"url": receiver.url, "queued": 8, "timeout_s": 20}), fifty)
    total = time.perf_counter() - began
    assert held < 3 * without + 0.2
    assert total < held + 4.5
    assert counted("guard_events_total")["dropped"] >= 49 - 8
    receiver.gate.set()
    settle(lambda: sum(counted("guard_events_total").values()) == 50)


def make_quiet():
    """The same classifier without events, with series of its own."""
    from prometheus_client import CollectorRegistry

    from deployments.engine.classifier import Classifier

    metrics = Metrics("hand", HandGuard.classes, registry=CollectorRegistry())
    return Classifier(HandGuard(), ModelConfig(artifact="artifacts/hand"), metrics)


def test_a_dead_sink_is_counted_and_logged_once(make, counted, caplog, monkeypatch) -> None:
    """Nobody listens: the answers leave, the events fail, and the log has one line that keeps the address's secrets."""
    monkeypatch.setattr("deployments.events.sinks.BACKOFF_S", 0.01)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/hook/s3cret?key=s3cret"

        async def three(c):
            return [await send(c, TRIGGERED) for _ in range(3)]

        answers = serve(make(events={"url": url, "retries": 1}), three)
    assert all(answer.flagged.all() for answer in answers)
    assert counted("guard_events_total") == {"failed": 3}
    lines = [record.getMessage() for record in caplog.records if "events of hand" in record.getMessage()]
    assert len(lines) == 1
    assert "cannot be reached" in lines[0]
    assert "s3cret" not in lines[0]


def test_images_that_wait_are_bounded_in_bytes(make, receiver, counted) -> None:
    """With payloads, images wait in memory: those beyond the bound are dropped, though the queue has places."""
    receiver.gate.clear()
    size = TRIGGERED.nbytes + 2 * 3 * 4  # and two rows of logits
    classifier = make(events={"url": receiver.url, "payloads": True, "queued_bytes": 2 * size, "timeout_s": 20})

    async def five(c):
        await send(c, TRIGGERED)
        await asyncio.to_thread(settle, lambda: len(receiver.got) == 1)  # it waits no more
        for _ in range(4):
            await send(c, TRIGGERED)
        dropped = counted("guard_events_total")
        receiver.gate.set()
        return dropped

    assert serve(classifier, five) == {"dropped": 2 * 3}
    assert counted("guard_events_total") == {"dropped": 6, "sent": 9}


def test_a_file_has_a_line_an_event_and_is_private(make, tmp_path: Path, counted) -> None:
    """Mode 0600, also where the file was there with another; each line an event of its own."""
    file = tmp_path / "new" / "events.jsonl"
    file.parent.mkdir()
    file.touch(0o644)

    async def two(c):
        await send(c, TRIGGERED)
        await send(c, TRIGGERED)

    serve(make(events={"file": file}), two)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["org.backdoor-guard.verdict"] * 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert counted("guard_events_total") == {"sent": 2}


def test_writers_share_a_file_that_rotates(tmp_path: Path) -> None:
    """Four threads with sinks of their own: every line is whole and there once, no file is larger than it may be."""
    file, number = tmp_path / "events.jsonl", 60

    def write(writer: int) -> None:
        sink = FileSink(file, max_bytes=1000, keep=100)
        for index in range(number):
            sink.send({"writer": writer, "index": index})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [one for one in tmp_path.iterdir() if not one.name.startswith(".")]
    assert len(files) > 4
    assert all(one.stat().st_size <= 1000 and stat.S_IMODE(one.stat().st_mode) == 0o600 for one in files)
    found = [json.loads(line) for one in files for line in one.read_text().splitlines()]
    assert sorted((one["writer"], one["index"]) for one in found) == [(w, i) for w in range(4) for i in range(number)]


def test_the_oldest_file_goes(tmp_path: Path) -> None:
    """Of rotated files as many stay as are wanted: the newest."""
    sink = FileSink(tmp_path / "e", max_bytes=1, keep=2)
    for index in range(5):
        sink.send({"index": index})
    found = {one.name: json.loads(one.read_text())["index"] for one in tmp_path.iterdir() if one.name[0] != "."}
    assert found == {"e": 4, "e.1": 3, "e.2": 2}


def test_no_link_is_followed(make, tmp_path: Path, counted) -> None:
    """Whoever can write beside the file cannot choose where events go."""
    (tmp_path / "events").symlink_to(tmp_path / "elsewhere")
    answer = serve(make(events={"file": tmp_path / "events"}), lambda c: ask(c, TRIGGERED))
    assert answer.flagged.all()
    assert not (tmp_path / "elsewhere").exists()
    assert counted("guard_events_total") == {"failed": 1}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, "events.url"),
        ({"url": "http://u", "file": "/f"}, "events.url"),
        ({"url": "u:80"}, "events.url"),
        ({"url": "ftp://u"}, "events.url"),
        ({"url": "http://u:port"}, "events.url"),
        ({"url": "http://me:s3cret@u"}, "events.url"),
        ({"file": "events.jsonl"}, "events.file"),
        ({"file": "/f", "headers": {"a": "b"}}, "events.headers"),
        ({"url": "http://u", "headers": {"Content-Type": "b"}}, "events.headers"),
        ({"url": "http://u", "sink": "b"}, "events.sink"),
        ({"url": "http://u", "queued": 0}, "events.queued"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name(settings: dict[str, Any], field: str) -> None:
    """What cannot be meant is refused before anything starts, without the secrets in it."""
    with pytest.raises(BadSetting) as caught:
        checked(ModelConfig, {"artifact": "a", "events": settings})
    assert caught.value.field == field
    assert "s3cret" not in str(caught.value)
