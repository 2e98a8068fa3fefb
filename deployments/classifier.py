"""The served classifier without its server: guard, queue, policy and metrics in one object.

A batch takes three stages: original, corrected, statistic (`deployments.passes`). A request none of whose images needs
a corrected network has its verdict after the first; the others wait for the rest, which is left out where nobody waits.
In observe mode every answer leaves after the first. Requests that fail together are run again one by one, so that one
bad request fails alone; where only the verdict fails, ``on_failure`` decides.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments import policy
from deployments.batcher import Batcher, Ticket
from deployments.bodies import Model
from deployments.config import Live, ModelConfig, checked
from deployments.errors import NoVerdict, PassFailed
from deployments.metrics import Metrics
from deployments.passes import First, Guard, Passes
from deployments.policy import Answer, Scored
from guard.errors import BadArtifact, BadSetting

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One request in the queue: images float32 [n, C, H, W], and the settings that it came under."""

    images: NDArray[np.float32]
    live: Live


Slot = Ticket[Job, Scored]


class Classifier:
    """Answers requests with the guard. ``start`` before the first, ``close`` after the last.

    Args:
        guard: all networks. config: names, limits and the settings at start. metrics: where everything is counted.
    """

    def __init__(self, guard: Guard, config: ModelConfig, metrics: Metrics) -> None:
        self.config = config
        self.live = config.live
        self.metrics = metrics
        self._retired: list[Passes] = []
        self._take(self._passes_of(guard), config.version)
        self._batcher: Batcher[Job, Scored] = Batcher(
            self._process, limit=config.max_batch_size, capacity=config.limits.queued_images
        )

    async def start(self) -> None:
        """Warm up with the smallest and the largest batch, then accept requests."""
        await self._passes.warm_up(1, self.config.max_batch_size)
        self._batcher.start()

    async def close(self) -> None:
        """Refuse new requests, answer those that wait, free the threads."""
        await self._batcher.close()
        for passes in (*self._retired, self._passes):
            passes.close()

    async def replace(self, guard: Guard, version: str) -> None:
        """Put another artifact in place of the one that serves, once it is warm; no request waits for it.

        Raises:
            BadArtifact: it takes other images or knows other classes.
        """
        for what, served, given in (
            ("input", self.guard.spec.shape, guard.spec.shape),
            ("classes", self.guard.classes, guard.classes),
        ):
            if served != given:
                raise BadArtifact(
                    f"{what}: {self.config.name} serves {served}, the new artifact has {given}: serve "
                    "another model under another name",
                    field=what,
                )
        passes = self._passes_of(guard)
        await passes.warm_up(1, self.config.max_batch_size)
        self._retired.append(self._passes)
        self._take(passes, version)

    def _passes_of(self, guard: Guard) -> Passes:
        return Passes(guard, self.metrics, self.config.corrected_deadline_s, threads=threads(self.config))

    def _take(self, passes: Passes, version: str) -> None:
        guard = passes.guard
        self._passes, self.guard = passes, guard
        self.model = Model(self.config.name, version, guard.spec, guard.classes)
        self.metrics.artifact(
            method=guard.method,
            fingerprint=guard.fingerprint,
            version=version,
            threshold=guard.threshold,
            created_at=guard.created_at,
        )

    def facts(self) -> dict[str, Any]:
        """What the metadata tells of the artifact and of the settings in force."""
        facts = {
            "guard_mode": self.live.mode,
            "guard_method": self.guard.method,
            "guard_threshold": self.live.threshold or self.guard.threshold,
            "guard_fingerprint": self.guard.fingerprint,
            "guard_created_at": self.guard.created_at,
        }
        return {name: fact for name, fact in facts.items() if fact is not None}

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
        while self._retired:  # no batch of theirs is under way: batches run one after the other
            self._retired.pop().close()
        started = time.perf_counter()
        for slot in slots:
            self.metrics.stage_seconds("queue").observe(max(0.0, started - slot.since))
        await self._run(self._passes, slots)

    async def _run(self, passes: Passes, slots: Sequence[Slot]) -> None:
        images = np.concatenate([slot.item.images for slot in slots])
        self.metrics.batch_size.observe(len(images))
        judged = {slot: _judged(slot.item.live) for slot in slots}
        try:
            first = await passes.original(images, guarded=any(judged.values()))
        except Exception as error:
            await self._recover(passes, "original", error, dict.fromkeys(slots))
            return
        waiting: dict[Slot, slice] = {}
        for slot, rows in zip(slots, _rows(slots), strict=True):
            scored = first.scored(rows)
            if not judged[slot]:
                self._skip(slot, scored)
            elif scored.evidence is not None:
                self._settle(slot, scored)
            else:
                waiting[slot] = rows
                if slot.item.live.mode == "observe":
                    slot.resolve(scored)
        if waiting:
            await self._run_corrected(passes, first, waiting)

    async def _run_corrected(self, passes: Passes, first: First, waiting: Mapping[Slot, slice]) -> None:
        """The second half of a batch, for the requests that wait for it; each with its rows."""
        stage = "corrected"
        try:
            corrected = await passes.corrected(first)
            stage = "statistic"
            thresholds = {slot.item.live.threshold for slot in waiting}
            evidence = {one: passes.statistic(first, corrected, one) for one in thresholds}
        except Exception as error:
            known = {slot: first.scored(rows) for slot, rows in waiting.items()}
            await self._recover(passes, stage, error, known)
            return
        for slot, rows in waiting.items():
            found = evidence[slot.item.live.threshold].rows(rows)
            self._settle(slot, first.scored(rows)._replace(evidence=found))

    async def _recover(self, passes: Passes, stage: str, error: Exception, known: Mapping[Slot, Scored | None]) -> None:
        """A stage failed on these requests, with what is known of each: run them one by one, or fail the only one."""
        if len(known) > 1 and not isinstance(error, TimeoutError):
            for slot in known:
                await self._run(passes, [slot])
            return
        log.warning("the %s stage failed on %d images", stage, sum(slot.size for slot in known), exc_info=error)
        for slot, scored in known.items():
            self._fail(slot, stage, scored)

    def _skip(self, slot: Slot, scored: Scored) -> None:
        """Answer a request that the sample left out; without a verdict it counts as skipped."""
        if not slot.abandoned:
            self.metrics.requests(slot.item.live.mode, "skipped").inc()
            self.metrics.inputs("skipped").inc(slot.size)
            slot.resolve(scored)

    def _settle(self, slot: Slot, scored: Scored) -> None:
        """Count the verdict of one request and answer it."""
        mode, evidence = slot.item.live.mode, scored.evidence
        if slot.abandoned or evidence is None:
            return
        flagged = int(evidence.flagged.sum())
        self.metrics.requests(mode, "flagged" if flagged else "clean").inc()
        self.metrics.verdicts(scored.label, evidence.flagged)
        self.metrics.statistics(evidence.score, evidence.p_value)
        if mode == "reject":
            self.metrics.rejected().inc(flagged)
        elif mode == "correct":
            self.metrics.corrected().inc(flagged)
        slot.resolve(scored)

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


def threads(config: ModelConfig) -> int:
    """How many threads a model's networks run in; one where both would share a GPU."""
    if config.threads != "auto":
        return config.threads
    return 2 if config.device == "cpu" and len(os.sched_getaffinity(0)) > 1 else 1


def _judged(live: Live) -> bool:
    """Whether a request gets a verdict; the sample of mode observe is drawn here."""
    return live.sample == 1 or random.random() < live.sample


def _rows(slots: Sequence[Slot]) -> list[slice]:
    """Where each request's images lie in the batch."""
    ends = np.cumsum([slot.size for slot in slots]).tolist()
    return [slice(end - slot.size, end) for end, slot in zip(ends, slots, strict=True)]
