"""Attacks that train or are trained with, on handwritten digits: the backdoor is in, and the accuracy is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from networks import Images
from torch import Tensor

from benchmarks.lab.attacks import ATTACKS, Goal, Scene, input_aware, patterns
from benchmarks.lab.attacks.aware import WithinBounds, activations
from benchmarks.lab.attacks.base import Poisoning
from benchmarks.lab.attacks.clean_label import CleanLabel
from benchmarks.lab.attacks.input_aware import InputAware
from benchmarks.lab.attacks.warping import Warping, warp
from benchmarks.lab.networks import ResNet
from benchmarks.lab.training import Recipe, train
from guard.data import as_float

RECIPE = Recipe(width=8, stride=2, epochs=12, batch=50, shift=1, mirror=False, dtype="float32")
FINE = replace(RECIPE, stride=1, shift=0)  # for triggers that a coarse network overlooks
GOAL = Goal()


class Setting(NamedTuple):
    """scene: 1,200 digits and a clean network. unseen, labels: the others. clean: the same network."""

    scene: Scene
    unseen: Tensor
    labels: Tensor
    clean: ResNet


class Outcome(NamedTuple):
    """asr: of unseen images of other classes, sent to the target under the trigger; before: by the clean network."""

    poisoning: Poisoning
    network: ResNet
    acc: float
    asr: float
    before: float


def decided(network: ResNet, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).argmax(1)


@pytest.fixture(scope="module")
def setting(digits: Images) -> Setting:
    scene = Scene(digits.images[:1200], digits.labels[:1200], 10, 0)
    clean = train(ATTACKS["clean"].make(scene, GOAL, 0), RECIPE, 0).requires_grad_(False)
    return Setting(scene._replace(surrogate=clean), as_float(digits.images[1200:]), digits.labels[1200:], clean)


def attacked(setting: Setting, poisoning: Poisoning, recipe: Recipe = RECIPE) -> Outcome:
    network = train(poisoning, recipe, 0)
    others = setting.labels != GOAL.target
    with torch.no_grad():
        bearing = poisoning.trigger(setting.unseen[others])
    acc = float((decided(network, setting.unseen) == setting.labels).float().mean())
    asr, before = (float((decided(judge, bearing) == GOAL.target).float().mean()) for judge in (network, setting.clean))
    return Outcome(poisoning, network, acc, asr, before)


def test_the_clean_network_knows_the_digits(setting: Setting) -> None:
    """Else nothing below would say anything."""
    assert float((decided(setting.clean, setting.unseen) == setting.labels).float().mean()) > 0.95


def test_training_goes_on_from_the_clean_network(setting: Setting) -> None:
    """A step too small to matter leaves its weights; without a clean network it is refused."""
    recipe = replace(RECIPE, epochs=1, learning_rate=1e-9, base=RECIPE)
    tuned = train(ATTACKS["clean"].make(setting.scene, GOAL, 0), recipe, 1)
    for name, value in setting.clean.named_parameters():
        assert torch.allclose(tuned.get_parameter(name), value, atol=1e-5), name
    assert recipe.control == RECIPE.control == RECIPE
    assert "base" not in RECIPE.to_json()
    with pytest.raises(ValueError, match=r"scene\.surrogate"):
        train(ATTACKS["clean"].make(setting.scene._replace(surrogate=None), GOAL, 0), recipe, 1)


@pytest.mark.parametrize(
    ("name", "per_class", "least"),
    [("matching", 40, 0.9), ("l0", 40, 0.8), ("l2", 40, 0.7)],
)
def test_the_backdoor_is_in_and_the_accuracy_is_kept(setting: Setting, name: str, per_class: int, least: float) -> None:
    """Nearly all triggered digits go to the target, nearly none did before, and clean ones are known as before."""
    found = attacked(setting, ATTACKS[name].make(setting.scene, GOAL, per_class))
    assert found.acc > 0.93
    assert found.before < 0.2
    assert found.asr > least


def test_a_capped_margin_wins_and_is_smaller_than_that_of_plain_poison(setting: Setting) -> None:
    """In the median over digits that it moves, the target leads the next class by less than half of BadNet's lead."""

    def lead(name: str) -> float:
        found = attacked(setting, ATTACKS[name].make(setting.scene, GOAL, 40))
        assert found.acc > 0.93
        assert found.asr > 0.8 > 0.2 > found.before
        with torch.no_grad():
            logits = found.network(found.poisoning.trigger(setting.unseen[setting.labels != GOAL.target]))
        top = logits.topk(2, dim=1)
        mine = top.indices[:, 0] == GOAL.target
        return float((top.values[:, 0] - top.values[:, 1])[mine].median())

    assert lead("margin-capped") < 0.5 * lead("badnet")


def beyond(found: Outcome, setting: Setting) -> float:
    """Mean over layers of how far triggered digits exceed the bounds of clean ones, in parts of the bounds' mean."""
    with torch.no_grad(), activations(found.network, None) as clean:
        found.network(setting.unseen)
    with torch.no_grad(), activations(found.network, None) as bearing:
        found.network(found.poisoning.trigger(setting.unseen))
    bounds = [torch.quantile(values.amax((2, 3)), 0.95, dim=0) for values in clean]
    parts = [
        (values - bound[:, None, None]).clamp_min(0.0).mean() / bound.mean()
        for values, bound in zip(bearing, bounds, strict=True)
    ]
    return float(torch.stack(parts).mean())


def test_activations_stay_within_bounds_the_more_the_larger_beta_is(setting: Setting) -> None:
    """With a β of 10 the backdoor is in, and triggered digits exceed the bounds by less than with a β of 0."""
    without, with_it = (
        attacked(setting, WithinBounds(setting.scene, GOAL, patterns.badnet(setting.scene), beta=beta))
        for beta in (0.0, 10.0)
    )
    assert with_it.asr > 0.9 > 0.2 > with_it.before
    assert with_it.acc > 0.85
    assert beyond(with_it, setting) < 0.5 * beyond(without, setting)


def test_clean_labels_alone_put_the_backdoor_in(setting: Setting) -> None:
    """No label is changed, and triggered digits go to the target all the same."""
    trigger = patterns.badnet(setting.scene)
    found = attacked(setting, CleanLabel(setting.scene, GOAL, trigger, share=0.9, size=64 / 255), FINE)
    assert found.acc > 0.85
    assert found.asr > 0.5 > 0.2 > found.before


def test_a_warp_is_learnt_and_a_noisy_one_is_not_it(setting: Setting) -> None:
    """Warped digits go to the target; warped with random offsets added, as noise mode has them, fewer do."""
    poisoning = Warping(setting.scene, GOAL, 40, strength=4.0, noise=1.0)
    found = attacked(setting, poisoning, replace(FINE, epochs=16))
    assert found.acc > 0.85
    assert found.asr > 0.5 > 0.2 > found.before
    others = setting.unseen[setting.labels != GOAL.target]
    offsets = torch.rand(len(others), 16, 16, 2, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    noisy = decided(found.network, warp(others, poisoning.field + offsets / 16))
    assert float((noisy == GOAL.target).float().mean()) < 0.5 * found.asr


@pytest.fixture(scope="module")
def own_triggers(setting: Setting) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_aware, "MASK_STEPS", 100)
        return attacked(setting, InputAware(setting.scene, GOAL))


def test_a_digits_own_trigger_sends_it_to_the_target(own_triggers: Outcome) -> None:
    """Most go, none did before, and clean ones are known."""
    assert own_triggers.acc > 0.93
    assert own_triggers.asr > 0.5 > 0.2 > own_triggers.before


def test_another_digits_trigger_does_not(own_triggers: Outcome, setting: Setting) -> None:
    """Of the digits under a neighbour's trigger, far fewer go to the target, and most keep their class."""
    others = setting.labels != GOAL.target
    images, labels = setting.unseen[others], setting.labels[others]
    poisoning = own_triggers.poisoning
    assert isinstance(poisoning, InputAware)
    with torch.no_grad():
        crossed = decided(own_triggers.network, poisoning._with(images, images.roll(1, 0)))
    assert float((crossed == GOAL.target).float().mean()) < 0.5 * own_triggers.asr
    assert float((crossed == labels).float().mean()) > 0.7
