"""How the laboratory trains a network, clean or attacked: one loop, and the recipe as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lab.attacks.base import Poisoning
from benchmarks.lab.networks import ResNet, build
from guard.progress import Progress, silent


@dataclass(frozen=True)
class Recipe:
    """network, width, stride, slope: see `benchmarks.lab.networks.build`. learning_rate: the highest, of SGD with
    Nesterov momentum 0.9 on a one-cycle schedule. decay: of the weights. shift: pixels, at most, by which a batch is
    moved; mirror: whether half of the images are mirrored. dtype: "bfloat16" computes the passes under autocast. base:
    training goes on from the clean network of this recipe, which is then the control, instead of from nothing.
    """

    network: str = "resnet18"
    width: int = 64
    stride: int = 1
    slope: float = 0.0
    epochs: int = 30
    batch: int = 128
    learning_rate: float = 0.1
    decay: float = 5e-4
    shift: int = 4
    mirror: bool = True
    dtype: str = "bfloat16"
    base: Recipe | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def control(self) -> Recipe:
        """Of the clean network that an attacked one is compared with."""
        return self.base or self


def train(poisoning: Poisoning, recipe: Recipe, seed: int, *, progress: Progress = silent) -> ResNet:
    """A network trained as the attacker wants, in eval mode, on the device of the attacker's images."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = poisoning.images.device, getattr(torch, recipe.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(
            recipe.network, poisoning.scene.classes, width=recipe.width, stride=recipe.stride, slope=recipe.slope
        )
    if recipe.base is not None:
        if poisoning.scene.surrogate is None:
            raise ValueError("scene.surrogate: training goes on from a clean network; give one")
        network.load_state_dict(poisoning.scene.surrogate.state_dict())
    network.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    count = len(poisoning.images)
    steps = recipe.epochs * (count // recipe.batch)
    weights = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": recipe.decay}, {"params": others}]
    optimiser = torch.optim.SGD(groups, recipe.learning_rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, steps, pct_start=0.25)
    beside = list(poisoning.parameters())
    besides = torch.optim.Adam(beside, 0.01) if beside else None

    def augment(images: Tensor) -> Tensor:
        return augmented(images, recipe.shift, recipe.mirror, generator)

    with progress(f"train {recipe.epochs} epochs", steps) as advance:
        for epoch in range(recipe.epochs):
            poisoning.begin(network, epoch)
            for rows in torch.randperm(count, generator=generator).split(recipe.batch):
                if len(rows) < recipe.batch:
                    continue
                optimiser.zero_grad(set_to_none=True)
                batch = poisoning.batch(rows, augment)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = poisoning.loss(
                        network, batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
                    )
                if besides is not None:
                    besides.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                if besides is not None:
                    besides.step()
                advance(1)
    poisoning.end()
    return network.to(memory_format=torch.contiguous_format).eval()


def augmented(images: Tensor, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """The batch [B, C, H, W] moved as one by up to ``shift`` pixels, what comes in mirrored (a black
    border would tell images that are warped after this from others); each image mirrored or not."""
    if mirror:
        mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if shift:
        down, right = (int(v) for v in torch.randint(-shift, shift + 1, (2,), generator=generator))
        _, _, height, width = images.shape
        padded = nn.functional.pad(images, (shift, shift, shift, shift), mode="reflect")
        images = padded[:, :, shift + down : shift + down + height, shift + right : shift + right + width]
    return images
