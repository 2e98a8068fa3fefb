"""Chunks of a scan as Ray tasks: on the cluster that this machine belongs to, or on a Ray of its own."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

import deployments
import guard
from deployments import local
from deployments.errors import StartFailed
from guard.errors import GuardError
from guard.executors import Advance, cores

W = TypeVar("W")
C = TypeVar("C")
R = TypeVar("R")
DATA = ("results", "archive", "__pycache__")  # what lies beside code and is not sent with it


class RayExecutor:
    """Runs chunks as Ray tasks of one CPU each (and one GPU, if ``gpus``). See `guard.executors.Executor`.

    Joins the Ray that the program already uses, else the cluster at RAY_ADDRESS or on this machine, else starts one
    here; what it joined or started itself, it leaves or ends, after each ``run`` or, used as a context, at the
    context's end. A chunk whose worker is lost is done again by Ray.
    Two chunks a worker are handed out at a time: where one fails, the others run to their end, and no more are begun.
    They are not cancelled, since `ray.cancel` of a task that ends at that moment aborts the program (Ray 2.60).
    workers: chunks that run at once; of a cluster known inside the context only.
    """

    def __init__(self, *, gpus: bool = False) -> None:
        self.workers = 1 if gpus else cores()
        self._gpus = 1 if gpus else 0
        self._context: AbstractContextManager[Any] | None = None

    def __enter__(self) -> RayExecutor:
        self._context = session()
        resources = self._context.__enter__().cluster_resources()
        self.workers = max(int(resources.get("GPU" if self._gpus else "CPU", 1)), 1)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)

    def run(
        self, function: Callable[[W, C, Advance], R], work: W, chunks: Sequence[C], advance: Advance
    ) -> Iterator[tuple[int, R]]:
        """See `guard.executors.Executor`. Steps are reported as chunks finish."""
        with session() as ray:
            remote = ray.remote(num_cpus=1, num_gpus=self._gpus)(_chunk)
            shared = ray.put(work)
            left = iter(enumerate(chunks))
            running: dict[Any, int] = {}
            try:
                while True:
                    for index, chunk in islice(left, 2 * self.workers - len(running)):
                        running[remote.remote(function, shared, chunk)] = index
                    if not running:
                        return
                    done, _ = ray.wait(list(running))
                    result, steps = ray.get(done[0])
                    advance(steps)
                    yield running.pop(done[0]), result
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from None
            except ray.exceptions.RayError as error:
                raise GuardError(f"executor: Ray could not finish a chunk of the work: {error}") from error


def _chunk(function: Callable[[W, C, Advance], R], work: W, chunk: C) -> tuple[R, int]:
    """In a Ray worker: the result and the steps it took."""
    torch.set_num_threads(1)
    steps: list[int] = []
    return function(work, chunk, steps.append), sum(steps)


@contextmanager
def _code(*modules: ModuleType) -> Iterator[str]:
    """A folder with these packages. As Ray's working_dir it comes first on every machine, before what lies there."""
    with tempfile.TemporaryDirectory(prefix="guard-code-") as folder:
        for module in modules:
            (source,) = module.__path__
            shutil.copytree(source, Path(folder) / module.__name__, ignore=shutil.ignore_patterns(*DATA))
        yield folder


@contextmanager
def session(*more: ModuleType) -> Iterator[Any]:
    """Ray, joined or started; the program's own handlers of signals stay (without one, Ray's ends it cleanly).

    A cluster that is joined is sent this very code, of guard, deployments and ``more``, so that all its machines
    compute the same: they need what it is built on alone. A Ray that the program uses already is taken as it is: its
    machines need this package.
    """
    import ray

    if ray.is_initialized():
        yield ray
        return
    with local.own_signals():
        if not _joined(more):
            local.start(cores(), log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def _joined(more: Sequence[ModuleType]) -> bool:
    """Whether there was a cluster to join: the one at RAY_ADDRESS, or one of this machine.

    Raises:
        StartFailed: the one at RAY_ADDRESS cannot be joined.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    if address == "local":
        return False
    try:
        with _code(guard, deployments, *more) as folder:
            code = {"working_dir": folder}
            ray.init(address=address, runtime_env=code, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if "RAY_ADDRESS" not in os.environ and isinstance(error, ConnectionError):
            return False
        raise StartFailed(f"Ray at {address} could not be joined: {error}") from error
    return True
