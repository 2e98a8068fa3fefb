"""The served classifier without its server: both networks run here.

A batch takes three stages: original, corrected, statistic (`deployments.engine.passes`). A request none of whose images
needs a corrected network has its verdict after the first; the others wait for the rest, left out where nobody waits.
In observe mode every answer leaves after the first. Requests that fail together are run again one by one, so that one
bad request fails alone; where only the verdict fails, ``on_failure`` decides.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments import policy
from deployments.config import Live, ModelConfig
from deployments.engine.batcher import Ticket
from deployments.engine.passes import First, Guard, Passes
from deployments.engine.served import Served, drawn, rows_of
from deployments.errors import NoVerdict, PassFailed
from deployments.policy import Answer, Scored

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One request in the queue: images float32 [n, C, H, W], the settings that it came under, whether it gets a
    verdict, and its headers."""

    images: NDArray[np.float32]
    live: Live
    judged: bool
    headers: Mapping[str, str] | None = None


Slot = Ticket[Job, Scored]


class Classifier(Served[Job, Scored]):
    """Answers requests with both networks of its guard."""

    async def infer(self, images: NDArray[np.float32], live: Live, headers: Mapping[str, str] | None = None) -> Answer:
        """See `Served`."""
        job = Job(images, live, drawn(live), headers)
        return policy.decide(await self._batcher.submit(job, len(images)), live)

    def _passes_of(self, guard: Guard, version: str) -> Passes:
        return Passes(
            guard, self.metrics, self.config.corrected_deadline_s, threads=threads(self.config), version=version
        )

    async def _run(self, passes: Passes, slots: Sequence[Slot]) -> None:
        images = np.concatenate([slot.item.images for slot in slots])
        self.metrics.batch_size().observe(len(images))
        alone = len(slots) == 1
        try:
            first = await passes.original(images, guarded=any(slot.item.judged for slot in slots))
        except Exception as error:
            await self._recover(passes, "original", error, dict.fromkeys(slots), alone)
            return
        waiting: dict[Slot, slice] = {}
        for slot, rows in zip(slots, rows_of(slots), strict=True):
            scored = first.scored(rows)
            if not slot.item.judged:
                self._skip(slot, scored)
            elif scored.evidence is not None:
                self._settle(passes, slot, scored)
            else:
                waiting[slot] = rows
                if slot.item.live.mode == "observe":
                    slot.resolve(scored)
        if waiting:
            await self._run_corrected(passes, first, waiting, alone)

    async def _run_corrected(self, passes: Passes, first: First, waiting: Mapping[Slot, slice], alone: bool) -> None:
        """The second half of a batch, for the requests that wait for it; each with its rows. alone: there are no
        others in it."""
        stage = "corrected"
        try:
            corrected = await passes.corrected(first)
            stage = "statistic"
            thresholds = {slot.item.live.threshold for slot in waiting}
            evidence = {one: passes.statistic(first.logits, corrected, one) for one in thresholds}
        except Exception as error:
            known = {slot: first.scored(rows) for slot, rows in waiting.items()}
            await self._recover(passes, stage, error, known, alone)
            return
        for slot, rows in waiting.items():
            found = evidence[slot.item.live.threshold].rows(rows)
            self._settle(passes, slot, first.scored(rows)._replace(evidence=found))

    async def _recover(
        self, passes: Passes, stage: str, error: Exception, known: Mapping[Slot, Scored | None], alone: bool
    ) -> None:
        """A stage failed on these requests, with what is known of each: run them one by one, or fail the only one."""
        if not alone and not isinstance(error, TimeoutError):
            for slot in known:
                await self._run(passes, [slot])
            return
        log.warning("the %s stage failed on %d images", stage, sum(slot.size for slot in known), exc_info=error)
        for slot, scored in known.items():
            if not slot.abandoned:
                self._fail(slot, stage, scored)

    def _skip(self, slot: Slot, scored: Scored) -> None:
        """Answer a request that the sample left out; without a verdict it counts as skipped."""
        if not slot.abandoned:
            self._count_skipped(slot.item.live, slot.size)
            slot.resolve(scored)

    def _settle(self, passes: Passes, slot: Slot, scored: Scored) -> None:
        """Count the verdict of one request and answer it."""
        if not slot.abandoned:
            job = slot.item
            self._count_verdict(job.live, scored, job.images, job.headers, passes.guard)
            slot.resolve(scored)

    def _fail(self, slot: Slot, stage: str, scored: Scored | None) -> None:
        """Count the failure of one request; answer it unguarded, or refuse it."""
        if scored is None:
            self._count_failure(slot.size, stage, "closed")
            slot.fail(PassFailed("the classifier failed on this request: its log has the reason"))
            return
        try:
            slot.resolve(self._without_verdict(slot.item.live, scored, stage))
        except NoVerdict as refusal:
            slot.fail(refusal)


def threads(config: ModelConfig) -> int:
    """How many threads a model's networks run in; one where both would share a GPU."""
    if config.threads != "auto":
        return config.threads
    return 2 if config.device == "cpu" and len(os.sched_getaffinity(0)) > 1 else 1
