"""A bounded queue in front of a thread that nobody waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")
SAY_S = 60.0
REST = 3.0
log = logging.getLogger(__name__)


class Outbox(Generic[T]):
    """Hands items to ``handle``, one after the other, in a thread of its own.

    For each second of computation the thread rests for three, so that whoever makes it work without end takes a
    quarter of a core from the networks, and no more.

    Args:
        name: in logs, and of the thread. handle: gets each item; what it raises is logged, once a minute at most.
        capacity: items that may wait. capacity_bytes: their size; a larger one may wait alone. tick: called when the
            thread starts, and every ``tick_s`` while it has nothing else to do. end: called by the thread as it ends.

    Attributes:
        gone: set once there is no time left: what waits for anything gives up.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[T], None],
        *,
        capacity: int,
        capacity_bytes: int,
        tick: Callable[[], None] | None = None,
        tick_s: float = 600.0,
        end: Callable[[], None] | None = None,
    ) -> None:
        self.gone = threading.Event()
        self._name = name
        self._handle = handle
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._tick, self._tick_s, self._end = tick, tick_s, end
        self._waiting: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._said = -SAY_S
        self._failures = 0  # since they were last told of

    def start(self) -> None:
        """Begin to hand items on. What came before waits for it."""
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    def put(self, item: T, size: int) -> bool:
        """Let ``item`` of ``size`` bytes wait; False, at once, where there is no room or it is too late."""
        with self._changed:
            full = len(self._waiting) >= self._capacity or (
                bool(self._waiting) and self._bytes + size > self._capacity_bytes
            )
            if full or self._closing:
                return False
            self._waiting.append((item, size))
            self._bytes += size
            self._changed.notify()
            return True

    def close(self, flush_s: float) -> list[T]:
        """Take no more items, and hand on what waits for ``flush_s`` at most. Returns those that had no time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(flush_s)
        self.gone.set()
        with self._changed:
            left = [item for item, _ in self._waiting]
            self._waiting.clear()
            self._bytes = 0
        return left

    def _work(self) -> None:
        if self._tick is not None:
            self._guarded(self._tick)
        while True:
            with self._changed:
                if not self._waiting and not self._closing:
                    self._changed.wait(self._tick_s)
                if not self._waiting and self._closing:
                    break
                taken = self._waiting.popleft() if self._waiting else None
                self._bytes -= 0 if taken is None else taken[1]
            began = time.thread_time()
            if taken is not None:
                self._guarded(partial(self._handle, taken[0]))
            elif self._tick is not None:
                self._guarded(self._tick)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, REST * (time.thread_time() - began))
        if self._end is not None:
            self._guarded(self._end)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do ``work``; the thread outlives whatever it raises."""
        try:
            work()
        except Exception as error:
            self._failures += 1
            if time.monotonic() - self._said >= SAY_S:
                known = isinstance(error, OSError)
                log.warning(
                    "%s: %s (failures: %d)", self._name, error, self._failures, exc_info=None if known else error
                )
                self._said, self._failures = time.monotonic(), 0
