"""What README.md and the pages in docs/ show is what happens."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, text) of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_python_prints_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten lines run as they stand: clean digits keep their label, triggered ones are flagged and mended."""
    found = blocks(ROOT / "README.md")
    index = next(i for i, (info, _) in enumerate(found) if info == "python")
    code, shown = found[index][1], found[index + 1][1]
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    printed, expected = out.getvalue().splitlines(), shown.splitlines()
    clean, triggered = (line.replace("[", "").split("] ") for line in printed)
    assert printed[0] == expected[0]
    assert triggered[0] == "7, 7, 7, 7, 7, 7"
    assert "False" not in triggered[1]
    mended = sum(a == b for a, b in zip(triggered[2].rstrip("]").split(", "), clean[0].split(", "), strict=True))
    assert mended >= 5  # training differs in the last digits from one processor to the next


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models" / "networks.py").is_file(), reason="../shared is absent")
def test_the_page_on_checkpoints_runs(tmp_path: Path) -> None:
    """Every block of the page runs in order, in a folder with the three files it names."""
    for file in ("models/networks.py", "models/ibau-badnets.safetensors", "data/cifar10_lossless.npz"):
        shutil.copy(SHARED / file, tmp_path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = ""
    for info, text in blocks(ROOT / "docs" / "guard-a-checkpoint.md"):
        if info in ("python", "bash"):
            command = [sys.executable, "-c", text] if info == "python" else ["bash", "-euc", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            printed += done.stdout
    guarded = re.findall(r"^guarded +(\S+%) +(\S+%) +(\S+%)$", printed, re.MULTILINE)[-1]
    assert guarded == ("82.8%", "0.0%", "79.2%")
    assert (tmp_path / "plots" / "roc.png").stat().st_size > 10_000
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 518


def test_links_in_pages_lead_somewhere() -> None:
    """Every relative link of README.md and docs/ names a file that is there."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        (page.name, target)
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
