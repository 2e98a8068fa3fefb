"""Counters of several nodes: each node reads its own folder, and the one that adds up keeps copies beside its own.

FOLDER/*.db, FOLDER/models/*.json               this node's
FOLDER/nodes/PLACE/*.db, …/models/*.json        copies of another's; counters stay when the node has gone
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from deployments.watch.facts import FOLDER as FACTS
from deployments.watch.facts import NODES, forget_dead_facts, running

HEAD = 8  # bytes at the start of a file of counters, the first four of which say how many are used
LIVE = "gauge_live*.db"  # what only living processes say


class Snapshot(NamedTuple):
    """What lies in a node's folder. place: which folder of which machine it is, since nodes may share one. there: every
    file, by its path in the folder, with the checksum of its content. changed: those that the other side does not have
    so, with their content."""

    place: str
    there: dict[str, int]
    changed: dict[str, bytes]


def read(folder: Path, known: Mapping[str, int]) -> Snapshot:
    """The folder of the node that this runs on, for another that has files with the checksums ``known``. What dead
    processes said of themselves is removed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a node without replicas has none
    forget_dead(folder)
    found: dict[str, bytes] = {}
    for path in (*folder.glob("*.db"), *(folder / FACTS).glob("*.json")):
        with suppress(OSError, struct.error):  # of a process that has just begun, or ended
            found[str(path.relative_to(folder))] = _used(path) if path.suffix == ".db" else path.read_bytes()
    there = {name: crc32(content) for name, content in found.items()}
    changed = {name: content for name, content in found.items() if known.get(name) != there[name]}
    return Snapshot(place(folder), there, changed)


class Copies:
    """The copies that lie in ``folder``/nodes, one of each place that nodes have their files in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, str] = {}  # node → place
        self._known: dict[str, dict[str, int]] = {}  # place → file → checksum

    def known(self, node: str) -> Mapping[str, int]:
        """What there is of a node already: file → checksum."""
        return self._known.get(self._places.get(node, ""), {})

    def update(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Take in what nodes say, by their names. What lies in this folder itself is counted already."""
        here = place(self._folder)
        for node, snapshot in snapshots.items():
            self._places[node] = snapshot.place
            if snapshot.place != here:
                self._keep(self._of(snapshot.place), snapshot)
            self._known[snapshot.place] = snapshot.there

    def keep_only(self, nodes: set[str]) -> None:
        """Forget what nodes that are not among these said of themselves; what they counted stays. Nothing is forgotten
        before each of these has been heard."""
        self._places = {node: place for node, place in self._places.items() if node in nodes}
        if nodes - set(self._places):
            return
        there = {self._of(place) for place in self._places.values()}
        for folder in (self._folder / NODES).glob("*/"):
            if folder not in there:
                shutil.rmtree(folder / FACTS, ignore_errors=True)
                for path in folder.glob(LIVE):
                    path.unlink(missing_ok=True)

    def _of(self, place: str) -> Path:
        return self._folder / NODES / f"{crc32(place.encode()):08x}"

    def _keep(self, folder: Path, snapshot: Snapshot) -> None:
        (folder / FACTS).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in snapshot.changed.items():
            draft = folder / f"{name}.part"
            draft.write_bytes(content)
            draft.replace(folder / name)
        for path in (*folder.glob(LIVE), *(folder / FACTS).glob("*.json")):
            if str(path.relative_to(folder)) not in snapshot.there:
                path.unlink(missing_ok=True)


def files(folder: Path) -> list[str]:
    """Every file of counters, of this node and of others."""
    return [str(path) for path in (*folder.glob("*.db"), *folder.glob(f"{NODES}/*/*.db"))]


def forget_dead(folder: Path) -> None:
    """Remove what processes of this node that are dead said of themselves. What they counted stays."""
    for path in folder.glob(LIVE):
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not running(int(found.group(1))):
            path.unlink(missing_ok=True)
    forget_dead_facts(folder)


def place(folder: Path) -> str:
    """The machine and the folder on it; the same for every path to it."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = ""
    there = folder.stat()
    return f"{machine}:{there.st_dev}:{there.st_ino}"


def _used(path: Path) -> bytes:
    content = path.read_bytes()
    (used,) = struct.unpack_from("i", content)
    if used < HEAD:
        raise struct.error("no head yet")
    return content[:used]
