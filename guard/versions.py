"""Versions of what computed a figure or made an artifact."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = metadata.version("backdoor-guard")


def versions() -> dict[str, str]:
    """Python's and the packages' versions, by name."""
    names = ("backdoor-guard", "torch", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
