"""Free ports."""

from __future__ import annotations

import socket

import pytest

from deployments import proxies
from deployments.proxies import free_port


def test_a_free_port_is_one_that_nobody_is_given_by_chance() -> None:
    """Not by the system, to a program that asks for any."""
    assert free_port() in proxies.PORTS
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        assert other.getsockname()[1] not in proxies.PORTS


def test_a_port_that_is_listened_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    monkeypatch.setattr(proxies, "PORTS", [taken] * 100 + [free_port()])
    monkeypatch.setattr(proxies.secrets.SystemRandom, "sample", lambda self, ports, count: list(ports))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", taken))
        holder.listen()
        assert free_port() == proxies.PORTS[-1]
