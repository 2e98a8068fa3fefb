"""The online rules: which images need a corrected network, and what the two answers together say.

A rule is the part of a method that serves. It is made by the method's fit, lives in the manifest, and is all that the
guard and the server know of the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard.null import NullLaw, law_from_json
from guard.statistic import Flags, Labels, Logits, Scores, disagreement, margin_change


class Rule(ABC):
    """What an online rule offers. ``networks``: how many corrected networks it routes images to."""

    networks: int
    eager: bool  # every image goes to network 0, whatever the original decides
    p_value: float | None  # flag below this p-value; None where the rule has no p-values
    score: float  # flag above this score, in logits

    @abstractmethod
    def route(self, label: Labels) -> Labels:
        """For decisions [B] of the original network the corrected network each image needs, or −1: none."""

    @abstractmethod
    def judge(
        self, logits: Logits, corrected_logits: Logits, threshold: float | None = None
    ) -> tuple[Scores, Scores | None, Flags]:
        """(score [B], p-value [B] or None, flagged [B]) from both logits [B, K].

        Rows that need no corrected network have the original's logits in both. ``threshold``: a p-value that flags in
        place of the rule's own.
        """

    @abstractmethod
    def to_manifest(self) -> dict[str, Any]:
        """What a manifest keeps of it."""

    @classmethod
    @abstractmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Rule:
        """The inverse. ValueError, LookupError or TypeError where the manifest makes no sense."""


@dataclass(frozen=True)
class MarginChange(Rule):
    """MMDF (arXiv 2308.04617, Sec. 4): every image takes both networks; a p-value below ``p_value`` flags."""

    law: NullLaw
    p_value: float
    networks = 1
    eager = True

    @property
    def score(self) -> float:  # type: ignore[override]
        return self.law.threshold(self.p_value)

    def route(self, label: Labels) -> Labels:
        return np.zeros_like(label)

    def judge(
        self, logits: Logits, corrected_logits: Logits, threshold: float | None = None
    ) -> tuple[Scores, Scores | None, Flags]:
        score = margin_change(logits, corrected_logits)
        p_value = self.law.p_value(score)
        return score, p_value, p_value < (self.p_value if threshold is None else threshold)

    def to_manifest(self) -> dict[str, Any]:
        """threshold: p_value: flag below it. score: the same as a score. p_value_floor: the smallest p-value the law
        can give. p_value_support: 1 / (n + 1), the smallest that the data supports without extrapolation."""
        threshold = {
            "p_value": self.p_value,
            "score": self.score,
            "p_value_floor": self.law.floor,
            "p_value_support": 1.0 / (self.law.n + 1),
        }
        return {"null": self.law.to_json(), "threshold": threshold}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> MarginChange:
        p_value = manifest["threshold"]["p_value"]
        if not 0.0 < p_value < 1.0:
            raise ValueError(f"the threshold {p_value} is no p-value")
        law = law_from_json(manifest["null"])
        law.check()
        return cls(law, p_value)


@dataclass(frozen=True)
class Disagreement(Rule):
    """BNA (arXiv 2308.09850, Sec. 4.2): only images sent to a detected target t take that target's corrected network
    g_t; one that decides otherwise flags. targets[i] is the class whose images go to corrected network i."""

    targets: tuple[int, ...]
    p_value = None
    score = 0.0
    eager = False

    @property
    def networks(self) -> int:  # type: ignore[override]
        return len(self.targets)

    def route(self, label: Labels) -> Labels:
        network = np.full_like(label, -1)
        for index, target in enumerate(self.targets):
            network[label == target] = index
        return network

    def judge(
        self, logits: Logits, corrected_logits: Logits, threshold: float | None = None
    ) -> tuple[Scores, Scores | None, Flags]:
        score = disagreement(logits, corrected_logits)
        return score, None, score > self.score

    def to_manifest(self) -> dict[str, Any]:
        return {"null": None, "threshold": None, "targets": list(self.targets)}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Disagreement:
        targets = manifest["targets"]
        if not isinstance(targets, list) or any(type(t) is not int or t >= len(manifest["classes"]) for t in targets):
            raise ValueError(f"the targets {targets!r} are no classes")
        if min(targets, default=0) < 0 or [str(target) for target in targets] != list(manifest["fit"]["targets"]):
            raise ValueError(f"the targets {targets} are not those that the fit corrected")
        if manifest["null"] is not None or manifest["threshold"] is not None:
            raise ValueError("a rule without p-values has no null law and no threshold")
        return cls(tuple(targets))
