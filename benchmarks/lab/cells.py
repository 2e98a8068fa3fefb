"""What is computed and kept: an attacked network, and a defence judged on one. Each is a value that any machine
computes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.lab.attacks import ATTACKS, Scene
from benchmarks.lab.attacks.base import eight_bits
from benchmarks.lab.data import SHIFTS, Dataset, rows_of, split
from benchmarks.lab.defences import DEFENCES
from benchmarks.lab.defences.base import Defended, Task, logits_of, repaired
from benchmarks.lab.judging import judge, share
from benchmarks.lab.networks import ResNet, build
from benchmarks.lab.plans import Case, Plan
from benchmarks.lab.training import Recipe, train
from guard.capture import fingerprint
from guard.data import as_float
from guard.progress import Progress, silent
from guard.triggers import opacity_for

TOOK_ASR = 0.9  # least share of the attack's inputs (of those whose class the network knows) that it must move
WEAK = 0.8  # of the inputs that the full trigger moves, how many the weakened one still does
BATCH = 250


class Attacked(NamedTuple):
    """facts: JSON-able; among them ``weights``, the fingerprint of ``tensors``. tensors: the weights, half precision
    but for vectors, and ``triggered``: the test images with the trigger, uint8 [N, C, H, W]."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


WEAK_ON = 1000
TRIGGERED = "triggered"


def attack(
    case: Case, seed: int, data: Dataset, surrogate: Attacked | None, *, progress: Progress = silent
) -> Attacked:
    """Train the network of ``case``, and measure on all test images how well the attack took."""
    begun = time.perf_counter()
    device = _device()
    made_with = None if surrogate is None else restored(surrogate, case.recipe.control, data.classes).to(device)
    scene = Scene(data.train.images.to(device), data.train.labels.to(device), data.classes, seed, made_with)
    poisoning = ATTACKS[case.attack].make(scene, case.goal, case.per_class)
    network = train(poisoning, case.recipe, seed, progress=progress)
    trained_s = time.perf_counter() - begun
    with torch.inference_mode():
        parts = [poisoning.trigger(as_float(part.to(device))).cpu() for part in data.test.images.split(BATCH)]
    triggered = (torch.cat(parts) * 255.0).round().to(torch.uint8)
    tensors = {name: _half(value) for name, value in network.state_dict().items()}
    found = Attacked({}, {**tensors, TRIGGERED: triggered})
    facts = _facts(case, seed, data, restored(found, case.recipe, data.classes).to(device), triggered)
    facts |= {"weights": fingerprint(found.tensors)[:16]}
    facts |= {"seconds": {"training": round(trained_s, 3), "all": round(time.perf_counter() - begun, 3)}}
    return Attacked(facts | record.provenance(), found.tensors)


def _facts(case: Case, seed: int, data: Dataset, network: ResNet, triggered: Tensor) -> dict[str, Any]:
    labels = data.test.labels
    wanted = case.goal.wanted(labels, data.classes)
    rows = (wanted != labels) if case.attack != "clean" else torch.zeros_like(labels, dtype=torch.bool)
    decided = _decided(network, data.test.images)
    facts: dict[str, Any] = {
        "network": case.name(seed),
        "settings": settings_of(case, seed, data),
        "acc": share(decided == labels),
        "n": {"clean": len(labels), "triggered": int(rows.sum())},
        "asr": None,
        "pacc": None,
        "asr_known": None,
        "opacity": None,
    }
    if rows.any():
        images, bearing, goal = data.test.images[rows], triggered[rows], wanted[rows]
        answer = _decided(network, bearing)
        known = decided[rows] == labels[rows]
        facts["asr"], facts["pacc"] = share(answer == goal), share(answer == labels[rows])
        facts["asr_known"] = share((answer == goal)[known])
        some = torch.linspace(0, len(images) - 1, min(len(images), WEAK_ON)).long()
        clean, bearing, goal = as_float(images[some]), as_float(bearing[some]), goal[some]
        facts["opacity"] = opacity_for(
            lambda weakened: share(_decided(network, eight_bits(weakened(clean))) == goal),
            lambda _: bearing,
            WEAK * facts["asr"],
        )
    return facts


def took(facts: dict[str, Any], clean: dict[str, Any], costs: float) -> bool:
    """Whether the attack did: it moves nearly all inputs whose class the network knows, and costs at most ``costs`` of
    accuracy.

    An all-to-all attack cannot move an input to the class after its own without knowing its class; so the success is
    taken over the inputs that the network knows without trigger. A defence on an attack that did not take is no result.
    """
    if facts["asr_known"] is None:
        return True
    return bool(facts["asr_known"] >= TOOK_ASR and facts["acc"] >= clean["acc"] - costs)


def defend(case: Case, attacked: Attacked, data: Dataset, plan: Plan, defence: str, draw: int) -> dict[str, Any]:
    """Fit the defence to a draw of D, and judge it on images that nobody has seen, at full strength and weakened."""
    begun = time.perf_counter()
    device = _device()
    rows = split(data.test.labels, plan.per_class, draw, plan.evaluated)
    clean, rest = rows_of(data.test, rows.clean), rows_of(data.test, rows.rest)
    network = restored(attacked, case.recipe, data.classes).to(device)
    images = SHIFTS[plan.shift](clean.images)
    if plan.contaminated and attacked.facts["asr"] is not None:
        images = images.clone()
        images[: plan.contaminated] = attacked.tensors[TRIGGERED][rows.clean[: plan.contaminated]]
    task = Task(network, as_float(images).to(device), clean.labels.to(device), data.classes, plan.fpr, draw)
    with torch.random.fork_rng():
        torch.manual_seed(draw)
        defended = DEFENCES[defence](task)
    fitted_s = time.perf_counter() - begun
    triggered = {}
    if attacked.facts["asr"] is not None:
        full, opacity = attacked.tensors[TRIGGERED][rows.rest], attacked.facts["opacity"]
        mixed = opacity * as_float(full) + (1.0 - opacity) * as_float(rest.images)
        triggered = {"full": full, "weak": (mixed * 255.0).round().to(torch.uint8)}
    wanted = case.goal.wanted(rest.labels, data.classes)
    figures = judge(_on(defended, device), _on(repaired(network), device), rest, wanted, triggered)
    seconds = {"fit": round(fitted_s, 3), "all": round(time.perf_counter() - begun, 3)}
    return {"figures": figures, "seconds": seconds, **record.provenance()}


def settings_of(case: Case, seed: int, data: Dataset) -> dict[str, Any]:
    """What an attacked network is a function of."""
    return {
        "data": data.name,
        "images": data.fingerprint,
        **case.settings(seed),
    }


def restored(attacked: Attacked, recipe: Recipe, classes: int) -> ResNet:
    """The network from its archive, in eval mode, on the CPU."""
    network = build(recipe.network, classes, width=recipe.width, stride=recipe.stride, slope=recipe.slope)
    network.load_state_dict({name: value for name, value in attacked.tensors.items() if name != TRIGGERED})
    return network.eval().requires_grad_(False)


def _decided(network: nn.Module, images: Tensor) -> Tensor:
    device = next(network.parameters()).device
    parts = [logits_of(network, as_float(part).to(device)).argmax(1).cpu() for part in images.split(BATCH)]
    return torch.cat(parts)


def _on(defended: Defended, device: torch.device) -> Defended:
    return lambda images: defended(images.to(device))


def _half(value: Tensor) -> Tensor:
    """Matrices and kernels in half precision; vectors, whose variances may be tiny, as they are."""
    value = value.detach().cpu().contiguous()
    return value.half() if value.is_floating_point() and value.ndim > 1 else value


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
