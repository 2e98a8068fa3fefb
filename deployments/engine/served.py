"""What every served model is, wherever its original network runs: settings, artifact, queue, and one way to count.

How images become logits and evidence is the subclass's: `deployments.engine.classifier` runs both networks,
`deployments.engine.wrapped` has the original's logits from elsewhere.
"""

from __future__ import annotations

import logging
import os
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deployments.config import Live, ModelConfig
from deployments.engine.batcher import Batcher, Ticket
from deployments.engine.metrics import Metrics
from deployments.engine.passes import Guard, Passes
from deployments.errors import NoVerdict
from deployments.events.reports import Reports
from deployments.policy import Answer, Evidence, Scored
from deployments.protocol.bodies import Model
from deployments.settings import checked
from deployments.watch.facts import facts_of
from guard.errors import BadArtifact, BadSetting

log = logging.getLogger(__name__)
J = TypeVar("J")
R = TypeVar("R")


class Judged(NamedTuple):
    """A request whose verdict is there: the settings that it came under, its images [n, C, H, W], what was found, and
    its headers."""

    live: Live
    images: NDArray[np.float32]
    scored: Scored
    evidence: Evidence
    headers: Mapping[str, str] | None


class Served(ABC, Generic[J, R]):
    """Answers requests with the guard. ``start`` before the first, ``close`` after the last.

    Its queue takes items J, each to be run in a batch with others, and gives back an R for each.

    Args:
        guard: all networks. config: names, limits and the settings at start. metrics: where everything is counted.
    """

    def __init__(self, guard: Guard, config: ModelConfig, metrics: Metrics) -> None:
        check_threshold(config.threshold, guard)
        self.config = config
        self.live = config.live
        self.metrics = metrics
        self._retired: list[Passes] = []
        self._reports = Reports(
            config,
            guard.spec.channels,
            events=lambda outcome, number: metrics.events(outcome).inc(number),
            quarantined=lambda outcome, number: metrics.quarantined(outcome).inc(number),
        )
        self._take(self._passes_of(guard, config.version))
        self._batcher: Batcher[J, R] = Batcher(
            self._process, limit=config.max_batch_size, capacity=config.limits.queued_images
        )

    @abstractmethod
    async def infer(self, images: NDArray[np.float32], live: Live, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer for images [n, C, H, W] in [0, 1], checked before, under the settings ``live``. ``headers``: of
        the request, in any case."""

    @abstractmethod
    async def _run(self, passes: Passes, slots: Sequence[Ticket[J, R]]) -> None:
        """Run one batch and answer each of its slots."""

    @abstractmethod
    def _passes_of(self, guard: Guard, version: str) -> Passes: ...

    async def _prepare(self, passes: Passes) -> None:
        """Before ``passes`` answer anybody: run the smallest and the largest batch."""
        await passes.warm_up(1, self.config.max_batch_size)

    async def start(self) -> None:
        """Prepare, then accept requests."""
        await self._prepare(self._passes)
        self._tell()
        self._reports.start()
        self._batcher.start()

    async def close(self) -> None:
        """Refuse new requests, answer those that wait, free the threads, report what is still to report."""
        await self._batcher.close()
        await self._finish()
        for passes in (*self._retired, self._passes):
            passes.close()
        await self._reports.close()

    async def _finish(self) -> None:
        """What is left to do once the queue is empty."""

    async def replace(self, guard: Guard, version: str) -> None:
        """Put another artifact in place of the one that serves, once it is prepared; no request waits for it.

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
        passes = self._passes_of(guard, version)
        try:
            await self._prepare(passes)
        except BaseException:
            passes.close()
            raise
        self._retired.append(self._passes)
        self._take(passes)
        self._tell()
        if self._batcher.busy_since is None:
            self._close_retired()

    def _close_retired(self) -> None:
        """Only while no batch is under way: they run one after the other, and the next one takes the new passes."""
        while self._retired:
            self._retired.pop().close()

    def _take(self, passes: Passes) -> None:
        guard, version = passes.guard, passes.version
        self._passes, self.guard = passes, guard
        self.model = Model(self.config.name, version, guard.spec, guard.classes)
        self.metrics.artifact(
            method=guard.method,
            fingerprint=guard.fingerprint,
            version=version,
            threshold=self._threshold,
            created_at=guard.created_at,
        )

    def _tell(self) -> None:
        """Tell the watch over all replicas, where there is one, what serves. A failure is logged: requests go on."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        if folder is None or not self.guard.manifest:
            return
        kept = self.config.quarantine
        try:
            facts_of(
                self.guard.manifest,
                model=self.config.name,
                version=self.model.version,
                threshold=self._threshold,
                labels=self.metrics.labels,
                bounds=self.metrics.bounds,
            ).model_copy(update={"quarantine": None if kept is None else str(kept.folder)}).write(Path(folder))
        except OSError as error:
            log.error("the watch is not told what serves %s: %s", self.config.name, error)

    @property
    def _threshold(self) -> float | None:
        """The p-value below which an image is flagged; None where the method has none."""
        return None if self.guard.threshold is None else self.live.threshold or self.guard.threshold

    def facts(self) -> dict[str, Any]:
        """What the metadata tells of the artifact and of the settings in force."""
        facts = {
            "guard_mode": self.live.mode,
            "guard_method": self.guard.method,
            "guard_threshold": self._threshold,
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
        for what, since in (("a batch", self._batcher.busy_since), ("a pass", self._passes.corrected_since)):
            if since is not None and time.perf_counter() - since > self.config.stuck_after_s:
                raise RuntimeError(f"{what} has been running for more than {self.config.stuck_after_s} s")

    def switch(self, values: dict[str, Any]) -> None:
        """Take new live settings. Settings that do not check are logged, and those in force stay."""
        try:
            live = checked(Live, values)
            check_threshold(live.threshold, self.guard)
            self.live = live
            self.metrics.threshold(self._threshold)
            self._tell()
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

    async def _process(self, slots: Sequence[Ticket[J, R]]) -> None:
        """One batch, with the passes that serve when it starts."""
        self._close_retired()
        started = time.perf_counter()
        waited = np.array([started - slot.since for slot in slots])
        self.metrics.stage_seconds("queue").observe_many(np.maximum(waited, 0.0))
        await self._run(self._passes, slots)

    def _count_skipped(self, live: Live, size: int) -> None:
        """A request of ``size`` images that the sample left out."""
        self.metrics.requests(live.mode, "skipped").inc()
        self.metrics.inputs("skipped").inc(size)

    def _count_verdicts(self, judged: Sequence[Judged], guard: Guard) -> None:
        """The verdicts of ``guard`` on some requests, whose answers leave after this; and their reports. It never
        raises: that counting fails, or a report, is logged, and costs no answer."""
        try:
            self._tally(judged)
        except Exception:
            log.exception("%d verdicts of %s are not counted", len(judged), self.config.name)
        for one in judged:
            try:
                self._reports.offer(self.model, guard.fingerprint, one.live, one.scored, one.images, one.headers)
            except Exception:
                log.exception("a request of %s is not reported", self.config.name)

    def _tally(self, judged: Sequence[Judged]) -> None:
        if not judged:
            return
        evidence = [one.evidence for one in judged]
        flags = [int(one.flagged.sum()) for one in evidence]
        label = np.concatenate([one.scored.label for one in judged])
        flagged, score = (np.concatenate([getattr(one, name) for one in evidence]) for name in ("flagged", "score"))
        p_values = [one.p_value for one in evidence if one.p_value is not None]
        done: Counter[tuple[str, str]] = Counter()
        changed: Counter[str] = Counter()  # mode → flagged images
        for one, number in zip(judged, flags, strict=True):
            done[one.live.mode, "flagged" if number else "clean"] += 1
            changed[one.live.mode] += number
        for (mode, verdict), number in done.items():
            self.metrics.requests(mode, verdict).inc(number)
        self.metrics.verdicts(label, flagged)
        self.metrics.statistics(score, np.concatenate(p_values) if p_values else None)
        self.metrics.images(*(one.images for one in judged))
        self.metrics.rejected().inc(changed["reject"])
        self.metrics.corrected().inc(changed["correct"])

    def _count_failure(self, size: int, stage: str, outcome: str) -> None:
        """A request of ``size`` images without a verdict; ``outcome``: open if it is answered all the same."""
        self.metrics.inputs("error").inc(size)
        self.metrics.failures(stage, outcome).inc()

    def _without_verdict(self, live: Live, scored: Scored, stage: str) -> Scored:
        """Count that ``stage`` failed after the original's answer, ``scored``, which leaves unguarded.

        Raises:
            NoVerdict: on_failure is closed.
        """
        if live.on_failure == "open" or live.mode == "observe":
            self._count_failure(len(scored.label), stage, "open")
            self.metrics.requests(live.mode, "error").inc()
            return scored
        self._count_failure(len(scored.label), stage, "closed")
        raise NoVerdict(f"no verdict: the {stage} stage failed or was late, and this server refuses without one")


AnyServed = Served[Any, Any]


def check_threshold(threshold: float | None, guard: Guard) -> None:
    """Refuse a p-value that no image can fall below.

    Raises:
        BadSetting: with the remedy.
    """
    if threshold is None:
        return
    if guard.threshold is None:
        raise BadSetting(
            f"threshold: the artifact is of the method {guard.method}, which has no p-values: leave it out",
            field="threshold",
        )
    floor = (guard.manifest.get("threshold") or {}).get("p_value_floor", 0.0)
    if threshold <= floor:
        raise BadSetting(
            f"threshold: below {threshold:g} no image is flagged, for this artifact's smallest p-value is {floor:.3g}: "
            f"say {1.01 * floor:.3g} or more, or fit with more clean images or another --null",
            field="threshold",
        )


def drawn(live: Live) -> bool:
    """Whether a request gets a verdict; the sample of mode observe is drawn here."""
    return live.sample == 1 or random.random() < live.sample


def rows_of(slots: Sequence[Ticket[Any, Any]]) -> list[slice]:
    """Where each request's images lie in the batch."""
    ends = np.cumsum([slot.size for slot in slots]).tolist()
    return [slice(end - slot.size, end) for end, slot in zip(ends, slots, strict=True)]
