"""What suspiciousness-score pruning does to networks that others backdoored, with triggers that are known.

``python -m benchmarks.pruning --networks DIR --data cifar10_lossless.npz``

DIR as for ``benchmarks.known_networks``. For each seed, D is another draw of test images (10 a class), and everything
is measured on the others. μ is the default everywhere: a value chosen by looking at triggered images would be no
measurement. *tuned only*: fine-tuning alone, a μ that prunes nothing, as the control.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import guard
from benchmarks import record
from benchmarks.known_networks import TARGETS, attack_success, split, trigger_of
from guard.data import Data, as_float, batches
from guard.methods.prune import Pruned, PruneSettings, prune
from guard.progress import bars

NOTHING = 1e5  # a μ above which no filter can lie
STAGES = ("before", "pruned", "fine-tuned", "tuned only")


def draw(data: Data, per_class: int, seed: int) -> tuple[Data, Data]:
    """(D: ``per_class`` images of each class, drawn by ``seed``; the others)."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return split(Data(data.images[order], data.labels[order], data.classes, data.source), per_class)


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of images decided right."""
    with torch.inference_mode():
        decided = torch.cat([model(batch).argmax(1) for batch in batches(as_float(data.images), 64)])
    return float((decided == data.labels).double().mean())


def measure(folder: Path, case: str, data: Data, per_class: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """One row: ACC and ASR of each stage on the images outside D."""
    model = guard.load_model(f"{folder / 'networks.py'}:cifar10", str(folder / f"ibau-{case}.safetensors"))
    clean, rest = draw(data, per_class, seed)
    target, trigger = TARGETS[case], trigger_of(case, folder)

    def repaired(**changed: Any) -> Pruned:
        settings = PruneSettings(seed=seed, learning_rate=learning_rate, **changed)
        result: Pruned = prune(model, clean.images, clean.labels, settings=settings, progress=bars)
        return result

    def figures(of: nn.Module) -> dict[str, float]:
        return {"acc": accuracy(of, rest), "asr": attack_success(of, rest, target, trigger)}

    pruned = repaired(epochs=0)
    tuned = repaired()
    alone = repaired(mu=NOTHING)
    results = (model, pruned.captured.module(), tuned.captured.module(), alone.captured.module())
    return {
        "case": case,
        "seed": seed,
        "images": {"clean": len(clean), "acc": len(rest), "asr": int((rest.labels != target).sum())},
        "stages": {stage: figures(network) for stage, network in zip(STAGES, results, strict=True)},
        "pruned": {layer["name"]: layer["pruned"] for layer in tuned.report["layers"]},
        "filters": {layer["name"]: layer["filters"] for layer in tuned.report["layers"]},
        "accuracy_on_clean": tuned.report["accuracy"],
        "settings": tuned.report["settings"],
        "seconds": tuned.report["seconds"],
    }


def spread(rows: list[dict[str, Any]], stage: str, figure: str) -> str:
    """Lowest and highest over the draws."""
    values = [row["stages"][stage][figure] for row in rows]
    return f"{figure.upper()} {min(values):.1%} to {max(values):.1%}"


@click.command(help=__doc__)
@click.option("--networks", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "data_path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--per-class", default=10, show_default=True)
@click.option("--learning-rate", default=PruneSettings.learning_rate, show_default=True, help="Of fine-tuning.")
@record.json_option
def main(
    networks: Path, data_path: Path, seeds: str, per_class: int, learning_rate: float, json_path: Path | None
) -> None:
    with np.load(data_path) as archive:
        data = Data(torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"]).long(), None, "cifar10")
    rows: list[dict[str, Any]] = []
    click.echo(f"{'':13}pruned |" + "|".join(f"{stage:^15}" for stage in STAGES))
    click.echo(f"case     seed filters |{'|'.join(['    ACC    ASR '] * len(STAGES))}")
    for case in TARGETS:
        of_case = []
        for seed in (int(part) for part in seeds.split(",")):
            row = measure(networks, case, data, per_class, seed, learning_rate)
            of_case.append(row)
            cells = "|".join(f" {row['stages'][s]['acc']:6.1%} {row['stages'][s]['asr']:6.1%} " for s in STAGES)
            click.echo(f"{case:8} {seed:4} {sum(map(len, row['pruned'].values())):7} |{cells}")
        for stage in STAGES:
            click.echo(f"         {stage}: {spread(of_case, stage, 'acc')}, {spread(of_case, stage, 'asr')}")
        rows += of_case
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
