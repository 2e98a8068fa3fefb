"""`guard serve` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from benchmarks.processes import title


def start(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal starts it."""
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.serve", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | path | (environment or {}),
    )


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, and SIGKILL for one that does not end."""
    process.terminate()
    try:
        process.wait(timeout=60)
    finally:
        process.kill()


def replicas(parent: int) -> set[int]:
    """The processes of the classifier's replicas among the descendants of ``parent``, by their titles."""
    return {pid for pid in descendants(parent) if title(pid).startswith("ray::ServeReplica:guard:classifier")}


def alive(pid: int) -> bool:
    """``pid`` runs; a zombie that nobody has collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` started, and those that these started."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until ``condition`` holds; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
