"""Does the server answer for hours, without a stall, whatever its clients do to their connections?

``python -m benchmarks.soak [--minutes 60] [--rate 25] [--proxy haproxy] [--json FILE]``

One replica serves the demo's poisoned network in mode flag, behind the proxy, to clients who send at a steady mean rate
(Poisson arrivals), with a burst of 64 requests at once every half minute. Each request takes one of four manners: over
a connection that is kept, over a new one, over one that lay idle for longer than most proxies keep it, or by a client
that goes away before the answer. stall: an answer that took longer than two seconds. failed: whatever is not status 200
within a minute, from clients who waited. Memory is of all processes of the server, once a period.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from benchmarks import record
from benchmarks.faults import NAME, served, to_bytes
from benchmarks.processes import resident_bytes, titles
from deployments.demo import story
from deployments.proxies import PROXIES, Proxy, free_port
from deployments.serve import running
from guard.progress import bars

STALL_S, BURST, BURST_EVERY_S, PERIODS = 2.0, 64, 30.0, 6
MANNERS = ("kept", "new", "idle", "gone")
WEIGHTS = (70, 15, 5, 10)
IDLE_S = (20.0, 90.0)


class Soak:
    """Sends, and keeps the books of one period at a time."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self._url = f"{url}/v2/models/{NAME}/infer"
        self._bodies = bodies
        self._draw = random.Random(0)
        self.open()

    def open(self) -> None:
        """Begin a period."""
        self.sent: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.seconds: list[float] = []

    def close(self) -> dict[str, Any]:
        """The figures of the period."""
        quantiles = np.quantile(self.seconds, [0.5, 0.99, 1.0]) * 1e3 if self.seconds else np.full(3, np.nan)
        return {
            "sent": dict(self.sent),
            "answered": len(self.seconds),
            "stalls": sum(one > STALL_S for one in self.seconds),
            "failed": dict(self.failed),
            "latency_ms": dict(zip(("p50", "p99", "max"), quantiles.round(1).tolist(), strict=True)),
            "memory_mib": round(memory_mib()),
        }

    async def run(self, seconds: float, rate: float, advance: Any) -> list[dict[str, Any]]:
        """Periods of the same length, one after the other."""
        periods = []
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=256)) as kept:
            tasks: set[asyncio.Task[None]] = set()
            for _ in range(PERIODS):
                self.open()
                end, burst = time.monotonic() + seconds / PERIODS, time.monotonic() + BURST_EVERY_S
                while (now := time.monotonic()) < end:
                    count = 1
                    if now >= burst:
                        count, burst = BURST, now + BURST_EVERY_S
                    for _ in range(count):
                        task = asyncio.create_task(self._one(kept))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                    await asyncio.sleep(self._draw.expovariate(rate))
                advance(1)
                periods.append(self.close())
            await asyncio.gather(*tasks)
            periods[-1] = self.close()
        return periods

    async def _one(self, kept: httpx.AsyncClient) -> None:
        (manner,) = self._draw.choices(MANNERS, WEIGHTS)
        body = self._draw.choice(self._bodies)
        self.sent[manner] += 1
        try:
            if manner == "kept":
                await self._ask(kept, body)
            elif manner == "gone":
                async with httpx.AsyncClient(timeout=60) as leaving:
                    task = asyncio.create_task(leaving.post(self._url, content=body))
                    await asyncio.sleep(self._draw.uniform(0.0, 0.01))
                    task.cancel()
            else:
                async with httpx.AsyncClient(timeout=60) as own:
                    await self._ask(own, body)
                    if manner == "idle":
                        await asyncio.sleep(self._draw.uniform(*IDLE_S))
                        await self._ask(own, body)
        except Exception as error:
            self.failed[f"{manner}: {type(error).__name__}"] += 1

    async def _ask(self, http: httpx.AsyncClient, body: bytes) -> None:
        begun = time.perf_counter()
        answer = await http.post(self._url, content=body)
        if answer.status_code == 200:
            self.seconds.append(time.perf_counter() - begun)
        else:
            self.failed[str(answer.status_code)] += 1


def memory_mib() -> float:
    """Resident memory of Ray's and the proxy's processes."""
    theirs = [
        process for process, told in titles() if process != os.getpid() and ("ray::" in told or "haproxy" in told)
    ]
    return sum(map(resident_bytes, theirs)) / 2**20


@click.command(help=__doc__)
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--rate", default=25.0, show_default=True, help="Requests a second, besides the bursts.")
@click.option("--proxy", type=click.Choice(PROXIES), default="auto", show_default=True)
@record.json_option
def main(minutes: float, rate: float, proxy: Proxy, json_path: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        prepared = story.prepare(Path(scratch), seed=0, progress=bars)
        images = [one for part in (prepared.clean, prepared.triggered) for one in to_bytes(part.images[:50])]
        bodies = [
            json.dumps(
                {"inputs": [{"name": "images", "shape": [1, *image.shape], "datatype": "UINT8",
                             "data": image.ravel().tolist()}]}
            ).encode()
            for image in images
        ]  # fmt: skip
        with running(served(prepared.artifact, "1", "flag", free_port()), proxy=proxy) as server:
            with bars(f"periods of {minutes / PERIODS:.1f} minutes", PERIODS) as advance:
                periods = asyncio.run(Soak(server.url, bodies).run(60 * minutes, rate, advance))
            used = server.proxy
    for period in periods:
        click.echo(json.dumps(period))
    answered, stalls = (sum(period[key] for period in periods) for key in ("answered", "stalls"))
    failed = sum(sum(period["failed"].values()) for period in periods)
    click.echo(f"{used}: {answered} answered in {minutes:g} minutes, {stalls} stalls, {failed} failed")
    record.write(json_path, proxy=used, minutes=minutes, rate=rate, periods=periods)
    if stalls or failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
