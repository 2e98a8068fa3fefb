"""The project's dashboards, where Grafana's sidecar finds them."""

from __future__ import annotations

import json
from collections.abc import Callable

from rendering import Rendered
from variants import ROOT, VARIANTS


def test_every_dashboard_of_the_project_is_there(chart: Callable[..., Rendered]) -> None:
    """One map each, as the files have them, with the sidecar's label."""
    maps = chart(**VARIANTS["monitoring"]).objects_of("ConfigMap")
    found = {name: json.loads(text) for one in maps for name, text in one["data"].items()}
    files = (ROOT / "deployments" / "monitoring" / "dashboards").glob("*.json")
    assert found == {path.name: json.loads(path.read_text()) for path in files}
    assert len(found) == len(maps) >= 4
    for one in maps:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"folder": "Guard"}


def test_none_unless_asked_for(chart: Callable[..., Rendered]) -> None:
    """Nothing is kept that nobody reads."""
    assert not chart().objects_of("ConfigMap")
