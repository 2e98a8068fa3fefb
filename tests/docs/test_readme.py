"""What README.md and the pages in docs/ show is what happens."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from pages import ROOT, blocks, documented
from running import CHECKPOINT, FRONT, SHARED, Told


@pytest.mark.alone
def test_the_readmes_python_prints_what_the_readme_says(ran: Callable[[str], Told]) -> None:
    """The ten lines run as they stand: clean digits keep their label, triggered ones are flagged and mended."""
    found = blocks(ROOT / FRONT)
    index = next(i for i, block in enumerate(found) if block.info == "python")
    shown = found[index + 1].text.splitlines()
    printed = ran(FRONT).printed[f"{FRONT}:{found[index].line}"].splitlines()
    clean, triggered = (line.replace("[", "").split("] ") for line in printed)
    assert printed[0] == shown[0]
    assert triggered[0] == "7, 7, 7, 7, 7, 7"
    assert "False" not in triggered[1]
    mended = sum(a == b for a, b in zip(triggered[2].rstrip("]").split(", "), clean[0].split(", "), strict=True))
    assert mended >= 5  # training differs in the last digits from one processor to the next


@pytest.mark.alone
@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models" / "networks.py").is_file(), reason="../shared is absent")
def test_the_page_on_checkpoints_measures_what_it_says(ran: Callable[[str], Told]) -> None:
    """The figures of its table, and the files that it promises."""
    told = ran(CHECKPOINT)
    printed = "".join(told.printed.values())
    guarded = re.findall(r"^guarded +(\S+%) +(\S+%) +(\S+%)$", printed, re.MULTILINE)[-1]
    assert guarded == ("82.8%", "0.0%", "79.2%")
    assert (told.folder / "plots" / "roc.png").stat().st_size > 10_000
    assert len((told.folder / "scores.csv").read_text().splitlines()) == 518


def test_links_in_pages_lead_somewhere() -> None:
    """Every relative link of README.md, SECURITY.md and docs/ names a file that is there."""
    broken = [
        (page.name, target)
        for page in documented()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
