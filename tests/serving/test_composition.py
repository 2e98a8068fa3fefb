"""The guard inside a user's own Ray Serve application, on a real Ray: alone, with a deployment, around a deployment."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from networks import Images
from torch import nn

import deployments
import guard
from deployments.proxies import READY, READY_S, free_port
from guard.data import Data
from guard.errors import BadInput
from guard.types import Verdict

pytestmark = [
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray's own use of pydantic
]
LITTLE = {"ray_actor_options": {"num_cpus": 0.1}}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of our own, without its token file in the home folder."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(READY, str(READY_S))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            yield ray
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def folder(victim: nn.Module, digits: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the backdoored network."""
    fitted = guard.fit(victim, digits.images[1000:1250], digits.labels[1000:1250])
    return fitted.save(tmp_path_factory.mktemp("artifacts") / "digits")


@pytest.fixture(scope="module")
def images(unseen: Data, attacked: Data) -> np.ndarray:
    """Ten clean and ten triggered images, float32 [20, C, H, W]."""
    both = np.concatenate([unseen.images[:10].numpy(), attacked.images[:10].numpy()])
    return both.astype(np.float32) / np.float32(255)


@pytest.fixture(scope="module")
def verdict(folder: Path, images: np.ndarray) -> Verdict:
    """What the library itself says of ``images``, without any server."""
    expected = guard.load(folder)(torch.from_numpy(images))
    assert 0 < int(expected.flagged.sum()) < len(images)
    return expected


def my_model() -> Any:
    """A user's deployment: the artifact's original network as logits, as probabilities, and as another model's."""
    from ray import serve

    @serve.deployment(name="MyModel", max_ongoing_requests=16, **LITTLE)
    class MyModel:
        def __init__(self, artifact: str) -> None:
            import guard

            self._guard = guard.load(artifact)

        def __call__(self, images: Any) -> Any:
            return self._guard.original(torch.from_numpy(images.copy()))[0]

        def opposite(self, images: Any) -> Any:
            return -self(images).numpy()

        def probabilities(self, images: Any) -> Any:
            return self(images).softmax(1).tolist()

    return MyModel


def the_same(answer: dict[str, Any], verdict: Verdict, atol: float = 1e-4) -> None:
    """``answer`` of mode flag says what ``verdict`` says, and nothing that is withheld."""
    assert set(answer) == {"mode", "logits", "label", "flagged", "corrected_label", "unguarded", "version"}
    assert (answer["mode"], answer["unguarded"], answer["version"]) == ("flag", False, "1")
    for name in ("label", "flagged", "corrected_label"):
        np.testing.assert_array_equal(answer[name], getattr(verdict, name), err_msg=name)
    np.testing.assert_allclose(answer["logits"], verdict.logits, atol=atol)


def test_composition_is_light() -> None:
    """Importing the package loads neither Ray nor torch until a composed deployment is asked for."""
    code = "import sys, deployments; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_page_is_right(
    ray: Any, folder: Path, images: np.ndarray, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/wrap.md runs as it stands and answers over HTTP as the library does; its one-liner builds."""
    from ray import serve

    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/digits").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/wrap.md").read_text()
    example, one_liner = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(example, "docs/wrap.md", "exec"), names)
    serve.start(http_options={"host": "127.0.0.1", "port": (port := free_port())})
    serve.run(names["app"], name="page", route_prefix="/page")
    body = io.BytesIO()
    np.save(body, images)
    answer = httpx.post(f"http://127.0.0.1:{port}/page", content=body.getvalue(), timeout=60).raise_for_status().json()
    assert answer == {"label": verdict.label.tolist(), "flagged": verdict.flagged.tolist()}
    serve.delete("page")
    exec(compile(one_liner, "docs/wrap.md", "exec"), names)
    assert isinstance(names["app"], serve.Application)


def test_alone(ray: Any, folder: Path, images: np.ndarray, verdict: Verdict) -> None:
    """Both networks in the deployment: floats and bytes are answered as the library does, bad images are refused by
    name, settings switch in place, and the metrics count it all."""
    from ray import serve

    deployment = deployments.GuardedClassifier.options(user_config={"mode": "flag"}, **LITTLE)
    app = deployment.bind(str(folder), mode="reject", name="own")
    handle = serve.run(app, name="alone", route_prefix=None)
    the_same(handle.infer.remote(images).result(timeout_s=60), verdict)
    as_bytes = (images * 255).round().astype(np.uint8)
    the_same(handle.infer.remote(as_bytes).result(), verdict)
    with pytest.raises(BadInput, match=r"in \[0, 1\]"):
        handle.infer.remote(images * 255).result()
    assert handle.ready.remote().result()
    text = handle.metrics.remote().result().decode()
    flagged = 2 * int(verdict.flagged.sum())
    assert f'guard_inputs_total{{model="own",verdict="flagged"}} {flagged}.0' in text
    assert 'guard_requests_total{mode="flag",model="own",verdict="error"} 1.0' in text


def test_with_a_deployment(ray: Any, folder: Path, images: np.ndarray, verdict: Verdict) -> None:
    """The original's logits come from a deployment of the application; requests at the same time get each its own
    answer."""
    from ray import serve

    app = deployments.GuardedClassifier.options(**LITTLE).bind(str(folder), original=my_model().bind(str(folder)))
    handle = serve.run(app, name="with", route_prefix=None)
    the_same(handle.infer.remote(images).result(timeout_s=60), verdict)
    parts = [handle.infer.remote(images[i : i + 1]) for i in range(len(images))]
    assert [part.result()["flagged"].tolist() for part in parts] == [[flag] for flag in verdict.flagged.tolist()]


def test_around_a_deployment(ray: Any, folder: Path, images: np.ndarray, verdict: Verdict) -> None:
    """The wrapper takes a handle of what runs already, and a method of it, here one that gives probabilities."""
    from ray import serve

    mine = serve.get_deployment_handle("MyModel", "with")
    app = deployments.guarded(mine, folder, method="probabilities", outputs="probabilities", options=LITTLE)
    handle = serve.run(app, name="around", route_prefix=None)
    answer = handle.infer.remote(images).result(timeout_s=60)
    the_same(answer | {"logits": verdict.logits}, verdict)
    np.testing.assert_allclose(answer["logits"], verdict.logits.log_softmax(1), atol=1e-3)


def test_another_model_does_not_start(ray: Any, folder: Path) -> None:
    """A deployment that is not the guard's network keeps the application from starting, with the reason."""
    from ray import serve

    mine = serve.get_deployment_handle("MyModel", "with")
    with pytest.raises(RuntimeError, match="wrong"):
        serve.run(deployments.guarded(mine, folder, method="opposite", options=LITTLE), name="wrong", route_prefix=None)
    (status,) = serve.status().applications["wrong"].deployments.values()
    assert "it is another model" in status.message


def test_settings_are_checked_where_they_are_given(tmp_path: Path) -> None:
    """A slip of the pen is refused before anything is deployed."""
    with pytest.raises(BadInput, match="did you mean mode"):
        deployments.guarded(my_model(), tmp_path / "artifact", moed="flag")
    with pytest.raises(BadInput, match="outputs"):
        deployments.guarded(my_model(), tmp_path / "artifact", outputs="softmax")  # type: ignore[arg-type]
