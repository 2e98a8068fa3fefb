"""Inside a replica: an artifact on disk becomes a classifier with its series."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

import guard
from deployments.config import ModelConfig
from deployments.engine.classifier import Classifier
from deployments.engine.metrics import Metrics, input_buckets, score_buckets
from deployments.engine.served import AnyServed
from deployments.engine.wrapped import Wrapped
from deployments.originals.http import UpstreamHttp
from deployments.originals.original import Original
from guard.detector import Guard


def load(config: ModelConfig) -> Guard:
    """The guard of ``config.artifact``, on its device. BadArtifact where it cannot be loaded."""
    return guard.load(config.artifact, device=config.device)


def classifier_for(
    config: ModelConfig,
    original: Callable[[Guard], Original] | None = None,
    *,
    tolerance: float | None = None,
    registry: CollectorRegistry | None = None,
) -> AnyServed:
    """A classifier that has not started yet; it runs the original itself, unless that is elsewhere.

    ``original``: makes what asks for it, if ``config.upstream`` does not say where it runs; ``tolerance``: see
    `Wrapped`. ``registry``: of the series, by default one of its own.
    """
    loaded = load(config)
    metrics = Metrics(
        config.name,
        loaded.classes,
        registry=CollectorRegistry() if registry is None else registry,
        score_buckets=score_buckets(loaded.manifest),
        brightness_buckets=input_buckets(loaded.manifest, "brightness"),
        contrast_buckets=input_buckets(loaded.manifest, "contrast"),
    )
    if config.upstream is not None:
        upstream = UpstreamHttp(config.upstream, channels=loaded.spec.channels, classes=len(loaded.classes))
        tolerance = config.upstream.tolerance if config.upstream.verify else None
        return Wrapped(loaded, config, metrics, upstream, tolerance=tolerance)
    if original is not None:
        return Wrapped(loaded, config, metrics, original(loaded), tolerance=tolerance)
    return Classifier(loaded, config, metrics)
