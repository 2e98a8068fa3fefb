"""What the clean images do at each activation site of the original network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

from guard.capture import Captured
from guard.data import batches
from guard.progress import Progress, silent

aten = torch.ops.aten


class Observed(NamedTuple):
    """Per site index: spatial maxima and minima of each channel, float32 [N, channels] each; logits [N, K]."""

    logits: Tensor
    maxima: dict[int, Tensor]
    minima: dict[int, Tensor]


def observe(captured: Captured, images: Tensor, *, batch_size: int, progress: Progress = silent) -> Observed:
    """Run the original network over images [N, C, H, W] once and note each site's extremes per channel."""
    module = captured.module()
    graph = module.graph
    sites = {site.node: site for site in captured.sites}
    extremes: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op == "output":
            logits = node.args[0][0] if isinstance(node.args[0], (tuple, list)) else node.args[0]
            node.args = ((logits, *extremes),)
        elif node.name in sites:
            site = sites[node.name]
            others = [axis for axis in range(1, site.ndim) if axis != site.axis]
            with graph.inserting_after(node):
                for operator in (aten.amin.default, aten.amax.default):
                    extremes.append(graph.call_function(operator, (node, others)) if others else node)
    graph._codegen = fx.graph.CodeGen()  # plain arguments and results instead of export's pytrees
    runner = fx.GraphModule(module, graph)

    rows: list[tuple[Tensor, ...]] = []
    with torch.inference_mode(), progress(f"observe {len(images)} images", len(images)) as advance:
        for batch in batches(images, batch_size):
            rows.append(tuple(runner(batch.to(captured.device))))
            advance(len(batch))
    logits, *values = (torch.cat(column) for column in zip(*rows, strict=True))
    indices = [site.index for site in captured.sites]
    return Observed(
        logits.float(),
        dict(zip(indices, values[1::2], strict=True)),
        dict(zip(indices, values[0::2], strict=True)),
    )
