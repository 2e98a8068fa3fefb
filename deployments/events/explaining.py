"""``guard explain``: what flagged images have in common, as one picture and its numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli.options import device_option, pick_device, size_option, write_json

if TYPE_CHECKING:
    from deployments.events.shelf import Entry


@click.command()
@click.argument("artifact", metavar="ARTIFACT")
@click.option(
    "--quarantine",
    "folder",
    required=True,
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    metavar="FOLDER",
    help="Flagged images, as a server keeps them.",
)
@click.option("--clean", required=True, metavar="DATA", help="Clean images with their true classes.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Gets explain.png and explain.json.",
)
@click.option("--class", "name", metavar="NAME", help="By its name or index.  [default: the one most often flagged]")
@size_option
@device_option
def explain(
    artifact: str,
    folder: Path,
    clean: str,
    out: Path,
    name: str | None,
    size: tuple[int, int] | None,
    device: str | None,
) -> None:
    """Show what the flagged images of one class have in common.

    Their mean beside clean images, the pixels on which they agree (a patch stands out there), and the layers whose
    activations went beyond the guard's bounds.
    """
    import guard
    from deployments.events import drawing, explanation, pictures, shelf
    from guard.artifact import load_artifact
    from guard.progress import bars

    loaded = load_artifact(artifact, device=pick_device(device))
    every = shelf.entries(folder)
    ours = shelf.chosen(every, None, fingerprint=loaded.manifest["fingerprint"])
    if len(ours) < len(every):
        click.echo(f"{len(every) - len(ours)} images were flagged for another network and are left out", err=True)
    label = _label(ours, tuple(loaded.manifest["classes"]), name)
    kept = pictures.read(folder, [entry for entry in ours if entry.label == label], bars)
    found = explanation.explain(
        loaded, kept.images, label, guard.load_data(clean, size=size, channels=loaded.captured.spec.channels), bars
    )
    out.mkdir(parents=True, exist_ok=True)
    drawing.figure(found).savefig(out / "explain.png", dpi=120)
    write_json(found.to_json(), str(out / "explain.json"))
    top, left, bottom, right = found.box
    click.echo(
        f"{found.flagged} images flagged as {found.name} agree most on rows {top} to {bottom}, columns {left} to "
        f"{right}: {found.consistency.max():.3g} deviations from clean images (median of all pixels "
        f"{float(found.to_json()['consistency']['median']):.3g})"
    )
    click.echo(f"written to {out / 'explain.png'} and {out / 'explain.json'}")


def _label(entries: list[Entry], classes: tuple[str, ...], name: str | None) -> int:
    """The class that is asked for, or the one most often flagged."""
    from guard.errors import BadData, BadSetting

    if name is not None:
        if name in classes:
            return classes.index(name)
        if name.isdecimal() and int(name) < len(classes):
            return int(name)
        raise BadSetting(f"class: the model has no class {name!r}; it has {', '.join(classes[:20])}.", field="class")
    counts = Counter(entry.label for entry in entries if entry.label < len(classes))
    if not counts:
        raise BadData("quarantine: it holds no image that was flagged for this network.", field="quarantine")
    told = ", ".join(f"{classes[label]} {number}" for label, number in counts.most_common(10))
    click.echo(f"flagged images by class: {told}", err=True)
    return counts.most_common(1)[0][0]
