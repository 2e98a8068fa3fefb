"""Two replicas, a real Prometheus and a real Alertmanager: what they count and when they call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from networks import TARGET
from processes import replicas, wait_for

from deployments.config import ModelConfig, ServeConfig
from deployments.document import document
from deployments.errors import StartFailed
from deployments.monitoring.__main__ import ALERT, infer_body
from deployments.monitoring.dashboards.catalogue import queries
from deployments.monitoring.stack import Prometheus, Webhook, missing, monitoring
from deployments.proxies import free_port
from deployments.serve import running
from guard.artifact import Artifact
from guard.data import Data

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"not installed (Debian: apt install {' '.join(missing())})"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray's own use of pydantic
]

BATCH, CLEAN = 50, 12_000  # images: ten minutes of twenty a second, in one


class Stack:
    """All that runs, and the images to send."""

    def __init__(self, url: str, prometheus: Prometheus, webhook: Webhook, clean: Data, triggered: Data) -> None:
        self.prometheus, self.webhook = prometheus, webhook
        self._url = f"{url}/v2/models/digits/infer"
        self._clean, self._triggered = (
            (data.images * 255).round().byte().numpy() if data.images.is_floating_point() else data.images.numpy()
            for data in (clean, triggered)
        )
        self._rng = np.random.default_rng(0)
        self.sent = 0

    def send(self, requests: int, *, triggered: int = 0) -> None:
        """As many requests of `BATCH` images each, the first ``triggered`` of each with the trigger."""

        def ask(images: np.ndarray) -> None:
            httpx.post(self._url, **infer_body(images), timeout=60).raise_for_status()

        def batch() -> np.ndarray:
            attack = self._triggered[self._rng.integers(0, len(self._triggered), triggered)]
            clean = self._clean[self._rng.integers(0, len(self._clean), BATCH - triggered)]
            return np.concatenate([attack, clean])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, [batch() for _ in range(requests)]))
        self.sent += requests * BATCH

    def value(self, expression: str) -> float:
        """Of a query with one series; -1 without any."""
        return next((value for _labels, value in self.prometheus.query(expression)), -1.0)

    def seen(self, expression: str, value: float) -> Callable[[], bool]:
        return lambda: self.value(expression) == value


@pytest.fixture(scope="module")
def stack(
    artifact: Artifact, unseen: Data, attacked: Data, environment: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("monitoring")
    model = ModelConfig.model_validate({"artifact": artifact.save(folder / "digits"), "name": "digits"})
    config = ServeConfig(models=(model,), replicas=2, cpus_per_replica=0.1)
    webhook = Webhook()
    try:
        with (
            running(document(config, host="127.0.0.1", port=free_port())) as server,
            monitoring(server.url.partition("//")[2], webhook.url, folder / "data") as prometheus,
        ):
            yield Stack(server.url, prometheus, webhook, unseen, attacked)
    finally:
        webhook.close()


def test_clean_traffic_is_counted_exactly_and_raises_no_alarm(stack: Stack) -> None:
    """Ten minutes of twenty images a second, sent at once: the counters of two replicas say what was sent."""
    wait_for(stack.seen("sum(guard_requests_total)", 0), 30)
    stack.send(CLEAN // BATCH)
    wait_for(stack.seen("sum(guard_inputs_total)", stack.sent), 30)
    assert stack.value("sum(guard_requests_total)") == stack.sent / BATCH
    assert stack.value("sum(guard_predicted_total)") == stack.sent
    assert stack.value('sum(guard_inputs_total{verdict="clean"})') > 0.97 * stack.sent
    time.sleep(20)  # more than a look at the rules
    assert stack.value("guard_attack_evidence") < 9
    assert ALERT not in stack.prometheus.alerts()
    assert [
        one["labels"]["alertname"] for one in stack.webhook.arrived if one["labels"]["severity"] == "critical"
    ] == []


def test_every_panel_has_data(stack: Stack) -> None:
    """Each query of each dashboard, and each recording rule, after clean traffic."""

    def empty() -> list[str]:
        stack.send(4)
        return [
            f"{asked.dashboard}: {asked.panel}: {asked.expr}"
            for asked in queries()
            if not asked.optional and not stack.prometheus.query(asked.expr)
        ]

    deadline = time.monotonic() + 60
    while (found := empty()) and time.monotonic() < deadline:
        time.sleep(2)
    assert found == []


def test_a_killed_replica_takes_nothing_with_it(stack: Stack) -> None:
    """What it had counted stays; what its successor counts is added."""
    before = replicas(os.getpid())
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    wait_for(lambda: len(replicas(os.getpid()) - before) == 1, 60)
    wait_for(lambda: _try(stack), 60)
    stack.send(20)
    wait_for(stack.seen("sum(guard_inputs_total)", stack.sent), 30)


def _try(stack: Stack) -> bool:
    """Whether a request is answered; requests that are refused while a replica starts are no images."""
    try:
        stack.send(1)
    except httpx.HTTPError:
        return False
    return True


def test_an_attack_is_on_the_webhook_within_a_minute(stack: Stack, artifact: Artifact) -> None:
    """One image in ten bears the trigger: the alert fires and arrives, and names the model."""
    begun = time.monotonic()
    stack.send(20, triggered=BATCH // 10)
    alert = stack.webhook.wait_for(ALERT, 60)
    assert alert is not None, stack.prometheus.alerts()
    print(f"the alert arrived after {time.monotonic() - begun:.1f} s")
    assert alert["labels"]["model"] == "digits"
    assert stack.value("guard_attack_evidence") >= 9
    flagged = stack.prometheus.query("topk(1, guard_class_evidence)")
    assert flagged[0][0]["predicted_class"] == artifact.manifest["classes"][TARGET]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with (
        pytest.raises(StartFailed, match="apt install prometheus prometheus-alertmanager"),
        monitoring("", "", tmp_path),
    ):
        pass
