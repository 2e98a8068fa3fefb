"""The chart as real Helm renders it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rendering import Rendered, render
from variants import CHART, VARIANTS, with_values


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rendered]:
    """`chart(**values)`: the least that installs, with these values at the top. Rendered once a set of values."""
    known: dict[str, Rendered] = {}

    def rendered(**changed: Any) -> Rendered:
        values = with_values(**changed)
        key = json.dumps(values, sort_keys=True)
        if key not in known:
            known[key] = render(CHART, values, folder=tmp_path_factory.mktemp("chart"))
        return known[key]

    return rendered


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def variant(request: pytest.FixtureRequest, chart: Callable[..., Rendered]) -> Rendered:
    """Each documented variant in turn."""
    return chart(**VARIANTS[request.param])
