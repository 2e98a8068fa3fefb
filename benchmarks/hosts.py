"""Machines for a Ray cluster, on this one: each has its own network, on a bridge, its own processes, and a folder that
only it sees."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import httpx

from deployments.proxies import READY, READY_S

BRIDGE, NETWORK = "guard-hosts", "10.213.7"
OWN = Path("/tmp/guard-hosts")  # the folder that each host has for itself
MOST = 4  # machines that anything here has at once
BIN = Path(sys.executable).parent
FIRST = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); signal.pause()"  # buries others
)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
    READY: str(READY_S),
}


def missing() -> str | None:
    """What hosts want that is not here."""
    lacks = [name for name in ("ip", "unshare", "nsenter", "mount", "taskset") if shutil.which(name) is None]
    if lacks:
        return f"needs {', '.join(lacks)} (Debian: iproute2, util-linux)"
    made = subprocess.run(["ip", "netns", "add", "guard-trial"], capture_output=True, check=False)
    if made.returncode:
        return "needs the right to make network namespaces (root)"
    subprocess.run(["ip", "netns", "del", "guard-trial"], check=True)
    return None


class Host:
    """One machine. folder: what it sees as `OWN`. log: what its Ray prints. core: the one that it has; None: all."""

    def __init__(self, number: int, folder: Path, core: int | None = None) -> None:
        self.name, self.address = f"guard-host-{number}", f"{NETWORK}.{number}"
        self.folder, self.log = folder / self.name, folder / f"{self.name}.log"
        self._cable = f"guard-eth{number}"
        self._bound = [] if core is None else ["taskset", "--cpu-list", str(core)]
        self._first: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def plug_in(self) -> None:
        self.folder.mkdir()
        _ip("netns", "add", self.name)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._cable, "master", BRIDGE, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")

    def run(self, command: Sequence[str | Path], **more: str) -> subprocess.Popen[bytes]:
        """A program on this host, which is switched on if need be."""
        if self._first is None:
            self._first = self._switch_on()
        apart = ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid"]
        whole = [*apart, *self._bound, *map(str, command)]
        with self.log.open("ab") as log:
            return subprocess.Popen(whole, env=os.environ | ENVIRONMENT | more, stdout=log, stderr=log)

    def _switch_on(self) -> int:
        """Its first process, which the others end with."""
        inside = f'mount --make-rprivate / && mount --bind "{self.folder}" "{OWN}" && exec "$@"'
        apart = ["ip", "netns", "exec", self.name, "unshare", "--mount", "--pid", "--fork", "--mount-proc"]
        first = subprocess.Popen(
            [*apart, "sh", "-c", inside, "sh", sys.executable, "-c", FIRST], stdout=subprocess.PIPE
        )
        with cast(IO[bytes], first.stdout) as out:
            out.readline()
        (number,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        self._running.append(first)
        return int(number)

    def start_ray(self, *options: str, cpus: int = 1, **more: str) -> None:
        """A node of a cluster, with the default ports."""
        common = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--block", "--disable-usage-stats"]
        self._running.append(self.run([BIN / "ray", "start", *options, *common], **more))

    def processes(self) -> list[int]:
        """Their numbers, as seen from here."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(process) for process in found.stdout.split()]

    def kill(self) -> None:
        """All its processes at once, as when a machine loses its power."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for ended in self._running:
            ended.wait()
        self._running, self._first = [], None

    def unplug(self) -> None:
        self.kill()
        for what in (["link", "del", self._cable], ["netns", "del", self.name]):
            subprocess.run(["ip", *what], capture_output=True, check=False)


class Hosts:
    """``count`` machines that reach each other and are reached from here. cores: the core of each; None: all."""

    def __init__(self, folder: Path, count: int, cores: Sequence[int | None] = ()) -> None:
        bound = [*cores, *[None] * (count - len(cores))]
        self.hosts = [Host(number + 1, folder, bound[number]) for number in range(count)]

    def __enter__(self) -> Self:
        self.unplug()  # what a test that was killed has left
        OWN.mkdir(exist_ok=True)
        try:
            _ip("link", "add", BRIDGE, "type", "bridge")
            _ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
            _ip("link", "set", BRIDGE, "up")
            for host in self.hosts:
                host.plug_in()
        except BaseException:
            self.unplug()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unplug()

    def unplug(self) -> None:
        for host in (*self.hosts, *(Host(number, OWN) for number in range(len(self.hosts) + 1, MOST + 1))):
            host.unplug()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

    def start_ray(self, *, head_cpus: int = 1, **more: str) -> None:
        """One cluster: the first host is the head, with this environment."""
        self.start_head(head_cpus=head_cpus, **more)
        for host in self.hosts[1:]:
            host.start_ray(f"--address={self.hosts[0].address}:6379")

    def start_head(self, *, head_cpus: int = 1, **more: str) -> None:
        options = ("--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir={OWN / 'ray'}")
        self.hosts[0].start_ray(*options, cpus=head_cpus, **more)

    def deploy(self, path: Path) -> None:
        """`serve deploy`, as people do it."""
        done = self.hosts[0].run([BIN / "serve", "deploy", "-a", f"http://{self.hosts[0].address}:8265", path])
        if done.wait(120):
            raise RuntimeError(self.hosts[0].log.read_text()[-4000:])


def until(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    """Wait for ``condition``, which may ask servers that do not answer yet.

    Raises:
        TimeoutError: it did not come; says ``what``.
    """
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx.HTTPError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {seconds:.0f} s")
        time.sleep(0.3)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
