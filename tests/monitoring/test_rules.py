"""Rules: each alert is silent just before it should ring and rings when it should, and names only what is exported."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.engine.metrics import EVENTS, FAILURES, STAGES, VERDICTS
from deployments.series import SERIES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deployments/monitoring/rules").glob("*.yaml"))
ALERTS = [path for path in FILES if path.stem != "recording"]
CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
RUNBOOKS = ROOT / "docs/runbooks"
PAGES = sorted(RUNBOOKS.glob("*.md"))

HEADINGS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
URL = "https://github.com/backdoor-guard/backdoor-guard/blob/main/docs/runbooks"
VALUES = {
    "verdict": {*VERDICTS},
    "stage": {*STAGES},
    "outcome": {*EVENTS, *(outcome for _stage, outcome in FAILURES)},
}
ANYWAY = {"job", "instance", "model", "le"}  # labels that no table names
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)
by_file = pytest.mark.parametrize("path", ALERTS, ids=lambda path: path.stem)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def run(*command: str | Path) -> None:
    done = subprocess.run(["promtool", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def name(path: Path) -> str:
    """guard-no-data.yaml → GuardNoData."""
    return "".join(word.title() for word in path.stem.split("-"))


def recorded() -> set[str]:
    return {rule["record"] for path in FILES for rule in rules(path) if "record" in rule}


def metrics(text: str) -> set[str]:
    """The names of series, exported or recorded, in an expression or a page."""
    return set(re.findall(r"\b(?:[a-z_]+:)?guard_[a-z_]+(?::[a-z0-9_]+)?(?!\w)", text))


def exported(metric: str) -> str | None:
    """The family of an exported series; None where there is none of this name."""
    family = re.sub(r"_(bucket|sum|count)$", "", metric)
    if family != metric and family in SERIES and SERIES[family].kind == "histogram":
        return family
    return metric if metric in SERIES and SERIES[metric].kind != "histogram" else None


def unknown(text: str) -> set[str]:
    return {metric for metric in metrics(text) if exported(metric) is None} - recorded()


def blocks(page: Path, language: str) -> list[str]:
    """Of code in this language, also within lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _indent, block in found]


@promtool
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_promtool_takes_every_file(path: Path) -> None:
    """Prometheus loads it, and no rule is there twice."""
    run("check", "rules", "--lint=all", "--lint-fatal", path)


@promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_promtool_agrees_with_every_case(case: Path) -> None:
    """Labels, annotations and times of all alerts, and values of recorded series."""
    run("test", "rules", case)


def test_every_file_has_cases() -> None:
    assert [case.name for case in CASES] == [path.name for path in FILES]
    for case in CASES:
        assert f"../../../deployments/monitoring/rules/{case.name}" in yaml.safe_load(case.read_text())["rule_files"]


def test_every_recorded_series_has_a_value_in_a_case() -> None:
    (case,) = (case for case in CASES if case.stem == "recording")
    queries = [query for test in yaml.safe_load(case.read_text())["tests"] for query in test["promql_expr_test"]]
    assert metrics(" ".join(query["expr"] for query in queries if query["exp_samples"])) == recorded()


@by_file
def test_a_file_has_one_alert(path: Path) -> None:
    """Of the file's name; once for each severity."""
    found = rules(path)
    assert {rule["alert"] for rule in found} == {name(path)}
    severities = [rule["labels"]["severity"] for rule in found]
    assert len(severities) == len({*severities})
    assert {*severities} <= {"critical", "warning", "info"}
    for rule in found:
        assert "for" in rule
        assert {*rule["labels"]} == {"severity"}
        assert {*rule["annotations"]} == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"{URL}/{name(path)}.md"


@by_file
def test_an_alert_is_seen_silent_and_then_ringing(path: Path) -> None:
    """For each severity some case has a moment without it, and within a minute one with it."""
    tests = yaml.safe_load((Path(__file__).parent / "rules" / path.name).read_text())["tests"]
    for severity in (rule["labels"]["severity"] for rule in rules(path)):
        assert any(_turns(test["alert_rule_test"], name(path), severity) for test in tests), severity


def _turns(moments: list[dict[str, Any]], alert: str, severity: str) -> bool:
    seen = [
        (_seconds(moment["eval_time"]), severity in {one["exp_labels"]["severity"] for one in moment["exp_alerts"]})
        for moment in ({"exp_alerts": []} | moment for moment in moments)
        if moment["alertname"] == alert
    ]
    return any(not early and late and then - now <= 60 for (now, early), (then, late) in itertools.pairwise(seen))


def _seconds(time: str) -> int:
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([hms])", time))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_expressions_name_what_is_exported(path: Path) -> None:
    """Series, the labels by which they are chosen and added up, and the values of labels that have few."""
    for rule in rules(path):
        expression = rule["expr"]
        assert not unknown(expression)
        assert metrics(expression) or "up{" in expression
        chosen = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"([^\"]*)\"", expression)
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
        labels = {label for label, _value in chosen} | {label.strip() for part in grouped for label in part.split(",")}
        families = {family for metric in metrics(expression) if (family := exported(metric))}
        levels = {part for metric in metrics(expression) & recorded() for part in _level(metric)}
        assert labels <= ANYWAY | levels | {label for family in families for label in SERIES[family].labels}
        for label, value in chosen:
            assert {*value.split("|")} <= VALUES.get(label, {value}), (label, value)


@pytest.mark.parametrize("record", sorted(recorded()))
def test_a_recorded_name_says_what_is_left(record: str) -> None:
    """level:metric:operations; the level is the labels of the result."""
    (rule,) = (rule for path in FILES for rule in rules(path) if rule.get("record") == record)
    kept = {*re.findall(r"by \(([^)]*)\)", rule["expr"])[0].split(", ")} - {"le"}
    assert kept == _level(record)


def _level(record: str) -> set[str]:
    level = record.split(":")[0]
    return {level} if level == "model" else {"model", level.removeprefix("model_")}


def test_every_alert_has_a_runbook() -> None:
    """And no runbook is without its alert; the table of runbooks has one row each."""
    alerts = sorted(name(path) for path in ALERTS)
    assert sorted(page.stem for page in PAGES if page.stem != "README") == alerts
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \|", (RUNBOOKS / "README.md").read_text(), re.M)) == alerts


@by_file
def test_the_table_of_runbooks_has_the_severities(path: Path) -> None:
    (row,) = re.findall(rf"^\| \[{name(path)}\]\(.*?\) \| (.*?) \|", (RUNBOOKS / "README.md").read_text(), re.M)
    assert row.split(", ") == [rule["labels"]["severity"] for rule in rules(path)]


@by_page
def test_a_runbook_has_its_headings(page: Path) -> None:
    if page.stem != "README":
        assert re.findall(r"^## (.*)", page.read_text(), re.M) == HEADINGS
        assert page.read_text().startswith(f"# {page.stem}\n")


@by_page
def test_a_runbook_names_what_is_exported(page: Path) -> None:
    assert not unknown(page.read_text())


@by_page
def test_the_links_of_runbooks_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (RUNBOOKS / link).exists(), link


@promtool
def test_promtool_takes_the_queries_of_runbooks(tmp_path: Path) -> None:
    """Each line that is not indented begins a query."""
    queries = [query for page in PAGES for block in blocks(page, "promql") for query in re.split(r"\n(?=\S)", block)]
    assert len(queries) > len(ALERTS)
    group = {"name": "runbooks", "rules": [{"record": f"query:{i}", "expr": one} for i, one in enumerate(queries)]}
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [group]}))
    run("check", "rules", file)


@by_page
def test_the_commands_of_runbooks_exist(page: Path) -> None:
    """The guard's own: command and options."""
    from guard.cli.main import main

    for block in blocks(page, "bash"):
        for command, options in re.findall(r"^guard (\w+)(.*)", block, re.M):
            found = main.get_command(None, command)  # type: ignore[arg-type]
            assert found is not None, command
            known = {option for parameter in found.params for option in parameter.opts}
            assert {*re.findall(r"--[a-z-]+", options)} <= known, (command, options)
