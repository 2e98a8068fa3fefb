"""The head of a cluster dies and comes back, with its state in a real Redis, while clients ask."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from guarded import alive, answering, clients, configuration, counted, counting

from benchmarks.hosts import NETWORK, Hosts, missing, until

LACKS = missing() or (None if shutil.which("redis-server") else "needs redis-server (Debian: redis-server)")
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))

REDIS = f"{NETWORK}.254:6380"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def hosts(folder: Path) -> Iterator[Hosts]:
    with Hosts(folder, 3) as machines:
        yield machines


@pytest.fixture
def redis(hosts: Hosts) -> Iterator[str]:
    address, port = REDIS.split(":")
    command = ["redis-server", "--bind", address, "--port", port, "--protected-mode", "no", "--save", ""]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield REDIS
    server.terminate()
    server.wait()


def mode_of(address: str) -> str:
    found: str = httpx.get(f"http://{address}:8000/v2/models/hand").json()["parameters"]["guard_mode"]
    return found


def test_the_head_dies_and_comes_back(hosts: Hosts, redis: str, folder: Path) -> None:
    """As in the chart the head runs no replica. Workers answer every request meanwhile; then it counts and changes
    settings as before."""
    head, *workers = hosts.hosts
    hosts.start_ray(head_cpus=0, RAY_REDIS_ADDRESS=redis)
    until(lambda: alive(head), "the head does not start")
    hosts.deploy(configuration(folder))
    for host in workers:
        until(lambda host=host: answering(host) and counting(host), f"{host.name} does not answer")
    until(lambda: counted(hosts) >= 0, "there are no metrics")
    with clients(*workers) as statuses:
        time.sleep(3)
        head.kill()
        time.sleep(8)
        without = len(statuses)
        hosts.start_head(head_cpus=0, RAY_REDIS_ADDRESS=redis)
        until(lambda: counted(hosts) > 0, "the head that came back does not count")
        time.sleep(2)
    assert set(statuses) == {200}, [status for status in statuses if status != 200]
    assert without > 100
    until(lambda: counted(hosts) >= len(statuses), "the counts do not come together", 20)
    hosts.deploy(configuration(folder, mode="reject"))
    for host in workers:
        until(lambda host=host: mode_of(host.address) == "reject", f"{host.name} does not hear of the new mode")
