"""``guard quarantine`` and ``guard explain``, on what a real server keeps of real attacks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import guard
from deployments.events import shelf
from deployments.events.explanation import explain
from deployments.events.pictures import read
from guard.cli import main
from guard.data import Data, as_float
from guard.errors import BadData

PATCH = range(13, 16)


def call(*arguments: str | Path, answer: str | None = None) -> Result:
    """A call in this process, of which no exception but the exit itself may come out."""
    result = CliRunner().invoke(main, [str(one) for one in arguments], input=answer)
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def copy(kept: Path, tmp_path: Path) -> Path:
    """``kept``, to be changed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in kept.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def clean_file(unseen: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clean.npz"
    np.savez(path, x=unseen.images[100:].numpy(), y=unseen.labels[100:].numpy())
    return path


def test_the_server_kept_the_attack(kept: Path) -> None:
    """Nearly all of the 60, and hardly any of the 100."""
    labels = [entry.label for entry in shelf.entries(kept)]
    assert 55 <= labels.count(networks.TARGET) <= 63
    assert len(labels) <= 65


def test_list_says_what_is_there(kept: Path) -> None:
    """As a table, and as JSON, of all or of one class."""
    entries = shelf.entries(kept)
    table = call("quarantine", kept, "list")
    assert table.exit_code == 0
    assert f"{len(entries)} images" in table.stdout
    assert all(entry.file in table.stdout for entry in entries)
    found = json.loads(call("quarantine", kept, "list", "--json", "-").stdout)["images"]
    assert [one["file"] for one in found] == [entry.file for entry in entries]
    assert {"time", "predicted_class", "score", "p_value", "fingerprint"} <= found[0].keys()
    one = json.loads(call("quarantine", kept, "list", "--json", "-", "--class", "nobody").stdout)
    assert one == {"images": []}


def test_list_prints_nothing_that_a_terminal_obeys(copy: Path) -> None:
    """Whoever writes into the folder does not write on the screen."""
    line = next(copy.glob("*.json"))
    line.write_text(json.dumps({**json.loads(line.read_text()), "predicted_class": "\x1b[2Jgone"}))
    output = call("quarantine", copy, "list").stdout
    assert "\x1b" not in output
    assert "?[2Jgone" in output


def test_the_sheet_is_a_picture(kept: Path, tmp_path: Path) -> None:
    """The newest so many, on one PNG."""
    out = tmp_path / "sheet.png"
    result = call("quarantine", kept, "sheet", "--out", out, "--most", "10")
    assert result.exit_code == 0
    assert "10 images" in result.stdout
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800


def test_an_export_is_data_for_the_other_commands(kept: Path, saved: Path, tmp_path: Path) -> None:
    """``guard score`` reads it, and finds the images flagged: 8 bits lose nothing of images that had 8."""
    out = tmp_path / "x.npz"
    result = call("quarantine", kept, "export", "--out", out)
    assert result.exit_code == 0
    entries = shelf.entries(kept)
    with np.load(out) as arrays:
        assert arrays["x"].dtype == np.uint8
        assert arrays["x"].shape == (len(entries), 3, 16, 16)
        assert arrays["y"].tolist() == arrays["label"].tolist() == [entry.label for entry in entries]
        assert arrays["score"].tolist() == [entry.score for entry in entries]
        assert abs(arrays["time"] - time.time()).max() < 3600
    verdict = guard.load(saved)(guard.load_data(str(out)).images)
    assert verdict.flagged.float().mean() > 0.98
    assert verdict.score.numpy() == pytest.approx([entry.score for entry in entries], rel=1e-3, abs=1e-3)


def test_purge_asks_first(copy: Path) -> None:
    """No is no; yes removes both files of each image, and nothing else."""
    (copy / "notes.txt").write_text("mine")
    number = len(shelf.entries(copy))
    refused = call("quarantine", copy, "purge", answer="n\n")
    assert refused.exit_code == 1
    assert len(shelf.entries(copy)) == number
    agreed = call("quarantine", copy, "purge", answer="y\n")
    assert agreed.exit_code == 0
    assert f"{number} images removed" in agreed.stdout
    assert [one.name for one in copy.iterdir()] == ["notes.txt"]


def test_purge_takes_what_is_broken(copy: Path) -> None:
    """An image whose line is lost, and one whose line cannot be read, are images all the same."""
    first, second, *_ = sorted(copy.glob("*.png"))
    for one, line in ((first, None), (second, "{")):
        moved = one.with_name(f"20200101T00000{'01'[line is None]}{one.name[15:]}")
        one.rename(moved)
        one.with_suffix(".json").unlink()
        if line is not None:
            moved.with_suffix(".json").write_text(line)
    number = len(shelf.held(copy))
    assert len(shelf.entries(copy)) == number - 2
    assert f"{number} images removed" in call("quarantine", copy, "purge", "--yes").stdout
    assert list(copy.iterdir()) == []


def test_purge_takes_what_is_old_or_of_a_class(copy: Path) -> None:
    """--older-than and --class together, without asking."""
    facts = {**json.loads(next(copy.glob("*.json")).read_text()), "predicted_class": "old"}
    facts["time"] = "2020-01-01T00:00:00Z"
    stem = shelf.put(copy, b"x", {key: value for key, value in facts.items() if key != "file"}, 1_577_836_800.0)
    number = len(shelf.entries(copy))
    assert "0 images removed" in call("quarantine", copy, "purge", "--yes", "--older-than", "1", "--class", "9x").stdout
    assert "1 images removed" in call("quarantine", copy, "purge", "--yes", "--older-than", "1").stdout
    assert len(shelf.entries(copy)) == number - 1
    assert not (copy / f"{stem}.png").exists()


@pytest.mark.parametrize("command", ["sheet", "export"])
def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path, command: str) -> None:
    """Exit status 2, and a sentence."""
    (tmp_path / "empty").mkdir()
    result = call("quarantine", tmp_path / "empty", command, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no such image" in result.output


def test_explain_finds_the_patch(saved: Path, kept: Path, clean_file: Path, tmp_path: Path) -> None:
    """The planted 3×3 square stands out, by far, and is found to the pixel; a picture and its numbers are written."""
    out = tmp_path / "explained"
    result = call("explain", saved, "--quarantine", kept, "--clean", clean_file, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = json.loads((out / "explain.json").read_text())
    assert found["label"] == networks.TARGET
    assert found["images"]["flagged"] >= 55
    assert found["consistency"]["box"] == [13, 13, 15, 15]
    assert found["consistency"]["largest"] > 20 * found["consistency"]["median"]
    assert found["sites"][0]["flagged"] > found["sites"][0]["clean"]
    with Image.open(out / "explain.png") as picture:
        assert picture.width > 1000
    assert "rows 13 to 15, columns 13 to 15" in result.stdout


def test_the_maps_are_what_they_say(artifact: Any, kept: Path, unseen: Data) -> None:
    """Means and deviations against numpy on all images at once; every pixel of the patch above every other."""
    entries = [entry for entry in shelf.entries(kept) if entry.label == networks.TARGET]
    images = read(kept, entries).images
    found = explain(artifact, images, networks.TARGET, unseen)
    values = images / 255.0
    assert found.flagged_mean == pytest.approx(values.mean(0), abs=1e-6)
    assert found.deviation == pytest.approx(np.sqrt(values.var(0).mean(0)), abs=1e-6)
    own = unseen.images[unseen.labels == networks.TARGET].double().mean(0).numpy() / 255.0
    assert found.class_mean == pytest.approx(own, abs=1e-6)
    patch = np.zeros((16, 16), bool)
    patch[np.ix_(PATCH, PATCH)] = True
    assert found.consistency[patch].min() > found.consistency[~patch].max()
    assert found.peak[0] in PATCH
    assert found.peak[1] in PATCH


def test_site_shares_are_those_of_the_bounds(artifact: Any, kept: Path, unseen: Data) -> None:
    """Against the activations themselves, taken by hooks on the modules of the network: the first ReLU."""
    entries = [entry for entry in shelf.entries(kept) if entry.label == networks.TARGET]
    images = read(kept, entries).images
    found = explain(artifact, images, networks.TARGET, unseen)
    assert found.sites is not None
    site = next(one for one in found.sites if one.site == 0)
    state = artifact.captured.program.state_dict
    network = networks.Digits().eval()
    prefix = "network."
    network.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    upper = artifact.networks[0][0].tensors()["upper"]
    for given, share in ((images, site.flagged), (unseen.images.numpy(), site.clean)):
        first = network.features[:3](as_float(torch.from_numpy(given))).detach()
        assert share == pytest.approx(float((first.amax((2, 3)) > upper).double().mean()), abs=2e-3)


def test_a_method_without_bounds_has_no_sites(kept: Path, unseen: Data) -> None:
    """The maps are there all the same, and the picture says so."""
    from hand import bna_artifact

    from deployments.events.drawing import figure

    small = np.random.default_rng(0).integers(0, 255, (6, 3, 4, 4), np.uint8)
    clean = Data(unseen.images[:30, :, :4, :4], unseen.labels[:30] % 3, None, "crops")
    found = explain(bna_artifact(0), small, 0, clean)
    assert found.sites is None
    assert figure(found).axes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--class", "nobody"), "the model has no class 'nobody'"),
        (("--class", "9"), "has no such image"),
    ],
)
def test_explain_says_what_is_wrong(
    saved: Path, kept: Path, clean_file: Path, tmp_path: Path, change, sentence
) -> None:
    """Exit status 2 and a sentence; nothing is written."""
    result = call("explain", saved, "--quarantine", kept, "--clean", clean_file, "--out", tmp_path / "o", *change)
    assert result.exit_code == 2
    assert sentence in result.output
    assert not (tmp_path / "o").exists()


def test_too_few_images_explain_nothing(artifact: Any, unseen: Data) -> None:
    """Four are too few; a clean set without the class, and images of another shape, are refused too."""
    images = np.zeros((8, 3, 16, 16), np.uint8)
    with pytest.raises(BadData, match="4 flagged images of class 3; expected at least 5"):
        explain(artifact, images[:4], 3, unseen)
    others = unseen.labels != 3
    with pytest.raises(BadData, match="no image of class 3"):
        explain(artifact, images, 3, Data(unseen.images[others], unseen.labels[others], None, ""))
    with pytest.raises(BadData, match="the model takes"):
        explain(artifact, images[:, :, :8], 3, unseen)


def test_images_of_another_network_are_left_out(saved: Path, copy: Path, clean_file: Path, tmp_path: Path) -> None:
    """They may mean another class by the same label."""
    for line in copy.glob("*.json"):
        line.write_text(json.dumps({**json.loads(line.read_text()), "fingerprint": "another"}))
    result = call("explain", saved, "--quarantine", copy, "--clean", clean_file, "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "were flagged for another network" in result.stderr
    assert "no image that was flagged for this network" in result.stderr
