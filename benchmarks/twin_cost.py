"""What the second answer costs: time of the twin over time of the original pass, side by side in one run.

``python -m benchmarks.twin_cost [--model resnet18] [--size 32] [--batches 1,32] [--compile] [--json FILE]``

Each row: median of ``--runs`` pairs of (original alone, twin), timed in turn, and the median, least and largest of
the pairs' ratios. *all sites*: every activation is clipped. *from the middle*: the second half of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks import record
from guard.capture import Captured, capture
from guard.corrections import Clip
from guard.detector import DTYPES
from guard.observe import observe
from guard.twin import Twin, build_twin

STARTS = {"all sites": 0.0, "from the middle": 0.5}


def clipped(captured: Captured, start: float, images: Tensor) -> Twin:
    """A twin with quantile bounds from ``images`` at the sites from ``start`` on."""
    maxima = observe(captured, images, batch_size=32).maxima
    corrections = {
        site.index: Clip(torch.quantile(maxima[site.index], 0.95, dim=0), None, axis=site.axis, ndim=site.ndim)
        for site in captured.sites[int(start * len(captured.sites)) :]
    }
    return build_twin(captured, corrections)


def pairs(alone: Callable[[], Any], both: Callable[[], Any], runs: int) -> Iterator[tuple[float, float]]:
    """(seconds of ``alone``, seconds of ``both``), run in turn after a warm-up."""
    for call in (alone, both):
        for _ in range(3):
            call()
    for _ in range(runs):
        yield seconds(alone), seconds(both)


def seconds(call: Callable[[], Any], least: float = 0.2) -> float:
    """Mean seconds of a call, over as many as fill ``least`` seconds."""
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < least:
        call()
        count += 1
    return elapsed / count


def measure(model: nn.Module, captured: Captured, batch: int, dtype: str, compiled: bool, start: str,
            runs: int) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, *captured.spec.shape, generator=generator).to(DTYPES[dtype])
    twin = clipped(captured, STARTS[start], torch.rand(64, *captured.spec.shape, generator=generator))
    twin = twin.to(DTYPES[dtype])
    original: Callable[[Tensor], Any] = model.to(DTYPES[dtype])
    if compiled:
        torch.compiler.reset()
        original = torch.compile(original)
        twin.compile()
    with torch.inference_mode():
        timed = list(pairs(lambda: original(images), lambda: twin(images), runs))
    model.float()
    ratios = sorted(both / alone for alone, both in timed)
    return {
        "batch": batch,
        "dtype": dtype,
        "mode": "compiled" if compiled else "eager",
        "corrected": start,
        "original_ms": statistics.median(alone for alone, _ in timed) * 1e3,
        "twin_ms": statistics.median(both for _, both in timed) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_largest": ratios[-1],
        "runs": runs,
    }


@click.command(help=__doc__)
@click.option("--model", "name", default="resnet18", show_default=True, help="Of torchvision; random weights.")
@click.option("--size", default=64, show_default=True, help="Height and width of the images.")
@click.option("--batches", default="1,32", show_default=True, help="Batch sizes.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="Also under torch.compile.")
@click.option("--threads", default=1, show_default=True, help="Of torch; one a replica is what serves.")
@click.option("--runs", default=5, show_default=True)
@record.json_option
def main(name: str, size: int, batches: str, compiled: bool, threads: int, runs: int, json_path: Path | None) -> None:
    from torchvision import models

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    captured = capture(model, (3, size, size))
    click.echo(f"{name}, 3×{size}×{size}, {len(captured.sites)} sites, {threads} thread(s) of {os.cpu_count()} cores")
    click.echo("batch type      mode     corrected           original         twin   ratio (least-largest)")
    rows = []
    for batch in (int(part) for part in batches.split(",")):
        for dtype in DTYPES:
            for with_compile in (False, True) if compiled else (False,):
                for start in STARTS:
                    row = measure(model, captured, batch, dtype, with_compile, start, runs)
                    rows.append(row)
                    click.echo(
                        f"{batch:>5} {dtype:9} {row['mode']:8} {start:16} {row['original_ms']:8.2f} ms "
                        f"{row['twin_ms']:8.2f} ms   {row['ratio']:.2f} "
                        f"({row['ratio_least']:.2f}-{row['ratio_largest']:.2f})"
                    )
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
