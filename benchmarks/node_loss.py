"""A machine loses its power under load, and an attack begins afterwards: what clients, counters and the alarm notice.

``python -m benchmarks.node_loss [--requests 12000] [--concurrency 16] [--share 0.1] [--json FILE]``  (as root)

Three machines of one Ray cluster (network namespaces of this one): a head without replicas, and two workers with a
replica of the demo's poisoned network each, in mode flag. Clients send clean images to both workers in turn, one a
request, as fast as answers come. A third of the way one worker loses its power: a client whose request fails pauses and
tries once more, at the other. Two thirds of the way an attack begins: a share of the images bears the trigger. Each
answer is compared with what the library says of the image offline.

answered, wrong, failed first, failed twice: as in ``benchmarks.faults``. counted: requests that /metrics tells of at
the end, of both machines. evidence: of an attack, as /metrics told it, at most before the attack and at most after;
alarm_s: from the attack's begin until it stood at the alert's 9.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import record
from benchmarks.faults import NAME, Load, expected, to_bytes
from benchmarks.hosts import OWN, Host, Hosts, missing, until
from deployments.demo import story
from deployments.proxies import ENABLED
from guard.progress import bars

ALARM = 9.0
SETTLED_S = 8.0  # after the last request: a look or two


def configuration(folder: Path, artifact: Path) -> Path:
    """The file for `serve deploy`: two replicas of one CPU each, and the metrics."""
    metrics = {"metrics_dir": str(OWN / "metrics")}
    model = {"artifact": str(artifact), "name": NAME, "mode": "flag"}
    guard = {"name": "guard", "route_prefix": "/", "import_path": "deployments.app:build"}
    told = {"name": "guard-metrics", "route_prefix": "/metrics", "import_path": "deployments.app:build_metrics"}
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [guard | {"args": {"replicas": 2, "models": [model], **metrics}}, told | {"args": metrics}],
    }
    file = folder / "guard.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def ready(host: Host) -> bool:
    return httpx.get(f"http://{host.address}:8000/v2/health/ready").is_success


def counting(host: Host) -> bool:
    """Whether a replica on it has begun to count."""
    return any((host.folder / "metrics").glob("*.db"))


def told(head: Host, name: str) -> dict[tuple[str, ...], float]:
    """The series of this name at the head's /metrics, by verdict where they have one."""
    text = httpx.get(f"http://{head.address}:8000/metrics", timeout=30).raise_for_status().text
    return {
        tuple(sample.labels[key] for key in ("mode", "verdict") if key in sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def counted(head: Host) -> float:
    """Requests with a verdict."""
    found = told(head, "guard_requests_total")
    return sum(value for labels, value in found.items() if labels[1] in ("clean", "flagged"))


async def loss(hosts: Hosts, load: Load, images: list[int], begins: int, concurrency: int) -> dict[str, Any]:
    """The load, with the power cut and the looks at /metrics beside. begins: the request that begins the attack."""
    head, _, victim = hosts.hosts
    seen: list[tuple[float, float]] = []  # when it was there, evidence
    attack = math.inf

    def turns() -> Iterator[int]:
        nonlocal attack
        for number, image in enumerate(images):
            if number == begins:
                attack = time.perf_counter()
            yield image

    with bars("requests", len(images)) as advance:
        work = asyncio.create_task(load.run(turns(), concurrency, advance))

        async def cut() -> None:
            while load.sent < len(images) // 3:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(victim.kill)

        async def look() -> None:
            while True:
                evidence = await asyncio.to_thread(told, head, "guard_attack_evidence")
                seen.append((time.perf_counter(), max(evidence.values(), default=0.0)))
                await asyncio.sleep(0.5)

        cutting, looking = asyncio.create_task(cut()), asyncio.create_task(look())
        start = time.perf_counter()
        await work
        seconds = time.perf_counter() - start
        await cutting
        await asyncio.sleep(SETTLED_S)
        looking.cancel()
    before = [evidence for when, evidence in seen if when < attack]
    after = [(when, evidence) for when, evidence in seen if when >= attack]
    alarms = [when for when, evidence in after if evidence >= ALARM]
    return load.figures() | {
        "seconds": seconds,
        "counted": await asyncio.to_thread(counted, head),
        "evidence": {"before": max(before, default=0.0), "most": max(evidence for _, evidence in after)},
        "alarm_s": alarms[0] - attack if alarms else None,
    }


@click.command(help=__doc__)
@click.option("--requests", default=12_000, show_default=True)
@click.option("--concurrency", default=16, show_default=True)
@click.option("--share", default=0.1, show_default=True, help="Of the attack's images, that bear the trigger.")
@click.option("--pause", default=0.5, show_default=True, help="Seconds before the second try.")
@record.json_option
def main(requests: int, concurrency: int, share: float, pause: float, json_path: Path | None) -> None:
    if (lacks := missing()) is not None:
        raise click.ClickException(lacks)
    about = record.record()
    os.environ[ENABLED] = "1"
    with tempfile.TemporaryDirectory(prefix="guard-loss-") as scratch:
        folder = Path(scratch)
        prepared = story.prepare(folder, seed=0, progress=bars)
        clean, triggered = (to_bytes(one.images) for one in (prepared.clean, prepared.triggered))
        draw = np.random.default_rng(0)
        sent = draw.integers(0, len(clean), requests)
        begins = 2 * requests // 3
        bearing = np.flatnonzero(draw.random(requests) < share)
        bearing = bearing[bearing >= begins]
        sent[bearing] = len(clean) + draw.integers(0, len(triggered), len(bearing))
        images = np.concatenate([clean, triggered])
        with Hosts(folder, 3) as hosts:
            head, *workers = hosts.hosts
            hosts.start_ray(head_cpus=0)
            until(lambda: httpx.get(f"http://{head.address}:8265/api/gcs_healthz").is_success, "the head did not start")
            hosts.deploy(configuration(folder, prepared.artifact))
            for host in workers:
                until(partial(ready, host), f"{host.name} did not serve")
                until(partial(counting, host), f"no replica on {host.name}")
            until(lambda: told(head, "guard_requests_total"), "no counters")
            load = Load(
                [f"http://{host.address}:8000" for host in workers],
                images,
                expected({"1": prepared.artifact}, images),
                pause,
            )
            figures = asyncio.run(loss(hosts, load, sent.tolist(), begins, concurrency))
    figures |= {"triggered": len(bearing)}
    for name, value in figures.items():
        click.echo(f"{name:16} {value}")
    for one in load.wrong[:10]:
        click.echo(f"wrong: {one}")
    record.write(json_path, about, **figures)
    if load.wrong or load.twice or load.answered != requests:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
