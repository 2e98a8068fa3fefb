"""Flagged images on disk: for each a PNG and a line of JSON, under a name that tells the time and is ours.

Processes share a folder without a lock: names are never taken twice, files appear whole, and whoever removes what
another one has just removed does not mind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from deployments.settings import Settings, checked
from guard.errors import BadData, BadSetting

STEM = re.compile(r"(\d{8}T\d{6}\.\d{6})Z-[0-9a-f]{16}")
FILE = re.compile(rf"\.?({STEM.pattern})\.(png|json)(\.part)?")
STAMP = "%Y%m%dT%H%M%S.%f"
STALE_S = 600.0  # after which nobody is still writing a draft


class Entry(Settings):
    """One flagged image.

    time: ISO 8601. request: what the client called its request. label, predicted_class: the original network's
    decision. score, p_value: see `guard.types.Verdict`. version, fingerprint: of the artifact and of its
    weights. file: the PNG, in the same folder.
    """

    time: datetime
    model: str
    request: str | None = None
    label: int = Field(ge=0)
    predicted_class: str
    score: float
    p_value: float | None = None
    version: str
    fingerprint: str
    file: str = Field(pattern=rf"^{STEM.pattern}\.png$")


class Held(NamedTuple):
    """What lies under one stem. bytes: of all its files. since: when it was written, Unix time, by its name."""

    stem: str
    bytes: int
    since: float


def make(folder: Path) -> None:
    """The folder, of mode 0700.

    Raises:
        OSError: it cannot be made, or is there and lets others in.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise PermissionError(f"{folder} lets others in: chmod 700 it, or name a folder in it that is not there yet")


def put(folder: Path, picture: bytes, facts: dict[str, object], now: float) -> str:
    """Write an image and its line; returns its stem. facts: of `Entry`, without the file.

    Raises:
        OSError: nothing of it is there.
    """
    stem = f"{datetime.fromtimestamp(now, UTC).strftime(STAMP)}Z-{secrets.token_hex(8)}"
    line = json.dumps({**facts, "file": f"{stem}.png"}, allow_nan=False) + "\n"
    try:
        _write(folder, f"{stem}.png", picture)
        _write(folder, f"{stem}.json", line.encode())
    except OSError:
        with contextlib.suppress(OSError):
            remove(folder, stem)
        raise
    return stem


def held(folder: Path) -> list[Held]:
    """What the folder holds of ours, oldest first; files of others do not count. Empty where there is no folder."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(folder) as files:
            for file in files:
                found = FILE.fullmatch(file.name)
                if found is None:
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    status = file.stat(follow_symlinks=False)
                    if found[4] and time.time() - status.st_mtime < STALE_S:
                        continue  # being written
                    sizes[found[1]] = sizes.get(found[1], 0) + status.st_size
    except FileNotFoundError:
        return []
    return [Held(stem, sizes[stem], _since(stem)) for stem in sorted(sizes)]


def remove(folder: Path, stem: str) -> None:
    """Remove what lies under a stem, drafts included; nothing is no error."""
    for name in (f"{stem}.json", f"{stem}.png", f".{stem}.json.part", f".{stem}.png.part"):
        (folder / name).unlink(missing_ok=True)


def prune(folder: Path, *, max_images: int, max_bytes: int, oldest: float) -> None:
    """Remove the oldest until no more than ``max_images`` of ``max_bytes`` together are left, none of them from before
    ``oldest`` (Unix time)."""
    there = held(folder)
    images, size = len(there), sum(one.bytes for one in there)
    for one in there:
        if images <= max_images and size <= max_bytes and one.since >= oldest:
            return
        remove(folder, one.stem)
        images, size = images - 1, size - one.bytes


def entries(folder: Path) -> list[Entry]:
    """The images of a folder by their lines, oldest first; what is removed meanwhile, or is whole no more, is left out.

    Raises:
        BadData: there is no such folder.
    """
    if not folder.is_dir():
        raise BadData(f"quarantine: there is no folder {folder}.", field="quarantine")
    return [entry for one in held(folder) if (entry := read(folder, one)) is not None]


def read(folder: Path, one: Held) -> Entry | None:
    """An image by its line; None where it is gone, or whole no more."""
    with contextlib.suppress(OSError, ValueError, RecursionError, BadSetting):
        entry = checked(Entry, json.loads((folder / f"{one.stem}.json").read_bytes()))
        if entry.file == f"{one.stem}.png" and (folder / entry.file).is_file():
            return entry
    return None


def chosen(
    given: Iterable[Entry], name: str | None, *, before: float | None = None, fingerprint: str | None = None
) -> list[Entry]:
    """Those of the class ``name`` (its name or its index; None: all), from before ``before`` (Unix time), flagged by a
    network with this fingerprint."""
    return [
        entry
        for entry in given
        if (name is None or name in (entry.predicted_class, str(entry.label)))
        and (before is None or entry.time.timestamp() < before)
        and (fingerprint is None or entry.fingerprint == fingerprint)
    ]


def _since(stem: str) -> float:
    found = STEM.fullmatch(stem)
    try:
        return datetime.strptime("" if found is None else found[1], STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError:  # nobody's time: of no age
        return 0.0


def _write(folder: Path, name: str, content: bytes) -> None:
    """A new file of mode 0600, whole or not at all."""
    draft = folder / f".{name}.part"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.rename(folder / name)
