"""A real Ray Serve with two replicas, a real artifact, real HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from processes import alive, descendants, start, wait_for
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import guard
from benchmarks.processes import title
from deployments.config import ModelConfig, ServeConfig
from deployments.document import document
from deployments.proxies import free_port
from deployments.serve import running
from guard.types import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own use of pydantic


def draw(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 8, 8] whose class is the brightest quadrant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.rand(count, 3, 8, 8, generator=generator) * 0.4
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 0.1 + 0.5 * torch.rand(1, generator=generator)
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's artifact. Its threshold is so lax that many clean images are flagged."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    images, labels = draw(256, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    fitted = guard.fit(model.eval(), images[:120], labels[:120], settings=guard.FitSettings(fpr=0.4))
    return fitted.save(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """uint8 [24, 3, 8, 8], unseen by the fit."""
    return (draw(24, seed=1)[0] * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def verdict(artifact: Path, pictures: np.ndarray) -> Verdict:
    """What the library itself says of ``pictures``, without any server."""
    expected = guard.load(artifact)(torch.from_numpy(pictures.astype(np.float32) / np.float32(255)))
    assert 0 < int(expected.flagged.sum()) < len(pictures), "the figures below need flagged and clean images"
    return expected


@pytest.fixture(scope="module")
def url(artifact: Path, environment: None) -> Iterator[str]:
    """Two replicas in mode flag."""
    config = ServeConfig(models=[ModelConfig(artifact=artifact)], replicas=2, cpus_per_replica=0.1)
    with running(document(config, host="127.0.0.1", port=free_port()), proxy="serve") as server:
        yield server.url


def tensor(images: np.ndarray) -> dict:
    data = images.ravel().tolist()
    return {"inputs": [{"name": "images", "shape": list(images.shape), "datatype": "UINT8", "data": data}]}


def outputs(answer: httpx.Response) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: np.array(one["data"]).reshape(one["shape"]) for one in answer.json()["outputs"]}


def counters(url: str) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of their names) → value."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_server_says_what_the_library_says(url: str, pictures: np.ndarray, verdict: Verdict) -> None:
    """Labels, flags and logits over HTTP are those of the library called directly."""
    got = outputs(httpx.post(f"{url}/v2/models/tiny/infer", json=tensor(pictures)))
    np.testing.assert_array_equal(got["label"], verdict.label)
    np.testing.assert_array_equal(got["flagged"], verdict.flagged)
    np.testing.assert_array_equal(got["corrected_label"], verdict.corrected_label)
    np.testing.assert_allclose(got["logits"], verdict.logits, atol=1e-4)
    assert "score" not in got


def test_every_mode_is_served(url: str, artifact: Path, pictures: np.ndarray, verdict: Verdict) -> None:
    """The three other modes, each an application of the same builder, give the labels that the verdict demands."""
    from ray import serve

    from deployments import app

    label, corrected, flagged = (field.numpy() for field in (verdict.label, verdict.corrected_label, verdict.flagged))
    expected = {"observe": label, "reject": np.where(flagged, -1, label), "correct": corrected}
    serve.run_many(
        [
            serve.RunTarget(
                app.application(ServeConfig(models=[ModelConfig(artifact=artifact, mode=mode)], cpus_per_replica=0.1)),
                name=mode,
                route_prefix=f"/{mode}",
            )
            for mode in expected
        ]
    )
    for mode, labels in expected.items():
        got = outputs(httpx.post(f"{url}/{mode}/v2/models/tiny/infer", json=tensor(pictures)))
        np.testing.assert_array_equal(got["label"], labels, err_msg=mode)
        assert ("flagged" in got) is (mode != "observe")
    for mode in expected:
        serve.delete(mode)


def test_counters_are_exact_over_two_replicas(url: str, pictures: np.ndarray, verdict: Verdict) -> None:
    """After 120 concurrent requests, one in six of them bad, every counter has grown by the number sent, and no good
    request has suffered from a bad one in its batch."""
    before = counters(url)
    bad = tensor(pictures[:1]) | {"outputs": [{"name": "nothing"}]}

    def send(i: int) -> int:
        body = bad if i % 6 == 5 else tensor(pictures[i % 24 : i % 24 + 1])
        answer = client.post(f"{url}/v2/models/tiny/infer", json=body)
        if i % 6 != 5:
            assert outputs(answer)["label"].tolist() == [int(verdict.label[i % 24])]
        return answer.status_code

    with httpx.Client() as client, ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(send, range(120)))
    assert statuses == [400 if i % 6 == 5 else 200 for i in range(120)]
    after = counters(url)
    grown = {key: after[key] - before[key] for key in after}
    flagged = sum(bool(verdict.flagged[i % 24]) for i in range(120) if i % 6 != 5)
    assert grown["guard_requests_total", "flag", "tiny", "error"] == 20
    assert grown["guard_requests_total", "flag", "tiny", "flagged"] == flagged
    assert grown["guard_requests_total", "flag", "tiny", "clean"] == 100 - flagged
    assert grown["guard_inputs_total", "tiny", "flagged"] == flagged
    assert grown["guard_inputs_total", "tiny", "clean"] == 100 - flagged
    assert grown["guard_score_count", "tiny"] == grown["guard_p_value_count", "tiny"] == 100
    assert grown["guard_batch_size_sum", "tiny"] == 100
    assert grown["guard_stage_seconds_count", "tiny", "total"] == 120
    assert after["guard_threshold", "tiny"] == 0.4


@pytest.mark.parametrize(
    ("path", "content", "content_type", "status", "field"),
    [
        ("/v2/models/tiny/infer", b"{", "application/json", 400, "body"),
        ("/v2/models/other/infer", b"{}", "application/json", 404, "model_name"),
        ("/v2/models/tiny/infer", b" " * (16 * 2**20 + 1), "application/json", 413, "body"),
        ("/classify", b"GIF89a", "image/gif", 415, "content-type"),
        ("/v1/models/tiny:predict", b'{"instances": [[[[2]]]]}', "application/json", 422, "instances"),
    ],
)
def test_each_kind_of_refusal_reaches_the_client(url, path, content, content_type, status, field) -> None:
    """One request of every status: JSON that names the field comes through the proxy as it left the replica."""
    answer = httpx.post(url + path, content=content, headers={"content-type": content_type}, timeout=30)
    assert (answer.status_code, answer.json()["field"]) == (status, field)


def statuses_until_nobody_listens(url: str) -> set[int]:
    """The statuses of requests made one after the other, all with a JSON body."""
    found = set()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(url, timeout=30)
        except httpx.TransportError:
            break
        answer.json()
        found.add(answer.status_code)
    return found


def test_the_command_ends_cleanly(artifact: Path, environment: None) -> None:
    """`guard serve` answers its own example; on Ctrl-C to its whole group requests are answered or refused with 503 as
    long as anyone listens, the exit status is 0, and no process of it is left. (SIGTERM: test_reload_e2e.)"""
    port = free_port()
    process = start(str(artifact), "--port", str(port), "--mode", "correct", "--name", "named")
    try:
        line = ready_line(process)
        assert f"http://127.0.0.1:{port}" in line
        example = subprocess.run(
            line.split("try: ")[1], shell=True, capture_output=True, text=True, timeout=30, check=True
        )
        assert '"model":"named"' in example.stdout
        family = descendants(process.pid)
        assert len(family) > 3
        os.killpg(process.pid, signal.SIGINT)
        statuses = statuses_until_nobody_listens(f"http://127.0.0.1:{port}/v2/models/named")
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert statuses <= {200, 503}
    assert 503 in statuses
    wait_for(lambda: not any(alive(pid) for pid in family), 10)


def test_a_taken_port_is_one_sentence(artifact: Path) -> None:
    """A port that another process listens on gives exit status 2 and a sentence, before Ray starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(str(artifact), "--port", str(port))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"guard serve: port {port}")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("proxy", ["haproxy", "serve"])
def test_a_port_that_is_taken_meanwhile_is_the_last_line(artifact: Path, environment: None, proxy: str) -> None:
    """By another process, in the seconds in which Ray starts."""
    port = free_port()
    process = start(str(artifact), "--port", str(port), "--proxy", proxy)
    try:
        wait_for(lambda: any("gcs_server" in title(pid) for pid in descendants(process.pid)), 60)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"guard serve: port {port} on 127.0.0.1 cannot be used")


def test_a_missing_artifact_is_one_sentence(tmp_path: Path) -> None:
    """A folder without an artifact gives exit status 2 and a sentence that names it."""
    process = start(str(tmp_path / "nothing"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nothing" in errors
    assert len(errors.splitlines()) == 1


def ready_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("guard: serving"):
            return line.strip()
    raise AssertionError(f"ended with {process.wait()} before it was ready")
