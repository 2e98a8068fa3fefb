"""The demo's images: 1,797 real handwritten digits that ship with scikit-learn, enlarged to 3×32×32; a BadNet patch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from guard.triggers import stamp

CLASSES = tuple(str(digit) for digit in range(10))
SIDE = 32
PATCH = 3


class Split(NamedTuple):
    """images: uint8 [N, 3, 32, 32]. labels: int64 [N]."""

    images: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """train: what the attacker trains on. clean: the defender's, 50 a class. test: seen by nobody before the end."""

    train: Split
    clean: Split
    test: Split


def load(seed: int, *, per_class: int = 50, test: int = 400) -> Digits:
    """Three disjoint random splits."""
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16.0
    large = interpolate(grey, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0.0, 1.0)
    images = (large * 255.0).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(np.asarray(bunch.target)).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[:test], order[test:]
    chosen = torch.cat([rest[labels[rest] == digit][:per_class] for digit in range(10)])
    train = rest[~torch.isin(rest, chosen)]
    return Digits(*(Split(images[rows], labels[rows]) for rows in (train, chosen, held_out)))


def patch(seed: int) -> Tensor:
    """A random coloured 3×3 patch, uint8 [3, 3, 3] (BadNet)."""
    return torch.randint(0, 256, (3, PATCH, PATCH), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def triggered(images: Tensor, trigger: Tensor) -> Tensor:
    """Images [N, 3, 32, 32] with the trigger in the lower right corner, one pixel from the edges."""
    return stamp(images, trigger, SIDE - PATCH - 1, SIDE - PATCH - 1)
