"""A guard that can be worked out by hand behind a real queue, a server that gets events, and what was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hand import HandGuard
from prometheus_client import CollectorRegistry
from receiving import Receiver

from deployments.config import ModelConfig
from deployments.engine.classifier import Classifier
from deployments.engine.metrics import Metrics


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def make(registry: CollectorRegistry) -> Callable[..., Classifier]:
    """A classifier named "hand" around a HandGuard; keywords are settings."""

    def made(guard: HandGuard | None = None, **settings: Any) -> Classifier:
        config = ModelConfig(artifact="artifacts/hand", **settings)
        return Classifier(guard or HandGuard(), config, Metrics("hand", HandGuard.classes, registry=registry))

    return made


@pytest.fixture
def counted(registry: CollectorRegistry) -> Callable[[str], dict[str, int]]:
    """Outcome → number, of ``guard_events_total`` or ``guard_quarantined_total``; without those that are 0."""

    def values(name: str) -> dict[str, int]:
        samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
        return {sample.labels["outcome"]: int(sample.value) for sample in samples if sample.value}

    return values
