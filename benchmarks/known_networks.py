"""How good a guard is on networks that others backdoored, with triggers that are known.

``python -m benchmarks.known_networks --networks DIR --data cifar10_lossless.npz``

DIR holds ``networks.py`` (with ``cifar10()``) and for each case ``ibau-CASE.safetensors`` (Zeng et al., I-BAU,
ICLR 2022, in safetensors). The guard is fitted on the first 50 test images a class; everything is measured on the
others. *weak*: the trigger blended with the clean image until the original network is fooled by about 80%.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import guard
from benchmarks import record
from guard.config import BOUNDS
from guard.data import Data, as_float
from guard.null import LAWS, fit_law
from guard.progress import bars
from guard.triggers import Trigger, add, opacity_for, stamp, weaken

TARGETS = {"badnets": 8, "l2_inv": 0}


def trigger_of(case: str, folder: Path) -> Trigger:
    """The published trigger of a case."""
    if case == "badnets":
        return lambda images: stamp(images, torch.ones(3, 4, 4), 27, 27)
    pixels = np.array(Image.open(folder / "l2_inv.png").convert("RGB"), dtype=np.float32) / 255.0
    pattern = torch.from_numpy(pixels).permute(2, 0, 1)
    return lambda images: add(images, pattern)


def split(data: Data, per_class: int) -> tuple[Data, Data]:
    """(the first ``per_class`` images of each class, the others)."""
    chosen = torch.cat([(data.labels == c).nonzero()[:per_class, 0] for c in torch.unique(data.labels)])
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[chosen] = False
    return data.first(per_class), Data(data.images[rest], data.labels[rest], None, data.source)


def attack_success(model: nn.Module, data: Data, target: int, trigger: Trigger) -> float:
    """Share of the other classes' images that bear the trigger and are decided as the target."""
    images = trigger(as_float(data.images[data.labels != target]))
    with torch.inference_mode():
        return float((model(images).argmax(1) == target).double().mean())


def measure(folder: Path, case: str, fitted_on: Data, rest: Data, bounds: str, seed: int) -> dict[str, Any]:
    """One row: a fit with ``bounds``, at full strength and weakened; and what other null laws would have flagged."""
    model = guard.load_model(f"{folder / 'networks.py'}:cifar10", str(folder / f"ibau-{case}.safetensors"))
    target, trigger = TARGETS[case], trigger_of(case, folder)
    begun = time.perf_counter()
    settings = guard.FitSettings(bounds=bounds, seed=seed)
    artifact = guard.fit(model, fitted_on.images, fitted_on.labels, settings=settings, progress=bars)
    seconds = time.perf_counter() - begun
    fitted = artifact.guard()

    def evaluated(using: Trigger) -> dict[str, Any]:
        bearing = Data(using(as_float(rest.images)), rest.labels, None, case)
        return guard.evaluate(fitted, rest, bearing, target).figures

    opacity = opacity_for(lambda weakened: attack_success(model, rest, target, weakened), trigger, 0.8)
    return {
        "case": case,
        "bounds": bounds,
        "seed": seed,
        "seconds": round(seconds, 1),
        "fit": artifact.manifest["fit"],
        "full": evaluated(trigger),
        "opacity": opacity,
        "weak": evaluated(weaken(trigger, opacity)),
        "fpr_by_law": _fpr_by_law(artifact, rest.images, settings),
    }


def _fpr_by_law(artifact: guard.Artifact, images: Tensor, settings: guard.FitSettings) -> dict[str, float]:
    """Realised false-positive rate of each null law on the same cross-fitted clean scores."""
    clean = np.asarray(artifact.manifest["fit"]["scores"])
    scores = artifact.guard()(images).score.numpy()
    return {kind: float((fit_law(kind, clean).p_value(scores) < settings.fpr).mean()) for kind in LAWS}


@click.command(help=__doc__)
@click.option("--networks", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "data_path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--bounds", default=",".join(BOUNDS), show_default=True)
@click.option("--seeds", default="0", show_default=True)
@record.json_option
def main(networks: Path, data_path: Path, bounds: str, seeds: str, json_path: Path | None) -> None:
    with np.load(data_path) as archive:
        data = Data(torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"]).long(), None, "cifar10")
    fitted_on, rest = split(data, 50)
    rows = []
    click.echo("                             guarded                        AUROC            corrected alone")
    click.echo("case     bounds   seed  fit s | ACC lost  ASR   PACC   FPR |     full   weak |    ACC    ASR  D kept")
    for case in TARGETS:
        for kind in bounds.split(","):
            for seed in (int(part) for part in seeds.split(",")):
                row = measure(networks, case, fitted_on, rest, kind, seed)
                rows.append(row)
                full, weak, kept = row["full"], row["weak"], row["fit"]["accuracy"]
                click.echo(
                    f"{case:8} {kind:8} {seed:4} {row['seconds']:6.1f} | "
                    f"{full['original']['acc'] - full['guarded']['acc']:7.1%} {full['guarded']['asr']:6.1%} "
                    f"{full['guarded']['pacc']:6.1%} {full['detection']['fpr']:5.2%} | "
                    f"{full['detection']['auroc_successful']:9.4f} {weak['detection']['auroc_successful']:.4f} | "
                    f"{full['corrected']['acc']:6.1%} {full['corrected']['asr']:6.1%} "
                    f"{kept['corrected'] / kept['original']:6.3f}"
                )
                laws = ", ".join(f"{law} {value:.2%}" for law, value in row["fpr_by_law"].items())
                click.echo(f"         realised FPR at nominal 0.50%: {laws}")
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
