"""The configuration file: what it says, what it refuses, and that Ray Serve reads the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hand import bna_artifact

import guard
from deployments.config import SWITCHABLE, ModelConfig, ServeConfig
from deployments.document import Document, check_with_serve, read
from deployments.serve import _checked, serve
from deployments.settings import checked
from guard.errors import BadInput, BadSetting

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # Ray's own use of pydantic


@pytest.fixture
def write(tmp_path: Path):
    """A file with these ``args`` for the guard and these keys beside its applications."""

    def to_file(args: dict[str, Any], **beside: Any) -> Path:
        guard = {"name": "guard", "import_path": "deployments.app:build", "args": args}
        metrics = {"name": "guard-metrics", "import_path": "deployments.app:build_metrics", "route_prefix": "/metrics"}
        path = tmp_path / "guard.yaml"
        path.write_text(yaml.safe_dump({"applications": [guard, metrics], **beside}))
        return path

    return to_file


def test_a_file_says_what_is_served(write, tmp_path: Path) -> None:
    """Several models, each with its settings; a relative artifact is taken from the file's folder."""
    args = {"models": [{"artifact": "a", "mode": "reject"}, {"artifact": "/b/c", "name": "d"}], "replicas": 2}
    found = read(write(args, http_options={"port": 9000}), {})
    assert found.http_options.port == 9000
    assert found.guard == ServeConfig(
        models=(
            ModelConfig(artifact=tmp_path / "a", name="a", mode="reject"),
            ModelConfig(artifact=Path("/b/c"), name="d"),
        ),
        replicas=2,
    )


def test_the_environment_overrides_the_file(write) -> None:
    """A word for every model, a word for one, one for the server, and the address."""
    args = {"models": [{"artifact": "/a/res-net"}, {"artifact": "/a/b"}], "replicas": 2}
    environment = {
        "GUARD_MODE": "observe",
        "GUARD_RES_NET_MODE": "reject",
        "GUARD_B_THRESHOLD": "0.01",
        "GUARD_REPLICAS": "3",
        "GUARD_PORT": "8123",
    }
    found = read(write(args), environment)
    first, second = found.guard.models
    assert (first.mode, second.mode, second.threshold) == ("reject", "observe", 0.01)
    assert (found.guard.replicas, found.http_options.port) == (3, 8123)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- a", "expected a mapping"),
        ("applicatons: []", "did you mean applications?"),
        ("applications: []", "expected one with import_path deployments.app:build, got 0"),
        ("http_options: {prot: 1}\napplications: []", "http_options.prot: no such setting: did you mean port?"),
        ("{}", "setting applications: field required"),
    ],
)
def test_what_does_not_check_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    """The key that is wrong, and the one that was meant."""
    path = tmp_path / "guard.yaml"
    path.write_text(text)
    with pytest.raises(BadSetting) as caught:
        read(path, {})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"models": []}, "args.models"),
        ({"models": [{"artifact": "a", "mod": "flag"}]}, "args.models.0.mod"),
        ({"models": [{"artifact": "a", "limits": {"images": 0}}]}, "args.models.0.limits.images"),
        ({"models": [{"artifact": "a"}], "grpc": {"port": 0}}, "args.grpc.port"),
    ],
)
def test_a_setting_is_named_by_its_place(write, args: dict[str, Any], field: str) -> None:
    """Where in the file, by keys and numbers."""
    with pytest.raises(BadSetting) as caught:
        read(write(args), {})
    assert caught.value.field == field


def test_ray_serve_reads_the_same_file(write) -> None:
    """Serve's own schema takes it, with nothing left over, and the guard does not listen everywhere by default."""
    from ray.serve.schema import ServeDeploySchema

    args = {"models": [{"artifact": "/a"}], "replicas": 2, "grpc": {"port": 8001}}
    parsed = ServeDeploySchema(**read(write(args), {}).to_serve())
    assert [one.import_path for one in parsed.applications] == [
        "deployments.app:build",
        "deployments.app:build_metrics",
    ]
    assert parsed.http_options.host == "127.0.0.1"
    assert parsed.applications[0].args["replicas"] == 2
    assert parsed.applications[0].deployments[0].user_config == {"a": {"artifact": "/a"}}


def test_every_key_of_serve_is_known() -> None:
    """A key that Ray Serve's schema has and ours has not would be refused although it works."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    from deployments.document import Application, HttpOptions

    experimental = {"controller_options", "tracing_config"}
    assert set(Document.model_fields) == set(ServeDeploySchema.model_fields) - experimental
    assert set(HttpOptions.model_fields) == set(HTTPOptionsSchema.model_fields)
    outdated = {"host", "port", "logging_config"}
    assert set(Application.model_fields) == set(ServeApplicationSchema.model_fields) - outdated


def test_the_command_prints_the_file_for_its_options(tmp_path: Path) -> None:
    """What --print-config writes, read again, is what the options said."""
    options = ["--mode", "correct", "--port", "8123", "--replicas", "2", "--grpc-port", "8124", "--threshold", "0.01"]
    printed = CliRunner().invoke(serve, [str(tmp_path), *options, "--print-config"])
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "guard.yaml"
    path.write_text(printed.stdout)
    found = read(path, {})
    (model,) = found.guard.models
    assert (model.artifact, model.mode, model.threshold) == (tmp_path.resolve(), "correct", 0.01)
    assert (found.http_options.port, found.guard.replicas) == (8123, 2)
    assert found.guard.grpc is not None
    assert found.guard.grpc.port == 8124


def test_what_serve_itself_refuses_is_refused_first(write) -> None:
    """A value that Serve's schema does not take is an error of the file, not of the running server."""
    for beside, field in (
        ({"target_capacity": 1000}, "target_capacity"),
        ({"grpc_options": {"port": 9}}, "grpc_options"),
    ):
        with pytest.raises(BadSetting) as caught:
            check_with_serve(read(write({"models": [{"artifact": "/a"}]}, **beside), {}))
        assert caught.value.field == field
    with pytest.raises(BadSetting, match="artifact"):
        read(write({"models": [{"artifact": None, "name": "a"}]}), {})


def test_an_application_without_a_route_stays_without(write) -> None:
    """Serve's own default would put it at the root."""
    path = write({"models": [{"artifact": "/a"}]})
    values = yaml.safe_load(path.read_text())
    values["applications"].append({"name": "inner", "import_path": "a:b", "route_prefix": None})
    path.write_text(yaml.safe_dump(values))
    assert read(path, {}).to_serve()["applications"][2]["route_prefix"] is None


def test_secrets_are_not_repeated(write) -> None:
    """A bad value under keys is refused without being said."""
    with pytest.raises(BadSetting) as caught:
        read(write({"models": [{"artifact": "/a"}], "keys": "inference:abcdefghijklmnop"}), {})
    assert "abcdefgh" not in str(caught.value)


def test_metrics_are_as_closed_as_the_rest(write) -> None:
    """Keys of the guard's application hold for /metrics, where the file does not say otherwise."""
    found = read(write({"models": [{"artifact": "/a"}], "keys": {"file": "/k"}}), {}).to_serve()
    assert found["applications"][1]["args"] == {"keys": {"file": "/k"}}


def test_the_environment_speaks_without_a_file(tmp_path: Path) -> None:
    """As beside a file: its words win over the options."""
    environment = {"GUARD_PORT": "8123", "GUARD_MODE": "reject"}
    printed = CliRunner().invoke(serve, [str(tmp_path), "--mode", "flag", "--print-config"], env=environment)
    values = yaml.safe_load(printed.stdout)
    assert values["http_options"]["port"] == 8123
    said = values["applications"][0]["deployments"][0]["user_config"]
    assert said[tmp_path.name]["mode"] == "reject"


def test_options_beside_a_file_are_refused(write) -> None:
    """What a file says is said there."""
    got = CliRunner().invoke(serve, [str(write({"models": [{"artifact": "/a"}]})), "--mode", "flag"])
    assert got.exit_code == 2
    assert "--mode: say it in" in got.output


def test_what_may_change_in_place_stands_apart(write) -> None:
    """Ray Serve takes new replicas for other ``args``: a change of mode, threshold or artifact leaves them as they
    are."""
    before = read(write({"models": [{"artifact": "/a", "max_batch_size": 8}]}), {}).to_serve()
    after = read(write({"models": [{"artifact": "/b", "name": "a", "mode": "reject", "max_batch_size": 8}]}), {})
    first, second = before["applications"][0], after.to_serve()["applications"][0]
    assert first["args"] == second["args"] == {"models": [{"name": "a", "max_batch_size": 8}]}
    assert second["deployments"] == [
        {"name": "classifier", "user_config": {"a": {"artifact": "/b", "mode": "reject"}}},
    ]
    assert after.guard.models == (ModelConfig(artifact=Path("/b"), name="a", mode="reject", max_batch_size=8),)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"b": {"mode": "flag"}}, "user_config.b: no such model: expected a"),
        ({"a": {"limits": {}}}, "limits cannot change in a running replica"),
        ({"a": "flag"}, "it cannot change"),
    ],
)
def test_a_user_config_is_checked(write, said: dict[str, Any], sentence: str) -> None:
    """Models that are there, and settings that a running replica can change."""
    path = write({"models": [{"artifact": "/a"}]})
    values = yaml.safe_load(path.read_text())
    values["applications"][0]["deployments"] = [{"name": "classifier", "user_config": said}]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(BadSetting) as caught:
        read(path, {})
    assert sentence in str(caught.value)


def test_the_page_names_every_setting() -> None:
    """docs/configuration.md has a row for each key of the guard's own, and its example is a file that checks."""
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for kind in (ServeConfig, ModelConfig):
        missing = [key for key in kind.model_fields if f"| `{key}` |" not in page]
        assert missing == [], kind.__name__
    for key, field in ModelConfig.model_fields.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
        assert (row.split("|")[3].strip() == "yes") is (key in SWITCHABLE), key
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert str(field.default).removesuffix(".0") in row, key
    example = page.split("```yaml\n")[1].split("```")[0]
    found = checked(Document, yaml.safe_load(example))
    assert [model.name for model in found.guard.models] == ["resnet18", "digits"]


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"models": [{"artifact": "hand", "threshold": 0.01}]}, "threshold"),
        ({"models": [{"artifact": "hand"}], "grpc": {"port": 8000}}, "grpc.port"),
        ({"models": [{"artifact": "hand"}], "keys": {"file": "nowhere.keys"}}, "keys"),
    ],
)
def test_what_the_artifact_and_the_machine_refuse(write, tmp_path: Path, args: dict, field: str) -> None:
    """Before Ray starts: a threshold where there are no p-values, one port for two servers, keys that are not there."""
    bna_artifact(0).save(tmp_path / "hand")
    with pytest.raises(BadInput, match=field):
        _checked(read(write(args), {}))


def test_a_threshold_that_flags_nothing_is_refused(write, tmp_path: Path, victim, digits) -> None:
    """A conformal rank of 250 clean images is at least 1 in 251."""
    settings = guard.FitSettings(null="conformal", fpr=0.01)
    guard.fit(victim, digits.images[1000:1250], digits.labels[1000:1250], settings=settings).save(tmp_path / "hand")
    _checked(read(write({"models": [{"artifact": "hand", "threshold": 0.005}]}), {}))
    with pytest.raises(BadInput, match=r"threshold: below 0\.001 no image .* is 0\.00398: say 0\.00402 or more"):
        _checked(read(write({"models": [{"artifact": "hand", "threshold": 0.001}]}), {}))
