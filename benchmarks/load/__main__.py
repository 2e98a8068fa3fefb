"""What the guard costs under load, by an established load generator.

``python -m benchmarks.load [--seconds 8] [--rounds 3] [--proxy haproxy] [--out load]``

Side by side on one Ray Serve, one replica each: the bare network (same HTTP, same queue, no guard), the guard by mmdf
in each mode, and in mode flag with the later half of the sites corrected alone (*middle*). Closed loop at several
numbers of clients, open loop at fixed rates, one system after the other in each round. Writes a page with tables and
plots, and the figures as JSON.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import record
from benchmarks.load import report
from benchmarks.load.driver import WARM_UP_S, Run, write_bodies
from benchmarks.processes import cpu_seconds, replicas
from benchmarks.serving_cost import SIZE, artifacts, network
from deployments.config import MODES, ModelConfig, ServeConfig
from deployments.document import document
from deployments.engine.metrics import STAGES
from deployments.proxies import PROXIES, Proxy, free_port
from deployments.serve import running
from guard.capture import capture

GUARDED = {mode: ("every", mode) for mode in MODES} | {"middle": ("later half", "flag")}  # name → sites, mode
SYSTEMS = ("bare", *GUARDED)
OPEN_USERS = 64


def prepare(folder: Path) -> dict[str, Path]:
    """The artifacts by their sites, and the requests as files in ``folder``/bodies."""
    model, images = network()
    write_bodies(folder / "bodies", [(image[None] * 255).round().byte().numpy() for image in images[:100]])
    every = artifacts(capture(model, (3, SIZE, SIZE)), images)["mmdf"]
    (clips,) = every.networks
    sites = sorted(clips)
    half = replace(every, networks=({site: clips[site] for site in sites[len(sites) // 2 :]},))
    return {"every": every.save(folder / "every"), "later half": half.save(folder / "half")}


def infer(system: str) -> str:
    return f"/{system}/v2/models/{system}/infer"


def stage_seconds(url: str, system: str) -> dict[str, tuple[float, float]]:
    """stage → (seconds, count) so far."""
    found = {stage: [0.0, 0.0] for stage in STAGES}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text):
        for sample in family.samples:
            if sample.labels.get("model") == system and sample.labels.get("stage") in found:
                if sample.name == "guard_stage_seconds_sum":
                    found[sample.labels["stage"]][0] = sample.value
                elif sample.name == "guard_stage_seconds_count":
                    found[sample.labels["stage"]][1] = sample.value
    return {stage: (seconds, count) for stage, (seconds, count) in found.items()}


def measure(run: Run, kind: str, loads: list[float], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One row a load and system."""
    samples: dict[tuple[float, str], list[Any]] = {}
    with click.progressbar(length=len(loads) * len(SYSTEMS) * rounds, label=kind, file=sys.stderr) as bar:
        for number in range(rounds):
            for load in loads:
                turn = number % len(SYSTEMS)
                for system in SYSTEMS[turn:] + SYSTEMS[:turn]:
                    (replica,) = replicas(system)
                    before = cpu_seconds(replica)
                    users, rate = (int(load), 0.0) if kind == "closed" else (OPEN_USERS, load)
                    found = run(infer(system), users=users, seconds=seconds, rate=rate)
                    found["cpu"] = cpu_seconds(replica) - before
                    if replicas(system) != [replica]:
                        raise RuntimeError(f"the replica of {system} ended during a measurement")
                    samples.setdefault((load, system), []).append(found)
                    bar.update(1)
    rows = []
    for (load, system), found in samples.items():
        bare = samples[load, "bare"]
        every = np.concatenate([one["milliseconds"] for one in found])
        answered = sum(len(one["milliseconds"]) for one in found)
        quantile = {
            name: float(np.median([np.quantile(one["milliseconds"], q) for one in found]))
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))
        }
        ratios = {
            f"ratio_{name}": [
                float(np.quantile(one["milliseconds"], q) / np.quantile(other["milliseconds"], q))
                for one, other in zip(found, bare, strict=True)
            ]
            for name, q in (("p50", 0.5), ("p99", 0.99))
        }
        warm = (seconds + WARM_UP_S) / seconds  # processor time is of the warm-up, too
        rows.append(
            {
                "kind": kind, "load": load, "system": system, "n": len(every), **quantile, **ratios,
                "throughput": answered / (seconds * len(found)),
                "cpu_ms": sum(one["cpu"] for one in found) / (answered * warm) * 1e3,
                "failed": sum(len(one["failures"]) for one in found),
            }
        )  # fmt: skip
    return rows


def stages(run: Run, url: str, seconds: float) -> dict[str, dict[str, float]]:
    """Mean milliseconds a request spends in each stage, with one client."""
    found: dict[str, dict[str, float]] = {}
    for system in GUARDED:
        before = stage_seconds(url, system)
        run(infer(system), users=1, seconds=seconds)
        after = stage_seconds(url, system)
        count = after["total"][1] - before["total"][1]
        found[system] = {stage: (after[stage][0] - before[stage][0]) / count * 1e3 for stage in after}
    return found


@contextmanager
def uvicorn_alone() -> Iterator[str]:
    """A route that does nothing, on uvicorn in a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [*(sys.executable, "-m", "uvicorn", "benchmarks.load.endpoints:nothing", "--port", str(port)),
         *("--log-level", "warning", "--no-access-log")]
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def noop(run: Run, folder: Path, seconds: float) -> dict[str, float]:
    """p50 in ms of a request that runs no network, through the ingress and on uvicorn alone, in turn."""
    with uvicorn_alone() as alone:
        there = Run(alone, folder)
        pairs = [
            (run("/flag/v2/health/live", users=1, seconds=seconds, method="GET"),
             there("/", users=1, seconds=seconds, method="GET"))
            for _ in range(3)
        ]  # fmt: skip
    medians = [[float(np.median(one["milliseconds"])) for one in pair] for pair in pairs]
    ratios = sorted(a / b for a, b in medians)
    ingress, uvicorn = (float(np.median(column)) for column in zip(*medians, strict=True))
    return {"ingress": ingress, "uvicorn": uvicorn, "ratio": ratios[1], "least": ratios[0], "largest": ratios[2]}


@click.command(help=__doc__)
@click.option("--seconds", default=8.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--clients", default="1,8,32", show_default=True, help="Closed loop.")
@click.option("--rates", default="10,25", show_default=True, help="Open loop, requests a second; empty: none.")
@click.option("--proxy", type=click.Choice(PROXIES), default="auto", show_default=True)
@click.option("--out", default="load", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(seconds: float, rounds: int, clients: str, rates: str, proxy: Proxy, out: Path) -> None:
    torch.set_num_threads(1)
    about = record.record()  # before the load is our own
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = prepare(folder)
        first = document(_config(made, "flag"), host="127.0.0.1", port=free_port())
        with running(first, proxy=proxy) as server:
            _serve_beside(made)
            run = Run(server.url, folder)
            rows = measure(run, "closed", [float(n) for n in clients.split(",") if n], seconds, rounds)
            rows += measure(run, "open", [float(n) for n in rates.split(",") if n], seconds, rounds)
            figures = about | {
                "proxy": server.proxy,
                "rows": rows,
                "stages": stages(run, server.url, seconds),
                "noop": noop(run, folder, seconds / 2),
            }
    page = report.write(out, figures)
    click.echo(report.text(figures))
    click.echo(f"report: {page}", err=True)


def _config(made: dict[str, Path], system: str) -> ServeConfig:
    sites, mode = GUARDED[system]
    model = ModelConfig.model_validate({"artifact": made[sites], "name": system, "mode": mode})
    return ServeConfig(models=(model,), cpus_per_replica=0.1)


def _serve_beside(made: dict[str, Path]) -> None:
    """Each system as an application of its own."""
    from ray import serve

    from benchmarks.load import endpoints  # not above: whoever imports Ray Serve early decides on its proxy
    from deployments import app

    targets = [serve.RunTarget(endpoints.bare(), name="bare", route_prefix="/bare")]
    targets += [
        serve.RunTarget(app.application(_config(made, system)), name=system, route_prefix=f"/{system}")
        for system in GUARDED
    ]
    serve.run_many(targets)


if __name__ == "__main__":
    main()
