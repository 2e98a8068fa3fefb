"""Counters of several nodes come together in one place, whatever happens to the nodes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from asking import Client
from prometheus_client import generate_latest
from test_metrics import replica, samples
from test_watch import Replica

from deployments.http.exposition import build_metrics_app
from deployments.watch.facts import read_facts
from deployments.watch.nodes import Copies, Node, Snapshot, place
from deployments.watch.watch import Watch, merged

CLEAN = ("guard_requests_total", "flag", "m", "clean")
THRESHOLD = ("guard_threshold", "m")


@contextmanager
def living(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.communicate()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    return folder


def counted(folder: Path) -> dict[tuple[str, ...], float]:
    return samples(generate_latest(merged(folder)))


def test_counters_of_both_nodes_add_up(here: Path, there: Path) -> None:
    """Replicas here and on another node count as one, now and as they go on."""
    with living(replica(here, 3), replica(there, 4)):
        copies = Copies(here)
        copies.update({"other": Node(there).read(copies.known("other"))})
        assert counted(here)[CLEAN] == 7
        with living(replica(there, 5)):
            copies.update({"other": Node(there).read(copies.known("other"))})
            assert counted(here)[CLEAN] == 12
            assert counted(here)[THRESHOLD] == 0.005


def test_a_node_says_what_its_replicas_say(here: Path, there: Path) -> None:
    """However many there are, it sends one file of each kind, and what they add up to is the same to the digit."""
    with living(*(replica(there, count) for count in (1, 2, 3))):
        Replica().facts().write(there)
        told = Node(there).read({})
        Copies(here).update({"other": told})
        assert counted(here) == counted(there)
        assert read_facts(here) == read_facts(there)
    assert sorted(told.there) == [
        "counter_node.db", "gauge_livemostrecent_node.db", "histogram_node.db", "models/m.0.json",
    ]  # fmt: skip


def test_a_file_that_breaks_takes_nothing_from_the_sum(here: Path, there: Path) -> None:
    """What it said before stays, as a counter must not go down."""
    node = Node(there)
    with living(replica(there, 3), replica(there, 4)):
        assert node.read({}).changed
        broken = min(there.glob("counter_*.db"))
        broken.write_bytes(broken.read_bytes()[:200] + b"\0" * 4000)
        Copies(here).update({"other": node.read({})})
        assert counted(here)[CLEAN] == 7


def test_what_is_known_is_not_sent_again(here: Path, there: Path) -> None:
    """An answer that was lost is made up for by the next."""
    with living(replica(there, 4)):
        copies = Copies(here)
        lost = Node(there).read(copies.known("other"))
        copies.update({"other": Node(there).read(copies.known("other"))})
        again = Node(there).read(copies.known("other"))
    assert lost.changed
    assert not again.changed
    assert again.there == lost.there
    assert counted(here)[CLEAN] == 4


def test_a_node_that_has_gone_keeps_what_it_counted(here: Path, there: Path) -> None:
    """Its counters stay; its threshold, and what it said of its artifact, go."""
    with living(replica(there, 4)):
        Replica().facts().write(there)
        copies = Copies(here)
        copies.update({"other": Node(there).read({})})
        copies.keep_only({"other"})
        assert THRESHOLD in counted(here)
        assert "m" in read_facts(here)
        copies.keep_only(set())
        assert counted(here)[CLEAN] == 4
        assert THRESHOLD not in counted(here)
        assert not read_facts(here)


def test_a_process_that_died_there_says_nothing_more(here: Path, there: Path) -> None:
    """Its gauges go with the next look, its counters stay."""
    copies = Copies(here)
    with living(replica(there, 4)):
        copies.update({"other": Node(there).read(copies.known("other"))})
        assert THRESHOLD in counted(here)
    copies.update({"other": Node(there).read(copies.known("other"))})
    assert counted(here)[CLEAN] == 4
    assert THRESHOLD not in counted(here)


def test_a_folder_that_nodes_share_counts_once(here: Path, there: Path) -> None:
    """Two nodes with one folder, and one whose folder is this one, also when an answer is late."""
    (there.parent / "alias").symlink_to(there)
    with living(replica(here, 3), replica(there, 4)):
        copies = Copies(here)
        for nodes in ({"a": there, "b": there.parent / "alias", "c": here}, {"b": there}, {"a": there}):
            copies.update({node: Node(folder).read(copies.known(node)) for node, folder in nodes.items()})
            copies.keep_only({"a", "b", "c"})
            assert counted(here)[CLEAN] == 7


def test_nothing_is_forgotten_before_every_node_was_heard(here: Path, there: Path) -> None:
    """A watch that starts anew keeps what the one before it had copied."""
    with living(replica(there, 4)):
        Copies(here).update({"other": Node(there).read({})})
        anew = Copies(here)
        anew.keep_only({"other"})
        assert THRESHOLD in counted(here)
        anew.update({"other": Node(there).read(anew.known("other"))})
        anew.keep_only({"other"})
        assert counted(here)[CLEAN] == 4
        assert THRESHOLD in counted(here)


def test_a_node_without_replicas(here: Path, tmp_path: Path) -> None:
    """Has nothing to say, and is no error."""
    found = Node(tmp_path / "empty" / "folder").read({})
    assert found == Snapshot(place(tmp_path / "empty" / "folder"), {}, {})
    Copies(here).update({"other": found})
    assert counted(here) == {}


def test_a_folder_made_anew_is_another(here: Path, there: Path) -> None:
    """A pod that takes a gone one's path, process numbers and all, counts beside what the other counted."""
    copies = Copies(here)
    with living(replica(there, 4)):
        copies.update({"gone": Node(there).read({})})
    old = {path.name.split("_")[0]: path.name for path in there.glob("*.db")}
    shutil.rmtree(there)
    there.mkdir()
    with living(replica(there, 1)):
        for path in [path for path in there.glob("*.db") if not path.name.startswith("gauge")]:
            path.rename(there / old[path.name.split("_")[0]])  # the number that the gone one had
        copies.update({"new": Node(there).read({})})
    copies.keep_only({"new"})
    assert counted(here)[CLEAN] == 5


def test_a_folder_made_anew_under_a_living_reader(here: Path, there: Path) -> None:
    """What it remembers of the old one is not counted again."""
    node, copies = Node(there), Copies(here)
    with living(replica(there, 4)):
        copies.update({"other": node.read({})})
    shutil.rmtree(there)
    there.mkdir()
    with living(replica(there, 1)):
        copies.update({"other": node.read({})})
    assert counted(here)[CLEAN] == 5


def test_a_folder_that_outlives_its_machine_counts_once(here: Path, there: Path) -> None:
    """After a restart, when other processes write to it, it is the same place."""
    before = place(there)
    with living(replica(there, 4)):
        Copies(here).update({"a": Node(there).read({})})
    with living(replica(there, 2)):
        Copies(here).update({"b": Node(there).read({})})
    assert place(there) == before
    assert counted(here)[CLEAN] == 6


@pytest.mark.parametrize(
    "name", ["../../escaped.json", "/etc/escaped.db", "models/../../escaped.json", "models/a/b.json"]
)
def test_no_file_outside_is_written(name: str, here: Path, there: Path) -> None:
    """Whatever another node calls it; what the others say is taken in."""
    with living(replica(there, 4)):
        Copies(here).update({"bad": Snapshot("p", {name: 1}, {name: b"{}"}), "other": Node(there).read({})})
    assert not list(here.parent.rglob("escaped*"))
    assert counted(here)[CLEAN] == 4


def test_no_count_goes_down(here: Path, there: Path) -> None:
    """An answer that is late, a file that somebody removed, a reader that begins anew beside a broken file."""
    node, copies = Node(there), Copies(here)
    with living(replica(there, 4)):
        late = node.read({})
        with living(replica(there, 3)):
            copies.update({"other": node.read({})})
            copies.update({"other": late})
            assert counted(here)[CLEAN] == 7
            min(there.glob("counter_*.db")).unlink()
            copies.update({"other": node.read(copies.known("other"))})
            assert counted(here)[CLEAN] == 7
            Copies(here).update({"other": Node(there).read({})})
            assert counted(here)[CLEAN] == 7


def test_files_of_single_processes_give_way_to_their_sum(here: Path, there: Path) -> None:
    """As a release that sent each left them."""
    with living(replica(there, 4)):
        told = Node(there).read({})
        folder = here / "nodes" / told.place
        folder.mkdir(parents=True)
        for path in there.glob("*.db"):
            shutil.copy(path, folder)
        Copies(here).update({"other": told})
        assert counted(here)[CLEAN] == 4


def test_a_copy_that_is_broken_takes_nothing_down(here: Path, there: Path) -> None:
    """The last whole copy stays; a broken file of this node's own is left out."""
    with living(replica(here, 3), replica(there, 4)):
        copies = Copies(here)
        whole = Node(there).read({})
        copies.update({"other": whole})
        broken = {name: content[:200] + b"\0" * (len(content) - 200) for name, content in whole.changed.items()}
        copies.update({"other": whole._replace(changed=broken)})
        assert counted(here)[CLEAN] == 7
        (own,) = here.glob("counter_*.db")
        (here / "counter_1.db").write_bytes(own.read_bytes()[:200] + b"\0" * 4000)
        assert counted(here)[CLEAN] == 7
        dead = subprocess.Popen(["true"])
        dead.wait()
        (here / "counter_1.db").rename(here / f"counter_{dead.pid}.db")
        assert counted(here)[CLEAN] == 7
        assert (here / f"counter_{dead.pid}.broken").exists()


def test_a_watch_goes_on_when_others_are_silent(here: Path) -> None:
    """What is here is looked at all the same."""

    def fail() -> None:
        raise OSError("no network")

    with living(replica(here, 3)):
        watch = Watch(here, gather=fail)
        watch.look()
        assert samples(watch.render())[CLEAN] == 3


def test_no_scrape_before_every_node_is_there(here: Path) -> None:
    """Else counters would seem to go up by what was counted long ago."""
    there = [False]
    with Client(build_metrics_app(Watch(here, complete=lambda: there[0]))) as client:
        early = client.get("/metrics")
        assert early.status_code == 503
        assert early.headers["retry-after"]
        there[0] = True
        assert client.get("/metrics").status_code == 200
