"""The model doors: what they build, and that nothing is ever unpickled."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import Digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from guard.errors import BadModel
from guard.models import load_model

HERE = f"{Path(networks.__file__)}:digits"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return Digits().state_dict()


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("source", [HERE, "networks:digits"])
def test_factories(source: str) -> None:
    """A factory by module or by file gives its module in eval mode."""
    model = load_model(source)
    assert type(model).__name__ == "Digits"
    assert not any(module.training for module in model.modules())


def test_a_factory_beside_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:factory` finds a module of the working directory, as python -m would."""
    (tmp_path / "beside_the_caller.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load_model("beside_the_caller:make"), nn.Linear)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"net": state, "acc": 0.9},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model_state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_checkpoints(tmp_path: Path, state: dict[str, Tensor], wrap: Callable[[Any], Any]) -> None:
    """The state dict is found at the top or under a usual key, with or without DataParallel's prefix."""
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert same(load_model(HERE, str(tmp_path / "weights.pth")), state)


def test_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Weights from safetensors arrive bit for bit."""
    save_file(state, tmp_path / "weights.safetensors")
    assert same(load_model(HERE, str(tmp_path / "weights.safetensors")), state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision(tmp_path: Path, name: str, suffix: str) -> None:
    """An architecture of torchvision takes weights of another number of classes, from either kind of file."""
    state = models.get_model(name, weights=None, num_classes=7).state_dict()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert same(load_model(f"torchvision:{name}", str(path)), state)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pth", ".pt2", ".safetensors"])
def test_a_pickle_is_not_executed(tmp_path: Path, suffix: str) -> None:
    """A checkpoint that runs code when unpickled is refused, and its code does not run."""
    proof, path = tmp_path / "executed", tmp_path / f"weights{suffix}"
    torch.save({"state_dict": Malicious(proof)}, path)
    with pytest.raises(BadModel, match=r"unpickling code|no safetensors|no program"):
        load_model(*([str(path)] if suffix == ".pt2" else [HERE, str(path)]))
    assert not proof.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert proof.exists()  # it would have run


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3}, "no state dict at its top or under .*; found epoch"),
        ([1, 2], "no state dict.*found list"),
        ({}, "no state dict"),
        ({"head.weight": torch.ones(2)}, "do not fit Digits: Missing key"),
        ({**Digits().state_dict(), "head.bias": torch.ones(7)}, "do not fit Digits: size mismatch for head.bias"),
        ({**Digits().state_dict(), "extra": torch.ones(7)}, 'Unexpected key.*"extra"'),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, content: Any, says: str) -> None:
    """A file without a state dict, or with another network's, is refused with what was found."""
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(BadModel, match=says) as caught:
        load_model(HERE, str(tmp_path / "weights.pth"))
    assert caught.value.field == "weights"


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "absent.pth"])
def test_weights_that_are_no_weights(tmp_path: Path, name: str) -> None:
    """Text under a weights file's name, or no file, is refused by name."""
    for present in ("weights.pth", "weights.safetensors"):
        (tmp_path / present).write_text("not weights")
    with pytest.raises(BadModel, match=name) as caught:
        load_model(HERE, str(tmp_path / name))
    assert caught.value.field == "weights"


SOURCE = """
def text():
    return "no module"
def fails():
    raise RuntimeError("no licence")
value = 3
"""


@pytest.mark.parametrize(
    ("source", "field", "says"),
    [
        ("nonsense", "model", "none of module:factory"),
        ("no_such_module:make", "model", "importing no_such_module failed: ModuleNotFoundError"),
        ("{0}/absent.py:make", "model", "there is no file"),
        ("{0}/broken.py:make", "model", "importing .*broken.py failed: SyntaxError"),
        ("{0}/model.py:absent", "model", "no callable 'absent'"),
        ("{0}/model.py:value", "model", "no callable 'value'"),
        ("{0}/model.py:text", "model", "returned str; expected an nn.Module"),
        ("{0}/model.py:fails", "model", "failed: RuntimeError: no licence"),
        ("torchvision:resnet19", "model", "no classifier 'resnet19'"),
        ("torchvision:resnet18", "weights", "needs --weights FILE; nothing is downloaded"),
        ("{0}/absent.pt2", "model", "there is no file"),
        ("{0}/broken.pt2", "model", "no program of torch.export"),
    ],
)
def test_refusals(tmp_path: Path, source: str, field: str, says: str) -> None:
    """A model that cannot be found, built or read is refused with the part that failed."""
    (tmp_path / "model.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def make(:")
    (tmp_path / "broken.pt2").write_bytes(b"PK no archive")
    with pytest.raises(BadModel, match=says) as caught:
        load_model(source.format(tmp_path))
    assert caught.value.field == field


def test_weights_beside_a_program_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """A .pt2 file has its own weights; others given with it are not passed over in silence."""
    program = torch.export.export(Digits().eval(), (torch.rand(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "model.pt2")
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(BadModel) as caught:
        load_model(str(tmp_path / "model.pt2"), str(tmp_path / "weights.safetensors"))
    assert caught.value.field == "weights"
