"""The networks' three stages, each timed, in the one thread that owns them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deployments.metrics import Metrics
from deployments.policy import Evidence
from guard.types import InputSpec, Verdict

T = TypeVar("T")


class Guard(Protocol):
    """What is served: ``guard.Guard``, or anything with its three stages."""

    spec: InputSpec
    classes: tuple[str, ...]
    method: str
    threshold: float
    fingerprint: str
    created_at: str

    def original(self, images: Tensor) -> tuple[Tensor, Any]: ...
    def corrected(self, frontier: Any) -> Tensor: ...
    def verdict(self, logits: Tensor, corrected_logits: Tensor) -> Verdict: ...


class First(NamedTuple):
    """What the original network gives: logits float32 [n, K], decisions int64 [n], and what the corrected one reads."""

    logits: NDArray[np.float32]
    label: NDArray[np.int64]
    frontier: Any


class Passes:
    """Runs the stages of ``guard`` off the event loop, one after the other.

    Args:
        guard: both networks. metrics: where the stages are timed. corrected_deadline_s: a corrected network that
            takes longer raises TimeoutError; its pass still ends before the next one starts.
    """

    def __init__(self, guard: Guard, metrics: Metrics, corrected_deadline_s: float | None) -> None:
        self._guard = guard
        self._metrics = metrics
        self._deadline_s = corrected_deadline_s
        self._thread = ThreadPoolExecutor(1, "guard", initializer=torch.set_num_threads, initargs=(1,))

    async def warm_up(self, *sizes: int) -> None:
        """Run black images of each batch size, untimed: the first pass of a shape is slow."""
        for size in sizes:
            first = await self._in_thread(self._original, np.zeros((size, *self._guard.spec.shape), np.float32))
            corrected = await self._in_thread(self._guard.corrected, first.frontier)
            await self._in_thread(self._statistic, first.logits, corrected)

    async def original(self, images: NDArray[np.float32]) -> First:
        """images: [n, C, H, W] in [0, 1]."""
        with self._metrics.stage("original"):
            return await self._in_thread(self._original, images)

    async def corrected(self, frontier: Any) -> Tensor:
        """Logits [n, K] of the corrected network."""
        with self._metrics.stage("corrected"):
            return await asyncio.wait_for(self._in_thread(self._guard.corrected, frontier), self._deadline_s)

    async def statistic(self, logits: NDArray[np.float32], corrected_logits: Tensor) -> Evidence:
        """Score, p-value, flag and decision."""
        with self._metrics.stage("statistic"):
            return await self._in_thread(self._statistic, logits, corrected_logits)

    def close(self) -> None:
        """Free the thread."""
        self._thread.shutdown(wait=False)

    def _original(self, images: NDArray[np.float32]) -> First:
        logits, frontier = self._guard.original(torch.from_numpy(images))
        return First(logits.float().cpu().numpy(), logits.argmax(1).cpu().numpy(), frontier)

    def _statistic(self, logits: NDArray[np.float32], corrected_logits: Tensor) -> Evidence:
        verdict = self._guard.verdict(torch.from_numpy(logits), corrected_logits.float().cpu())
        return Evidence(
            verdict.corrected_logits.cpu().numpy(),
            verdict.corrected_label.cpu().numpy(),
            verdict.score.cpu().numpy(),
            verdict.p_value.cpu().numpy(),
            verdict.flagged.cpu().numpy(),
        )

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
