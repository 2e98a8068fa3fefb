"""What counting costs a request: the served classifier with its metrics and without any, side by side in one run.

``python -m benchmarks.observability_cost [--rounds 10] [--requests 320] [--clients 32] [--json FILE]``

ResNet-18 (64×64) and its guard by mmdf in two threads, in process (no HTTP), so many clients that ask without a pause,
an image a request. *counted*: every series, written to files as in a replica. *events*: besides, each flagged request
(a twentieth of them) is an event in a file. *silent*: nothing is counted, and no stage is timed. The systems take turns
in each round; ``ratio`` is of the medians of a round, over silent's: median, least and largest over the rounds.
"""

from __future__ import annotations

import asyncio
import json
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

FOLDER = tempfile.TemporaryDirectory(prefix="guard-counters-")
os.environ["PROMETHEUS_MULTIPROC_DIR"] = FOLDER.name  # before prometheus_client is imported, as in a replica

from prometheus_client import CollectorRegistry  # noqa: E402

from benchmarks.serving_cost import CLASSES, SIZE, artifacts, network  # noqa: E402
from benchmarks.twin_cost import processor  # noqa: E402
from deployments.config import ModelConfig  # noqa: E402
from deployments.engine.classifier import Classifier  # noqa: E402
from deployments.engine.metrics import Metrics  # noqa: E402
from guard.artifact import Artifact  # noqa: E402
from guard.capture import capture  # noqa: E402
from guard.versions import versions  # noqa: E402

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


async def milliseconds(system: Classifier, images: Images, requests: int, clients: int) -> float:
    """Median of a request."""
    waiting = iter(range(requests))
    took: list[float] = []

    async def client() -> None:
        for index in waiting:
            begun = time.perf_counter()
            await system.infer(images[index % len(images)][None], system.live)
            took.append(time.perf_counter() - begun)

    await asyncio.gather(*(client() for _ in range(clients)))
    return float(np.median(took) * 1e3)


async def measure(served: dict[str, Classifier], images: Images, rounds: int, requests: int, clients: int) -> Any:
    """system → milliseconds of each round."""
    found: dict[str, list[float]] = {name: [] for name in served}
    for system in served.values():
        await system.start()
        await milliseconds(system, images, clients * 2, clients)
    names = list(served)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(await milliseconds(served[name], images, requests, clients))
    for system in served.values():
        await system.close()
    return found


@click.command(help=__doc__)
@click.option("--rounds", default=10, show_default=True)
@click.option("--requests", default=320, show_default=True, help="Of each system in each round.")
@click.option("--clients", default=32, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(rounds: int, requests: int, clients: int, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    model, images = network()
    made = artifacts(capture(model, (3, SIZE, SIZE)), images)["mmdf"]
    with tempfile.TemporaryDirectory() as scratch:
        served = systems(made, Path(scratch))
        found = asyncio.run(measure(served, images.numpy(), rounds, requests, clients))
    hardware = {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    click.echo(f"{clients} clients, {rounds} rounds of {requests} requests on {hardware}")
    rows = []
    for name, times in found.items():
        ratios = np.sort(np.array(times) / np.array(found["silent"]))
        row = {"system": name, "p50_ms": float(np.median(times)), "ratio": [float(np.median(ratios)), *ratios[[0, -1]]]}
        rows.append(row)
        middle, least, largest = row["ratio"]
        click.echo(f"{name:<8} p50 {row['p50_ms']:7.2f} ms   ratio {middle:.3f} ({least:.3f}-{largest:.3f})")
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": rows, "hardware": hardware, "versions": versions()}, indent=2) + "\n")
    FOLDER.cleanup()


if __name__ == "__main__":
    main()
