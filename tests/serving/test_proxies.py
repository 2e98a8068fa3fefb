"""The ports of proxies."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from deployments import proxies
from deployments.proxies import free_port

OWN = [
    *("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"),
    *("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"),
]


def test_two_servers_share_no_port_of_their_proxies(tmp_path: Path) -> None:
    """Nor do those of one server clash: all ports are its own."""
    ports: list[str] = []
    for name in ("one", "other"):
        environment: dict[str, str] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", environment)
            proxies.prepare("haproxy", tmp_path / name)
        ports += [environment[variable] for variable in OWN]
    assert len(set(ports)) == 2 * len(OWN)
    assert {int(port) for port in ports} <= set(proxies.PORTS)


def test_a_port_that_is_listened_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    monkeypatch.setattr(proxies, "PORTS", [taken] * 100 + [free_port()])
    monkeypatch.setattr(proxies.secrets.SystemRandom, "sample", lambda self, ports, count: list(ports))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", taken))
        holder.listen()
        assert free_port() == proxies.PORTS[-1]
