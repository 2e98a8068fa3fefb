"""Settings check themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config import Live, ModelConfig, ServeConfig
from deployments.settings import checked
from guard.errors import BadSetting


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "artifact"),
        ({"artifact": "a", "mode": "block"}, "mode"),
        ({"artifact": "a", "moed": "flag"}, "moed"),
        ({"artifact": "a", "threshold": 1.5}, "threshold"),
        ({"artifact": "a", "threads": 3}, "threads"),
        ({"artifact": "a", "sample": 0.5, "mode": "reject"}, "sample"),
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
        checked(ModelConfig, values)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    """A slip of the pen is answered with the key that was meant."""
    with pytest.raises(BadSetting, match="did you mean max_batch_size"):
        checked(ModelConfig, {"artifact": "a", "max_batchsize": 8})


def test_two_models_of_one_name_are_refused() -> None:
    """Routes and metrics go by the name."""
    with pytest.raises(BadSetting, match="two are named a"):
        checked(ServeConfig, {"models": [{"artifact": "x/a"}, {"artifact": "y/a"}]})


def test_the_name_defaults_to_the_folder(tmp_path: Path) -> None:
    """Without a name the model is called like the artifact's folder."""
    assert ModelConfig(artifact=tmp_path / "resnet18").name == "resnet18"


@pytest.mark.parametrize(
    ("device", "said", "gpus"), [("cpu", None, 0.0), ("cuda", None, 1.0), ("cuda", 0.25, 0.25), ("cpu", 2, 2.0)]
)
def test_a_replica_that_runs_on_a_gpu_reserves_one(device: str, said: float | None, gpus: float) -> None:
    """Else Ray hides it from the process; another share may be said."""
    model = ModelConfig.model_validate({"artifact": "/a", "device": device})
    config = ServeConfig(models=(model,), gpus_per_replica=said)
    assert config.gpus == gpus


def test_the_live_part_is_what_may_switch() -> None:
    """The live settings of a configuration hold its mode, exposure and failure policy, and nothing else."""
    config = ModelConfig(artifact="a", mode="reject", expose_scores=True, on_failure="closed", version="2")
    assert config.live == Live(mode="reject", expose_scores=True, on_failure="closed")
    assert type(config.live) is Live
