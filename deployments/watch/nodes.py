"""Counters of several nodes: each node reads its own folder, and the one that adds up keeps copies beside its own.

FOLDER/*.db, FOLDER/models/*.json               this node's
FOLDER/nodes/PLACE/*.db, …/models/*.json        copies of another's; counters stay when the node has gone
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from prometheus_client.mmap_dict import MmapedDict

from deployments.watch.facts import FOLDER as FACTS
from deployments.watch.facts import NODES, living_facts, running

HEAD = 8  # bytes at the start of a file of counters, the first four of which say how many are used
LIVE = "gauge_live*.db"  # what only living processes say
NAME = re.compile(rf"[\w-]+\.db|{FACTS}/[^/]+\.json")  # of a file that another node may send
log = logging.getLogger(__name__)


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
    forget_dead_gauges(folder)
    found: dict[str, bytes] = {}
    for path in (*folder.glob("*.db"), *living_facts(folder)):
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

    def heard(self, nodes: set[str]) -> bool:
        """Whether each of these has been heard."""
        return nodes <= set(self._places)

    def keep_only(self, nodes: set[str]) -> None:
        """Forget what nodes that are not among these said of themselves; what they counted stays. Nothing is forgotten
        before each of these has been heard."""
        self._places = {node: place for node, place in self._places.items() if node in nodes}
        if not self.heard(nodes):
            return
        there = {self._of(place) for place in self._places.values()}
        for folder in (self._folder / NODES).glob("*/"):
            if folder not in there:
                shutil.rmtree(folder / FACTS, ignore_errors=True)
                for path in folder.glob(LIVE):
                    path.unlink(missing_ok=True)

    def _of(self, place: str) -> Path:
        return self._folder / NODES / re.sub(r"\W", "", place)

    def _keep(self, folder: Path, snapshot: Snapshot) -> None:
        (folder / FACTS).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in snapshot.changed.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r}: not a name of a file of counters")
            draft = folder / f"{name}.part"
            draft.write_bytes(content)
            if name.endswith(".db") and not readable(draft):
                log.warning("%s of another node cannot be read: its last copy stays", name)
                draft.unlink()
                continue
            draft.replace(folder / name)
        for path in (*folder.glob(LIVE), *(folder / FACTS).glob("*.json")):
            if str(path.relative_to(folder)) not in snapshot.there:
                path.unlink(missing_ok=True)


def files(folder: Path) -> list[str]:
    """Every file of counters, of this node and of others."""
    return [str(path) for path in (*folder.glob("*.db"), *folder.glob(f"{NODES}/*/*.db"))]


def readable(path: Path) -> bool:
    """Whether every counter in the file can be read."""
    try:
        for key, _, _, _ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]
            json.loads(key)
    except (OSError, ValueError, RuntimeError, struct.error, IndexError):
        return False
    return True


def forget_dead_gauges(folder: Path) -> None:
    """Remove the gauges of processes of this node that are dead. What they counted stays."""
    for path in folder.glob(LIVE):
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not running(int(found.group(1))):
            path.unlink(missing_ok=True)


def place(folder: Path) -> str:
    """A name that the folder got when it was first asked: the same for every way to it, from every node that shares it,
    and after a restart; another for a folder that was made anew in its place."""
    name = folder / "id"
    if not name.exists():
        draft = folder / f".id.{os.getpid()}"
        draft.write_text(secrets.token_hex(8))
        with suppress(FileExistsError):  # another process was first
            os.link(draft, name)
        draft.unlink()
    return name.read_text()


def _used(path: Path) -> bytes:
    content = path.read_bytes()
    (used,) = struct.unpack_from("i", content)
    if used < HEAD:
        raise struct.error("no head yet")
    return content[:used]
