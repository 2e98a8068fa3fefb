"""A guard on several machines, and clients of it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from hand import bna_artifact, image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from benchmarks.hosts import OWN, Host, Hosts
from deployments.watch.nodes import entries

BODY = json.dumps({"instances": image(1.0, 0.2, 0.1).tolist()}).encode()  # flagged
ROUTE = "/v1/models/hand:predict"
VERDICTS = ("clean", "flagged")


def configuration(folder: Path, **model: Any) -> Path:
    """A configuration file with two replicas of the model hand, of one CPU each. Ray brings the artifact to every
    machine."""
    if not (folder / "bundle.zip").exists():
        artifact = bna_artifact(0)
        fit = artifact.manifest["fit"]
        fit["targets"]["0"]["fpr_target"] = 0.0  # as a fit would say, for the alarm to bet against
        fit["images_per_class"] = [50] * len(artifact.manifest["classes"])
        artifact.save(folder / "bundle" / "hand")
        shutil.make_archive(str(folder / "bundle"), "zip", folder, "bundle")
        shutil.rmtree(folder / "bundle")
    metrics = {"metrics_dir": str(OWN / "metrics")}
    brought = {"runtime_env": {"working_dir": (folder / "bundle.zip").as_uri()}}
    guard = {"name": "guard", "route_prefix": "/", "import_path": "deployments.app:build", **brought}
    told = {"name": "guard-metrics", "route_prefix": "/metrics", "import_path": "deployments.app:build_metrics"}
    args = {"replicas": 2, "models": [{"artifact": "hand"}], **metrics}
    live = [{"name": "classifier", "user_config": {"hand": model}}] if model else []
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [guard | {"args": args, "deployments": live}, told | {"args": metrics}],
    }
    file = folder / "guard.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def alive(host: Host) -> bool:
    return httpx.get(f"http://{host.address}:8265/api/gcs_healthz").status_code == 200


def answering(host: Host) -> bool:
    return httpx.get(f"http://{host.address}:8000/v2/health/ready").status_code == 200


def deployed(hosts: Hosts) -> bool:
    """Whether every replica is up, as Serve says, and the metrics are told."""
    told(hosts, "guard_requests_total")
    said = httpx.get(f"http://{hosts.hosts[0].address}:8265/api/serve/applications/", timeout=30).raise_for_status()
    return all(one["status"] == "RUNNING" for one in said.json()["applications"].values())


def counting(host: Host) -> bool:
    """Whether replicas on it have begun to count."""
    return bool(list((host.folder / "metrics").glob("counter_*.db")))


def counted(hosts: Hosts) -> float:
    """Requests, as the head's /metrics tells."""
    return sum(sample.value for sample in told(hosts, "guard_requests_total") if sample.labels["verdict"] in VERDICTS)


def counted_elsewhere(hosts: Hosts) -> float:
    """Those of them that other machines have told the head of."""
    copies = (hosts.hosts[0].folder / "metrics" / "nodes").glob("*/counter_*.db")
    found = [(json.loads(key), value) for copy in copies for key, value, _ in entries(copy)]
    requests = [(key[2], value) for key, value in found if key[1] == "guard_requests_total"]
    return sum(value for labels, value in requests if labels["verdict"] in VERDICTS)


def evidence(hosts: Hosts) -> float:
    """Of an attack."""
    return max((sample.value for sample in told(hosts, "guard_attack_evidence")), default=0.0)


def told(hosts: Hosts, name: str) -> list[Sample]:
    """What the head's /metrics tells of a series."""
    text = httpx.get(f"http://{hosts.hosts[0].address}:8000/metrics", timeout=30).raise_for_status().text
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name == name]


def ask(client: httpx.Client, host: Host) -> int:
    """The status of a request; one that fails is tried once more, after half a second."""
    status = 0
    for pause in (0.5, 0.0):
        try:
            status = client.post(f"http://{host.address}:8000{ROUTE}", content=BODY, timeout=30).status_code
        except httpx.HTTPError:
            status = 0
        if status == 200:
            break
        time.sleep(pause)
    return status


@contextmanager
def clients(*hosts: Host) -> Iterator[list[int]]:
    """Four clients who ask without a pause, in turn at these machines; the statuses of their requests, all there at the
    end."""
    statuses: list[int] = []
    ending = threading.Event()

    def client(number: int) -> None:
        with httpx.Client() as one:
            while not ending.is_set():
                statuses.append(ask(one, hosts[number % len(hosts)]))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    try:
        yield statuses
    finally:
        ending.set()
        for one in threads:
            one.join()
