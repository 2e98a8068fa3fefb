"""Flagged requests become events, which go to their sink in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deployments.events.cloudevents import count_of, events_of
from deployments.events.flagged import Flagged
from deployments.events.outbox import Outbox
from deployments.events.settings import EventSettings
from deployments.events.sinks import sink_of


class Sender:
    """Sends the events of one model.

    Args:
        settings: what and where. count: called with an outcome (sent, dropped, failed) and a number of events.

    Raises:
        BadSetting: a variable of a header is not in the environment.
    """

    def __init__(self, model: str, settings: EventSettings, count: Callable[[str, int], None]) -> None:
        self._settings = settings
        self._count = count
        self._outbox: Outbox[Flagged] = Outbox(
            f"events of {model}",
            self._send,
            capacity=settings.queued,
            capacity_bytes=settings.queued_bytes,
            end=lambda: self._sink.close(),
        )
        self._sink = sink_of(settings, self._outbox.gone)

    def start(self) -> None:
        self._outbox.start()

    def offer(self, flagged: Flagged) -> None:
        """Tell of this request some time; at once where there is no room, count that nobody will."""
        kept = _own(flagged) if self._settings.payloads else _light(flagged)
        arrays = (kept.images, kept.scored.logits, kept.evidence.corrected_logits)
        if not self._outbox.put(kept, sum(array.nbytes for array in arrays)):
            self._count("dropped", count_of(self._settings))

    def close(self, flush_s: float) -> None:
        """Send what waits, for ``flush_s`` at most."""
        left = self._outbox.close(flush_s)
        self._count("dropped", len(left) * count_of(self._settings))

    def _send(self, flagged: Flagged) -> None:
        """The events of a request, in order. Where one fails, so do the rest: their sink is the same."""
        due = count_of(self._settings)
        try:
            for event in events_of(flagged, self._settings):
                if self._outbox.gone.is_set():
                    break
                self._sink.send(event)
                due -= 1
                self._count("sent", 1)
        finally:
            self._count("dropped" if self._outbox.gone.is_set() else "failed", due)


def _own(flagged: Flagged) -> Flagged:
    """With logits of its own: views would keep those of the whole batch in memory."""
    return _with(flagged, flagged.scored.logits.copy(), flagged.evidence.corrected_logits.copy())


def _light(flagged: Flagged) -> Flagged:
    """Without images and logits, which a verdict does not tell."""
    none = flagged.scored.logits[:0].copy()
    return _with(flagged._replace(images=flagged.images[:0].copy()), none, none)


def _with(flagged: Flagged, logits: NDArray[np.float32], corrected_logits: NDArray[np.float32]) -> Flagged:
    evidence = flagged.evidence._replace(corrected_logits=corrected_logits)
    return flagged._replace(scored=flagged.scored._replace(logits=logits, evidence=evidence))
