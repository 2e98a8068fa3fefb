"""The configuration file: a Ray Serve config whose application is the guard.

The same file runs with ``guard serve CONFIG.yaml`` and, on a cluster, with ``serve deploy CONFIG.yaml`` or as the
``serveConfigV2`` of a RayService. The guard's settings are the ``args`` of its application. Those that may change in a
running replica may also stand in the ``user_config`` of its deployment, by model, and win there: Serve takes new
replicas for a change of ``args``, and none for one of ``user_config``. What is around is Serve's own, checked here
because Serve itself takes unknown keys in silence. Applications of others may stand beside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from deployments.config import SWITCHABLE, ServeConfig, overlaid, overridden
from deployments.settings import Settings, checked
from guard.errors import BadSetting

APP, METRICS_APP = "guard", "guard-metrics"
DEPLOYMENT = "classifier"
BUILD, BUILD_METRICS = "deployments.app:build", "deployments.app:build_metrics"


class HttpOptions(Settings):
    """Where HTTP is served. host: the address that it listens at. port: of every node. request_timeout_s: a request
    that takes longer gets status 408. root_path: in front of every route. keep_alive_timeout_s: how long a connection
    without a request stays open. ssl_*: files in PEM, for HTTPS.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    request_timeout_s: float = Field(default=60.0, gt=0)
    root_path: str = ""
    keep_alive_timeout_s: int = Field(default=90, ge=1)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = Field(default=None, repr=False)
    ssl_ca_certs: str | None = None


class Application(Settings):
    """One Serve application. name: unlike the others'. route_prefix: where it is mounted (None: nowhere). import_path:
    module:function, which makes it. args: what the function gets; the guard's are `ServeConfig`. runtime_env: Ray's,
    of its replicas; a working_dir is brought to every node. deployments: Serve's settings of each, user_config among
    them. autoscaling_policy: Serve's. external_scaler_enabled: Serve's.
    """

    name: str
    route_prefix: str | None = "/"
    import_path: str
    args: dict[str, Any] = Field(default_factory=dict)
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    deployments: list[dict[str, Any]] = Field(default_factory=list)
    autoscaling_policy: dict[str, Any] | None = None
    external_scaler_enabled: bool = False


class Document(Settings):
    """The whole file. proxy_location: the nodes that listen. http_options: how. grpc_options: of Serve's own gRPC
    proxy, which the guard does without. logging_config: Serve's. target_capacity: Serve's. applications: the
    guard's, its metrics', and any others.
    """

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = Field(default_factory=HttpOptions)
    grpc_options: dict[str, Any] = Field(default_factory=dict)
    logging_config: dict[str, Any] | None = None
    target_capacity: float | None = None
    applications: tuple[Application, ...]

    @property
    def mine(self) -> Application:
        """The guard's application."""
        return self._application(BUILD)

    @property
    def guard(self) -> ServeConfig:
        """The guard's settings."""
        return checked(ServeConfig, _merged(self._application(BUILD)), prefix="args.")

    def with_guard(self, args: dict[str, Any]) -> Document:
        """With these settings of the guard instead, each where it can be changed with the least effort."""
        config = checked(ServeConfig, args, prefix="args.")
        mine = self._application(BUILD)
        fixed = config.model_dump(mode="json", exclude_defaults=True, exclude={"models"})
        fixed["models"] = [
            model.model_dump(mode="json", exclude_defaults=True, exclude=SWITCHABLE) for model in config.models
        ]
        switchable = {
            model.name: model.model_dump(mode="json", exclude_defaults=True, include=SWITCHABLE)
            for model in config.models
        }
        others = [one for one in mine.deployments if one.get("name") != DEPLOYMENT]
        own = next((one for one in mine.deployments if one.get("name") == DEPLOYMENT), {"name": DEPLOYMENT})
        changed = mine.model_copy(
            update={"args": fixed, "deployments": [own | {"user_config": switchable}, *others]},
        )
        applications = tuple(
            changed if one is mine else _with_keys(one, fixed) if one.import_path == BUILD_METRICS else one
            for one in self.applications
        )
        return self.model_copy(update={"applications": applications})

    def _application(self, import_path: str) -> Application:
        found = [application for application in self.applications if application.import_path == import_path]
        if len(found) != 1:
            raise BadSetting(
                f"applications: expected one with import_path {import_path}, got {len(found)}", field="applications"
            )
        return found[0]

    def to_serve(self) -> dict[str, Any]:
        """What Ray Serve is given."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        options = self.http_options.model_dump(exclude_none=True)
        return values | {"http_options": options}  # Serve's own default is to listen everywhere


def document(config: ServeConfig, *, host: str, port: int, request_timeout_s: float = 60.0) -> Document:
    """The document of one guard on one machine."""
    args = config.model_dump(mode="json", exclude_defaults=True)
    return Document(
        proxy_location="HeadOnly",
        http_options=HttpOptions(host=host, port=port, request_timeout_s=request_timeout_s),
        applications=(
            Application(name=APP, import_path=BUILD),
            Application(name=METRICS_APP, route_prefix="/metrics", import_path=BUILD_METRICS),
        ),
    ).with_guard(args)


def read(path: Path, environ: Mapping[str, str] = os.environ) -> Document:
    """The file at ``path``, with relative artifacts taken from its folder and the environment's overrides applied.

    Raises:
        BadSetting: it is no YAML, or a key is unknown, missing or out of range.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror}", field=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadSetting(f"{path}: not YAML: {error}", field=str(path)) from error
    if not isinstance(values, dict):
        raise BadSetting(f"{path}: expected a mapping with the key applications", field="applications")
    found = checked(Document, values)
    args = overridden(_anchored(_merged(found._application(BUILD)), path.resolve().parent), environ)
    http = http_options(found.http_options.model_dump(), environ)
    return found.with_guard(args).model_copy(update={"http_options": http})


def http_options(values: dict[str, Any], environ: Mapping[str, str] = os.environ) -> HttpOptions:
    """``values`` with what GUARD_HOST and GUARD_PORT say in their place."""
    words = {key: environ[f"GUARD_{key.upper()}"] for key in ("host", "port") if f"GUARD_{key.upper()}" in environ}
    return checked(HttpOptions, values | words, prefix="http_options.")


def check_with_serve(found: Document) -> None:
    """Check Serve's own part by Serve's own schema, which is more than ours. Imports Ray: see `deployments.proxies`.

    Raises:
        BadSetting: Serve would refuse it, or the guard would ignore it.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        ServeDeploySchema(**found.to_serve())
    except ValueError as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        field = ".".join(map(str, first["loc"])) or "applications"
        raise BadSetting(f"{field}: {first['msg']}", field=field) from error
    if found.grpc_options:
        raise BadSetting("grpc_options: the guard serves gRPC itself: say grpc in its args", field="grpc_options")


def _with_keys(metrics: Application, args: dict[str, Any]) -> Application:
    """The application for /metrics, as open as the guard's own where it does not say otherwise."""
    same = {key: args[key] for key in ("metrics_dir", "keys") if key in args}
    return metrics.model_copy(update={"args": same | metrics.args})


def _merged(application: Application) -> dict[str, Any]:
    """``args`` with what the ``user_config`` of the guard's deployment says in their place."""
    args = application.args
    own = next((one for one in application.deployments if one.get("name") == DEPLOYMENT), {})
    said = own.get("user_config") or {}
    if not isinstance(args.get("models"), list) or not said:
        return args
    if not isinstance(said, dict):
        raise BadSetting("user_config: expected the names of models, each with its settings", field="user_config")
    return args | {"models": overlaid(args["models"], said)}


def _anchored(args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``args`` with absolute artifact paths."""
    models = args.get("models")
    if not isinstance(models, list):
        return args
    return args | {
        "models": [
            one | {"artifact": str(folder / one["artifact"])}
            if isinstance(one, dict) and isinstance(one.get("artifact"), str)
            else one
            for one in models
        ]
    }
