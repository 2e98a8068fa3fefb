"""Natural batching, without a network and without Ray."""

from __future__ import annotations

import asyncio

import pytest

from deployments.engine.batcher import Batcher
from deployments.errors import QueueFull, ShuttingDown, Unavailable


class Doubler:
    """Answers twice the item; records batches; waits at the gate before each."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[int]] = []

    async def __call__(self, tickets) -> None:
        await self.gate.wait()
        self.batches.append([ticket.item for ticket in tickets])
        if any(ticket.item < 0 for ticket in tickets):
            raise ValueError("negative")
        for ticket in tickets:
            if ticket.item != 13:
                ticket.resolve(2 * ticket.item)


async def hold(work: Doubler, batcher: Batcher, item: int = 0) -> asyncio.Task[int]:
    """Close the gate and occupy the worker with ``item``."""
    work.gate.clear()
    task = asyncio.create_task(batcher.submit(item, 1))
    await asyncio.sleep(0.01)
    return task


def run(scenario, **settings) -> Doubler:
    async def main() -> Doubler:
        work = Doubler()
        batcher = Batcher(work, **{"limit": 4, "capacity": 100, **settings})
        batcher.start()
        await asyncio.wait_for(scenario(work, batcher), 5)
        await asyncio.wait_for(batcher.close(), 5)
        return work

    return asyncio.run(main())


def test_a_lone_item_runs_at_once() -> None:
    """When nothing else waits, an item makes a batch of its own."""

    async def scenario(work, batcher) -> None:
        assert [await batcher.submit(i, 1) for i in range(3)] == [0, 2, 4]

    assert run(scenario).batches == [[0], [1], [2]]


def test_what_waits_goes_together_up_to_the_limit() -> None:
    """While a batch runs the others gather; the next batches take them in order, at most ``limit`` at once."""

    async def scenario(work, batcher) -> None:
        first = await hold(work, batcher)
        rest = [asyncio.create_task(batcher.submit(i, 1)) for i in range(1, 7)]
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8, 10, 12]

    assert run(scenario).batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_large_item_is_never_split() -> None:
    """An item larger than the limit runs alone."""

    async def scenario(work, batcher) -> None:
        first = await hold(work, batcher)
        rest = [asyncio.create_task(batcher.submit(i, size)) for i, size in ((1, 2), (2, 9), (3, 1))]
        await asyncio.sleep(0.01)
        work.gate.set()
        await asyncio.gather(first, *rest)

    assert run(scenario).batches == [[0], [1], [2], [3]]


def test_a_full_queue_sheds() -> None:
    """Beyond the capacity a new item is refused at once, and those that wait are still answered."""

    async def scenario(work, batcher) -> None:
        first = await hold(work, batcher)
        waiting = [asyncio.create_task(batcher.submit(i, 1)) for i in (1, 2)]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await batcher.submit(3, 1)
        work.gate.set()
        assert await asyncio.gather(first, *waiting) == [0, 2, 4]

    run(scenario, capacity=2)


def test_a_cancelled_client_is_dropped() -> None:
    """An item whose client has gone is not run, and its place is free again."""

    async def scenario(work, batcher) -> None:
        first = await hold(work, batcher)
        gone = asyncio.create_task(batcher.submit(1, 1))
        stays = asyncio.create_task(batcher.submit(2, 1))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        takes_its_place = asyncio.create_task(batcher.submit(3, 1))
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await asyncio.gather(first, stays, takes_its_place) == [0, 4, 6]

    assert run(scenario, capacity=2).batches == [[0], [2, 3]]


def test_the_worker_outlives_an_error() -> None:
    """A batch that raises fails its own items; the next batch is answered."""

    async def scenario(work, batcher) -> None:
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(-1, 1)
        with pytest.raises(Unavailable):
            await batcher.submit(13, 1)
        assert await batcher.submit(1, 1) == 2
        assert batcher.alive

    run(scenario)


def test_closing_answers_what_waits() -> None:
    """``close`` refuses new items, answers the waiting ones, then ends the worker."""

    async def scenario(work, batcher) -> None:
        first = await hold(work, batcher)
        waiting = asyncio.create_task(batcher.submit(1, 1))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(ShuttingDown):
            await batcher.submit(2, 1)
        work.gate.set()
        assert await asyncio.gather(first, waiting) == [0, 2]
        await closing
        assert not batcher.alive

    run(scenario)
