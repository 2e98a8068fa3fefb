"""MMBM: the smallest bounds on activations that keep what the network does on D (maximum-margin backdoor mitigation).

Wang, Xiang, Miller, Kesidis: "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor Pattern Types
Using a Maximum Margin Statistic", IEEE S&P 2024, arXiv 2205.06900; the mitigation alone, not the detection before it.

Every activation site gets an upper bound per channel, the same over a feature map. `learn_bounds` descends
MSE(f̄(x), f(x)) over the rightly classified x of D + λ · sum over the sites of ‖z‖₂; λ is multiplied by α where the
bounded network f̄ keeps the share π of them right, divided by it where not. No weight changes, and f̄ alone answers.

Differs from the authors' code (univ_bm.py), which bounds three of ResNet-18's 17 sites from a start of 8 and keeps the
last iterate: every site is bounded, as in the paper's text; 8 is here each site's largest activation on D, and the
bounds are measured in that unit, so that start, step and λ mean the same for every network; bounds stay at or above
zero; accuracy is measured on all of those images, not along an epoch; λ changes after every epoch, not every tenth from
the 20th on: five changes by 1.2 do not bring the accuracy down to π on networks other than theirs. Of the iterates the
one of the smallest norm that kept π is taken (the last one, where none did). For activations without a lower bound
nothing is bounded below: the method is made for ReLU.

Cost: epochs × D forward and backward through the bounded network, and every ``check`` epochs D forward once more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab.defences.base import BATCH, Defended, Task, logits_of, repaired
from guard.capture import capture
from guard.corrections import Clip
from guard.observe import observe
from guard.twin import Twin, build_twin

START = 8.0  # where every bound starts; a site's largest activation on D is this many units


def mmbm(
    task: Task,
    *,
    epochs: int = 50,
    batch: int = 200,
    learning_rate: float = 0.1,
    weight: float = 0.5,
    weight_factor: float = 1.2,
    check: int = 1,
    accuracy: float = 0.95,
) -> Defended:
    """The network with bounded activations answers. The defaults, but for ``check``, are those of the authors' code.

    epochs: over D. batch: images a step. learning_rate: of Adam, in 1/8 of a site's largest activation on D.
    weight: λ at the start, changed by weight_factor (α) every ``check`` epochs. accuracy: π.
    """
    captured = capture(task.network, task.images.shape[1:])
    maxima = observe(captured, task.images, batch_size=BATCH).maxima
    units = {index: values.max().clamp_min(1e-6) / START for index, values in maxima.items()}
    clips = {
        site.index: Clip(START * units[site.index].expand(site.channels), None, axis=site.axis, ndim=site.ndim)
        for site in captured.sites
    }
    bounded = Bounded(build_twin(captured, clips), units)
    learn_bounds(bounded, task, epochs, batch, learning_rate, weight, weight_factor, check, accuracy)
    return repaired(bounded)


class Bounded(nn.Module):
    """f̄: images float32 [N, C, H, W] → logits [N, K] of the bounded network.

    units: site index → the activation that one unit of a bound stands for, scalar.
    """

    def __init__(self, twin: Twin, units: dict[int, Tensor]) -> None:
        super().__init__()
        self.twin, self.units = twin, units

    def forward(self, images: Tensor) -> Tensor:
        return self.twin.corrected(self.twin.prefix()(images))

    def start(self) -> dict[int, Tensor]:
        """Bounds of `START` units, per site index float32 [channels]."""
        return {index: self.twin.correction(index).upper.flatten() / unit for index, unit in self.units.items()}

    def place(self, bounds: dict[int, Tensor]) -> None:
        """Take these bounds [channels], in units, with their gradients, in place of the present ones."""
        for index, unit in self.units.items():
            self.twin.correction(index).place(bounds[index] * unit, None)


def total_norm(bounds: dict[int, Tensor]) -> Tensor:
    """Sum over the sites of ‖z‖₂, a scalar in the bounds' units."""
    return torch.stack([torch.linalg.vector_norm(bound) for bound in bounds.values()]).sum()


def learn_bounds(
    bounded: Bounded,
    task: Task,
    epochs: int,
    batch: int,
    learning_rate: float,
    weight: float,
    weight_factor: float,
    check: int,
    accuracy: float,
) -> None:
    """Move the bounds of ``bounded``, in place; see `mmbm` for the settings."""
    generator = torch.Generator().manual_seed(task.seed)
    labels = task.labels.to(task.images.device)
    original = logits_of(task.network, task.images).clone()
    right = (original.argmax(1) == labels).nonzero().squeeze(1)
    images, wanted, labels = task.images[right], original[right], labels[right]
    bounds = {index: bound.clone().requires_grad_() for index, bound in bounded.start().items()}
    optimiser = torch.optim.Adam(bounds.values(), lr=learning_rate)
    best, smallest = bounds, float("inf")
    with task.progress("mmbm: bounds", epochs) as advance:
        for epoch in range(1, epochs + 1):
            for rows in torch.randperm(len(images), generator=generator).to(images.device).split(batch):
                bounded.place(bounds)
                optimiser.zero_grad()
                loss = F.mse_loss(bounded(images[rows]), wanted[rows]) + weight * total_norm(bounds)
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    for bound in bounds.values():
                        bound.clamp_min_(0.0)
            if epoch % check == 0 or epoch == epochs:
                reached = {index: bound.detach().clone() for index, bound in bounds.items()}
                bounded.place(reached)
                kept = float((logits_of(bounded, images).argmax(1) == labels).double().mean()) >= accuracy
                norm = float(total_norm(reached))
                if kept and norm < smallest:
                    best, smallest = reached, norm
                elif smallest == float("inf"):
                    best = reached
                weight = weight * weight_factor if kept else weight / weight_factor
            advance(1)
    bounded.place({index: bound.detach() for index, bound in best.items()})
