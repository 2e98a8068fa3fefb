"""Dashboards: what is generated is current, and every panel asks for what is exported, of the chosen models."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_rules import FILES, RUNBOOKS, exported, metrics, name, promtool, recorded, rules, run, unknown

from deployments.monitoring.dashboards.catalogue import DASHBOARDS, DOCUMENT, HERE, files, queries, table
from deployments.monitoring.dashboards.panels import DOCS, WIDTH, Dashboard, Panel
from deployments.series import SERIES

COMMAND = "python -m deployments.monitoring.dashboards"
PANELS = [(dashboard, panel) for dashboard in DASHBOARDS for panel in dashboard.panels]
EXPRESSIONS = [query.expr for _dashboard, panel in PANELS for query in panel.queries]
RULES = [rule for path in FILES for rule in rules(path)]
WITHOUT_MODEL = {"up"}  # Prometheus's own: of a node, not of a model

by_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
by_panel = pytest.mark.parametrize(
    "panel", [panel for _dashboard, panel in PANELS], ids=[f"{one.uid}: {panel.title}" for one, panel in PANELS]
)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_what_is_generated_is_current(path: Path) -> None:
    assert path.is_file(), f"{path.name} is missing; run: {COMMAND}"
    assert path.read_text() == files()[path], f"{path.name} is not current; run: {COMMAND}"


def test_no_file_is_left_over() -> None:
    assert {*HERE.glob("*.json")} == {*files()} - {DOCUMENT}


def test_the_document_has_every_series_and_names_no_other() -> None:
    text = DOCUMENT.read_text()
    assert text.count(table()) == 1
    assert [row.split("`")[1] for row in table().splitlines()[2:]] == [*SERIES]
    assert not {metric for metric in metrics(text) if metric not in SERIES}
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (DOCUMENT.parent / link).exists(), link


def test_the_document_has_every_dashboard() -> None:
    found = re.findall(r"^\| \[([\w-]+)\]\(.*?/\1\.json\) \| (.*?) \|$", DOCUMENT.read_text(), re.M)
    assert found == [(dashboard.uid, dashboard.text) for dashboard in DASHBOARDS]


@by_dashboard
def test_a_dashboard_names_what_is_exported(dashboard: Dashboard) -> None:
    """In queries, in the list of models, in descriptions."""
    assert not unknown(json.dumps(dashboard.json()))


def test_every_series_is_of_use() -> None:
    """In a panel or a rule; and what is recorded is read."""
    read = {metric for text in [*EXPRESSIONS, *(rule["expr"] for rule in RULES)] for metric in metrics(text)}
    assert {*SERIES} <= {exported(metric) for metric in read}
    assert recorded() <= read


@by_panel
def test_a_panel_asks_for_the_chosen_models(panel: Panel) -> None:
    """Every series in its queries."""
    for query in panel.queries:
        assert metrics(query.expr) or query.expr.startswith(("max by (alertname, severity, model) (ALERTS{", "up{"))
        selected = re.findall(r"\b([a-zA-Z_:0-9]+)\{([^}]*)\}", query.expr)
        assert {metric for metric, _matchers in selected} >= metrics(query.expr)
        assert {metric for metric, matchers in selected if 'model=~"$model' not in matchers} <= WITHOUT_MODEL


@by_panel
def test_labels_are_those_of_the_series(panel: Panel) -> None:
    """Those by which a query groups and chooses, and those that a legend or a table shows."""
    for query in panel.queries:
        families = {exported(metric) for metric in metrics(query.expr)} - {None}
        known = {label for family in families for label in SERIES[str(family)].labels} | {"model", "le", "instance"}
        known |= {"stage", "outcome", "predicted_class"} if metrics(query.expr) & recorded() else set()
        known |= {"alertname", "severity", "alertstate"} if "ALERTS{" in query.expr else set()
        known |= {"job"} if query.expr.startswith("up{") else set()
        kept = {label for group in re.findall(r"by \(([^)]*)\)", query.expr) for label in group.split(", ")}
        chosen = {*re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query.expr)}
        shown = {*re.findall(r"\{\{(\w+)\}\}", query.legend), *panel.columns}
        assert kept | chosen | shown <= known
        assert not kept or ({*panel.columns} or shown) <= kept


@by_panel
def test_lines_are_the_figures_of_the_alert(panel: Panel) -> None:
    """Who sees a line crossed and who is called see the same."""
    if panel.lines and panel.runbook:
        figures: set[float] = set()
        for rule in RULES:
            if rule.get("alert") == panel.runbook:
                figures |= {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", rule["expr"])}
                products = re.findall(r"([\d.]+) \* ([\d.]+)", rule["expr"])
                figures |= {round(float(a) * float(b), 6) for a, b in products}
        assert {*panel.lines} <= figures


@by_panel
def test_a_panel_says_what_to_do(panel: Panel) -> None:
    assert len(panel.text) > 30
    assert panel.text.endswith(".")
    if panel.runbook:
        assert (RUNBOOKS / f"{panel.runbook}.md").exists()
        (link,) = panel.json(1, 0, 0)["links"]
        assert link["url"] == f"{DOCS}/runbooks/{panel.runbook}.md"


def test_every_alert_has_a_panel() -> None:
    """That shows what it looks at, and leads to its runbook."""
    alerts = {name(path) for path in FILES if path.stem != "recording"}
    assert {panel.runbook for _dashboard, panel in PANELS} - {""} == alerts


def test_addresses_are_unique() -> None:
    for values in ([one.uid for one in DASHBOARDS], [one.title for one in DASHBOARDS]):
        assert len(values) == len({*values})


@by_dashboard
def test_panels_have_titles_of_their_own_and_do_not_overlap(dashboard: Dashboard) -> None:
    panels = dashboard.json()["panels"]
    for key in ("title", "id"):
        assert len({panel[key] for panel in panels}) == len(panels)
    for panel in panels:
        assert 0 <= panel["gridPos"]["x"] < panel["gridPos"]["x"] + panel["gridPos"]["w"] <= WIDTH
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        assert not (_meet(one, other, "x", "w") and _meet(one, other, "y", "h")), (one, other)


def _meet(one: dict[str, int], other: dict[str, int], at: str, size: str) -> bool:
    return one[at] < other[at] + other[size] and other[at] < one[at] + one[size]


@by_dashboard
def test_rows_are_full(dashboard: Dashboard) -> None:
    for row in dashboard.rows:
        assert sum(panel.width for panel in row) == WIDTH or row[0].each_model
        assert len({panel.height for panel in row}) == 1


@by_dashboard
def test_a_dashboard_lets_one_choose(dashboard: Dashboard) -> None:
    """The source and the models; every panel and query is of the source, and the others are one click away."""
    made = dashboard.json()
    source, models = made["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (models["name"], models["multi"], models["includeAll"]) == ("model", True, True)
    assert models["query"]["query"] == "label_values(guard_requests_total, model)"
    asked = [one["datasource"] for panel in made["panels"] for one in (panel, *panel["targets"])]
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in [*asked, models["datasource"]])
    assert made["tags"] == made["links"][0]["tags"] == ["guard"]
    assert made["links"][0]["includeVars"]


@by_dashboard
def test_queries_have_names_of_their_own(dashboard: Dashboard) -> None:
    for panel in dashboard.json()["panels"]:
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len({*references})
        assert all(re.fullmatch("[A-Z]", reference) for reference in references)


def test_queries_are_ready_to_be_asked() -> None:
    asked = queries()
    assert [(one.dashboard, one.panel) for one in asked] == [
        (dashboard.uid, panel.title) for dashboard, panel in PANELS for _query in panel.queries
    ]
    assert not [one.expr for one in asked if "$" in one.expr]
    assert {metric for one in asked if one.optional for metric in metrics(one.expr)} == {
        "guard_quarantine_images",
        "guard_quarantine_bytes",
    }


@promtool
def test_promtool_takes_every_query(tmp_path: Path) -> None:
    group: dict[str, Any] = {
        "name": "panels",
        "rules": [{"record": f"query:{i}", "expr": one.expr} for i, one in enumerate(queries())],
    }
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [group]}))
    run("check", "rules", file)
