"""The guard itself: a twin and an online rule, as one callable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from guard.data import as_float, check_images
from guard.errors import BadSetting
from guard.rules import Rule
from guard.statistic import Labels, online_rule
from guard.twin import Shared, Twin
from guard.types import InputSpec, Verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Guard:
    """``verdict = guard(images)``, with images [B, C, H, W], float32 in [0, 1] or uint8.

    The stages of a call can be run one by one, and then check nothing: ``shared``, ``finish``, ``corrected``,
    ``verdict``. ``suspects`` tells which images need a corrected network at all; where ``eager``, each needs the same
    one, which can then run before the original's logits are known.

    spec, classes, method, rule, threshold (p-value below which an image is flagged; None where the method has no
    p-values), fingerprint, created_at and manifest say what was loaded. Results are on the CPU.
    """

    def __init__(
        self, twin: Twin, rule: Rule, manifest: dict[str, Any], *, dtype: str, device: str | torch.device
    ) -> None:
        self.twin = twin.to(device=device, dtype=DTYPES[dtype])
        self.rule = rule
        self.manifest = manifest
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self.spec = InputSpec.from_json(manifest["input"])
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.method: str = manifest["method"]
        self.threshold = rule.p_value
        self.eager = rule.eager
        self.fingerprint: str = manifest["fingerprint"]
        self.created_at: str = manifest["created_at"]

    def compile(self, **options: Any) -> Guard:
        """`Twin.compile`; returns the guard."""
        self.twin.compile(**options)
        return self

    def shared(self, images: Tensor) -> Shared:
        """What both networks need of the images."""
        with self._calibrated_path():
            return self.twin.shared(as_float(images.to(self.device)).to(self.dtype).contiguous())

    def finish(self, shared: Shared) -> Tensor:
        """Logits float32 [B, K] of the original network from what is shared."""
        with self._calibrated_path():
            logits = self.twin.finish(shared)
        return _plain(logits)

    def original(self, images: Tensor) -> tuple[Tensor, Shared]:
        """(logits float32 [B, K] of the original network, what a corrected network needs)."""
        shared = self.shared(images)
        return self.finish(shared), shared

    def suspects(self, logits: Tensor) -> Tensor:
        """Which of the rows of logits [B, K] need a corrected network, bool [B]; for the others the answer stands."""
        return torch.from_numpy(self._route(logits) >= 0)

    def corrected(self, logits: Tensor | None, shared: Shared) -> Tensor:
        """Logits float32 [B, K] of the corrected network that each row needs; the original's where it needs none.

        ``logits``: the original's, [B, K]; where ``eager`` they are not looked at and may be None.
        """
        if self.eager:
            with self._calibrated_path():
                corrected = self.twin.corrected(shared)
            return _plain(corrected)
        if logits is None:
            raise ValueError(f"logits: the rule of {self.method} looks at them to choose a corrected network")
        network = torch.from_numpy(self._route(logits))
        answer = logits.clone()
        with self._calibrated_path():
            for index in network.unique().tolist():
                rows = (network == index).nonzero().squeeze(1)
                if index >= 0 and len(rows) == len(network):
                    answer = self.twin.corrected(shared, index)
                elif index >= 0:
                    answer[rows] = _plain(self.twin.corrected(shared, index, rows.to(self.device)))
        return _plain(answer)

    def _route(self, logits: Tensor) -> Labels:
        return self.rule.route(logits.numpy().argmax(1))

    @contextmanager
    def _calibrated_path(self) -> Iterator[None]:
        """Scores are calibrated without autocast, so they are computed without it."""
        with torch.inference_mode():
            if torch.is_autocast_enabled(self.device.type):
                with torch.autocast(self.device.type, enabled=False):
                    yield
            else:  # entering autocast to switch off what is off would cost 0.1 ms a request
                yield

    def verdict(self, logits: Tensor, corrected_logits: Tensor, *, threshold: float | None = None) -> Verdict:
        """Score, p-value, flag and decision from the two logits [B, K]; ``threshold``: see `guard.rules.Rule.judge`."""
        original, corrected = logits.detach().numpy(), corrected_logits.detach().numpy()
        score, p_value, flagged = self.rule.judge(original, corrected, threshold)
        return Verdict(
            logits,
            corrected_logits,
            label=torch.from_numpy(original.argmax(1)),
            corrected_label=torch.from_numpy(online_rule(original, corrected, flagged)),
            score=torch.from_numpy(score),
            p_value=None if p_value is None else torch.from_numpy(p_value),
            flagged=torch.from_numpy(flagged),
        )

    def __call__(self, images: Tensor) -> Verdict:
        images = check_images(images, self.spec)
        logits, shared = self.original(images)
        return self.verdict(logits, self.corrected(logits, shared))


def _plain(logits: Tensor) -> Tensor:
    """A float32 copy on the CPU that may be changed and differentiated, which what inference mode made may not."""
    return logits.float().cpu().clone()


def join(verdicts: list[Verdict]) -> Verdict:
    """Verdicts of several batches as one."""
    if not verdicts:
        raise BadSetting("images: expected at least one batch.", field="images")
    columns = (None if part[0] is None else torch.cat(part) for part in zip(*verdicts, strict=True))
    return Verdict._make(columns)
