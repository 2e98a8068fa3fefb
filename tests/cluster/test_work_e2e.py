"""Work that is spread over two machines: a scan, and a plan of the laboratory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import networks
import numpy as np
import pytest
from guarded import alive
from safetensors.torch import save_file
from torch import nn

from benchmarks.hosts import BIN, Host, Hosts, missing, until
from benchmarks.lab.store import Store
from guard.data import Data

LACKS = missing()
pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))

MODEL = f"{networks.__file__}:digits"
RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from dataclasses import replace
from test_laboratory import PLAN, load
from benchmarks.lab.running import Run
from benchmarks.lab.store import Store
folder = Path(sys.argv[1])
plan = replace(PLAN, defences=("undefended", "mmdf", "clp"), draws=(0,))
Run(plan, load(), Store(folder / "out", folder / "archive"), say=print)()
"""


WHERE = """
import benchmarks
from deployments.distributed import session
def where():
    import time
    import benchmarks, deployments, guard, ray
    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), benchmarks.__file__, deployments.__file__, guard.__file__
with session(benchmarks) as ray:
    found = ray.get([ray.remote(where).options(scheduling_strategy="SPREAD").remote() for _ in range(6)])
for one in set(found):
    print(*one)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two machines of one CPU each."""
    with Hosts(tmp_path_factory.mktemp("cluster"), 2) as hosts:
        hosts.start_ray()
        until(lambda: alive(hosts.hosts[0]), "the head does not start")
        until(lambda: nodes(hosts.hosts[0]) == 2, "the other machine does not join")
        yield hosts


def nodes(head: Host) -> int:
    found = httpx.get(f"http://{head.address}:8265/api/v0/nodes").json()["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" for node in found)


def worked(head: Host, *names: str, state: str = "FINISHED") -> set[str]:
    """The nodes of the tasks of these names in this state."""
    asked = httpx.get(f"http://{head.address}:8265/api/v0/tasks", params={"limit": 10_000, "detail": True}, timeout=30)
    found = asked.json()["data"]["result"]["result"]
    return {task["node_id"] for task in found if task["name"] in names and task["state"] == state}


def on(host: Host, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    """A program on a machine of the cluster, which works with all of it."""
    return host.run(command, RAY_ADDRESS=f"{host.address}:6379", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory, victim: nn.Module, clean: Data) -> list[str]:
    """A scan for which nothing is left to chance but where it runs."""
    folder = tmp_path_factory.mktemp("scan")
    save_file(victim.state_dict(), folder / "weights.safetensors")
    np.savez(folder / "clean.npz", x=clean.images.numpy(), y=clean.labels.numpy())
    files = ["--weights", str(folder / "weights.safetensors"), "--clean", str(folder / "clean.npz")]
    return [str(BIN / "guard"), "scan", MODEL, *files, "--kind", "patch", "--restarts", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(scan: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What it finds without a cluster."""
    path = tmp_path_factory.mktemp("alone") / "scan.json"
    assert subprocess.run([*scan, "--json", path], capture_output=True, check=False).returncode == 1
    return found(path)


def found(path: Path) -> dict[str, object]:
    """Without what names the time it took."""
    return {key: value for key, value in json.loads(path.read_text()).items() if "seconds" not in key}


def test_machines_run_the_code_that_they_are_sent(cluster: Hosts) -> None:
    """Not what lies at the same place there, though the program was started in it."""
    head = cluster.hosts[0]
    told = len(head.log.read_text())
    root = str(Path(__file__).parents[2])
    assert on(head, ["env", f"--chdir={root}", sys.executable, "-c", WHERE]).wait(120) == 0, head.log.read_text()[
        -4000:
    ]
    lines = [line.split() for line in head.log.read_text()[told:].splitlines() if line.endswith("guard/__init__.py")]
    assert len({node for node, *_ in lines}) == 2
    assert all("working_dir_files" in file for _, *files in lines for file in files), lines


def test_the_laboratory_uses_both(cluster: Hosts, tmp_path: Path) -> None:
    """Every network and cell is there, wherever it was made."""
    head = cluster.hosts[0]
    tests = Path(__file__).parents[1]
    assert on(head, [sys.executable, "-c", RUN, tmp_path, tests.parent, tests, tests / "lab"]).wait(240) == 0, (
        head.log.read_text()[-4000:]
    )
    made, cells = Store(tmp_path / "out", tmp_path / "archive").everything()
    assert len(made) == 3
    assert len(cells) == 3 * 3
    assert not [cell["error"] for cell in cells if "error" in cell]
    until(lambda: len(worked(head, "_attack", "_defend")) == 2, "one machine did all of it", 20)


def test_a_scan_uses_both(cluster: Hosts, scan: list[str], alone: dict[str, object], tmp_path: Path) -> None:
    """It finds the same, to the bit."""
    head = cluster.hosts[0]
    path = tmp_path / "scan.json"
    assert on(head, [*scan, "--distributed", "--json", path]).wait(240) == 1, head.log.read_text()[-4000:]
    assert found(path) == alone
    until(lambda: len(worked(head, "_chunk")) == 2, "one machine did all of it", 20)


def test_a_machine_loses_its_power_during_a_scan(
    cluster: Hosts, scan: list[str], alone: dict[str, object], tmp_path: Path
) -> None:
    """The other does its share, too, and it finds the same."""
    head, other = cluster.hosts
    path = tmp_path / "scan.json"
    running = on(head, [*scan, "--distributed", "--json", path])
    until(lambda: len(worked(head, "_chunk", state="RUNNING")) == 2, "one machine does all of it", 60)
    other.kill()
    assert running.poll() is None, "it had ended before"
    assert running.wait(240) == 1, head.log.read_text()[-4000:]
    assert found(path) == alone
