"""A Ray that does not come up."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from deployments import local
from deployments.errors import StartFailed


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What becomes of each start, in order; those that happened are taken away."""
    ends: list[Exception | None] = []

    def init(**options: Any) -> None:
        assert (options["address"], options["num_cpus"]) == ("local", 3)
        if (end := ends.pop(0)) is not None:
            raise end

    monkeypatch.setattr(ray, "init", init)
    return ends


def test_a_node_that_does_not_come_up_is_tried_again(starts: list[Exception | None], caplog: Any) -> None:
    starts += [Exception("The current node timed out during startup."), None]
    local.start(3)
    assert starts == []
    assert "trying once more" in caplog.text


@pytest.mark.parametrize(
    ("ends", "left"),
    [([Exception("timed out")] * 2, 0), ([ValueError("no such folder"), None], 1)],
    ids=["twice", "what will not mend itself"],
)
def test_what_stays_so_is_told(starts: list[Exception | None], ends: list[Exception | None], left: int) -> None:
    starts += ends
    with pytest.raises(StartFailed, match=r"Ray could not be started: (timed out|no such folder)"):
        local.start(3)
    assert len(starts) == left
