"""Plots where people would look: ROC, score histograms, reliability of p-values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from guard.detector import Guard
from guard.evaluation import Evaluation, auroc

CLEAN, TRIGGERED, RULE = "#2b6cb0", "#c53030", "#4a5568"


def save_plots(guard: Guard, evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write scores.png, with p-values p_values.png, and with triggered images roc.png; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = evaluation.clean.score.numpy()
    written = [_save(scores_figure(guard, evaluation), folder / "scores.png")]
    if evaluation.clean.p_value is not None and guard.threshold is not None:
        reliability = p_values_figure(evaluation.clean.p_value.numpy(), guard.threshold)
        written.append(_save(reliability, folder / "p_values.png"))
    if evaluation.triggered is not None:
        written.append(_save(roc_figure(clean, evaluation.triggered.score.numpy(), guard), folder / "roc.png"))
    return written


def scores_figure(guard: Guard, evaluation: Evaluation) -> Figure:
    """Histograms of the score, and the threshold."""
    figure, axes = plain_axes("Score S on images the guard was not fitted on")
    clean = evaluation.clean.score.numpy()
    groups = [("clean", clean, CLEAN)]
    if evaluation.triggered is not None:
        groups.append(("triggered", evaluation.triggered.score.numpy(), TRIGGERED))
    finite = np.concatenate([values[np.isfinite(values)] for _, values, _ in groups])
    edges = np.linspace(finite.min(), max(finite.max(), finite.min() + 1e-6), 61).tolist()
    for name, values, colour in groups:
        weights = np.full(len(values), 1.0 / len(values))
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.6, label=f"{name} (n = {len(values)})")
    if np.isfinite(guard.rule.score):
        axes.axvline(guard.rule.score, color=RULE, linestyle="--", label=threshold_text(guard))
    axes.set(xlabel="S (logits)", ylabel="share of images (log)", yscale="log")
    axes.legend(frameon=False)
    return figure


def threshold_text(guard: Guard) -> str:
    """The threshold in words."""
    p_value = "" if guard.threshold is None else f" (p = {guard.threshold:g})"
    return f"threshold {guard.rule.score:.2f}{p_value}"


def p_values_figure(p_values: NDArray[np.float64], threshold: float) -> Figure:
    """Share of clean images with a p-value at most p, against p: on the diagonal where the null law is right."""
    figure, axes = plain_axes("Reliability of p-values on clean images")
    n = len(p_values)
    low = 10.0 ** np.floor(np.log10(min(0.5 / n, threshold / 2)))
    grid = np.geomspace(low, 1.0, 200)
    share = np.searchsorted(np.sort(p_values), grid, side="right") / n
    half_width = 1.96 * np.sqrt(grid * (1 - grid) / n)
    axes.fill_between(grid, np.maximum(grid - half_width, low / 10), grid + half_width, color=RULE, alpha=0.15,
                      label=f"95% of chance at n = {n}")  # fmt: skip
    axes.plot(grid, grid, color=RULE, linewidth=0.8, label="ideal")
    axes.step(grid, np.where(share > 0, share, np.nan), color=CLEAN, where="post", label="clean images")
    axes.axvline(threshold, color=RULE, linestyle="--", label=f"threshold p = {threshold:g}")
    axes.set(xscale="log", yscale="log", xlabel="p", ylabel="share of clean images with p-value ≤ p", ylim=(low, 1.3))
    axes.legend(frameon=False, loc="lower right")
    return figure


def roc_figure(clean: NDArray[np.float64], triggered: NDArray[np.float64], guard: Guard) -> Figure:
    """True-positive against false-positive rate (log), and where the guard's threshold sits."""
    figure, axes = plain_axes("Detection of triggered images")
    thresholds = np.unique(np.concatenate([clean, triggered]))[::-1]
    fpr = (len(clean) - np.searchsorted(np.sort(clean), thresholds, side="left")) / len(clean)
    tpr = (len(triggered) - np.searchsorted(np.sort(triggered), thresholds, side="left")) / len(triggered)
    floor = 0.5 / len(clean)
    area = auroc(clean, triggered)
    axes.step(np.maximum(fpr, floor), tpr, color=CLEAN, where="post",
              label=f"S: AUROC {area:.4f} ({len(clean)} clean, {len(triggered)} triggered)")  # fmt: skip
    grid = np.geomspace(floor, 1.0, 100)
    axes.plot(grid, grid, color=RULE, linewidth=0.8, linestyle=":", label="chance")
    at = guard.rule.score
    axes.plot(max(float((clean > at).mean()), floor), float((triggered > at).mean()), "o", color=TRIGGERED,
              label=threshold_text(guard))  # fmt: skip
    axes.set(xscale="log", xlabel="false-positive rate (log)", ylabel="true-positive rate", ylim=(-0.02, 1.02))
    axes.legend(frameon=False, loc="lower right")
    return figure


def plain_axes(title: str) -> tuple[Figure, Axes]:
    """A figure with one plain pair of axes."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
