"""How sure a scan is on networks whose backdoor, or whose being clean, is known.

``python -m benchmarks.scan_networks --networks DIR --data cifar10_lossless.npz --jpeg cifar10_jpeg.tar.xz``

Each seed scans four CIFAR-10 networks of one architecture: the two that others backdoored (DIR holds ``networks.py``
and ``ibau-CASE.safetensors``, see `benchmarks.known_networks`), and two that are trained here on the JPEG images, one
clean and one poisoned (a random 3×3 patch on 5% of the images, target 3). D is the first 50 test images a class.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import guard
from benchmarks import record
from benchmarks.cifar10 import read_tar
from benchmarks.known_networks import TARGETS, attack_success, split
from benchmarks.training import poisoned, train
from guard.capture import capture
from guard.data import Data
from guard.inversion import InversionSettings
from guard.progress import bars
from guard.scan import Scan, ScanSettings, scan
from guard.triggers import Trigger, stamp

CLEAN, PATCHED = "clean", "patched"
PATCH_TARGET = 3


def patch_trigger() -> Trigger:
    """The random 3×3 patch of the poisoned network."""
    patch = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(7))
    return lambda images: stamp(images, patch, 5, 20)


def trained(case: str, build: Callable[[], nn.Module], jpeg: Path | None, cache: Path, unseen: Data) -> nn.Module:
    """The clean or the poisoned network, trained once and kept in ``cache``; says how good it is."""
    path = cache / f"{case}.safetensors"
    network = build()
    if path.is_file():
        network.load_state_dict(load_file(path))
    else:
        if jpeg is None:
            raise click.UsageError(f"{path} is not there: give --jpeg to train it.")
        data = read_tar(jpeg, progress=bars)
        images, labels, epochs, seed = data.images, data.labels, 14, 0
        if case == PATCHED:
            images, labels = poisoned(images, labels, patch_trigger(), PATCH_TARGET, 0.05, 1)
            epochs, seed = 10, 1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = train(build(), images, labels, epochs=epochs, seed=seed, dtype=torch.bfloat16, progress=bars)
        cache.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    network.eval()
    with torch.inference_mode():
        right = float((network(unseen.images.float() / 255.0).argmax(1) == unseen.labels).double().mean())
    success = attack_success(network, unseen, PATCH_TARGET, patch_trigger())
    click.echo(
        f"{case}: accuracy {right:.1%}, sent to class {PATCH_TARGET} by the patch {success:.1%} (n = {len(unseen)})"
    )
    return network


def row(case: str, seed: int, found: Scan, target: int | None) -> dict[str, Any]:
    """One scan, with the score of the true target and the largest of the others, per kind."""
    scores: dict[str, dict[str, float | None]] = {}
    for kind, values in found.scores.items():
        others = np.delete(values, target) if target is not None else values
        scores[kind] = {
            "target": None if target is None else float(values[target]),
            "others": float(np.nanmax(others)),
        }
    return {"case": case, "seed": seed, "target": target, "scores": scores, "scan": found.to_json()}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    found = row["scan"]
    cells = [f"{row['case']:8} {row['seed']:4} {found['seconds']:7.1f}  {found['targets']!s:8} {row['target']!s:6}"]
    for scores in row["scores"].values():
        true = "    –" if scores["target"] is None else f"{scores['target']:5.1f}"
        cells.append(f"{true} / {scores['others']:4.1f}")
    opinion = found["second_opinion"]
    chance = "–" if opinion["p_value"] is None else f"{opinion['p_value']:.2g}"
    stable = ", ".join(f"{entry['share_of_restarts']:.0%}" for entry in found["stability"]["detected"])
    return " | ".join([*cells, f"{stable:5}", f"class {opinion['class']}, p = {chance}"])


@click.command(help=__doc__)
@click.option("--networks", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", "data_path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--jpeg", type=click.Path(exists=True, path_type=Path), help="To train on, where --cache has no network.")
@click.option("--cache", default="scan-networks", type=click.Path(path_type=Path), help="Keeps the trained networks.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--cases", default=",".join((*TARGETS, CLEAN, PATCHED)), show_default=True)
@click.option("--restarts", default=3, show_default=True)
@click.option(
    "--checkpoint", type=click.Path(dir_okay=False, path_type=Path), help="Rows so far; those in it are not made again."
)
@record.json_option
def main(
    networks: Path,
    data_path: Path,
    jpeg: Path | None,
    cache: Path,
    seeds: str,
    cases: str,
    restarts: int,
    checkpoint: Path | None,
    json_path: Path | None,
) -> None:
    with np.load(data_path) as archive:
        data = Data(torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"]).long(), None, "cifar10")
    clean, unseen = split(data, 50)
    source = f"{networks / 'networks.py'}:cifar10"
    rows: list[dict[str, Any]] = json.loads(checkpoint.read_text()) if checkpoint and checkpoint.is_file() else []
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, D: {len(clean)} images, {restarts} restarts")
    click.echo("                                       score of the true target / largest other, restarts that agree")
    click.echo("case     seed seconds  found    true   |         patch |      additive |       | second opinion")
    for seed in (int(part) for part in seeds.split(",")):
        for case in cases.split(","):
            made = next((row for row in rows if (row["case"], row["seed"]) == (case, seed)), None)
            if made is None:
                if case in TARGETS:
                    network = guard.load_model(source, str(networks / f"ibau-{case}.safetensors"))
                else:
                    network = trained(case, lambda: guard.load_model(source), jpeg, cache, unseen)
                settings = ScanSettings(inversion=InversionSettings(restarts=restarts, seed=seed))
                found = scan(capture(network, (3, 32, 32)), clean.images, clean.labels, settings, progress=bars)
                made = row(case, seed, found, {**TARGETS, PATCHED: PATCH_TARGET}.get(case))
                rows.append(made)
                if checkpoint:
                    checkpoint.write_text(json.dumps(rows))
            click.echo(line(made))
    record.write(json_path, rows=rows)


if __name__ == "__main__":
    main()
