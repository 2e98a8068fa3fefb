"""Work that nobody waits for is gathered, so that it runs in fewer, larger batches and leaves the cores to answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
E = TypeVar("E")


class Gatherer(Generic[E]):
    """Entries in front of one worker, which takes all of them once there are enough or the oldest has waited.

    Args:
        run: does the work of some entries; its errors are its own affair, and logged.
        enough: total size that is not waited beyond. patience_s: how long the oldest waits for company.
        capacity: total size that may wait; ``put`` blocks beyond it, so that the work keeps up with what brings it.
    """

    def __init__(
        self, run: Callable[[list[E]], Awaitable[None]], *, enough: int, patience_s: float, capacity: int
    ) -> None:
        self._run = run
        self._enough = enough
        self._patience_s = patience_s
        self._capacity = capacity
        self._waiting: list[E] = []
        self._size = 0
        self._changed = asyncio.Condition()
        self._closing = False
        self._worker: asyncio.Task[None] | None = None
        self._oldest = 0.0

    async def put(self, entry: E, size: int) -> None:
        """Leave ``entry`` for later. Starts the worker when it is the first."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._size == 0 or self._size + size <= self._capacity)
            if self._worker is None:
                self._worker = asyncio.create_task(self._work())
            if not self._waiting:
                self._oldest = time.perf_counter()
            self._waiting.append(entry)
            self._size += size
            self._changed.notify_all()

    async def close(self) -> None:
        """Run what waits, at once, and stop."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                left = self._oldest + self._patience_s - time.perf_counter()
                try:
                    async with asyncio.timeout(max(left, 0.0)):
                        await self._changed.wait_for(lambda: self._size >= self._enough or self._closing)
                except TimeoutError:
                    pass  # it has waited for company long enough
                entries, size = self._waiting, self._size
                self._waiting = []
            try:
                await self._run(entries)
            except Exception:
                log.exception("work that was left for later failed")
            async with self._changed:
                self._size -= size
                self._changed.notify_all()
