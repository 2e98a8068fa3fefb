"""Servers to put a guard in front of: a real one on a thread, one that does as it is told, one that hangs up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """``app`` on a thread of its own; the value is its address."""
    config = uvicorn.Config(app, port=port, log_level="error", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    (listening,) = server.servers
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


class Puppet:
    """A v2 server of the model "m" with the logits of `hand.HandGuard`, or what ``behave`` makes of a request.

    ``seen`` records headers, JSON and images of every inference; ``ready`` is the status of its readiness.
    """

    def __init__(self) -> None:
        self.behave: Callable[[np.ndarray], Any] = lambda images: answer(images.mean((2, 3)) * 10)
        self.ready = 200
        self.seen: list[tuple[dict[str, str], dict[str, Any], np.ndarray]] = []
        self.app = Starlette(
            routes=[
                Route("/v2/models/m/infer", self.infer, methods=["POST"]),
                Route("/v2/models/m/versions/7/infer", self.infer, methods=["POST"]),
                Route("/v2/models/m/ready", self.readiness),
                Route("/v2/models/m/versions/7/ready", self.readiness),
            ]
        )

    async def readiness(self, _request: Request) -> Response:
        return Response(status_code=self.ready)

    async def infer(self, request: Request) -> Response:
        body = await request.body()
        length = int(request.headers.get("inference-header-content-length", len(body)))
        asked = json.loads(body[:length])
        (tensor,) = asked["inputs"]
        kind = {"FP32": "<f4", "UINT8": "u1"}[tensor["datatype"]]
        if "data" in tensor:
            images = np.array(tensor["data"], kind)
        else:
            assert tensor["parameters"]["binary_data_size"] == len(body) - length
            images = np.frombuffer(body[length:], kind)
        images = images.reshape(tensor["shape"])
        self.seen.append((dict(request.headers), asked, images))
        made = self.behave(images)
        return await made if asyncio.iscoroutine(made) else made


def answer(logits: np.ndarray, name: str = "logits") -> Response:
    """An answer with JSON tensors."""
    tensor = {"name": name, "shape": list(logits.shape), "datatype": "FP32", "data": logits.ravel().tolist()}
    return JSONResponse({"model_name": "m", "outputs": [tensor]})


def raw_answer(logits: np.ndarray, datatype: str = "FP32") -> Response:
    """The same with raw tensors, behind another one that nobody asked for."""
    values = logits.astype({"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[datatype]).tobytes()
    other = {"name": "features", "shape": [3], "datatype": "UINT8", "parameters": {"binary_data_size": 3}}
    ours = {
        "name": "logits",
        "shape": list(logits.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": len(values)},
    }
    head = json.dumps({"outputs": [other, ours]}).encode()
    return Response(head + b"abc" + values, headers={"inference-header-content-length": str(len(head))})


async def later(seconds: float) -> Response:
    await asyncio.sleep(seconds)
    return answer(np.zeros((1, 3)))


def trickle() -> Response:
    """Bytes that come often enough for a time-out between two of them, and never end in time."""

    async def drops() -> Any:
        for _ in range(40):
            yield b" "
            await asyncio.sleep(0.05)

    return StreamingResponse(drops())


def tomorrow() -> dict[str, str]:
    """A Retry-After header as a date."""
    return {"retry-after": formatdate(time.time() + 86_400, usegmt=True)}


class HangsUp:
    """A server that closes each connection at its ``at``-th request instead of answering it. ``connections``: so many
    there were."""

    REPLY = json.dumps({"outputs": [{"name": "logits", "shape": [1, 3], "data": [3, 1, 0]}]}).encode()

    def __init__(self, at: int) -> None:
        self.at = at
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        for request in range(1, self.at + 1):
            got = b""
            while b"\r\n\r\n" not in got:
                got += connection.recv(65536)
                if not got:
                    return
            head, _, body = got.partition(b"\r\n\r\n")
            lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            length = int(lines[0].partition(b":")[2]) if lines else 0
            while len(body) < length:
                body += connection.recv(65536)
            if request < self.at:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(self.REPLY), self.REPLY))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()
        self._thread.join(1)
