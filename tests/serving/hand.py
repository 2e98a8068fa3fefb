"""Guards whose every figure can be worked out by hand, and a way to ask a classifier around one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guard.artifact import FORMAT, FORMAT_VERSION, Artifact
from guard.capture import capture
from guard.config import FitSettings
from guard.corrections import Renormalise
from guard.rules import Disagreement
from guard.types import InputSpec, Verdict
from guard.versions import versions

CEILING = 1.5  # what a corrected network of a target lets through of the target's logit
CREATED_AT = "2026-11-21T09:00:00+00:00"


class HandGuard:
    """Images [n, 3, 4, 4]; logit k is ten times the mean of channel k; the correction clips logits at 3.

    A channel mean above 0.3 is what a trigger looks like here. With c* first and r the runner-up, the score is
    (c* − r) − (min(c*, 3) − min(r, 3)), and p = exp(−score). ``fail`` maps a stage to the mean of channel 0 at which
    it raises; ``gate`` holds the original network until it is set, ``corrected_gate`` the corrected ones; ``batches``
    and ``corrected_batches`` record the size of every pass, the latter as (corrected network, size).
    """

    spec = InputSpec(3, 4, 4)
    classes = ("ant", "bee", "cat")
    method = "mmdf"
    threshold: float | None = 0.05
    eager = False
    fingerprint = "0123456789abcdef" * 4
    created_at = CREATED_AT
    manifest: ClassVar[dict] = {}

    def __init__(self, **fail: float) -> None:
        self.fail = fail
        self.gate, self.corrected_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.corrected_gate.set()
        self.batches: list[int] = []
        self.corrected_batches: list[tuple[int, int]] = []

    @property
    def rule(self) -> HandGuard:
        return self

    def route(self, label: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros_like(label)

    def suspects(self, logits: Tensor) -> Tensor:
        return torch.from_numpy(self.route(logits.argmax(1).numpy()) >= 0)

    def shared(self, images: Tensor) -> Tensor:
        self.enter_original(images)
        return images.mean((2, 3)) * 10

    def finish(self, shared: Tensor) -> Tensor:
        return shared

    def corrected(self, _logits: Tensor | None, frontier: Tensor) -> Tensor:
        self.enter_corrected(0, frontier)
        return frontier.clamp(max=3)

    def verdict(self, logits: Tensor, corrected_logits: Tensor, *, threshold: float | None = None) -> Verdict:
        self._maybe_fail("statistic", logits)
        label = logits.argmax(1)
        score = (lead(logits, label) - lead(corrected_logits, label)).double()
        p_value = torch.exp(-score.clamp(min=0))
        return self._verdict(logits, corrected_logits, score, p_value, p_value < (threshold or self.threshold))

    def enter_original(self, images: Tensor) -> None:
        self.gate.wait(10)
        self.batches.append(len(images))
        self._maybe_fail("original", images.mean((2, 3)) * 10)

    def enter_corrected(self, network: int, logits: Tensor) -> None:
        self.corrected_gate.wait(10)
        self.corrected_batches.append((network, len(logits)))
        self._maybe_fail("corrected", logits)

    def _verdict(
        self, logits: Tensor, corrected_logits: Tensor, score: Tensor, p_value: Tensor | None, flagged: Tensor
    ) -> Verdict:
        label = logits.argmax(1)
        other = corrected_logits.masked_fill(nn.functional.one_hot(label, 3).bool(), -torch.inf).argmax(1)
        corrected_label = torch.where(flagged, other, label)
        return Verdict(logits, corrected_logits, label, corrected_label, score, p_value, flagged)

    def _maybe_fail(self, stage: str, logits: Tensor) -> None:
        if stage in self.fail and bool(((logits[:, 0] - 10 * self.fail[stage]).abs() < 1e-3).any()):
            raise RuntimeError(f"{stage} was told to fail")


class HandSuspicion(HandGuard):
    """The same logits; only images decided as one of ``targets`` take a corrected network, which lets at most CEILING
    of the target's logit through. One that then decides otherwise flags; the score is by how much, and there is no
    p-value."""

    method = "bna"
    threshold = None

    def __init__(self, targets: Sequence[int] = (0,), **fail: float) -> None:
        super().__init__(**fail)
        self.targets = tuple(targets)

    def route(self, label: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.targets.index(one) if one in self.targets else -1 for one in label.tolist()])

    def corrected(self, logits: Tensor, frontier: Tensor) -> Tensor:
        answer, route = logits.clone(), torch.from_numpy(self.route(logits.argmax(1).numpy()))
        for network, target in enumerate(self.targets):
            rows = route == network
            if rows.any():
                self.enter_corrected(network, frontier[rows])
                own = frontier[rows].clone()
                own[:, target] = own[:, target].clamp(max=CEILING)
                answer[rows] = own
        return answer

    def verdict(self, logits: Tensor, corrected_logits: Tensor, *, threshold: float | None = None) -> Verdict:
        self._maybe_fail("statistic", logits)
        label = logits.argmax(1)
        score = -lead(corrected_logits, label).double()
        return self._verdict(logits, corrected_logits, score, None, corrected_logits.argmax(1) != label)


class RealSuspicion(HandSuspicion):
    """`HandSuspicion` computed by a real guard on a real network: see `bna_artifact`."""

    def __init__(self, targets: Sequence[int] = (0,), **fail: float) -> None:
        super().__init__(targets, **fail)
        self._real = bna_artifact(*targets).guard()
        self.classes, self.fingerprint = self._real.classes, self._real.fingerprint
        self.method, self.threshold = self._real.method, self._real.threshold
        run = self._real.twin.corrected

        def corrected(frontier: tuple[Tensor, ...], network: int = 0, rows: Tensor | None = None) -> Tensor:
            values = frontier[0].mean((2, 3))
            self.enter_corrected(network, values if rows is None else values[rows])
            return run(frontier, network, rows)

        self._real.twin.corrected = corrected

    def suspects(self, logits: Tensor) -> Tensor:
        return self._real.suspects(logits)

    def shared(self, images: Tensor) -> Any:
        self.enter_original(images)
        return self._real.shared(images)

    def finish(self, shared: Any) -> Tensor:
        return self._real.finish(shared)

    def corrected(self, logits: Tensor, frontier: Any) -> Tensor:
        return self._real.corrected(logits, frontier)

    def verdict(self, logits: Tensor, corrected_logits: Tensor, *, threshold: float | None = None) -> Verdict:
        self._maybe_fail("statistic", logits)
        return self._real.verdict(logits, corrected_logits)


@cache
def bna_artifact(*targets: int) -> Artifact:
    """An artifact of the method bna without a fit: a network with `HandGuard`'s logits, one batch norm, and for each
    target a corrected copy whose batch norm lets at most CEILING of the target's channel through."""
    with torch.random.fork_rng():
        network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()).eval()
    with torch.no_grad():
        network[0].weight.copy_(10 * torch.eye(3)[:, :, None, None])
        network[0].bias.zero_()
        network[1].weight.fill_((1 + network[1].eps) ** 0.5)
    captured = capture(network, (3, 4, 4))
    (norm,) = captured.norms
    networks = []
    for target in targets:
        upper = torch.full((3,), 100.0)
        upper[target] = CEILING
        keep = (torch.zeros(3), torch.ones(3), -upper.new_full((3,), 100.0), upper)
        networks.append({norm.index: Renormalise(*keep, axis=norm.axis, ndim=norm.ndim)})
    rule = Disagreement(targets)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": "bna",
        "created_at": CREATED_AT,
        "fingerprint": captured.fingerprint(),
        "input": captured.spec.to_json(),
        "classes": list(HandGuard.classes),
        "settings": FitSettings().to_json(),
        **rule.to_manifest(),
        "fit": {"targets": {str(target): {} for target in targets}},
        "warnings": [],
        "versions": versions(),
    }
    return Artifact(captured, tuple(networks), rule, manifest)


def lead(logits: Tensor, label: Tensor) -> Tensor:
    """By how much each row's class ``label`` is ahead of the next."""
    own = nn.functional.one_hot(label, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def image(red: float, green: float, blue: float) -> np.ndarray:
    """One plain-coloured image, float32 [1, 3, 4, 4]."""
    return np.ones((1, 3, 4, 4), np.float32) * np.array([red, green, blue], np.float32)[None, :, None, None]


def serve(classifier, scenario):
    """Run ``scenario(classifier)`` between start and close."""

    async def main():
        await classifier.start()
        try:
            return await asyncio.wait_for(scenario(classifier), 10)
        finally:
            await classifier.close()

    return asyncio.run(main())


async def ask(classifier, images):
    with classifier.visit() as live:
        return await classifier.infer(images, live)


async def one_batch(classifier, *requests, first):
    """Tasks of requests that run as one batch: they gather behind ``first``, a request that is held, then answered."""
    classifier.guard.gate.clear()
    held = asyncio.create_task(ask(classifier, first))
    await asyncio.sleep(0.02)
    tasks = [asyncio.create_task(ask(classifier, images)) for images in requests]
    await asyncio.sleep(0.02)
    classifier.guard.gate.set()
    await held
    return tasks


async def ask_together(classifier, *requests):
    """The answers, or errors, to requests of one batch."""
    tasks = await one_batch(classifier, *requests, first=requests[0][:1] * 0)
    return await asyncio.gather(*tasks, return_exceptions=True)
