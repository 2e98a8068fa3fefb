"""Where gRPC is asked."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_it_leads_to_the_workers_that_answer(chart: Callable[..., Rendered]) -> None:
    """By their labels and KubeRay's for pods that serve, to the port that they name; readiness does the rest."""
    rendered = chart(**VARIANTS["grpc"])
    (found,) = rendered.objects_of("Service")
    selector = dict(found["spec"]["selector"])
    assert selector.pop("ray.io/serve") == "true"
    (service,) = rendered.objects_of("RayService")
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    assert selector.items() <= worker["metadata"]["labels"].items()
    (port,) = found["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8001, "grpc")
    assert {"name": "grpc", "containerPort": 8001} in worker["spec"]["containers"][0]["ports"]
    assert found["spec"]["type"] == "LoadBalancer"


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """Without gRPC KubeRay's service is enough."""
    assert not chart().objects_of("Service")
