"""The command line: every command with its arguments and options, from the parser itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping

import click

import guard.cli
from making.markdown import anchor, code, sections, table


def page() -> str:
    """Every command with its arguments and options."""
    root = guard.cli.main
    found = list(_commands(root, "guard"))
    status = (inspect.getdoc(sys.modules["guard.cli.main"]) or "").split("\n")[0].partition(". ")[2]
    index = table(
        ("command", "what"),
        ([f"[`{name}`](#{anchor(name)})", _short(command)] for name, command in found[1:]),
    )
    return sections(
        "# The command line",
        f"`guard`, also `python -m guard`. {status} Results go to standard output, progress to standard error. "
        "`-h` tells the same of each command.",
        _help(root),
        index,
        *(_command(name, command, dict(found)) for name, command in found[1:]),
    )


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, each with its full name."""
    yield name, command
    if isinstance(command, click.Group):
        ctx = click.Context(command, info_name=name)
        for each in command.list_commands(ctx):
            below = command.get_command(ctx, each)
            if below is not None:
                yield from _commands(below, f"{name} {each}")


def _short(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0]


def _help(command: click.Command) -> str:
    """The help text; what click is told to leave as it is becomes a block of code."""
    parts = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```\n{part.removeprefix(chr(8)).strip()}\n```" if part.startswith("\b") else " ".join(part.split())
        for part in parts
    )


def _command(name: str, command: click.Command, known: Mapping[str, click.Command]) -> str:
    """known: all commands by name. A command below another has that one's arguments before its own name."""
    words = name.split()
    usage = "guard"
    for count in range(2, len(words) + 1):
        arguments = [one for one in known[" ".join(words[:count])].params if isinstance(one, click.Argument)]
        usage = " ".join([usage, words[count - 1], *map(_metavar, arguments)])
    options = [one for one in command.params if isinstance(one, click.Option)]
    usage += " [OPTIONS]" * bool(options) + " COMMAND …" * isinstance(command, click.Group)
    rows = [[code(" ".join([*one.opts, _metavar(one)]).strip()), *_default(one)] for one in options]
    return sections(
        f"## {name}",
        f"```\n{usage}\n```",
        _help(command),
        table(("option", "default", "what"), rows) if rows else "",
    )


def _metavar(one: click.Parameter) -> str:
    if isinstance(one, click.Option) and one.is_flag:
        return ""
    if one.metavar:
        return one.metavar
    if isinstance(one.type, click.Choice):
        return "|".join(str(choice) for choice in one.type.choices)
    return (one.name or "").upper() if isinstance(one, click.Argument) else one.type.name.upper().removesuffix(" RANGE")


def _default(one: click.Option) -> tuple[str, str]:
    """(default, help): the help text may end with a default in words."""
    text, _, words = (one.help or "").partition("[default: ")
    if isinstance(one.type, (click.IntRange, click.FloatRange)):
        ends = [f"at least {one.type.min}" if one.type.min is not None else ""]
        ends.append(f"at most {one.type.max}" if one.type.max is not None else "")
        text = f"{text.strip().rstrip('.')} ({', '.join(filter(None, ends))})."
    if one.required:
        return "required", text
    if words:
        return words.rstrip("]"), text
    return (code(one.default) if one.show_default else ""), text
