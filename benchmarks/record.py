"""What a figure was measured with: the command, the commit, the machine. Every benchmark writes its file so."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import click
import torch

from guard.versions import versions

ROOT = Path(__file__).parent.parent
OURS = ("--json", "--out")  # where the figures go: not told

json_option: Callable[..., Any] = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON."
)


def write(path: Path | None, about: dict[str, Any] | None = None, **figures: Any) -> None:
    """The figures and where they come from, as JSON; nothing without a path. about: a `record` that was made before
    they were measured, with the machine's load as it was then."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps((about or record()) | figures, indent=1) + "\n")


def record(**figures: Any) -> dict[str, Any]:
    """The figures, after the command and the commit that made them, and where."""
    return {"command": command(), "commit": commit(), **provenance(), **figures}


def provenance() -> dict[str, Any]:
    """Hardware, versions and time (UTC, ISO 8601)."""
    return {
        "hardware": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": versions(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command() -> str:
    """As it was typed, but for the folders of paths and where the figures go."""
    module = sys.modules["__main__"].__spec__
    program = PurePath(sys.argv[0]).name if module is None else f"-m {module.name.removesuffix('.__main__')}"
    words, left = [f"python {program}"], iter(sys.argv[1:])
    for word in left:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if option in OURS:
            if not equals:
                next(left, None)
            continue
        words.append(f"{option}{equals}{_said(value)}" if value or not option else word)
    return " ".join(words)


def _said(value: str) -> str:
    """A value without the folder of the path that it is, or ends with after colons, and quoted where need be."""
    before, colon, path = value.rpartition(":")
    if path.startswith(("/", "./", "../", "~")) or Path(path).exists():
        path = PurePath(path).name or path
    return shlex.quote(f"{before}{colon}{path}").replace("''", '""')


def commit() -> str:
    """Of the working tree, with a plus where what computes has changed since."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "guard", "deployments", "benchmarks/*.py"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
