"""One network with a planted backdoor, trained once in seconds, and what is fitted on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from networks import Images
from torch import nn

import guard
from guard.artifact import Artifact
from guard.capture import Captured, capture
from guard.data import Data, as_float

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests want the machine for themselves."""
    for item in items:
        if item.path.stem.endswith("_e2e"):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def digits() -> Images:
    """All images: 1,000 to train on, 250 to fit on, 547 to evaluate on."""
    return networks.digit_images()


@pytest.fixture(scope="session")
def victim(digits: Images) -> nn.Module:
    """The backdoored network, in eval mode. Do not change it."""
    return networks.backdoored(Images(digits.images[:1000], digits.labels[:1000]))


@pytest.fixture(scope="session")
def clean(digits: Images) -> Data:
    """The clean set D: 250 images."""
    return Data(digits.images[1000:1250], digits.labels[1000:1250], None, "digits")


@pytest.fixture(scope="session")
def unseen(digits: Images) -> Data:
    """547 images for evaluation."""
    return Data(digits.images[1250:], digits.labels[1250:], None, "digits")


@pytest.fixture(scope="session")
def attacked(unseen: Data) -> Data:
    """The same with the trigger, and their true classes."""
    return Data(networks.triggered(unseen.images), unseen.labels, None, "triggered digits")


@pytest.fixture(scope="session")
def captured(victim: nn.Module) -> Captured:
    return capture(victim, (3, 16, 16))


@pytest.fixture(scope="session")
def artifact(victim: nn.Module, clean: Data) -> Artifact:
    """A fit with default settings. Do not change it."""
    return guard.fit(victim, clean.images, clean.labels)


@pytest.fixture(scope="session")
def saved(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact on disk. Copy it before you damage it."""
    return artifact.save(tmp_path_factory.mktemp("artifacts") / "digits")


@pytest.fixture(scope="session")
def kept(saved: Path, unseen: Data, attacked: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server of the digits keeps of 100 clean and 60 triggered images, in requests of 20. Do not change it."""
    from prometheus_client import CollectorRegistry

    from deployments.config import ModelConfig
    from deployments.replicas import classifier_for

    folder = tmp_path_factory.mktemp("quarantine") / "digits"
    config = ModelConfig(artifact=saved, quarantine={"folder": folder}, threads=1)
    classifier = classifier_for(config, registry=CollectorRegistry())
    others = attacked.images[attacked.labels != networks.TARGET][:60]
    images = np.concatenate([as_float(unseen.images[:100]).numpy(), as_float(others).numpy()])

    async def ask() -> None:
        await classifier.start()
        for start in range(0, len(images), 20):
            with classifier.visit() as live:
                await classifier.infer(images[start : start + 20], live, None)
        await classifier.close()

    asyncio.run(ask())
    return folder


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Ray without its token file in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield
