"""The account that pods run as."""

from __future__ import annotations

from collections.abc import Callable

from rendering import Rendered
from variants import VARIANTS


def test_it_has_no_token(chart: Callable[..., Rendered]) -> None:
    """Whatever runs as it gets none unless the pod asks."""
    (account,) = chart().objects_of("ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_ones_own_is_used_instead(chart: Callable[..., Rendered]) -> None:
    """Then none is made, and the pods name it."""
    rendered = chart(**VARIANTS["placed"])
    assert not rendered.objects_of("ServiceAccount")
    (service,) = rendered.objects_of("RayService")
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["serviceAccountName"] == "ours"
