"""Two machines, one guard: replicas on both, one place that counts them all, and a machine that loses its power."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import yaml
from hand import bna_artifact, image
from hosts import OWN, Hosts, missing
from prometheus_client.parser import text_string_to_metric_families

LACKS = missing()
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))

BODY = json.dumps({"instances": image(1.0, 0.2, 0.1).tolist()}).encode()
ROUTE = "/v1/models/hand:predict"
WAIT_S = 120.0


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two machines of one CPU each, and on each a replica."""
    folder = tmp_path_factory.mktemp("cluster")
    model = {"artifact": str(bna_artifact(0).save(folder / "hand")), "name": "hand"}
    file = folder / "guard.yaml"
    metrics = {"metrics_dir": str(OWN / "metrics")}
    guard = {"name": "guard", "route_prefix": "/", "import_path": "deployments.app:build"}
    told = {"name": "guard-metrics", "route_prefix": "/metrics", "import_path": "deployments.app:build_metrics"}
    args = {"replicas": 2, "models": [model], **metrics}
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [guard | {"args": args}, told | {"args": metrics}],
    }
    file.write_text(yaml.safe_dump(document))
    with Hosts(folder, 2) as hosts:
        hosts.start_ray()
        head = hosts.hosts[0].address
        until(lambda: httpx.get(f"http://{head}:8265/api/gcs_healthz").status_code == 200, "the head does not start")
        hosts.deploy(file)
        for host in hosts.hosts:
            url = f"http://{host.address}:8000/v2/health/ready"
            until(lambda url=url: httpx.get(url).status_code == 200, f"{host.name} does not answer")
        until(lambda: len(places(hosts)) == 2, "there is no replica on each machine")
        yield hosts


def places(hosts: Hosts) -> list[str]:
    """The machines whose replicas have begun to count."""
    return [host.name for host in hosts.hosts if list((host.folder / "metrics").glob("counter_*.db"))]


def requests_counted(hosts: Hosts) -> float:
    text = httpx.get(f"http://{hosts.hosts[0].address}:8000/metrics", timeout=30).text
    families = text_string_to_metric_families(text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "guard_requests_total" and sample.labels["verdict"] in ("clean", "flagged")
    )


def ask(client: httpx.Client, host: str) -> int:
    """The status; a failed request is tried once more after half a second, elsewhere if need be."""
    for pause in (0.5, None):
        try:
            status = client.post(f"http://{host}:8000{ROUTE}", content=BODY, timeout=30).status_code
        except httpx.HTTPError:
            status = 0
        if status == 200 or pause is None:
            return status
        time.sleep(pause)
    raise AssertionError("unreachable")


def test_metrics_tell_of_every_machine(cluster: Hosts) -> None:
    """Requests to either address are counted once each, wherever they were answered."""
    before = requests_counted(cluster)
    with httpx.Client() as client:
        answers = [ask(client, host.address) for host in cluster.hosts for _ in range(40)]
    assert answers == [200] * 80
    until(lambda: requests_counted(cluster) == before + 80, "the counts do not come together", 20)
    copied = list((cluster.hosts[0].folder / "metrics" / "nodes").glob("*/counter_*.db"))
    assert copied, "the other machine counted nothing"


def test_a_machine_loses_its_power(cluster: Hosts) -> None:
    """Clients of the other hardly notice: every request is answered within one retry, and what was counted stays."""
    head, other = cluster.hosts
    seen = requests_counted(cluster)
    statuses: list[int] = []
    ending = threading.Event()

    def client() -> None:
        with httpx.Client() as one:
            while not ending.is_set():
                statuses.append(ask(one, head.address))

    clients = [threading.Thread(target=client) for _ in range(4)]
    for one in clients:
        one.start()
    time.sleep(3)
    other.kill()
    time.sleep(20)
    ending.set()
    for one in clients:
        one.join()
    assert set(statuses) == {200}, [status for status in statuses if status != 200]
    assert len(statuses) > 100
    counted = requests_counted(cluster)
    assert seen < counted <= seen + len(statuses) * 2
    time.sleep(5)
    assert requests_counted(cluster) >= counted
