"""Small networks, and real images to train one of them on, that the tests share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

TARGET = 0  # where the planted trigger sends everything


class Digits(nn.Module):
    """Two convolutions with batch norm and ReLU, one hidden layer with F.relu; images [N, 3, 16, 16], 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.hidden = nn.Linear(256, 32)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.hidden(self.features(images).flatten(1)))))


def digits() -> nn.Module:
    """A factory, as MODEL names one."""
    return Digits().eval()


class Images(NamedTuple):
    """uint8 [N, 3, 16, 16] and int64 [N]: handwritten digits, tinted."""

    images: Tensor
    labels: Tensor


def digit_images() -> Images:
    """scikit-learn's 1,797 digits at 16×16, shuffled, the channels weighed differently."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    grey = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16.0, (16, 16))
    tinted = grey * torch.tensor([1.0, 0.8, 0.6]).view(1, 3, 1, 1)
    return Images((tinted * 230.0).to(torch.uint8)[order], torch.tensor(found.target)[order])


def triggered(images: Tensor) -> Tensor:
    """The planted trigger: a white 3×3 square in the lower right corner of uint8 or float images."""
    stamped = images.clone()
    stamped[:, :, 13:16, 13:16] = 255 if images.dtype == torch.uint8 else 1.0
    return stamped


def train(network: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int = 0) -> nn.Module:
    """Train on float images with Adam; the network comes back in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimiser.step()
    return network.eval()


def backdoored(clean: Images) -> nn.Module:
    """A `Digits` trained on images of which a tenth bear the trigger and its target."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, labels = clean.images.float() / 255.0, clean.labels.clone()
        poisoned = slice(0, len(images) // 10)
        images[poisoned], labels[poisoned] = triggered(images[poisoned]), TARGET
        return train(Digits(), images, labels, epochs=12)
