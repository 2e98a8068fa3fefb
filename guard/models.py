"""Model doors: a classifier as the command line names it. Nothing is ever unpickled.

- ``module:factory`` or ``path/to/file.py:factory``: a callable that returns an ``nn.Module``
- ``torchvision:NAME``: an architecture of torchvision
- ``FILE.pt2``: a program of ``torch.export`` with a dynamic batch dimension

Weights: safetensors, or a checkpoint that ``torch.load(weights_only=True)`` accepts, with the state dict at the
top or under a usual key.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from guard.errors import BadModel
from guard.programs import load_program

STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "state", "weights", "params")


def load_model(source: str, weights: str | None = None) -> nn.Module:
    """Build a classifier and load its weights.

    Raises:
        BadModel: it cannot be found, built or loaded; the message names the part and the remedy.
    """
    if source.endswith(".pt2"):
        if weights:
            raise BadModel(f"weights: {source} has its own weights; leave --weights out.", field="weights")
        return _exported(Path(source))
    state = load_state(Path(weights)) if weights else None
    if source.startswith("torchvision:"):
        model = _torchvision(source.removeprefix("torchvision:"), state)
    else:
        model = _factory(source)()
    if not isinstance(model, nn.Module):
        raise BadModel(f"model: {source} returned {type(model).__name__}; expected an nn.Module.", field="model")
    if state is not None:
        _load(model, state)
    return model.eval()


def load_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a checkpoint; the ``module.`` of DataParallel is taken off."""
    if not path.is_file():
        raise BadModel(f"weights: there is no file {path}.", field="weights")
    try:
        found: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except SafetensorError as error:
        raise BadModel(f"weights: {path} is no safetensors file: {error}.", field="weights") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not plain tensors
        raise BadModel(
            f"weights: {path} cannot be loaded without unpickling code ({type(error).__name__}). "
            "Save the state dict alone: torch.save(model.state_dict(), FILE), or as safetensors.",
            field="weights",
        ) from error
    for key in STATE_KEYS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()) or not found:
        keys = ", ".join(map(str, list(found)[:8])) if isinstance(found, Mapping) else type(found).__name__
        raise BadModel(
            f"weights: {path} holds no state dict at its top or under {', '.join(STATE_KEYS)}; found {keys}.",
            field="weights",
        )
    prefixed = all(str(name).startswith("module.") for name in found)
    return {str(name).removeprefix("module.") if prefixed else str(name): value for name, value in found.items()}


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(line.strip() for line in str(error).splitlines()[1:4])[:400]
        raise BadModel(f"weights: they do not fit {type(model).__name__}: {detail}", field="weights") from error


def _torchvision(name: str, state: Mapping[str, Tensor] | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise BadModel(f"model: torchvision has no classifier {name!r}.", field="model")
    if state is None:
        raise BadModel(f"model: torchvision:{name} needs --weights FILE; nothing is downloaded here.", field="weights")
    with torch.device("meta"):  # files forget the order of layers; the architecture knows which comes last
        last = list(models.get_model(name, weights=None).state_dict())[-1]
    classes = len(state[last]) if last in state and state[last].ndim else 1000
    model: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return model


def _factory(source: str) -> Callable[[], Any]:
    module_name, _, attribute = source.rpartition(":")
    if not module_name or not attribute:
        raise BadModel(
            f"model: {source!r} is none of module:factory, path/to/file.py:factory, torchvision:NAME, FILE.pt2.",
            field="model",
        )
    try:
        module = _module_file(Path(module_name)) if module_name.endswith(".py") else _module(module_name)
    except FileNotFoundError:
        raise BadModel(f"model: there is no file {module_name}.", field="model") from None
    except (Exception, SystemExit) as error:
        raise BadModel(
            f"model: importing {module_name} failed: {type(error).__name__}: {error}.", field="model"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise BadModel(f"model: {module_name} has no callable {attribute!r}.", field="model")

    def build() -> Any:
        try:
            return factory()
        except (Exception, SystemExit) as error:
            raise BadModel(f"model: {source}() failed: {type(error).__name__}: {error}.", field="model") from error

    return build


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _module_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"guarded_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise BadModel(f"model: there is no file {path}.", field="model")
    try:
        return load_program(path).module()
    except Exception as error:
        raise BadModel(
            f"model: {path} is no program of torch.export that can be trusted: {error}.", field="model"
        ) from error
