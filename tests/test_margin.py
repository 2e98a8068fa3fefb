"""Margins against loops, and margin maxima."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.margin import margin
from guard.statistic import Logits, Scores, disagreement, margin_change, online_rule
from guard.surrogates import maximise_margins

Statistic = Callable[[Logits, Logits], Scores]


def drawn(seed: int, rows: int = 50, classes: int = 6) -> Tensor:
    """Rounded, so that ties happen."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator) * 3).round()


def margin_by_loop(row: list[float], label: int) -> float:
    return row[label] - max(value for index, value in enumerate(row) if index != label)


@pytest.mark.parametrize("classes", [2, 6])
def test_margin(classes: int) -> None:
    """The margin of any class is its logit less the largest other one, ties included."""
    logits = drawn(0, classes=classes)
    labels = torch.randint(classes, (50,), generator=torch.Generator().manual_seed(1))
    expected = [margin_by_loop(row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    assert margin(logits, labels).tolist() == expected


@pytest.mark.parametrize("classes", [2, 6])
def test_margin_change(classes: int) -> None:
    """S is the margin of the original's decision, less that of the same class in the corrected network (Eq. 4)."""
    logits, corrected = drawn(2, classes=classes), drawn(3, classes=classes)
    expected = []
    for row, other in zip(logits.tolist(), corrected.tolist(), strict=True):
        decision = int(np.argmax(row))
        expected.append(margin_by_loop(row, decision) - margin_by_loop(other, decision))
    assert margin_change(logits.numpy(), corrected.numpy()).tolist() == expected
    assert any(sorted(row)[-1] == sorted(row)[-2] for row in logits.tolist())  # there were ties


def test_disagreement() -> None:
    """The score is above zero exactly where the corrected network prefers another class, by how much it does."""
    logits, corrected = drawn(2), drawn(3)
    score = disagreement(logits.numpy(), corrected.numpy())
    decisions = logits.argmax(1).tolist()
    pairs = zip(corrected.tolist(), decisions, strict=True)
    assert score.tolist() == [-margin_by_loop(row, decision) for row, decision in pairs]
    assert 5 < (score > 0).sum() < 50


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("statistic", [margin_change, disagreement])
def test_a_value_that_is_not_finite_scores_infinity(
    statistic: Statistic, value: float, which: int, classes: int
) -> None:
    """One NaN or infinity in any place of either network's logits makes that row's score +inf, and no other's."""
    for place in range(classes):
        pair = [np.arange(2 * classes, dtype=np.float32).reshape(2, classes), np.zeros((2, classes), np.float32)]
        pair[which][0, place] = value
        score = statistic(*pair)
        assert score[0] == np.inf
        assert np.isfinite(score[1])


def test_online_rule() -> None:
    """An image that is not flagged keeps c*; a flagged one gets the corrected network's best class but c*."""
    logits, corrected = drawn(4), drawn(5)
    flagged = torch.rand(50, generator=torch.Generator().manual_seed(6)) < 0.5
    expected = []
    for row, other, flag in zip(logits.tolist(), corrected.tolist(), flagged.tolist(), strict=True):
        decision = int(np.argmax(row))
        rest = [(value, -index) for index, value in enumerate(other) if index != decision]
        expected.append(-max(rest)[1] if flag else decision)
    assert online_rule(logits.numpy(), corrected.numpy(), flagged.numpy()).tolist() == expected


def surrogates(steps: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(images, their margins, margins of the starts) on a fixed curved network of 4 classes."""
    generator = torch.Generator().manual_seed(7)
    inner, outer = torch.randn(12, 16, generator=generator), torch.randn(16, 4, generator=generator)
    labels = torch.arange(4).repeat(3)

    def network(x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ inner) @ outer

    starts = torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    found = maximise_margins(
        network, labels, (3, 2, 2), steps=steps, step_size=0.2, generator=torch.Generator().manual_seed(seed)
    )
    return found, margin(network(found), labels), margin(network(starts), labels)


def test_surrogates_raise_the_margin_within_the_input_space() -> None:
    """Every ascent ends inside [0, 1] with a margin larger than where it began, and longer ascents end higher."""
    found, ends, starts = surrogates(30)
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert not found.requires_grad
    assert (ends > starts).all()
    assert ends.mean() > surrogates(2)[1].mean()


def test_surrogates_of_a_linear_network_reach_the_corner() -> None:
    """Where the margin is linear, its maximum over the box is known: the corner that the weights' signs name."""
    weights = torch.randn(12, 2, generator=torch.Generator().manual_seed(8))
    found = maximise_margins(
        lambda x: x.flatten(1) @ weights,
        torch.tensor([0, 1]),
        (3, 2, 2),
        steps=400,
        step_size=0.5,
        generator=torch.Generator().manual_seed(9),
    )
    difference = weights[:, 0] - weights[:, 1]
    corner = (difference > 0).float()
    assert torch.allclose(found.flatten(1), torch.stack([corner, 1.0 - corner]), atol=1e-3)


def test_surrogates_follow_the_generator() -> None:
    """The same generator gives the same images, another gives others, and the global state has no say."""
    first = surrogates(5, seed=1)[0]
    torch.rand(3)
    assert torch.equal(first, surrogates(5, seed=1)[0])
    assert not torch.equal(first, surrogates(5, seed=2)[0])
