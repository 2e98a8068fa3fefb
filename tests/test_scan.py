"""The scan: it accuses who is guilty and nobody else, and says how sure it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from networks import Digits, Images
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn

import guard
from guard.capture import Captured, capture
from guard.cli import main
from guard.cli.trigger_pictures import save_pictures
from guard.data import Data, as_float
from guard.errors import GuardError
from guard.executors import Local
from guard.inversion import Descent, InversionSettings, Problem, Trigger
from guard.scan import (
    FLOOR,
    Entry,
    Scan,
    ScanSettings,
    _without_intrinsic,
    anomaly_scores,
    corroborated,
    detections,
    margin_p_value,
    scan,
)

MODEL = f"{Path(networks.__file__)}:digits"
CLASSES = 6  # of the networks of pairs
QUICK = InversionSettings(restarts=2, patch=Descent(200, 0.1, 1e-3, 0.95), additive=Descent(100, 0.01, 0.3, 0.9))
PATCHES = ScanSettings(kinds=("patch",), inversion=replace(QUICK, patch=Descent(150, 0.1, 1e-3, 0.95)))
SHORT = InversionSettings(restarts=1, patch=Descent(4, 0.1, 1e-3, 0.95), additive=Descent(4, 0.01, 0.3, 0.9))
KEYS = {"backdoored", "targets", "pairs", "scores", "norms", "threshold", "stability", "second_opinion", "seconds", "n"}
KEYS |= {"warnings", "versions", "accuracy", "above_threshold", "settings", "triggers", "memory_bytes"}


@pytest.fixture(scope="module")
def victims_scan(captured: Captured, clean: Data) -> Scan:
    """A scan of the backdoored network, target 0."""
    return scan(captured, clean.images, clean.labels, ScanSettings(inversion=QUICK), executor=Local(1))


@pytest.fixture(scope="module")
def honest(digits: Images) -> Captured:
    """A `Digits` trained on clean images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.train(Digits(), digits.images[:1000].float() / 255.0, digits.labels[:1000], epochs=12)
    return capture(network, (3, 16, 16))


def dotted(images: Tensor) -> Tensor:
    """One white pixel: the trigger of the networks of pairs."""
    stamped = images.clone()
    stamped[:, :, 14, 14] = 1.0
    return stamped


def dotted_network(digits: Images, moved: Callable[[Tensor], Tensor]) -> Captured:
    """Knows the digits 0 to 5; a white pixel sends class c to moved(c)."""
    kept = digits.labels[:1000] < CLASSES
    images, labels = digits.images[:1000][kept].float() / 255.0, digits.labels[:1000][kept]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        noisy = (images + 0.2 * torch.randn(images.shape)).clamp(0, 1)
        network = Digits()
        network.head = nn.Linear(32, CLASSES)
        shown = torch.cat([images, noisy, dotted(images), dotted(images)])
        networks.train(network, shown, torch.cat([labels, labels, moved(labels), moved(labels)]), epochs=20, seed=1)
    return capture(network, (3, 16, 16))


@pytest.fixture(scope="module")
def few_digits(clean: Data) -> Data:
    """The clean set without the classes that these networks do not know."""
    kept = clean.labels < CLASSES
    return Data(clean.images[kept], clean.labels[kept], None, "digits 0 to 5")


def test_the_planted_target_is_found(victims_scan: Scan) -> None:
    """Class 0 and it alone is accused, with the largest patch score by far; every restart and every source agree."""
    assert victims_scan.backdoored
    assert victims_scan.targets == (0,)
    assert victims_scan.pairs == tuple((source, 0) for source in range(1, 10))
    scores = victims_scan.scores["patch"]
    assert scores[0] > 1.5 * victims_scan.settings.threshold
    assert scores[1:].max() < victims_scan.settings.threshold
    assert victims_scan.stability == {0: 1.0}
    assert victims_scan.closest[1:] == ("patch", 0)
    best = victims_scan.triggers[0]
    assert (best.problem.kind, best.problem.target) == ("patch", 0)
    assert best.norm == victims_scan.norms["patch"][0]


def test_the_second_opinion_agrees(victims_scan: Scan) -> None:
    """The margin of the planted class stands out as well."""
    assert victims_scan.opinion.label == 0
    assert victims_scan.opinion.suspicious
    assert victims_scan.agrees


def test_a_clean_network_is_not_accused(honest: Captured, clean: Data) -> None:
    """No class of a network trained on clean images is out of line; the report says what was not looked for."""
    found = scan(honest, clean.images, clean.labels, ScanSettings(inversion=QUICK), executor=Local(1))
    assert not found.backdoored
    assert (found.targets, found.pairs, found.triggers, found.stability) == ((), (), (), {})
    assert found.closest[0] < found.settings.threshold
    assert found.opinion.p_value is None or found.opinion.p_value > 0.05
    assert found.agrees
    assert any("--pairs" in warning for warning in found.warnings)


def works(network: Captured, data: Data, moved: Callable[[Tensor], Tensor]) -> bool:
    """Whether the planted attack does what it should."""
    decided = network.module()(dotted(as_float(data.images))).argmax(1)
    return float((decided == moved(data.labels)).double().mean()) > 0.9


def test_all_to_all_needs_pairs(digits: Images, few_digits: Data) -> None:
    """Where the target depends on the source, pooled sources show nothing; pairs show (c, c + 1) and nothing else."""
    network = dotted_network(digits, lambda labels: (labels + 1) % CLASSES)
    assert works(network, few_digits, lambda labels: (labels + 1) % CLASSES)
    data = few_digits.images, few_digits.labels
    assert not scan(network, *data, PATCHES, executor=Local(1)).backdoored
    found = scan(network, *data, replace(PATCHES, pairs=True), executor=Local(1))
    assert len(found.pairs) >= CLASSES // 2
    assert all(target == (source + 1) % CLASSES for source, target in found.pairs)
    assert set(found.stability) == set(found.pairs)
    figures = found.to_json()
    assert [figures["scores"]["patch"][c][c] for c in range(CLASSES)] == [None] * CLASSES
    assert figures["scores"]["patch"][found.pairs[0][0]][found.pairs[0][1]] > 7
    assert not any("--pairs" in warning for warning in found.warnings)


def test_all_to_one_shows_either_way(digits: Images, few_digits: Data) -> None:
    """Where all sources share a target, pooled sources and pairs lead to it and to no other."""
    network = dotted_network(digits, torch.zeros_like)
    assert works(network, few_digits, torch.zeros_like)
    data = few_digits.images, few_digits.labels
    pooled = scan(network, *data, PATCHES, executor=Local(1))
    found = scan(network, *data, replace(PATCHES, pairs=True), executor=Local(1))
    assert pooled.targets == found.targets == (0,)
    assert {source for source, _ in pooled.pairs} == {1, 2, 3, 4, 5}
    assert found.triggers[0].problem.sources == tuple(source for source, _ in found.pairs)


def slow_scores(norms: list[float], largest: float) -> list[float]:
    """Medians by sorting, one number at a time."""

    def median(values: list[float]) -> float:
        ordered = sorted(values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    strength = [1 / min(norm, largest) for norm in norms]
    centre = median(strength)
    spread = median([abs(value - centre) for value in strength])
    return [(value - centre) / max(spread, FLOOR * centre) for value in strength]


@pytest.mark.parametrize("count", [4, 9, 10, 90])
def test_anomaly_scores(count: int) -> None:
    """Against a slow oracle, some triggers not found; the smallest norm scores highest."""
    norms = np.random.default_rng(count).gamma(4.0, 5.0, count) + 0.5
    norms[1] = np.inf
    scores = anomaly_scores(norms, 256.0)
    assert scores.tolist() == pytest.approx(slow_scores(norms.tolist(), 256.0))
    assert scores.argmax() == norms.argmin()
    wide = np.array([1.0, 9.0, 20.0, 35.0])
    assert anomaly_scores(wide, 256.0).tolist() == pytest.approx(
        ((1 / wide - np.median(1 / wide)) / stats.median_abs_deviation(1 / wide)).tolist()
    )


def test_scores_of_hardly_differing_norms() -> None:
    """Norms that differ by a percent make no outlier, though their MAD is tiny; no trigger found makes none either."""
    assert max(anomaly_scores(np.array([10.0, 10.0, 10.0, 10.01, 9.9]), 256.0)) < 0.2
    assert anomaly_scores(np.full(5, np.inf), 256.0).tolist() == [0.0] * 5
    assert anomaly_scores(np.array([5.0, np.inf, np.inf, np.inf]), 256.0)[0] > 100


def test_corroborated() -> None:
    """The largest of a kind stands alone; one beside it needs every kind."""
    patch, additive = np.array([16.0, 0.0, 5.0, 9.0]), np.array([15.9, 0.6, 8.0, 8.5])
    scores, settings = {"patch": patch, "additive": additive}, ScanSettings()
    assert detections(additive, settings) == [0, 2, 3]
    assert [position for position in range(4) if corroborated(position, scores, settings)] == [0, 3]
    other = {"patch": np.array([1.0, 0.0, 20.0, 0.0]), "additive": np.array([20.0, 0.0, 1.0, 0.0])}
    assert [position for position in range(4) if corroborated(position, other, settings)] == [0, 2]


def test_detections() -> None:
    """Above 7, and among targets above half of the largest."""
    scores = np.array([7.0, 7.1, 40.0, 20.1, 20.0, -50.0])
    assert detections(scores, ScanSettings()) == [2, 3]
    assert detections(scores, ScanSettings(pairs=True)) == [1, 2, 3, 4]
    assert detections(np.array([6.9, 1.0]), ScanSettings()) == []


@pytest.mark.parametrize("together", [1.9, 2.1])
def test_intrinsic_pairs_are_left_out(monkeypatch: pytest.MonkeyPatch, captured: Captured, together: float) -> None:
    """Two sources stay where one trigger of at most twice the larger norm does for both, else the smaller one."""
    entries = [Entry(4, (1,)), Entry(4, (2,)), Entry(5, (3,))]

    def trigger(entry: Entry, norm: float) -> Trigger:
        return Trigger(Problem("patch", *entry), norm, 1.0, torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), 1)

    asked: list[Problem] = []

    def invert(captured: Any, images: Any, labels: Any, problems: list[Problem], *more: Any, **options: Any) -> Any:
        asked.extend(problems)
        return [trigger(Entry(p.target, p.sources), 8.0 * together + p.restart) for p in problems]

    monkeypatch.setattr("guard.scan.invert", invert)
    detected = {index: {"patch": trigger(entry, (3.0, 8.0, 5.0)[index])} for index, entry in enumerate(entries)}
    data: Any = (captured, torch.zeros(1), torch.zeros(1))
    kept, best = _without_intrinsic(*data, entries, detected, ScanSettings(), guard.progress.silent, Local(1))
    assert {(problem.target, problem.sources) for problem in asked} == {(4, (1, 2))}
    assert kept == ([0, 1, 2] if together < 2 else [0, 2])
    assert [one.problem.sources for one in best] == ([(1, 2), (3,)] if together < 2 else [(1,), (3,)])


def test_margin_p_value() -> None:
    """One margin far above the others has a small p-value, one among them does not; uniform on its own null; None where
    there is nothing to fit."""
    generator = np.random.default_rng(0)
    others = generator.gamma(20.0, 0.5, 9)
    far = margin_p_value(np.append(others, 40.0))
    assert far is not None
    assert far < 1e-3
    within = margin_p_value(np.append(others, np.median(others)))
    assert within is not None
    assert within > 0.05
    shape, _, scale = stats.gamma.fit(others, floc=0.0)
    by_hand = 1 - stats.gamma.cdf(14.0, shape, scale=scale) ** 10
    assert margin_p_value(np.append(others, 14.0)) == pytest.approx(by_hand, rel=1e-6)
    assert margin_p_value(np.array([1.0, 2.0, 3.0, -1.0])) is None
    assert margin_p_value(np.array([2.0, 2.0, 2.0, 3.0])) is None
    drawn = [margin_p_value(generator.gamma(20.0, 0.5, 40)) or 0.0 for _ in range(200)]
    assert 0.02 < np.mean(np.array(drawn) < 0.1) < 0.25


def test_the_same_seed_is_the_same_scan(captured: Captured, clean: Data) -> None:
    """All figures but the time, with one thread and with two; another seed gives others."""
    settings = ScanSettings(inversion=replace(SHORT, additive=Descent(12, 0.1, 0.01, 0.05), wanted=0.05), starts=2)

    def figures(seed: int, workers: int) -> dict[str, Any]:
        chosen = replace(settings, inversion=replace(settings.inversion, seed=seed))
        found = scan(captured, clean.images, clean.labels, chosen, executor=Local(workers)).to_json()
        return {**found, "seconds": 0, "memory_bytes": 0, "settings": 0}

    first = figures(0, 1)
    assert any(norm for norm in first["norms"]["additive"])
    assert first == figures(0, 2)
    assert first["norms"] != figures(1, 1)["norms"]


def test_warnings(captured: Captured, clean: Data) -> None:
    """Classes without images and classes with few are named; their scores are still there, of pairs not."""
    chosen = torch.cat([(clean.labels == c).nonzero()[: 5 if c == 2 else 20, 0] for c in range(9)])
    data = clean.images[chosen], clean.labels[chosen]
    found = scan(captured, *data, ScanSettings(inversion=SHORT, starts=1, steps=1))
    assert "1 of 10 classes have no clean image (9)" in found.warnings[0]
    assert "1 classes have fewer than 10" in found.warnings[1]
    assert np.isfinite(found.scores["patch"]).all()
    pairs = ScanSettings(kinds=("additive",), pairs=True, inversion=SHORT, starts=1, steps=1)
    matrix = scan(captured, *data, pairs).scores["additive"]
    assert np.isnan(matrix[9]).all()
    assert np.isfinite(matrix[:9, 9]).all()


def test_three_classes_are_too_few(clean: Data) -> None:
    """With three classes there is nothing to compare with."""
    network = Digits()
    network.head = nn.Linear(32, 3)
    kept = clean.labels < 3
    with pytest.raises(guard.errors.BadModel, match=r"3 classes.*at least 4"):
        scan(capture(network.eval(), (3, 16, 16)), clean.images[kept], clean.labels[kept])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("warp",)}, "kinds"),
        ({"kinds": ("patch", "patch")}, "kinds"),
        ({"threshold": 0}, "threshold"),
        ({"starts": 0}, "starts"),
        ({"min_accuracy": 1.5}, "min_accuracy"),
    ],
)
def test_settings_check_themselves(settings: dict[str, Any], field: str) -> None:
    """A setting out of its range is refused by name."""
    with pytest.raises(guard.errors.BadSetting, match=f"^{field}: "):
        ScanSettings(**settings)


def test_pictures(victims_scan: Scan, captured: Captured, clean: Data, tmp_path: Path) -> None:
    """Scores, each trigger over clean images, and its arrays, which are the trigger's."""
    names = [f"digit {k}" for k in range(10)]
    written = save_pictures(victims_scan, captured, clean.images, clean.labels, names, tmp_path)
    assert {path.name for path in written} >= {"scores.png", "target-0-patch.png", "target-0-patch.npz"}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert len(set(image.convert("L").get_flattened_data())) > 20  # something is drawn
    with np.load(tmp_path / "target-0-patch.npz") as arrays:
        assert set(arrays) == {"mask", "pattern"}
        assert float(arrays["mask"].sum()) == pytest.approx(victims_scan.norms["patch"][0], rel=1e-4)


def call(*arguments: str) -> Result:
    """A call in this process; nothing but an exit may come out."""
    result = CliRunner().invoke(main, ["scan", *arguments])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, victim: nn.Module, clean: Data) -> tuple[str, str]:
    """(weights, clean set) on disk."""
    root = tmp_path_factory.mktemp("scan")
    save_file(victim.state_dict(), root / "weights.safetensors")
    np.savez(root / "clean.npz", x=clean.images.numpy(), y=clean.labels.numpy())
    return str(root / "weights.safetensors"), str(root / "clean.npz")


def test_command_found(files: tuple[str, str], tmp_path: Path) -> None:
    """A backdoor ends with status 1: JSON in a file, words and the next step on standard output, pictures."""
    weights, clean = files
    result = call(
        *(MODEL, "--weights", weights, "--clean", clean, "--kind", "patch", "--restarts", "1", "--device", "cpu"),
        *("--json", str(tmp_path / "scan.json"), "--triggers", str(tmp_path / "drawn")),
    )
    assert result.exit_code == 1, result.output
    figures = json.loads((tmp_path / "scan.json").read_text())
    assert set(figures) == KEYS
    assert (figures["backdoored"], figures["targets"]) == (True, [0])
    assert figures["pairs"] == [[source, 0] for source in range(1, 10)]
    assert len(figures["scores"]["patch"]) == 10
    assert figures["stability"]["detected"] == [{"target": 0, "share_of_restarts": 1.0}]
    for words in ("BACKDOORED towards class 0", "second opinion", "guard fit", "--method bna", "1 of 1"):
        assert words in result.stdout
    assert "estimate 10 triggers" in result.stderr
    assert (tmp_path / "drawn" / "target-0-patch.png").is_file()


def test_command_not_found(files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None found ends with status 0; `--json -` alone is on standard output; without --triggers nothing is written."""
    weights, clean = files
    arguments = (MODEL, "--weights", weights, "--clean", clean, "--kind", "additive", "--restarts", "1")
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, "--json", "-", "--device", "cpu")
    assert list(tmp_path.iterdir()) == []
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["backdoored"], figures["targets"], figures["pairs"]) == (False, [], [])
    assert "warning: " in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--restarts", "0"], "restarts: expected a whole number of at least 1"),
        (["--images-at-once", "1"], "images_at_once: expected"),
        (["--clean", "nowhere.npz"], "there is no file nowhere.npz"),
        (["--min-accuracy", "0.999"], "clean: the model is right on only"),
        (["--mean", "0.5"], "mean: expected 3 values"),
        (["--kind", "warp"], "'warp' is not one of"),
    ],
)
def test_command_refuses(files: tuple[str, str], change: list[str], message: str) -> None:
    """Bad input ends with status 2 and a sentence, before the work begins."""
    weights, clean = files
    result = call(MODEL, "--weights", weights, "--clean", clean, "--device", "cpu", *change)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (MemoryError(), 3), (RuntimeError("CUDA out of memory"), 3), (GuardError("lost"), 3)],
    ids=["Ctrl-C", "memory", "device", "worker"],
)
def test_what_goes_wrong_accuses_nobody(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    """1 says that a backdoor was found: no other end has that status."""

    def failing(*_given: Any, **_more: Any) -> Scan:
        raise error

    monkeypatch.setattr("guard.scan.scan", failing)
    weights, clean = files
    arguments = ["scan", MODEL, "--weights", weights, "--clean", clean, "--device", "cpu"]
    assert CliRunner().invoke(main, arguments).exit_code == status


def test_a_log_that_is_full_accuses_nobody(tmp_path: Path) -> None:
    """Where standard error cannot be written, as in a pipe that nobody reads, the status is that of what went wrong."""
    command = [sys.executable, "-m", "guard", "scan", "nosuch:thing", "--clean", "x.npz"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=full, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 2
