"""MMAC's bounds against hooks, and what learning them is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import TARGET
from oracles import Bound, activations, bounded, extremes
from torch import nn

import guard
from guard.capture import Captured, capture
from guard.config import FitSettings, LearningSettings
from guard.data import Data, as_float
from guard.margin import margin
from guard.methods.mmac import Mmac
from guard.methods.mmdf import cross_fit
from guard.progress import silent
from guard.statistic import margin_change
from guard.surrogates import maximise_margins
from guard.twin import Twin, build_twin

LEARNING = LearningSettings(steps=30, refresh=15, ascent_steps=15, surrogates=3, learning_rate=0.05)
INFEASIBLE = FitSettings(
    bounds="learned",
    quantile=0.01,
    folds=2,
    learning=LearningSettings(
        steps=6, learning_rate=9.0, weight=1e5, accuracy=0.999, ascent_steps=2, surrogates=1, weight_every=2
    ),
)


def mmac(captured: Captured, clean: Data, settings: FitSettings) -> Mmac:
    return Mmac(captured, clean.images, clean.labels, settings, silent)


def everything(clean: Data) -> torch.Tensor:
    return torch.arange(len(clean))


@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_quantile_bounds(victim: nn.Module, captured: Captured, clean: Data, quantile: float) -> None:
    """A zero-fit bound is numpy's quantile, over the rows asked for, of the channel's spatial maximum."""
    rows = torch.arange(3, 250, 4)
    fitted = mmac(captured, clean, FitSettings(quantile=quantile)).correction(rows, silent)
    seen = activations(victim, as_float(clean.images[rows]))
    assert list(fitted.clips) == list(range(len(seen))) == [0, 1, 2]
    for index, activation in enumerate(seen):
        maxima = extremes(activation, 1)[0].numpy()
        expected = np.quantile(maxima, quantile, axis=0)
        assert np.allclose(fitted.clips[index].tensors()["upper"], expected, rtol=1e-5, atol=1e-6)
        assert "lower" not in fitted.clips[index].tensors()


def test_lower_bounds(clean: Data) -> None:
    """LeakyReLU, which has no lower bound, gets one: the mirrored quantile of the spatial minimum."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(784, 10)).eval()
    fitted = mmac(capture(network, (3, 16, 16)), clean, FitSettings(quantile=0.9)).correction(everything(clean), silent)
    minima = extremes(activations(network, as_float(clean.images))[0], 1)[1].numpy()
    found = fitted.clips[0].tensors()["lower"]
    assert np.allclose(found, np.quantile(minima, 0.1, axis=0), rtol=1e-5, atol=1e-6)


def surrogate_margin(twin: Twin) -> float:
    """Mean margin that the corrected network gives to margin maxima of the original one, drawn anew."""
    labels = torch.arange(10).repeat_interleave(4)
    images = maximise_margins(
        lambda x: twin.original(x)[0],
        labels,
        (3, 16, 16),
        steps=20,
        step_size=0.1,
        generator=torch.Generator().manual_seed(99),
    )
    with torch.no_grad():
        return float(margin(twin(images)[1], labels).mean())


def test_learned_bounds(captured: Captured, victim: nn.Module, clean: Data, attacked: Data) -> None:
    """Learned bounds lower surrogates' margins and the backdoor's success below what they start from, and keep ≥ 95%
    of the original's accuracy on the clean set."""
    learned = mmac(captured, clean, FitSettings(bounds="learned", learning=LEARNING))
    fitted = learned.correction(everything(clean), silent)
    start = mmac(captured, clean, FitSettings()).correction(everything(clean), silent)
    assert fitted.report["bounds"] == "learned"
    assert fitted.report["learning"]["converged"]

    before, after = (build_twin(captured, found.clips) for found in (start, fitted))
    assert surrogate_margin(after) < 0.95 * surrogate_margin(before)
    with torch.no_grad():
        logits, corrected = after(as_float(clean.images))
        own, kept = ((out.argmax(1) == clean.labels).double().mean() for out in (logits, corrected))
        assert kept >= 0.95 * own
        sources = as_float(attacked.images[attacked.labels != TARGET])
        original, mended = ((out.argmax(1) == TARGET).double().mean() for out in after(sources))
    assert original > 0.9  # the backdoor was there
    assert mended <= (before(sources)[1].argmax(1) == TARGET).double().mean()


def test_learning_that_never_is_feasible(victim: nn.Module, captured: Captured, clean: Data) -> None:
    """Where no iterate keeps the accuracy, the fit says so and falls back to the bounds that it started from."""
    fitted = mmac(captured, clean, INFEASIBLE).correction(everything(clean), silent)
    assert fitted.report["bounds"] == "quantile"
    report = fitted.report["learning"]
    assert (report["converged"], report["feasible_checks"], report["margin"]) == (False, 0, None)

    start = mmac(captured, clean, FitSettings(quantile=0.01)).correction(everything(clean), silent)
    for index, module in start.clips.items():
        assert torch.equal(module.tensors()["upper"], fitted.clips[index].tensors()["upper"])

    made = guard.fit(victim, clean.images, clean.labels, settings=INFEASIBLE)
    assert made.manifest["fit"]["correction"]["bounds"] == "quantile"
    said = " ".join(made.manifest["warnings"])
    assert "never kept the accuracy" in said
    assert "In 2 of 2 folds" in said


def test_learning_is_deterministic(captured: Captured, clean: Data) -> None:
    """The seed decides every draw: the same one gives the same bounds, another gives others."""
    quick = LearningSettings(steps=3, ascent_steps=2, surrogates=1, weight_every=1)
    found = []
    for seed in (0, 0, 1):
        settings = FitSettings(bounds="learned", learning=quick, seed=seed)
        torch.rand(1)
        report = mmac(captured, clean, settings).correction(everything(clean), silent).report
        found.append([entry["squared_error"] for entry in report["learning"]["history"]])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_cross_fit(victim: nn.Module, captured: Captured, clean: Data) -> None:
    """Each clean score is that of an image under bounds fitted by hand without its fold; folds cover D once."""
    settings = FitSettings(folds=4, quantile=0.9, seed=3)
    scores, decided, reports = cross_fit(captured, mmac(captured, clean, settings), clean.images, settings, silent)
    assert len(reports) == 4
    images = as_float(clean.images)
    maxima = [extremes(activation, 1)[0] for activation in activations(victim, images)]
    with torch.no_grad():
        logits = victim(images)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(3))
    expected = np.full(250, np.nan)
    for fold in range(4):
        held_out = order[fold::4]
        rest = torch.tensor([row for row in range(250) if row not in set(held_out.tolist())])
        bounds = [Bound(torch.quantile(values[rest], 0.9, dim=0), None, 1) for values in maxima]
        corrected = bounded(victim, images[held_out], bounds)
        expected[held_out.numpy()] = margin_change(logits[held_out].numpy(), corrected.numpy())
    assert np.allclose(scores, expected, atol=1e-4)
    assert scores.std() > 0.1
    assert np.array_equal(decided[order], logits[order].argmax(1).numpy())
