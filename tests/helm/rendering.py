"""Charts through real Helm against a fake cluster, and what comes out against Kubernetes' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import engine
import yaml
from cluster import FakeCluster
from engine import ChartError
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from kubernetes_validate.utils import schema_contents  # type: ignore[import-untyped]
from referencing import Registry, Resource
from wire import Object

__all__ = ["ChartError", "Rendered", "apply", "lint", "remove", "render", "upgrade", "validate"]

KUBERNETES = "1.31"
STRICT = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
SCHEMAS = {path.stem: path for path in (Path(__file__).parent / "schemas").glob("*.json")}
SEVERITIES = {2: "warning", 3: "error"}


class Rendered(NamedTuple):
    """A revision of a release; `hooks` are the objects that Helm creates at another time, such as tests."""

    objects: list[Object]
    notes: str
    revision: int
    hooks: list[Object]

    def objects_of(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]


def lint(chart: Path) -> list[str]:
    """The warnings and errors of `helm lint`, which keep few of their words on the way: mostly their place alone."""
    return [
        f"{SEVERITIES[one['Severity']]}: {one['Path'] or 'chart'}: {_words(one['Err'])}"
        for one in engine.run(engine.lint, chart)
        if one["Severity"] in SEVERITIES
    ]


def _words(error: Any) -> str:
    return str(error.get("Message", "render the chart for the reason")) if isinstance(error, dict) else str(error)


def apply(
    cluster: FakeCluster,
    chart: Path,
    values: Mapping[str, Any],
    *,
    release: str = "guard",
    namespace: str = "default",
    server_side: bool = True,
) -> Rendered:
    """Installs the chart, or upgrades the release that the cluster has; server-side apply is Helm 4's default."""
    found = engine.run(engine.upgrade_install, cluster.kubeconfig, namespace, release, chart, dict(values), server_side)
    hooks = [one for hook in found.get("hooks") or [] for one in _objects(hook["manifest"])]
    return Rendered(_objects(found["manifest"]), found["info"].get("notes", ""), found["version"], hooks)


def remove(cluster: FakeCluster, *, release: str = "guard", namespace: str = "default") -> None:
    """Uninstalls the release."""
    engine.run(engine.uninstall, cluster.kubeconfig, namespace, release)


def render(
    chart: Path,
    values: Mapping[str, Any],
    *,
    release: str = "guard",
    namespace: str = "default",
    folder: Path,
    lacks: Collection[str] = (),
) -> Rendered:
    """The chart as installed into a fresh cluster, which lacks the API versions given."""
    with FakeCluster(folder, lacks=lacks) as cluster:
        return apply(cluster, chart, values, release=release, namespace=namespace)


def upgrade(
    before: Path,
    after: Path,
    values: Mapping[str, Any],
    new_values: Mapping[str, Any] | None = None,
    *,
    release: str = "guard",
    namespace: str = "default",
    folder: Path,
) -> tuple[Rendered, Rendered]:
    """One chart as installed and the other as its upgrade, with the same values unless there are new ones."""
    with FakeCluster(folder) as cluster:
        first = apply(cluster, before, values, release=release, namespace=namespace)
        new = values if new_values is None else new_values
        return first, apply(cluster, after, new, release=release, namespace=namespace)


def validate(obj: Object) -> list[str]:
    """What Kubernetes, or the schema of a custom resource in schemas/, has against an object; unknown fields too."""
    try:
        validator = _validator(obj["apiVersion"], obj["kind"])
    except FileNotFoundError:
        return [f"no schema for {obj['apiVersion']} {obj['kind']}"]
    return sorted(f"{error.json_path}: {error.message}" for error in validator.iter_errors(obj))


@cache
def _validator(version: str, kind: str) -> Any:
    own = SCHEMAS.get(kind.lower())
    if own is not None:
        schema = json.loads(own.read_text())
    else:
        name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
        schema = schema_contents(f"{STRICT}/{kind.lower()}-{name}.json", KUBERNETES)
    return Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry[Any]:
    definitions = Resource.from_contents(schema_contents(f"{STRICT}/_definitions.json", KUBERNETES))
    return definitions @ Registry()


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which Helm silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ChartError(f"given twice: {', '.join(twice)}, in the manifest's {node.start_mark}")
        return super().construct_mapping(node, deep)


def _objects(manifest: str) -> list[Object]:
    return [one for one in yaml.load_all(manifest, _Loader) if one]
