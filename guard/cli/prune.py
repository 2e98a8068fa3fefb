"""``guard prune``: the opt-in repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guard.cli.options import (
    channels_option,
    device_option,
    json_option,
    mean_option,
    min_accuracy_option,
    per_class_option,
    pick_device,
    size_option,
    std_option,
    weights_option,
    write_json,
)


@click.command()
@click.argument("model")
@click.option("--clean", required=True, metavar="DATA", help="Clean images with their true classes; ten a class.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where the repaired model goes."
)
@weights_option
@mean_option
@std_option
@click.option(
    "--mu",
    default=1.5,
    show_default=True,
    help="Prune filters that score above mean + mu·std of their layer; a larger mu prunes less.",
)
@click.option("--epochs", default=8, show_default=True, help="Passes of fine-tuning over DATA; 0 for none.")
@click.option("--learning-rate", default=0.001, show_default=True, help="Of fine-tuning.")
@per_class_option
@min_accuracy_option
@click.option("--seed", default=0, show_default=True, help="Of the order of images.")
@click.option("--overwrite", is_flag=True, help="Replace a pruned model that is there.")
@size_option
@channels_option
@device_option
@json_option
def prune(
    model: str,
    clean: str,
    out: Path,
    weights: str | None,
    mean: Any,
    std: Any,
    mu: float,
    epochs: int,
    learning_rate: float,
    per_class: int | None,
    min_accuracy: float | None,
    seed: int,
    overwrite: bool,
    size: Any,
    channels: int | None,
    device: str | None,
    json_path: str | None,
) -> None:
    """Repair MODEL: prune suspicious filters, fine-tune.

    Changes weights and costs accuracy, and need not end the attack. Writes a folder with model.safetensors (for the
    same architecture), model.pt2 (a MODEL that normalises images itself: give no --mean and --std with it) and
    report.json.
    """
    import guard
    from guard.methods.prune import PruneSettings, check_place
    from guard.methods.prune import prune as repair
    from guard.progress import bars

    settings = PruneSettings(mu=mu, epochs=epochs, learning_rate=learning_rate, seed=seed, min_accuracy=min_accuracy)
    if out.exists() and not overwrite:
        raise guard.errors.BadArtifact(f"out: {out} exists; choose another folder, or give --overwrite.", field="out")
    check_place(out, overwrite)
    network = guard.load_model(model, weights)
    data = guard.load_data(clean, size=size, channels=channels)
    data = data.first(per_class) if per_class else data
    pruned = repair(
        network,
        data.images,
        data.labels,
        settings=settings,
        mean=mean,
        std=std,
        classes=data.classes,
        device=pick_device(device),
        progress=bars,
    )
    pruned.save(out, overwrite=overwrite)
    for warning in pruned.report["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if json_path:
        write_json(pruned.report, json_path)
    if json_path != "-":
        click.echo(describe(pruned.report))
        click.echo(f"\nwritten to {out} in {pruned.report['seconds']} s\n{next_steps(out)}")


def describe(report: dict[str, Any]) -> str:
    """A report in lines for people."""
    accuracy, settings, layers = report["accuracy"], report["settings"], report["layers"]
    rows = [f"accuracy on the {report['images']} clean images given"]
    rows.append(f"  before              {accuracy['original']:6.1%}")
    rows.append(f"  after pruning       {accuracy['pruned']:6.1%}")
    if settings["epochs"]:
        rows.append(
            f"  after fine-tuning   {accuracy['fine_tuned']:6.1%}   on the very images it learned: this flatters"
        )
    rows += ["", f"filters pruned (score above mean + {settings['mu']:g}·std of the layer)"]
    width = max(len(layer["name"]) for layer in layers)
    for layer in layers:
        rows.append(f"  {layer['name']:<{width}}  {len(layer['pruned']):4} of {layer['filters']}")
    pruned, filters = (sum(part) for part in zip(*((len(a["pruned"]), a["filters"]) for a in layers), strict=True))
    rows.append(f"  {'all':<{width}}  {pruned:4} of {filters}")
    for node, reason in report["left_out"].items():
        rows.append(f"  {node}: left out, {reason}")
    if not pruned:
        rows.append("  no filter stands out: the weights were at most fine-tuned, which seldom ends a backdoor")
    rows += [
        "",
        "Whether a trigger still works cannot be known from clean images, and is not claimed here.",
    ]
    return "\n".join(rows)


def next_steps(out: Path) -> str:
    """What to do with the folder."""
    return (
        "Next: measure it, on clean images that it has not seen and on triggered ones if you have any:\n"
        f"  guard fit {out}/model.pt2 --clean DATA --out DIR    (no --mean, no --std: they are inside)\n"
        "  guard evaluate DIR --clean DATA --triggered DATA --target T"
    )
