"""Evaluation against scikit-learn and loops."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import TARGET
from sklearn.metrics import roc_auc_score, roc_curve

import guard
from guard.artifact import Artifact
from guard.data import Data
from guard.errors import BadInput
from guard.evaluation import Evaluation, auroc, tpr_at_fpr


@pytest.fixture(scope="module")
def evaluation(artifact: Artifact, unseen: Data, attacked: Data) -> Evaluation:
    return guard.evaluate(artifact.guard(), unseen, attacked, TARGET, batch_size=50)


@pytest.mark.parametrize("seed", range(6))
def test_rates_are_scikit_learns(seed: int) -> None:
    """AUROC and TPR at a FPR equal scikit-learn's, ties and infinities included."""
    generator = np.random.default_rng(seed)
    low, high = generator.normal(0, 1, 60 + 50 * seed), generator.normal(1, 2, 80)
    if seed % 2:
        low, high = low.round(), high.round()
    high[:3] = 99.0  # stands for +inf, which scikit-learn refuses
    ours = np.where(high == 99.0, np.inf, high)
    truth, both = np.r_[np.zeros(len(low)), np.ones(len(high))], np.r_[low, high]
    assert auroc(low, ours) == pytest.approx(roc_auc_score(truth, both), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, both, drop_intermediate=False)
    for rate in (0.0, 0.005, 0.01, 0.05, 0.3, 1.0):
        best = tpr[fpr <= rate + 1e-12].max()
        if rate < 1.0:  # at 1.0 every threshold will do
            assert tpr_at_fpr(low, ours, rate) == pytest.approx(best, abs=1e-12)


def test_auroc_is_one_sided() -> None:
    """Scores that are lower on triggered images count against the detector, not for it."""
    assert auroc(np.array([1.0, 2.0]), np.array([0.0, -1.0])) == 0.0


def test_figures_by_loop(evaluation: Evaluation, artifact: Artifact, unseen: Data, attacked: Data) -> None:
    """Every share equals one counted image by image; images of the target class are left out of the triggered."""
    loaded = artifact.guard()
    counts = {(name, key): [] for name in ("original", "corrected", "guarded") for key in ("acc", "asr", "pacc")}
    flags: dict[str, list[bool]] = {"clean": [], "triggered": []}
    scores: dict[str, list[float]] = {"clean": [], "triggered": [], "successful": []}

    def decided(images: torch.Tensor) -> tuple[dict[str, list[int]], list[bool], list[float]]:
        v = loaded(images)
        rows = {
            "original": v.logits.argmax(1).tolist(),
            "corrected": v.corrected_logits.argmax(1).tolist(),
            "guarded": v.corrected_label.tolist(),
        }
        return rows, v.flagged.tolist(), v.score.tolist()

    rows, flags["clean"], scores["clean"] = decided(unseen.images)
    sent_to = rows["original"]
    for index, true in enumerate(unseen.labels.tolist()):
        for name, labels in rows.items():
            counts[name, "acc"].append(labels[index] == true)
    rows, flagged, score = decided(attacked.images)
    for index, true in enumerate(attacked.labels.tolist()):
        if true == TARGET:
            continue
        flags["triggered"].append(flagged[index])
        scores["triggered"].append(score[index])
        if rows["original"][index] == TARGET:
            scores["successful"].append(score[index])
        for name, labels in rows.items():
            counts[name, "asr"].append(labels[index] == TARGET)
            counts[name, "pacc"].append(labels[index] == true)

    figures = evaluation.figures
    for (name, key), hits in counts.items():
        assert figures[name][key] == pytest.approx(np.mean(hits)), (name, key)
    detection = figures["detection"]
    assert detection["fpr"] == pytest.approx(np.mean(flags["clean"]))
    assert detection["tpr"] == pytest.approx(np.mean(flags["triggered"]))
    for key, kind in (("auroc", "triggered"), ("auroc_successful", "successful")):
        truth = [0] * len(scores["clean"]) + [1] * len(scores[kind])
        assert detection[key] == pytest.approx(roc_auc_score(truth, scores["clean"] + scores[kind]))
    sent = [flag for flag, label in zip(flags["clean"], sent_to, strict=True) if label == TARGET]
    assert detection["fpr_target"] == pytest.approx(np.mean(sent))
    sizes = {kind: len(values) for kind, values in scores.items()}
    assert figures["n"] == {**sizes, "sent_to_target": len(sent)}
    assert sizes["triggered"] == int((attacked.labels != TARGET).sum())


def test_keys_of_the_contract(evaluation: Evaluation) -> None:
    """The figures have the keys that the design promises, no others, and go through JSON."""
    figures = json.loads(json.dumps(evaluation.figures, allow_nan=False))
    assert figures.keys() == {"original", "corrected", "guarded", "detection", "n", "seconds", "versions"}
    for name in ("original", "corrected", "guarded"):
        assert figures[name].keys() == {"acc", "asr", "pacc"}
    detection = figures["detection"]
    assert detection.keys() == {"auroc", "tpr", "fpr", "fpr_target", "nominal_fpr", "tpr_at_fpr", "auroc_successful"}
    assert detection["tpr_at_fpr"].keys() == {"0.005", "0.01", "0.05"}
    assert detection["nominal_fpr"] == 0.005
    assert figures["n"].keys() == {"clean", "sent_to_target", "triggered", "successful"}


def test_the_guard_guards(evaluation: Evaluation) -> None:
    """On the planted backdoor: the attack succeeds on the bare network, is detected, and hardly passes the guard."""
    figures = evaluation.figures
    assert figures["original"]["asr"] > 0.9
    assert figures["guarded"]["asr"] < 0.05
    assert figures["original"]["acc"] - figures["guarded"]["acc"] <= 0.015
    assert figures["detection"]["auroc_successful"] > 0.99


def test_without_triggered_images(artifact: Artifact, unseen: Data) -> None:
    """With clean images alone the same keys are there, those that need triggered images None."""
    figures = guard.evaluate(artifact.guard(), unseen).figures
    assert figures["original"]["acc"] > 0.9
    assert figures["original"]["asr"] is None
    assert figures["detection"]["auroc"] is None
    assert figures["detection"]["fpr"] < 0.03
    assert figures["n"] == {"clean": len(unseen), "sent_to_target": 0, "triggered": 0, "successful": 0}


def test_all_to_all(artifact: Artifact, unseen: Data) -> None:
    """With all2all each class is sent to the next, the last to the first; no image is left out."""
    figures = guard.evaluate(artifact.guard(), unseen, unseen, "all2all").figures
    decided = artifact.guard()(unseen.images).label
    expected = np.mean([int(label) == (int(true) + 1) % 10 for label, true in zip(decided, unseen.labels, strict=True)])
    assert figures["original"]["asr"] == pytest.approx(expected)
    assert figures["n"]["triggered"] == len(unseen)


@pytest.mark.parametrize(
    ("target", "rows", "says"),
    [
        (None, slice(None), "need the attacker's class"),
        (10, slice(None), "a class from 0 to 9, got 10"),
        (-1, slice(None), "got -1"),
        (TARGET, "target", "ASR is undefined"),
    ],
)
def test_bad_target(artifact: Artifact, unseen: Data, attacked: Data, target: int, rows: object, says: str) -> None:
    """A target that is missing, no class, or the class of every triggered image is refused."""
    chosen = attacked.labels == TARGET if rows == "target" else torch.ones(len(attacked), dtype=torch.bool)
    part = Data(attacked.images[chosen], attacked.labels[chosen], None, "part")
    with pytest.raises(BadInput, match=says) as caught:
        guard.evaluate(artifact.guard(), unseen, part, target)
    assert caught.value.field == "target"


def test_a_class_that_is_none_is_refused_before_the_work(artifact: Artifact, unseen: Data) -> None:
    """Without triggered images as well, where it would only be counted."""
    with pytest.raises(BadInput, match="a class from 0 to 9, got 99"):
        guard.evaluate(artifact.guard(), unseen, None, 99, progress=None)  # type: ignore[arg-type]
