"""The targets that this project set itself, on two networks that others backdoored (see ../shared/models)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import guard
from guard.data import Data, as_float
from guard.evaluation import Evaluation

SHARED = Path(__file__).parents[1].parent / "shared"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "models" / "networks.py").is_file(), reason="../shared is absent"),
]


def badnets(images: Tensor) -> Tensor:
    """A white square."""
    out = images.clone()
    out[:, :, 27:31, 27:31] = 1.0
    return out


def l2_inv(images: Tensor) -> Tensor:
    """A faint pattern added to the whole image."""
    pattern = np.array(Image.open(SHARED / "models" / "l2_inv.png").convert("RGB"), dtype=np.float32) / 255
    return (images + torch.from_numpy(pattern).permute(2, 0, 1)).clamp(0.0, 1.0)


class Case(NamedTuple):
    trigger: Callable[[Tensor], Tensor]
    target: int
    pacc: float


CASES = {"badnets": Case(badnets, 8, 0.75), "l2_inv": Case(l2_inv, 0, 0.55)}


class Fitted(NamedTuple):
    case: Case
    model: nn.Module
    unseen: Data
    guard: guard.Guard
    seconds: float


@pytest.fixture(scope="module", params=list(CASES))
def fitted(request: pytest.FixtureRequest) -> Fitted:
    """A default fit on the first 50 test images a class; the rest is for evaluation."""
    with np.load(SHARED / "data" / "cifar10_lossless.npz") as archive:
        images, labels = torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"]).long()
    chosen = torch.cat([(labels == c).nonzero()[:50, 0] for c in range(10)])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    weights = SHARED / "models" / f"ibau-{request.param}.safetensors"
    model = guard.load_model(f"{SHARED / 'models' / 'networks.py'}:cifar10", str(weights))
    begun = time.perf_counter()
    made = guard.fit(model, images[chosen], labels[chosen])
    seconds = time.perf_counter() - begun
    return Fitted(CASES[request.param], model, Data(images[rest], labels[rest], None, "rest"), made.guard(), seconds)


def attacked(fitted: Fitted, opacity: float) -> Data:
    clean = as_float(fitted.unseen.images)
    images = opacity * fitted.case.trigger(clean) + (1.0 - opacity) * clean
    return Data(images, fitted.unseen.labels, None, f"opacity {opacity}")


def measure(fitted: Fitted, opacity: float) -> Evaluation:
    return guard.evaluate(fitted.guard, fitted.unseen, attacked(fitted, opacity), fitted.case.target)


def success(fitted: Fitted, opacity: float) -> float:
    """ASR of the original network over images whose class is not the target."""
    data = attacked(fitted, opacity)
    with torch.no_grad():
        decided = fitted.model(data.images[data.labels != fitted.case.target]).argmax(1)
    return float((decided == fitted.case.target).double().mean())


def test_full_strength(fitted: Fitted) -> None:
    """The guard ends the attack, costs next to no accuracy, mends most answers and flags few clean images."""
    figures = measure(fitted, 1.0).figures
    assert figures["original"]["asr"] >= 0.98
    assert figures["original"]["acc"] - figures["guarded"]["acc"] <= 0.015
    assert figures["guarded"]["asr"] <= 0.01
    assert figures["guarded"]["pacc"] >= fitted.case.pacc
    assert figures["detection"]["fpr"] <= 0.015
    assert figures["detection"]["auroc_successful"] >= 0.999


def test_weakened_trigger(fitted: Fitted) -> None:
    """On the trigger weakened until it succeeds on about 80%, the score still ranks nearly all of those above clean."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if success(fitted, middle) < 0.8 else (low, middle)
    assert 0.75 <= success(fitted, high) <= 0.9
    figures = measure(fitted, high).figures
    assert figures["detection"]["auroc_successful"] >= 0.995


def test_time_of_a_fit(fitted: Fitted) -> None:
    """A default fit on 500 images takes at most 30 seconds."""
    assert fitted.seconds <= 30.0
