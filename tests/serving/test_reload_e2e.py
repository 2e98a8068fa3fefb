"""`guard serve CONFIG.yaml` as a process, with HAProxy in front: reloads under load lose nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from hand import bna_artifact, image
from processes import alive, descendants, replicas, start, stop, wait_for

from deployments.proxies import free_port

ANT, TRIGGERED = image(0.3, 0.1, 0.0), image(1.0, 0.2, 0.1)


class Running:
    """The process, its file and its address."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "guard.yaml"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []

    def write(self, **model: object) -> None:
        args = {
            "models": [{"artifact": "first", "name": "hand"} | model, {"artifact": "first", "name": "other"}],
            "cpus_per_replica": 0.1,
        }
        guard = {"name": "guard", "import_path": "deployments.app:build", "args": args}
        metrics = {"name": "guard-metrics", "import_path": "deployments.app:build_metrics", "route_prefix": "/metrics"}
        http = {"host": "127.0.0.1", "port": self.port}
        self.file.write_text(yaml.safe_dump({"applications": [guard, metrics], "http_options": http}))

    def ask(self, images: np.ndarray = TRIGGERED, name: str = "hand") -> dict:
        answer = httpx.post(f"{self.url}/v1/models/{name}:predict", json={"instances": images.tolist()}, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"][0]

    def metadata(self) -> dict:
        return httpx.get(f"{self.url}/v2/models/hand", timeout=30).raise_for_status().json()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("reload")
    bna_artifact(0).save(folder / "first")
    bna_artifact(1).save(folder / "second")
    one = Running(folder)
    one.write(mode="flag")
    process = start(str(one.file), "--proxy", "haproxy", environment={"RAY_AUTH_MODE": "disabled"})
    try:
        reader = threading.Thread(target=lambda: one.lines.extend(process.stderr), daemon=True)
        reader.start()
        wait_for(lambda: any(line.startswith("guard: serving") for line in one.lines), 120)
        one.process = process
        yield one
    finally:
        family = descendants(process.pid)
        stop(process)
        reader.join()
        process.stderr.close()
    assert process.returncode == 0
    assert len(family) > 3
    wait_for(lambda: not any(alive(pid) for pid in family), 10)


def reload(one: Running, said: str) -> None:
    """SIGHUP, until the process has said ``said`` once more."""
    before = sum(said in line for line in one.lines)
    os.kill(one.process.pid, signal.SIGHUP)
    wait_for(lambda: sum(said in line for line in one.lines) > before, 90)


def test_several_models_are_served(running: Running) -> None:
    """Each under its name, listed, and the name needed where the path has none."""
    listed = httpx.get(f"{running.url}/v2/models").json()["models"]
    assert listed == ["hand", "other"]
    assert running.ask(name="hand")["model"] == "hand"
    assert running.ask(name="other")["model"] == "other"


def test_a_mode_and_an_artifact_change_under_load(running: Running) -> None:
    """While clients ask without a pause, the mode changes, then the artifact; every request is answered, by the old
    settings or by the new, and the same processes serve on."""
    seen: Counter[str] = Counter()
    failures: list[str] = []
    ending = threading.Event()

    def client() -> None:
        while not ending.is_set():
            try:
                row = running.ask()
                seen[f"{row['mode']} {row['class']}"] += 1
            except Exception as error:
                failures.append(repr(error))

    before = replicas(running.process.pid)
    assert len(before) == 1
    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        wait_for(lambda: seen["flag ant"] > 20, 30)
        running.write(mode="correct")
        reload(running, "guard: serving hand in mode correct")
        wait_for(lambda: seen["correct bee"] > 20, 30)
        running.write(mode="correct", artifact="second", version="2")  # suspects class 1 alone: what class 0 gets stays
        reload(running, "guard: serving hand in mode correct")
        wait_for(lambda: seen["correct ant"] > 20, 30)
    finally:
        ending.set()
        for thread in clients:
            thread.join()
    assert failures == []
    assert replicas(running.process.pid) == before
    assert set(seen) == {"flag ant", "correct bee", "correct ant"}
    assert running.metadata()["versions"] == ["2"]


def test_what_does_not_check_changes_nothing(running: Running) -> None:
    """A file with a slip, and one with an artifact that is not there: one sentence each, and the server serves on."""
    before = running.metadata()
    running.write(mode="corect")
    reload(running, "changes nothing: setting args.models.0.mode")
    running.write(mode="reject", artifact="nowhere")
    reload(running, "changes nothing: artifact")
    assert running.metadata() == before
    time.sleep(1.5)  # a health check
    assert httpx.get(f"{running.url}/v2/health/ready").status_code == 200
