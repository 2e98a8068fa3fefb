"""A flagged request: what its answer was made of, and what is known of who asked."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.config import Live
from deployments.policy import Evidence, Scored, finite
from deployments.protocol.bodies import Model
from deployments.protocol.traces import traceparent
from guard.errors import BadSetting
from guard.pictures import MODES

REQUEST_ID, TRACE = "x-request-id", "traceparent"
LONGEST_ID = 200


class Flagged(NamedTuple):
    """One request with at least one flagged image.

    time: seconds, Unix. model: name, version of the artifact that judged, and classes. fingerprint: of its weights.
    live: the settings that the request came under. scored: logits and evidence of n images. images: float32
    [n, C, H, W] in [0, 1]. headers: of the request, in any case.
    """

    time: float
    model: Model
    fingerprint: str
    live: Live
    scored: Scored
    images: NDArray[np.float32]
    headers: Mapping[str, str]

    @property
    def evidence(self) -> Evidence:
        if self.scored.evidence is None:
            raise ValueError("evidence: a request is flagged by its evidence")
        return self.scored.evidence

    @property
    def moment(self) -> str:
        """The time by ISO 8601, in UTC."""
        return iso(self.time)

    @property
    def request_id(self) -> str | None:
        """What the client calls the request; None without a printable one of moderate length."""
        given = self._header(REQUEST_ID)
        return given if given and given.isprintable() and len(given) <= LONGEST_ID else None

    @property
    def trace(self) -> str | None:
        """The W3C traceparent; None without a valid one."""
        given = self._header(TRACE)
        return None if given is None else traceparent([given])

    def verdict(self, row: int) -> dict[str, Any]:
        """What is known of one image, JSON-able: label, predicted_class, flagged, corrected_label, score, p_value."""
        evidence, label = self.evidence, int(self.scored.label[row])
        p_value = None if evidence.p_value is None else float(finite(evidence.p_value[row : row + 1])[0])
        return {
            "label": label,
            "predicted_class": self.model.classes[label],
            "flagged": bool(evidence.flagged[row]),
            "corrected_label": int(evidence.corrected_label[row]),
            "score": float(finite(evidence.score[row : row + 1])[0]),
            "p_value": p_value,
        }

    def _header(self, name: str) -> str | None:
        values = [value for key, value in self.headers.items() if key.lower() == name]
        return values[0] if len(values) == 1 else None


def iso(seconds: float) -> str:
    """Unix time as ISO 8601 in UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def png(image: NDArray[np.float32]) -> bytes:
    """An image [C, H, W] in [0, 1] as the bytes of a PNG of 8 bits a channel, written fast rather than small."""
    pixels = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
    grey = pixels.shape[2] == 1
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if grey else pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def check_channels(channels: int, setting: str) -> None:
    """Refuse what ``png`` cannot write.

    Raises:
        BadSetting: named after ``setting``.
    """
    if channels not in MODES:
        raise BadSetting(
            f"setting {setting}: the model's images have {channels} channels, a PNG takes 1, 3 or 4: leave it out",
            field=setting,
        )
