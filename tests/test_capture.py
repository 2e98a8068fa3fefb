"""What capture finds in a classifier, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from guard.capture import capture, fingerprint
from guard.errors import BadModel, BadSetting, CaptureFailed, NothingToCorrect
from guard.models import load_model


class Mixed(nn.Module):
    """A module used twice, a functional call, channels last and sequences; images [N, 3, 8, 8], 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(6, 9)
        self.leaky = nn.LeakyReLU(0.1)
        self.head = nn.Linear(9, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.act(self.conv(images))
        hidden = self.act(hidden - 0.1)
        hidden = self.leaky(self.mix(hidden.permute(0, 2, 3, 1)))  # [N, 8, 8, 9]
        hidden = F.gelu(hidden.flatten(1, 2))  # [N, 64, 9]
        return self.head(torch.tanh(hidden.mean(1)))  # [N, 9]


def run(model: nn.Module, images: Tensor) -> Tensor:
    captured = capture(model, tuple(images.shape[1:]))
    out: Tensor = captured.module()(images)
    return out


def test_sites() -> None:
    """Each call is a site, in call order, labelled by module path, with the axis and number of its channels."""
    captured = capture(Mixed().eval(), (3, 8, 8))
    found = [(site.label, site.axis, site.channels, site.ndim, site.bounded_below) for site in captured.sites]
    assert found == [
        ("act:relu", 1, 6, 4, True),
        ("act:relu", 1, 6, 4, True),
        ("leaky:leaky_relu", 3, 9, 4, False),
        (found[3][0], 2, 9, 3, True),
        (found[4][0], 1, 9, 2, False),
    ]
    assert found[3][0].endswith(":gelu")
    assert found[4][0].endswith(":tanh")
    assert [site.index for site in captured.sites] == list(range(5))
    assert len({site.node for site in captured.sites}) == 5
    assert captured.classes == 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet18", {1: 17}), ("convnext_tiny", {3: 18}), ("mobilenet_v2", {1: 35})],
)
def test_sites_of_published_architectures(name: str, expected: dict[int, int]) -> None:
    """Sites by channel axis: ResNet-18 calls ReLU 17 times, ConvNeXt-T GELU 18 times, MobileNetV2 ReLU6 35 times."""
    captured = capture(models.get_model(name, weights=None, num_classes=4).eval(), (3, 32, 32))
    axes = [site.axis for site in captured.sites]
    assert {axis: axes.count(axis) for axis in axes} == expected


def test_normalisation_inside_equals_outside() -> None:
    """The captured graph takes raw images and gives what the model gives for normalised ones, bit for bit."""
    model, images = Digits().eval(), torch.rand(5, 3, 16, 16)
    mean, std = (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
    captured = capture(model, (3, 16, 16), mean=mean, std=std)
    outside = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(captured.module()(images), model(outside))
    assert captured.fingerprint() == fingerprint(model.state_dict())


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_any_batch_size(count: int) -> None:
    """The captured graph takes any number of images from one on and answers as the model does."""
    model, images = Mixed().eval(), torch.rand(count, 3, 8, 8)
    assert torch.equal(run(model, images), model(images))


def test_train_mode_is_captured_as_eval() -> None:
    """A model given in train mode is captured as it decides in eval mode, without dropout or batch statistics."""
    model, images = Digits().train(), torch.rand(6, 3, 16, 16)
    found = run(model, images)
    assert torch.equal(found, model.eval()(images))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 5)

    def forward(self, images: Tensor) -> Tensor:
        if images.sum() > 0:
            images = -images
        return F.relu(self.head(images.flatten(1)))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.head(images.reshape(2, 3 * 64)))


class Returns(nn.Module):
    """Gives whatever the function makes of its ReLU activations [N, 3, 8, 8]."""

    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> object:
        return self.make(F.relu(images))


@pytest.mark.parametrize(
    ("model", "verdict", "says"),
    [
        (Branching(), CaptureFailed, "could not capture Branching for inputs .3, 8, 8.*data-dependent"),
        (FixedBatch(), CaptureFailed, "any batch size from 1"),
        (nn.Conv2d(4, 5, 3), CaptureFailed, "Check the input shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), NothingToCorrect, "no activation function.*relu"),
        (Returns(lambda x: x), BadModel, r"expected logits \[N, K\]"),
        (Returns(lambda x: x.flatten(1).sum(1)), BadModel, r"expected logits \[N, K\]"),
        (Returns(lambda x: x.flatten(1)[:, :1]), BadModel, "K ≥ 2"),
        (Returns(lambda x: (x.flatten(1), x)), BadModel, "returns 2 values"),
        (Returns(lambda x: {"out": x.flatten(1), "aux": x}), BadModel, "returns 2 values"),
    ],
)
def test_refusals(model: nn.Module, verdict: type[BadModel], says: str) -> None:
    """A model that cannot be guarded is refused with the verdict's own class, the reason and the remedy."""
    with pytest.raises(BadModel, match=says) as caught:
        capture(model, (3, 8, 8))
    assert type(caught.value) is verdict
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        ((0.5, 0.5, 0.5), None, "std"),
        (None, (0.5, 0.5, 0.5), "mean"),
        ((0.5,), (0.5, 0.5, 0.5), "mean"),
        ((0.5, 0.5, 0.5), (0.5, 0.5), "std"),
        ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5), "std"),
    ],
)
def test_bad_normalisation(mean: tuple[float, ...] | None, std: tuple[float, ...] | None, field: str) -> None:
    """Mean and std come together, one value a channel, and std is positive."""
    with pytest.raises(BadSetting) as caught:
        capture(Mixed(), (3, 8, 8), mean=mean, std=std)
    assert caught.value.field == field


class Peculiar(nn.Module):
    """Tied weights, a layer that is never used, a buffer that is not saved, a number of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.tied = self.conv.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("gain", torch.ones(5, 1, 1), persistent=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, images: Tensor) -> Tensor:
        return (F.relu(self.conv(images)) * self.gain).mean((2, 3))


@pytest.mark.parametrize("model", [Digits(), Peculiar()], ids=["digits", "peculiar"])
def test_fingerprint_of_module_and_program(model: nn.Module) -> None:
    """A module's state dict and its captured program have the same fingerprint."""
    assert capture(model, (3, 16, 16)).fingerprint() == fingerprint(model.state_dict())


def test_fingerprint_sees_every_change() -> None:
    """One weight moved by one unit in the last place, a name, a type or a shape each change the fingerprint."""
    state = Digits().state_dict()
    seen = [fingerprint(state)]
    for name in ("head.weight", "features.1.running_var", "features.1.num_batches_tracked"):
        changed = {key: value.clone() for key, value in state.items()}
        flat = changed[name].view(-1)
        flat[-1] = flat[-1] + 1 if not flat.is_floating_point() else torch.nextafter(flat[-1], torch.tensor(9.0))
        seen.append(fingerprint(changed))
    seen.append(fingerprint({**state, "head.bias": state["head.bias"].view(2, 5)}))
    seen.append(fingerprint({**state, "head.bias": state["head.bias"].view(torch.int32)}))
    seen.append(fingerprint({key.replace("head", "tail"): value for key, value in state.items()}))
    assert len(set(seen)) == len(seen)
    assert fingerprint(dict(reversed(state.items()))) == seen[0]


def test_an_exported_program_is_captured_again(tmp_path: Path) -> None:
    """A .pt2 file goes through load_model into a capture with the same answers and the same sites."""
    model, images = Digits().eval(), torch.rand(3, 3, 16, 16)
    batch = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(
        torch.export.export(model, (images,), dynamic_shapes=(batch,)),  # as its owner would
        tmp_path / "model.pt2",
    )
    again = capture(load_model(str(tmp_path / "model.pt2")), (3, 16, 16))
    first = capture(model, (3, 16, 16))
    assert torch.equal(again.module()(images), model(images))
    strip = [(site.axis, site.channels, site.label.split(":")[1]) for site in again.sites]
    assert strip == [(site.axis, site.channels, site.label.split(":")[1]) for site in first.sites]
    assert again.fingerprint() == fingerprint(model.state_dict())
