"""A real HTTP server on a thread, without Ray, and requests written by hand."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from deployments.engine.catalogue import Catalogue
from deployments.engine.classifier import Classifier
from deployments.http.ingress import build_http_app


class Web(uvicorn.Server):
    """``classifier`` served on a free port. port, url: where."""

    def __init__(self, classifier: Classifier) -> None:
        app: ASGIApp = build_http_app(Catalogue([classifier]), "9.9")
        super().__init__(uvicorn.Config(app, port=0, log_level="error", ws="none", timeout_graceful_shutdown=1))
        self.classifier = classifier
        self._thread = threading.Thread(target=self.run)

    def __enter__(self) -> Web:
        self._thread.start()
        settle(lambda: self.started)
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_error: object) -> None:
        self.classifier.guard.gate.set()
        self.classifier.guard.corrected_gate.set()
        self.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many images wait in the queue."""
        return self.classifier._batcher._waiting_size

    @property
    def busy(self) -> bool:
        """A batch is under way."""
        return self.classifier._batcher.busy_since is not None

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


def head(path: str, length: int, media: str = "application/json") -> bytes:
    """The head of a request whose connection ends with the answer."""
    lines = (f"POST {path} HTTP/1.1", "Host: guard", "Connection: close", f"Content-Type: {media}")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


def trickle(connection: socket.socket, content: bytes, seconds: float) -> None:
    """Send ``content`` in forty parts, over ``seconds``."""
    step = -(-len(content) // 40)
    for at in range(0, len(content), step):
        connection.sendall(content[at : at + step])
        time.sleep(seconds / 40)


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    """Status and JSON of the one answer that ``connection`` brings."""
    received = b""
    while part := connection.recv(65536):
        received += part
    top, _, body = received.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


def settle(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)
