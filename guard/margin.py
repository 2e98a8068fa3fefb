"""The margin of a decision: larger = more confident."""

from __future__ import annotations

from torch import Tensor


def margin(logits: Tensor, label: Tensor) -> Tensor:
    """m_c(f, x) = f_c(x) − max over k ≠ c of f_k(x), differentiable.

    Args:
        logits: float [N, K], K ≥ 2. label: int64 [N], the class c of each row.

    Returns:
        float [N], in logits; negative where the row decides otherwise.
    """
    column = label[:, None]
    return logits.gather(1, column).squeeze(1) - logits.scatter(1, column, float("-inf")).amax(1)
