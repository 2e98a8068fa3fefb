"""How many workers may be drained at once."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_it_covers_the_workers_alone(chart: Callable[..., Rendered]) -> None:
    """Its selector matches their labels, and not the head's."""
    rendered = chart()
    (budget,) = rendered.objects_of("PodDisruptionBudget")
    (service,) = rendered.objects_of("RayService")
    cluster = service["spec"]["rayClusterConfig"]
    wanted = budget["spec"]["selector"]["matchLabels"].items()
    assert budget["spec"]["minAvailable"] == 1  # of two
    assert wanted <= cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"].items()
    assert not wanted <= cluster["headGroupSpec"]["template"]["metadata"]["labels"].items()


def test_evictions_are_possible_at_all(chart: Callable[..., Rendered]) -> None:
    """A count of those that stay: KubeRay's pods have no scale to take a share of. None is held where there is one."""
    (budget,) = chart(**VARIANTS["placed"]).objects_of("PodDisruptionBudget")
    assert "maxUnavailable" not in budget["spec"]
    assert budget["spec"]["minAvailable"] == 3  # of five
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert not chart(**VARIANTS["gpu"]).objects_of("PodDisruptionBudget")
    assert not chart(**VARIANTS["alone"]).objects_of("PodDisruptionBudget")
