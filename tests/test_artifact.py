"""The artifact: whole or absent, the same after a load, and refused when it is anything else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import guard
from guard.artifact import FORMAT_VERSION, Artifact
from guard.data import Data
from guard.errors import ArtifactDamaged, ArtifactMismatch, BadArtifact

FILES = ("manifest.json", "program.pt2", "tensors.safetensors")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the artifact to damage."""
    return Path(shutil.copytree(saved, tmp_path / "artifact"))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_loaded_guard_gives_the_same_verdicts(artifact: Artifact, saved: Path, unseen: Data) -> None:
    """Every field of every verdict is bit-equal before a save and after a load."""
    images = unseen.images[:64]
    before, after = artifact.guard()(images), guard.load(saved)(images)
    for name, first, second in zip(before._fields, before, after, strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize(("bounds", "dtype"), [("learned", "float32"), ("quantile", "bfloat16")])
def test_other_settings_survive_too(
    victim: nn.Module, clean: Data, unseen: Data, tmp_path: Path, bounds: str, dtype: str
) -> None:
    """Learned bounds and bfloat16 come back bit-equal as well, for the user's own model."""
    learning = guard.LearningSettings(steps=4, refresh=4, ascent_steps=2, surrogates=1)
    settings = guard.FitSettings(bounds=bounds, dtype=dtype, learning=learning, folds=2)
    made = guard.fit(victim, clean.images, clean.labels, settings=settings)
    before = made.guard()(unseen.images[:32])
    after = guard.load(made.save(tmp_path / "a"), model=victim)(unseen.images[:32])
    assert all(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_what_is_in_the_folder(artifact: Artifact, saved: Path, clean: Data) -> None:
    """The folder holds three files, nothing is left beside it, and the manifest names all that the design promises."""
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    manifest = json.loads((saved / "manifest.json").read_text())
    promised = ("format", "format_version", "method", "settings", "fingerprint", "input", "classes", "null")
    assert not [key for key in (*promised, "threshold", "fit", "versions", "created_at") if key not in manifest]
    assert manifest["fit"]["images"] == len(clean)
    assert manifest["fit"]["images_per_class"] == torch.bincount(clean.labels).tolist()
    assert manifest["fingerprint"] == artifact.captured.fingerprint()


def test_it_is_for_one_model(saved: Path, victim: nn.Module) -> None:
    """An artifact loads beside its own model and is refused beside one that differs in a single weight."""
    guard.load(saved, model=victim)
    other = copy.deepcopy(victim)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-6
    with pytest.raises(ArtifactMismatch, match=r"made for another model.*Fit the guard again"):
        guard.load(saved, model=other)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
    ],
    ids=["halved", "emptied", "longer"],
)
def test_truncated(folder: Path, name: str, damage: Callable[[Path], object]) -> None:
    """A file that was cut, emptied or made longer is refused by name."""
    damage(folder / name)
    with pytest.raises(ArtifactDamaged, match=name.replace(".", r"\.")):
        guard.load(folder)


@pytest.mark.parametrize("name", ["program.pt2", "tensors.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_flipped_bit(folder: Path, name: str, place: float) -> None:
    """One bit flipped anywhere in a tensor file is refused by name."""
    path = folder / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactDamaged, match=f"{name}.*altered"):
        guard.load(folder)


@pytest.mark.parametrize("key", ["threshold", "null", "input", "settings", "corrections", "classes"])
def test_altered_manifest(folder: Path, key: str) -> None:
    """A manifest whose values were altered since the fit is refused, not believed."""
    value = json.loads((folder / "manifest.json").read_text())[key]
    value = {**value, next(iter(value)): 0.25} if isinstance(value, dict) else value[1:]
    edit(folder, **{key: value})
    with pytest.raises(BadArtifact):
        guard.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder: Path, name: str) -> None:
    """A folder without one of its files is refused by that file's name."""
    (folder / name).unlink()
    with pytest.raises(BadArtifact, match=name.replace(".", r"\.")):
        guard.load(folder)


@pytest.mark.parametrize("value", [FORMAT_VERSION + 1, 0, "1", None])
def test_other_format_version(folder: Path, value: object) -> None:
    """Another format version is refused with both versions and the remedy."""
    edit(folder, format_version=value)
    with pytest.raises(ArtifactMismatch, match=f"format version {value}; this guard reads version {FORMAT_VERSION}"):
        guard.load(folder)


@pytest.mark.parametrize("text", ['{"format": "safetensors"}', "[]", "3", "null"])
def test_other_kind_of_folder(tmp_path: Path, text: str) -> None:
    """A folder with another manifest, with none, or no folder at all is no artifact."""
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadArtifact, match="no manifest of backdoor-guard"):
        guard.load(tmp_path)
    with pytest.raises(BadArtifact, match=r"has no manifest\.json"):
        guard.load(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"not JSON", b"\xff\xfe", b'{"format": '])
def test_manifest_that_is_no_json(folder: Path, content: bytes) -> None:
    """A manifest that is no JSON is refused as damaged."""
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactDamaged, match="is no JSON"):
        guard.load(folder)


@pytest.mark.parametrize("key", ["threshold", "fingerprint", "files", "corrections"])
def test_manifest_that_lacks_a_key(folder: Path, key: str) -> None:
    """A manifest without a key that loading needs is refused by that key."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactDamaged, match=f"lacks {key}"):
        guard.load(folder)


def test_a_save_that_fails_leaves_nothing(
    artifact: Artifact, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing fails, no folder appears, nothing is left beside it, and an artifact that was there is intact."""
    before = {name: (folder / name).read_bytes() for name in FILES}

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    for target in (tmp_path / "new", folder):
        with pytest.raises(OSError, match="no space left"):
            artifact.save(target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_overwriting(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    """What is there is replaced only where asked, and only where it is an artifact or an empty folder."""
    (folder / "tensors.safetensors").unlink()
    with pytest.raises(BadArtifact, match="exists; choose another folder, or allow overwriting") as caught:
        artifact.save(folder)
    assert caught.value.field == "out"
    artifact.save(folder, overwrite=True)
    guard.load(folder)

    (tmp_path / "empty").mkdir()
    guard.load(artifact.save(tmp_path / "empty", overwrite=True))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("also work")
    for name in ("own", "file"):
        with pytest.raises(BadArtifact, match="is no artifact; it is left alone"):
            artifact.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "own" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "empty", "file", "own"]
    guard.load(artifact.save(tmp_path / "new" / "nested"))
