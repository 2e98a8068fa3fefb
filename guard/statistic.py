"""What two rows of logits say of an image. Pure functions of numpy arrays: they run for every request, on few numbers,
where a torch operation costs ten times as much."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Scores = NDArray[np.float64]
Labels = NDArray[np.int64]
Flags = NDArray[np.bool_]


def margin_change(logits: Logits, corrected_logits: Logits) -> Scores:
    """S(x) = m_c*(f, x) − m_c*(f̄, x), c* = argmax f(x) (MMAC paper, arXiv 2308.04617, Eq. 4).

    Args:
        logits, corrected_logits: [N, K] of the original and of the corrected network.

    Returns:
        [N], in logits. A row with a value that is not finite scores +inf: it cannot be trusted.
    """
    label = logits.argmax(1)
    return _trusted(_margin(logits, label) - _margin(corrected_logits, label), logits, corrected_logits)


def disagreement(logits: Logits, corrected_logits: Logits) -> Scores:
    """−m_c*(g, x): by how much the corrected network g prefers another class; above zero it decides otherwise (BNA
    paper, arXiv 2308.09850, Sec. 4.2). Arguments and result as in `margin_change`."""
    return _trusted(-_margin(corrected_logits, logits.argmax(1)), logits, corrected_logits)


def online_rule(logits: Logits, corrected_logits: Logits, flagged: Flags) -> Labels:
    """The guard's decision [N]: c* where not flagged, else the corrected network's decision without c*.

    MMAC paper, Sec. 4. ``flagged``: [N].
    """
    label: Labels = logits.argmax(1)
    if flagged.any():
        label = np.where(flagged, _without(corrected_logits, label).argmax(1), label)
    return label


def _margin(logits: Logits, label: Labels) -> Scores:
    """`guard.margin.margin`, in double precision; NaN where it is no number."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        margin: Scores = values[np.arange(len(label)), label] - _without(values, label).max(1)
    return margin


def _without(logits: NDArray[Any], label: Labels) -> NDArray[Any]:
    """The logits [N, K] with each row's class ``label`` [N] put out of the running (−inf)."""
    out = logits.copy()
    out[np.arange(len(label)), label] = -np.inf
    return out


def _trusted(score: Scores, logits: Logits, corrected_logits: Logits) -> Scores:
    if not (np.isfinite(logits).all() and np.isfinite(corrected_logits).all()):
        score[~(np.isfinite(logits).all(1) & np.isfinite(corrected_logits).all(1))] = np.inf
    return score
