"""A classifier whose every figure can be worked out by hand, and the pieces built around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from deployments.classifier import Classifier
from deployments.config import ServeConfig
from deployments.metrics import Metrics
from guard.types import InputSpec, Verdict


class HandGuard:
    """Images [n, 3, 4, 4]; logit k is ten times the mean of channel k; the correction clips logits at 3.

    A channel mean above 0.3 is what a trigger looks like here. With c* first and r the runner-up, the score is
    (c* − r) − (min(c*, 3) − min(r, 3)), and p = exp(−score). ``fail`` maps a stage to the mean of channel 0 at which
    it raises; ``gate`` holds the original network until it is set; ``batches`` records the size of every pass.
    """

    spec = InputSpec(3, 4, 4)
    classes = ("ant", "bee", "cat")
    method = "mmdf"
    threshold = 0.05
    fingerprint = "0123456789abcdef" * 4
    created_at = "2026-11-21T09:00:00+00:00"

    def __init__(self, **fail: float) -> None:
        self.fail = fail
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []

    def original(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.gate.wait(10)
        self.batches.append(len(images))
        logits = images.mean((2, 3)) * 10
        self._maybe_fail("original", logits)
        return logits, logits

    def corrected(self, frontier: Tensor) -> Tensor:
        self._maybe_fail("corrected", frontier)
        return frontier.clamp(max=3)

    def verdict(self, logits: Tensor, corrected_logits: Tensor) -> Verdict:
        self._maybe_fail("statistic", logits)
        label = logits.argmax(1)
        rest = torch.nn.functional.one_hot(label, 3).bool()
        own = lambda values: values[rest] - values.masked_fill(rest, -torch.inf).amax(1)  # noqa: E731 - a formula
        score = (own(logits) - own(corrected_logits)).double()
        p_value = torch.exp(-score.clamp(min=0))
        flagged = p_value < self.threshold
        corrected_label = torch.where(flagged, corrected_logits.masked_fill(rest, -torch.inf).argmax(1), label)
        return Verdict(logits, corrected_logits, label, corrected_label, score, p_value, flagged)

    def _maybe_fail(self, stage: str, logits: Tensor) -> None:
        if stage in self.fail and bool((logits[:, 0] - 10 * self.fail[stage]).abs().min() < 1e-3):
            raise RuntimeError(f"{stage} was told to fail")


def image(red: float, green: float, blue: float) -> np.ndarray:
    """One plain-coloured image, float32 [1, 3, 4, 4]."""
    return np.ones((1, 3, 4, 4), np.float32) * np.array([red, green, blue], np.float32)[None, :, None, None]


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
def hand_guard() -> type[HandGuard]:
    return HandGuard


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def make_classifier(registry: CollectorRegistry) -> Callable[..., Classifier]:
    """A classifier named "hand" around a HandGuard; keywords are settings."""

    def make(guard: HandGuard | None = None, **settings: Any) -> Classifier:
        metrics = Metrics("hand", HandGuard.classes, registry=registry)
        config = ServeConfig(artifact="artifacts/hand", **settings)
        return Classifier(guard or HandGuard(), config, metrics)

    return make


@pytest.fixture
def count(registry: CollectorRegistry) -> Callable[..., float | None]:
    """The value of a series: ``count("guard_requests_total", mode="flag", verdict="clean")``."""

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "hand", **labels})

    return value
