"""The watch: looks at the counters of all replicas at a steady pace, and exports what it makes of them."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from deployments.series import SERIES
from deployments.watch import kept
from deployments.watch.counters import counters
from deployments.watch.facts import read_facts, running
from deployments.watch.models import FEATURES, Watched, summary
from deployments.watch.nodes import HEAD, files, forget_dead_gauges, readable

EVERY_S = 2.0  # a look takes some 1 ms a replica of this node, and 2 ms another node (benchmarks/watch_cost.py)
STALE_S = 60.0  # what was seen longer ago is not exported any more, which an alert notices
READS = 5  # of files that come and go, before it is an error
log = logging.getLogger(__name__)


class Watch:
    """Over the replicas that write their counters into ``folder``. Its methods may be called from any thread.

    gather: called before each look, to bring the counters of other nodes there; that it fails is logged. complete:
    whether they are all there; before, a scrape would see counters that go up by what was counted long ago.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_s: float = EVERY_S,
        gather: Callable[[], None] = lambda: None,
        complete: Callable[[], bool] = lambda: True,
    ) -> None:
        self._folder = folder
        self._gather = gather
        self.complete = complete
        self._every_s = every_s
        self._watched: dict[str, Watched] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look every ``every_s`` seconds, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._every_s):
            try:
                self.look()
            except Exception:
                log.exception("a look at the counters failed; the next one follows")

    def look(self) -> None:
        """Take in what was counted since the last look."""
        try:
            self._gather()
        except Exception:
            log.exception("the counters of other nodes are those of the last look")
        now, facts = time.time(), read_facts(self._folder)
        found = counters(merged(self._folder))
        with self._lock:
            for name, one in facts.items():
                if name not in found:
                    continue
                try:
                    if name not in self._watched and one is not None:
                        self._watched[name] = Watched(one, every_s=self._every_s)
                    if name in self._watched:
                        self._watched[name].look(found[name], one, now)
                except Exception:
                    log.exception("a look at %s failed; the next one follows", name)

    def render(self) -> bytes:
        """The text format: what the replicas counted, and what the watch makes of it."""
        with self._lock:
            families = self._families()
        families += self._kept()
        text = "".join(generate_latest(Ready([family])).decode() for family in families)
        return generate_latest(merged(self._folder)) + text.encode()

    def _families(self) -> list[GaugeMetricFamily]:
        evidence, by_class = _family("guard_attack_evidence"), _family("guard_class_evidence")
        score, inputs = _family("guard_score_drift"), _family("guard_input_drift")
        for name, watched in sorted(self._watched.items()):
            if time.monotonic() - watched.seen >= STALE_S:
                continue
            evidence.add_metric([name], watched.evidence.value)
            for label, value in watched.evidence.by_class.items():
                by_class.add_metric([name, label], value)
            if (drift := watched.drift("score")) is not None:
                score.add_metric([name], drift)
            for feature in FEATURES:
                if (drift := watched.drift(feature)) is not None:
                    inputs.add_metric([name, feature], drift)
        return [evidence, by_class, score, inputs]

    def _kept(self) -> list[GaugeMetricFamily]:
        """What the quarantines hold, as far as they can be read."""
        images, size = _family("guard_quarantine_images"), _family("guard_quarantine_bytes")
        for name, folder in self._quarantines().items():
            with suppress(OSError):
                there, held = kept.size(folder)
                images.add_metric([name], there)
                size.add_metric([name], held)
        return [images, size]

    def _quarantines(self) -> dict[str, Path]:
        """model → folder."""
        with self._lock:
            folders = {name: watched.facts.quarantine for name, watched in self._watched.items()}
        return {name: Path(folder) for name, folder in folders.items() if folder is not None}

    def state(self) -> dict[str, Any]:
        """What the built-in page shows."""
        found = counters(merged(self._folder))
        with self._lock:
            models = [summary(watched, found[name]) for name, watched in sorted(self._watched.items()) if name in found]
        state: dict[str, Any] = {"time": time.time(), "models": models}
        for name, folder in self._quarantines().items():
            state.setdefault("quarantine", [])
            with suppress(OSError):
                state["quarantine"] += kept.recent(folder, name)
        return state


def _family(name: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, SERIES[name].text, labels=["model", *SERIES[name].labels])


class Ready(CollectorRegistry):
    """A registry of families that are ready."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def merged(folder: Path) -> CollectorRegistry:
    """The series of all processes that wrote into ``folder``, and of other nodes' that are copied there. Gauges of dead
    processes are forgotten."""
    forget_dead_gauges(folder)
    for left in reversed(range(READS)):
        try:
            return Ready(MultiProcessCollector.merge(files(folder)))  # type: ignore[no-untyped-call]
        except (OSError, struct.error, ValueError, RuntimeError):  # of a process that has just begun, or ended
            _leave_out_broken(folder)
            time.sleep(0.05 if left else 0.0)
    return Ready(MultiProcessCollector.merge(_readable(folder)))  # type: ignore[no-untyped-call]


def _readable(folder: Path) -> list[str]:
    """The files that can be read. Others, unless their process lives, are put aside, so that the next look is quick."""
    whole = []
    for path in map(Path, files(folder)):
        if readable(path):
            whole.append(str(path))
            continue
        log.error("%s cannot be read: its counters are left out", path)
        process = path.stem.rpartition("_")[2]
        if path.parent != folder or not (process.isdigit() and running(int(process))):
            with suppress(OSError):
                path.rename(path.with_suffix(".broken"))
    return whole


def _leave_out_broken(folder: Path) -> None:
    """Remove files that a process left before it had written their head."""
    for path in folder.glob("*.db"):
        process = path.stem.rpartition("_")[2]
        with suppress(OSError):
            if path.stat().st_size < HEAD and process.isdigit() and not running(int(process)):
                path.unlink()
