"""What runs on this machine, and what it takes. A process that ends meanwhile has no title and takes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import psutil


def title(process: int) -> str:
    """How a process calls itself: Ray's say what they do, others have their command line."""
    try:
        return " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return ""


def titles() -> Iterator[tuple[int, str]]:
    """(number, title) of each process."""
    return ((process, title(process)) for process in psutil.pids())


def replicas(application: str, deployment: str = "") -> list[int]:
    """The processes of an application's replicas; deployment: of this one alone."""
    return [process for process, told in titles() if told.startswith(f"ray::ServeReplica:{application}:{deployment}")]


def cpu_seconds(process: int) -> float:
    """Processor time so far."""
    try:
        taken = psutil.Process(process).cpu_times()
    except psutil.Error:
        return 0.0
    return float(taken.user + taken.system)


def resident_bytes(process: int) -> int:
    """Resident memory."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0
