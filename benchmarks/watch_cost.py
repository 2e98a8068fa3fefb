"""What it costs to add up the counters of many replicas on many nodes.

``python -m benchmarks.watch_cost [--nodes 1,10,100] [--replicas 1,16] [--repeat 5] [--json FILE]``

Files of one real replica (a model of ten classes that has counted some requests) are copied under the numbers of living
processes, to stand for the replicas of a node, and what such a node sends stands for each of many. *node*: its reader's
share, every two seconds. *take in*: the head writes what all nodes sent. *look*: the head adds up, and bets. *scrape*:
the head adds up for /metrics. Seconds of one thread, medians; without Ray's transport, which runs beside. ``sent``:
bytes that one node sends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

SCRATCH = tempfile.TemporaryDirectory(prefix="guard-watch-")
os.environ["PROMETHEUS_MULTIPROC_DIR"] = SCRATCH.name  # before prometheus_client is imported, as in a replica

from prometheus_client import CollectorRegistry  # noqa: E402

from benchmarks import record  # noqa: E402
from deployments.engine.metrics import Metrics  # noqa: E402
from deployments.watch.facts import Facts, Shape, began  # noqa: E402
from deployments.watch.nodes import Copies, Node  # noqa: E402
from deployments.watch.watch import Watch  # noqa: E402
from guard.progress import bars  # noqa: E402

CLASSES = 10
REQUESTS = 1000


def replica() -> tuple[dict[str, bytes], Facts]:
    """The files that a replica leaves, by their kinds, and what it says of its artifact."""
    labels = tuple(map(str, range(CLASSES)))
    metrics = Metrics("m", labels, registry=CollectorRegistry())
    made_at = "2026-11-21T09:00:00+00:00"
    metrics.artifact(method="mmdf", fingerprint="f", version="1", threshold=0.005, created_at=made_at)
    draw = np.random.default_rng(0)
    metrics.images(draw.random((4, 3, 8, 8), dtype=np.float32))
    scores = draw.normal(-2.0, 1.0, REQUESTS)
    flagged = scores > 0.5
    metrics.requests("flag", "clean").inc(REQUESTS)
    metrics.verdicts(draw.integers(0, CLASSES, REQUESTS), flagged)
    metrics.statistics(scores, draw.random(REQUESTS))
    files = {path.stem.rpartition("_")[0]: path.read_bytes() for path in Path(SCRATCH.name).glob("*.db")}
    bounds = {name: Shape(bounds=found, shares=_even(len(found) + 1), images=500)
              for name, found in metrics.bounds.items()}  # fmt: skip
    facts = Facts(
        model="m", version="1", method="mmdf", fingerprint="f", calibrated_at=made_at, labels=labels,
        nominal=dict.fromkeys(labels, 0.005), threshold=0.005, support=0.002, score_limit=0.5,
        score=bounds["score"], brightness=bounds["brightness"], contrast=bounds["contrast"],
    )  # fmt: skip
    return files, facts


def _even(count: int) -> tuple[float, ...]:
    return (1 / count,) * count


@contextmanager
def node(folder: Path, replicas: int, files: dict[str, bytes], facts: Facts) -> Iterator[Path]:
    """A folder with the files of so many living processes."""
    (folder / "models").mkdir(parents=True)
    processes = [subprocess.Popen(["sleep", "infinity"]) for _ in range(replicas)]
    try:
        for process in processes:
            for kind, content in files.items():
                (folder / f"{kind}_{process.pid}.db").write_bytes(content)
            said = facts.model_copy(update={"began": began(process.pid)})
            (folder / "models" / f"m.{process.pid}.json").write_text(said.model_dump_json())
        yield folder
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder)


def cost(nodes: int, replicas: int, repeat: int, scratch: Path) -> dict[str, Any]:
    """One row: nodes like one another with so many replicas each."""
    files, facts = replica()
    head = scratch / secrets.token_hex(4)
    head.mkdir()
    seconds: dict[str, list[float]] = {}
    with node(scratch / secrets.token_hex(4), replicas, files, facts) as there:
        copies, watch = Copies(head), Watch(head)
        reader = Node(there)
        for _ in range(repeat):
            snapshot = _timed(seconds, "node", partial(reader.read, {}))
            sent = {str(number): snapshot._replace(place=f"place{number}") for number in range(nodes)}
            _timed(seconds, "take_in", partial(copies.update, sent))
            _timed(seconds, "look", watch.look)
            _timed(seconds, "scrape", watch.render)
        size = sum(map(len, snapshot.changed.values()))
    shutil.rmtree(head)
    return {
        "nodes": nodes, "replicas": replicas, **{name: median(found) for name, found in seconds.items()},
        "most": {name: max(found) for name, found in seconds.items()}, "sent": size,
    }  # fmt: skip


def _timed(seconds: dict[str, list[float]], name: str, what: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    result = what()
    seconds.setdefault(name, []).append(time.perf_counter() - begun)
    return result


@click.command(help=__doc__)
@click.option("--nodes", default="1,10,100", show_default=True, help="How many there are.")
@click.option("--replicas", default="1,16", show_default=True, help="On each node.")
@click.option("--repeat", default=5, show_default=True)
@record.json_option
def main(nodes: str, replicas: str, repeat: int, json_path: Path | None) -> None:
    about = record.record()
    cases = [(int(count), int(each)) for count in nodes.split(",") for each in replicas.split(",")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="guard-nodes-") as scratch, bars("nodes and replicas", len(cases)) as step:
        for count, each in cases:
            rows.append(cost(count, each, repeat, Path(scratch)))
            step(1)
    click.echo(f"{'nodes':>6} {'replicas each':>14} {'node':>9} {'sent':>9} {'take in':>9} {'look':>9} {'scrape':>9}")
    for row in rows:
        times = " ".join(f"{row[name] * 1e3:6.1f} ms" for name in ("take_in", "look", "scrape"))
        click.echo(
            f"{row['nodes']:6} {row['replicas']:14} {row['node'] * 1e3:6.1f} ms {row['sent'] / 1e3:6.0f} kB {times}"
        )
    record.write(json_path, about, rows=rows)


if __name__ == "__main__":
    main()
