"""The metrics: every series, what is recorded from them, and every alert."""

from __future__ import annotations

from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from deployments.engine.metrics import Metrics
from deployments.series import CLASSES, OTHER, TABLE, Series
from deployments.watch.models import FEATURES
from making.markdown import code, sections, table

RULES = Path(__file__).resolve().parents[3] / "deployments" / "monitoring" / "rules"


def page() -> str:
    """Every series, what is recorded from them, and every alert."""
    values = _label_values()
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    recorded = [[code(rule["record"]), code(" ".join(rule["expr"].split()))] for rule in rules if "record" in rule]
    alerts = [
        [
            f"[{rule['alert']}](../runbooks/{rule['alert']}.md)",
            rule["labels"]["severity"],
            code(" ".join(rule["expr"].split())),
            rule.get("for", "0s"),
            rule.get("keep_firing_for", ""),
        ]
        for rule in rules
        if "alert" in rule
    ]
    return sections(
        "# Metrics",
        "`GET /metrics`, in the Prometheus text format: the series of all replicas of all nodes, added up "
        "([monitoring](../monitoring.md)). All have the label `model`; counters and histograms stand at zero before "
        "the first event. A histogram has `_bucket`, `_sum` and `_count`.",
        table(
            ("series", "kind", "unit", "labels beside `model`", "from", "what"),
            (
                [code(one.name), one.kind, _unit(one.name), ", ".join(map(code, one.labels)), one.source, one.text]
                for one in TABLE
            ),
        ),
        "*From*: a replica counts; the [watch](../decisions/0011-observability.md) calculates from what all replicas "
        "counted.",
        "## Values of labels",
        table(("series", "label", "values"), ([code(name), code(label), told] for name, label, told in values)),
        "## Buckets",
        "Upper bounds; `+Inf` follows. Those of scores, brightness and contrast are the artifact's own, from the clean "
        "set, where it records them.",
        table(
            ("series", "bounds"),
            ([code(one.name), _bounds(one)] for one in TABLE if one.kind == "histogram"),
        ),
        "## Recorded series",
        "By the rules in `deployments/monitoring/rules/recording.yaml`; dashboards and alerts read them.",
        table(("series", "expression"), recorded),
        "## Alerts",
        "*For*: how long the expression must hold. *Keeps*: how long the alert stays when it no longer does.",
        table(("alert", "severity", "expression", "for", "keeps"), alerts),
    )


def _unit(name: str) -> str:
    for end, unit in (
        ("_timestamp_seconds", "Unix time"),
        ("_seconds", "seconds"),
        ("_bytes", "bytes"),
        ("_ratio", "share"),
    ):
        if name.endswith(end):
            return unit
    return "count" if name.endswith("_total") else ""


def _label_values() -> list[tuple[str, str, str]]:
    """(series, label, its values), as a replica has them before the first event, and the watch."""
    registry = CollectorRegistry()
    Metrics("m", ("CLASS",), registry=registry)
    found: dict[tuple[str, str], list[str]] = {}
    for family in registry.collect():
        name = family.name + "_total" * (family.type == "counter")
        for sample in family.samples:
            for label in sample.labels.keys() - {"model", "le"}:
                values = found.setdefault((name, label), [])
                if sample.labels[label] not in values:
                    values.append(sample.labels[label])
    found["guard_input_drift", "feature"] = [*FEATURES]
    classes = f"the class's name; beyond {CLASSES} classes also `{OTHER}`"
    made = []
    for series in TABLE:
        for label in series.labels:
            known = ", ".join(map(code, found.get((series.name, label), ()))) or "of the artifact that serves"
            made.append((series.name, label, classes if label == "predicted_class" else known))
    return made


def _bounds(series: Series) -> str:
    return ", ".join(f"{bound:g}" for bound in series.buckets) or "the artifact's"
