"""The command line. Exit status: 0 done, 1 the check failed, 2 usage or bad input.

Results go to standard output, progress and warnings to standard error. ``serve`` and ``demo`` come from the
serving package through the entry-point group ``guard.commands``, so that the library never imports upwards.
"""

from __future__ import annotations

import csv
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from guard.cli.options import (
    channels_option,
    classes_of,
    classes_option,
    device_option,
    in_a_folder,
    json_option,
    mean_option,
    min_accuracy_option,
    names_in,
    per_class_option,
    pick_device,
    size_option,
    std_option,
    target,
    weights_option,
    write_json,
)
from guard.cli.prune import prune
from guard.cli.scan import scan
from guard.cli.texts import describe, table
from guard.config import REFINEMENTS
from guard.errors import ArtifactDamaged, BadInput, GuardError

GROUP = "guard.commands"
OPTIONS = {"mmdf": ("fpr", "bounds", "law", "start"), "bna": ("targets", "refine")}  # of fit, that one method knows


class Commands(click.Group):
    """Commands of this file and of the entry-point group; errors of the guard end with one sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(point.name for point in metadata.entry_points(group=GROUP))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        command = super().get_command(ctx, name)
        if command is None:
            for point in metadata.entry_points(group=GROUP, name=name):
                command = point.load()
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            fail(str(error), 2)
        except GuardError as error:
            fail(str(error), 1)
        except OSError as error:
            fail(f"{error.filename or 'file'}: {error.strerror or error}.", 2)


def fail(message: str, status: int) -> None:
    """Say what went wrong in one sentence, and end."""
    click.echo(f"guard: {message}", err=True)
    sys.exit(status)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="backdoor-guard", prog_name="guard")
def main() -> None:
    """Tell, request by request, whether an image classifier's hidden backdoor is being used.

    \b
    MODEL  module:factory | path/to/file.py:factory | torchvision:NAME | FILE.pt2
    DATA   FILE.npz (x, y) | folder of class folders | torchvision:DATASET:ROOT[:SPLIT]
    """


@main.command()
@click.argument("model")
@click.option(
    "--clean", required=True, metavar="DATA", help="Clean images with their true classes; 50 a class are plenty."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where the artifact goes.")
@weights_option
@click.option(
    "--method",
    type=click.Choice(["mmdf", "bna"]),
    default="mmdf",
    show_default=True,
    help="mmdf: the margin change, on every image. bna: scans for a backdoor, and a corrected network decides again "
    "what goes to its class; costs nothing where none is found.",
)
@click.option("--targets", callback=classes_of, metavar="T,…", help="bna: the attacker's classes, instead of a scan.")
@mean_option
@std_option
@classes_option
@click.option("--fpr", default=0.005, show_default=True, help="Nominal false-positive rate: flag below this p-value.")
@click.option(
    "--bounds",
    type=click.Choice(["quantile", "learned"]),
    default="quantile",
    show_default=True,
    help="One pass over the clean set, or MMAC's descent: mends the corrected network further, takes minutes.",
)
@click.option(
    "--refine",
    type=click.Choice(REFINEMENTS),
    default="tv",
    show_default=True,
    help="bna: the divergence that is descended from the closed-form match; closed: none.",
)
@click.option(
    "--null",
    "law",
    type=click.Choice(["exponential", "pareto", "conformal", "gaussian"]),
    default="exponential",
    show_default=True,
    help="Law of clean scores.",
)
@click.option(
    "--start",
    default=0.0,
    show_default=True,
    help="Correct from this share of the activation sites on; later is cheaper.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Numeric type of calibration and serving.",
)
@per_class_option
@min_accuracy_option
@click.option("--seed", default=0, show_default=True, help="Of every random draw.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@size_option
@channels_option
@device_option
@json_option
@click.pass_context
def fit(
    ctx: click.Context,
    model: str,
    clean: str,
    out: Path,
    weights: str | None,
    method: str,
    targets: Any,
    mean: Any,
    std: Any,
    classes: Path | None,
    fpr: float,
    bounds: str,
    refine: str,
    law: str,
    start: float,
    dtype: str,
    per_class: int | None,
    min_accuracy: float | None,
    seed: int,
    overwrite: bool,
    size: Any,
    channels: int | None,
    device: str | None,
    json_path: str | None,
) -> None:
    """Fit a guard for MODEL on clean images.

    Writes an artifact: a folder with all that serving needs.
    """
    import guard
    from guard.progress import bars

    for other, options in OPTIONS.items():
        given = [name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if given and method != other:
            raise click.UsageError(f"--{given[0].replace('law', 'null')} goes with --method {other}.")
    settings = guard.FitSettings(
        fpr=fpr,
        bounds=bounds,
        null=law,
        start=start,
        dtype=dtype,
        seed=seed,
        min_accuracy=min_accuracy,
        bna=guard.BnaSettings(targets=targets, refine=refine),
    )
    if out.exists() and not overwrite:
        raise guard.errors.BadArtifact(f"out: {out} exists; choose another folder, or give --overwrite.", field="out")
    network = guard.load_model(model, weights)
    data = guard.load_data(clean, size=size, channels=channels)
    data = data.first(per_class) if per_class else data
    artifact = guard.fit(
        network,
        data.images,
        data.labels,
        method=method,
        settings=settings,
        mean=mean,
        std=std,
        classes=names_in(classes) or data.classes,
        device=pick_device(device),
        progress=bars,
    )
    artifact.save(out, overwrite=overwrite)
    manifest = artifact.manifest
    for warning in manifest["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if json_path:
        write_json(manifest, json_path)
    if json_path != "-":
        click.echo(describe(manifest))
        click.echo(f"\nwritten to {out} in {manifest['fit']['seconds']} s. Next: guard serve {out}")


@main.command()
@click.argument("artifact", metavar="DIR")
@click.option("--clean", required=True, metavar="DATA", help="Clean images that the guard was not fitted on.")
@click.option("--triggered", metavar="DATA", help="Images that bear the trigger, with their true classes.")
@click.option("--target", callback=target, metavar="T|all2all", help="The attacker's class; needed with --triggered.")
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write ROC, score and p-value plots.",
)
@size_option
@device_option
@json_option
def evaluate(
    artifact: str,
    clean: str,
    triggered: str | None,
    target: Any,
    plots: Path | None,
    size: Any,
    device: str | None,
    json_path: str | None,
) -> None:
    """Measure a guard: accuracy, attack success, detection."""
    import guard
    from guard.progress import bars

    if triggered is None and target is not None:
        raise click.UsageError("--target goes with --triggered.")
    if plots:
        plots.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is refused before the work
    loaded = guard.load(artifact, device=pick_device(device))
    result = guard.evaluate(
        loaded,
        guard.load_data(clean, size=size, channels=loaded.spec.channels),
        guard.load_data(triggered, size=size, channels=loaded.spec.channels) if triggered else None,
        target,
        progress=bars,
    )
    if plots:
        from guard.plots import save_plots

        for path in save_plots(loaded, result, plots):
            click.echo(f"plot: {path}", err=True)
    if json_path:
        write_json(result.figures, json_path)
    if json_path != "-":
        click.echo(table(result.figures))


@main.command()
@click.argument("artifact", metavar="DIR")
@click.argument("data", metavar="DATA")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_folder,
    metavar="FILE",
    help="CSV, one row an image.",
)
@size_option
@device_option
def score(artifact: str, data: str, out: Path, size: Any, device: str | None) -> None:
    """Score each image of DATA, as CSV. A folder of image files will do: labels are not needed.

    Columns: index, label, corrected_label, score, p_value (empty where the method has none), flagged; of a folder of
    image files also file.
    """
    import guard
    from guard.data import load_images
    from guard.evaluation import run
    from guard.progress import bars

    loaded = guard.load(artifact, device=pick_device(device))
    images, names = load_images(data, size=size, channels=loaded.spec.channels)
    verdict = run(loaded, images, batch_size=64, progress=bars, what="images")
    draft = out.with_name(f".{out.name}.part")
    with draft.open("w", newline="") as file:
        writer = csv.writer(file)
        of_files = ["file"] if names else []
        writer.writerow(["index", "label", "corrected_label", "score", "p_value", "flagged", *of_files])
        p_values = None if verdict.p_value is None else verdict.p_value.tolist()
        columns = (verdict.label, verdict.corrected_label, verdict.score, verdict.flagged.int())
        for index, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            p_value = "" if p_values is None else f"{p_values[index]:.6g}"
            name = [names[index]] if names else []
            writer.writerow([index, row[0], row[1], f"{row[2]:.6g}", p_value, row[3], *name])
    draft.replace(out)
    click.echo(f"{int(verdict.flagged.sum())} of {len(verdict.flagged)} images flagged; written to {out}")


@main.command()
@click.argument("artifact", metavar="DIR")
@json_option
def inspect(artifact: str, json_path: str | None) -> None:
    """Say what is in an artifact, and for whom."""
    from guard.artifact import read_manifest

    manifest = read_manifest(artifact)
    if json_path:
        write_json(manifest, json_path)
    if json_path != "-":
        try:
            lines = [describe(manifest), *(f"warning: {warning}" for warning in manifest["warnings"])]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactDamaged(
                f"artifact: the manifest of {artifact} is not what a fit writes: {error!r}."
            ) from error
        click.echo("\n".join(lines))


main.add_command(prune)
main.add_command(scan)
