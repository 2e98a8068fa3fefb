"""Helm's engine, of helm-sdkpy.

It is a Go library that sees the environment that its process began with, whatever has been set since, and nothing
promises that two calls at once are safe. `run` therefore calls it in a process of its own, one call at a time: a crash
ends that process alone, and no file in the home folder is read or written.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

helm: Any = pytest.importorskip(
    "helm_sdkpy", reason="needs Helm: pip install --no-deps --ignore-requires-python helm-sdkpy"
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ChartError(Exception):
    """What Helm has against a chart or its values."""


def run(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Calls one of the functions below in the process that has Helm."""
    return _process().submit(function, *args, **kwargs).result()


def lint(chart: Path) -> list[dict[str, Any]]:
    """What `helm lint` has to say, from remarks (severity 1) to errors (3)."""
    found: list[dict[str, Any]] = _called(helm.Lint, os.devnull, "default", str(chart))["Messages"]
    return found


def upgrade_install(
    kubeconfig: Path, namespace: str, release: str, chart: Path, values: dict[str, Any], server_side: bool
) -> dict[str, Any]:
    """The release after `helm upgrade --install`."""
    options = {"install": True, "wait": False, "server_side_apply": server_side}
    return _called(helm.Upgrade, str(kubeconfig), namespace, release, str(chart), values, **options)


def uninstall(kubeconfig: Path, namespace: str, release: str) -> None:
    _called(helm.Uninstall, str(kubeconfig), namespace, release, wait=False)


def _called(action: Any, kubeconfig: str, namespace: str, *args: Any, **options: Any) -> dict[str, Any]:
    try:
        config = helm.Configuration(namespace=namespace, kubeconfig=kubeconfig)
        result: dict[str, Any] = asyncio.run(action(config).run(*args, **options))
    except helm.HelmError as error:
        raise ChartError(str(error)) from None
    return result


@cache
def _process() -> ProcessPoolExecutor:
    """Helm's folders are the process's own; what a server offers is not cached, since ports are used again."""
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HELM_")]:
            patch.delenv(name)
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"HELM_{name}_HOME", f"{home}/{name}")
        patch.setenv("KUBECACHEDIR", os.devnull)
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(os.getpid).result()
    return pool
