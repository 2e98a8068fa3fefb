"""The Serve applications: builders turn settings into them. Thin adapters around plain objects."""

# No `from __future__ import annotations`: Serve reads the types of a builder's arguments.

import asyncio
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from deployments.config import BaseConfig, GrpcSettings, ModelConfig, ServeConfig, overlaid, overridden
from deployments.keys import Keys, KeySettings
from deployments.settings import Settings, checked
from guard.errors import BadInput, BadSetting

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
DRAIN_S = 20.0
START_TRIES = 6  # a replica that is killed while it starts counts as one, too
CLOSING = "closing"
HEAD_NODE = "node:__internal_head__"  # the resource that Ray gives the head
log = logging.getLogger(__name__)


@serve.ingress()
class ClassifierReplica:
    """One replica: the networks of every model, their queues, and the routes in front.

    Models are loaded by ``reconfigure``, the first time before the first request: by then the ``user_config`` has said
    what it says in place of the settings that came first.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        # Imported here, in the replica, so that building the application does not load the networks' libraries.
        import torch

        from deployments.engine.catalogue import Catalogue

        torch.set_num_threads(1)
        Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._config = config
        self._served: dict[str, ModelConfig] = {}
        self._models = Catalogue()
        self._keys = Keys.from_settings(checked(KeySettings, config["keys"]))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        import guard
        from deployments.http.ingress import build_http_app

        return build_http_app(self._models, guard.__version__, self._keys)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Switch settings and artifacts in place. Once it serves it never raises, for that would cost the replica:
        what does not check or load is logged, and what is in force stays."""
        try:
            said = overridden({"models": overlaid(self._config["models"], user_config)}, os.environ)
            wanted = [checked(ModelConfig, one) for one in said["models"]]
        except BadInput as error:
            if not self._served:
                raise
            log.error("every model stays as it is: %s", error)
            return
        for one in wanted:
            try:
                await self._apply(one)
            except Exception as error:
                if one.name not in self._served:
                    raise
                log.error("%s stays as it is: %s", one.name, error, exc_info=not isinstance(error, BadInput))
        if self._config["grpc"] is not None and not self._models.doors:
            await self._open_grpc(checked(GrpcSettings, self._config["grpc"]))

    async def _open_grpc(self, settings: GrpcSettings) -> None:
        import guard
        from deployments.grpc.service import GrpcServer

        server = GrpcServer(self._models, guard.__version__, host=settings.host, port=settings.port, keys=self._keys)
        await server.start()
        self._models.doors.append(partial(server.stop, DRAIN_S))

    async def _apply(self, config: ModelConfig) -> None:
        """Make one model what ``config`` says."""
        from deployments.engine.served import check_threshold
        from deployments.replicas import classifier_for, load

        before = self._served.get(config.name)
        if before is None:
            classifier = await asyncio.to_thread(classifier_for, config)
            await classifier.start()
            self._models.add(classifier)
        else:
            classifier = self._models.find(config.name)
            if any(getattr(config, key) != getattr(before, key) for key in ("artifact", "version", "revision")):
                loaded = await asyncio.to_thread(load, config)
                check_threshold(config.threshold, loaded)
                await classifier.replace(loaded, config.version)
            classifier.switch(config.live.model_dump())
        self._served[config.name] = config

    def check_health(self) -> None:
        self._models.check()


@serve.ingress()
class MetricsReplica:
    """The merged series of all replicas of all nodes, and the watch over them."""

    def __init__(self, folder: Path, keys: dict[str, Any]) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._keys = Keys.from_settings(checked(KeySettings, keys))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from deployments.http.exposition import build_metrics_app
        from deployments.nodes import OtherNodes
        from deployments.watch.watch import Watch

        others = OtherNodes(self._folder)
        return build_metrics_app(Watch(self._folder, gather=others.gather, complete=others.complete), self._keys)


class MetricsSettings(Settings):
    """Settings of the application for /metrics, as in `ServeConfig`."""

    metrics_dir: Path | None = None
    keys: KeySettings = Field(default_factory=KeySettings)


def build(args: dict[str, Any]) -> Application:
    """The classifier's application, from the ``args`` of a configuration file and the environment."""
    config = checked(BaseConfig, overridden(args, os.environ))
    for model in config.models:
        if model.artifact is not None and not model.artifact.is_absolute():
            _check_brought(model.artifact)
    return application(config)


def _check_brought(artifact: Path) -> None:
    """A relative path is one in the folder that Ray brings to every node, and goes to."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().runtime_env.get("working_dir") is None:
        raise BadSetting(
            f"artifact: {artifact} is relative: name the folder by a path that is the same on every node, or bring it "
            "there as the application's runtime_env.working_dir",
            field="artifact",
        )
    if not artifact.is_dir():
        raise BadSetting(f"artifact: there is no folder {artifact} in the application's working_dir", field="artifact")


def application(config: ServeConfig) -> Application:
    """The classifier's application, to be mounted at ``/``."""
    waiting = sum(model.limits.queued_images + model.max_batch_size for model in config.models)
    folder = _metrics_dir(config.metrics_dir)
    deploy = serve.deployment(
        name="classifier",
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus,
            "runtime_env": {"env_vars": {"PROMETHEUS_MULTIPROC_DIR": str(folder)}},
        },
        user_config={},  # a configuration file may say more; with none at all `reconfigure` would not be called
        max_ongoing_requests=waiting + 1,  # one more than the queue holds, so that our own 503 speaks first
        max_queued_requests=waiting,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=QUIET,
        max_constructor_retry_count=START_TRIES,
    )
    return deploy(ClassifierReplica).bind(config.model_dump(mode="json"))


def build_metrics(args: dict[str, Any]) -> Application:
    """The application for ``/metrics``."""
    said = overridden(args, os.environ)
    config = checked(MetricsSettings, args | {key: said[key] for key in ("metrics_dir",) if key in said})
    deploy = serve.deployment(
        name="metrics",
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001}},  # it keeps what gone nodes counted
        max_ongoing_requests=16,
        max_queued_requests=16,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=QUIET,
    )
    return deploy(MetricsReplica).bind(_metrics_dir(config.metrics_dir), config.keys.model_dump(mode="json"))


def _metrics_dir(given: Path | None) -> Path:
    """Ray's session is as old as the counters are meant to be, and its folder has the same path on every node."""
    import ray

    if given is not None:
        return given
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "guard-metrics"


class ClosingReplica:
    """Takes the classifier's place at shutdown: a refusal that load balancers understand, until the proxy goes."""

    async def __call__(self, _request: Request) -> Response:
        error = {"error": "the server is shutting down: try another replica", "field": None}
        return JSONResponse(error, status_code=503, headers={"retry-after": "1"})


def build_closing() -> Application:
    """The application that ends the classifier's: requests in flight get their answers, new ones a 503."""
    closing = serve.deployment(
        name=CLOSING, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, logging_config=QUIET
    )
    return closing(ClosingReplica).bind()
