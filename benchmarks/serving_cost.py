"""What a request costs through the served classifier, over the bare network, side by side in one run.

``python -m benchmarks.serving_cost [--rounds 8] [--requests 20] [--json FILE]``

One client, one image a request, in process (no HTTP). *bare*: the user's module behind the same queue in one thread.
*mmdf*: every image takes both networks, one after the other; *mmdf, 2 threads*: at the same time. *bna, 1 class*:
images sent to one class take its corrected network too. *bna, nothing*: a scan that detected nothing. The traffic:
images sent to other classes, images sent to the suspected class, and a mix with a tenth of the latter. The systems take
turns at every ten requests, in changing order, each after one request that is not timed.

``ratio``: median of a round's latencies over the bare network's of the same round; its median, least and largest over
the rounds. ``time``: the same of the sums, which with one thread is the compute that a mix adds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor, nn

from benchmarks import record
from deployments.config import ModelConfig
from deployments.engine.batcher import Batcher, Ticket
from deployments.engine.classifier import Classifier
from deployments.engine.metrics import Metrics
from guard.artifact import FORMAT, FORMAT_VERSION, Artifact
from guard.capture import Captured, capture
from guard.config import FitSettings
from guard.corrections import Clip, Correction, Renormalise
from guard.null import ExponentialTail
from guard.observe import observe
from guard.rules import Disagreement, MarginChange, Rule
from guard.walk import correction_sites

SIZE, CLASSES, TARGET, SHARE, BLOCK = 64, 10, 0, 0.1, 10
TRAFFIC = ("other classes", "suspected class", "mix")
Images = NDArray[np.float32]
Ask = Callable[[Images], Awaitable[Any]]


class Bare:
    """The user's module behind the queue and thread of the served classifier, without anything else."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, "bare", initializer=torch.set_num_threads, initargs=(1,))
        self._batcher: Batcher[Images, NDArray[np.float32]] = Batcher(self._process, limit=32, capacity=512)

    async def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        self._thread.shutdown()

    async def ask(self, images: Images) -> NDArray[np.int64]:
        """Decisions int64 [n]."""
        decisions: NDArray[np.int64] = (await self.logits(images)).argmax(1)
        return decisions

    async def logits(self, images: Images) -> NDArray[np.float32]:
        """float32 [n, K]."""
        return await self._batcher.submit(images, len(images))

    async def _process(self, tickets: Sequence[Ticket[Images, NDArray[np.float32]]]) -> None:
        images = np.concatenate([ticket.item for ticket in tickets])
        logits = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, images)
        start = 0
        for ticket in tickets:
            ticket.resolve(logits[start : start + ticket.size])
            start += ticket.size

    def _run(self, images: Images) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: Tensor = self._model(torch.from_numpy(images))
        return logits.numpy()


def network() -> tuple[nn.Module, Tensor]:
    """torchvision's resnet18 with random weights, whose head sends a tenth of the images to TARGET; and the images."""
    from torchvision import models

    torch.manual_seed(0)
    model = models.resnet18(num_classes=CLASSES).eval()
    coarse = torch.rand(400, 3, 8, 8) * torch.rand(400, 3, 1, 1)
    images = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    head = nn.Linear(model.fc.in_features, CLASSES)
    model.fc = nn.Identity()
    with torch.inference_mode():
        features = torch.cat([model(batch) for batch in images.split(50)])
    direction = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[0]
    along = features @ direction
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-100.0)
        head.weight[TARGET] = direction / along.std()
        head.bias[TARGET] = -torch.quantile(along, 1 - SHARE) / along.std()
        head.bias[TARGET + 1] = 0.0  # everything else goes here
    model.fc = head
    return model, images


def artifact(captured: Captured, rule: Rule, networks: Sequence[dict[int, Correction]]) -> Artifact:
    """An artifact without a fit: what it decides does not matter, what it computes does."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": "mmdf" if isinstance(rule, MarginChange) else "bna",
        "created_at": "2026-01-01T00:00:00+00:00",
        "fingerprint": captured.fingerprint(),
        "input": captured.spec.to_json(),
        "classes": [str(index) for index in range(captured.classes)],
        "settings": FitSettings().to_json(),
        **rule.to_manifest(),
        "fit": {},
    }
    return Artifact(captured, tuple(networks), rule, manifest)


def artifacts(captured: Captured, images: Tensor) -> dict[str, Artifact]:
    """mmdf: quantile clips at every activation. bna: a renormalisation at every batch norm."""
    maxima = observe(captured, images[:100], batch_size=50).maxima
    clips: dict[int, Correction] = {
        site.index: Clip(torch.quantile(maxima[site.index], 0.95, dim=0), None, axis=site.axis, ndim=site.ndim)
        for site in captured.sites
    }
    norms: dict[int, Correction] = {
        site.index: Renormalise(
            torch.zeros(site.channels), torch.ones(site.channels), torch.full((site.channels,), -1e3),
            torch.full((site.channels,), 1e3), axis=site.axis, ndim=site.ndim,
        )
        for site in correction_sites(captured)
    }  # fmt: skip
    law = ExponentialTail.fit(np.random.default_rng(0).normal(size=500))
    return {
        "mmdf": artifact(captured, MarginChange(law, 0.005), [clips]),
        "bna, 1 class": artifact(captured, Disagreement((TARGET,)), [norms]),
        "bna, nothing": artifact(captured, Disagreement(()), []),
    }


def served(name: str, made: Artifact, threads: int = 1) -> Classifier:
    guard = made.guard()
    metrics = Metrics("resnet18", guard.classes, registry=CollectorRegistry())
    return Classifier(
        guard, ModelConfig.model_validate({"artifact": name, "name": "resnet18", "threads": threads}), metrics
    )


async def measure(systems: dict[str, Any], traffic: dict[str, list[Images]], rounds: int) -> dict[str, Any]:
    """Seconds of every request: traffic → system → round → [requests]."""
    asks: dict[str, Ask] = {}
    for name, system in systems.items():
        await system.start()
        asks[name] = system.ask if isinstance(system, Bare) else _asking(system)
    names = list(systems)
    seconds: dict[str, Any] = {kind: {name: [] for name in names} for kind in traffic}
    for number in range(rounds + 1):
        for kind, requests in traffic.items():
            found: dict[str, list[float]] = {name: [] for name in names}
            for start in range(0, len(requests), BLOCK):
                turn = (start // BLOCK + number) % len(names)
                for name in names[turn:] + names[:turn]:
                    await asks[name](requests[start])
                    for images in requests[start : start + BLOCK]:
                        begun = time.perf_counter()
                        await asks[name](images)
                        found[name].append(time.perf_counter() - begun)
            if number:  # the first round warms up
                for name in names:
                    seconds[kind][name].append(found[name])
    for system in systems.values():
        await system.close()
    return seconds


def _asking(classifier: Classifier) -> Ask:
    async def ask(images: Images) -> Any:
        with classifier.visit() as live:
            return await classifier.infer(images, live)

    return ask


def summary(rounds: list[list[float]], bare: list[list[float]]) -> dict[str, Any]:
    every = [second for one in rounds for second in one]
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(rounds, bare, strict=True))
    times = sorted(sum(a) / sum(b) for a, b in zip(rounds, bare, strict=True))
    return {
        "p50_ms": statistics.median(statistics.median(one) for one in rounds) * 1e3,
        "p99_ms": float(np.quantile(every, 0.99)) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_largest": ratios[-1],
        "time": statistics.median(times),
        "time_least": times[0],
        "time_largest": times[-1],
        "rounds": len(rounds),
        "requests": len(every),
    }


@click.command(help=__doc__)
@click.option("--rounds", default=8, show_default=True)
@click.option("--requests", default=20, show_default=True, help="Of each kind of traffic, a round and a system.")
@record.json_option
def main(rounds: int, requests: int, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    model, images = network()
    with torch.inference_mode():
        sent = torch.cat([model(batch) for batch in images.split(50)]).argmax(1) == TARGET
    other, suspected = ([image[None].numpy() for image in images[rows]] for rows in (~sent, sent))
    cycle = [(suspected if i % round(1 / SHARE) == 0 else other)[i % len(suspected)] for i in range(requests)]
    traffic = dict(zip(TRAFFIC, (other[:requests], (suspected * requests)[:requests], cycle), strict=True))
    captured = capture(model, (3, SIZE, SIZE))
    made = artifacts(captured, images)
    systems: dict[str, Any] = {"bare": Bare(model)} | {name: served(name, one) for name, one in made.items()}
    systems["mmdf, 2 threads"] = served("mmdf", made["mmdf"], threads=2)
    click.echo(
        f"resnet18, 3×{SIZE}×{SIZE}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ", nl=False
    )
    click.echo(f"{rounds} rounds of {requests} requests; {int(sent.sum())} of {len(sent)} images go to class {TARGET}")
    seconds = asyncio.run(measure(systems, traffic, rounds))
    click.echo("traffic          system                p50        p99   ratio (least-largest)   time (least-largest)")
    rows = []
    for kind, found in seconds.items():
        for name, of_rounds in found.items():
            row = {"traffic": kind, "system": name, **summary(of_rounds, found["bare"])}
            rows.append(row)
            click.echo(
                f"{kind:16} {name:15} {row['p50_ms']:6.2f} ms {row['p99_ms']:7.2f} ms   "
                f"{row['ratio']:.3f} ({row['ratio_least']:.3f}-{row['ratio_largest']:.3f})     "
                f"{row['time']:.3f} ({row['time_least']:.3f}-{row['time_largest']:.3f})"
            )
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
