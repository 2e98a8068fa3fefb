"""What docs/kubernetes.md installs is the chart, and what the chart then says to do can be done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pages import ROOT, Block, Command, blocks, statements, statements_in
from parsers import faults

PAGE = ROOT / "docs" / "kubernetes.md"


def test_charts_come_from_a_known_repository() -> None:
    """`helm install x repository/chart` stands behind `helm repo add repository`."""
    known: set[str] = set()
    installed = 0
    for command in (command for one in statements(PAGE) for command in one.commands if command.program == "helm"):
        if command.words[1:3] == ("repo", "add"):
            known.add(command.words[3])
        if command.words[1] == "install":
            installed += 1
            chart = command.words[3]
            assert (ROOT / chart / "Chart.yaml").is_file() or chart.split("/")[0] in known, f"{command.where}: {chart}"
    assert installed >= 2


def test_the_pages_values_install(tmp_path: Path) -> None:
    """By real Helm, under the name and with the file that the page's own line gives; what it prints can be asked."""
    pytest.importorskip("helm_sdkpy", reason="needs Helm: pip install --no-deps --ignore-requires-python helm-sdkpy")
    from rendering import render

    (install,) = (
        command
        for one in statements(PAGE)
        for command in one.commands
        if command.words[:2] == ("helm", "install") and command.words[3].startswith("helm/")
    )
    values = next(block.text for block in blocks(PAGE) if block.text.startswith(f"# {install.words[-1]}\n"))
    rendered = render(ROOT / install.words[3], yaml.safe_load(values), release=install.words[2], folder=tmp_path)
    assert {"RayService", "PodMonitor", "PrometheusRule"} <= {one["kind"] for one in rendered.objects}

    told = [command for command in _commands(rendered.notes) if command.program in ("kubectl", "curl")]
    assert len(told) >= 4
    assert [fault for command in told for fault in faults(command)] == []


def _commands(notes: str) -> list[Command]:
    """The indented lines of what Helm prints."""
    text = "\n".join(re.findall(r"^  (\S.*)$", notes, re.MULTILINE))
    return [command for one in statements_in(Block("NOTES.txt", 1, "sh", text)) for command in one.commands]
