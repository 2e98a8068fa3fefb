"""From the verdict to the answer: the four modes, as one pure function.

===========  =======================  =====================  =========================================
mode         label                    corrected_label        logits
===========  =======================  =====================  =========================================
observe      original                 left out               original
flag         original                 the online rule's      original
reject       original; flagged: -1    original; flagged: -1  original; flagged: zeros
correct      the online rule's        the online rule's      original; flagged: corrected, c* set last
===========  =======================  =====================  =========================================

``flagged`` is left out in observe. A flagged row says nothing else in reject: zero logits carry no decision. In
correct the logits agree with the label: c*, the class that the original network chose, gets a logit one below the
smallest of its row. Score and p-value leave only where they are exposed, and never in observe.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deployments.config import Live, Mode

NO_LABEL = -1


class Evidence(NamedTuple):
    """The verdict on n images: the host-side copy of ``guard.types.Verdict``.

    corrected_logits: float32 [n, K]. corrected_label: int64 [n], by the online rule. score: float64 [n]. p_value:
    float64 [n], or None where the method has none. flagged: bool [n].
    """

    corrected_logits: NDArray[np.float32]
    corrected_label: NDArray[np.int64]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64] | None
    flagged: NDArray[np.bool_]

    def rows(self, rows: slice) -> Evidence:
        """The part of one request."""
        return Evidence(
            self.corrected_logits[rows],
            self.corrected_label[rows],
            self.score[rows],
            None if self.p_value is None else self.p_value[rows],
            self.flagged[rows],
        )


class Scored(NamedTuple):
    """What is known of one request: logits float32 [n, K], label int64 [n], and the evidence, or None without it.
    version: of the artifact that says so."""

    logits: NDArray[np.float32]
    label: NDArray[np.int64]
    evidence: Evidence | None
    version: str = ""


class Answer(NamedTuple):
    """What may leave the house. A field is None where the mode, the settings or a failure withhold it, and the p-value
    where the method has none.

    logits: float32 [n, K], finite. label, corrected_label: int64 [n], -1 = no label. flagged: bool [n].
    score, p_value: float32 [n], finite. unguarded: the verdict was due but could not be had (on_failure: open).
    version: of the artifact that answered.
    """

    mode: Mode
    logits: NDArray[np.float32]
    label: NDArray[np.int64]
    flagged: NDArray[np.bool_] | None = None
    corrected_label: NDArray[np.int64] | None = None
    score: NDArray[np.float32] | None = None
    p_value: NDArray[np.float32] | None = None
    unguarded: bool = False
    version: str = ""


def decide(scored: Scored, live: Live) -> Answer:
    """The answer that ``live`` allows for ``scored``."""
    return _decide(scored, live)._replace(version=scored.version)


def _decide(scored: Scored, live: Live) -> Answer:
    logits, label, evidence = finite(scored.logits), scored.label, scored.evidence
    if live.mode == "observe":
        return Answer(live.mode, logits, label)
    if evidence is None:
        return Answer(live.mode, logits, label, unguarded=True)
    flagged, corrected_label = evidence.flagged, evidence.corrected_label
    rows = flagged[:, None]
    if live.mode == "reject":
        logits = np.where(rows, np.float32(0), logits)
        label = corrected_label = np.where(flagged, NO_LABEL, label)
    elif live.mode == "correct":
        logits = np.where(rows, without(finite(evidence.corrected_logits), label), logits)
        label = corrected_label
    answer = Answer(live.mode, logits, label, flagged, corrected_label)
    if not live.expose_scores:
        return answer
    p_value = None if evidence.p_value is None else finite(evidence.p_value)
    return answer._replace(score=finite(evidence.score), p_value=p_value)


def without(logits: NDArray[np.float32], label: NDArray[np.int64]) -> NDArray[np.float32]:
    """logits [n, K] with each row's class ``label`` [n] one below the smallest of the row: last, and still finite."""
    out = logits.copy()
    out[np.arange(len(label)), label] = logits.min(axis=1) - 1
    return out


def finite(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """``values`` as float32 that JSON can carry: beyond the range becomes its end, not a number becomes the low end."""
    if values.dtype == np.float32 and np.isfinite(values).all():
        return values
    end = float(np.finfo(np.float32).max)
    limited: NDArray[np.float32] = np.nan_to_num(np.clip(values, -end, end), nan=-end).astype(np.float32)
    return limited
