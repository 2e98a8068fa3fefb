"""A real Ray Serve with two replicas, hurt while clients ask: they hardly notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import httpx
import pytest
from hand import bna_artifact, image
from processes import wait_for
from web import answer_of, head, trickle

from deployments.config import ModelConfig, ServeConfig
from deployments.document import Document, document
from deployments.proxies import free_port
from deployments.serve import Server, running

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own use of pydantic

# Ant; the corrected network says bee.
BODY = json.dumps({"instances": image(1.0, 0.2, 0.1).tolist()}).encode()

CLOSED = ("ConnectError", "ReadError", "RemoteProtocolError")  # how a connection ends where nobody listens any more


def wanted(artifact: Path, port: int, mode: str = "flag") -> Document:
    model = ModelConfig.model_validate({"artifact": artifact, "name": "hand", "mode": mode})
    return document(ServeConfig(models=(model,), replicas=2, cpus_per_replica=0.1), host="127.0.0.1", port=port)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bna_artifact(0).save(tmp_path_factory.mktemp("artifacts") / "hand")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    """What ends the server: the last test, or the end of this file."""
    with ExitStack() as one:
        yield one


@pytest.fixture(scope="module")
def server(artifact: Path, port: int, environment: None, stack: ExitStack) -> Server:
    return stack.enter_context(running(wanted(artifact, port), proxy="serve"))


def ours(title: str) -> list[int]:
    """The processes with ``title`` in their command lines that this one has started, or those have."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    family = [os.getpid()]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return sorted(one for one in family[1:] if title in titles.get(one, ""))


def two_replicas_run() -> bool:
    from ray import serve

    return serve.status().applications["guard"].deployments["classifier"].replica_states == {"RUNNING": 2}


class Load:
    """Four clients that ask without a pause. A request that fails is sent once more.

    answers: by mode and class. failed: first tries, by status or error. lost: second ones. ends: those of every try,
    by client, in order."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/models/hand:predict"
        self._ending = threading.Event()
        self.ends: list[list[str]] = [[] for _ in range(4)]
        self._threads = [threading.Thread(target=self._work, args=(ends,)) for ends in self.ends]
        self.answers: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.answers.total()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive(), "a request hangs"

    def _work(self, ends: list[str]) -> None:
        with httpx.Client(timeout=30) as http:
            while not self._ending.is_set():
                for failures in (self.failed, self.lost):
                    ends.append(self._ask(http))
                    if ends[-1] == "200":
                        break
                    failures[ends[-1]] += 1

    def _ask(self, http: httpx.Client) -> str:
        try:
            answer = http.post(self._url, content=BODY)
        except httpx.TransportError as error:
            return type(error).__name__
        if answer.status_code == 200:
            row = answer.json()["predictions"][0]
            self.answers[f"{row['mode']} {row['class']}"] += 1
        return str(answer.status_code)


def test_a_killed_replica_loses_nobody(server: Server) -> None:
    """SIGKILL to one of two replicas under load: every request is answered by its second try at the latest, few need
    one, and Ray puts another replica in its place."""
    before = ours("ServeReplica:guard:classifier")
    assert len(before) == 2
    with Load(server.url) as load:
        wait_for(lambda: load.total > 50, 30)
        os.kill(before[0], signal.SIGKILL)
        killed_at = load.total
        wait_for(lambda: len(set(ours("ServeReplica:guard:classifier")) - set(before)) == 1, 60)
        wait_for(two_replicas_run, 60)
        wait_for(lambda: load.total > killed_at + 200, 60)
    assert not load.lost, load.lost
    assert load.failed.total() <= 8, load.failed
    assert set(load.answers) == {"flag ant"}


def test_without_its_controller_the_server_goes_on(server: Server, artifact: Path, port: int) -> None:
    """SIGKILL to Serve's controller under load: requests are answered meanwhile; Ray starts another one, by which a
    change of mode still reaches the same replicas."""
    replicas = ours("ServeReplica:guard:classifier")
    (controller,) = ours("ServeController")
    with Load(server.url) as load:
        wait_for(lambda: load.total > 50, 30)
        os.kill(controller, signal.SIGKILL)
        killed_at = load.total
        wait_for(lambda: set(ours("ServeController")) - {controller} != set(), 60)
        assert load.total > killed_at
        server.update(wanted(artifact, port, mode="correct"))
        wait_for(lambda: load.answers["correct bee"] > 50, 30)
    assert not load.lost, load.lost
    assert set(load.answers) == {"flag ant", "correct bee"}
    assert ours("ServeReplica:guard:classifier") == replicas


def test_a_shutdown_answers_what_is_in_flight(server: Server, port: int, stack: ExitStack) -> None:
    """Requests whose bodies are still on their way when the shutdown begins are answered; those of busy clients are
    answered, then refused with 503, then nobody listens; none hangs."""
    connections = [socket.create_connection(("127.0.0.1", port), timeout=40) for _ in range(3)]
    for one in connections:
        one.sendall(head("/v1/models/hand:predict", len(BODY)))
    slow = [threading.Thread(target=trickle, args=(one, BODY, 2.0)) for one in connections]
    with Load(server.url) as load:
        wait_for(lambda: load.total > 50, 30)
        for thread in slow:
            thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        stack.close()
        assert time.monotonic() - begun < 30
    for one, thread in zip(connections, slow, strict=True):
        thread.join()
        status, answer = answer_of(one)
        one.close()
        assert (status, answer["predictions"][0]["label"]) == (200, 1)
    for ends in load.ends:
        kinds = [kind for kind, _ in groupby("closed" if end in CLOSED else end for end in ends)]
        assert kinds in (["200", "503", "closed"], ["200", "closed"]), kinds
    assert load.failed["503"] + load.lost["503"] > 0
