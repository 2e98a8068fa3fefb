"""The counters of the cluster's other nodes, brought here by Ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.watch.nodes import Copies, Snapshot, read

WAIT_S = 1.0  # for all nodes together; what comes later is taken in at the next look
log = logging.getLogger(__name__)


class Reader:
    """The actor on another node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, known: Mapping[str, int]) -> Snapshot:
        return read(self._folder, known)


class OtherNodes:
    """A reader on each other node of the cluster that this process belongs to; none where there is one node.

    folder: of the counters; the same path on every node. What a node counted is here within one look and a second, and
    stays when it goes; what it counted after the last look goes with it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copies = Copies(folder)
        self._readers: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}  # node → its answer, still to come

    def gather(self) -> None:
        """Bring here what has changed."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        nodes = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]} - {here}  # type: ignore[no-untyped-call]
        for node in set(self._readers) - nodes:
            ray.kill(self._readers.pop(node))
            self._asked.pop(node, None)
        for node in nodes - set(self._readers):
            self._readers[node] = self._reader(node)
        for node in nodes - set(self._asked):
            self._asked[node] = self._readers[node].read.remote(self._copies.known(node))
        if self._asked:
            ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=WAIT_S)
        self._copies.update(self._answers())
        self._copies.keep_only(nodes)

    def _answers(self) -> dict[str, Snapshot]:
        """Those that are there."""
        import ray

        found: dict[str, Snapshot] = {}
        for node, answer in list(self._asked.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self._asked[node]
            try:
                found[node] = ray.get(answer)
            except ray.exceptions.RayError as error:
                log.warning("the counters of node %s are not read: %s", node, error)
                del self._readers[node]  # the next look starts another
        return found

    def _reader(self, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(Reader).options(num_cpus=0, scheduling_strategy=there).remote(self._folder)
