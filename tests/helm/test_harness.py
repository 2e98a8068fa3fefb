"""The harness itself, on a chart of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import KINDS, FakeCluster
from rendering import SCHEMAS, ChartError, apply, lint, remove, render, upgrade, validate
from wire import Object, merged

DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .Release.Name }}
spec:
  selector: {matchLabels: {app: one}}
  template:
    metadata: {labels: {app: one}}
    spec:
      containers:
        - name: main
          image: {{ .Values.image }}
          ports: [{name: http, containerPort: 8000}]
          env:
            - {name: A, value: "1"}
            {{- if .Values.more }}
            - {name: B, value: "2"}
            {{- end }}
        {{- if .Values.more }}
        - name: side
          image: side:1
        {{- end }}
      volumes:
        - name: data
          {{- if .Values.more }}
          emptyDir: {}
          {{- else }}
          configMap: {name: data}
          {{- end }}
{{- if .Values.more }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: more
data: {version: {{ .Capabilities.KubeVersion.Version | quote }}}
{{- end }}
"""
SERVICE = """\
{{- if .Capabilities.APIVersions.Has "ray.io/v1/RayService" }}
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: {{ .Release.Name }}
  namespace: {{ .Release.Namespace }}
spec:
  rayClusterConfig:
    rayVersion: 2.60.0
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template: {spec: {containers: [{name: head, image: {{ .Values.image }}}]}}
{{- end }}
"""
TEST = """\
apiVersion: v1
kind: Pod
metadata:
  name: test
  annotations: {helm.sh/hook: test}
spec: {containers: [{name: test, image: {{ .Values.image }}}]}
"""
FILES = {
    "Chart.yaml": "{apiVersion: v2, name: tiny, version: 0.1.0, description: a chart}",
    "values.yaml": "{image: one:1, more: true}",
    "values.schema.json": json.dumps({"properties": {"image": {"type": "string"}}}),
    "templates/deployment.yaml": DEPLOYMENT,
    "templates/service.yaml": SERVICE,
    "templates/test.yaml": TEST,
    "templates/NOTES.txt": "Revision {{ .Release.Revision }} of {{ .Release.Name }}.",
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the chart, with some of its files replaced, into a folder of its own."""

    def written(name: str = "tiny", **changed: str) -> Path:
        files = FILES | {f"templates/{file}.yaml": text for file, text in changed.items()}
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return tmp_path / name

    return written


def kinds(objects: list[Object]) -> list[str]:
    return sorted(one["kind"] for one in objects)


def test_a_right_chart_lints_clean(write: Write) -> None:
    assert lint(write()) == []


def test_lint_tells_where(write: Write) -> None:
    (broken,) = lint(write(deployment="{{ if }}"))
    assert broken.startswith("error: templates/: ")
    old = "{apiVersion: policy/v1beta1, kind: PodDisruptionBudget, metadata: {name: one}}"
    (deprecated,) = lint(write(deployment=old))
    assert deprecated.startswith("warning: templates/deployment.yaml: policy/v1beta1 PodDisruptionBudget is deprecated")


def test_objects_notes_and_hooks_are_rendered(write: Write, tmp_path: Path) -> None:
    found = render(write(), {"image": "two:2"}, release="mine", namespace="there", folder=tmp_path)
    assert kinds(found.objects) == ["ConfigMap", "Deployment", "RayService"]
    assert (found.notes, found.revision) == ("Revision 1 of mine.", 1)
    assert kinds(found.hooks) == ["Pod"]
    (deployment,) = found.objects_of("Deployment")
    assert [one["image"] for one in deployment["spec"]["template"]["spec"]["containers"]] == ["two:2", "side:1"]
    (service,) = found.objects_of("RayService")
    assert service["metadata"] == {"name": "mine", "namespace": "there"}
    (config,) = found.objects_of("ConfigMap")
    assert config["data"] == {"version": "v1.31.0"}
    assert [problem for one in [*found.objects, *found.hooks] for problem in validate(one)] == []


def test_a_cluster_may_lack_an_operator(write: Write, tmp_path: Path) -> None:
    chart = write()
    assert not render(chart, {}, folder=tmp_path, lacks=["ray.io/v1"]).objects_of("RayService")
    assert render(chart, {}, folder=tmp_path).objects_of("RayService")
    always = write(service="{apiVersion: ray.io/v1, kind: RayService, metadata: {name: one}}")
    with pytest.raises(ChartError, match='no matches for kind "RayService"'):
        render(always, {}, folder=tmp_path, lacks=["ray.io/v1"])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ if }}", "missing value for if"),
        ('{{ fail "choose a model" }}', "choose a model"),
        ('{{ required "image.tag is needed" .Values.tag }}', "image.tag is needed"),
        ("a: b: c", "mapping values are not allowed"),
        ("{apiVersion: v1, kind: Nonsense, metadata: {name: one}}", "Nonsense"),
    ],
)
def test_a_broken_template_is_an_error(write: Write, tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ChartError, match=message):
        render(write(broken=template), {}, folder=tmp_path)


def test_a_key_given_twice_is_an_error(write: Write, tmp_path: Path) -> None:
    twice = "{apiVersion: v1, kind: ConfigMap, metadata: {name: one}, data: {a: b, c: d, a: e}}"
    with pytest.raises(ChartError, match="given twice: a, "):
        render(write(broken=twice), {}, folder=tmp_path)


def test_hooks_of_an_install_are_refused_at_once(write: Write, tmp_path: Path) -> None:
    """Helm would wait for their end, and here nothing runs."""
    with pytest.raises(ChartError, match="failed pre-install"):
        render(write(test=TEST.replace("hook: test", "hook: pre-install")), {}, folder=tmp_path)


def test_values_against_the_schema_are_an_error(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ChartError, match=r"(?s)at '/image'.*got number, want string"):
        render(write(), {"image": 3}, folder=tmp_path)


def test_an_upgrade_is_the_second_revision(write: Write, tmp_path: Path) -> None:
    new = write("new", service="{apiVersion: v1, kind: Service, metadata: {name: one}}")
    before, after = upgrade(write(), new, {}, {"more": False}, folder=tmp_path)
    assert kinds(before.objects) == ["ConfigMap", "Deployment", "RayService"]
    assert kinds(after.objects) == ["Deployment", "Service"]
    assert after.notes == "Revision 2 of guard."


@pytest.mark.parametrize("server_side", [True, False], ids=["server-side apply", "patches"])
def test_the_cluster_has_what_the_last_revision_says(write: Write, tmp_path: Path, server_side: bool) -> None:
    """Changed objects are changed, others removed; and uninstalling leaves nothing."""
    chart = write()
    with FakeCluster(tmp_path) as cluster:
        apply(cluster, chart, {}, server_side=server_side)
        assert kinds(cluster.applied) == ["ConfigMap", "Deployment", "RayService"]
        found = apply(cluster, chart, {"image": "one:2", "more": False}, server_side=server_side)
        assert found.revision == 2
        by_kind = {one["kind"]: one for one in cluster.applied}
        assert by_kind.keys() == {"Deployment", "RayService"}
        for kind, kept in by_kind.items():
            (rendered,) = found.objects_of(kind)
            assert kept["spec"] == rendered["spec"]
        assert by_kind["Deployment"]["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "Helm"}
        remove(cluster)
        assert cluster.objects == {}


def test_releases_do_not_meet(write: Write, tmp_path: Path) -> None:
    """Many at once, from threads, each of its own cluster, name and namespace."""
    chart = write()

    def one(number: int) -> str:
        found = render(chart, {}, release=f"r{number}", namespace=f"n{number}", folder=tmp_path)
        return str(found.objects_of("RayService")[0]["metadata"])

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(one, range(8))] == [str({"name": f"r{n}", "namespace": f"n{n}"}) for n in range(8)]


def test_a_release_takes_no_object_of_another(write: Write, tmp_path: Path) -> None:
    chart = write()
    with FakeCluster(tmp_path) as cluster:
        apply(cluster, chart, {})
        with pytest.raises(ChartError, match="cannot be imported into the current release"):
            apply(cluster, chart, {}, release="other")


def test_patches() -> None:
    old = {"a": 1, "b": {"c": 2}, "list": [{"name": "x", "v": 1, "w": 1}, {"name": "y"}], "kind": {"emptyDir": {}}}
    patch = {
        "a": None,
        "b": {"d": 3},
        "$setElementOrder/list": [{"name": "z"}, {"name": "x"}],
        "list": [{"name": "x", "v": 2}, {"name": "z"}, {"$patch": "delete", "name": "y"}],
        "kind": {"$retainKeys": ["configMap"], "configMap": {}},
    }
    assert merged(old, patch) == {
        "b": {"c": 2, "d": 3},
        "list": [{"name": "z"}, {"name": "x", "v": 2, "w": 1}],
        "kind": {"configMap": {}},
    }


POD = {"spec": {"containers": [{"name": "one", "image": "one:1"}]}}
RIGHT: list[Object] = [
    {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "one"},
        "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": POD},
    },
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "one"},
        "spec": {
            "serveConfigV2": "applications: []",
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "gcsFaultToleranceOptions": {"redisAddress": "redis:6379", "redisPassword": {"value": "secret"}},
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": POD},
                "workerGroupSpecs": [
                    {"groupName": "one", "minReplicas": 1, "maxReplicas": 2, "rayStartParams": {}, "template": POD}
                ],
            },
        },
    },
    {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "one"},
        "spec": {
            "selector": {"matchLabels": {"a": "b"}},
            "podMetricsEndpoints": [{"port": "metrics", "interval": "15s"}],
        },
    },
    {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "one"},
        "spec": {"groups": [{"name": "one", "rules": [{"alert": "One", "expr": "up == 0", "for": "5m"}]}]},
    },
    {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "one"},
        "spec": {
            "parentRefs": [{"name": "gateway"}],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                    "backendRefs": [{"name": "one", "port": 80}],
                }
            ],
        },
    },
]


def put(obj: Any, path: str, value: Any) -> Object:
    """A copy of the object with one more value."""
    changed: Object = json.loads(json.dumps(obj))
    *parents, last = path.split(".")
    place: Any = changed
    for step in parents:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return changed


@pytest.mark.parametrize("obj", RIGHT, ids=lambda obj: obj["kind"])
def test_right_objects_are_valid(obj: Object) -> None:
    assert validate(obj) == []


@pytest.mark.parametrize("obj", RIGHT, ids=lambda obj: obj["kind"])
def test_unknown_fields_are_found_at_the_top(obj: Object) -> None:
    assert len(validate(put(obj, "spce", {}))) == 1
    assert len(validate(put(obj, "metadata.nmae", "one"))) == 1
    assert len(validate(put(obj, "spec.misspelt", 1))) == 1


@pytest.mark.parametrize(
    ("number", "path", "value", "problem"),
    [
        (0, "spec.replicas", "two", "$.spec.replicas: 'two' is not of type"),
        (0, "spec.template.spec.containers.0.livenesProbe", {}, "livenesProbe"),
        (1, "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.imgae", "one", "imgae"),
        (1, "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        (1, "spec.rayClusterConfig.workerGroupSpecs.0.minreplicas", 1, "minreplicas"),
        (1, "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword", "x", "'x' is not of type 'object'"),
        (1, "spec.upgradeStrategy.type", "Recreate", "'Recreate' is not one of"),
        (1, "spec.upgradeStrategy.type", "NewClusterWithIncrementalUpgrade", "'clusterUpgradeOptions' is a required"),
        (1, "spec.rayClusterConfig.upgradeStrategy", {"type": "None"}, "upgradeStrategy"),
        (1, "spec.rayClusterConfig.authOptions", {"mode": "token", "secretName": "one"}, "secretName"),
        (1, "spec.rayClusterConfig.autoscalerOptions", {"version": "v3"}, "'v3' is not one of"),
        (1, "spec.rayClusterConfig.headGroupSpec.rayStartParams.labels", "a=b", "False schema does not allow 'a=b'"),
        (1, "spec.rayClusterConfig.workerGroupSpecs.0.numOfHosts", 0, "0 is less than the minimum"),
        (1, "spec.rayClusterConfig.managedBy", "me", "'me' is not one of"),
        (1, "spec.serveService", {"spec": {"tpye": "ClusterIP"}}, "tpye"),
        (2, "spec.podMetricsEndpoints.0.interval", "15 s", "'15 s' does not match"),
        (2, "spec.podMetricsEndpoints.0.authorization", {"type": "Bearer"}, "'credentials' is a required"),
        (2, "spec.podMetricsEndpoints.0.portNumber", 8000, "is valid under each of"),
        (3, "spec.groups.0.rules.0.record", "one", "is valid under each of"),
        (3, "spec.groups.0.rules.0.severity", "page", "severity"),
        (4, "spec.rules.0.backendRefs.0.port", "http", "'http' is not of type 'integer'"),
        (4, "spec.rules.0.backendRefs", [{"name": "one"}], "'port' is a required"),
        (4, "spec.rules.0.matches.0.path.value", "v2", "'v2' does not match"),
        (4, "spec.rules.0.timeouts", {"request": "1.5s"}, "'1.5s' does not match"),
        (4, "spec.rules.0.retry", {"attempts": 3}, "retry"),
        (4, "spec.hostnames", ["10.0.0.1:80"], "does not match"),
    ],
)
def test_a_mistake_is_found_where_it_is(number: int, path: str, value: Any, problem: str) -> None:
    (found,) = validate(put(RIGHT[number], path, value))
    assert problem in found
    assert found.startswith("$.spec")


def test_every_part_of_a_schema_refuses_what_it_does_not_know() -> None:
    """Each object of our own schemas names its fields, or says what all of its values are."""

    def objects(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                yield path, schema
            for key, value in schema.items():
                yield from objects(value, f"{path}/{key}")
        elif isinstance(schema, list):
            for number, value in enumerate(schema):
                yield from objects(value, f"{path}/{number}")

    for kind, path in SCHEMAS.items():
        schema = json.loads(path.read_text())
        assert schema["$comment"], kind
        assert not [where for where, one in objects(schema, kind) if "additionalProperties" not in one]


def test_a_name_that_kuberay_refuses_is_found() -> None:
    """It appends to the name, and makes services of it."""
    assert "is too long" in validate(put(RIGHT[1], "metadata.name", "n" * 48))[0]
    assert "does not match" in validate(put(RIGHT[1], "metadata.name", "1guard"))[0]


def test_a_kind_without_a_schema_is_told() -> None:
    assert validate({"apiVersion": "apps/v2", "kind": "Deployment"}) == ["no schema for apps/v2 Deployment"]


def test_what_kubernetes_itself_offers_has_schemas() -> None:
    own = [version for version in KINDS if not version.startswith(("ray.io", "monitoring.", "gateway."))]
    for version in own:
        for kind in KINDS[version].split():
            assert not [one for one in validate({"apiVersion": version, "kind": kind}) if one.startswith("no schema")]
