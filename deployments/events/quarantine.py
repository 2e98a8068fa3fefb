"""Flagged images are kept in a folder, for whoever wants to know what they have in common."""

from __future__ import annotations

import time
from collections.abc import Callable

from deployments.events import shelf
from deployments.events.flagged import Flagged, check_channels, png
from deployments.events.outbox import Outbox
from deployments.events.settings import QuarantineSettings

DAY_S = 86_400.0


class Quarantine:
    """Keeps the flagged images of one model.

    Args:
        settings: where, and how many. channels: of the model's images. count: called with an outcome (kept, dropped,
            failed) and a number of images.

    Raises:
        BadSetting: no PNG has so many channels.
    """

    def __init__(
        self, model: str, settings: QuarantineSettings, channels: int, count: Callable[[str, int], None]
    ) -> None:
        check_channels(channels, "quarantine")
        self._settings = settings
        self._count = count
        self._outbox: Outbox[Flagged] = Outbox(
            f"quarantine of {model}",
            self._keep,
            capacity=settings.queued,
            capacity_bytes=settings.queued_bytes,
            tick=self._prune,
        )

    def start(self) -> None:
        self._outbox.start()

    def offer(self, flagged: Flagged) -> None:
        """Keep the flagged images of this request some time; at once where there is no room, count that nobody will."""
        if not self._outbox.put(flagged, flagged.images.nbytes):
            self._count("dropped", _images(flagged))

    def close(self, flush_s: float) -> None:
        """Keep what waits, for ``flush_s`` at most."""
        for flagged in self._outbox.close(flush_s):
            self._count("dropped", _images(flagged))

    def _keep(self, flagged: Flagged) -> None:
        due = _images(flagged)
        try:
            shelf.make(self._settings.folder)
            for row in flagged.evidence.flagged.nonzero()[0].tolist():
                if self._outbox.gone.is_set():
                    break
                shelf.put(self._settings.folder, png(flagged.images[row]), _facts(flagged, row), flagged.time)
                due -= 1
                self._count("kept", 1)
            self._prune()
        finally:
            self._count("dropped" if self._outbox.gone.is_set() else "failed", due)

    def _prune(self) -> None:
        settings = self._settings
        shelf.prune(
            settings.folder,
            max_images=settings.max_images,
            max_bytes=settings.max_bytes,
            oldest=time.time() - settings.max_age_days * DAY_S,
        )


def _images(flagged: Flagged) -> int:
    return int(flagged.evidence.flagged.sum())


def _facts(flagged: Flagged, row: int) -> dict[str, object]:
    """The line of one image: see `deployments.events.shelf.Entry`."""
    verdict = flagged.verdict(row)
    return {
        "time": flagged.moment,
        "model": flagged.model.name,
        "request": flagged.request_id,
        **{key: verdict[key] for key in ("label", "predicted_class", "score", "p_value")},
        "version": flagged.model.version,
        "fingerprint": flagged.fingerprint,
    }
