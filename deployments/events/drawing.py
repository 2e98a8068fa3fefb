"""The picture of an explanation."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deployments.events.explanation import STEP, Excess, Explanation, Map
from deployments.events.pictures import show
from guard.plots import CLEAN, TRIGGERED

SITES = 12


def figure(found: Explanation) -> Figure:
    """Means and differences above, agreement and sites below."""
    drawn = Figure(figsize=(11.0, 8.2), layout="constrained")
    drawn.suptitle(
        f"{found.flagged} images flagged as {found.name}, beside {found.clean} clean ones "
        f"({found.clean_of_class} of the class)",
        fontsize=12,
    )
    halves: Any = drawn.subfigures(2, 1)
    upper, lower = halves
    panels: Any = upper.subplots(1, 4)
    _picture(panels[0], found.flagged_mean, "mean of the flagged images")
    _picture(panels[1], found.class_mean, f"mean of clean images of {found.name}"[:44])
    _difference(panels[2], found.flagged_mean - found.class_mean, "flagged − clean of the class")
    _difference(panels[3], found.flagged_mean - found.clean_mean, "flagged − all clean")
    bottom: Any = lower.subplots(1, 3, width_ratios=(1.0, 1.0, 1.5))
    _map(drawn, bottom[0], 1.0 / np.maximum(found.deviation, STEP), "1 / standard deviation\nacross flagged images")
    _map(drawn, bottom[1], found.consistency, "distance from the clean mean,\nin standard deviations")
    _bars(bottom[2], found.sites)
    return drawn


def _picture(axes: Axes, image: Map, title: str) -> None:
    show(axes, image)
    axes.set_title(title, fontsize=9)


def _difference(axes: Axes, difference: Map, title: str) -> None:
    """Signed and amplified: the largest becomes black or white, none is grey."""
    largest = max(float(np.abs(difference).max()), STEP)
    show(axes, 0.5 + difference[:3] / (2.0 * largest))
    axes.set_title(f"{title}, ×{1 / largest:.3g}\n(grey: none; black, white: ±{largest:.2g})", fontsize=8)


def _map(drawn: Figure, axes: Axes, values: Map, title: str) -> None:
    image = axes.imshow(values, cmap="viridis", interpolation="nearest", vmin=0.0)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    drawn.colorbar(image, ax=axes, shrink=0.8)


def _bars(axes: Axes, sites: tuple[Excess, ...] | None) -> None:
    axes.set_title("share of channels beyond their bounds", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if sites is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "this method bounds no activation sites", ha="center", transform=axes.transAxes)
        return
    shown = sites[:SITES][::-1]
    rows = np.arange(len(shown))
    axes.barh(rows + 0.2, [site.flagged for site in shown], 0.4, color=TRIGGERED, label="flagged")
    axes.barh(rows - 0.2, [site.clean for site in shown], 0.4, color=CLEAN, label="clean")
    axes.set_yticks(rows, [site.label[-34:] for site in shown], fontsize=8)
    axes.legend(frameon=False, fontsize=8)
