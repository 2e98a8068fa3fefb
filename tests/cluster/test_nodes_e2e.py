"""Two machines, one guard: replicas on both, one place that counts them all, and a machine that loses its power."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from guarded import (
    alive,
    answering,
    ask,
    clients,
    configuration,
    counted,
    counted_elsewhere,
    counting,
    deployed,
    evidence,
)

from benchmarks.hosts import Hosts, missing, until

LACKS = missing()
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two machines of one CPU each, and on each a replica."""
    folder = tmp_path_factory.mktemp("cluster")
    with Hosts(folder, 2) as hosts:
        hosts.start_ray()
        until(lambda: alive(hosts.hosts[0]), "the head does not start")
        hosts.deploy(configuration(folder))
        for host in hosts.hosts:
            until(lambda host=host: answering(host), f"{host.name} does not answer")
            until(lambda host=host: counting(host), f"there is no replica on {host.name}")
        until(lambda: deployed(hosts), "not all replicas and the metrics are up")
        yield hosts


def test_metrics_tell_of_every_machine(cluster: Hosts) -> None:
    """Requests to either address are counted once each, wherever they were answered, and the alarm hears of all: every
    image was flagged."""
    before, answers = counted(cluster), []
    with httpx.Client() as client:

        def asked() -> float:
            answers.extend(ask(client, host) for host in cluster.hosts for _ in range(20))
            return counted_elsewhere(cluster)

        until(asked, "the other machine counts nothing", 30)
    assert set(answers) == {200}
    until(lambda: counted(cluster) == before + len(answers), "the counts do not come together", 20)
    assert counted_elsewhere(cluster) < len(answers)
    until(lambda: evidence(cluster) >= 9, "the alarm does not hear of the flagged images of both", 20)


def test_a_machine_loses_its_power(cluster: Hosts) -> None:
    """Clients of the other hardly notice: every request is answered within one retry, and what was counted stays."""
    head, other = cluster.hosts
    seen = counted(cluster)
    with clients(head) as statuses:
        time.sleep(3)
        other.kill()
        time.sleep(12)
    assert set(statuses) == {200}, [status for status in statuses if status != 200]
    assert len(statuses) > 100
    after = counted(cluster)
    assert seen < after <= seen + 2 * len(statuses)
    time.sleep(3)  # a look, and what a scrape keeps
    assert counted(cluster) >= after
