"""Natural batching: when the worker is free it takes what is waiting, up to a limit. Nothing waits for company.

Under light load every request runs at once and alone; under heavy load batches grow by themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from deployments.errors import QueueFull, ShuttingDown, Unavailable

T = TypeVar("T")
R = TypeVar("R")


class Ticket(Generic[T, R]):
    """A place in the queue: the item, its size, when it came, and the answer that someone may still wait for."""

    def __init__(self, item: T, size: int) -> None:
        self.item = item
        self.size = size
        self.since = time.perf_counter()
        self.answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()

    @property
    def open(self) -> bool:
        """Still without an answer, and its client is still there."""
        return not self.answer.done()

    @property
    def abandoned(self) -> bool:
        """Its client has gone."""
        return self.answer.cancelled()

    def resolve(self, result: R) -> None:
        if self.open:
            self.answer.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.open:
            self.answer.set_exception(error)


class Batcher(Generic[T, R]):
    """A bounded queue in front of one worker.

    Args:
        process: runs one batch and resolves or fails each of its tickets; a ticket may be resolved early.
        limit: largest total size of a batch; a larger item runs alone.
        capacity: largest total size waiting; beyond it ``submit`` raises QueueFull.
    """

    def __init__(
        self, process: Callable[[Sequence[Ticket[T, R]]], Awaitable[None]], *, limit: int, capacity: int
    ) -> None:
        self._process = process
        self._limit = limit
        self._capacity = capacity
        self._waiting: deque[Ticket[T, R]] = deque()
        self._waiting_size = 0
        self._arrived = asyncio.Event()
        self._closing = False
        self._worker: asyncio.Task[None] | None = None
        self.busy_since: float | None = None

    def start(self) -> None:
        """Start the worker on the running event loop."""
        self._worker = asyncio.create_task(self._work())

    @property
    def alive(self) -> bool:
        """The worker is there to take the next batch."""
        return self._worker is not None and not self._worker.done()

    async def submit(self, item: T, size: int) -> R:
        """The answer to ``item``. A caller who is cancelled while it waits gives up its place."""
        if self._closing or not self.alive:
            raise ShuttingDown("the server is shutting down: try another replica")
        if self._waiting and self._waiting_size + size > self._capacity:
            raise QueueFull(f"{self._waiting_size} images are waiting, at most {self._capacity} may: try again later")
        ticket: Ticket[T, R] = Ticket(item, size)
        self._waiting.append(ticket)
        self._waiting_size += size
        self._arrived.set()
        try:
            return await ticket.answer
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._waiting_size -= size
            raise

    async def close(self) -> None:
        """Refuse what comes, finish what waits, stop the worker."""
        self._closing = True
        self._arrived.set()
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                if self._closing:
                    return
                self._arrived.clear()
                continue
            self.busy_since = time.perf_counter()
            try:
                await self._process(batch)
            except Exception as error:  # whatever it was, the worker lives on and nobody waits for ever
                for ticket in batch:
                    ticket.fail(error)
            finally:
                self.busy_since = None
            for ticket in batch:
                ticket.fail(Unavailable("the batch ended without an answer to this request"))

    def _take(self) -> list[Ticket[T, R]]:
        """What is waiting, oldest first, up to the limit, at least one."""
        batch: list[Ticket[T, R]] = []
        total = 0
        while self._waiting and (not batch or total + self._waiting[0].size <= self._limit):
            ticket = self._waiting.popleft()
            batch.append(ticket)
            total += ticket.size
        self._waiting_size -= total
        return batch
