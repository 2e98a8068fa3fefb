"""The chart as a whole: every documented variant is what Kubernetes takes, and what security asks for holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import ChartError, Rendered, lint, render, upgrade, validate
from variants import CHART, GATEWAY, LEAST, VARIANTS, Values, with_values

Chart = Callable[..., Rendered]


def containers(rendered: Rendered) -> Iterator[dict[str, Any]]:
    for pod in pods(rendered):
        yield from pod["spec"].get("initContainers", [])
        yield from pod["spec"]["containers"]


def pods(rendered: Rendered) -> Iterator[dict[str, Any]]:
    (service,) = rendered.objects_of("RayService")
    cluster = service["spec"]["rayClusterConfig"]
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def test_it_lints_clean() -> None:
    """Helm has nothing against it."""
    assert lint(CHART) == []


def test_every_object_is_valid(variant: Rendered) -> None:
    """Against the schemas of Kubernetes and of the custom resources, unknown fields included."""
    for one in variant.objects:
        assert validate(one) == [], (one["kind"], one["metadata"]["name"])


def test_every_object_has_the_common_labels(variant: Rendered) -> None:
    """Names begin with the release's, and labels tell chart, version and instance."""
    for one in variant.objects:
        labels = one["metadata"]["labels"]
        assert one["metadata"]["name"].startswith("guard")
        assert labels["app.kubernetes.io/instance"] == "guard"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"] == "guard-0.1.0"


def test_pods_may_do_nothing_that_they_need_not(variant: Rendered) -> None:
    """No root, no privilege, no writable root file system, system calls filtered."""
    for pod in pods(variant):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "hostNetwork" not in pod["spec"]
    for container in containers(variant):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in own


def test_images_are_named_exactly(variant: Rendered) -> None:
    """By a digest or a tag that is not latest."""
    for container in containers(variant):
        name = container["image"].rpartition("/")[2]
        assert "@sha256:" in name or (":" in name and not name.endswith(":latest")), container["image"]


def test_every_container_has_limits(variant: Rendered) -> None:
    """Of memory, and requests of both."""
    for container in containers(variant):
        assert "memory" in container["resources"]["limits"], container["name"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), container["name"]


def test_the_token_of_the_account_stays_out(variant: Rendered) -> None:
    """But for the head's where it scales workers."""
    (service,) = variant.objects_of("RayService")
    assert len({(one["kind"], one["metadata"]["name"]) for one in variant.objects}) == len(variant.objects)
    scaled = service["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling", False)
    head, *workers = pods(variant)
    assert head["spec"]["automountServiceAccountToken"] is scaled
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in workers)
    assert not {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"} & {one["kind"] for one in variant.objects}


def leaves(values: Any, path: str = "") -> Iterator[str]:
    """Every key, by its path; what is free to the user ends where it begins."""
    for key, value in values.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


def allowed(schema: Any, path: str = "") -> Iterator[str]:
    for key, value in schema.get("properties", {}).items():
        yield f"{path}{key}"
        yield from allowed(value, f"{path}{key}.")


def test_the_schema_knows_every_value_and_no_other() -> None:
    """values.yaml and values.schema.json have the same keys; a group of workers has its own."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = set(allowed(schema))
    free = ("podSecurityContext.", "securityContext.", "monitoring.dashboards.labels.", "workers.")
    named = {one for one in leaves(values) if not one.startswith(free) and ".resources." not in one}
    assert named <= known, named - known
    unnamed = {one for one in known if one not in named and ".resources." not in one} - {
        "global",
        "guard.metrics_dir",
        "guard.gpus_per_replica",
    }
    assert not unnamed, unnamed


def test_every_value_is_explained() -> None:
    """Each key at the top has a comment above it."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    bare = [line for before, line in pairwise(lines) if line[:1].isalpha() and not before.startswith("#")]
    assert not bare, bare


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (with_values(imagee={}), "imagee"),
        (with_values(guard={"models": [{"artifact": "/artifacts/a", "mod": "flag"}]}), "mod"),
        (with_values(guard={"models": [{"artifact": "relative"}]}), "artifact"),
        (with_values(guard={"models": [{"artifact": "/artifacts/a", "mode": "maybe"}]}), "mode"),
        (with_values(guard={"models": []}), "guard.models: name at least one model"),
        (with_values(artifacts={}), "artifacts: give exactly one"),
        (LEAST | {"artifacts": LEAST["artifacts"] | {"image": {"reference": "a:1"}}}, "artifacts: give exactly one"),
        (with_values(apiKeys={"keys": "a", "existingSecret": "b"}), "apiKeys: give keys or existingSecret"),
        (with_values(ingress={"enabled": True}), "ingress.hosts"),
        (with_values(httpRoute={"enabled": True}), "httpRoute.parentRefs"),
        (with_values(gcsFaultTolerance={"enabled": True}), "gcsFaultTolerance.redisAddress"),
        (with_values(upgradeStrategy="Rolling"), "upgradeStrategy"),
        (with_values(guard={"models": [{"artifact": "/a/net"}, {"artifact": "/b/net"}]}), "two are named net"),
        (with_values(autoscaling={"enabled": True, "minReplicas": 9}), "minReplicas is larger"),
        (with_values(autoscaling={"enabled": True}, workers={"cpu": {"minReplicas": 9}}), "workers.cpu: minReplicas"),
        (with_values(rayVersion="2.51.1"), "rayAuth: Ray has tokens from 2.52.0 on"),
        (with_values(podLabels={"ray.io/group": "mine"}), "podLabels"),
        (with_values(env=[{"name": "REDIS_PASSWORD", "value": "a"}]), "env"),
        (with_values(httpRoute=GATEWAY | {"timeout": "1.5s"}), "timeout"),
        (with_values(monitoring={"podMonitor": {"enabled": True, "interval": "often"}}), "interval"),
        (with_values(fullnameOverride="1guard"), "begins with a letter"),
        (with_values(grpc={"enabled": True, "port": 8000}), "port"),
        (with_values(podDisruptionBudget={"maxUnavailable": "50%"}), "maxUnavailable"),
        (with_values(workers={"Cpu": VARIANTS["gpu"]["workers"]["gpu"]}), "Cpu"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: Values, word: str, tmp_path: Path) -> None:
    """Nothing is installed, and the message has the key."""
    with pytest.raises(ChartError) as refused:
        render(CHART, values, folder=tmp_path)
    assert word in str(refused.value)


def test_names_and_selectors_outlive_an_upgrade(tmp_path: Path) -> None:
    """From a chart of another version: the same objects, the same selectors, and pods that are left alone."""
    before = tmp_path / "before"
    shutil.copytree(CHART, before)
    about = (before / "Chart.yaml").read_text().replace("version: 0.1.0", "version: 0.0.9", 1)
    (before / "Chart.yaml").write_text(about)
    first, second = upgrade(before, CHART, VARIANTS["monitoring"], folder=tmp_path)

    def kept(rendered: Rendered) -> list[Any]:
        found = []
        for one in sorted(rendered.objects, key=lambda o: (o["kind"], o["metadata"]["name"])):
            spec = one.get("spec", {})
            selectors = [spec.get(key) for key in ("selector", "podSelector", "rayClusterConfig")]
            found.append((one["kind"], one["metadata"]["name"], selectors))
        return found

    assert second.revision == 2
    assert kept(first) == kept(second)


def test_a_long_name_stays_within_labels(tmp_path: Path) -> None:
    """KubeRay appends to it."""
    rendered = render(CHART, LEAST, release="r" * 53, folder=tmp_path)
    assert all(len(one["metadata"]["name"]) <= 50 for one in rendered.objects)


def test_each_template_has_its_test() -> None:
    """A file each, by name."""
    templates = {path.stem.lower() for path in (CHART / "templates").iterdir() if not path.name.startswith("_")}
    tests = {path.stem.removeprefix("test_chart_") for path in Path(__file__).parent.glob("test_chart_*.py")}
    assert templates <= tests, templates - tests
