"""The way in from outside, by Ingress."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_hosts_lead_to_the_service(chart: Callable[..., Rendered]) -> None:
    """Each host and path, to the port that serves, with TLS as given."""
    (ingress,) = chart(**VARIANTS["ingress"]).objects_of("Ingress")
    first, second = ingress["spec"]["rules"]
    assert first["host"] == "a.example.org"
    assert first["http"]["paths"][0]["path"] == "/"
    assert second["http"]["paths"][0] == {
        "path": "/guard",
        "pathType": "Exact",
        "backend": {"service": {"name": "guard", "port": {"name": "serve"}}},
    }
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == [{"hosts": ["a.example.org"], "secretName": "tls"}]


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """The service stays inside the cluster by default."""
    assert not chart().objects_of("Ingress")
