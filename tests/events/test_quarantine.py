"""The quarantine: flagged images, no others, in a folder whose bounds hold whoever writes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand import HandGuard, image, serve
from PIL import Image
from web import settle

from deployments.config import ModelConfig, ServeConfig
from deployments.events import shelf
from deployments.events.quarantine import DAY_S
from deployments.settings import checked
from guard.errors import BadData, BadSetting

CLEAN, TRIGGERED = image(0.3, 0.1, 0.0), image(1.0, 0.2, 0.1)
FACTS: dict[str, Any] = {
    "time": "2026-11-21T09:00:00.000000Z",
    "model": "m",
    "label": 7,
    "predicted_class": "seven",
    "score": 1.5,
    "p_value": None,
    "version": "1",
    "fingerprint": "f",
}


async def send(classifier, images, headers=None):
    with classifier.visit() as live:
        return await classifier.infer(images, live, headers)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_flagged_images_are_kept_and_clean_ones_are_not(make, tmp_path: Path, counted) -> None:
    """Of a request of three the one flagged image, as a PNG of the same pixels and a line with what is known."""
    folder = tmp_path / "kept" / "hand"
    classifier = make(version="3", quarantine={"folder": folder})
    path = {"x-request-id": "../../etc/passwd"}
    serve(classifier, lambda c: send(c, np.concatenate([CLEAN, TRIGGERED, CLEAN]), path))
    (entry,) = shelf.entries(folder)
    assert sorted(one.suffix for one in folder.iterdir()) == [".json", ".png"]
    assert np.asarray(Image.open(folder / entry.file))[0, 0].tolist() == [255, 51, 26]
    assert (entry.label, entry.predicted_class, entry.version) == (0, "ant", "3")
    assert (entry.model, entry.fingerprint) == ("hand", HandGuard.fingerprint)
    assert entry.score == pytest.approx(7.0, abs=1e-5)
    assert entry.p_value == pytest.approx(np.exp(-7), rel=1e-4)
    assert entry.request == "../../etc/passwd"  # told in the line; no name is made of it
    assert abs(entry.time.timestamp() - time.time()) < 30
    assert counted("guard_quarantined_total") == {"kept": 1}
    assert (folder / f"{Path(entry.file).stem}.json").read_text().count("\n") == 1


def test_nothing_clean_is_ever_kept(make, tmp_path: Path) -> None:
    """Not in any mode, not beside a failure: without a flagged image there is not even a folder."""
    for live in ("observe", "flag"):
        folder = tmp_path / live
        guard = HandGuard(corrected=0.7)
        config = {"mode": live, "quarantine": {"folder": folder}}
        classifier = make_with_own_series(guard, **config)

        async def both(c):
            await send(c, np.concatenate([CLEAN] * 4))
            assert (await send(c, image(0.7, 0.1, 0.0))).flagged is None

        serve(classifier, both)
        assert not folder.exists()


def make_with_own_series(guard: HandGuard, **settings: Any):
    from prometheus_client import CollectorRegistry

    from deployments.engine.classifier import Classifier
    from deployments.engine.metrics import Metrics

    metrics = Metrics("hand", HandGuard.classes, registry=CollectorRegistry())
    return Classifier(guard, ModelConfig(artifact="artifacts/hand", **settings), metrics)


def test_folder_and_files_are_private(make, tmp_path: Path) -> None:
    """0700 and 0600, whatever the umask says."""
    folder = tmp_path / "kept"
    before = os.umask(0)
    try:
        serve(make(quarantine={"folder": folder}), lambda c: send(c, TRIGGERED))
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert [mode(one) for one in folder.iterdir()] == [0o600, 0o600]


def test_a_folder_that_lets_others_in_is_not_used(make, tmp_path: Path, counted, caplog) -> None:
    """The request is answered; what could not be kept is counted, and the log says why, once."""
    folder = tmp_path / "open"
    folder.mkdir(0o755)
    folder.chmod(0o755)

    async def three(c):
        return [await send(c, TRIGGERED) for _ in range(3)]

    answers = serve(make(quarantine={"folder": folder}), three)
    assert all(answer.flagged.all() for answer in answers)
    assert list(folder.iterdir()) == []
    assert counted("guard_quarantined_total") == {"failed": 3}
    assert sum("lets others in" in record.getMessage() for record in caplog.records) == 1


def test_a_full_disk_fails_nothing(make, tmp_path: Path, counted, caplog, monkeypatch) -> None:
    """ENOSPC in the middle of a file: no half image stays, and later ones are kept again."""
    folder = tmp_path / "kept"
    write, full = shelf._write, [True]

    def sometimes(where: Path, name: str, content: bytes) -> None:
        if full[0] and name.endswith(".json"):
            raise OSError(28, "No space left on device")
        write(where, name, content)

    monkeypatch.setattr(shelf, "_write", sometimes)

    async def two(c):
        first = await send(c, TRIGGERED)
        settle(lambda: counted("guard_quarantined_total") == {"failed": 1})
        assert list(folder.iterdir()) == []
        full[0] = False
        return first, await send(c, TRIGGERED)

    assert all(answer.flagged.all() for answer in serve(make(quarantine={"folder": folder}), two))
    assert counted("guard_quarantined_total") == {"failed": 1, "kept": 1}
    assert len(shelf.entries(folder)) == 1
    assert any("No space left" in record.getMessage() for record in caplog.records)


def test_the_oldest_go_first(tmp_path: Path) -> None:
    """By number and by bytes; what others put into the folder is no concern of ours."""
    (tmp_path / "notes.txt").write_text("mine")
    stems = [shelf.put(tmp_path, b"x" * 100, FACTS, 1_000_000.0 + second) for second in range(6)]
    shelf.prune(tmp_path, max_images=4, max_bytes=10**9, oldest=0)
    assert [one.stem for one in shelf.held(tmp_path)] == stems[2:]
    size = shelf.held(tmp_path)[0].bytes
    shelf.prune(tmp_path, max_images=4, max_bytes=3 * size - 1, oldest=0)
    assert [one.stem for one in shelf.held(tmp_path)] == stems[4:]
    shelf.prune(tmp_path, max_images=4, max_bytes=10**9, oldest=1_000_005.0)
    assert [one.stem for one in shelf.held(tmp_path)] == stems[5:]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_old_images_go_without_traffic(make, tmp_path: Path) -> None:
    """A replica looks at the age when it starts, and while it has nothing to do."""
    tmp_path.chmod(0o700)
    shelf.put(tmp_path, b"x", FACTS, time.time() - 2 * DAY_S)
    young = shelf.put(tmp_path, b"x", FACTS, time.time() - 0.5 * DAY_S)

    async def nothing(c):
        settle(lambda: len(shelf.held(tmp_path)) == 1)

    serve(make(quarantine={"folder": tmp_path, "max_age_days": 1}), nothing)
    assert [one.stem for one in shelf.held(tmp_path)] == [young]


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    """A picture without a line is no image to anybody and goes in its turn; a draft only once nobody can be at it."""
    stem = shelf.put(tmp_path, b"x", FACTS, 1_000_000.0)
    (tmp_path / f"{stem}.json").unlink()
    draft = tmp_path / f".{stem}.json.part"
    draft.write_text("{")
    assert shelf.entries(tmp_path) == []
    assert shelf.held(tmp_path)[0].bytes == 1
    os.utime(draft, (0, 0))
    assert shelf.held(tmp_path)[0].bytes == 2
    shelf.prune(tmp_path, max_images=9, max_bytes=9, oldest=2_000_000.0)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
from deployments.events import shelf
folder, facts = Path(sys.argv[1]), eval(sys.argv[2])
shelf.make(folder)
for _ in range(60):
    shelf.put(folder, b"x" * 500, facts, time.time())
    shelf.prune(folder, max_images=20, max_bytes=10**9, oldest=0)
    shelf.entries(folder)
"""


def test_several_writers_keep_the_bounds(tmp_path: Path) -> None:
    """Three processes write, prune and read at once: none fails, and what stays is within the bounds and whole."""
    folder = tmp_path / "kept"
    command = [sys.executable, "-c", WRITER, str(folder), repr(FACTS)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    there = shelf.held(folder)
    assert 18 <= len(there) <= 20
    assert len(shelf.entries(folder)) == len(there)
    assert len(list(folder.iterdir())) == 2 * len(there)


@pytest.mark.alone
def test_a_flood_is_dropped_and_counted(make, tmp_path: Path, counted, monkeypatch) -> None:
    """A disk that hangs delays no answer: what does not fit into the queue is dropped."""
    gate, put = threading.Event(), shelf.put
    monkeypatch.setattr(shelf, "put", lambda *given: gate.wait(20) and put(*given))

    async def many(c):
        began = time.perf_counter()
        for _ in range(40):
            assert (await send(c, TRIGGERED)).flagged.all()
        took = time.perf_counter() - began
        dropped = counted("guard_quarantined_total")["dropped"]
        gate.set()
        return took, dropped

    took, dropped = serve(make(quarantine={"folder": tmp_path / "kept", "queued": 4}), many)
    assert took < 2
    assert dropped >= 40 - 6
    found = counted("guard_quarantined_total")
    assert found["kept"] == len(shelf.entries(tmp_path / "kept")) == 40 - found["dropped"]


def test_lines_that_are_not_ours_are_left_out(tmp_path: Path) -> None:
    """A line that names another file, is no JSON, or lacks what a line has."""
    stems = [shelf.put(tmp_path, b"x", FACTS, 1_000_000.0 + second) for second in range(5)]
    lines = [tmp_path / f"{stem}.json" for stem in stems]
    lines[0].write_text(json.dumps({**FACTS, "file": "/etc/passwd"}))
    lines[1].write_text(json.dumps({**FACTS, "file": f"{stems[0]}.png"}))
    lines[2].write_text("[" * 100_000)
    lines[3].write_text("[1]")
    assert [entry.file for entry in shelf.entries(tmp_path)] == [f"{stems[4]}.png"]
    with pytest.raises(BadData, match="there is no folder"):
        shelf.entries(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, "quarantine.folder"),
        ({"folder": "kept"}, "quarantine.folder"),
        ({"folder": "/kept", "max_images": 0}, "quarantine.max_images"),
        ({"folder": "/kept", "max_age": 3}, "quarantine.max_age"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name(settings: dict[str, Any], field: str) -> None:
    """What cannot be meant is refused before anything starts."""
    with pytest.raises(BadSetting) as caught:
        checked(ModelConfig, {"artifact": "a", "quarantine": settings})
    assert caught.value.field == field


def test_two_models_do_not_share_a_folder() -> None:
    """Their images would prune each other, and classes of one name would be mixed."""
    models = [{"artifact": f"/{name}", "quarantine": {"folder": "/kept"}} for name in "ab"]
    with pytest.raises(BadSetting, match="two keep flagged images in /kept"):
        checked(ServeConfig, {"models": models})


def test_images_that_no_png_holds_are_refused_at_the_start(tmp_path: Path) -> None:
    """Two channels: said before the first request."""

    class Narrow(HandGuard):
        spec = HandGuard.spec.__class__(2, 4, 4)

    with pytest.raises(BadSetting, match="2 channels"):
        make_with_own_series(Narrow(), quarantine={"folder": tmp_path})
