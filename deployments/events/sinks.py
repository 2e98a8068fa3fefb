"""Where events go: an address, or a file."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from deployments.events.cloudevents import MEDIA
from deployments.events.settings import EventSettings

BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 5.0
PASSING = {408, 429, 500, 502, 503, 504}  # what may go better next time
READ_BYTES = 64 * 1024  # of an answer nobody is interested in, so that its connection can be used again


class NotSent(OSError):
    """An event that did not arrive; the sentence names no more of the address than its server."""


class Sink(Protocol):
    """Takes events one by one, from one thread."""

    def send(self, event: Mapping[str, Any]) -> None:
        """Raises:
        OSError: it did not arrive.
        """

    def close(self) -> None: ...


def sink_of(settings: EventSettings, gone: threading.Event) -> Sink:
    """The sink of these settings. gone: no more tries once it is set.

    Raises:
        BadSetting: a variable of a header is not in the environment.
    """
    if settings.url is not None:
        return HttpSink(settings.url, settings, gone)
    if settings.file is not None:
        return FileSink(settings.file, max_bytes=settings.max_bytes, keep=settings.keep)
    raise ValueError("settings: they name an address or a file")


class HttpSink:
    """Sends each event by POST in structured mode, again after a while where that may help."""

    def __init__(self, url: str, settings: EventSettings, gone: threading.Event) -> None:
        self._url = url
        self._tries = 1 + settings.retries
        self._timeout_s = settings.timeout_s
        self._gone = gone
        headers = {**settings.secrets(), "content-type": MEDIA}
        self._headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self._client = httpx.Client(timeout=settings.timeout_s)
        parts = urlsplit(url)
        self._server = f"{parts.scheme}://{parts.netloc}"

    def send(self, event: Mapping[str, Any]) -> None:
        body = json.dumps(event, allow_nan=False).encode()
        for number in range(self._tries):
            problem, passing = self._try(body)
            if not problem:
                return
            wait_s = min(BACKOFF_S * 2**number, LONGEST_BACKOFF_S)
            if not passing or number + 1 == self._tries or self._gone.wait(wait_s):
                raise NotSent(f"{self._server} {problem}")

    def _try(self, body: bytes) -> tuple[str, bool]:
        """(what was wrong or "", whether it may go better next time)."""
        began = time.monotonic()
        try:
            with self._client.stream("POST", self._url, content=body, headers=self._headers) as response:
                read = 0
                for part in response.iter_raw():
                    read += len(part)
                    if read > READ_BYTES or time.monotonic() - began > self._timeout_s:
                        break
                if response.is_success:
                    return "", False
                return f"answered with status {response.status_code}", response.status_code in PASSING
        except httpx.HTTPError as error:
            return f"cannot be reached: {type(error).__name__}", True

    def close(self) -> None:
        self._client.close()


class FileSink:
    """Appends each event to a file as a line, whole or not at all; the processes of a node may share it.

    Args:
        file: of mode 0600. max_bytes: its size before it becomes ``file.1``, that one ``file.2`` and so on; a larger
            line has a file of its own. keep: how many of those stay.
    """

    def __init__(self, file: Path, *, max_bytes: int, keep: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._keep = keep

    def send(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            size = self._file.stat().st_size if self._file.exists() else 0
            if size and size + len(line) > self._max_bytes:
                self._rotate()
            with _opened(self._file, os.O_WRONLY | os.O_APPEND) as descriptor:
                _append(descriptor, line)

    def close(self) -> None:
        """Nothing is open between two events."""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process or thread writes or rotates meanwhile."""
        with _opened(self._file.with_name(f".{self._file.name}.lock"), os.O_RDWR) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # let go of as it closes
            yield

    def _rotate(self) -> None:
        names = [self._file, *(self._file.with_name(f"{self._file.name}.{age}") for age in range(1, self._keep + 1))]
        for younger, older in reversed([*pairwise(names)]):
            if younger.exists():
                younger.replace(older)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The descriptor of a plain file of mode 0600, made if it is not there; no link is followed."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotSent(f"{path} is no plain file")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
        yield descriptor
    finally:
        os.close(descriptor)


def _append(descriptor: int, line: bytes) -> None:
    """Write the whole line, or leave the file as it was."""
    before = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, before)
        raise
