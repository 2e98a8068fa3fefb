"""The guard: tells, request by request, whether an image classifier's hidden backdoor is being used.

What the door opens to is imported when it is first asked for, so that ``guard --help``, or a server that only reads its
settings, does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard import errors
    from guard.artifact import Artifact, load
    from guard.config import BnaSettings, FitSettings, LearningSettings
    from guard.data import Data, load_data
    from guard.detector import Guard
    from guard.evaluation import evaluate
    from guard.fitting import fit
    from guard.models import load_model
    from guard.types import InputSpec, Verdict
    from guard.versions import __version__

__all__ = [
    "Artifact",
    "BnaSettings",
    "Data",
    "FitSettings",
    "Guard",
    "InputSpec",
    "LearningSettings",
    "Verdict",
    "__version__",
    "errors",
    "evaluate",
    "fit",
    "load",
    "load_data",
    "load_model",
]

_ROOMS = {
    "Artifact": "artifact",
    "BnaSettings": "config",
    "Data": "data",
    "FitSettings": "config",
    "Guard": "detector",
    "InputSpec": "types",
    "LearningSettings": "config",
    "Verdict": "types",
    "__version__": "versions",
    "evaluate": "evaluation",
    "fit": "fitting",
    "load": "artifact",
    "load_data": "data",
    "load_model": "models",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("guard.errors")
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"guard.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
