"""Every figure names what it was measured with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_a_benchmark_tells_how_it_was_called(tmp_path: Path) -> None:
    """The command without folders and without where the figures went, the commit, the machine, and the figures."""
    path = tmp_path / "out" / "cost.json"
    options = ["--batches", "1", "--no-compile", "--runs", "1", "--model", "squeezenet1_1", "--json", str(path)]
    subprocess.run([sys.executable, "-m", "benchmarks.twin_cost", *options], cwd=ROOT, check=True, capture_output=True)
    found = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks.twin_cost --batches 1 --no-compile --runs 1 --model squeezenet1_1"
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", found["commit"])
    assert found["hardware"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert found["rows"][0]["ratio"] > 0.0


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--data", "/a/b/c.npz", "--rates", ""], '--data c.npz --rates ""'),
        (["--json=/x/y.json", "--seeds", "0"], "--seeds 0"),
        (["--json", "/a b/c.json", "--seeds", "0"], "--seeds 0"),
        (["--rounds", "3", "--out", "load/"], "--rounds 3"),
        (["--data", "torchvision:CIFAR10:/data"], "--data torchvision:CIFAR10:data"),
        (["--data=/data/cifar/", "--share", "1/2"], "--data=cifar --share 1/2"),
        (["--cases", "a b"], "--cases 'a b'"),
    ],
)
def test_a_command_without_its_folders(typed: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of the machine that measured is told."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/run.py", *typed])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert record.command() == f"python run.py {told}"


def test_no_figure_without_its_file() -> None:
    """Each command that the docs name as the source of figures has a file in benchmarks/results that it made."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "decisions").glob("*.md")]
    named = {
        command
        for page in pages
        for command in re.findall(r"`(python -m benchmarks\.(?!lab)\w+[^`]*)`", page.read_text().replace("\n", " "))
    }
    made = {json.loads(path.read_text()).get("command") for path in RESULTS.rglob("*.json")}
    assert named, "the docs name no command"
    assert named <= made, named - made
