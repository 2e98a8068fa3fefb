"""BNA: the closed-form match against the analytic case of the paper, and the whole method on a planted backdoor."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from networks import TARGET, Digits
from torch import Tensor, nn
from torch.nn import functional as F

import guard
from guard.artifact import Artifact
from guard.capture import Captured, capture
from guard.config import BnaSettings, FitSettings
from guard.corrections import Renormalise
from guard.data import Data, as_float
from guard.divergence import soft_histogram, total_variation
from guard.errors import BadData, BadModel, BadSetting, NotConverged
from guard.inversion import Problem, Trigger
from guard.methods.bna import Bench, Stack, choose, correct
from guard.progress import silent
from guard.rules import Disagreement
from guard.scan import Scan, scan
from guard.twin import build_twin
from guard.walk import Walk, channels, correction_sites

D, NODES = 16, 6  # dimensions of an input, nodes of the hidden layer
SIGMA, SIGMA_B = 0.05, 0.04  # deviations of clean and of triggered inputs


class Perceptron(nn.Module):
    """The classifier of paper 2308.09850, Sec. 3: one hidden layer with batch norm and linear activation."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(D, NODES, bias=False), nn.BatchNorm1d(NODES), nn.Linear(NODES, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.norm(self.hidden(images.flatten(1) - 0.5)), 1.0))  # slope 1: the identity


class Gaussian:
    """Class −1 ~ N(−µ, σ²I), class +1 ~ N(µ, σ²I), triggered ~ N(−µ + ε, σ_b²I); input = 0.5 + sample.

    The network decides along µ, and ε moves class −1 across.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mean = 0.06 * torch.randn(D, generator=generator).sign()
        self.shift = 2.5 * self.mean + 0.03 * torch.randn(D, generator=generator)
        self.network = Perceptron().eval()
        weights = torch.randn(NODES, D, generator=generator) + 2.0 * self.mean.sign()
        with torch.no_grad():
            self.network.hidden.weight.copy_(weights)
            self.network.norm.running_mean.copy_(0.1 * torch.randn(NODES, generator=generator))
            self.network.norm.running_var.copy_(0.5 + torch.rand(NODES, generator=generator))
            self.network.norm.weight.copy_(0.5 + torch.rand(NODES, generator=generator))
            self.network.norm.bias.copy_(0.3 * torch.randn(NODES, generator=generator))
            signs = torch.ones(NODES)
            self.network.head.weight.copy_(torch.stack([-signs, signs]))
            between = self.network.norm.bias - self.network.norm.running_mean * self._gain()
            self.network.head.bias.copy_(torch.stack([between.sum(), -between.sum()]))
        self.captured = capture(self.network, (1, 4, 4))

    def _gain(self) -> Tensor:
        norm = self.network.norm
        return norm.weight / (norm.running_var + norm.eps).sqrt()

    def clean(self, n: int, seed: int) -> Tensor:
        """Images of class −1, [n, 1, 4, 4]."""
        noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
        return (0.5 - self.mean + SIGMA * noise).view(n, 1, 4, 4)

    def triggered(self, n: int, seed: int) -> Tensor:
        noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
        return (0.5 - self.mean + self.shift + SIGMA_B * noise).view(n, 1, 4, 4)

    def analytic(self) -> tuple[Tensor, Tensor]:
        """(m*, √v*) of Eq. 2."""
        weights, norm = self.network.hidden.weight.detach(), self.network.norm
        ratio = SIGMA_B / SIGMA
        mean = ratio * norm.running_mean + (ratio - 1.0) * weights @ self.mean + weights @ self.shift
        return mean, ratio * (norm.running_var + norm.eps).sqrt()

    def correction(self, mean: Tensor, deviation: Tensor) -> Renormalise:
        """A batch norm with these statistics, as a correction behind the network's own: a* = (a − μ) / s."""
        norm = self.network.norm
        own = (norm.running_var + norm.eps).sqrt()
        scale = deviation / own
        shift = norm.bias - scale * norm.bias + (mean - norm.running_mean) * norm.weight / own
        wide = torch.full((NODES,), 1e6)
        return Renormalise(shift.detach(), scale.detach(), -wide, wide, axis=1, ndim=2)

    def sia(self, correction: Renormalise, seed: int) -> float:
        (site,) = correction_sites(self.captured)
        twin = build_twin(self.captured, {site.index: correction})
        with torch.inference_mode():
            return float((twin(self.triggered(4000, seed))[1].argmax(1) == 0).double().mean())


@pytest.fixture(scope="module")
def gaussian() -> Gaussian:
    return Gaussian()


def test_the_case_is_a_backdoor(gaussian: Gaussian) -> None:
    """η-erroneous with η < ½, ψ-successful with ψ > ½, σ_b ≤ σ: what Theorem 3.1 asks for."""
    with torch.inference_mode():
        assert (gaussian.network(gaussian.clean(2000, 1)).argmax(1) == 0).double().mean() > 0.9
        assert (gaussian.network(gaussian.triggered(2000, 2)).argmax(1) == 1).double().mean() > 0.9


def test_closed_form_is_equation_2(gaussian: Gaussian) -> None:
    """Matched on samples, the correction is the batch norm whose mean and deviation the paper derives."""
    images = gaussian.clean(20_000, 3)
    labels = torch.zeros(20_000, dtype=torch.long)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    settings = FitSettings(bna=BnaSettings(rows=20_000))
    bench = Bench(gaussian.captured, images, labels, 1, (0,), settings)

    def trigger(clean: Tensor) -> Tensor:  # N(−µ, σ²) → N(−µ + ε, σ_b²)
        return 0.5 - gaussian.mean.view(1, 1, 4, 4) + gaussian.shift.view(1, 1, 4, 4) + SIGMA_B * noise[: len(clean)]

    (site,) = correction_sites(gaussian.captured)
    assert site in gaussian.captured.norms
    found = bench.match(bench.rows, [trigger], 0.0)[site.index].tensors()
    expected = gaussian.correction(*gaussian.analytic()).tensors()
    assert torch.allclose(found["scale"], expected["scale"], rtol=0.03)
    assert torch.allclose(found["mean"], expected["mean"], atol=0.02 * float(expected["mean"].abs().max()) + 0.01)


def test_theorem_3_1(gaussian: Gaussian) -> None:
    """SIA grows as the divergence shrinks: from the poisoned network (α = 1) to the matched one (α = 0)."""
    norm = gaussian.network.norm
    own = norm.running_mean, (norm.running_var + norm.eps).sqrt()
    best = gaussian.analytic()
    (site,) = correction_sites(gaussian.captured)

    def activations(images: Tensor, correction: Renormalise | None) -> Tensor:
        seen = []

        def visit(_: object, value: Tensor) -> Tensor:
            seen.append(channels(site, value if correction is None else correction(value)))
            return value

        with torch.inference_mode():
            Walk(gaussian.captured, [site], visit)(images)
        return seen[0]

    wanted = activations(gaussian.clean(4000, 5), None)
    low, high = wanted.amin(1), wanted.amax(1)
    sia, divergence = [], []
    for alpha in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        mean, deviation = (alpha * a + (1.0 - alpha) * b for a, b in zip(own, best, strict=True))
        correction = gaussian.correction(mean, deviation)
        sia.append(gaussian.sia(correction, 6))
        shares = [
            soft_histogram(v, low, high, 40) for v in (wanted, activations(gaussian.triggered(4000, 7), correction))
        ]
        divergence.append(float(total_variation(*shares).mean()))
    assert sia == sorted(sia)
    assert divergence == sorted(divergence, reverse=True)
    assert sia[0] < 0.1 < 0.9 < sia[-1]
    assert divergence[-1] < 0.1 < 0.5 < divergence[0]


def planted(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, 13:16, 13:16] = 1.0
    return images


def estimated(kind: str, *, restart: int, at: int) -> Trigger:
    """A trigger near the planted one: a part of its square, or a brightening of it."""
    mask, pattern = torch.zeros(1, 16, 16), torch.zeros(3, 16, 16)
    mask[:, at : at + 2, 13:16] = 1.0
    pattern[:, at : at + 2, 13:16] = 1.0 if kind == "patch" else 0.7
    problem = Problem(kind, TARGET, tuple(range(1, 10)), restart)
    return Trigger(problem, 6.0, 0.9, mask if kind == "patch" else None, pattern, 1)


@pytest.fixture(scope="module")
def triggers() -> list[Trigger]:
    return [estimated(kind, restart=at - 13, at=at) for kind in ("patch", "additive") for at in (13, 14)]


SOURCES = tuple(range(1, 10))


@pytest.mark.parametrize("refine", ["closed", "tv"])
def test_correct(
    captured: Captured, clean: Data, unseen: Data, triggers: list[Trigger], victim: nn.Module, refine: str
) -> None:
    """From triggers that only resemble the planted one, the corrected network gives triggered images their class."""
    settings = FitSettings(bna=BnaSettings(refine=refine, epochs=4))
    corrections, facts = correct(captured, clean.images, clean.labels, TARGET, SOURCES, triggers, settings, silent)
    assert list(corrections) == [site.index for site in correction_sites(captured)]
    twin = build_twin(captured, corrections)
    rows = unseen.labels != TARGET
    images, labels = as_float(unseen.images[rows]), unseen.labels[rows]
    with torch.inference_mode():
        before, after = (logits.argmax(1) for logits in twin(planted(images)))
        original, corrected = (logits.argmax(1) for logits in twin(images))
    assert (before == TARGET).double().mean() > 0.9
    assert (after == TARGET).double().mean() < 0.2
    assert (after == labels).double().mean() > 0.6
    assert (original == corrected).double().mean() > 0.9
    assert facts["fpr_target"] <= settings.bna.max_fpr_target
    allowed = [t for t in facts["trials"] if t["fpr_target"] <= settings.bna.max_fpr_target]
    assert facts["quantile"] == choose(allowed, 2 * (len(clean.labels[clean.labels != TARGET]) // 2))["quantile"]
    if refine == "tv":
        history = facts["descent"]["history"]
        assert len(history) == 4
        assert history[-1] < history[0]


def test_choose() -> None:
    """Among clips within one standard error of the best the tightest; with many images the best itself."""
    trials = [
        {"quantile": quantile, "sia": sia, "asr": asr}
        for quantile, sia, asr in ((0.0, 0.5, 0.4), (0.01, 0.78, 0.06), (0.02, 0.78, 0.05), (0.03, 0.76, 0.05))
    ]
    assert choose(trials, 400)["quantile"] == 0.03  # the error is √((0.83 − 0.73²) / 400) = 0.027, the gap 0.02
    assert choose(trials, 900)["quantile"] == 0.02  # 0.018
    assert choose(trials[:1], 10) == trials[0]


def test_clean_statistics(captured: Captured, clean: Data, triggers: list[Trigger]) -> None:
    """Matched on images without any trigger, nothing is moved, and what a quantile clips is that tail."""
    settings = FitSettings(bna=BnaSettings(quantiles=(0.0, 0.04)))
    bench = Bench(captured, clean.images, clean.labels, TARGET, SOURCES, settings)
    corrections = bench.match(bench.rows, [lambda images: images], 0.0)
    for site in correction_sites(captured):
        found = corrections[site.index].tensors()
        assert torch.allclose(found["scale"], torch.ones(site.channels), atol=1e-3)
        assert torch.allclose(found["mean"], torch.zeros(site.channels), atol=1e-3)
    seen: dict[int, Tensor] = {}

    def visit(site: object, value: Tensor) -> Tensor:
        seen[site.index] = channels(site, value)
        return value

    with torch.inference_mode():
        Walk(captured, correction_sites(captured), visit)(as_float(clean.images[bench.rows]))
    clipped = bench.match(bench.rows, [lambda images: images], 0.04)
    site = captured.norms[0]
    upper = clipped[site.index].tensors()["upper"]
    beyond = (seen[site.index] > upper[:, None]).double().mean(1)
    assert (beyond - 0.04).abs().max() < 0.01
    assert set(bench.even.tolist()).isdisjoint(bench.odd.tolist())
    assert (clean.labels[bench.rows] != TARGET).all()


def test_stack(triggers: list[Trigger]) -> None:
    """All triggers lie on one image, the later over the earlier."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    stacked = Stack(triggers)(images)
    assert torch.equal(stacked, triggers[3](triggers[2](triggers[1](triggers[0](images)))))
    assert (stacked[:, :, 13:16, 13:16] == 1.0).all()


@pytest.fixture(scope="module")
def bna(victim: nn.Module, clean: Data) -> Artifact:
    """A fit with the scan's result given."""
    settings = FitSettings(bna=BnaSettings(targets=(TARGET,), restarts=1))
    return guard.fit(victim, clean.images, clean.labels, method="bna", settings=settings)


def test_fit(bna: Artifact, unseen: Data, attacked: Data) -> None:
    """With triggers that were estimated on the clean set the attack fails, and clean images keep their answer."""
    figures = guard.evaluate(bna.guard(), unseen, attacked, TARGET).figures
    assert figures["original"]["asr"] > 0.9
    assert figures["guarded"]["asr"] < 0.15
    assert figures["guarded"]["pacc"] > 0.6
    assert figures["original"]["acc"] - figures["guarded"]["acc"] <= 0.015
    assert figures["detection"]["fpr"] < 0.025
    assert figures["detection"]["nominal_fpr"] is None
    assert figures["n"]["sent_to_target"] > 30
    assert bna.manifest["targets"] == [TARGET]
    assert json.loads(json.dumps(bna.manifest, allow_nan=False)) == bna.manifest


def test_only_suspects_take_the_second_pass(bna: Artifact, unseen: Data, attacked: Data) -> None:
    """Images decided as other classes keep their logits to the bit; the others' are those of the network alone."""
    loaded = bna.guard()
    images = as_float(torch.cat([unseen.images[:40], attacked.images[:40]]))
    logits, frontier = loaded.original(images)
    suspects = loaded.suspects(logits)
    assert torch.equal(suspects, logits.argmax(1) == TARGET)
    assert 0 < suspects.sum() < len(images)
    corrected = loaded.corrected(logits, frontier)
    assert torch.equal(corrected[~suspects], logits[~suspects])
    whole = loaded.twin(images)[1]
    assert torch.allclose(corrected[suspects], whole[suspects], atol=1e-4)
    verdict = loaded.verdict(logits, corrected)
    assert verdict.p_value is None
    assert torch.equal(verdict.flagged, (corrected.argmax(1) != verdict.label))
    assert torch.equal(verdict.flagged, verdict.score > 0)
    assert torch.equal(verdict.corrected_label, corrected.argmax(1))
    assert not verdict.flagged[~suspects].any()


def test_a_row_that_is_not_finite_is_flagged(bna: Artifact) -> None:
    """What cannot be compared cannot be trusted."""
    logits = torch.zeros(2, 10)
    logits[:, TARGET] = 5.0
    corrected = logits.clone()
    corrected[1, 3] = float("nan")
    verdict = bna.guard().verdict(logits, corrected)
    assert verdict.flagged.tolist() == [False, True]
    assert verdict.score[1] == float("inf")


def test_save_and_load(bna: Artifact, attacked: Data, tmp_path: Path) -> None:
    """The artifact on disk gives the same verdicts."""
    loaded = guard.load(bna.save(tmp_path / "bna"))
    expected, found = bna.guard()(attacked.images[:50]), loaded(attacked.images[:50])
    assert loaded.threshold is None
    assert loaded.method == "bna"
    assert found.flagged.any()
    for name in ("logits", "label", "corrected_label", "flagged"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.allclose(found.corrected_logits, expected.corrected_logits, atol=1e-4)


def test_nothing_detected(
    victim: nn.Module, clean: Data, attacked: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a scan finds nothing there is no corrected network: the artifact says so, and nothing is ever flagged."""

    class Nothing(Scan):
        def __init__(self) -> None: ...

        targets = pairs = warnings = ()
        above: ClassVar = []

        def to_json(self) -> dict[str, object]:
            return {"backdoored": False}

    monkeypatch.setattr("guard.methods.bna.scan", lambda *_, **__: Nothing())
    made = guard.fit(victim, clean.images, clean.labels, method="bna")
    assert any("found no backdoor" in warning for warning in made.manifest["warnings"])
    loaded = guard.load(made.save(tmp_path / "none"))
    assert loaded.twin.networks == 0
    images = as_float(attacked.images[:9])
    assert loaded.twin.original(images)[1] == ()
    logits, shared = loaded.original(images)
    verdict = loaded.verdict(logits, loaded.corrected(logits, shared))
    assert not verdict.flagged.any()
    assert torch.equal(verdict.corrected_logits, logits)


def test_two_targets(victim: nn.Module, clean: Data, unseen: Data) -> None:
    """Two detected targets are two corrected networks in one graph; each image takes its own."""
    captured = capture(victim, (3, 16, 16))
    wide = {site.index: torch.full((site.channels,), 1e6) for site in captured.norms}
    networks = []
    for factor in (1.0, 2.0):
        networks.append(
            {
                site.index: Renormalise(
                    torch.zeros(site.channels),
                    torch.full((site.channels,), factor),
                    -wide[site.index],
                    wide[site.index],
                    axis=1,
                    ndim=site.ndim,
                )
                for site in captured.norms
            }
        )
    twin = build_twin(captured, *networks)
    rule = Disagreement((3, 7))
    manifest = {"input": captured.spec.to_json(), "classes": list("0123456789"), "method": "bna"}
    manifest |= {"fingerprint": "", "created_at": ""}
    both = guard.Guard(twin, rule, manifest, dtype="float32", device="cpu")
    images = as_float(unseen.images[:200])
    logits, frontier = both.original(images)
    corrected = both.corrected(logits, frontier)
    label = logits.argmax(1)
    assert {3, 7} <= set(label.tolist())
    assert torch.allclose(corrected[label == 3], logits[label == 3], atol=1e-4)
    with torch.inference_mode():
        second = build_twin(captured, networks[1])(images)[1]
    assert torch.allclose(corrected[label == 7], second[label == 7], atol=1e-4)
    assert not torch.allclose(corrected[label == 7], logits[label == 7], atol=1e-2)
    other = (label != 3) & (label != 7)
    assert torch.equal(corrected[other], logits[other])


class PreActivation(nn.Module):
    """Two residual blocks whose trunk no batch norm touches but the last; images [N, 3, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def test_sites() -> None:
    """Every batch norm, the last of a pre-activation network too, and activations that no batch norm feeds."""
    labels = [site.label for site in correction_sites(capture(PreActivation().eval(), (3, 16, 16)))]
    assert labels == ["norms.0:batch_norm", "norms.1:batch_norm", "last:batch_norm"]
    digits = [site.label.split(":")[1] for site in correction_sites(capture(Digits().eval(), (3, 16, 16)))]
    assert digits == ["batch_norm", "batch_norm", "relu"]


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"targets": (10,)}, "targets", "from 0 to 9, got 10"),
        ({"refine": "l2"}, "refine", "tv, js, kl, closed"),
        ({"quantiles": ()}, "quantiles", "below 0.5"),
        ({"quantiles": (0.6,)}, "quantiles", "below 0.5"),
        ({"quantiles": ("a",)}, "quantiles", "below 0.5"),
        ({"quantiles": 0.1}, "quantiles", "below 0.5"),
        ({"restarts": 0}, "restarts", "at least 1"),
        ({"max_fpr_target": 1.5}, "max_fpr_target", "between 0 and 1"),
    ],
)
def test_bad_settings(victim: nn.Module, clean: Data, options: dict[str, object], field: str, says: str) -> None:
    """Each is refused by name, before anything long begins."""
    with pytest.raises(BadSetting, match=says) as caught:
        guard.fit(victim, clean.images, clean.labels, method="bna", settings=FitSettings(bna=BnaSettings(**options)))
    assert caught.value.field == field


def test_too_few_images_of_sources(victim: nn.Module, clean: Data) -> None:
    """One image to match on is refused by name."""
    rows = torch.cat([(clean.labels == TARGET).nonzero()[:20, 0], (clean.labels == 1).nonzero()[:1, 0]])
    settings = FitSettings(min_accuracy=0.01, bna=BnaSettings(targets=(TARGET,), restarts=1))
    with pytest.raises(BadData, match="1 images of classes that go to class 0 are too few"):
        guard.fit(victim, clean.images[rows], clean.labels[rows], method="bna", settings=settings)


def test_a_target_that_no_trigger_reaches(clean: Data, victim: nn.Module) -> None:
    """Nothing to match on is said, not matched."""
    network = copy.deepcopy(victim)
    with torch.no_grad():
        network.head.weight[5], network.head.bias[5] = 0.0, -1e4
    settings = FitSettings(bna=BnaSettings(targets=(5,), restarts=1))
    with pytest.raises(NotConverged, match="no trigger was found that sends half"):
        guard.fit(network, clean.images, clean.labels, method="bna", settings=settings)


class Rounded(nn.Module):
    """The same answers to uint8 images, but no gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(torch.round(images * 255.0) / 255.0)


def test_a_network_without_gradient_is_refused(victim: nn.Module, clean: Data) -> None:
    """Rounding in forward hides triggers from every descent: that is said, rather than that there is none."""
    network = Rounded(victim).eval()
    with pytest.raises(BadModel, match="no gradient towards the image"):
        scan(capture(network, (3, 16, 16)), clean.images, clean.labels)
    with pytest.raises(BadModel, match="no gradient towards the image"):
        guard.fit(
            network, clean.images, clean.labels, method="bna", settings=FitSettings(bna=BnaSettings(targets=(0,)))
        )


def test_a_descent_that_breaks_the_limit_is_taken_back(
    captured: Captured, clean: Data, triggers: list[Trigger]
) -> None:
    """What is served never sends more clean images elsewhere than allowed, whatever the descent does."""
    settings = FitSettings(bna=BnaSettings(epochs=6, learning_rate=5.0))
    corrections, facts = correct(captured, clean.images, clean.labels, TARGET, SOURCES, triggers, settings, silent)
    assert not facts["descent"]["kept"]
    assert facts["descent"]["fpr_target"] > settings.bna.max_fpr_target >= facts["fpr_target"]
    closed, _ = correct(
        captured,
        clean.images,
        clean.labels,
        TARGET,
        SOURCES,
        triggers,
        FitSettings(bna=BnaSettings(refine="closed")),
        silent,
    )
    for index, correction in corrections.items():
        assert torch.allclose(correction.tensors()["upper"], closed[index].tensors()["upper"], atol=0.2)


def test_a_constant_channel(victim: nn.Module, clean: Data, triggers: list[Trigger]) -> None:
    """A channel stuck at a large value, which anybody can plant, does not stop the fit."""
    network = copy.deepcopy(victim)
    with torch.no_grad():
        norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        norm.weight[0], norm.bias[0] = 0.0, 1e5
    bench = Bench(capture(network, (3, 16, 16)), clean.images, clean.labels, TARGET, SOURCES, FitSettings())
    for correction in bench.match(bench.rows, triggers, 0.01).values():
        assert all(tensor.isfinite().all() for tensor in correction.tensors().values())


def test_inside_inference_mode(victim: nn.Module, clean: Data) -> None:
    """A caller's inference mode does not reach the descents."""
    with torch.inference_mode():
        settings = FitSettings(bna=BnaSettings(targets=(TARGET,), restarts=1, epochs=1, quantiles=(0.01,)))
        made = guard.fit(victim, clean.images, clean.labels, method="bna", settings=settings)
    assert made.manifest["targets"] == [TARGET]


@pytest.mark.parametrize("targets", [(), 8, (0.0,), (True,), (3, 3), "3"])
def test_targets_that_are_none(targets: object) -> None:
    with pytest.raises(BadSetting, match="different class indices"):
        BnaSettings(targets=targets)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": [3]},
        {"targets": [True]},
        {"targets": []},
        {"targets": ""},
        {"targets": [TARGET, TARGET]},
        {"threshold": {"p_value": 0.1}},
        {"null": {}},
    ],
)
def test_a_rule_that_contradicts_the_fit(bna: Artifact, change: dict[str, object]) -> None:
    """A manifest whose rule would look elsewhere than the fit did makes no rule."""
    with pytest.raises((ValueError, TypeError)):
        Disagreement.from_manifest({**bna.manifest, **change})


@pytest.mark.parametrize(("name", "value"), [("scale", -1.0), ("scale", 1e-42), ("lower", 1e9)])
def test_a_correction_that_is_none(captured: Captured, name: str, value: float) -> None:
    site = captured.norms[0]
    one = torch.ones(site.channels)
    tensors = {"mean": 0.0 * one, "scale": one, "lower": -one, "upper": one}
    Renormalise.from_tensors(tensors, site)
    with pytest.raises(ValueError, match=r"scale|lower"):
        Renormalise.from_tensors({**tensors, name: value * one}, site)
