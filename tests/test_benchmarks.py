"""The benchmarks run."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks import twin_cost


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
