"""Queries of the chosen models. Replicas of a node are added up by the guard itself, nodes here."""

from __future__ import annotations


def of(metric: str, where: str = "") -> str:
    """The series of a metric as they are. where: further matchers."""
    return f'{metric}{{model=~"$model"{", " + where if where else ""}}}'


def latest(metric: str, *labels: str, where: str = "", how: str = "max") -> str:
    """A gauge by model and ``labels``, of the node where it is largest."""
    return f"{how} by ({_by(labels)}) ({of(metric, where)})"


def rate(metric: str, *labels: str, where: str = "") -> str:
    """A counter's steps a second."""
    return f"sum by ({_by(labels)}) (rate({of(metric, where)}[$__rate_interval]))"


def increase(metric: str, *labels: str, where: str = "") -> str:
    """A counter's steps in the time that the dashboard shows."""
    return f"sum by ({_by(labels)}) (increase({of(metric, where)}[$__range]))"


def mean(histogram: str, where: str = "") -> str:
    return f"{rate(f'{histogram}_sum', where=where)} / {rate(f'{histogram}_count', where=where)}"


def quantile(share: float, histogram: str, where: str = "") -> str:
    return f"histogram_quantile({share:g}, {rate(f'{histogram}_bucket', 'le', where=where)})"


def cells(histogram: str, where: str = "") -> str:
    """Of a heatmap: what came into each bucket and those below, of all chosen models together."""
    return f"sum by (le) (increase({of(f'{histogram}_bucket', where)}[$__rate_interval]))"


def _by(labels: tuple[str, ...]) -> str:
    return ", ".join(("model", *labels))
