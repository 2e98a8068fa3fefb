"""The twin against an oracle that clips every activation call of the user's own module while it runs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from oracles import Bound, activations, bounded, extremes
from torch import Tensor, nn
from torchvision import models

from guard.capture import Captured, capture
from guard.config import FitSettings
from guard.corrections import Clip
from guard.data import Data
from guard.fitting import fit
from guard.twin import Twin, build_twin

SIDE = 32


def small(activation: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions and two linear layers around one kind of activation; an activation module is used twice."""
    shared = activation()
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), shared, nn.Conv2d(6, 6, 3, stride=2), shared),
        *(nn.Flatten(), nn.Linear(6 * 49, 12), activation(), nn.Linear(12, 10)),
    )


def vit() -> nn.Module:
    network = models.VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(network.heads.head.weight)  # zero as it comes
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=10),
    "efficientnet_b0": lambda: models.efficientnet_b0(num_classes=10),
    "convnext_tiny": lambda: models.convnext_tiny(num_classes=10),
    "shufflenet_v2_x0_5": lambda: models.shufflenet_v2_x0_5(num_classes=10),
    "vit": vit,
    "elu": lambda: small(nn.ELU),
    "leaky_relu": lambda: small(lambda: nn.LeakyReLU(0.2)),
    "prelu": lambda: small(lambda: nn.PReLU(init=0.3)),
}


def network(name: str) -> nn.Module:
    """In eval mode, with batch statistics of its own, so that what happens in front is felt at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if type(module).__name__ == "CNBlock":
                nn.init.uniform_(module.layer_scale, 0.1, 0.5)  # 1e-6 as it comes
        with torch.no_grad():
            model.train()(images(32))
    return model.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def bounds(model: nn.Module, captured: Captured, first: int = 0) -> list[Bound | None]:
    """Per site a bound that acts on some images and not on all: quantiles 0.3 to 0.9 of each channel's maximum."""
    generator = torch.Generator().manual_seed(2)
    found: list[Bound | None] = []
    for site, activation in zip(captured.sites, activations(model, images(16)), strict=True):
        maxima, minima = extremes(activation, site.axis)
        high = float(0.3 + 0.6 * torch.rand((), generator=generator))
        lower = None if site.bounded_below else minima.quantile(1.0 - high, dim=0)
        found.append(Bound(maxima.quantile(high, dim=0), lower, site.axis) if site.index >= first else None)
    return found


def twin_of(captured: Captured, chosen: list[Bound | None]) -> Twin:
    clips: dict[int, nn.Module] = {
        site.index: Clip(bound.upper, bound.lower, axis=site.axis, ndim=site.ndim)
        for site, bound in zip(captured.sites, chosen, strict=True)
        if bound is not None
    }
    return build_twin(captured, clips)


@pytest.fixture(scope="module", params=list(NETWORKS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Captured]:
    model = network(request.param)
    return model, capture(model, (3, SIDE, SIDE))


@pytest.mark.parametrize("count", [1, 7])
def test_both_answers(pair: tuple[nn.Module, Captured], count: int) -> None:
    """The original answer is the user's own bit for bit, the corrected one that of clipping every call by hand."""
    model, captured = pair
    chosen = bounds(model, captured)
    twin, x = twin_of(captured, chosen), images(count)
    logits, corrected = twin(x)
    assert torch.equal(logits, model(x))  # with gradients on: without, attention takes another, fused kernel
    expected = bounded(model, x, chosen)
    effect = (expected - logits).abs().max()
    assert effect > 1e-3
    assert (corrected - expected).abs().max() <= 1e-3 * effect


def test_shared_prefix(pair: tuple[nn.Module, Captured]) -> None:
    """With only the later half of the sites corrected, nothing in front of them is computed twice."""
    model, captured = pair
    first = len(captured.sites) // 2
    chosen = bounds(model, captured, first)
    twin, x = twin_of(captured, chosen), images(3)
    assert torch.allclose(twin(x)[1], bounded(model, x, chosen), rtol=1e-4, atol=1e-5)

    reached: set[str] = set()  # what depends on a corrected site, by a walk over users
    nodes = {node.name: node for node in captured.module().graph.nodes}
    todo = [nodes[site.node] for site in captured.sites[first:]]
    while todo:
        for user in todo.pop().users:
            if user.op == "call_function" and user.name not in reached:
                reached.add(user.name)
                todo.append(user)
    kinds = ("conv", "linear", "addmm", "norm")
    computed = [node for node in twin.corrected_graphs[0].graph.nodes if node.op == "call_function"]
    heavy = [node.name for node in computed if any(kind in str(node.target) for kind in kinds)]
    wanted = [name for name in nodes if name in reached and any(kind in str(nodes[name].target) for kind in kinds)]
    assert len(heavy) == len(wanted)
    everything = [node for node in nodes.values() if any(kind in str(node.target) for kind in kinds)]
    assert len(heavy) < len(everything)


def test_frontier_is_minimal(pair: tuple[nn.Module, Captured]) -> None:
    """The corrected half takes just the shared tensors that it reads, each once, and none twice by another name."""
    model, captured = pair
    twin = twin_of(captured, bounds(model, captured, len(captured.sites) // 2))
    entrances = [node for node in twin.corrected_graphs[0].graph.nodes if node.op == "placeholder"]
    assert all(node.users for node in entrances)
    assert len({node.name for node in entrances}) == len(entrances) == len(twin.original(images(2))[1])


def test_frontier_of_a_chain_is_one_tensor() -> None:
    """In a plain chain the corrected half reads one tensor: the first corrected activation."""
    model = network("elu")
    captured = capture(model, (3, SIDE, SIDE))
    chosen = bounds(model, captured, 1)
    _, frontier = twin_of(captured, chosen).original(images(2))
    assert len(frontier) == 1
    assert torch.equal(frontier[0], activations(model, images(2))[1])


def test_prefix_gives_the_frontier(pair: tuple[nn.Module, Captured]) -> None:
    """The prefix alone gives the same frontier as the whole original pass."""
    model, captured = pair
    twin, x = twin_of(captured, bounds(model, captured, len(captured.sites) // 2)), images(3)
    for alone, within in zip(twin.prefix()(x), twin.original(x)[1], strict=True):
        assert torch.equal(alone, within)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_left_as_it_came(victim: nn.Module, clean: Data, training: bool, dtype: str) -> None:
    """A fit and a guard change no byte, mode, hook or gradient flag of the module, in train mode neither."""
    model = copy.deepcopy(victim).train(training)
    model.get_submodule("features.0").requires_grad_(False)
    calls: list[int] = []
    model.get_submodule("features.2").register_forward_hook(lambda *_: calls.append(1))

    def state() -> tuple[object, ...]:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            answer = model.hidden(torch.ones(1, 256))  # the whole model in train mode would move its batch norm
        return (
            buffer.getvalue(),
            [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
            [(name, p.requires_grad, p.dtype, p.grad is None, id(p)) for name, p in model.named_parameters()],
            answer.tolist(),
        )

    before = state()
    made = fit(model, clean.images, clean.labels, settings=FitSettings(dtype=dtype))
    made.guard()(clean.images[:4])
    assert state() == before


def test_a_guard_in_bfloat16_leaves_the_captured_program_alone(victim: nn.Module) -> None:
    """Casting one twin changes neither the captured program nor another twin of it."""
    captured = capture(victim, (3, 16, 16))
    clips = {
        site.index: Clip(torch.ones(site.channels), None, axis=site.axis, ndim=site.ndim) for site in captured.sites
    }
    fingerprint, x = captured.fingerprint(), torch.rand(2, 3, 16, 16)
    first = build_twin(captured, clips)
    before = first(x)
    build_twin(captured, clips).to(dtype=torch.bfloat16)
    assert captured.fingerprint() == fingerprint
    assert all(torch.equal(a, b) for a, b in zip(first(x), before, strict=True))
