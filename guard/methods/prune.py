"""Suspiciousness-score pruning: the opt-in repair (arXiv 2311.07417, Eq. 6).

Filters of convolutions that look like a backdoor's on a few clean images D are silenced, then the network is
fine-tuned on D. This changes weights, costs accuracy, and need not end the attack: whether it did cannot be known
without the trigger. So it is never done by itself, and the report says what it did to the accuracy. What makes a filter
suspicious: `guard.methods.suspicion`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn import functional as F

from guard.capture import Captured, capture
from guard.checks import accuracy, check_accuracy, logits_of
from guard.checks import names as class_names
from guard.config import at_least, between
from guard.data import as_float, check_images, check_labels
from guard.errors import BadArtifact, BadModel, NotConverged
from guard.folders import swap
from guard.methods.suspicion import Layer, filters, measure, outliers, score, suspiciousness
from guard.progress import Progress, silent
from guard.versions import versions

__all__ = ["PruneSettings", "Pruned", "filters", "prune", "suspiciousness"]

FORMAT = "backdoor-guard-pruned"
FORMAT_VERSION = 1
WEIGHTS, PROGRAM, REPORT = "model.safetensors", "model.pt2", "report.json"


@dataclass(frozen=True)
class PruneSettings:
    """What `prune` does.

    mu: μ; filters whose score lies above mean + μ·std of their layer are pruned. 1.5 is the value that the figures of
    docs/decisions were measured with; no value serves all networks, and none can be chosen without knowing the
    trigger. A larger one prunes less: of n filters none lies above μ = √(n − 1) (Samuelson's inequality).
    epochs: passes over D of fine-tuning; with 8 the accuracy on a hundred images reaches its end, 0 leaves the weights
    that remain as they are. learning_rate: of Adam; 0.001 is Adam's customary one, ten times that breaks ELU networks,
    a third of it keeps more accuracy and, on one of two networks, more of the backdoor (docs/decisions/0009).
    batch: images a backward pass, when scoring and when fine-tuning; 32 gives a hundred images four steps an epoch.
    batch_size: images a forward pass. seed: of the order of images. min_accuracy: the model's least accuracy on D;
    None asks for clearly better than chance.
    """

    mu: float = 1.5
    epochs: int = 8
    learning_rate: float = 0.001
    batch: int = 32
    batch_size: int = 64
    seed: int = 0
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        between("mu", self.mu, 0.0, 1e6)
        at_least("epochs", self.epochs, 0)
        between("learning_rate", self.learning_rate, 0.0, 10.0)
        for name in ("batch", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        between("seed", self.seed, -1, 2**63)
        if self.min_accuracy is not None:
            between("min_accuracy", self.min_accuracy, 0.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pruned:
    """What `prune` gives.

    captured: the repaired classifier, on the CPU. report: JSON-able; what was pruned, and the accuracy on D.
    """

    captured: Captured
    report: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the repaired tensors under the names of the user's own network: `load_state_dict` takes them."""
        state = self.captured.program.state_dict
        return {name.removeprefix("network."): tensor.detach().clone() for name, tensor in state.items()}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder beside its place and rename it, so that it is whole or absent.

        model.safetensors: the `state_dict`. model.pt2: the program, a MODEL for `guard fit` and the rest; it normalises
        images itself, so that mean and std must not be given again. report.json: the report.

        Raises:
            BadArtifact: the place is taken, and holds no pruned model or ``overwrite`` is off.
        """
        target = Path(path)
        check_place(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, draft / WEIGHTS)
            torch.export.save(self.captured.program, draft / PROGRAM)
            (draft / REPORT).write_text(json.dumps(self.report, indent=2) + "\n")
            draft.chmod(0o755)
            (draft / WEIGHTS).chmod(0o644)  # safetensors makes files for their owner alone
            swap(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


def check_place(target: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, but an empty folder or a pruned model that may be overwritten.

    Raises:
        BadArtifact: with the remedy.
    """
    if not target.exists():
        return
    if not overwrite:
        raise BadArtifact(f"out: {target} exists; choose another folder, or allow overwriting it.", field="out")
    if target.is_dir() and not any(target.iterdir()):
        return
    try:
        own = json.loads((target / REPORT).read_text())["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        own = False
    if not own:
        raise BadArtifact(
            f"out: {target} exists and is no pruned model; it is left alone. Choose another folder.", field="out"
        )


@torch.inference_mode(False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
@torch.autocast("cuda", enabled=False)  # type: ignore[untyped-decorator]
def prune(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    settings: PruneSettings | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    progress: Progress = silent,
) -> Pruned:
    """Silence the suspicious filters of a classifier and fine-tune it, on clean images D.

    Whether the backdoor is gone cannot be known from clean images. With one seed the result is the same on a CPU
    with one number of threads.

    Args:
        model: maps [N, C, H, W] to logits [N, K]; captured in eval mode and never changed.
        images: D, [N, C, H, W], float32 in [0, 1] or uint8; ten a class. labels: int64 [N], their true classes.
        settings: see `PruneSettings`. mean, std: if the model wants normalised images, one value a channel.
        classes: K names. device: None takes the model's own. progress: see `guard.progress`.

    Raises:
        BadData, BadModel, BadSetting: what is wrong, and the remedy.
        NotConverged: fine-tuning diverged.
    """
    begun = time.perf_counter()
    settings = settings or PruneSettings()
    images = check_images(images)
    captured = capture(model, images.shape[1:], mean=mean, std=std, device=device)
    images, labels = images.cpu(), check_labels(labels, len(images), captured.classes).cpu()
    names = class_names(classes, captured.classes)
    layers, left_out = filters(captured)
    if not layers:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in left_out.items())
        raise BadModel(
            "model: it has no convolution whose filters could be pruned"
            + (f" ({reasons})" if reasons else "")
            + ". Pruning is for convolutional classifiers; guard it with `guard fit` instead.",
            field="model",
        )
    reached = {"original": _accuracy(captured, images, labels, settings.batch_size)}
    check_accuracy(captured, images, labels, reached["original"], settings.min_accuracy)
    original = captured.fingerprint()

    factors = measure(captured, layers, images, labels, batch=settings.batch, progress=progress)
    scores = {layer.name: score(factors[layer.name]) for layer in layers}
    found = {layer.name: outliers(scores[layer.name], settings.mu) for layer in layers}
    silenced = {layer: found[layer.name][1] for layer in layers}
    silence(captured, silenced)  # the captured program is a copy of the model, and this call's own
    reached["pruned"] = _accuracy(captured, images, labels, settings.batch_size)
    fine_tune(captured, silenced, images, labels, settings, progress)
    reached["fine_tuned"] = _accuracy(captured, images, labels, settings.batch_size)
    if captured.device.type != "cpu":
        captured = replace(captured, program=move_to_device_pass(captured.program, "cpu"))

    report = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": {"original": original, "pruned": captured.fingerprint()},
        "input": captured.spec.to_json(),
        "classes": names,
        "settings": settings.to_json(),
        "images": len(images),
        "images_per_class": torch.bincount(labels, minlength=captured.classes).tolist(),
        "accuracy": reached,
        "layers": [_row(layer, scores[layer.name], *found[layer.name]) for layer in layers],
        "left_out": left_out,
        "warnings": _warnings(labels, captured.classes),
        "seconds": round(time.perf_counter() - begun, 2),
        "versions": versions(),
    }
    return Pruned(captured, report)


def _row(layer: Layer, scores: Tensor, threshold: float, pruned: list[int]) -> dict[str, Any]:
    """What the report says of a layer."""
    return {
        "name": layer.name,
        "filters": layer.filters,
        "pruned": pruned,
        "threshold": float(f"{threshold:.6g}"),
        "scores": [float(f"{value:.6g}") for value in scores.tolist()],
    }


def _warnings(labels: Tensor, classes: int) -> list[str]:
    absent = int((torch.bincount(labels, minlength=classes) == 0).sum())
    return [f"{absent} of {classes} classes have no clean image; fine-tuning may forget them."] if absent else []


def silence(captured: Captured, silenced: Mapping[Layer, Sequence[int]]) -> None:
    """Zero the filters of a captured program, in place: the channel is exactly zero after the layer's batch norm."""
    state = captured.program.state_dict
    with torch.no_grad():
        for layer, chosen in silenced.items():
            for name in layer.tensors() if len(chosen) else ():
                state[name][list(chosen)] = 0.0


def fine_tune(
    captured: Captured,
    silenced: Mapping[Layer, Sequence[int]],
    images: Tensor,
    labels: Tensor,
    settings: PruneSettings,
    progress: Progress = silent,
) -> None:
    """Adam on the cross-entropy of D over every parameter of a captured program, in place.

    The graph was captured in eval mode, so batch norms keep their running statistics, and dropout is off. That is
    right for a hundred images: statistics of batches of 32 of them would replace those of the whole training set by
    noise, while γ and β can still shift each channel. Nothing is augmented: which changes of an image keep its class
    is not known here (a mirrored digit is another). Silenced filters are zeroed again after each step, since Adam
    would revive their β.

    Raises:
        NotConverged: a weight is no longer finite.
    """
    if settings.epochs == 0:
        return
    module = captured.module()  # shares its tensors with the program
    parameters = [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * math.ceil(len(images) / settings.batch)
    device = captured.device
    with torch.enable_grad(), progress(f"fine-tune {settings.epochs} epochs", steps) as advance:
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(images), generator=generator).split(settings.batch):
                optimiser.zero_grad()
                logits = module(as_float(images[rows]).to(device))
                F.cross_entropy(logits.float(), labels[rows].to(device)).backward()
                optimiser.step()
                silence(captured, silenced)
                advance(1)
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise NotConverged(
            f"learning_rate: fine-tuning diverged at {settings.learning_rate:g}; give a smaller one, or epochs 0."
        )


def _accuracy(captured: Captured, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Share of images that the program decides right."""
    return accuracy(logits_of(captured.module(), images, batch_size, captured.device), labels.cpu())
