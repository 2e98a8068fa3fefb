"""Margins and the margin change. Pure functions of logits; larger = more confident, or more suspicious."""

from __future__ import annotations

import torch
from torch import Tensor


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """m_c(f, x) = f_c(x) − max over k ≠ c of f_k(x).

    Args:
        logits: float [N, K], K ≥ 2. label: int64 [N], the class c of each row.

    Returns:
        float [N], in logits; negative where the row decides otherwise.
    """
    own = logits.gather(1, label[:, None]).squeeze(1)
    return own - without(logits, label).amax(1)


def without(logits: Tensor, label: Tensor) -> Tensor:
    """The logits [N, K] with each row's class ``label`` [N] put out of the running (−inf)."""
    return logits.scatter(1, label[:, None], float("-inf"))


def margin_change(logits: Tensor, corrected_logits: Tensor) -> Tensor:
    """S(x) = m_c*(f, x) − m_c*(f̄, x), c* = argmax f(x) (MMAC paper, arXiv 2308.04617, Eq. 4).

    Args:
        logits, corrected_logits: [N, K] of the original and of the corrected network.

    Returns:
        float64 [N], in logits. A row with a value that is not finite scores +inf: it cannot be trusted.
    """
    decision = logits.argmax(1)
    score = margin(logits.double(), decision) - margin(corrected_logits.double(), decision)
    trusted = torch.isfinite(logits).all(1) & torch.isfinite(corrected_logits).all(1)
    return torch.where(trusted, score, torch.full_like(score, float("inf")))


def online_rule(logits: Tensor, corrected_logits: Tensor, flagged: Tensor) -> Tensor:
    """The guard's decision, int64 [N]: c* where not flagged, else the corrected network's decision without c*.

    MMAC paper, Sec. 4. ``flagged``: bool [N].
    """
    decision = logits.argmax(1)
    return torch.where(flagged, without(corrected_logits, decision).argmax(1), decision)
