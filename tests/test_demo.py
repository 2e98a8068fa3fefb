"""``guard demo`` as a newcomer runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo.json, report/index.html, what the kept endpoint said, and the demo's exit status."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "guard", "demo", "--json", "demo.json", "--report", "report", "--keep"]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=err, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
        )
        try:
            deadline = time.monotonic() + 400
            while "stays up" not in (folder / "err").read_text():
                assert process.poll() is None, (folder / "err").read_text()[-2000:]
                assert time.monotonic() < deadline, "the demo takes more than 400 seconds"
                time.sleep(0.5)
            line = re.search(r"--data-binary @(\S+) (http\S+)", (folder / "out").read_text())
            assert line is not None
            answer = httpx.post(
                line.group(2), content=Path(line.group(1)).read_bytes(), headers={"content-type": "image/png"}
            )
            (folder / "answer.json").write_text(answer.text)
        finally:
            process.send_signal(signal.SIGINT)
            (folder / "status").write_text(str(process.wait(60)))
    return folder


def test_it_shows_what_it_promises(told: Path) -> None:
    """The attack takes, the guard ends it at the stated cost, and the demo says done."""
    figures = json.loads((told / "demo.json").read_text())
    assert (told / "status").read_text() == "0"
    assert figures["original"]["asr"] >= 0.95
    assert figures["guarded"]["asr"] <= 0.02
    assert figures["original"]["acc"] - figures["guarded"]["acc"] <= 0.02
    assert figures["detection"]["fpr"] <= 0.02
    assert figures["guarded"]["acc"] - figures["guarded"]["pacc"] <= 0.10
    assert 0 < figures["latency"]["bare"]["p50"] <= figures["latency"]["bare"]["p99"]
    assert 0 < figures["latency"]["guarded"]["p50"] <= figures["latency"]["guarded"]["p99"]


def test_its_table_and_its_json_agree(told: Path) -> None:
    """The printed row of the guarded endpoint holds the JSON's figures."""
    figures = json.loads((told / "demo.json").read_text())
    row = next(line for line in (told / "out").read_text().splitlines() if line.startswith("with the guard"))
    shown = [float(part) for part in re.findall(r"([\d.]+)%", row)]
    assert shown == [pytest.approx(100 * figures["guarded"][key], abs=0.051) for key in ("acc", "asr", "pacc")]


def test_the_kept_endpoint_answers_the_printed_curl_line(told: Path) -> None:
    """The triggered picture of the curl line is flagged."""
    assert json.loads((told / "answer.json").read_text())["flagged"] is True


def test_its_report_stands_alone(told: Path) -> None:
    """One HTML file with four plots and flagged images, all inside."""
    page = (told / "report" / "index.html").read_text()
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert len(sources) >= 4 + 24
    assert all(source.startswith("data:image/png;base64,") for source in sources)
