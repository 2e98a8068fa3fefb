"""A guard's two applications on a real server, and a process whose counters they show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from deployments.engine.catalogue import Catalogue
from deployments.http.exposition import build_metrics_app
from deployments.http.ingress import build_http_app
from deployments.keys import Keys
from deployments.watch.watch import Watch


def settle(condition: Callable[[], Any], seconds: float = 15) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


class Server(uvicorn.Server):
    """``app`` on a thread; port 0 takes a free one. url: where."""

    def __init__(self, app: Starlette, port: int = 0) -> None:
        super().__init__(uvicorn.Config(app, port=port, log_level="error", ws="none", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self.run)

    def __enter__(self) -> Server:
        self._thread.start()
        settle(lambda: self.started)
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_error: object) -> None:
        self.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


class Site:
    """A guard's two applications behind one address. The watch looks when told to, so that tests say when."""

    def __init__(self, folder: Path, keys: Keys | None) -> None:
        self.watch = Watch(folder)
        http, metrics = build_http_app(Catalogue(), "9.9", keys), build_metrics_app(self.watch, keys)
        self.app = Starlette(routes=[Route("/metrics", metrics), Mount("/metrics", metrics), Mount("", http)])


class Replica:
    """A process that counts; ``models``: [name, classes, whether it has p-values] each."""

    def __init__(self, folder: Path, models: list[tuple[str, list[str], bool]]) -> None:
        paths = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("counting.py"))],
            env=os.environ | paths,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._tell(models, "ready")

    def count(self, model: str, **what: Any) -> None:
        self._tell({"model": model, **what}, "counted")

    def close(self) -> None:
        self._process.communicate()

    def _tell(self, words: Any, answer: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{answer}\n"
