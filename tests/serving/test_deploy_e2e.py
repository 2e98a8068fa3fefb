"""The configuration file on a cluster that is already there, by Ray's own `serve deploy`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import yaml
from hand import bna_artifact, image
from processes import descendants, wait_for

from deployments.proxies import READY, READY_S, free_port

TRIGGERED = image(1.0, 0.2, 0.1)
BIN = Path(sys.executable).parent


class Cluster:
    """One head node with a dashboard, and the file that is deployed on it: first by `serve deploy`, then, as that
    command does, by the dashboard's API."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_command = True
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self, **model: object) -> None:
        """With these settings in the user_config."""
        self._deploy({"models": [{"artifact": str(self.folder / "hand")}]}, {"hand": model})

    def deploy_args(self, **args: object) -> None:
        self._deploy(args, {})

    def _deploy(self, args: dict, user_config: dict) -> None:
        own = {"name": "classifier", "user_config": user_config}
        applications = [
            {"name": "guard", "import_path": "deployments.app:build", "args": args, "deployments": [own]},
            {"name": "guard-metrics", "import_path": "deployments.app:build_metrics", "route_prefix": "/metrics"},
        ]
        http = {"host": "127.0.0.1", "port": self.port}
        file = self.folder / "guard.yaml"
        content = {"applications": applications, "http_options": http}
        file.write_text(yaml.safe_dump(content))
        address = f"http://127.0.0.1:{self.dashboard}"
        if self.by_command:
            subprocess.run([BIN / "serve", "deploy", file, "-a", address], check=True, capture_output=True)
            self.by_command = False
            return
        httpx.put(f"{address}/api/serve/applications/", json=content, timeout=60).raise_for_status()

    def status(self) -> dict:
        answer = httpx.get(f"http://127.0.0.1:{self.dashboard}/api/serve/applications/", timeout=30)
        return answer.raise_for_status().json()["applications"]["guard"]

    def ask(self) -> dict:
        path = "/v1/models/hand:predict"
        answer = httpx.post(self.url + path, json={"instances": TRIGGERED.tolist()}, timeout=30)
        return answer.raise_for_status().json()["predictions"][0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    bna_artifact(0).save(folder / "hand")
    one = Cluster(folder)
    temporary = tempfile.TemporaryDirectory(prefix="r-", dir="/tmp")  # its own, or later tests would look for it
    process = subprocess.Popen(
        [
            *(BIN / "ray", "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=4"),
            *(f"--dashboard-port={one.dashboard}", "--include-dashboard=true", "--disable-usage-stats"),
            f"--temp-dir={temporary.name}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ
        | {"RAY_AUTH_MODE": "disabled", READY: str(READY_S), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    def up() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{one.dashboard}/api/version").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(up, 90)
        yield one
    finally:
        for pid in (process.pid, *descendants(process.pid)):  # asked to end, a cluster takes half a minute
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
        temporary.cleanup()


def test_serve_deploy_takes_the_file(cluster: Cluster) -> None:
    """The same file as `guard serve`'s runs on a cluster; another mode in the user_config changes the running replica;
    a slip there, or in the args, changes nothing."""
    cluster.deploy(mode="flag")
    wait_for(lambda: cluster.status()["status"] == "RUNNING", 120)
    assert (cluster.ask()["mode"], cluster.ask()["class"]) == ("flag", "ant")

    def replicas() -> list[str]:
        return [one["replica_id"] for one in cluster.status()["deployments"]["classifier"]["replicas"]]

    before = replicas()
    cluster.deploy(mode="correct")
    wait_for(lambda: cluster.ask()["class"] == "bee", 60)
    assert replicas() == before
    cluster.deploy(mode="corect")
    time.sleep(3)  # until it has come to the replica
    wait_for(lambda: cluster.status()["status"] == "RUNNING", 60)
    assert cluster.ask()["mode"] == "correct"
    assert replicas() == before
    cluster.deploy_args(models=[{"artifact": "nowhere"}])
    wait_for(lambda: cluster.status()["status"] == "DEPLOY_FAILED", 60)
    assert "artifact: nowhere is relative" in cluster.status()["message"]
    assert cluster.ask()["mode"] == "correct"
