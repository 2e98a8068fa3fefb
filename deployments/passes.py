"""The networks' three stages, each timed, in the one thread that owns them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deployments.metrics import Metrics
from deployments.policy import Evidence, Scored
from guard.types import InputSpec, Verdict

T = TypeVar("T")


class Router(Protocol):
    """Of a guard's rule what a warm-up needs: for decisions [B] the corrected network of each, or −1: none."""

    def route(self, label: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Guard(Protocol):
    """What is served: ``guard.Guard``, or anything with its three stages, on the CPU."""

    spec: InputSpec
    classes: tuple[str, ...]
    method: str
    threshold: float | None
    fingerprint: str
    created_at: str

    @property
    def rule(self) -> Router: ...

    def original(self, images: Tensor) -> tuple[Tensor, Any]: ...
    def suspects(self, logits: Tensor) -> Tensor: ...
    def corrected(self, logits: Tensor, frontier: Any) -> Tensor: ...
    def verdict(self, logits: Tensor, corrected_logits: Tensor) -> Verdict: ...


class First(NamedTuple):
    """What is known of n images once the original network has run.

    logits: float32 [n, K]. label: int64 [n], its decisions. suspect: bool [n], whose verdict needs a corrected network.
    evidence: the verdict on the others, meaningless for suspects; None where there are no others.
    frontier: what the corrected networks read.
    """

    logits: NDArray[np.float32]
    label: NDArray[np.int64]
    suspect: NDArray[np.bool_]
    evidence: Evidence | None
    frontier: Any

    def scored(self, rows: slice) -> Scored:
        """The part of one request: with its evidence if none of its images is a suspect."""
        evidence = None if self.suspect[rows].any() else self.evidence
        return Scored(self.logits[rows], self.label[rows], None if evidence is None else evidence.rows(rows))


class Passes:
    """Runs the stages of ``guard`` off the event loop, one after the other.

    Args:
        guard: all networks. metrics: where the stages are timed. corrected_deadline_s: a corrected pass that
            takes longer raises TimeoutError; it still ends before the next one starts.
    """

    def __init__(self, guard: Guard, metrics: Metrics, corrected_deadline_s: float | None) -> None:
        self._guard = guard
        self._metrics = metrics
        self._deadline_s = corrected_deadline_s
        self._thread = ThreadPoolExecutor(1, "guard", initializer=torch.set_num_threads, initargs=(1,))

    async def warm_up(self, *sizes: int) -> None:
        """Run black images of each batch size through every network, untimed: the first pass of a shape is slow."""
        for size in sizes:
            await self._in_thread(self._warm_up, size)

    async def original(self, images: NDArray[np.float32]) -> First:
        """images: [n, C, H, W] in [0, 1]."""
        with self._metrics.stage("original"):
            return await self._in_thread(self._original, images)

    async def corrected(self, first: First) -> Tensor:
        """Logits [n, K] of the corrected network that each suspect needs; the original's for the others."""
        with self._metrics.stage("corrected"):
            return await asyncio.wait_for(self._in_thread(self._corrected, first), self._deadline_s)

    async def statistic(self, first: First, corrected_logits: Tensor) -> Evidence:
        """Score, p-value, flag and decision."""
        with self._metrics.stage("statistic"):
            return await self._in_thread(self._evidence, torch.from_numpy(first.logits), corrected_logits)

    def close(self) -> None:
        """Free the thread."""
        self._thread.shutdown(wait=False)

    def _original(self, images: NDArray[np.float32]) -> First:
        logits, frontier = self._guard.original(torch.from_numpy(images))
        suspect = self._guard.suspects(logits).numpy()
        evidence = None
        if not suspect.all():
            with suppress(Exception):  # then all wait for the statistic stage, which fails under its own name
                evidence = self._evidence(logits, logits)
        return First(logits.numpy(), logits.argmax(1).numpy(), suspect, evidence, frontier)

    def _corrected(self, first: First) -> Tensor:
        return self._guard.corrected(torch.from_numpy(first.logits), first.frontier)

    def _evidence(self, logits: Tensor, corrected_logits: Tensor) -> Evidence:
        verdict = self._guard.verdict(logits, corrected_logits)
        return Evidence(
            verdict.corrected_logits.numpy(),
            verdict.corrected_label.numpy(),
            verdict.score.numpy(),
            None if verdict.p_value is None else verdict.p_value.numpy(),
            verdict.flagged.numpy(),
        )

    def _warm_up(self, size: int) -> None:
        """Whatever black images are decided as, each corrected network gets all of them once, by made-up logits."""
        first = self._original(np.zeros((size, *self._guard.spec.shape), np.float32))
        logits = torch.eye(len(self._guard.classes))
        routes = self._guard.rule.route(np.arange(len(logits))).tolist()
        for network in set(routes) - {-1}:
            decided = logits[routes.index(network)].repeat(size, 1)
            self._evidence(decided, self._guard.corrected(decided, first.frontier))

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
