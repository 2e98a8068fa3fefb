"""One graph, several answers: the original network and its corrected copies.

A corrected network is no second model. Walking the captured graph once, a node downstream of a corrected
site gets a corrected copy; every other node is shared. The copy is cut off as a graph of its own that takes
the *frontier* (the shared values that it reads), so that the corrected pass can be timed, deferred, skipped or run
beside the rest of the original network without repeating the shared prefix, and so that fits can cache the frontier
of the clean set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from guard.capture import Captured

Shared = tuple[Tensor, ...]
Frontier = tuple[Tensor, ...]

aten = torch.ops.aten
DIRECT: dict[Any, Callable[..., Any]] = {
    aten.conv2d.default: torch.conv2d,
    aten._native_batch_norm_legit_no_training.default: torch._native_batch_norm_legit_no_training,
    aten.relu.default: torch.relu,
    aten.add.Tensor: torch.add,
    aten.linear.default: nn.functional.linear,
}  # operators as captured → the same as plain functions


class Twin(nn.Module):
    """images float32 [N, C, H, W] in [0, 1] → (logits [N, K], corrected logits [N, K] of the first corrected network).

    ``shared(images)`` computes what both networks need; from it ``finish`` computes the original's logits and
    ``corrected`` those of a corrected network, in any order, or at the same time in two threads.
    ``networks`` corrected networks share one original; each reads its part of the frontier, the head of the shared
    values; what only the original reads of them follows.
    """

    def __init__(
        self,
        shared: fx.GraphModule,
        original: fx.GraphModule,
        corrected: Sequence[fx.GraphModule],
        reads: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.shared_graph = shared
        self.original_graph = original
        self.corrected_graphs = nn.ModuleList(corrected)
        self._original_reads, *self._reads = reads
        self._frontier = len({position for positions in self._reads for position in positions})

    @property
    def networks(self) -> int:
        """How many corrected networks there are."""
        return len(self._reads)

    def shared(self, images: Tensor) -> Shared:
        """The values in front of the first corrections: the frontier, and what only the original reads besides."""
        values: Shared = self.shared_graph(images)
        return values

    def finish(self, shared: Shared) -> Tensor:
        """Logits [N, K] of the original network from the shared values."""
        logits: Tensor = self.original_graph(*[shared[position] for position in self._original_reads])
        return logits

    def original(self, images: Tensor) -> tuple[Tensor, Frontier]:
        """(logits [N, K] of the original network, the frontier)."""
        shared = self.shared(images)
        return self.finish(shared), shared[: self._frontier]

    def corrected(self, frontier: Frontier, network: int = 0, rows: Tensor | None = None) -> Tensor:
        """Logits [N, K] of a corrected network from frontier or shared values; with ``rows`` (int64 [n]) of these
        images alone, [n, K]."""
        values = [frontier[position] for position in self._reads[network]]
        if rows is not None:
            values = [value.index_select(0, rows) for value in values]
        logits: Tensor = self.corrected_graphs[network](*values)
        return logits

    def prefix(self) -> Callable[[Tensor], Frontier]:
        """images → frontier alone, without the rest of the original network. For fits."""
        return lambda images: self.shared(images)[: self._frontier]

    def compile(self, **options: Any) -> None:
        """Compile each part on its own, as serving runs them; the first call of a shape then takes long."""
        for graph in (self.shared_graph, self.original_graph, *self.corrected_graphs):
            cast(nn.Module, graph).compile(**options)

    def correction(self, index: int, network: int = 0) -> Any:
        """The correction at site ``index``."""
        return self.corrected_graphs[network].get_submodule(f"corrections.{index}")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared(images)
        return self.finish(shared), self.corrected(shared)


def build_twin(captured: Captured, *networks: Mapping[int, nn.Module]) -> Twin:
    """Build the twin.

    Args:
        captured: the classifier. networks: for each corrected network site index → correction; sites without one are
            left alone.

    The network's weights share memory with ``captured`` until the twin is cast or moved; the corrections are copied.
    """
    if not all(networks):
        raise ValueError("corrections: expected at least one site")
    module = captured.module()
    module.graph.eliminate_dead_code()
    frontier: list[fx.Node] = []
    corrected, reads = [], []
    for corrections in networks:
        graph, read = _corrected_graph(module.graph, captured, corrections)
        frontier += [node for node in read if node not in frontier]
        reads.append([frontier.index(node) for node in read])
        attributes = _ready(graph, module)
        attributes |= {f"corrections.{index}": deepcopy(correction) for index, correction in corrections.items()}
        corrected.append(fx.GraphModule(attributes, graph, class_name="Corrected"))

    graph, read = _original_graph(module.graph, frontier)
    shared = [*frontier, *(node for node in read if node not in frontier)]
    original = fx.GraphModule(_ready(graph, module), graph, class_name="Original")
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    output.args = (tuple(shared),)
    module.graph._codegen = fx.graph.CodeGen()  # plain arguments and results instead of export's pytrees
    module.graph.eliminate_dead_code()
    module.graph.lint()
    front = fx.GraphModule(_ready(module.graph, module), module.graph, class_name="Shared")
    return Twin(front, original, corrected, [[shared.index(node) for node in read], *reads]).eval()


def _original_graph(graph: fx.Graph, frontier: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The part of ``graph`` behind the frontier, and the values in front that it reads."""
    images = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    front, waiting = {images}, list(frontier)
    while waiting:
        node = waiting.pop()
        if node not in front:
            front.add(node)
            waiting += node.all_input_nodes
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    read: list[fx.Node] = []

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node in front and isinstance(node.meta.get("val"), Tensor) and node.op != "get_attr":
                read.append(node)
                copies[node] = copy.placeholder(node.name)
            else:
                copies[node] = copy.node_copy(node, copied)
        return copies[node]

    for node in graph.nodes:
        if node not in front and node.op not in ("output", "get_attr"):
            copied(node)
    copy.output(copied(_logits(next(node for node in reversed(graph.nodes) if node.op == "output"))))
    _placeholders_first(copy)
    return copy, read


def _logits(output: fx.Node) -> fx.Node:
    value = output.args[0]
    return cast(fx.Node, value[0] if isinstance(value, (tuple, list)) else value)


def _corrected_graph(
    graph: fx.Graph, captured: Captured, corrections: Mapping[int, nn.Module]
) -> tuple[fx.Graph, list[fx.Node]]:
    """The part of ``graph`` behind the corrected sites, and the shared nodes that it reads, one row an image each."""
    by_node = {captured.site(index).node: index for index in corrections}
    missing = by_node.keys() - {node.name for node in graph.nodes}
    if missing:
        raise ValueError(f"corrections: sites {sorted(missing)} are not in the graph")
    images = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    batch = str(images.meta["val"].shape[0])
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    frontier: list[fx.Node] = []

    def corrected(node: fx.Node) -> fx.Node:
        """The corrected graph's view of a node: its copy, or a way to the shared value."""
        if node not in copies:
            value = node.meta.get("val")
            same = node.target is aten.sym_size.int and [
                entry for entry in frontier if str(entry.meta["val"].shape[0]) == str(value)
            ]
            if same:  # the batch size, read off a value that is there anyway
                copies[node] = copy.call_function(aten.sym_size.int, (copies[same[0]], 0))
            elif isinstance(value, Tensor) and value.ndim > 0 and str(value.shape[0]) == batch:
                frontier.append(node)
                copies[node] = copy.placeholder(node.name)
            else:  # weights, sizes taken from shared values, and what has no row of its own for each image
                copies[node] = copy.node_copy(node, corrected)
        return copies[node]

    downstream: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if any(source in downstream for source in node.all_input_nodes):
            downstream.add(node)
            copies[node] = copy.node_copy(node, corrected)
        if node.name in by_node:
            source = corrected(node)
            downstream.add(node)
            copies[node] = copy.call_module(f"corrections.{by_node[node.name]}", (source,))
    copy.output(corrected(_logits(next(node for node in reversed(graph.nodes) if node.op == "output"))))
    _placeholders_first(copy)
    return copy, frontier


def _placeholders_first(graph: fx.Graph) -> None:
    """Move the placeholders, in their order, before everything else, as fx requires."""
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if node is not first:
            first.prepend(node)
        else:
            first = node.next


def _ready(graph: fx.Graph, module: nn.Module) -> dict[str, Any]:
    """Rewrite ``graph`` to run fast, and return the attributes that it then reads; tensors are shared with ``module``.

    A small network spends much of its time in Python: attributes lie flat rather than behind dotted paths, and frequent
    operators are called as torch's own functions, which compute the same bits with less dispatch.
    """
    attributes: dict[str, Any] = {}
    names: dict[str, str] = {}
    for node in graph.nodes:
        node.target = DIRECT.get(node.target, node.target)
        if node.op == "get_attr":
            path = str(node.target)
            if path not in names:
                names[path] = f"{path.replace('.', '_')}_{len(names)}"
                attributes[names[path]] = _read(module, path)
            node.target = names[path]
    return attributes


def _read(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
