"""Options that several commands share, and how their values are read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers separated by commas, got {value!r}") from None


def size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = [part.strip() for part in value.split(",")]
    if len(sides) != 2 or not all(side.isdecimal() and len(side) < 7 and int(side) for side in sides):
        raise click.BadParameter(f"expected HEIGHT,WIDTH, got {value!r}")
    return int(sides[0]), int(sides[1])


def target(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    if value is None or value == "all2all":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"expected a class index or all2all, got {value!r}")
    return int(value)


def classes_of(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise click.BadParameter(f"expected different class indices separated by commas, got {value!r}")
    return tuple(int(part) for part in parts)


def in_a_folder(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse a file that cannot be written, before the work begins."""
    if value not in (None, "-"):
        if Path(value).is_dir():
            raise click.BadParameter(f"{value} is a folder; name a file")
        if not Path(value).absolute().parent.is_dir():
            raise click.BadParameter(f"there is no folder {Path(value).parent}")
    return value


def names_in(path: Path | None) -> list[str] | None:
    """The lines of the file of --classes."""
    if path is None:
        return None
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError:
        raise click.BadParameter(f"{path} is no text in UTF-8", param_hint="--classes") from None
    return [line.strip() for line in lines if line.strip()]


Option = Callable[[Callable[..., Any]], Callable[..., Any]]
weights_option: Option = click.option(
    "--weights", metavar="FILE", help="safetensors, or a checkpoint of plain tensors."
)
mean_option: Option = click.option(
    "--mean", callback=numbers, metavar="a,b,c", help="If the model wants normalised images, one value a channel."
)
std_option: Option = click.option("--std", callback=numbers, metavar="a,b,c", help="As --mean.")
classes_option: Option = click.option(
    "--classes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="F",
    help="Class names, one a line.",
)
per_class_option: Option = click.option(
    "--per-class", type=click.IntRange(1), metavar="N", help="Use only the first N images of each class."
)
min_accuracy_option: Option = click.option(
    "--min-accuracy", type=float, help="Refuse a model that is right on a smaller share of DATA."
)
size_option: Option = click.option("--size", callback=size, metavar="H,W", help="Resize images of DATA to this size.")
channels_option: Option = click.option(
    "--channels",
    type=click.Choice([1, 3, 4]),
    help="Convert image files of DATA: grey, RGB or RGBA.  [default: 3; as a torchvision dataset has them]",
)
json_option: Option = click.option(
    "--json",
    "json_path",
    callback=in_a_folder,
    metavar="FILE",
    help="Write the figures as JSON; - for standard output.",
)
device_option: Option = click.option(
    "--device", default=None, help="cpu, cuda, cuda:1 …  [default: cuda if there is one]"
)


def pick_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def write_json(value: dict[str, Any], path: str) -> None:
    text = json.dumps(value, indent=2) + "\n"
    if path == "-":
        click.echo(text, nl=False)
    else:
        Path(path).write_text(text)
