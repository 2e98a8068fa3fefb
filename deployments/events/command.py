"""``guard quarantine FOLDER …``: look at flagged images, take them along, let go of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli.options import in_a_folder, json_option, write_json

if TYPE_CHECKING:
    from deployments.events.shelf import Entry

DAY_S = 86_400.0
SHOWN = 64
class_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--class", "name", metavar="NAME", help="Only images decided as this class, by its name or its index."
)


@click.group()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.pass_context
def quarantine(ctx: click.Context, folder: Path) -> None:
    """Look at the flagged images in FOLDER, which a server keeps.

    guard quarantine FOLDER COMMAND --help tells the rest.
    """
    ctx.obj = folder


@quarantine.command("list")
@class_option
@json_option
@click.pass_obj
def list_(folder: Path, name: str | None, json_path: str | None) -> None:
    """What is there, oldest first."""
    found = _entries(folder, name)
    if json_path:
        write_json({"images": [entry.model_dump(mode="json") for entry in found]}, json_path)
    if json_path != "-":
        width = max((len(_plain(entry.predicted_class)) for entry in found), default=0)
        click.echo(f"{'time (UTC)':19}  {'class':{width}}  {'score':>9}  {'p':>9}  {'version':8}  file")
        for entry in found:
            p_value = "" if entry.p_value is None else f"{entry.p_value:.3g}"
            click.echo(
                f"{entry.time:%Y-%m-%d %H:%M:%S}  {_plain(entry.predicted_class):{width}}  {entry.score:>9.4g}  "
                f"{p_value:>9}  {_plain(entry.version):8}  {entry.file}"
            )
        click.echo(f"{len(found)} images")


@quarantine.command()
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_folder,
    metavar="FILE.png",
    help="Where the picture goes.",
)
@click.option("--most", type=click.IntRange(1), default=SHOWN, show_default=True, help="The newest so many.")
@class_option
@click.pass_obj
def sheet(folder: Path, out: Path, most: int, name: str | None) -> None:
    """A contact sheet, with class, score and time of each image."""
    from deployments.events import pictures
    from guard.progress import bars

    kept = pictures.read(folder, _entries(folder, name)[-most:], bars)
    pictures.sheet(kept).savefig(out, dpi=120, format="png")
    click.echo(f"{len(kept.entries)} images; written to {out}")


@quarantine.command()
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_folder,
    metavar="FILE.npz",
    help="Where the arrays go.",
)
@class_option
@click.pass_obj
def export(folder: Path, out: Path, name: str | None) -> None:
    """The images as DATA for the other commands: x, y.

    y is the network's decision, for nobody knows the true class. Beside it: label (the same), score, p_value (NaN where
    there is none), time (seconds, Unix).
    """
    import numpy as np

    from deployments.events import pictures
    from guard.progress import bars

    kept = pictures.read(folder, _entries(folder, name), bars)
    label = np.array([entry.label for entry in kept.entries], np.int64)
    draft = out.with_name(f".{out.name}.part")
    with draft.open("wb") as file:
        np.savez(
            file,
            x=kept.images,
            y=label,
            label=label,
            score=np.array([entry.score for entry in kept.entries]),
            p_value=np.array([entry.p_value for entry in kept.entries], np.float64),
            time=np.array([entry.time.timestamp() for entry in kept.entries]),
        )
    draft.replace(out)
    click.echo(f"{len(kept.entries)} images; written to {out}")


@quarantine.command()
@click.option("--older-than", type=click.FloatRange(0), metavar="DAYS", help="Only images from before that.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@class_option
@click.pass_obj
def purge(folder: Path, older_than: float | None, yes: bool, name: str | None) -> None:
    """Remove images for good; without --class also those whose line is lost or broken."""
    from deployments.events import shelf

    before = None if older_than is None else time.time() - older_than * DAY_S
    if name is None:
        found = [one.stem for one in shelf.held(folder) if before is None or one.since < before]
    else:
        found = [Path(entry.file).stem for entry in shelf.chosen(shelf.entries(folder), name, before=before)]
    if found and not yes:
        click.confirm(f"Remove {len(found)} images from {folder}?", abort=True, err=True)
    for stem in found:
        shelf.remove(folder, stem)
    click.echo(f"{len(found)} images removed")


def _entries(folder: Path, name: str | None) -> list[Entry]:
    from deployments.events import shelf

    return shelf.chosen(shelf.entries(folder), name)


def _plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
