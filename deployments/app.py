"""The Serve applications: a typed builder turns a ServeConfig into them. Thin adapters around plain objects."""

# No `from __future__ import annotations`: Serve reads the type of the builder's argument to check what it is given.

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from deployments.config import ServeConfig

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
DRAIN_S = 20.0
CLOSING = "closing"


@serve.ingress()
class ClassifierReplica:
    """One replica: both networks, one torch thread, its queue, and the routes in front."""

    def __init__(self, config: ServeConfig) -> None:
        # Imported here, in the replica, so that building the application does not load the networks' libraries.
        import torch
        from prometheus_client import CollectorRegistry

        import guard
        from deployments.classifier import Classifier
        from deployments.metrics import Metrics, score_buckets

        torch.set_num_threads(1)
        loaded = guard.load(config.artifact, device=config.device)
        metrics = Metrics(
            config.name, loaded.classes, registry=CollectorRegistry(), score_buckets=score_buckets(loaded.manifest)
        )
        self._classifier = Classifier(loaded, config, metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        import guard
        from deployments.ingress import build_http_app

        return build_http_app(self._classifier, guard.__version__)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Switch the live settings in place. Never raises: that would cost the replica."""
        self._classifier.switch(user_config)

    def check_health(self) -> None:
        self._classifier.check()


@serve.ingress()
class MetricsReplica:
    """The merged series of all replicas of this node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from deployments.exposition import build_metrics_app

        return build_metrics_app(self._folder)


def build(config: ServeConfig) -> Application:
    """The classifier's application, to be mounted at ``/``."""
    limits = config.limits
    environment = {} if config.metrics_dir is None else {"PROMETHEUS_MULTIPROC_DIR": str(config.metrics_dir)}
    waiting = limits.queued_images + config.max_batch_size
    deploy = serve.deployment(
        name="classifier",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "runtime_env": {"env_vars": environment}},
        user_config=config.live.model_dump(),
        max_ongoing_requests=waiting + 1,  # one more than the queue holds, so that our own 503 speaks first
        max_queued_requests=waiting,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=QUIET,
        max_constructor_retry_count=2,
    )
    return deploy(ClassifierReplica).bind(config)


def build_metrics(config: ServeConfig) -> Application:
    """The application for ``/metrics``; needs ``config.metrics_dir``."""
    deploy = serve.deployment(
        name="metrics",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=16,
        max_queued_requests=16,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=QUIET,
    )
    return deploy(MetricsReplica).bind(config.metrics_dir)


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
