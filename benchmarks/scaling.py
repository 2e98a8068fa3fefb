"""What a second machine with a second replica brings.

``python -m benchmarks.scaling [--seconds 10] [--rounds 3] [--clients 8] [--images 8] [--json FILE]``  (as root)

Three machines of one Ray cluster (network namespaces of this one): a head without replicas, and two workers, each of
which has one core. On them run two applications, side by side: the guard (ResNet-18, 64×64, mmdf on every site, mode
flag) with one replica, and with two, one a machine. Locust asks, as fast as answers come, with so many images a
request, so that its own work is small: ``alone`` the one replica; ``away`` the same one by the address of the other
machine, whose proxy passes requests on; ``both`` the two replicas, half of the clients at each machine's address.

Clients and head share the two cores with the workers, and two busy cores are not twice one: `machine` is by how much
more the bare network runs in a process on each core than in one, afterwards and without any server. `scaling` is the
ratio of throughputs, both over alone (within a round: median, least, largest), ``cores`` processor time by who took it
(seconds a second).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import click
import httpx
import numpy as np
import torch
import yaml

from benchmarks import record
from benchmarks.hosts import OWN, Host, Hosts, missing, until
from benchmarks.load.driver import Run, write_bodies
from benchmarks.processes import cpu_seconds, title, titles
from benchmarks.serving_cost import SIZE, artifacts, network
from deployments.proxies import ENABLED
from guard.capture import capture
from guard.progress import bars

REPLICAS = {"one": 1, "two": 2}
CPUS = {"one": 0.3, "two": 0.6}  # of the one that a worker has: two of the latter find room on two workers only
PHASES = ("alone", "away", "both")
REQUESTS = 20
BEGUN_S = 4.0  # until Locust is there and has warmed up
BUSY = """
import sys, time
import torch
from benchmarks.serving_cost import network
torch.set_num_threads(1)
model, images = network()
batch = images[:int(sys.argv[1])]
with torch.inference_mode():
    model(batch)
    print(flush=True)
    sys.stdin.readline()
    end, passes = time.perf_counter() + float(sys.argv[2]), 0
    while time.perf_counter() < end:
        model(batch)
        passes += 1
print(passes)
"""
GROUPS = ("replicas", "proxies", "rest of the workers", "head", "clients")


def configuration(folder: Path, artifact: Path) -> Path:
    """The file for `serve deploy`: an application for each number of replicas, and the metrics."""
    metrics = {"metrics_dir": str(OWN / "metrics")}
    applications = [
        {
            "name": name, "route_prefix": f"/{name}", "import_path": "deployments.app:build",
            "args": {"replicas": count, "cpus_per_replica": CPUS[name],
                     "models": [{"artifact": str(artifact), "name": name, "mode": "flag"}], **metrics},
        }
        for name, count in REPLICAS.items()
    ]  # fmt: skip
    told = {"name": "guard-metrics", "route_prefix": "/metrics", "import_path": "deployments.app:build_metrics"}
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [*applications, told | {"args": metrics}],
    }
    file = folder / "guard.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def ready(host: Host, name: str) -> bool:
    return httpx.get(f"http://{host.address}:8000/{name}/v2/health/ready").status_code == 200


def replicas(host: Host, name: str) -> list[int]:
    """The processes of an application's replicas on a machine."""
    return [process for process in host.processes() if title(process).startswith(f"ray::ServeReplica:{name}:")]


def cpu(hosts: Hosts, name: str) -> dict[str, float]:
    """Seconds of processor time so far, by who took it; the other application's replicas do nothing meanwhile."""
    head, *workers = hosts.hosts
    found = dict.fromkeys(GROUPS, 0.0)
    for host in workers:
        for process in host.processes():
            told = title(process)
            if told.startswith(f"ray::ServeReplica:{name}:"):
                group = "replicas"
            elif "haproxy" in told.partition(" ")[0].lower() or "HAProxy" in told or "ProxyActor" in told:
                group = "proxies"
            else:
                group = "rest of the workers"
            found[group] += cpu_seconds(process)
    found["head"] = sum(map(cpu_seconds, head.processes()))
    clients = [process for process, told in titles() if " -m locust " in told]
    found["clients"] = sum(map(cpu_seconds, clients))
    return found


def measure(hosts: Hosts, phase: str, runs: Sequence[Run], *, clients: int, seconds: float, images: int) -> Any:
    """One phase of one round."""
    name = "two" if phase == "both" else "one"
    with ThreadPoolExecutor(len(runs)) as pool:
        path = f"/{name}/v2/models/{name}/infer"
        running = [pool.submit(run, path, users=clients // len(runs), seconds=seconds) for run in runs]
        time.sleep(BEGUN_S)
        before, begun = cpu(hosts, name), time.perf_counter()
        time.sleep(seconds - BEGUN_S)
        after, wall = cpu(hosts, name), time.perf_counter() - begun
        found = [one.result() for one in running]
    milliseconds = np.concatenate([one["milliseconds"] for one in found])
    return {
        "n": len(milliseconds),
        "images_a_second": len(milliseconds) * images / seconds,
        "p50": float(np.quantile(milliseconds, 0.5)),
        "p99": float(np.quantile(milliseconds, 0.99)),
        "failed": sum(len(one["failures"]) for one in found),
        "cores": {key: (after[key] - before[key]) / wall for key in GROUPS},
    }


def machine(images: int, seconds: float) -> float:
    """By how much more the bare network runs on two cores at once than on one."""
    passes: dict[int, list[int]] = {1: [], 2: []}
    for cores in ((0,), (0, 1), (0, 1), (1,)):  # in this order, so that a machine that slows down counts for both
        running = [
            subprocess.Popen(
                ["taskset", "--cpu-list", str(core), sys.executable, "-c", BUSY, str(images), str(seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=record.ROOT,
            )
            for core in cores
        ]  # fmt: skip
        for one in running:
            cast(IO[str], one.stdout).readline()
        passes[len(cores)].append(sum(int(told) for told in _together(running)))
    return sum(passes[2]) / sum(passes[1])


def _together(running: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let them begin at once; what they print."""
    for one in running:
        stdin = cast(IO[str], one.stdin)
        stdin.write("\n")
        stdin.flush()
    return [one.communicate()[0] for one in running]


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios of throughputs within them."""
    rows = {
        phase: {key: float(np.median([one[phase][key] for one in rounds])) for key in ("images_a_second", "p50", "p99")}
        | {
            "n": sum(one[phase]["n"] for one in rounds),
            "failed": sum(one[phase]["failed"] for one in rounds),
            "cores": {key: float(np.median([one[phase]["cores"][key] for one in rounds])) for key in GROUPS},
        }
        for phase in PHASES
    }
    ratios = {
        "scaling": sorted(one["both"]["images_a_second"] / one["alone"]["images_a_second"] for one in rounds),
        "machine": sorted(one["machine"] for one in rounds),
    }
    spread = {name: [float(np.median(found)), found[0], found[-1]] for name, found in ratios.items()}
    return {"rows": rows, **spread, "rounds": rounds}


@click.command(help=__doc__)
@click.option(
    "--seconds", type=click.FloatRange(min=2 * BEGUN_S), default=10.0, show_default=True, help="Of each measurement."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--clients", default=8, show_default=True, help="Closed loop.")
@click.option("--images", default=8, show_default=True, help="In a request.")
@record.json_option
def main(seconds: float, rounds: int, clients: int, images: int, json_path: Path | None) -> None:
    if (lacks := missing()) is not None:
        raise click.ClickException(lacks)
    if (cores := os.cpu_count() or 1) < 2:
        raise click.ClickException(f"this machine has {cores} core; two are needed, one for each worker")
    about = record.record()
    torch.set_num_threads(1)
    os.environ[ENABLED] = "1"
    with tempfile.TemporaryDirectory(prefix="guard-scaling-") as scratch:
        folder = Path(scratch)
        model, clean = network()
        artifact = artifacts(capture(model, (3, SIZE, SIZE)), clean)["mmdf"].save(folder / "artifact")
        draw = torch.Generator().manual_seed(0)
        chosen = [clean[torch.randint(len(clean), (images,), generator=draw)] for _ in range(REQUESTS)]
        write_bodies(folder / "bodies", [(one * 255).round().byte().numpy() for one in chosen])
        with Hosts(folder, 3, cores=(None, 0, 1)) as hosts:
            head, *workers = hosts.hosts
            hosts.start_ray(head_cpus=0)
            until(lambda: httpx.get(f"http://{head.address}:8265/api/gcs_healthz").is_success, "the head did not start")
            hosts.deploy(configuration(folder, artifact))
            for name in REPLICAS:
                for host in workers:
                    until(partial(ready, host, name), f"{host.name} did not serve")
            until(lambda: all(len(replicas(host, "two")) == 1 for host in workers), "no replica on each machine")
            runs = {}
            for host in workers:
                own = folder / f"client-{host.name}"
                shutil.copytree(folder / "bodies", own / "bodies")
                runs[host] = Run(f"http://{host.address}:8000", own)
            (home,) = (host for host in workers if replicas(host, "one"))
            asked = {"alone": [home], "away": [host for host in workers if host is not home], "both": workers}
            found: list[dict[str, Any]] = []
            with bars("measurements", rounds * len(PHASES)) as step:
                for number in range(rounds):
                    one = {}
                    for phase in PHASES[number % 3 :] + PHASES[: number % 3]:
                        to = [runs[host] for host in asked[phase]]
                        one[phase] = measure(hosts, phase, to, clients=clients, seconds=seconds, images=images)
                        step(1)
                    found.append(one)
        for one in found:  # the servers are gone
            one["machine"] = machine(images, seconds / 2)
    figures = summary(found)
    click.echo(f"{'':6} {'images/s':>9} {'p50':>8} {'p99':>8} {'failed':>6}   cores: {', '.join(GROUPS)}")
    for phase, row in figures["rows"].items():
        cores_of = ", ".join(f"{row['cores'][key]:.2f}" for key in GROUPS)
        rate = f"{row['images_a_second']:9.1f} {row['p50']:5.0f} ms {row['p99']:5.0f} ms"
        click.echo(f"{phase:6} {rate} {row['failed']:6}   {cores_of}")
    click.echo("both over alone: {:.2f} ({:.2f} to {:.2f})".format(*figures["scaling"]))
    click.echo("the network alone, two cores over one: {:.2f} ({:.2f} to {:.2f})".format(*figures["machine"]))
    record.write(json_path, about, clients=clients, images=images, **figures)


if __name__ == "__main__":
    main()
