"""What a served model does about flagged requests, beside answering them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from deployments.config import Live, ModelConfig
from deployments.events.flagged import Flagged, check_channels
from deployments.events.quarantine import Quarantine
from deployments.events.sender import Sender
from deployments.policy import Scored
from deployments.protocol.bodies import Model

FLUSH_S = 3.0
Count = Callable[[str, int], None]


class Reports:
    """The events and the quarantine of one model, as far as its settings want them.

    Args:
        config: of the model. channels: of its images. events, quarantined: count an outcome, a number of times.

    Raises:
        BadSetting: a variable of a header is not in the environment, or no PNG has so many channels.
    """

    def __init__(self, config: ModelConfig, channels: int, *, events: Count, quarantined: Count) -> None:
        self._rooms: list[Sender | Quarantine] = []
        if config.events is not None:
            if config.events.payloads:
                check_channels(channels, "events.payloads")
            self._rooms.append(Sender(config.name, config.events, events))
        if config.quarantine is not None:
            self._rooms.append(Quarantine(config.name, config.quarantine, channels, quarantined))

    def start(self) -> None:
        for room in self._rooms:
            room.start()

    def offer(
        self,
        model: Model,
        fingerprint: str,
        live: Live,
        scored: Scored,
        images: NDArray[np.float32],
        headers: Mapping[str, str] | None,
    ) -> None:
        """Take in one judged request: images [n, C, H, W]; of no interest unless one of them is flagged."""
        if not self._rooms or scored.evidence is None or not scored.evidence.flagged.any():
            return
        judged = model._replace(version=scored.version or model.version)
        flagged = Flagged(time.time(), judged, fingerprint, live, scored, images, headers or {})
        for room in self._rooms:
            room.offer(flagged)

    async def close(self) -> None:
        """Finish what waits, for a few seconds at most."""
        await asyncio.gather(*(asyncio.to_thread(room.close, FLUSH_S) for room in self._rooms))
