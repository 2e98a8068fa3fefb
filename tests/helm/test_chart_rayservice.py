"""What KubeRay is told: the guard's configuration, and the pods that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import Rendered
from variants import MODELS, VARIANTS

from deployments.document import Document, check_with_serve, read

Chart = Callable[..., Rendered]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own use of pydantic


def spec(rendered: Rendered) -> dict[str, Any]:
    (service,) = rendered.objects_of("RayService")
    found: dict[str, Any] = service["spec"]
    return found


def workers(rendered: Rendered) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec(rendered)["rayClusterConfig"]["workerGroupSpecs"]
    return found


def configuration(rendered: Rendered, folder: Path) -> Document:
    """serveConfigV2, read as `guard serve` reads its file."""
    path = folder / "guard.yaml"
    path.write_text(spec(rendered)["serveConfigV2"])
    return read(path, {})


def test_the_configuration_is_the_guards_own(variant: Rendered, tmp_path: Path) -> None:
    """Each variant's checks as a configuration file, by our rules and by Ray Serve's, and listens to others."""
    found = configuration(variant, tmp_path)
    check_with_serve(found)
    assert found.http_options.host == "0.0.0.0"
    assert found.http_options.port == 8000
    assert found.guard.models[0].name == "resnet18"


def test_models_are_served_as_the_values_say(chart: Chart, tmp_path: Path) -> None:
    """Every setting arrives, with the same names and defaults as in the file."""
    found = configuration(chart(**VARIANTS["several models"]), tmp_path).guard
    assert found.replicas == 3
    first, second = found.models
    assert (first.mode, first.threshold, first.limits.images) == ("reject", 0.001, 16)
    assert (second.name, second.version, second.mode, second.sample) == ("digits", "3", "observe", 0.1)
    assert str(second.artifact) == "/artifacts/v3"


def test_what_may_change_in_place_costs_no_replica(chart: Chart) -> None:
    """Another mode or artifact changes the user_config alone; args, for which Serve takes new replicas, stay."""

    def applications(models: list[dict[str, Any]]) -> Any:
        text = spec(chart(guard={"models": models}))["serveConfigV2"]
        return yaml.safe_load(text)["applications"][0]

    before = applications(MODELS)
    after = applications([MODELS[0] | {"mode": "flag", "artifact": "/artifacts/new", "name": "resnet18"}, MODELS[1]])
    assert before["args"] == after["args"]
    assert before["deployments"] != after["deployments"]


def test_replicas_follow_the_load(chart: Chart, tmp_path: Path) -> None:
    """With autoscaling Serve has bounds instead of a number, and Ray may ask KubeRay for nodes up to the group's."""
    rendered = chart(**VARIANTS["autoscaling"])
    (classifier,) = configuration(rendered, tmp_path).mine.deployments
    assert classifier["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 12, "target_ongoing_requests": 16}
    assert spec(rendered)["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert (workers(rendered)[0]["minReplicas"], workers(rendered)[0]["maxReplicas"]) == (2, 8)
    assert spec(rendered)["rayClusterConfig"]["autoscalerOptions"]["version"] == "v2"
    still = chart()
    assert "enableInTreeAutoscaling" not in spec(still)["rayClusterConfig"]
    assert (workers(still)[0]["minReplicas"], workers(still)[0]["maxReplicas"]) == (2, 2)


@pytest.mark.parametrize(
    ("variant", "source"),
    [
        ("least", {"persistentVolumeClaim": {"claimName": "artifacts", "readOnly": True}}),
        ("object store", {"emptyDir": {"sizeLimit": "8Gi"}}),
        ("oci image", {"image": {"reference": "ghcr.io/example/artifacts:3", "pullPolicy": "IfNotPresent"}}),
    ],
)
def test_artifacts_come_from_where_the_values_say(variant: str, source: dict[str, Any], chart: Chart) -> None:
    """Every pod reads them at /artifacts, and cannot change them."""
    rendered = chart(**VARIANTS[variant])
    for group in (*workers(rendered), spec(rendered)["rayClusterConfig"]["headGroupSpec"]):
        pod = group["template"]["spec"]
        (volume,) = (one for one in pod["volumes"] if one["name"] == "artifacts")
        assert volume == {"name": "artifacts", **source}
        (mount,) = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "artifacts")
        assert mount == {"name": "artifacts", "mountPath": "/artifacts", "readOnly": True}


def test_an_object_store_is_copied_before_the_worker_starts(chart: Chart) -> None:
    """By an init container with the store's secret; the head, which serves no model, needs no copy."""
    rendered = chart(**VARIANTS["object store"])
    (copier,) = workers(rendered)[0]["template"]["spec"]["initContainers"]
    assert copier["args"][-2:] == ["store:guard/artifacts", "/artifacts"]
    assert copier["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert "initContainers" not in spec(rendered)["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize(("variant", "secret"), [("keys", "guard-keys"), ("keys of one's own", "ours")])
def test_keys_are_a_file_that_the_guard_reads(variant: str, secret: str, chart: Chart, tmp_path: Path) -> None:
    """The secret is mounted, and classifier and metrics are told of the file."""
    rendered = chart(**VARIANTS[variant])
    found = configuration(rendered, tmp_path)
    assert str(found.guard.keys.file) == "/etc/guard/keys"
    metrics = next(one for one in found.applications if one.name == "guard-metrics")
    assert metrics.args["keys"]["file"] == "/etc/guard/keys"
    for group in workers(rendered):
        pod = group["template"]["spec"]
        assert {"name": "keys", "secret": {"secretName": secret, "defaultMode": 0o440}} in pod["volumes"]
        assert {"name": "keys", "mountPath": "/etc/guard", "readOnly": True} in pod["containers"][0]["volumeMounts"]


def test_no_keys_no_file(chart: Chart, tmp_path: Path) -> None:
    """Without a secret nothing is mounted or named."""
    assert configuration(chart(), tmp_path).guard.keys.file is None


def test_grpc_has_its_port_everywhere(chart: Chart, tmp_path: Path) -> None:
    """In the configuration, the pods, and a service of its own, since KubeRay's takes the HTTP port alone."""
    rendered = chart(**VARIANTS["grpc"])
    grpc = configuration(rendered, tmp_path).guard.grpc
    assert grpc is not None
    assert (grpc.host, grpc.port) == ("0.0.0.0", 8001)
    assert {"name": "grpc", "containerPort": 8001} in workers(rendered)[0]["template"]["spec"]["containers"][0]["ports"]
    service = spec(rendered)["serveService"]
    assert [(one["name"], one["port"]) for one in service["spec"]["ports"]] == [("serve", 8000)]
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {"a": "b"}


def test_a_group_has_an_image_and_a_place_of_its_own(chart: Chart) -> None:
    """GPU workers: the CUDA image, a GPU each, on nodes that have them; the head keeps the common image."""
    rendered = chart(**VARIANTS["gpu"])
    (group,) = workers(rendered)
    pod = group["template"]["spec"]
    assert group["groupName"] == "gpu"
    assert pod["containers"][0]["image"].endswith(":0.1.0-cuda")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["nodeSelector"] == {"accelerator": "h100"}
    head = spec(rendered)["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["image"].endswith("backdoor-guard:0.1.0")
    digest = {"digest": "sha256:" + "a" * 64}
    (group,) = workers(chart(**VARIANTS["gpu"], image=digest))
    assert group["template"]["spec"]["containers"][0]["image"].endswith(":0.1.0-cuda")


def test_a_digest_wins_over_the_tag(chart: Chart) -> None:
    """So that what runs is what was checked."""
    rendered = chart(**VARIANTS["image by digest"])
    pod = workers(rendered)[0]["template"]["spec"]
    assert pod["containers"][0]["image"] == "ghcr.io/backdoor-guard/backdoor-guard@sha256:" + "a" * 64
    assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_the_head_runs_no_replica_and_answers_nobody(chart: Chart) -> None:
    """It has no CPUs for replicas, and the service leaves it out."""
    found = spec(chart())
    assert found["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert found["excludeHeadPodFromServeSvc"] is True


def test_the_state_of_the_head_may_lie_in_redis(chart: Chart) -> None:
    """Address and password reach KubeRay; without the option there is nothing of it."""
    found = spec(chart(**VARIANTS["redis"]))["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert found["redisAddress"] == "rediss://redis:6380"
    assert found["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert "gcsFaultToleranceOptions" not in spec(chart())["rayClusterConfig"]


def test_probes_and_an_end_with_notice(variant: Rendered) -> None:
    """Every Ray container is probed three ways, and workers answer for a while before they leave Ray."""
    cluster = spec(variant)["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(pod["containers"][0])
        assert pod["terminationGracePeriodSeconds"] == 60
    for group in cluster["workerGroupSpecs"]:
        assert group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == [
            "sh",
            "-c",
            "sleep 20; ray stop",
        ]


def test_pods_write_to_scratch_alone(variant: Rendered) -> None:
    """/tmp and /dev/shm, both bounded."""
    for group in workers(variant):
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        assert volumes["tmp"]["emptyDir"]["sizeLimit"]
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "512Mi"}
        assert int(group["rayStartParams"]["object-store-memory"]) < 512 * 2**20


def test_what_kuberay_adds_is_bounded_as_well(chart: Chart) -> None:
    """Beside an autoscaler it mounts a volume `ray-logs` at /tmp/ray, without a bound unless there is one already."""

    def logs(pod: dict[str, Any]) -> list[Any]:
        return [one["emptyDir"] for one in pod["template"]["spec"]["volumes"] if one["name"] == "ray-logs"]

    scaled, still = chart(**VARIANTS["autoscaling"]), chart()
    assert logs(spec(scaled)["rayClusterConfig"]["headGroupSpec"]) == [{"sizeLimit": "4Gi"}]
    assert logs(workers(scaled)[0]) == []
    assert logs(spec(still)["rayClusterConfig"]["headGroupSpec"]) == []


def test_pods_are_as_kuberay_looks_for_them(variant: Rendered) -> None:
    """Ray's container is the first, its command is KubeRay's to write, and ports go by the names that it knows."""
    cluster = spec(variant)["rayClusterConfig"]
    known = {"serve": 8000, "gcs-server": 6379, "dashboard": 8265, "client": 10001}
    head = cluster["headGroupSpec"]["template"]
    ports = head["spec"]["containers"][0]["ports"]
    assert known.items() <= {one["name"]: one["containerPort"] for one in ports}.items()
    for role, pod in (("head", head), *(("worker", group["template"]) for group in cluster["workerGroupSpecs"])):
        first = pod["spec"]["containers"][0]
        assert first["name"] == f"ray-{role}"
        assert not {"command", "args"} & set(first)
        assert "restartPolicy" not in pod["spec"]
        assert not [label for label in pod["metadata"]["labels"] if label.startswith("ray.io/")]
        assert "app.kubernetes.io/name" not in pod["metadata"]["labels"]


def test_rays_processes_know_each_other(chart: Chart) -> None:
    """By KubeRay's token, or openly by one's own choice."""
    assert spec(chart())["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    open_ = chart(**VARIANTS["placed"])
    assert "authOptions" not in spec(open_)["rayClusterConfig"]
    environment = workers(open_)[0]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in environment


def test_workers_are_spread_over_hosts(chart: Chart) -> None:
    """As far as they go, by default."""
    (constraint,) = workers(chart())[0]["template"]["spec"]["topologySpreadConstraints"]
    assert constraint["topologyKey"] == "kubernetes.io/hostname"
    labels = workers(chart())[0]["template"]["metadata"]["labels"]
    assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
