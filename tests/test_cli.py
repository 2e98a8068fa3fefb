"""The command line, from a network on disk to scores on disk."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import networks
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import guard
from guard.cli import main
from guard.data import Data

MODEL = f"{Path(networks.__file__)}:digits"


class Files(NamedTuple):
    """What a user has on disk."""

    root: Path
    weights: str
    clean: str
    unseen: str
    attacked: str


def write(path: Path, data: Data) -> str:
    np.savez(path, x=data.images.numpy(), y=data.labels.numpy())
    return str(path)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, victim: nn.Module, clean: Data, unseen: Data, attacked: Data
) -> Files:
    root = tmp_path_factory.mktemp("cli")
    save_file(victim.state_dict(), root / "weights.safetensors")
    (root / "names.txt").write_text("\n".join(f"digit {k}" for k in range(10)) + "\n")
    (root / "bytes.txt").write_bytes(b"\xff\xfe\x00digit")
    data = (write(root / f"{name}.npz", d) for name, d in (("clean", clean), ("unseen", unseen), ("hit", attacked)))
    return Files(root, str(root / "weights.safetensors"), *data)


def call(*arguments: str) -> Result:
    """A call in this process. Whatever happens, no exception but the exit itself may come out."""
    result = CliRunner().invoke(main, list(arguments))
    if not isinstance(result.exception, SystemExit | None):
        pytest.fail(f"{type(result.exception).__name__} came out: {str(result.exception)[:200]}", pytrace=False)
    assert "Traceback" not in result.output
    return result


def fit(files: Files, out: Path, *more: str) -> Result:
    return call("fit", MODEL, "--weights", files.weights, "--clean", files.clean, "--out", str(out), *more)


@pytest.fixture(scope="module")
def made(files: Files) -> Path:
    out = files.root / "artifact"
    result = fit(files, out, "--classes", str(files.root / "names.txt"), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "accuracy there" in result.stdout
    assert str(out) in result.stdout
    assert "cross-fit" in result.stderr
    return out


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, from another working directory."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "guard", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_the_whole_way_in_processes_of_their_own(files: Files, tmp_path: Path) -> None:
    """`python -m guard` fits, with JSON alone on standard output, progress on standard error, and exit status 0."""
    out = tmp_path / "artifact"
    command = ["fit", MODEL, "--weights", files.weights, "--clean", files.clean, "--out", str(out), "--device", "cpu"]
    done = process(*command, "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fit"]["images"] == 250
    assert "observe 250 images" in done.stderr
    assert "Warning" not in done.stderr
    guard.load(out)
    again = process(*command, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"guard: out: {out} exists; choose another folder, or give --overwrite.\n"


def test_inspect(made: Path) -> None:
    """`inspect` tells people what the manifest tells programs."""
    manifest = json.loads(call("inspect", str(made), "--json", "-").stdout)
    assert manifest == json.loads((made / "manifest.json").read_text())
    assert manifest["classes"] == [f"digit {k}" for k in range(10)]
    text = call("inspect", str(made)).stdout
    for part in (manifest["fingerprint"][:16], "3×16×16", "250 images", "p < 0.005", "exponential"):
        assert part in text


def test_evaluate(files: Files, made: Path) -> None:
    """`evaluate --json -` prints the library's own figures and nothing else; its plots are PNG images."""
    plots = files.root / "plots"
    result = call(
        *("evaluate", str(made), "--clean", files.unseen, "--triggered", files.attacked, "--target", "0"),
        *("--plots", str(plots), "--json", "-", "--device", "cpu"),
    )
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    expected = guard.evaluate(guard.load(made), *map(guard.load_data, (files.unseen, files.attacked)), 0).figures
    assert {**figures, "seconds": 0} == {**expected, "seconds": 0}
    assert "run 547 clean images" in result.stderr
    assert sorted(path.name for path in plots.iterdir()) == ["p_values.png", "roc.png", "scores.png"]
    for path in plots.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(set(image.convert("L").get_flattened_data())) > 20  # something is drawn
    assert call("evaluate", str(made), "--clean", files.unseen).stdout.count("–") >= 6


def test_evaluate_writes_json(files: Files, made: Path, tmp_path: Path) -> None:
    """`--json FILE` writes the figures there, and the table for people goes to standard output."""
    path = tmp_path / "figures.json"
    result = call("evaluate", str(made), "--clean", files.unseen, "--json", str(path))
    accuracy = json.loads(path.read_text())["original"]["acc"]
    assert f"{accuracy:.1%}" in result.stdout


def test_score(files: Files, made: Path, tmp_path: Path) -> None:
    """`score` writes one row an image with the guard's own verdict, and nothing else beside it."""
    out = tmp_path / "scores.csv"
    result = call("score", str(made), files.attacked, "--out", str(out))
    assert result.exit_code == 0
    verdict = guard.load(made)(guard.load_data(files.attacked).images)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "label", "corrected_label", "score", "p_value", "flagged"]
    assert [int(row["index"]) for row in rows] == list(range(547))
    for name in ("label", "corrected_label", "flagged"):
        assert [int(row[name]) for row in rows] == getattr(verdict, name).int().tolist()
    for name in ("score", "p_value"):
        assert np.allclose([float(row[name]) for row in rows], getattr(verdict, name), rtol=1e-4, atol=1e-4)
    assert f"{int(verdict.flagged.sum())} of 547 images flagged" in result.stdout
    assert list(tmp_path.iterdir()) == [out]


def test_score_of_a_folder(files: Files, made: Path, tmp_path: Path) -> None:
    """Images as people find them, without classes: the same verdicts, by the names of their files."""
    folder, out = tmp_path / "suspects", tmp_path / "scores.csv"
    folder.mkdir()
    images = guard.load_data(files.attacked).images[:5]
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("found on Monday")
    assert call("score", str(made), str(folder), "--out", str(out)).exit_code == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{number}.png" for number in range(5)]
    assert [int(row["flagged"]) for row in rows] == guard.load(made)(images).flagged.int().tolist()


def test_fit_options(files: Files, tmp_path: Path) -> None:
    """Every option of `fit` reaches the manifest."""
    result = fit(
        *(files, tmp_path / "a", "--fpr", "0.02", "--null", "pareto", "--start", "0.5", "--dtype", "bfloat16"),
        *("--per-class", "15", "--seed", "4", "--min-accuracy", "0.5", "--mean", "0,0,0", "--std", "1,1,1"),
        *("--json", str(tmp_path / "fit.json")),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "fit.json").read_text())
    assert manifest["fit"]["images_per_class"] == [15] * 10
    assert (manifest["input"]["mean"], manifest["input"]["std"]) == ([0, 0, 0], [1, 1, 1])
    wanted = {"fpr": 0.02, "null": "pareto", "start": 0.5, "dtype": "bfloat16", "seed": 4, "min_accuracy": 0.5}
    assert {key: manifest["settings"][key] for key in wanted} == wanted
    assert manifest["threshold"]["p_value"] == 0.02
    assert fit(files, tmp_path / "a", "--overwrite", "--per-class", "5").exit_code == 0
    assert "warning: 50 clean images are few" in fit(files, tmp_path / "b", "--per-class", "5").stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fpr", "2"], "fpr: expected a number between 0 and 0.5"),
        (["--fpr", "x"], "--fpr"),
        (["--mean", "a,b,c"], "expected numbers separated by commas"),
        (["--mean", "0.5,0.5", "--std", "1,1"], "mean: expected 3 values"),
        (["--mean", "0,0,0"], "std: expected 3 values"),
        (["--classes", "{0}/absent.txt"], "--classes"),
        (["--classes", "{0}/weights.safetensors"], "classes"),
        (["--classes", "{0}/bytes.txt"], "classes"),
        (["--bounds", "loose"], "--bounds"),
        (["--null", "cauchy"], "Invalid value for '--null'"),
        (["--null", "conformal", "--per-class", "10"], "fpr: 100 clean images support no conformal p-value"),
        (["--start", "1"], "start: expected a share"),
        (["--dtype", "float8"], "--dtype"),
        (["--per-class", "0"], "--per-class"),
        (["--per-class", "1"], "clean: 10 images are too few"),
        (["--min-accuracy", "3"], "min_accuracy: expected"),
        (["--seed", "-1"], "seed: expected"),
        (["--seed", "99999999999999999999999"], "seed: expected"),
        (["--size", "16"], "expected HEIGHT,WIDTH"),
        (["--size", "0,16"], "expected HEIGHT,WIDTH"),
        (["--size", "inf,3"], "expected HEIGHT,WIDTH"),
        (["--size", "nan,3"], "expected HEIGHT,WIDTH"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--method", "magic"], "Invalid value for '--method'"),
        (["--weights", "{0}/absent"], "weights: there is no file"),
        (["--clean", "{0}/absent"], "data: "),
        (["--out", "{0}/clean.npz"], "exists"),
        (["--out", "{0}/clean.npz", "--overwrite"], "is no artifact; it is left alone"),
        (["--out", "{0}/clean.npz/inside"], "clean.npz"),
        (["--json", "{0}/absent/fit.json"], "--json"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_fit(files: Files, tmp_path: Path, options: list[str], says: str) -> None:
    """A bad option of `fit` ends with status 2 and a sentence that names it, and writes no artifact."""
    out = tmp_path / "artifact"
    result = fit(files, out, *(option.format(files.root) for option in options))
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "{0}/artifact"], "--clean"),
        (["evaluate", "{0}/absent", "--clean", "{0}/unseen.npz"], "has no manifest.json"),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--target", "0"], "--target goes with --triggered"),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--triggered", "{0}/hit.npz"], "target: "),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--triggered", "{0}/hit.npz", "--target", "x"],
         "expected a class index or all2all"),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--triggered", "{0}/hit.npz", "--target", "10"],
         "from 0 to 9, got 10"),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--plots", "{0}/hit.npz"], "--plots"),
        (["evaluate", "{0}/artifact", "--clean", "{0}/unseen.npz", "--json", "{0}/absent/f.json"], "--json"),
        (["score", "{0}/artifact", "{0}/unseen.npz"], "--out"),
        (["score", "{0}/artifact", "{0}/unseen.npz", "--out", "{0}/absent/scores.csv"], "--out"),
        (["score", "{0}/artifact", "{0}/unseen.npz", "--out", "{0}"], "--out"),
        (["score", "{0}/artifact", "{0}/names.txt", "--out", "{0}/scores.csv"], "data: "),
        (["inspect", "{0}"], "no manifest.json"),
        (["inspect"], "DIR"),
        (["divine"], "divine"),
    ],
)  # fmt: skip
def test_bad_arguments(files: Files, made: Path, arguments: list[str], says: str) -> None:
    """Any other command ends its bad input with status 2 and a sentence that names it."""
    result = call(*(argument.format(files.root) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert not (files.root / "scores.csv").exists()


def test_help_and_version() -> None:
    """Help names every command of this package; the version is the package's."""
    shown = call("--help").stdout
    assert all(name in shown for name in ("fit", "evaluate", "score", "inspect"))
    assert guard.__version__ in call("--version").stdout
