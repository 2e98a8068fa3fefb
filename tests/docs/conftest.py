"""What a reader of the pages has at hand: a checkout, a network with its weights, images, artifacts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
from pages import ROOT
from PIL import Image
from running import CHECKPOINT, SHARED, Told, made_by, run, steps_of
from safetensors.torch import save_file
from torch import nn

import guard
from guard.artifact import Artifact
from guard.config import BnaSettings, FitSettings
from guard.data import Data

ARTIFACTS = ("mine", "digits", "badnets", "resnet18")
NOT_OF_A_CHECKOUT = {"artifacts", "report", "load", "build", "dist", "sbom"}


@pytest.fixture(scope="session")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    victim: nn.Module,
    clean: Data,
    unseen: Data,
    attacked: Data,
    artifact: Artifact,
) -> Path:
    """A folder that has all that pages take for granted. Do not change it."""
    folder = tmp_path_factory.mktemp("desk")
    source = Path(networks.__file__).read_text()
    (folder / "networks.py").write_text(f"{source}\n\ncifar10 = digits\n")
    for weights in ("weights.safetensors", "ibau-badnets.safetensors"):
        save_file(victim.state_dict(), folder / weights)
    for name, data in (("clean", clean), ("recent", unseen), ("rest", unseen), ("triggered", attacked)):
        np.savez(folder / f"{name}.npz", x=data.images.numpy(), y=data.labels.numpy())
    for name in ARTIFACTS:
        artifact.save(folder / "artifacts" / name)
    settings = FitSettings(bna=BnaSettings(targets=(networks.TARGET,), restarts=1))
    bna = guard.fit(victim, clean.images, clean.labels, method="bna", settings=settings)
    bna.save(folder / "artifacts" / "badnets-bna")
    for number, image in enumerate(attacked.images[:8]):
        _picture(image.numpy(), folder / "suspects" / f"{number}.png")
    _picture(unseen.images[0].numpy(), folder / "image.png")
    return folder


@pytest.fixture(scope="session")
def ran(desk: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """`ran(page)`: what came of the page's steps, run once, each page in a folder of its own."""
    known: dict[str, Told] = {}

    def once(page: str) -> Told:
        if page not in known:
            folder = tmp_path_factory.mktemp("page")
            found = steps_of(page)
            if page == CHECKPOINT:
                for file in ("models/networks.py", "models/ibau-badnets.safetensors", "data/cifar10_lossless.npz"):
                    shutil.copy(SHARED / file, folder)
                shutil.copy(desk / "image.png", folder)
            else:
                _lay_out(desk, kept, folder, made_by(found))
            known[page] = run(found, folder)
        return known[page]

    return once


def _lay_out(desk: Path, kept: Path, folder: Path, made: set[str]) -> None:
    """A checkout with what is on the desk, without what the page itself makes."""
    shutil.copytree(desk, folder, dirs_exist_ok=True)
    shutil.copytree(kept, folder / "flagged", copy_function=shutil.copy2)
    for name in made:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in NOT_OF_A_CHECKOUT and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)


def _picture(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)
