"""As much of a Kubernetes API server as Helm asks for to install, upgrade and uninstall, on loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import wire
from wire import Object

KINDS = {
    "v1": "ConfigMap Namespace PersistentVolumeClaim Pod Secret Service ServiceAccount",
    "apps/v1": "DaemonSet Deployment ReplicaSet StatefulSet",
    "networking.k8s.io/v1": "Ingress NetworkPolicy",
    "policy/v1": "PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1": "ClusterRole ClusterRoleBinding Role RoleBinding",
    "batch/v1": "CronJob Job",
    "autoscaling/v2": "HorizontalPodAutoscaler",
    "monitoring.coreos.com/v1": "PodMonitor PrometheusRule",
    "ray.io/v1": "RayCluster RayJob RayService",
    "gateway.networking.k8s.io/v1": "Gateway HTTPRoute",
}
CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "Namespace"}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
PATH = re.compile(
    r"/apis?/(?P<version>v1|[^/]+/[^/]+)(/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)(/(?P<name>[^/]+))?"
)


class Key(NamedTuple):
    """Where an object is kept."""

    version: str
    namespace: str
    plural: str
    name: str


class Server(ThreadingHTTPServer):
    """With room for the connections that Helm opens at once: one that finds none is tried again a second later."""

    request_queue_size = 128


class FakeCluster:
    """Keeps what is sent to it and runs nothing; `lacks` names API versions that it does not serve."""

    def __init__(self, folder: Path, *, lacks: Collection[str] = ()) -> None:
        self.kinds = {version: kinds.split() for version, kinds in KINDS.items() if version not in lacks}
        self.objects: dict[Key, Object] = {}
        self.lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), partial(Handler, self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        server = f"http://127.0.0.1:{self._server.server_port}"
        self.kubeconfig = folder / f"kubeconfig-{self._server.server_port}.json"
        self.kubeconfig.write_text(json.dumps(kubeconfig(server)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def applied(self) -> list[Object]:
        """The objects of the charts: Helm's own records are left out."""
        return [one for one in self.objects.values() if not one.get("type", "").startswith("helm.sh/")]

    def discovery(self, path: str) -> Object | None:
        """The answer to a question about the server itself."""
        if path == "/version":
            return {"major": "1", "minor": "31", "gitVersion": "v1.31.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": one, "version": one.split("/")[1]} for one in self.kinds if "/" in one]
            groups = [
                {"name": one["groupVersion"].split("/")[0], "versions": [one], "preferredVersion": one}
                for one in versions
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        version = re.sub("^/apis?/", "", path)
        if version not in self.kinds:
            return None
        resources = [
            {"name": plural(kind), "kind": kind, "namespaced": kind not in CLUSTER_WIDE, "verbs": VERBS}
            for kind in self.kinds[version]
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}

    def listed(self, version: str, kind: str, namespace: str, selector: str) -> Object:
        """The objects of a kind whose labels are as selected."""
        wanted = dict(term.split("=", 1) for term in selector.split(",") if term)
        items = [
            one
            for key, one in self.objects.items()
            if key.version == version and key.plural == plural(kind) and namespace in ("", key.namespace)
            and wanted.items() <= one["metadata"].get("labels", {}).items()
        ]  # fmt: skip
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": items}


class Handler(BaseHTTPRequestHandler):
    """One request; the connection closes with its answer, so that none outlives the server."""

    def __init__(self, cluster: FakeCluster, *connection: Any) -> None:
        self.cluster = cluster
        super().__init__(*connection)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.decoded(data) if self.command in ("POST", "PUT", "PATCH") else None
        with self.cluster.lock:
            found = self.cluster.discovery(url.path)
            code, answer = (200, found) if found else self.kept(url.path, parse_qs(url.query), body)
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def decoded(self, data: bytes) -> Any:
        """What was sent: Helm's records come in protobuf, all else in JSON."""
        protobuf = self.headers["Content-Type"] == "application/vnd.kubernetes.protobuf"
        return wire.secret(data) if protobuf else json.loads(data)

    def kept(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Object]:
        """Reads or changes the objects kept."""
        parts = PATH.fullmatch(path)
        kinds = {plural(kind): kind for kind in self.cluster.kinds.get(parts["version"], [])} if parts else {}
        if parts is None or parts["plural"] not in kinds:
            return failure(404, "NotFound", path)
        version, namespace, name = parts["version"], parts["namespace"] or "", parts["name"]
        if self.command == "GET" and not name:
            selector = query.get("labelSelector", [""])[0]
            return 200, self.cluster.listed(version, kinds[parts["plural"]], namespace, selector)
        key = Key(version, namespace, parts["plural"], name or body["metadata"]["name"])
        old = self.cluster.objects.get(key)
        applies = self.headers.get("Content-Type") == "application/apply-patch+yaml"
        if self.command == "POST":
            if old is not None:
                return failure(409, "AlreadyExists", path)
            self.cluster.objects[key] = body
            return 201, body
        if old is None and not applies:
            return failure(404, "NotFound", path)
        if self.command == "DELETE":
            return 200, self.cluster.objects.pop(key)
        if self.command != "GET":
            whole = applies or self.command == "PUT"
            self.cluster.objects[key] = body if whole else wire.merged(old, body)
        return 200, self.cluster.objects[key]

    def log_message(self, *_: Any) -> None:
        pass


def kubeconfig(server: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": server}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake"}}],
        "current-context": "fake",
    }


def failure(code: int, reason: str, message: str) -> tuple[int, Object]:
    """An error as the API server words it."""
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                  "message": message}  # fmt: skip


def plural(kind: str) -> str:
    """The kind as paths spell it: networkpolicies, ingresses, gateways."""
    return re.sub("cys$", "cies", re.sub("sss$", "sses", f"{kind.lower()}s"))
