"""A command against whoever would parse it, without running it: `faults(command)` says what is wrong.

Our own commands go through click's real parsers, `make` through the Makefile; the programs of others through the
options that they own up to. What stands for a value (`DIR`, `<name>`, `$KEY`, `…`) is taken for one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import click
from pages import ROOT, Command
from starlette.routing import Match

MAKEFILE = (ROOT / "Makefile").read_text()
STANDS_FOR_A_VALUE = re.compile(r"^[A-Z][A-Z0-9_]*(\.\w+)?$|<[A-Za-z][\w .-]*>|…|\$")
OUR_PORT = re.compile(r"^(?:http://)?(?:localhost|127\.0\.0\.1):8000(?P<path>/[^?#]*)?")
HELM = {  # of those subcommands that pages use; no helm is to be had everywhere
    ("install",): {"-f", "--values", "--set", "-n", "--namespace", "--create-namespace", "--version", "--wait"},
    ("upgrade",): {
        "-f",
        "--values",
        "--set",
        "-n",
        "--namespace",
        "--install",
        "--version",
        "--wait",
        "--reuse-values",
    },
    ("uninstall",): {"-n", "--namespace"},
    ("repo", "add"): set(),
    ("repo", "update"): set(),
}
DOCKER = {
    "build": {"-t", "--tag", "--target", "--output", "--build-arg", "-f", "--file", "--platform", "--sbom"},
    "run": {
        "--rm",
        "-it",
        "-d",
        "-p",
        "-v",
        "--gpus",
        "--shm-size",
        "--name",
        "--user",
        "--read-only",
        "--tmpfs",
        "-e",
    },
    "push": set(),
    "tag": set(),
}


def faults(command: Command) -> list[str]:
    """What is wrong with it, each in a sentence; [] for a program that only a shell knows."""
    check = CHECKS.get(command.program)
    return [f"{command.where}: {command}: {fault}" for fault in check(command)] if check else []


def unfinished(word: str) -> bool:
    """Whether a reader has to put something of theirs in its place."""
    return STANDS_FOR_A_VALUE.search(word) is not None


@cache
def known_options() -> frozenset[str]:
    """Every option of a command of ours, and those of others that pages use."""
    found = {"--help", "--version"}.union(*HELM.values(), *DOCKER.values())
    for root in (_guard(), *(_main(name) for name in _modules())):
        for command in _tree(root) if root else ():
            found |= {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    return frozenset(found)


def click_faults(command: click.Command, words: Sequence[str], *, whole: bool) -> Iterator[str]:
    """Options that are not there, values that are missing or impossible, what is too much."""
    context = click.Context(command, info_name=command.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of click's parser, which click itself goes on using
        try:
            values, rest, _ = command.make_parser(context).parse_args(list(words))
        except click.UsageError as error:
            if whole or not isinstance(error, click.BadOptionUsage):  # a mention of `--plots` needs no value
                yield error.format_message()
            return
    if {"--help", "-h"} & set(words):
        whole = False
    for param in command.get_params(context):
        value = values.get(param.name)
        if value is None or "UNSET" in repr(value):
            if param.required and whole:
                yield f"{param.get_error_hint(context)} is missing"
        elif not isinstance(param.type, click.Path | click.File) and not unfinished(str(value)):
            try:
                param.type_cast_value(context, value)
            except click.UsageError as error:
                yield error.format_message()
    if isinstance(command, click.Group):
        yield from _subcommand(command, context, rest, whole)
    elif rest:
        yield f"too much: {' '.join(rest)}"


def _subcommand(group: click.Group, context: click.Context, rest: Sequence[str], whole: bool) -> Iterator[str]:
    if not rest or rest[0] in ("COMMAND", "…", "--help", "-h"):
        if not rest and whole and not group.invoke_without_command:
            yield "the subcommand is missing"
        return
    found = group.get_command(context, rest[0])
    if found is None:
        yield f"no command {rest[0]}; there are {', '.join(group.list_commands(context))}"
        return
    yield from click_faults(found, rest[1:], whole=whole)


def _guard_faults(command: Command) -> Iterator[str]:
    yield from click_faults(_guard(), command.words[1:], whole=command.whole)


def _serve_faults(command: Command) -> Iterator[str]:
    """Ray Serve's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        from ray.serve.scripts import cli

    yield from click_faults(cli, command.words[1:], whole=command.whole)


def _ray_faults(command: Command) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.scripts.scripts import cli

    yield from click_faults(cli, command.words[1:], whole=command.whole)


def _python_faults(command: Command) -> Iterator[str]:
    words = command.words[1:]
    if not words or words[0] in ("-", "-c"):
        return
    if words[0] != "-m":
        if not unfinished(words[0]) and not (ROOT / words[0]).is_file():
            yield f"no file {words[0]}"
        return
    name, *rest = words[1:]
    if name == "pytest":
        yield from _pytest_faults(rest)
    elif name in ("pip", "venv"):
        return
    elif name == "guard":
        yield from click_faults(_guard(), rest, whole=command.whole)
    elif not _there(name):
        yield f"no module {name}"
    elif (main := _main(name)) is not None:
        yield from click_faults(main, rest, whole=command.whole)
    elif rest:
        yield f"{name} takes no arguments: {' '.join(rest)}"


def _pytest_faults(words: Sequence[str]) -> Iterator[str]:
    for before, word in pairwise(("", *words)):
        if word.startswith("-"):
            if word.split("=")[0] not in _told((sys.executable, "-m", "pytest", "--help")):
                yield f"pytest has no option {word}"
        elif before in ("-m", "-k"):
            continue
        elif not unfinished(word) and not (ROOT / word.split("::")[0]).exists():
            yield f"no tests at {word}"


def _make_faults(command: Command) -> Iterator[str]:
    """Its targets exist and the Makefile reads its variables; what the recipe calls is checked as well."""
    targets = [word for word in command.words[1:] if "=" not in word]
    variables = [word.partition("=")[0] for word in command.words[1:] if "=" in word]
    for target in targets:
        if target not in make_targets():
            yield f"the Makefile has no target {target}; it has {', '.join(sorted(make_targets()))}"
            return
    for name in variables:
        if f"$({name})" not in MAKEFILE:
            yield f"the Makefile does not read {name}"
    if command.whole:
        dry = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", *command.words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        if dry.returncode:
            yield dry.stderr.strip()
        for line in dry.stdout.replace("\\\n", " ").splitlines():
            if line.startswith((".venv/bin/python ", ".venv/bin/guard ")):
                words = shlex.split(line)
                yield from faults(Command(command.where, (Path(words[0]).name, *words[1:]), whole=True))


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", MAKEFILE, re.MULTILINE))


def _curl_faults(command: Command) -> Iterator[str]:
    """Its options are curl's, and what it asks of our port is a route that we have."""
    told = _told(("curl", "--help", "all"))
    for word in command.words[1:]:
        if told and re.match(r"--?[A-Za-z]", word) and not _curl_option(word, told):
            yield f"curl has no option {word}"
        found = OUR_PORT.match(word)
        if found and not _route(found["path"] or "/", _method(command)):
            yield f"no route answers {_method(command)} {found['path']}"


def _curl_option(word: str, told: frozenset[str]) -> bool:
    return word in told if word.startswith("--") else all(f"-{letter}" in told for letter in word[1:])


def _method(command: Command) -> str:
    words = command.words
    for option in ("-X", "--request"):
        if option in words:
            return words[words.index(option) + 1]
    sends = any(word in ("-d", "-F", "--form", "--json") or word.startswith("--data") for word in words)
    return "POST" if sends else "GET"


def _route(path: str, method: str) -> bool:
    """Whether a handler of ours is behind this path, whatever it says."""
    from deployments.engine.catalogue import Catalogue
    from deployments.http.exposition import PREFIX, STATE
    from deployments.http.ingress import build_http_app

    if path.rstrip("/") in (PREFIX, PREFIX + STATE):
        return method == "GET"
    scope = {"type": "http", "path": path, "method": method, "headers": [], "root_path": ""}
    return any(route.matches(scope)[0] == Match.FULL for route in build_http_app(Catalogue(), "0").routes)


def _helm_faults(command: Command) -> Iterator[str]:
    words = command.words[1:]
    known = next((options for sub, options in HELM.items() if words[: len(sub)] == sub), None)
    if known is None:
        yield "not a subcommand that pages use: add it to HELM with its options"
        return
    yield from _unknown_options(words, known)
    if command.whole and words[0] in ("install", "upgrade"):
        chart = [word for word in words[1:] if not word.startswith("-")][1]
        if chart.startswith("helm/") and not (ROOT / chart / "Chart.yaml").is_file():
            yield f"no chart at {chart}"


def _docker_faults(command: Command) -> Iterator[str]:
    known = DOCKER.get(command.words[1])
    if known is None:
        yield "not a subcommand that pages use: add it to DOCKER with its options"
    else:
        yield from _unknown_options(command.words[2:], known)


def _kubectl_faults(command: Command) -> Iterator[str]:
    words = [word for word in command.words[1:] if word not in ("-n", "default")]
    told = _told(("kubectl", words[0], "--help")) | _told(("kubectl", "options"))
    if told:
        yield from _unknown_options(words, told | {"--from-file", "-w", "-f", "-o"})


def _unknown_options(words: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("-") and word.split("=")[0] not in known:
            yield f"no option {word}"


def _promtool_faults(command: Command) -> Iterator[str]:
    if command.words[1:3] not in (("check", "config"), ("check", "rules"), ("test", "rules")):
        yield "promtool has no such command"


CHECKS: dict[str, Callable[[Command], Iterator[str]]] = {
    "guard": _guard_faults,
    "make": _make_faults,
    "python": _python_faults,
    "serve": _serve_faults,
    "ray": _ray_faults,
    "curl": _curl_faults,
    "helm": _helm_faults,
    "docker": _docker_faults,
    "kubectl": _kubectl_faults,
    "promtool": _promtool_faults,
}


@cache
def _guard() -> click.Group:
    from guard.cli import main

    return main


@cache
def _main(module: str) -> click.Command | None:
    """The click command of `python -m module`, if it is one."""
    loaded: ModuleType = importlib.import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = importlib.import_module(f"{module}.__main__")
    main = getattr(loaded, "main", None)
    return main if isinstance(main, click.Command) else None


def _modules() -> list[str]:
    """What `python -m` runs of ours."""
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
    files += (ROOT / "deployments").rglob("__main__.py")
    runnable = [path for path in files if '__name__ == "__main__"' in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in runnable]


def _there(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
        return found is not None and (
            found.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None
        )
    except ModuleNotFoundError:
        return False


def _tree(command: click.Command) -> Iterator[click.Command]:
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _tree(found)


@cache
def _told(call: tuple[str, ...]) -> frozenset[str]:
    """The options that a program's help names; none where it is not installed."""
    if shutil.which(call[0]) is None:
        return frozenset()
    text = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))
