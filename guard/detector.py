"""The guard itself: a twin, a null law and a threshold, as one callable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guard.data import as_float
from guard.errors import BadSetting
from guard.margin import margin_change, online_rule
from guard.null import NullLaw
from guard.twin import Frontier, Twin
from guard.types import InputSpec, Verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Guard:
    """MMDF (arXiv 2308.04617, Sec. 4): ``verdict = guard(images)``.

    images: [B, C, H, W], float32 in [0, 1] or uint8, not checked here (`guard.data.check_images` does). The three
    stages of a call can be run one by one: ``original``, ``corrected``, ``verdict``.

    spec, classes, method, threshold (p-value below which an image is flagged), fingerprint, created_at and
    manifest say what was loaded. Results are on the CPU.
    """

    def __init__(
        self, twin: Twin, law: NullLaw, manifest: dict[str, Any], *, dtype: str, device: str | torch.device
    ) -> None:
        self.twin = twin.to(device=device, dtype=DTYPES[dtype])
        self.law = law
        self.manifest = manifest
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.spec = InputSpec.from_json(manifest["input"])
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.method: str = manifest["method"]
        self.threshold: float = manifest["threshold"]["p_value"]
        self.fingerprint: str = manifest["fingerprint"]
        self.created_at: str = manifest["created_at"]

    def compile(self, **options: Any) -> Guard:
        """`Twin.compile`; returns the guard."""
        self.twin.compile(**options)
        return self

    @torch.inference_mode()
    def original(self, images: Tensor) -> tuple[Tensor, Frontier]:
        """(logits float32 [B, K] of the original network, what the corrected network reads of it)."""
        logits, frontier = self.twin.original(as_float(images.to(self.device)).to(self.dtype))
        return logits.float().cpu(), frontier

    @torch.inference_mode()
    def corrected(self, frontier: Frontier) -> Tensor:
        """Logits float32 [B, K] of the corrected network."""
        return self.twin.corrected(frontier).float().cpu()

    @torch.inference_mode()
    def verdict(self, logits: Tensor, corrected_logits: Tensor, *, threshold: float | None = None) -> Verdict:
        """Score, p-value, flag and decision from the two logits [B, K]."""
        threshold = self.threshold if threshold is None else threshold
        score = margin_change(logits, corrected_logits)
        p_value = torch.from_numpy(self.law.p_value(score.numpy()))
        flagged = p_value < threshold
        return Verdict(
            logits,
            corrected_logits,
            logits.argmax(1),
            online_rule(logits, corrected_logits, flagged),
            score,
            p_value,
            flagged,
        )

    def __call__(self, images: Tensor) -> Verdict:
        logits, frontier = self.original(images)
        return self.verdict(logits, self.corrected(frontier))


def join(verdicts: list[Verdict]) -> Verdict:
    """Verdicts of several batches as one."""
    if not verdicts:
        raise BadSetting("images: expected at least one batch.", field="images")
    return Verdict(*(torch.cat(part) for part in zip(*verdicts, strict=True)))
