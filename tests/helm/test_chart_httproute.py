"""The way in from outside, by the Gateway API."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_it_hangs_on_the_gateway_and_leads_to_the_service(chart: Callable[..., Rendered]) -> None:
    """All paths, with the time that a request may take."""
    (route,) = chart(**VARIANTS["gateway"]).objects_of("HTTPRoute")
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
    assert route["spec"]["hostnames"] == ["a.example.org"]
    (rule,) = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "guard", "port": 8000}]
    assert rule["timeouts"] == {"request": "60s"}


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """Clusters without the Gateway API install the chart."""
    assert not chart().objects_of("HTTPRoute")
