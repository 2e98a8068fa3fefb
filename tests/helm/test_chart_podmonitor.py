"""What Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_it_scrapes_the_head(chart: Callable[..., Rendered]) -> None:
    """By labels and a port that the head's pod has, with the key of an administrator."""
    rendered = chart(**VARIANTS["monitoring"])
    (monitor,) = rendered.objects_of("PodMonitor")
    (service,) = rendered.objects_of("RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= head["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [one["name"] for one in head["spec"]["containers"][0]["ports"]]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"] == {"credentials": {"name": "key", "key": "token"}}
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """Clusters without the Prometheus operator install the chart."""
    assert not chart().objects_of("PodMonitor")
