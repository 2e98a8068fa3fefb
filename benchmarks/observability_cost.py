"""What counting costs a request: the served classifier with its metrics and without any, side by side in one run.

``python -m benchmarks.observability_cost [--rounds 300] [--requests 96] [--clients 32] [--json FILE]``

ResNet-18 (64×64) and its guard by mmdf in two threads, in process (no HTTP), so many clients that ask without a pause,
an image a request. *counted*: every series, written to files as in a replica. *events*: besides, each flagged request
(a twentieth of them) is an event in a file. *silent*: nothing is counted, and no stage is timed. The systems take turns
in each of many short rounds, since the machine's speed wanders. ``ratio`` is a round's value over silent's: the median
over the rounds with its 95% confidence interval (bootstrap), of a round's median latency and of its processor time.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

FOLDER = tempfile.TemporaryDirectory(prefix="guard-counters-")
os.environ["PROMETHEUS_MULTIPROC_DIR"] = FOLDER.name  # before prometheus_client is imported, as in a replica

from prometheus_client import CollectorRegistry  # noqa: E402

from benchmarks import record  # noqa: E402
from benchmarks.serving_cost import CLASSES, SIZE, artifacts, network  # noqa: E402
from deployments.config import ModelConfig  # noqa: E402
from deployments.engine.classifier import Classifier  # noqa: E402
from deployments.engine.metrics import Metrics  # noqa: E402
from guard.artifact import Artifact  # noqa: E402
from guard.capture import capture  # noqa: E402
from guard.progress import bars  # noqa: E402

Images = NDArray[np.float32]


class Nothing:
    """Takes every call, and does nothing."""

    def __getattr__(self, _name: str) -> Any:
        return self

    def __call__(self, *_arguments: object, **_more: object) -> Any:
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_error: object) -> None:
        return None


class Silent(Metrics):
    """Counts nothing, and times nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__("silent", names, registry=CollectorRegistry())
        for name, value in list(vars(self).items()):
            if callable(value):
                setattr(self, name, Nothing())
        for name in ("stage", "verdicts", "statistics", "images"):
            setattr(self, name, Nothing())


def systems(made: Artifact, folder: Path) -> dict[str, Classifier]:
    threshold = 0.05  # so many random images are flagged
    names = tuple(map(str, range(CLASSES)))

    def one(name: str, metrics: Any, **settings: Any) -> Classifier:
        config = {"artifact": name, "name": name, "threshold": threshold, **settings}
        return Classifier(made.guard(), ModelConfig.model_validate(config), metrics)

    def counted(name: str) -> Metrics:
        return Metrics(name, names, registry=CollectorRegistry())

    events = {"file": str(folder / "events.jsonl")}
    return {
        "silent": one("silent", Silent(names)),
        "counted": one("counted", counted("counted")),
        "events": one("events", counted("events"), events=events),
    }


async def milliseconds(system: Classifier, images: Images, requests: int, clients: int) -> tuple[float, float]:
    """(median of a request, processor time of one), ms."""
    waiting = iter(range(requests))
    took: list[float] = []

    async def client() -> None:
        for index in waiting:
            begun = time.perf_counter()
            await system.infer(images[index % len(images)][None], system.live)
            took.append(time.perf_counter() - begun)

    used = time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    return float(np.median(took) * 1e3), (time.process_time() - used) / requests * 1e3


async def measure(
    served: dict[str, Classifier], images: Images, rounds: int, requests: int, clients: int
) -> dict[str, NDArray[np.float64]]:
    """system → `milliseconds` of each round, [rounds, 2]."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in served}
    for system in served.values():
        await system.start()
        await milliseconds(system, images, clients * 2, clients)
    names = list(served)
    with bars("rounds", rounds) as advance:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(await milliseconds(served[name], images, requests, clients))
            advance(1)
    for system in served.values():
        await system.close()
    return {name: np.array(values) for name, values in found.items()}


def with_interval(ratios: NDArray[np.float64]) -> list[float]:
    """Median of ratios [rounds], and the ends of its 95% confidence interval."""
    if np.ptp(ratios) == 0.0:
        return [float(ratios[0])] * 3
    interval = bootstrap((ratios,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return [float(np.median(ratios)), float(interval.low), float(interval.high)]


@click.command(help=__doc__)
@click.option("--rounds", default=300, show_default=True)
@click.option("--requests", default=96, show_default=True, help="Of each system in each round.")
@click.option("--clients", default=32, show_default=True)
@record.json_option
def main(rounds: int, requests: int, clients: int, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    model, images = network()
    made = artifacts(capture(model, (3, SIZE, SIZE)), images)["mmdf"]
    with tempfile.TemporaryDirectory() as scratch:
        served = systems(made, Path(scratch))
        found = asyncio.run(measure(served, images.numpy(), rounds, requests, clients))
    click.echo(
        f"{clients} clients, {rounds} rounds of {requests} requests; over silent, with the interval of the median"
    )
    rows = []
    for name, values in found.items():
        p50, used = (with_interval(column) for column in (values / found["silent"]).T)
        middle = np.median(values, axis=0).tolist()
        rows.append({"system": name, "p50_ms": middle[0], "cpu_ms": middle[1], "p50_ratio": p50, "cpu_ratio": used})
        shown = "   ".join(f"{one[0]:.3f} ({one[1]:.3f}-{one[2]:.3f})" for one in (p50, used))
        click.echo(f"{name:<8} p50 {middle[0]:7.2f} ms, processor {middle[1]:6.2f} ms a request   {shown}")
    record.write(json_path, rows=rows)
    FOLDER.cleanup()


if __name__ == "__main__":
    main()
