"""The demo's steps, in order; each takes what the one before returned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import guard
from deployments.demo import digits, traffic
from deployments.demo.network import train_poisoned
from guard.data import Data
from guard.evaluation import Evaluation
from guard.progress import Progress

TARGET = 7


@dataclass(frozen=True)
class Prepared:
    """The attacked network's guard, and the images that nobody has seen."""

    artifact: Path
    clean: Data
    triggered: Data


@dataclass(frozen=True)
class Result:
    """figures: the JSON of the demo. bare, guarded: answers to the clean images. flags: bool, one an image sent."""

    figures: dict[str, Any]
    evaluation: Evaluation
    bare: traffic.Answers
    guarded: traffic.Answers
    clean_flags: Tensor
    triggered_flags: Tensor


def prepare(folder: Path, *, seed: int, progress: Progress) -> Prepared:
    """The attacker trains; the defender fits the guard on 50 clean images a class."""
    data, trigger = digits.load(seed), digits.patch(seed)
    model = train_poisoned(data.train, trigger, TARGET, seed=seed, progress=progress)
    artifact = guard.fit(model, data.clean.images, data.clean.labels, classes=digits.CLASSES, progress=progress)
    path = artifact.save(folder / "digits", overwrite=True)
    images, labels = data.test
    others = labels != TARGET
    return Prepared(
        path,
        Data(images, labels, digits.CLASSES, "held-out digits"),
        Data(digits.triggered(images[others], trigger), labels[others], digits.CLASSES, "the same with the trigger"),
    )


def attack(url: str, bare_url: str, prepared: Prepared, progress: Progress) -> Result:
    """Send clean and triggered images over HTTP; compare with the endpoint as it was before."""
    traffic.classify_in_turn([bare_url, url], prepared.clean.images[:20], progress, "warm-up")
    bare, guarded = traffic.classify_in_turn([bare_url, url], prepared.clean.images, progress, "clean")
    bearing = traffic.classify(url, prepared.triggered.images, progress, "triggered")

    evaluation = guard.evaluate(guard.load(prepared.artifact), prepared.clean, prepared.triggered, TARGET)
    figures = dict(evaluation.figures)
    clean_decided, clean_flags = _heard(guarded)
    triggered_decided, triggered_flags = _heard(bearing)
    figures["guarded"] = {  # as answered over HTTP
        "acc": _share(clean_decided == prepared.clean.labels),
        "asr": _share(triggered_decided == TARGET),
        "pacc": _share(triggered_decided == prepared.triggered.labels),
    }
    figures["detection"] = {**figures["detection"], "tpr": _share(triggered_flags), "fpr": _share(clean_flags)}
    figures["latency"] = {"bare": traffic.latency(bare.seconds), "guarded": traffic.latency(guarded.seconds)}
    return Result(figures, evaluation, bare, guarded, clean_flags, triggered_flags)


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """What the demo promises and these figures miss."""
    before, after, detection = figures["original"], figures["guarded"], figures["detection"]
    promises = {
        f"the attack did not take: ASR without the guard is {before['asr']:.1%}, expected at least 95%":
            before["asr"] >= 0.95,
        f"ASR with the guard is {after['asr']:.1%}, expected at most 2%": after["asr"] <= 0.02,
        f"the guard costs {before['acc'] - after['acc']:.1%} of ACC, expected at most 2 points":
            before["acc"] - after["acc"] <= 0.02,
        f"FPR is {detection['fpr']:.1%}, expected at most 2%": detection["fpr"] <= 0.02,
        f"PACC is {after['pacc']:.1%}, expected within 10 points of ACC ({after['acc']:.1%})":
            after["acc"] - after["pacc"] <= 0.10,
    }  # fmt: skip
    return [sentence for sentence, kept in promises.items() if not kept]


def _heard(answers: traffic.Answers) -> tuple[Tensor, Tensor]:
    """(the guard's decisions, its flags), as answered."""
    bodies = answers.bodies
    return torch.tensor([body["corrected_label"] for body in bodies]), torch.tensor(
        [body["flagged"] for body in bodies]
    )


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
