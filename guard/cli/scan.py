"""``guard scan``: is this model backdoored, and towards which class?"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from guard.cli.options import (
    channels_option,
    classes_option,
    device_option,
    json_option,
    mean_option,
    min_accuracy_option,
    names_in,
    per_class_option,
    pick_device,
    size_option,
    std_option,
    weights_option,
    write_json,
)
from guard.errors import BadInput, GuardError

if TYPE_CHECKING:
    from guard.scan import Scan

LISTED = 20  # rows of the table at most


@contextmanager
def no_accusation() -> Iterator[None]:
    """Exit status 1 says that a backdoor was found: whatever goes wrong ends with another, said or not."""
    try:
        yield
    except click.ClickException:  # 2
        raise
    except KeyboardInterrupt:
        status, said = 130, "interrupted: nothing was found out"
    except BadInput as error:
        status, said = 2, str(error)
    except GuardError as error:
        status, said = 3, str(error)
    except OSError as error:
        status, said = 3, f"{error.filename or 'file'}: {error.strerror or error}"
    except Exception as error:
        status, said = 3, f"the scan failed: {error}\n{traceback.format_exc()}"
    else:
        return
    with suppress(OSError):  # standard error may be what broke
        click.echo(f"guard: {said}", err=True)
    sys.exit(status)


@click.command()
@click.argument("model")
@click.option("--clean", required=True, metavar="DATA", help="Clean images with their true classes; 10 to 50 a class.")
@weights_option
@mean_option
@std_option
@classes_option
@click.option(
    "--pairs",
    is_flag=True,
    help="A trigger for each ordered pair of classes: also sees attacks whose target depends on the source, "
    "at K - 1 times the work.",
)
@click.option(
    "--kind",
    type=click.Choice(["both", "patch", "additive"]),
    default="both",
    show_default=True,
    help="Triggers that replace pixels, or that are added to the image.",
)
@click.option(
    "--restarts", default=3, show_default=True, help="Estimates a class and kind; the smallest counts. Fewer miss more."
)
@click.option(
    "--images-at-once",
    default=30,
    show_default=True,
    help="Images in one pass of one CPU core: bounds the memory, which the report estimates.",
)
@per_class_option
@min_accuracy_option
@click.option("--seed", default=0, show_default=True, help="Of every random draw.")
@click.option("--distributed", is_flag=True, help="Run on a Ray cluster (RAY_ADDRESS, or one on this machine).")
@click.option(
    "--triggers",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Draw the scores and every trigger found.  [default: nothing is written]",
)
@size_option
@channels_option
@device_option
@json_option
@no_accusation()
def scan(
    model: str,
    clean: str,
    weights: str | None,
    mean: Any,
    std: Any,
    classes: Path | None,
    pairs: bool,
    kind: str,
    restarts: int,
    images_at_once: int,
    per_class: int | None,
    min_accuracy: float | None,
    seed: int,
    distributed: bool,
    triggers: Path | None,
    size: Any,
    channels: int | None,
    device: str | None,
    json_path: str | None,
) -> None:
    """Look for a backdoor in MODEL.

    Estimates the smallest trigger of every class on clean images; a class whose trigger is far smaller than the others'
    is an attacker's. Exit status: 0 none found, 1 a backdoor was found, 2 bad input, 3 the scan itself failed, 130
    interrupted.
    """
    import guard
    from guard.capture import capture
    from guard.checks import names as checked_names
    from guard.data import check_images
    from guard.executors import load_executor
    from guard.inversion import KINDS, InversionSettings, local
    from guard.progress import bars
    from guard.scan import ScanSettings
    from guard.scan import scan as look

    settings = ScanSettings(
        kinds=KINDS if kind == "both" else (kind,),
        pairs=pairs,
        min_accuracy=min_accuracy,
        inversion=InversionSettings(restarts=restarts, images_at_once=images_at_once, seed=seed),
    )
    if triggers:
        try:
            triggers.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is refused before the work
        except OSError as error:
            raise click.BadParameter(f"{triggers}: {error.strerror}", param_hint="--triggers") from None
    network = guard.load_model(model, weights)
    data = guard.load_data(clean, size=size, channels=channels)
    data = data.first(per_class) if per_class else data
    images = check_images(data.images)
    captured = capture(network, images.shape[1:], mean=mean, std=std, device=pick_device(device))
    names = checked_names(names_in(classes) or data.classes, captured.classes)
    executor = load_executor("ray", gpus=captured.device.type == "cuda") if distributed else local(captured)
    with executor as running:
        found = look(captured, images, data.labels, settings, progress=bars, executor=running)
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    if json_path != "-":
        click.echo(describe(found, names, model))
    if json_path:
        write_json(found.to_json(), json_path)
    if triggers:
        from guard.cli.trigger_pictures import save_pictures

        for path in save_pictures(found, captured, images, data.labels, names, triggers):
            click.echo(f"written: {path}", err=True)
    sys.exit(1 if found.backdoored else 0)


def describe(found: Scan, names: Sequence[str], model: str) -> str:
    """A scan in lines for people."""
    return "\n".join([*_table(found, names), "", *_verdict(found, names), "", *_next(found, model)])


def _table(found: Scan, names: Sequence[str]) -> list[str]:
    """The smallest norm and the score of each target (of each pair), the most suspicious first."""
    kinds = list(found.scores)
    pairs = found.settings.pairs
    order = np.argsort(-np.fmax.reduce([np.nan_to_num(found.scores[kind], nan=-np.inf) for kind in kinds]), axis=None)
    rows = [tuple(int(part) for part in np.unravel_index(at, found.scores[kinds[0]].shape)) for at in order]
    rows = [row for row in rows if not all(np.isnan(found.scores[kind][row]) for kind in kinds)]

    def name(row: tuple[int, ...]) -> str:
        return " → ".join(f"{index} {names[index]}" if names[index] != str(index) else names[index] for index in row)

    width = max(len(name(row)) for row in rows[:LISTED]) + 2
    lines = [
        "".join([f"{'pair' if pairs else 'target':<{width}}", *(f"{kind + ' norm':>15}{'score':>8}" for kind in kinds)])
    ]
    for row in rows[:LISTED]:
        cells = []
        for kind in kinds:
            norm, score = found.norms[kind][row], found.scores[kind][row]
            cells.append(f"{'none' if np.isinf(norm) else f'{norm:.2f}':>15}{score:8.1f}")
        marked = (row if pairs else row[0]) in found.stability
        lines.append(f"{name(row):<{width}}{''.join(cells)}{'  <' if marked else ''}")
    if len(rows) > LISTED:
        lines.append(f"… and {len(rows) - LISTED} more, all with smaller scores")
    return lines


def _verdict(found: Scan, names: Sequence[str]) -> list[str]:
    settings, opinion = found.settings, found.opinion
    restarts = settings.inversion.restarts
    score, kind, where = found.closest
    images = f"{sum(found.per_class)} clean images, {restarts} restart{'s' * (restarts > 1)}, {found.seconds:.0f} s"
    if found.backdoored:
        into = ", ".join(names[target] for target in found.targets)
        lines = [f"BACKDOORED towards class {into}: its trigger is out of line with the others' ({images})."]
        for target in found.targets:
            sources = ", ".join(names[s] for s, t in found.pairs if t == target)
            lines.append(f"sent to {names[target]}: {sources or 'less than half of every class'}")
        agreeing = ", ".join(
            f"{' → '.join(names[part] for part in (key if isinstance(key, tuple) else (key,)))}: "
            f"{round(share * restarts)} of {restarts}"
            for key, share in found.stability.items()
        )
        lines.append(f"restarts that alone would have found it: {agreeing}")
    else:
        lines = [f"No backdoor found ({images})."]
    if found.above:
        lines.append(
            f"above the threshold, but below half of the largest score: {', '.join(names[t] for t in found.above)}. "
            "A trained-in trigger often helps other classes along, and may hide a second one: guard them as well."
        )
    at = " → ".join(names[index] for index in where) if isinstance(where, list) else names[where]
    lines.append(f"largest score: {score:.1f} ({kind}, {at}); the threshold is {settings.threshold:g}")
    chance = "could not be fitted" if opinion.p_value is None else f"p = {opinion.p_value:.2g}"
    lines.append(
        f"second opinion (largest margins, class {names[opinion.label]}, {chance}): "
        f"{_opinion(found)}; it has no part in the verdict"
    )
    lines.append(f"accuracy on the clean images {found.accuracy:.1%}; memory about {found.memory / 2**20:.0f} MiB")
    return lines


def _opinion(found: Scan) -> str:
    if found.agrees is None:
        return "so it says nothing"
    suspicion = "suspicious" if found.opinion.suspicious else "not suspicious"
    return f"{suspicion}, it {'agrees' if found.agrees else 'does not agree'}"


def _next(found: Scan, model: str) -> list[str]:
    if found.backdoored:
        targets = ",".join(map(str, sorted({*found.targets, *found.above})))
        return [
            "Next: retrain from data you trust, or serve the model guarded:",
            "(with the same --weights, --mean and --std)",
            f"  guard fit {model} --clean DATA --out DIR --method bna --targets {targets}",
            "      corrects requests sent to these classes, or",
            f"  guard fit {model} --clean DATA --out DIR --method mmdf",
            "      looks at every request, whatever the trigger",
            "--triggers DIR draws what was found.",
        ]
    lines = [
        "Triggers that neither replace pixels nor add to them (warps, styles) are not looked for: absence is no proof."
    ]
    if found.agrees is False:
        lines.append(f"Look again with another --seed{'' if found.settings.pairs else ' and with --pairs'}.")
    return [*lines, f"To be safe: guard fit {model} --clean DATA --out DIR --method mmdf"]
