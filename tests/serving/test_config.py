"""Settings check themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config import Live, ServeConfig, checked
from guard.errors import BadSetting


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "artifact"),
        ({"artifact": "a", "mode": "block"}, "mode"),
        ({"artifact": "a", "port": 0}, "port"),
        ({"artifact": "a", "replicas": 0}, "replicas"),
        ({"artifact": "a", "replica": 2}, "replica"),
        ({"artifact": "a", "name": "no/slash"}, "name"),
        ({"artifact": "a", "limits": {"images": 0}}, "limits.images"),
        ({"artifact": "a", "limits": {"pictures": 1}}, "limits.pictures"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name(values: dict[str, object], field: str) -> None:
    """An unknown, missing or impossible setting raises BadSetting, and the error names it."""
    if "artifact" not in values:
        values = {"name": "x"}
    with pytest.raises(BadSetting) as caught:
        checked(ServeConfig, values)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_the_name_defaults_to_the_folder(tmp_path: Path) -> None:
    """Without a name the model is called like the artifact's folder."""
    assert ServeConfig(artifact=tmp_path / "resnet18").name == "resnet18"


def test_the_live_part_is_what_may_switch() -> None:
    """The live settings of a configuration hold its mode, exposure and failure policy, and nothing else."""
    config = ServeConfig(artifact="a", mode="reject", expose_scores=True, on_failure="closed", port=9000)
    assert config.live == Live(mode="reject", expose_scores=True, on_failure="closed")
    assert type(config.live) is Live
