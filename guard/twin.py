"""One graph, two answers: the original network and its corrected copy.

The corrected network is no second model. Walking the captured graph once, a node downstream of a corrected
site gets a corrected copy; every other node is shared. The copy is cut off as a graph of its own that takes
the *frontier* (the shared values that it reads), so that the corrected pass can be timed, deferred or skipped
without repeating the shared prefix, and so that fits can cache the frontier of the clean set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from guard.capture import Captured

Frontier = tuple[Tensor, ...]


class Twin(nn.Module):
    """images float32 [N, C, H, W] in [0, 1] → (logits [N, K], corrected logits [N, K]).

    ``original(images)`` gives (logits, frontier); ``corrected(*frontier)`` gives the corrected logits.
    """

    def __init__(self, original: fx.GraphModule, corrected: fx.GraphModule) -> None:
        super().__init__()
        self.original_graph = original
        self.corrected_graph = corrected

    def original(self, images: Tensor) -> tuple[Tensor, Frontier]:
        logits, *frontier = self.original_graph(images)
        return logits, tuple(frontier)

    def corrected(self, frontier: Frontier) -> Tensor:
        logits: Tensor = self.corrected_graph(*frontier)
        return logits

    def prefix(self) -> Callable[[Tensor], Frontier]:
        """images → frontier alone, without the rest of the original network. For fits."""
        graph = fx.Graph()
        output = graph.graph_copy(self.original_graph.graph, {})
        graph.output(cast(tuple[fx.Node, ...], output)[1:])
        graph.eliminate_dead_code()
        return fx.GraphModule(self.original_graph, graph, class_name="Prefix")

    def compile(self, **options: Any) -> None:
        """Compile each half on its own, as serving runs them; the first call of a shape then takes long."""
        self.original_graph.compile(**options)
        self.corrected_graph.compile(**options)

    def correction(self, index: int) -> Any:
        """The correction at site ``index``."""
        return self.corrected_graph.get_submodule(f"corrections.{index}")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, frontier = self.original(images)
        return logits, self.corrected(frontier)


def build_twin(captured: Captured, corrections: Mapping[int, nn.Module]) -> Twin:
    """Build the twin.

    Args:
        captured: the classifier. corrections: site index → correction; sites without one are left alone.

    The network's weights share memory with ``captured`` until the twin is cast or moved; the corrections are copied.
    """
    if not corrections:
        raise ValueError("corrections: expected at least one site")
    module = captured.module()
    by_node = {captured.sites[index].node: (index, correction) for index, correction in corrections.items()}
    missing = by_node.keys() - {node.name for node in module.graph.nodes}
    if missing:
        raise ValueError(f"corrections: sites {sorted(missing)} are not in the graph")

    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    frontier: list[fx.Node] = []

    def corrected(node: fx.Node) -> fx.Node:
        """The corrected graph's view of a node: its copy, or a way to the shared value."""
        if node not in copies:
            same = node.target is torch.ops.aten.sym_size.int and [
                entry for entry in frontier if str(entry.meta["val"].shape[0]) == str(node.meta["val"])
            ]
            if same:  # the batch size, read off a value that is there anyway
                copies[node] = copy.call_function(torch.ops.aten.sym_size.int, (copies[same[0]], 0))
            elif node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
                copies[node] = copy.node_copy(node, corrected)  # weights, and sizes taken from shared values
            else:
                frontier.append(node)
                copies[node] = copy.placeholder(node.name)
        return copies[node]

    downstream: set[fx.Node] = set()
    logits: fx.Node | None = None
    for node in module.graph.nodes:
        if node.op == "output":
            logits = node.args[0][0] if isinstance(node.args[0], (tuple, list)) else node.args[0]
            continue
        depends = any(source in downstream for source in node.all_input_nodes)
        if depends:
            downstream.add(node)
            copies[node] = copy.node_copy(node, corrected)
        if node.name in by_node:
            index, _ = by_node[node.name]
            source = corrected(node)
            downstream.add(node)
            copies[node] = copy.call_module(f"corrections.{index}", (source,))
    copy.output(corrected(cast(fx.Node, logits)))
    _placeholders_first(copy)

    attributes = _attributes(module, copy)
    attributes |= {f"corrections.{index}": deepcopy(correction) for index, correction in by_node.values()}
    corrected_module = fx.GraphModule(attributes, copy, class_name="Corrected")

    for node in module.graph.nodes:
        if node.op == "output":
            node.args = ((logits, *frontier),)
    module.graph._codegen = fx.graph.CodeGen()  # plain arguments and results instead of export's pytrees
    module.graph.lint()
    original = fx.GraphModule(_attributes(module, module.graph), module.graph, class_name="Original")
    return Twin(original, corrected_module).eval()


def _placeholders_first(graph: fx.Graph) -> None:
    """Move the placeholders, in their order, before everything else, as fx requires."""
    first = next(iter(graph.nodes))
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if node is not first:
            first.prepend(node)
        else:
            first = node.next


def _attributes(module: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """What the graph's get_attr nodes name, by dotted path; tensors are shared with the module."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            found[str(node.target)] = value
    return found
