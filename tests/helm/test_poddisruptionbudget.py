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
    assert budget["spec"]["maxUnavailable"] == 1
    assert wanted <= cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"].items()
    assert not wanted <= cluster["headGroupSpec"]["template"]["metadata"]["labels"].items()


def test_a_share_or_none(chart: Callable[..., Rendered]) -> None:
    """As the values say."""
    (budget,) = chart(**VARIANTS["placed"]).objects_of("PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == "50%"
    assert not chart(**VARIANTS["alone"]).objects_of("PodDisruptionBudget")
