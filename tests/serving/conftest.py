"""A classifier whose every figure can be worked out by hand, and the pieces built around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hand import HandGuard, image
from prometheus_client import CollectorRegistry

from deployments.config import ModelConfig
from deployments.engine.classifier import Classifier
from deployments.engine.metrics import Metrics


@pytest.fixture
def clean() -> np.ndarray:
    """Decided 0 (ant) with logits [3, 1, 0], never flagged: score 0, p = 1."""
    return image(0.3, 0.1, 0.0)


@pytest.fixture
def triggered() -> np.ndarray:
    """Decided 0 (ant) with logits [10, 2, 1]; flagged: score 8 − 1 = 7, p = exp(−7); corrected decision 1 (bee)."""
    return image(1.0, 0.2, 0.1)


@pytest.fixture
def paint() -> Callable[..., np.ndarray]:
    return image


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def make_classifier(registry: CollectorRegistry) -> Callable[..., Classifier]:
    """A classifier named "hand" around a HandGuard; keywords are settings."""

    def make(guard: HandGuard | None = None, **settings: Any) -> Classifier:
        metrics = Metrics("hand", HandGuard.classes, registry=registry)
        config = ModelConfig(artifact="artifacts/hand", **settings)
        return Classifier(guard or HandGuard(), config, metrics)

    return make


@pytest.fixture
def count(registry: CollectorRegistry) -> Callable[..., float | None]:
    """The value of a series: ``count("guard_requests_total", mode="flag", verdict="clean")``."""

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "hand", **labels})

    return value
