"""The served classifier without its server: both networks run here.

A batch takes three stages: original, corrected, statistic (`deployments.engine.passes`). A request none of whose images
needs a corrected network has its verdict after the first; the others wait for the rest, left out where nobody waits.
In observe mode every answer leaves after the first, and the others are gathered over several batches
(`deployments.engine.later`). Requests that fail together are run again one by one, so that one bad request fails alone;
where only the verdict fails, ``on_failure`` decides.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deployments import policy
from deployments.config import Live, ModelConfig
from deployments.engine.gatherer import Gatherer
from deployments.engine.later import Job, Later, Slot, joined
from deployments.engine.metrics import Metrics
from deployments.engine.passes import First, Guard, Passes
from deployments.engine.served import Judged, Served, drawn, rows_of
from deployments.errors import NoVerdict, PassFailed
from deployments.policy import Answer, Scored

log = logging.getLogger(__name__)

ENOUGH = 16  # images whose verdicts nobody waits for: a larger pass costs an image as much
PATIENCE_S = 0.25  # and how long they are waited for; the watch looks every two seconds


class Classifier(Served[Job, Scored]):
    """Answers requests with both networks of its guard."""

    def __init__(self, guard: Guard, config: ModelConfig, metrics: Metrics) -> None:
        super().__init__(guard, config, metrics)
        limit = config.max_batch_size
        self._behind: Counter[Passes] = Counter()  # batches whose verdicts are still to come
        self._later: Gatherer[Later] = Gatherer(
            self._run_later, enough=min(limit, ENOUGH), patience_s=PATIENCE_S, capacity=2 * max(limit, ENOUGH)
        )

    async def infer(self, images: NDArray[np.float32], live: Live, headers: Mapping[str, str] | None = None) -> Answer:
        """See `Served`."""
        job = Job(images, live, drawn(live), headers)
        return policy.decide(await self._batcher.submit(job, len(images)), live)

    def _passes_of(self, guard: Guard, version: str) -> Passes:
        return Passes(
            guard, self.metrics, self.config.corrected_deadline_s, threads=threads(self.config), version=version
        )

    async def _finish(self) -> None:
        await self._later.close()

    def _close_retired(self) -> None:
        held = [passes for passes in self._retired if self._behind[passes]]  # verdicts come from what answered
        self._retired = [passes for passes in self._retired if not self._behind[passes]]
        super()._close_retired()
        self._retired = held

    async def _run(self, passes: Passes, slots: Sequence[Slot], *, again: bool = False) -> None:
        """One batch. again: it failed in a larger one, and is run to its end at once."""
        images = np.concatenate([slot.item.images for slot in slots])
        self.metrics.batch_size().observe(len(images))
        alone = len(slots) == 1
        judged = [slot for slot in slots if slot.item.judged]
        later = not again and all(slot.item.live.mode == "observe" for slot in judged)
        try:
            first = await passes.original(images, guarded=bool(judged) and not later)
        except Exception as error:
            await self._recover(passes, "original", error, dict.fromkeys(slots), alone)
            return
        waiting: dict[Slot, slice] = {}
        settled: dict[Slot, Scored] = {}
        for slot, rows in zip(slots, rows_of(slots), strict=True):
            scored = first.scored(rows)
            if not slot.item.judged:
                self._skip(slot, scored)
            elif scored.evidence is not None:
                settled[slot] = scored
            else:
                waiting[slot] = rows
                if slot.item.live.mode == "observe":
                    slot.resolve(scored)
        self._settle(passes, settled)
        if waiting and later:
            later_on = Later(passes, first, waiting).narrowed()
            self._behind[passes] += 1
            await self._later.put(later_on, len(later_on.first.label))
        elif waiting:
            await self._run_corrected(passes, first, waiting, alone)

    async def _run_later(self, entries: Sequence[Later]) -> None:
        """The second halves of batches, as many together as may run at once. Nobody waits: they have no deadline."""
        try:
            groups = list(joined(entries, self.config.max_batch_size))
        except Exception:
            log.exception("gathered batches could not be joined; each runs alone")
            groups = list(entries)
        try:
            for entry in groups:
                try:
                    await self._run_corrected(
                        entry.passes, entry.first, entry.waiting, len(entry.waiting) == 1, hurried=False
                    )
                except Exception:
                    log.exception("the verdicts of %d requests are lost", len(entry.waiting))
        finally:
            self._behind.subtract(entry.passes for entry in entries)
            self._behind += Counter()  # without those at zero

    async def _run_corrected(
        self, passes: Passes, first: First, waiting: Mapping[Slot, slice], alone: bool, *, hurried: bool = True
    ) -> None:
        """The second half of a batch, for the requests that wait for it; each with its rows. alone: there are no
        others in it. hurried: by the deadline."""
        stage = "corrected"
        try:
            corrected = await passes.corrected(first, hurried=hurried)
            stage = "statistic"
            thresholds = {slot.item.live.threshold for slot in waiting}
            evidence = {one: passes.statistic(first.logits, corrected, one) for one in thresholds}
        except Exception as error:
            if not alone and not isinstance(error, TimeoutError) and first.joinable:
                for slot, rows in waiting.items():
                    part = first.take(np.arange(rows.start, rows.stop))
                    await self._run_corrected(passes, part, {slot: slice(0, slot.size)}, True, hurried=hurried)
                return
            known = {slot: first.scored(rows) for slot, rows in waiting.items()}
            await self._recover(passes, stage, error, known, alone)
            return
        self._settle(
            passes,
            {
                slot: first.scored(rows)._replace(evidence=evidence[slot.item.live.threshold].rows(rows))
                for slot, rows in waiting.items()
            },
        )

    async def _recover(
        self, passes: Passes, stage: str, error: Exception, known: Mapping[Slot, Scored | None], alone: bool
    ) -> None:
        """A stage failed on these requests, with what is known of each: run them one by one, or fail the only one."""
        if not alone and not isinstance(error, TimeoutError):
            for slot in known:
                await self._run(passes, [slot], again=True)
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

    def _settle(self, passes: Passes, verdicts: Mapping[Slot, Scored]) -> None:
        """Count the verdicts of some requests and answer them."""
        judged = [
            Judged(slot.item.live, slot.item.images, scored, scored.evidence, slot.item.headers)
            for slot, scored in verdicts.items()
            if not slot.abandoned and scored.evidence is not None
        ]
        self._count_verdicts(judged, passes.guard)
        for slot, scored in verdicts.items():
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
