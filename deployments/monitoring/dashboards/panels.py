"""A dashboard in our words, and the JSON that Grafana makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

DOCS = "https://github.com/backdoor-guard/backdoor-guard/blob/main/docs"
WIDTH = 24  # columns of a dashboard
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODELS = "label_values(guard_requests_total, model)"
COLOURS = {0: (), 1: ("red",), 2: ("orange", "red")}  # by the number of lines
NO_NUMBER = {"type": "special", "options": {"match": "null+nan", "result": {"text": "no traffic"}}}
LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}


@dataclass(frozen=True)
class Query:
    """legend: in Grafana's words, ``{{label}}``. optional: on a healthy endpoint there may be no series."""

    expr: str
    legend: str = "{{model}}"
    optional: bool = False


@dataclass(frozen=True)
class Panel:
    """text: what one sees and what to do. unit: Grafana's name of it. width: of 24; height: in steps of 30 pixels.

    lines: where colours change, and in a timeseries a line; the figures of the alert ``runbook``. least, most: of the
    axis. shares: stacked, as shares of their sum. empty: what to say instead of "No data". columns: of a table.
    names: of values, with their colours. each_model: the panel again for every model.
    """

    title: str
    text: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "bargauge", "heatmap", "table"] = "timeseries"
    unit: str = "short"
    width: int = 12
    height: int = 8
    lines: tuple[float, ...] = ()
    runbook: str = ""
    least: float | None = 0.0
    most: float | None = None
    shares: bool = False
    empty: str = ""
    columns: tuple[str, ...] = ()
    names: tuple[tuple[float, str, str], ...] = ()
    each_model: bool = False

    def json(self, number: int, x: int, y: int) -> Json:
        made: Json = {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.text,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "datasource": SOURCE,
            "targets": [self._target(index, query) for index, query in enumerate(self.queries)],
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": self._options(),
        }
        if self.runbook:
            made["links"] = [{"title": "What to do", "url": f"{DOCS}/runbooks/{self.runbook}.md", "targetBlank": True}]
        if self.each_model:
            made |= {"repeat": "model", "repeatDirection": "h", "maxPerRow": 2}
        if self.columns:
            order = {name: place for place, name in enumerate(self.columns)}
            made["transformations"] = [
                {"id": "filterFieldsByName", "options": {"include": {"names": list(self.columns)}}},
                {"id": "organize", "options": {"indexByName": order}},
            ]
        return made

    def _target(self, index: int, query: Query) -> Json:
        once = self.kind in ("bargauge", "table")
        return {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "format": {"heatmap": "heatmap", "table": "table"}.get(self.kind, "time_series"),
            "instant": once,
            "range": not once,
        }

    def _defaults(self) -> Json:
        steps = zip((None, *self.lines), ("green", *COLOURS[len(self.lines)]), strict=True)
        made: Json = {
            "unit": self.unit,
            "thresholds": {"mode": "absolute", "steps": [{"value": at, "color": colour} for at, colour in steps]},
            "color": {"mode": "palette-classic" if self.kind == "timeseries" else "thresholds"},
            "mappings": [self._named(), NO_NUMBER] if self.kind in ("stat", "bargauge") else [],
        }
        made |= {name: value for name, value in (("min", self.least), ("max", self.most)) if value is not None}
        if self.empty:
            made["noValue"] = self.empty
        if self.kind == "timeseries":
            made["custom"] = {
                "lineWidth": 1,
                "fillOpacity": 40 if self.shares else 10,
                "showPoints": "auto",
                "stacking": {"mode": "percent" if self.shares else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.lines else "off"},
            }
        return made

    def _named(self) -> Json:
        named = {f"{value:g}": {"text": text, "color": colour} for value, text, colour in self.names}
        return {"type": "value", "options": named}

    def _overrides(self) -> list[Json]:
        """In a table of alerts each leads to its runbook."""
        if "alertname" not in self.columns:
            return []
        link = {"title": "What to do", "url": f"{DOCS}/runbooks/${{__value.raw}}.md", "targetBlank": True}
        matched = {"id": "byName", "options": "alertname"}
        return [{"matcher": matched, "properties": [{"id": "links", "value": [link]}]}]

    def _options(self) -> Json:
        match self.kind:
            case "timeseries":
                legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]}
                return {"legend": legend | {"showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}}
            case "stat":
                return {"reduceOptions": LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"}
            case "bargauge":
                return {"reduceOptions": LAST, "orientation": "horizontal", "displayMode": "basic"}
            case "table":
                return {"showHeader": True, "cellHeight": "sm"}
            case "heatmap":
                return {
                    "calculate": False,
                    "yAxis": {"unit": self.unit},
                    "color": {"mode": "scheme", "scheme": "Oranges", "scale": "exponential", "exponent": 0.5}
                    | {"steps": 64, "fill": "dark-orange", "reverse": False},
                    "cellGap": 1,
                    "filterValues": {"le": 1e-9},
                    "rowsFrame": {"layout": "auto"},
                    "legend": {"show": True},
                    "tooltip": {"mode": "single", "yHistogram": False},
                }


@dataclass(frozen=True)
class Dashboard:
    """uid: of its address, never to change. rows: of panels of one height, each at most 24 wide."""

    uid: str
    title: str
    text: str
    rows: tuple[tuple[Panel, ...], ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row)

    def json(self) -> Json:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.text,
            "tags": ["guard"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "timezone": "browser",
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "annotations": {"list": []},
            "templating": {"list": [_source(), _models()]},
            "links": [
                {"type": "dashboards", "title": "Guard", "tags": ["guard"], "asDropdown": False}
                | {"includeVars": True, "keepTime": True, "targetBlank": False},
                {"type": "link", "title": "Runbooks", "url": f"{DOCS}/runbooks/README.md", "targetBlank": True}
                | {"icon": "doc"},
            ],
            "panels": self._placed(),
        }

    def _placed(self) -> list[Json]:
        placed: list[Json] = []
        y = 0
        for row in self.rows:
            x = 0
            for panel in row:
                placed.append(panel.json(len(placed) + 1, x, y))
                x += panel.width
            y += max(panel.height for panel in row)
        return placed


def _source() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _models() -> Json:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": MODELS, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
