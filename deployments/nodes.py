"""The counters of the cluster's other nodes, brought here by Ray."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, cast

from deployments.watch.nodes import Copies, Node, Snapshot

WAIT_S = 1.0  # for all nodes together; what comes later is taken in at the next look
LISTED_EVERY_S = 10.0  # Serve is asked where replicas are
SILENT_S = 30.0  # a node that does not answer for so long counts as gone
log = logging.getLogger(__name__)


class OtherNodes:
    """A reader on each other node where Ray Serve runs a replica; none where there is one node. A node without replicas
    has none, so that the autoscaler may take it away.

    folder: of the counters; the same path on every node. What a node counted is here within a few seconds, and stays
    when it goes; what it counted after the last look goes with it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._copies = Copies(folder)
        self._readers: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}  # node → its answer, still to come
        self._since: dict[str, float] = {}  # node → when it was first asked and did not answer
        self._nodes: set[str] = set()
        self._listed = -math.inf
        self._began = time.monotonic()
        self._complete = False

    def complete(self) -> bool:
        """Whether every node was heard, or was silent for long."""
        if not self._complete:
            self._complete = time.monotonic() - self._began > SILENT_S or (
                self._listed == -math.inf and len(_alive()) == 1
            )
        return self._complete

    def gather(self) -> None:
        """Bring here what has changed."""
        import ray

        if time.monotonic() - self._listed >= LISTED_EVERY_S:
            self._nodes, self._listed = _with_replicas(), time.monotonic()
        nodes = self._nodes & _alive()
        leaving = set(self._readers) - nodes
        for node in nodes - set(self._readers):
            self._readers[node] = self._reader(node)
        for node in (*(nodes - set(self._asked)), *leaving):
            self._asked[node] = self._readers[node].read.remote(self._copies.known(node))
            self._since.setdefault(node, time.monotonic())
        if self._asked:
            ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=WAIT_S)
        self._copies.update(self._answers())
        for node in leaving & set(self._readers):
            ray.kill(self._readers.pop(node))
        for known in (self._asked, self._since):
            for node in leaving:
                known.pop(node, None)
        silent = {node for node, since in self._since.items() if time.monotonic() - since > SILENT_S}
        self._complete = self._complete or self._copies.heard(nodes - silent)
        self._copies.keep_only(nodes - silent)

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
                del self._since[node]
            except ray.exceptions.RayActorError as error:
                log.warning("the reader on node %s has ended: %s", node, error)
                self._readers.pop(node, None)  # the next look starts another
            except ray.exceptions.RayError as error:
                log.warning("the counters of node %s are not read: %s", node, error)
        return found

    def _reader(self, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(Node).options(num_cpus=0, scheduling_strategy=there).remote(self._folder)


def _alive() -> set[str]:
    """The nodes of the cluster that live."""
    import ray

    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _with_replicas() -> set[str]:
    """The nodes, but for this one, where Ray Serve runs a replica of any application."""
    import ray
    from ray.serve.context import _get_global_client

    details: dict[str, Any] = cast(Any, _get_global_client()).get_serve_details()
    here = ray.get_runtime_context().get_node_id()
    deployments = [one for app in details["applications"].values() for one in app["deployments"].values()]
    nodes = {replica.get("node_id") for one in deployments for replica in one["replicas"]}  # none while it starts
    return {str(node) for node in nodes if node is not None} - {here}
