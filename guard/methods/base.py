"""What a method is: it looks at the clean set once, then gives corrections fitted on any part of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from guard.capture import Captured
from guard.config import FitSettings
from guard.corrections import Clip
from guard.progress import Progress


class Fitted(NamedTuple):
    """modules: site index → correction. report: JSON-able facts of the fit, for people and the manifest."""

    modules: dict[int, Clip]
    report: dict[str, Any]


class Estimator(ABC):
    """A method at work on one captured classifier and one clean set.

    Args:
        captured: the classifier. images: [N, C, H, W] (uint8, or float32 in [0, 1]). labels: int64 [N].
    """

    logits: Tensor  # float32 [N, K] of the original network on the clean set

    @abstractmethod
    def __init__(
        self, captured: Captured, images: Tensor, labels: Tensor, settings: FitSettings, progress: Progress
    ) -> None: ...

    @abstractmethod
    def correction(self, rows: Tensor, progress: Progress) -> Fitted:
        """Fit on the images ``rows`` (int64) alone."""
