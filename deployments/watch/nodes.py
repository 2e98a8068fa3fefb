"""Counters of several nodes: each node adds up its own folder, and the one that adds up all keeps what they say.

FOLDER/*.db, FOLDER/models/*.json               of this node's processes
FOLDER/nodes/PLACE/*.db, …/models/*.json        of another node, added up; counters stay when the node has gone
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from prometheus_client.mmap_dict import MmapedDict

from deployments.watch.facts import FOLDER as FACTS
from deployments.watch.facts import NODES, living_facts, running

HEAD = 8  # bytes at the start of a file of counters, the first four of which say how many are used
LIVE = "gauge_live*.db"  # what only living processes say
FOLDABLE = ("counter", "histogram", "gauge_livemostrecent", "gauge_mostrecent")  # kinds of files
COUNTS = ("counter_", "histogram_")  # files of what only goes up, but for sums of what has a sign
FOLDED = "node"  # in place of a process's number, in names of files that tell of all
BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
    struct.error,
    LookupError,
    TypeError,
)  # a file that cannot be read raises one of these
NAME = re.compile(rf"[\w-]+\.db|{FACTS}/[^/]+\.json")  # of a file that another node may send
log = logging.getLogger(__name__)
Entry = tuple[str, float, float]  # key, value, when (gauges; seconds since 1970)


class Snapshot(NamedTuple):
    """What a node's folder says. place: which folder of which machine it is, since nodes may share one. there: every
    file, by its path in a copy of the folder, with the checksum of its content. changed: those that the other side does
    not have so, with their content."""

    place: str
    there: dict[str, int]
    changed: dict[str, bytes]


class Node:
    """The folder of the node that this runs on. Its processes' files are added up here, one of each kind, so that
    whoever adds up all nodes has as many to read as there are nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place = ""
        self._whole: dict[Path, list[Entry]] = {}  # as each was when it could be read

    def read(self, known: Mapping[str, int]) -> Snapshot:
        """For another node, which has files with the checksums ``known``. What dead processes said of themselves is
        removed."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a node without replicas has none
        if self._place != place(self._folder):  # made anew: what was counted in the old one is kept as another place's
            self._place, self._whole = place(self._folder), {}
        forget_dead_gauges(self._folder)
        found = self._counters() | self._facts()
        there = {name: crc32(content) for name, content in found.items()}
        changed = {name: content for name, content in found.items() if known.get(name) != there[name]}
        return Snapshot(self._place, there, changed)

    def _counters(self) -> dict[str, bytes]:
        """A file of each kind, in the same format; of a gauge the newest value counts. Gauges of kinds that cannot be
        added up so, which the guard has none of, stay as they are."""
        found: dict[str, bytes] = {}
        kinds: dict[str, dict[str, tuple[float, float]]] = {}
        there = set(self._folder.glob("*.db"))
        for path in [path for path in self._whole if path not in there and path.match(LIVE)]:
            del self._whole[path]
        for path in sorted(there | set(self._whole)):  # what was counted stays, though its file be removed
            kind = path.stem.rpartition("_")[0]
            if kind not in FOLDABLE:
                with suppress(OSError, struct.error):
                    found[path.name] = _used(path.read_bytes())
                continue
            values = kinds.setdefault(kind, {})
            for key, value, at in self._entries(path):
                before, since = values.get(key, (0.0, 0.0))
                if not kind.startswith("gauge"):
                    values[key] = before + value, 0.0
                elif at >= since:
                    values[key] = value, at
        return found | {f"{kind}_{FOLDED}.db": _written(values) for kind, values in kinds.items()}

    def _entries(self, path: Path) -> list[Entry]:
        """Of a process's file; if it cannot be read, what it was when it could, so that no sum goes down."""
        try:
            self._whole[path] = entries(path)
        except FileNotFoundError:
            pass
        except BROKEN as error:
            log.warning("%s cannot be read: what it said before stays: %s", path, error)
        return self._whole.get(path, [])

    def _facts(self) -> dict[str, bytes]:
        """What living processes say of the models, each saying once."""
        said: dict[str, set[str]] = {}
        for path, one in living_facts(self._folder).items():
            if one is not None:
                text = one.model_copy(update={"began": 0}).model_dump_json()
                said.setdefault(path.stem.rpartition(".")[0], set()).add(text)
        return {
            f"{FACTS}/{model}.{number}.json": text.encode()
            for model, texts in said.items()
            for number, text in enumerate(sorted(texts))
        }


class Copies:
    """The copies that lie in ``folder``/nodes, one of each place that nodes have their files in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, str] = {}  # node → place
        self._known: dict[str, dict[str, int]] = {}  # place → file → checksum
        self._last: dict[Path, dict[str, float]] = {}  # copy → key → value, of what only goes up

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
                log.error("%r of another node is no name of a file of counters: it is left out", name)
                continue
            draft = folder / f"{name}.part"
            draft.write_bytes(content)
            if name.endswith(".db") and not self._goes_on(folder / name, draft):
                draft.unlink()
                continue
            draft.replace(folder / name)
        for path in (*folder.glob("*.db"), *(folder / FACTS).glob("*.json")):
            name = str(path.relative_to(folder))
            counted = (
                path.name.startswith(COUNTS) and f"{path.stem.rpartition('_')[0]}_{FOLDED}.db" not in snapshot.there
            )
            if name not in snapshot.there and not counted:  # also files of single processes that are added up by now
                path.unlink(missing_ok=True)

    def _goes_on(self, path: Path, draft: Path) -> bool:
        """Whether ``draft`` can be read and no counter in it is below its last copy at ``path``: an answer that is
        late, or a node that cannot read all of its files any more, would look like a new beginning."""
        try:
            values = {key: value for key, value, _ in entries(draft)}
        except BROKEN:
            log.warning("%s of another node cannot be read: its last copy stays", path.name)
            return False
        if path.name.startswith(COUNTS):
            if path not in self._last and path.exists() and readable(path):
                self._last[path] = {key: value for key, value, _ in entries(path)}
            last = self._last.get(path, {})
            if any(values.get(key, 0.0) < value for key, value in last.items() if not _series(key).endswith("_sum")):
                log.warning("%s of another node counts less than before: its last copy stays", path.name)
                return False
            self._last[path] = values
        return True


def files(folder: Path) -> list[str]:
    """Every file of counters, of this node and of others."""
    return [str(path) for path in (*folder.glob("*.db"), *folder.glob(f"{NODES}/*/*.db"))]


def entries(path: Path) -> list[Entry]:
    """What a file of counters says. One of `BROKEN`: it cannot be read."""
    found = [(key, value, at) for key, value, at, _ in MmapedDict.read_all_values_from_file(path)]  # type: ignore[no-untyped-call]
    for key, _, _ in found:
        _series(key)
    return found


@lru_cache(maxsize=100_000)
def _series(key: str) -> str:
    """The name of the series of an entry."""
    return str(json.loads(key)[1])


def readable(path: Path) -> bool:
    """Whether every counter in the file can be read."""
    try:
        entries(path)
    except BROKEN:
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


def _written(values: Mapping[str, tuple[float, float]]) -> bytes:
    """A file of these values with their times."""
    with tempfile.TemporaryDirectory(prefix="guard-counters-") as scratch:
        path = Path(scratch) / "folded.db"
        made = MmapedDict(str(path))  # type: ignore[no-untyped-call]
        for key, (value, at) in values.items():
            made.write_value(key, value, at)  # type: ignore[no-untyped-call]
        made.close()  # type: ignore[no-untyped-call]
        return _used(path.read_bytes())


def _used(content: bytes) -> bytes:
    """Without what is reserved behind the last entry."""
    (used,) = struct.unpack_from("i", content)
    return content[:used]
