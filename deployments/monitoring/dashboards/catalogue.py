"""All dashboards, their queries, and the files that are made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from deployments.monitoring.dashboards.calibration import CALIBRATION
from deployments.monitoring.dashboards.failures import FAILING
from deployments.monitoring.dashboards.latency import LATENCY
from deployments.monitoring.dashboards.overview import OVERVIEW
from deployments.series import TABLE

DASHBOARDS = (OVERVIEW, LATENCY, CALIBRATION, FAILING)
HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs/monitoring.md"
MARKED = re.compile(r"(?<=<!-- series -->\n).*?(?=<!-- /series -->)", re.DOTALL)
VARIABLES = {"$model": ".*", "$__rate_interval": "30s", "$__range": "5m"}


class Asked(NamedTuple):
    """A panel's query, ready for Prometheus: of all models. optional: a healthy endpoint may have no answer."""

    dashboard: str
    panel: str
    expr: str
    optional: bool


def queries() -> list[Asked]:
    """Every one of every dashboard."""
    return [
        Asked(dashboard.uid, panel.title, _filled(query.expr), query.optional)
        for dashboard in DASHBOARDS
        for panel in dashboard.panels
        for query in panel.queries
    ]


def _filled(expr: str) -> str:
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    return expr


def files() -> dict[Path, str]:
    """What is generated: a file for each dashboard, and the table of series in the documentation."""
    made = {
        HERE / f"{dashboard.uid}.json": json.dumps(dashboard.json(), indent=2, ensure_ascii=False) + "\n"
        for dashboard in DASHBOARDS
    }
    return made | {DOCUMENT: MARKED.sub(lambda _found: f"\n{table()}\n", DOCUMENT.read_text())}


def table() -> str:
    """Every series, in Markdown."""
    rows = ["| series | kind | labels beside `model` | what |", "|---|---|---|---|"]
    for series in TABLE:
        labels = ", ".join(f"`{label}`" for label in series.labels)
        rows.append(f"| `{series.name}` | {series.kind} | {labels} | {series.text} |")
    return "\n".join(rows) + "\n"
