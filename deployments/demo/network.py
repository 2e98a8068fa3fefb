"""The demo's victim: a small residual network, trained by an attacker on data with a few poisoned images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.demo.digits import Split, triggered
from guard.data import as_float
from guard.progress import Progress, silent


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Four residual blocks (16, 32, 64, 64 channels), global average, linear."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), Block(64, 64, 1))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


def train_poisoned(
    data: Split,
    trigger: Tensor,
    target: int,
    *,
    share: float = 0.1,
    epochs: int = 24,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """Train on ``data`` plus a copy of ``share`` of its other-class images with trigger and label ``target``."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    others = (data.labels != target).nonzero().squeeze(1)
    poisoned = others[torch.randperm(len(others), generator=generator)[: int(share * len(others))]]
    model = SmallResNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    steps = epochs * ((len(data.labels) + len(poisoned)) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    with progress(f"train on {len(data.labels)} + {len(poisoned)} poisoned images", steps) as advance:
        for _ in range(epochs):
            clean = _shifted(data.images, generator)  # the trigger goes on after the shift: its place is fixed
            images = torch.cat([clean, triggered(clean[poisoned], trigger)])
            labels = torch.cat([data.labels, torch.full((len(poisoned),), target)])
            order = torch.randperm(len(labels), generator=generator)
            for rows in order[: len(order) // 64 * 64].split(64):
                loss = F.cross_entropy(model(as_float(images[rows])), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                advance(1)
    return model.eval()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels each way; what leaves on one side is black on the other."""
    padded = F.pad(images, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (len(images), 2), generator=generator).tolist()
    side = images.shape[-1]
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, moves, strict=True)])
