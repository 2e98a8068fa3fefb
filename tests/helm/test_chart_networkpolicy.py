"""Who may talk to the pods, and to whom they may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rendering import Rendered
from variants import VARIANTS

Chart = Callable[..., Rendered]


def policy(rendered: Rendered) -> dict[str, Any]:
    (found,) = rendered.objects_of("NetworkPolicy")
    spec: dict[str, Any] = found["spec"]
    return spec


def ports(rule: dict[str, Any]) -> list[int]:
    return [one["port"] for one in rule.get("ports", [])]


def test_rays_own_ports_are_for_each_other(chart: Chart) -> None:
    """Only pods of the release reach all ports; others the serving one; the operator the dashboard's as well."""
    own, asking, operator = policy(chart())["ingress"]
    assert own["from"] == [{"podSelector": policy(chart())["podSelector"]}]
    assert (ports(asking), "from" in asking) == ([8000], False)
    assert ports(operator) == [8265, 8000]
    assert operator["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}


def test_who_asks_can_be_narrowed(chart: Chart) -> None:
    """To the peers that the values name."""
    asking = policy(chart(**VARIANTS["placed"]))["ingress"][1]
    assert asking["from"] == [{"namespaceSelector": {"matchLabels": {"team": "vision"}}}]


def test_pods_reach_each_other_and_names_alone(chart: Chart) -> None:
    """Everything else is asked for: Redis here; Kubernetes for the autoscaler."""
    assert [ports(rule) for rule in policy(chart())["egress"]] == [[], [53, 53]]
    assert ports(policy(chart(**VARIANTS["redis"]))["egress"][-1]) == [6380]
    assert [443] in [ports(rule) for rule in policy(chart(**VARIANTS["object store"]))["egress"]]
    assert [443, 6443] in [ports(rule) for rule in policy(chart(**VARIANTS["autoscaling"]))["egress"]]


def test_grpc_is_open_where_it_is_served(chart: Chart) -> None:
    """On its port."""
    assert ports(policy(chart(**VARIANTS["grpc"]))["ingress"][1]) == [8000, 8001]
