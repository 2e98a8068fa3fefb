"""Every request gets an answer, and the right one, while replicas are killed and the server is changed under load.

``python -m benchmarks.faults [--requests 20000] [--concurrency 32] [--kill-every 10] [--proxy haproxy] [--json FILE]``

Two replicas serve the demo's poisoned network. One is killed (SIGKILL) every so many seconds, or as soon after as the
other one serves, too; a third of the way the
mode changes from flag to correct, two thirds of the way another artifact with another threshold takes over, both by
``guard serve``'s own update. Each answer is compared with what the library says offline of the same image, for the mode
and version that the answer names. A request that fails is sent once
more, after a pause.

answered: got an answer within two tries. wrong: an answer that differs from the library's. failed first: by status, or
by the way the connection ended. failed twice: should be none. The last line counts what the server itself counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import click
import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

import guard
from benchmarks import record
from benchmarks.processes import replicas
from deployments.config import ModelConfig, ServeConfig
from deployments.demo import story
from deployments.document import Document, document
from deployments.proxies import PROXIES, Proxy, free_port
from deployments.serve import Server, running
from guard.artifact import Artifact, load_artifact
from guard.data import as_float
from guard.progress import bars
from guard.rules import MarginChange

NAME = "digits"
Expected = dict[tuple[str, str], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]


def served(artifact: Path, version: str, mode: str, port: int) -> Document:
    model = ModelConfig.model_validate({"artifact": artifact, "name": NAME, "version": version, "mode": mode})
    return document(ServeConfig(models=(model,), replicas=2, cpus_per_replica=0.5), host="127.0.0.1", port=port)


def expected(artifacts: dict[str, Path], images: NDArray[np.uint8]) -> Expected:
    """(version, mode) → (label, flagged, corrected label) of every image, by the library."""
    found: Expected = {}
    for version, path in artifacts.items():
        verdict = guard.load(path)(torch.from_numpy(images.astype(np.float32) / np.float32(255)))
        label, corrected, flagged = (one.numpy() for one in (verdict.label, verdict.corrected_label, verdict.flagged))
        found[version, "flag"] = (label, flagged, corrected)
        found[version, "correct"] = (corrected, flagged, corrected)
    return found


def to_bytes(images: torch.Tensor) -> NDArray[np.uint8]:
    """[0, 1] or bytes → bytes."""
    return (as_float(images) * 255).round().byte().numpy()


def serving() -> int:
    """How many replicas take requests."""
    from ray import serve

    states = serve.status().applications["guard"].deployments["classifier"].replica_states
    return next((count for state, count in states.items() if state == "RUNNING"), 0)


class Load:
    """Sends images one a request, to these servers in turn, and keeps the books. A server to which a connection failed
    is asked no more while there is another, as with a load balancer in front."""

    def __init__(self, urls: Sequence[str], images: NDArray[np.uint8], right: Expected, pause_s: float) -> None:
        self._pause_s = pause_s
        self._right = right
        self._count = len(images)
        self._urls = [f"{url}/v2/models/{NAME}/infer" for url in urls]
        self._bodies = [
            json.dumps(
                {"inputs": [{"name": "images", "shape": [1, *image.shape], "datatype": "UINT8",
                             "data": image.ravel().tolist()}]}
            ).encode()
            for image in images
        ]  # fmt: skip
        self.answered = self.sent = 0
        self.first: Counter[str] = Counter()
        self.twice: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.seconds: list[float] = []

    async def run(self, requests: Iterable[int], concurrency: int, advance: Any) -> None:
        """requests: the image of each."""
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:
            turns = iter(requests)

            async def client() -> None:
                for image in turns:
                    await self._one(http, image % self._count)
                    advance(1)

            await asyncio.gather(*(client() for _ in range(concurrency)))

    async def _one(self, http: httpx.AsyncClient, index: int) -> None:
        self.sent += 1
        begun = time.perf_counter()
        for failures in (self.first, self.twice):
            url = self._urls[self.sent % len(self._urls)]
            try:
                answer = await http.post(url, content=self._bodies[index])
            except httpx.TransportError as error:
                failures[type(error).__name__] += 1
                if len(self._urls) > 1 and url in self._urls:
                    self._urls.remove(url)
                await asyncio.sleep(self._pause_s)
                continue
            if answer.status_code != 200:
                failures[str(answer.status_code)] += 1
                await asyncio.sleep(self._pause_s)
                continue
            self.answered += 1
            self.seconds.append(time.perf_counter() - begun)
            self._check(index, answer.json())
            return

    def figures(self) -> dict[str, Any]:
        """What came of the requests, and the milliseconds that answers took, tries included."""
        quantiles = np.quantile(self.seconds, [0.5, 0.99, 1.0]) * 1e3
        return {
            "requests": self.sent,
            "answered": self.answered,
            "wrong": len(self.wrong),
            "failed_first": dict(self.first),
            "failed_twice": dict(self.twice),
            "latency_ms": dict(zip(("p50", "p99", "max"), quantiles.tolist(), strict=True)),
        }

    def _check(self, index: int, answer: dict[str, Any]) -> None:
        key = (answer["model_version"], answer["parameters"]["guard_mode"])
        self.seen[f"{key[1]} version {key[0]}"] += 1
        got = {one["name"]: one["data"][0] for one in answer["outputs"]}
        label, flagged, corrected = (values[index] for values in self._right[key])
        if (got["label"], got["flagged"], got["corrected_label"]) != (label, flagged, corrected):
            self.wrong.append(f"image {index}, {key}: {got}")


async def fault_run(
    server: Server, load: Load, later: list[Document], requests: int, concurrency: int, kill_every: float
) -> dict[str, Any]:
    """Load, kills and updates together."""
    killed: list[int] = []
    updates: list[float] = []
    with bars("requests", requests) as advance:
        work = asyncio.create_task(load.run(range(requests), concurrency, advance))

        async def kill() -> None:
            while not work.done():
                await asyncio.sleep(kill_every)
                while not work.done() and await asyncio.to_thread(serving) < 2:
                    await asyncio.sleep(0.2)
                alive = replicas("guard", "classifier")
                if not work.done():
                    os.kill(alive[0], signal.SIGKILL)
                    killed.append(alive[0])

        async def update() -> None:
            for share, wanted in zip((1 / 3, 2 / 3), later, strict=True):
                while load.sent < share * requests:
                    await asyncio.sleep(0.1)
                begun = time.perf_counter()
                await asyncio.to_thread(server.update, wanted)
                updates.append(time.perf_counter() - begun)

        killing, updating = asyncio.create_task(kill()), asyncio.create_task(update())
        begun = time.perf_counter()
        await work
        seconds = time.perf_counter() - begun
        await updating
        killing.cancel()
    more = {"killed": len(killed), "update_seconds": updates, "answers": dict(load.seen), "seconds": seconds}
    return load.figures() | more


def counted(url: str) -> dict[str, float]:
    """What the server says it answered, by verdict."""
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "guard_requests_total":
                found[sample.labels["verdict"]] += sample.value
    return dict(found)


@click.command(help=__doc__)
@click.option("--requests", default=20_000, show_default=True)
@click.option("--concurrency", default=32, show_default=True)
@click.option("--kill-every", default=10.0, show_default=True, help="Seconds.")
@click.option("--pause", default=0.5, show_default=True, help="Seconds before the second try.")
@click.option("--proxy", type=click.Choice(PROXIES), default="auto", show_default=True)
@record.json_option
def main(
    requests: int, concurrency: int, kill_every: float, pause: float, proxy: Proxy, json_path: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        prepared = story.prepare(Path(scratch), seed=0, progress=bars)
        half = len(prepared.clean.images) // 2
        half = min(half, len(prepared.triggered.images))
        images = np.concatenate([to_bytes(one.images[:half]) for one in (prepared.clean, prepared.triggered)])
        other = _stricter(prepared.artifact, Path(scratch) / "stricter")
        artifacts = {"1": prepared.artifact, "2": other}
        port = free_port()
        later = [served(prepared.artifact, "1", "correct", port), served(other, "2", "correct", port)]
        with running(served(prepared.artifact, "1", "flag", port), proxy=proxy) as server:
            load = Load([server.url], images, expected(artifacts, images), pause)
            figures = asyncio.run(fault_run(server, load, later, requests, concurrency, kill_every))
            figures |= {"proxy": server.proxy, "counted": counted(server.url)}
    for name, value in figures.items():
        click.echo(f"{name:16} {value}")
    for one in load.wrong[:10]:
        click.echo(f"wrong: {one}")
    record.write(json_path, **figures)
    if load.wrong or load.twice or load.answered != requests:
        raise SystemExit(1)


def _stricter(path: Path, out: Path) -> Path:
    """The same corrections under a threshold that flags a tenth of the clean images."""
    artifact = load_artifact(path)
    rule = replace(cast(MarginChange, artifact.rule), p_value=0.1)
    manifest = artifact.manifest | rule.to_manifest() | {"created_at": "2026-01-02T00:00:00+00:00"}
    return Artifact(artifact.captured, artifact.networks, rule, manifest).save(out)


if __name__ == "__main__":
    main()
