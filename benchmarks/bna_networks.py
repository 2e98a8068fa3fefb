"""How well BNA mends networks that others backdoored, with targets and triggers as it finds them itself.

``python -m benchmarks.bna_networks --networks DIR --data cifar10_lossless.npz``

DIR and the split are those of `benchmarks.known_networks`: fitted on the first 50 test images a class, measured on the
others. The true trigger is used to measure alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import guard
from benchmarks import record
from benchmarks.known_networks import TARGETS, split, trigger_of
from guard.config import REFINEMENTS
from guard.data import Data, as_float
from guard.progress import bars


def measure(folder: Path, case: str, fitted_on: Data, rest: Data, refine: str, seed: int) -> dict[str, Any]:
    """One row: scan, fit, and the figures on images that the fit has not seen."""
    model = guard.load_model(f"{folder / 'networks.py'}:cifar10", str(folder / f"ibau-{case}.safetensors"))
    begun = time.perf_counter()
    settings = guard.FitSettings(seed=seed, bna=guard.BnaSettings(refine=refine))
    artifact = guard.fit(model, fitted_on.images, fitted_on.labels, method="bna", settings=settings, progress=bars)
    seconds = time.perf_counter() - begun
    bearing = Data(trigger_of(case, folder)(as_float(rest.images)), rest.labels, None, case)
    figures = guard.evaluate(artifact.guard(), rest, bearing, TARGETS[case]).figures
    return {
        "case": case,
        "refine": refine,
        "seed": seed,
        "seconds": round(seconds, 1),
        "targets": artifact.manifest["targets"],
        "fit": artifact.manifest["fit"],
        "figures": figures,
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    figures, found = row["figures"], row["fit"]["targets"].get(str(TARGETS[row["case"]]))
    detection, clip = figures["detection"], "none" if found is None else f"{found['quantile']:g}"
    return (
        f"{row['case']:8} {row['refine']:6} {row['seed']:4} {row['seconds']:6.1f}  {row['targets']!s:8} {clip:>6} | "
        f"{figures['original']['acc'] - figures['guarded']['acc']:8.1%} {figures['original']['asr']:6.1%} "
        f"{figures['guarded']['asr']:6.1%} {figures['guarded']['pacc']:6.1%} | {detection['tpr']:6.1%} "
        f"{detection['fpr']:6.2%} {detection['fpr_target']:10.1%}"
    )


@click.command(help=__doc__)
@click.option("--networks", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "data_path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--refine", default="tv", show_default=True, help=f"Some of {', '.join(REFINEMENTS)}.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--cases", default=",".join(TARGETS), show_default=True)
@record.json_option
def main(networks: Path, data_path: Path, refine: str, seeds: str, cases: str, json_path: Path | None) -> None:
    with np.load(data_path) as archive:
        data = Data(torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"]).long(), None, "cifar10")
    fitted_on, rest = split(data, 50)
    click.echo("                                                ASR              | flagged of triggered, clean,")
    click.echo(
        "case     refine seed  fit s  targets   clips | ACC lost before  after    SIA |       and clean sent to t"
    )
    rows = []
    for case in cases.split(","):
        for kind in refine.split(","):
            for seed in (int(part) for part in seeds.split(",")):
                rows.append(measure(networks, case, fitted_on, rest, kind, seed))
                click.echo(line(rows[-1]))
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
