"""The project's alerts, in the cluster."""

from __future__ import annotations

from collections.abc import Callable

import yaml
from rendering import Rendered
from variants import ROOT, VARIANTS


def test_every_rule_of_the_project_is_in_it(chart: Callable[..., Rendered]) -> None:
    """Group for group as the files have them, templates of annotations untouched."""
    (rule,) = chart(**VARIANTS["monitoring"]).objects_of("PrometheusRule")
    files = sorted((ROOT / "deployments" / "monitoring" / "rules").glob("*.yaml"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    assert len(groups) >= 13
    assert rule["spec"]["groups"] == groups
    assert len({group["name"] for group in groups}) == len(groups), "the API server refuses two of a name"
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """Clusters without the Prometheus operator install the chart."""
    assert not chart().objects_of("PrometheusRule")
