"""The guard as a deployment among the deployments of a user's own Ray Serve application.

::

    guarded = GuardedClassifier.bind("/models/resnet18", mode="flag", original=MyModel.bind())  # or without original
    app = MyIngress.bind(guarded)

    answer = await self.guarded.infer.remote(images)  # in MyIngress: {"label": …, "flagged": …, …}
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle

from deployments.config import ModelConfig
from deployments.settings import checked
from deployments.upstream import OriginalSettings
from guard.errors import BadSetting


class GuardedReplica:
    """A guarded classifier that is called by its handle: what the deployment `GuardedClassifier` runs.
    ``user_config`` switches its live settings.

    Args:
        artifact: the folder that ``guard fit`` wrote, by a path that is the same on every node. original: a deployment
            that gives the original's logits; without one the guard runs the original itself, or asks ``upstream``.
        asking: how ``original`` is asked, keys of `OriginalSettings`. settings: keys of
            `deployments.config.ModelConfig`.

    Raises:
        BadSetting: a setting does not check, or the original is not the network that the guard was fitted for.
        BadArtifact: it cannot be loaded.
    """

    async def __init__(  # type: ignore[misc]
        self,
        artifact: str | Path,
        *,
        original: DeploymentHandle[Any] | None = None,
        asking: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        # Imported here, in the replica, so that composing an application does not load the networks' libraries.
        import torch
        from prometheus_client import CollectorRegistry

        from deployments.originals.handle import HandleOriginal
        from deployments.replicas import classifier_for

        config = checked(ModelConfig, {"artifact": artifact, **settings})
        how = checked(OriginalSettings, dict(asking or {}), "asking.")
        if original is not None and config.upstream is not None:
            raise BadSetting("setting upstream: there is an original already: give one of them", field="upstream")
        self._folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if self._folder is not None:
            Path(self._folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        torch.set_num_threads(1)
        self._registry = CollectorRegistry()
        self._classifier = classifier_for(
            config,
            None if original is None else lambda guard: HandleOriginal(original, how, len(guard.classes)),
            tolerance=how.tolerance if how.verify else None,
            registry=self._registry,
        )
        await self._classifier.start()

    async def infer(
        self, images: NDArray[Any], headers: Mapping[str, str] | None = None
    ) -> dict[str, NDArray[Any] | str | bool]:
        """What `deployments.policy.Answer` holds, without the fields that are None.

        Args:
            images: [n, C, H, W], float32 in [0, 1] or uint8. headers: of the request, of which an ``upstream`` gets
                those that it forwards.

        Raises:
            BadInput: the images do not fit the model. Unavailable: try again later. UpstreamFailed: see its classes.
        """
        from deployments.protocol.bodies import check_count
        from guard.data import as_float, check_images

        classifier = self._classifier
        with classifier.visit() as live, classifier.metrics.stage("total"):
            with classifier.metrics.stage("decode"):
                own = np.array(images)  # what comes through Ray's store is read-only
                pixels = as_float(check_images(own, classifier.guard.spec)).numpy()
                check_count(len(pixels), classifier.config.limits, "images")
            answer = await classifier.infer(pixels, live, headers)
        return {name: value for name, value in answer._asdict().items() if value is not None}

    async def metrics(self) -> bytes:
        """The series in the Prometheus text format: of all replicas of this node where PROMETHEUS_MULTIPROC_DIR is
        set in their environment, else of the one replica that answers."""
        from prometheus_client import generate_latest

        from deployments.watch.watch import merged

        folder = self._folder
        return await asyncio.to_thread(
            lambda: generate_latest(self._registry if folder is None else merged(Path(folder)))
        )

    async def ready(self) -> bool:
        """Whether it can answer; an ``upstream`` may come later."""
        return self._classifier.ready

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Switch the live settings (`deployments.config.Live`) in place. Never raises: that would cost the replica."""
        self._classifier.switch(user_config)

    def check_health(self) -> None:
        self._classifier.check()

    async def __del__(self) -> None:
        if hasattr(self, "_classifier"):
            await self._classifier.close()


GuardedClassifier: Deployment = serve.deployment(
    name="GuardedClassifier",
    max_ongoing_requests=512,  # it has a queue of its own, which forms batches and refuses what is too much
    health_check_period_s=1.0,
    max_constructor_retry_count=2,
)(GuardedReplica)


def guarded(
    original: Application | Deployment | DeploymentHandle[Any],
    artifact: str | Path,
    *,
    method: str = "__call__",
    outputs: Literal["logits", "probabilities"] = "logits",
    timeout_s: float = 30.0,
    verify: bool = True,
    tolerance: float = 0.05,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Application:
    """A guard in front of a deployment, or of a handle of one that runs already.

    Args:
        original, artifact, settings: see `GuardedReplica`. method, outputs, timeout_s, verify, tolerance: see
            `OriginalSettings`. options: of the guard's own deployment, such as ``num_replicas``.
    """
    if isinstance(original, Deployment):
        original = original.bind()
    asking = {"method": method, "outputs": outputs, "timeout_s": timeout_s, "verify": verify, "tolerance": tolerance}
    checked(OriginalSettings, asking)
    checked(ModelConfig, {"artifact": artifact, **settings})
    deployment = GuardedClassifier.options(**options) if options else GuardedClassifier
    return deployment.bind(artifact, original=original, asking=asking, **settings)
