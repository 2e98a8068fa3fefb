"""A classifier whose original network runs elsewhere: on another server, or in a deployment of the user's own.

Where every image takes the corrected network (`Guard.eager`), the original's logits are asked for while it runs, and
both are joined request by request, so that a slow answer holds nobody else. Otherwise the logits come first, and only
suspects take a corrected network. In observe mode the answer leaves with the logits, and the verdict follows into the
metrics; its queue bounds how many follow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deployments import policy
from deployments.config import Live, ModelConfig
from deployments.engine.batcher import Ticket
from deployments.engine.comparison import UpstreamMismatch, compare
from deployments.engine.metrics import Metrics
from deployments.engine.passes import Guard, Passes
from deployments.engine.served import Judged, Served, drawn, rows_of
from deployments.errors import QueueFull, ShuttingDown, Unavailable, UpstreamFailed
from deployments.originals.original import Original
from deployments.policy import Answer, Scored
from guard.errors import BadArtifact

WATCH_S = 5.0
log = logging.getLogger(__name__)


class Half(NamedTuple):
    """Images in the queue, float32 [n, C, H, W], and the original's logits of them [n, K], if they are known."""

    images: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class Corrected(NamedTuple):
    """The corrected network's logits [n, K], and the passes that gave them: an artifact may be replaced meanwhile."""

    logits: Tensor
    passes: Passes


class Lost(NamedTuple):
    """The corrected branch has no answer. stage: what failed."""

    stage: str
    error: Exception


class Wrapped(Served[Half, Corrected]):
    """Answers requests with the logits of ``original`` and the corrected network of its guard.

    Args:
        guard, config, metrics: see `Served`. original: gives the logits. tolerance: compare it with the guard's own
            original before the first request, and whenever it comes back (None: never); see
            `deployments.engine.comparison`.
        watch_s: between two looks at whether it is ready.
    """

    def __init__(
        self,
        guard: Guard,
        config: ModelConfig,
        metrics: Metrics,
        original: Original,
        *,
        tolerance: float | None = None,
        watch_s: float = WATCH_S,
    ) -> None:
        super().__init__(guard, config, metrics)
        self._original = original
        self._tolerance = tolerance
        self._watch_s = watch_s
        self._watcher: asyncio.Task[None] | None = None
        self._verdicts: set[asyncio.Task[None]] = set()
        self._problem: Exception | None = UpstreamFailed("upstream: nobody has looked at it yet")
        self._trusted = tolerance is None

    async def start(self) -> None:
        """Prepare, look at the original for the first time, accept requests. One that cannot be reached is looked for
        again and again; until it is found, the model is not ready.

        Raises:
            UpstreamMismatch: it is reached, and it is another network.
        """
        await super().start()
        await self._look()
        if isinstance(self._problem, UpstreamMismatch):
            await self.close()
            raise self._problem
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """See `Served`."""
        if self._watcher is not None:
            self._watcher.cancel()
        await super().close()
        await self._original.close()

    async def _finish(self) -> None:
        """Verdicts that follow their answers."""
        await asyncio.gather(*self._verdicts)

    @property
    def ready(self) -> bool:
        return super().ready and self._problem is None

    async def infer(self, images: NDArray[np.float32], live: Live, headers: Mapping[str, str] | None = None) -> Answer:
        """See `Served`; the original gets the headers."""
        headers = {} if headers is None else headers
        judged = drawn(live)
        if judged and live.mode != "observe" and self.guard.eager:
            return policy.decide(await self._beside(images, live, headers), live)
        scored = await self._ask(images, headers)
        if not judged:
            self._count_skipped(live, len(images))
        elif live.mode == "observe":
            self._follow(images, live, scored, headers)
        else:
            scored = self._judge(live, scored, images, headers, await self._suspects(images, scored.logits))
        return policy.decide(scored, live)

    async def _beside(self, images: NDArray[np.float32], live: Live, headers: Mapping[str, str]) -> Scored:
        """Both networks at the same time. Without the original's answer nobody waits for the other's."""
        branch = asyncio.create_task(self._branch(images, None))
        try:
            scored = await self._ask(images, headers)
            return self._judge(live, scored, images, headers, await branch)
        finally:
            branch.cancel()

    async def _ask(self, images: NDArray[np.float32], headers: Mapping[str, str]) -> Scored:
        """The original's answer; that there is none is counted."""
        try:
            if not self._trusted:
                raise UpstreamFailed(
                    "upstream: it cannot be reached, or is not the network that this guard was fitted for: the guard's "
                    "log has the reason"
                )
            with self.metrics.stage("upstream"):
                logits = await self._original.logits(images, headers)
        except Exception:
            self._count_failure(len(images), "upstream", "closed")
            raise
        return Scored(logits, logits.argmax(1), None, self.model.version)

    async def _suspects(self, images: NDArray[np.float32], logits: NDArray[np.float32]) -> Corrected | Lost:
        """The corrected networks of those images that need one; the original's logits of the others."""
        whole = torch.from_numpy(logits)
        while True:
            passes = self._passes
            suspect = passes.guard.suspects(whole)
            if not suspect.any():
                return Corrected(whole, passes)
            rows = suspect.numpy()
            branch = await self._branch(images[rows], logits[rows])
            if isinstance(branch, Lost):
                return branch
            if branch.passes is passes:  # else another artifact took over, which has other suspects
                answer = whole.clone()
                answer[suspect] = branch.logits
                return Corrected(answer, passes)

    async def _branch(self, images: NDArray[np.float32], logits: NDArray[np.float32] | None) -> Corrected | Lost:
        """The corrected branch of one request; never raises, for it may have nobody who listens."""
        try:
            return await self._batcher.submit(Half(images, logits), len(images))
        except (QueueFull, ShuttingDown) as error:
            return Lost("queue", error)
        except Exception as error:
            return Lost("corrected", error)

    def _follow(self, images: NDArray[np.float32], live: Live, scored: Scored, headers: Mapping[str, str]) -> None:
        """Find the verdict after the answer; there are no more of these than the queue holds."""

        async def verdict() -> None:
            self._judge(live, scored, images, headers, await self._suspects(images, scored.logits))

        task = asyncio.create_task(verdict())
        self._verdicts.add(task)
        task.add_done_callback(self._verdicts.discard)

    def _judge(
        self,
        live: Live,
        scored: Scored,
        images: NDArray[np.float32],
        headers: Mapping[str, str],
        branch: Corrected | Lost,
    ) -> Scored:
        """The verdict on one request, counted; or what ``on_failure`` says where there is none."""
        if isinstance(branch, Corrected):
            try:
                evidence = branch.passes.statistic(scored.logits, branch.logits, live.threshold)
            except Exception as error:
                branch = Lost("statistic", error)
            else:
                scored = scored._replace(evidence=evidence, version=branch.passes.version)
                self._count_verdicts([Judged(live, images, scored, evidence, headers)], branch.passes.guard)
                return scored
        if isinstance(branch.error, ShuttingDown) and live.mode != "observe":
            raise branch.error
        known = isinstance(branch.error, Unavailable)
        log.warning("no verdict: %s: %s", branch.stage, branch.error, exc_info=None if known else branch.error)
        return self._without_verdict(live, scored, branch.stage)

    def _passes_of(self, guard: Guard, version: str) -> Passes:
        return Passes(guard, self.metrics, self.config.corrected_deadline_s, version=version)

    async def replace(self, guard: Guard, version: str) -> None:
        """See `Served`. BadArtifact as well while the original cannot be compared with the new artifact's."""
        if self._problem is not None and self._tolerance is not None:
            raise BadArtifact(
                f"artifact: it cannot be compared with the original yet: {self._problem}", field="artifact"
            )
        await super().replace(guard, version)

    async def _run(self, passes: Passes, slots: Sequence[Ticket[Half, Corrected]]) -> None:
        images = np.concatenate([slot.item.images for slot in slots])
        self.metrics.batch_size().observe(len(images))
        try:
            known = [slot.item.logits for slot in slots if slot.item.logits is not None]
            if passes.guard.eager:
                logits = None
            elif len(known) == len(slots):
                logits = np.concatenate(known)
            else:  # they came when an eager guard served, which needed none
                logits = await passes.reference(images)
            corrected = await passes.corrected_alone(images, logits)
        except Exception as error:
            if len(slots) > 1 and not isinstance(error, TimeoutError):
                for slot in slots:
                    await self._run(passes, [slot])
                return
            for slot in slots:
                slot.fail(error)
            return
        for slot, rows in zip(slots, rows_of(slots), strict=True):
            slot.resolve(Corrected(corrected[rows], passes))

    async def _prepare(self, passes: Passes) -> None:
        await super()._prepare(passes)
        if self._problem is None:  # another artifact
            await self._compare(passes)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._watch_s)
            try:
                await self._look()
            except Exception:
                log.exception("looking at the upstream failed")

    async def _look(self) -> None:
        """See whether the original is ready, and if it has not been, whether it is the right one."""
        try:
            await self._original.check()
            if self._problem is not None:
                await self._compare(self._passes)
        except (UpstreamFailed, UpstreamMismatch, Unavailable) as error:
            if str(error) != str(self._problem):
                log.warning("%s is not ready: %s", self.config.name, error)
            self._problem = error
            self._trusted = self._trusted and not isinstance(error, UpstreamMismatch)
        else:
            self._problem, self._trusted = None, True

    async def _compare(self, passes: Passes) -> None:
        if self._tolerance is not None:
            mean, std = (None, None) if self.config.upstream is None else self.config.upstream.normalisation
            await compare(self._original, passes.reference, self.guard.spec, self._tolerance, mean, std)
