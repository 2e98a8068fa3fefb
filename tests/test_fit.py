"""Fitting: settings that check themselves, refusals with hints, and the paths that are not the default."""

from __future__ import annotations

from typing import Any

import networks
import numpy as np
import pytest
import torch
from networks import train
from torch import Tensor, nn

import guard
from guard.artifact import Artifact
from guard.config import FitSettings, LearningSettings
from guard.data import Data, as_float
from guard.errors import BadData, BadInput, BadSetting
from guard.methods.mmdf import _strange


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (FitSettings, "fpr", [0.0, 0.5, -0.1, float("nan")]),
        (FitSettings, "quantile", [0.0, 1.0, 95]),
        (FitSettings, "folds", [1, 2.0, True]),
        (FitSettings, "batch_size", [0, -1, 1.5]),
        (FitSettings, "seed", [-1, 0.5]),
        (FitSettings, "start", [-0.1, 1.0, 2]),
        (FitSettings, "null", ["normal", None]),
        (FitSettings, "bounds", ["", "mmac"]),
        (FitSettings, "dtype", ["float16", torch.float32]),
        (FitSettings, "min_accuracy", [0.0, 1.0, 97]),
        (LearningSettings, "steps", [0, 1.0]),
        (LearningSettings, "batch", [1]),
        (LearningSettings, "classes", [1]),
        (LearningSettings, "accuracy", [0.0, 1.0]),
        (LearningSettings, "learning_rate", [0.0, -1.0, float("inf")]),
        (LearningSettings, "weight", [0.0, float("nan")]),
        (LearningSettings, "weight_factor", [1.0, 0.5]),
        *((LearningSettings, name, [0]) for name in ("weight_every", "surrogates", "ascent_steps", "refresh")),
        (LearningSettings, "ascent_step_size", [0.0, 1.0]),
    ],
)
def test_settings(kind: type[Any], field: str, values: list[Any]) -> None:
    """A setting out of its range is refused when it is built, by its name, with what came."""
    for value in values:
        with pytest.raises(BadSetting, match=f"^{field}: expected .*got") as caught:
            kind(**{field: value})
        assert caught.value.field == field


class Hue(nn.Module):
    """Tells the largest channel of a picture, from images in the order and range that it was trained on."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.mix = nn.Conv2d(3, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(images - self.shift)).mean((2, 3)))


def hues(count: int = 240) -> tuple[Tensor, Tensor]:
    """Float images [N, 3, 8, 8] and the index of the channel that is largest by 0.2 or more."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(count) % 3
    images = 0.5 * torch.rand(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 0.3
    return images, labels


def trained(network: nn.Module, feed: Tensor, labels: Tensor) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return train(network, feed, labels, epochs=60)


@pytest.mark.parametrize(
    ("network", "feed", "hint"),
    [
        (Hue(), lambda x: x.flip(1), r"With the channels in reverse order \(BGR\) it reaches"),
        (Hue(shift=100.0), lambda x: x * 255.0, r"With pixel values in \[0, 255\] it reaches"),
    ],
    ids=["bgr", "bytes"],
)
def test_accuracy_hint(network: nn.Module, feed: Any, hint: str) -> None:
    """A model fed in another range or order than it was trained for is refused, and the message says which."""
    images, labels = hues()
    model = trained(network, feed(images), labels)
    with torch.no_grad():
        assert (model(feed(images)).argmax(1) == labels).float().mean() > 0.9  # it is good at what it was made for
    with pytest.raises(BadData, match=hint) as caught:
        guard.fit(model, images, labels, settings=FitSettings(min_accuracy=0.9))
    assert caught.value.field == "clean"


def test_accuracy_without_a_hint(victim: nn.Module, clean: Data) -> None:
    """Where no other feeding helps (labels in another order), the message names what to check."""
    with pytest.raises(BadData, match=r"right on only .* the order of the classes"):
        guard.fit(victim, clean.images, (clean.labels + 1) % 10)


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"method": "magic"}, "method", "expected one of mmdf, bna; got 'magic'"),
        ({"classes": ["a", "b"]}, "classes", "the model has 10 classes, 2 names"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean", "3 values"),
        ({"settings": FitSettings(min_accuracy=0.9999)}, "clean", "expected at least 100.0%"),
    ],
)
def test_bad_options(victim: nn.Module, clean: Data, options: dict[str, Any], field: str, says: str) -> None:
    """An option that does not go with the model is refused by name."""
    with pytest.raises(BadInput, match=says) as caught:
        guard.fit(victim, clean.images, clean.labels, **options)
    assert caught.value.field == field


def test_too_few_images(victim: nn.Module, clean: Data) -> None:
    """Fewer than four images a fold are refused; fewer than 100 images, or an absent class, are warned of."""
    with pytest.raises(BadData, match="19 images are too few for 5 folds; give at least 20") as caught:
        guard.fit(victim, clean.images[:19], clean.labels[:19])
    assert caught.value.field == "clean"
    rows = (clean.labels != 3).nonzero().squeeze(1)[:90]
    warnings = guard.fit(victim, clean.images[rows], clean.labels[rows]).manifest["warnings"]
    assert any("90 clean images are few" in warning for warning in warnings)
    assert any("1 of 10 classes have no clean image" in warning for warning in warnings)


@pytest.mark.parametrize(("count", "enough"), [(199, False), (200, True)])
def test_conformal_needs_two_hundred(victim: nn.Module, clean: Data, count: int, enough: bool) -> None:
    """The conformal law refuses a rate that its number of images can never flag at, and says how many could."""
    settings = FitSettings(null="conformal", fpr=0.005)
    if enough:
        made = guard.fit(victim, clean.images[:count], clean.labels[:count], settings=settings)
        assert made.manifest["threshold"]["p_value_floor"] == pytest.approx(1 / 201)
        return
    with pytest.raises(BadSetting, match=r"below 0\.005, so none could fall below 0\.005. Use at least 200") as caught:
        guard.fit(victim, clean.images[:count], clean.labels[:count], settings=settings)
    assert caught.value.field == "fpr"


def test_bfloat16(victim: nn.Module, clean: Data, unseen: Data, attacked: Data) -> None:
    """In bfloat16 the clean scores are of that type's own path, and detection stays; the artifact stays in fp32."""
    made = guard.fit(victim, clean.images, clean.labels, settings=FitSettings(dtype="bfloat16"))
    assert made.manifest["fingerprint"] == guard.fit(victim, clean.images, clean.labels).manifest["fingerprint"]
    loaded = made.guard()
    assert loaded.dtype == torch.bfloat16
    verdict = loaded(unseen.images)
    assert torch.equal(verdict.logits, verdict.logits.bfloat16().float())  # every logit is a bfloat16 number
    with torch.no_grad():
        exact = victim(as_float(unseen.images))
    assert torch.allclose(verdict.logits, exact, rtol=0.05, atol=0.3)
    assert not torch.equal(verdict.logits, exact)
    found = guard.evaluate(loaded, unseen, attacked, 0).figures["detection"]
    assert found["auroc_successful"] > 0.99
    assert found["fpr"] < 0.03


def test_start(victim: nn.Module, clean: Data) -> None:
    """With start 0.5 only the later half of the sites is corrected: sites 1 and 2 of three."""
    made = guard.fit(victim, clean.images, clean.labels, settings=FitSettings(start=0.5))
    assert [list(network) for network in made.networks] == [[1, 2]]


def test_deterministic(artifact: Artifact, victim: nn.Module, clean: Data) -> None:
    """The same inputs and seed give the same law; uint8 and float images are the same images."""
    again = guard.fit(victim, as_float(clean.images), clean.labels.int())
    assert again.rule == artifact.rule
    other = guard.fit(victim, clean.images, clean.labels, settings=FitSettings(seed=1))
    assert other.rule != artifact.rule
    assert np.isclose(artifact.rule.law.p_value(np.array([artifact.manifest["threshold"]["score"]]))[0], 0.005)


@pytest.mark.parametrize("bearing", [0, 3, 10])
def test_a_clean_set_that_is_not(bearing: int, victim: nn.Module, clean: Data) -> None:
    """Images with the trigger, labelled as what they show, are found among the clean ones and told of; where there is
    none, there is no such warning."""
    images = clean.images.clone()
    rows = (clean.labels != networks.TARGET).nonzero().squeeze(1)[:bearing]
    images[rows] = networks.triggered(images[rows])
    manifest = guard.fit(victim, images, clean.labels).manifest
    assert manifest["fit"]["strange"] == rows.tolist()
    told = [warning for warning in manifest["warnings"] if "look as if they bore a trigger" in warning]
    assert len(told) == (bearing > 0)
    assert all(f"as class {networks.TARGET}" in warning and str(rows[0].item()) in warning for warning in told)


def test_scores_without_a_tail_hinder_no_fit() -> None:
    """Whether images are strange cannot be told then, and is no reason to refuse a law that needs no tail."""
    labels = np.arange(200) % 10
    decided = np.where(np.arange(200) < 5, 9 - labels, labels)
    assert _strange(np.zeros(200), decided, labels) == (None, [])
    assert _strange(np.arange(20.0), labels[:20], labels[:20]) == (None, [])
