"""Prometheus and Alertmanager as Debian packages them, on this machine, with the project's configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.errors import StartFailed
from deployments.proxies import free_port

HERE = Path(__file__).parent
RULES = HERE / "rules"
PROGRAMS = ("prometheus", "prometheus-alertmanager")
START_S = 30.0


def missing() -> list[str]:
    """The programs that are not installed; each is a Debian package of the same name."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Webhook:
    """Where Alertmanager sends what fires: an HTTP server on a port of this machine."""

    def __init__(self) -> None:
        self._arrived: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook._take(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _take(self, alerts: list[dict[str, Any]]) -> None:
        with self._changed:
            self._arrived += alerts
            self._changed.notify_all()

    @property
    def arrived(self) -> list[dict[str, Any]]:
        """Alertmanager's alerts so far: labels, annotations, status, startsAt."""
        with self._changed:
            return list(self._arrived)

    def wait_for(self, name: str, seconds: float) -> dict[str, Any] | None:
        """The first alert ``name`` that fires, or None after ``seconds``."""

        def found() -> dict[str, Any] | None:
            firing = (one for one in self._arrived if one["labels"]["alertname"] == name and one["status"] == "firing")
            return next(firing, None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None, seconds)
            return found()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(base_url=url, timeout=30.0)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of each series of an instant vector."""
        answer = self._http.get("/api/v1/query", params={"query": expression})
        found = answer.raise_for_status().json()["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def alerts(self) -> dict[str, str]:
        """alertname → its most urgent state, pending or firing."""
        found: dict[str, str] = {}
        for alert in self._http.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]:
            name = alert["labels"]["alertname"]
            found[name] = "firing" if "firing" in (alert["state"], found.get(name)) else "pending"
        return found

    def close(self) -> None:
        self._http.close()


@contextmanager
def monitoring(
    target: str, webhook: str, folder: Path, *, every_s: float = 1.0, rules: Path = RULES
) -> Iterator[Prometheus]:
    """Prometheus that scrapes ``target`` ("host:port") and Alertmanager that tells ``webhook``, on free ports.

    Args:
        folder: for their data. every_s: between two scrapes, and two looks at the rules.

    Raises:
        StartFailed: a program is not installed, or does not come up.
    """
    if missing():
        raise StartFailed(f"{', '.join(missing())}: not installed; on Debian: apt install {' '.join(missing())}")
    ports = {name: free_port() for name in PROGRAMS}
    every = f"{every_s:g}s"
    settings = yaml.safe_load((HERE / "prometheus.yaml").read_text())
    settings["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    settings["rule_files"] = [str(rules / "*.yaml")]
    settings["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{ports[PROGRAMS[1]]}"]
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    routes = yaml.safe_load((HERE / "alertmanager.yaml").read_text())
    routes["route"] |= {"group_wait": "0s", "group_interval": every}
    routes["receivers"][0]["webhook_configs"][0]["url"] = webhook
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(routes))
    with ExitStack() as stack:
        for name, file, arguments in (
            (PROGRAMS[1], "alertmanager.yaml", ("--cluster.listen-address=",)),
            (PROGRAMS[0], "prometheus.yaml", ()),
        ):
            command = [
                *(name, f"--config.file={folder / file}", f"--web.listen-address=127.0.0.1:{ports[name]}"),
                *(f"--storage.{'tsdb.' if name == PROGRAMS[0] else ''}path={folder / name}", *arguments),
            ]
            stack.enter_context(_running(command, f"http://127.0.0.1:{ports[name]}", folder / f"{name}.log"))
        prometheus = Prometheus(f"http://127.0.0.1:{ports[PROGRAMS[0]]}")
        stack.callback(prometheus.close)
        yield prometheus


@contextmanager
def _running(command: list[str], url: str, log: Path) -> Iterator[None]:
    """A program until the block ends; it is up when it says that it is ready."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text().strip().splitlines()
                raise StartFailed(f"{command[0]} did not come up: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
