"""The benchmarks run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import serving_cost, twin_cost

pytestmark = pytest.mark.alone


def test_the_twins_cost_is_measured_in_pairs(tmp_path: Path) -> None:
    """Each row holds both times of the same run, and a twin that starts late costs less than one of all sites."""
    options = ["--batches", "8", "--runs", "3", "--no-compile", "--size", "64", "--json", str(tmp_path / "cost.json")]
    done = CliRunner().invoke(twin_cost.main, options)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    ratios = {(row["dtype"], row["corrected"]): row["ratio"] for row in rows}
    assert len(ratios) == 4
    assert all(row["original_ms"] < row["twin_ms"] for row in rows)
    assert ratios["float32", "from the middle"] < ratios["float32", "all sites"] < 3.0


def test_what_a_request_costs(tmp_path: Path) -> None:
    """Images sent elsewhere skip bna's corrected network; mmdf pays for every image, bna for those of its class."""
    path = tmp_path / "cost.json"
    done = CliRunner().invoke(serving_cost.main, ["--rounds", "2", "--requests", "10", "--json", str(path)])
    assert done.exit_code == 0, done.output
    ratio = {(row["traffic"], row["system"]): row["ratio"] for row in json.loads(path.read_text())["rows"]}
    other, suspected, _ = serving_cost.TRAFFIC
    _, mmdf, one, nothing, beside = dict.fromkeys(system for _, system in ratio)
    assert ratio[other, mmdf] > 1.4
    assert ratio[other, beside] < ratio[other, mmdf]
    assert max(ratio[other, one], ratio[other, nothing], ratio[suspected, nothing]) < 1.3
    assert ratio[suspected, one] > 1.4
