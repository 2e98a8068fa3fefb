"""Chunks of work on a real Ray."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from deployments.distributed import RayExecutor
from guard.capture import capture
from guard.errors import GuardError
from guard.executors import Local, load_executor
from guard.inversion import Descent, InversionSettings, Problem, Work, invert

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore")]  # Ray's own, in its own code

SETTINGS = InversionSettings(
    patch=Descent(8, 0.1, 1e-3, 0.05), additive=Descent(8, 0.05, 0.1, 0.05), wanted=0.05, images_at_once=12
)


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    """A Ray that lasts as long as this file's tests, and leaves nothing behind."""
    import ray

    interrupt = signal.getsignal(signal.SIGINT)
    loaded = load_executor("ray")
    assert isinstance(loaded, RayExecutor)
    with loaded:
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert loaded.workers >= 1
        yield loaded
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def work() -> Work:
    """A small network of 4 classes and random images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Work(capture(network.eval(), (3, 8, 8)), images, torch.arange(40) % 4, SETTINGS)


def test_as_here(executor: RayExecutor, work: Work) -> None:
    """Ray's triggers are the local ones to the bit, in the order of the problems, and the progress is complete."""
    problems = [
        Problem(kind, t, tuple(s for s in range(4) if s != t)) for kind in ("patch", "additive") for t in range(4)
    ]
    arguments = (work.captured, work.images, work.labels, problems, SETTINGS)
    here, there = invert(*arguments, executor=Local(1)), invert(*arguments, executor=executor)
    assert any(trigger.norm < float("inf") for trigger in here)
    for one, other in zip(here, there, strict=True):
        assert (one.problem, one.norm, one.success) == (other.problem, other.norm, other.success)
        assert torch.equal(one.pattern, other.pattern)
        assert one.mask is other.mask is None or torch.equal(one.mask, other.mask)  # type: ignore[arg-type]


def by_value() -> tuple[Callable[..., int], Callable[..., int]]:
    """Functions that travel as code: Ray's workers cannot import this file."""

    def divide(number: int, by: int, advance: Callable[[int], None]) -> int:
        advance(1)
        return number // by

    def die(number: int, chunk: int, advance: Callable[[int], None]) -> int:
        import os

        os._exit(1)

    return divide, die


def test_errors_come_back(executor: RayExecutor, work: Work) -> None:
    """What a chunk raises is raised here, as it is; steps are counted as chunks finish; the next run still works."""
    steps: list[int] = []
    with pytest.raises(ZeroDivisionError):
        list(executor.run(by_value()[0], 6, [1, 0], steps.append))
    assert sorted(executor.run(by_value()[0], 6, [1, 2, 3], steps.append)) == [(0, 6), (1, 3), (2, 2)]
    assert steps[-3:] == [1, 1, 1]


def test_errors_that_race(executor: RayExecutor) -> None:
    """Chunks that end beside a failure do no harm, time and again (`ray.cancel` aborted the program here)."""
    for _ in range(100):
        with pytest.raises(ZeroDivisionError):
            list(executor.run(by_value()[0], 6, [1, 0, 2, 3], lambda done: None))


def test_a_lost_worker(executor: RayExecutor) -> None:
    """A chunk whose worker dies each time ends in an error of ours that says so."""
    with pytest.raises(GuardError, match="Ray could not finish"):
        list(executor.run(by_value()[1], 0, [1], lambda done: None))


def test_entry_point_options() -> None:
    """GPUs are asked for where the classifier is on one."""
    assert load_executor("ray", gpus=True).workers == 1  # type: ignore[attr-defined]
