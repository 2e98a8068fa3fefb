"""The served classifier without its server: guard, queue, policy and metrics in one object.

A batch takes three stages, each in the one thread that owns the networks: original, corrected, statistic. In observe
mode the answer leaves after the first. A batch that fails is run again request by request, so that one bad request
fails alone; where only the verdict fails, ``on_failure`` decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments import policy
from deployments.batcher import Batcher, Ticket
from deployments.bodies import Model
from deployments.config import Live, ServeConfig, checked
from deployments.errors import NoVerdict, PassFailed
from deployments.metrics import Metrics
from deployments.passes import Guard, Passes
from deployments.policy import Answer, Evidence, Scored
from guard.errors import BadSetting

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One request in the queue: images float32 [n, C, H, W], and the settings that it came under."""

    images: NDArray[np.float32]
    live: Live


Slot = Ticket[Job, Scored]


class Classifier:
    """Answers requests with the guard. ``start`` before the first, ``close`` after the last.

    Args:
        guard: both networks. config: names, limits and the settings at start. metrics: where everything is counted.
    """

    def __init__(self, guard: Guard, config: ServeConfig, metrics: Metrics) -> None:
        self.config = config
        self.live = config.live
        self.metrics = metrics
        self.guard = guard
        self.model = Model(config.name, config.version, guard.spec, guard.classes)
        self._passes = Passes(guard, metrics, config.corrected_deadline_s)
        self._batcher: Batcher[Job, Scored] = Batcher(
            self._process, limit=config.max_batch_size, capacity=config.limits.queued_images
        )
        metrics.artifact(
            method=guard.method,
            fingerprint=guard.fingerprint,
            version=config.version,
            threshold=guard.threshold,
            created_at=guard.created_at,
        )

    async def start(self) -> None:
        """Warm up with the smallest and the largest batch, then accept requests."""
        await self._passes.warm_up(1, self.config.max_batch_size)
        self._batcher.start()

    async def close(self) -> None:
        """Refuse new requests, answer those that wait, free the thread."""
        await self._batcher.close()
        self._passes.close()

    def facts(self) -> dict[str, Any]:
        """What the metadata tells of the artifact and of the settings in force."""
        return {
            "guard_mode": self.live.mode,
            "guard_method": self.guard.method,
            "guard_threshold": self.guard.threshold,
            "guard_fingerprint": self.guard.fingerprint,
            "guard_created_at": self.guard.created_at,
        }

    @property
    def ready(self) -> bool:
        return self._batcher.alive

    def check(self) -> None:
        """Raise if no request can be answered any more."""
        if not self._batcher.alive:
            raise RuntimeError("the worker of the queue has ended")
        since = self._batcher.busy_since
        if since is not None and time.perf_counter() - since > self.config.stuck_after_s:
            raise RuntimeError(f"a batch has been running for more than {self.config.stuck_after_s} s")

    def switch(self, values: dict[str, Any]) -> None:
        """Take new live settings. Settings that do not check are logged, and those in force stay."""
        try:
            self.live = checked(Live, values)
        except BadSetting as error:
            log.error("the settings stay as they were: %s", error)

    @contextmanager
    def visit(self) -> Iterator[Live]:
        """One request: the settings that it keeps. That it failed, in whatever way, is counted."""
        live = self.live
        try:
            yield live
        except BaseException:
            self.metrics.requests(live.mode, "error").inc()
            raise

    async def infer(self, images: NDArray[np.float32], live: Live) -> Answer:
        """The answer for images [n, C, H, W] in [0, 1], checked before, under the settings ``live``."""
        return policy.decide(await self._batcher.submit(Job(images, live), len(images)), live)

    async def _process(self, slots: Sequence[Slot]) -> None:
        """Run one batch and answer its requests."""
        started = time.perf_counter()
        for slot in slots:
            self.metrics.stage_seconds("queue").observe(max(0.0, started - slot.since))
        await self._run(slots)

    async def _run(self, slots: Sequence[Slot]) -> None:
        images = np.concatenate([slot.item.images for slot in slots])
        self.metrics.batch_size.observe(len(images))
        rows = _rows(slots)
        stage = "original"
        answers: list[Scored] = []
        try:
            first = await self._passes.original(images)
            answers = [Scored(first.logits[row], first.label[row], None) for row in rows]
            for slot, scored in zip(slots, answers, strict=True):
                if slot.item.live.mode == "observe":
                    slot.resolve(scored)
            stage = "corrected"
            corrected = await self._passes.corrected(first.frontier)
            stage = "statistic"
            evidence = await self._passes.statistic(first.logits, corrected)
        except Exception as error:
            if len(slots) > 1 and not isinstance(error, TimeoutError):
                for slot in slots:
                    await self._run([slot])
                return
            log.warning("the %s stage failed on %d images", stage, len(images), exc_info=error)
            for i, slot in enumerate(slots):
                self._fail(slot, stage, answers[i] if answers else None)
            return
        for slot, row, scored in zip(slots, rows, answers, strict=True):
            self._settle(slot, scored, evidence.rows(row))

    def _settle(self, slot: Slot, scored: Scored, evidence: Evidence) -> None:
        """Count the verdict of one request and answer it."""
        mode = slot.item.live.mode
        if slot.abandoned:
            return
        flagged = int(evidence.flagged.sum())
        self.metrics.requests(mode, "flagged" if flagged else "clean").inc()
        self.metrics.verdicts(scored.label, evidence.flagged)
        self.metrics.statistics(evidence.score, evidence.p_value)
        if mode == "reject":
            self.metrics.rejected().inc(flagged)
        elif mode == "correct":
            self.metrics.corrected().inc(flagged)
        slot.resolve(scored._replace(evidence=evidence))

    def _fail(self, slot: Slot, stage: str, first: Scored | None) -> None:
        """Count the failure of one request; answer it unguarded, or refuse it."""
        live = slot.item.live
        if slot.abandoned:
            return
        self.metrics.inputs("error").inc(slot.size)
        answers = first is not None and (live.on_failure == "open" or live.mode == "observe")
        self.metrics.failures(stage, "open" if answers else "closed").inc()
        if first is None:
            slot.fail(PassFailed("the classifier failed on this request: its log has the reason"))
        elif answers:
            self.metrics.requests(live.mode, "error").inc()
            slot.resolve(first)
        else:
            slot.fail(
                NoVerdict(f"no verdict: the {stage} stage failed or was late, and this server refuses without one")
            )


def _rows(slots: Sequence[Slot]) -> list[slice]:
    """Where each request's images lie in the batch."""
    ends = np.cumsum([slot.size for slot in slots]).tolist()
    return [slice(end - slot.size, end) for end, slot in zip(ends, slots, strict=True)]
