"""``python -m deployments.monitoring``: an endpoint, Prometheus and Alertmanager; clean traffic, then an attack.

The demo's poisoned network behind its guard in two replicas; what fires arrives at a webhook and is shown.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from numpy.typing import NDArray

from deployments.config import ModelConfig, ServeConfig
from deployments.demo import story
from deployments.document import document
from deployments.errors import StartFailed
from deployments.monitoring.stack import Webhook, missing, monitoring
from deployments.proxies import free_port
from deployments.serve import running
from deployments.signals import interrupt_on_signals, until_interrupted
from guard.progress import bars

MODEL, ALERT = "digits", "GuardAttackUnderWay"
CLIENTS = 4


class Traffic:
    """Clients that ask without a pause, an image a request; ``share`` of the requests bear the trigger."""

    def __init__(self, url: str, clean: NDArray[np.uint8], triggered: NDArray[np.uint8]) -> None:
        self.share = 0.0
        self.sent = 0
        self.triggered = 0
        self._url = f"{url}/v2/models/{MODEL}/infer"
        self._images = clean, triggered
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(CLIENTS)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _work(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        clean, triggered = self._images
        with httpx.Client(timeout=30.0) as http:
            while not self._ending.is_set():
                attack = bool(rng.random() < self.share)
                images = triggered if attack else clean
                image = images[rng.integers(len(images))]
                http.post(self._url, **infer_body(image[None])).raise_for_status()
                with self._lock:
                    self.sent += 1
                    self.triggered += attack


def infer_body(images: NDArray[np.uint8]) -> dict[str, Any]:
    """What `httpx.post` takes to ask about images [n, 3, H, W], as a raw tensor."""
    head = b'{"inputs":[{"name":"images","shape":[%s],"datatype":"UINT8","parameters":{"binary_data_size":%d}}]}' % (
        b",".join(b"%d" % size for size in images.shape),
        images.nbytes,
    )
    return {"content": head + images.tobytes(), "headers": {"Inference-Header-Content-Length": str(len(head))}}


@contextmanager
def endpoint(folder: Path) -> Iterator[tuple[str, story.Prepared]]:
    """The demo's network behind its guard, in two replicas: the address, and the images."""
    prepared = story.prepare(folder, seed=0, progress=bars)
    model = ModelConfig.model_validate({"artifact": prepared.artifact, "name": MODEL})
    config = ServeConfig(models=(model,), replicas=2, cpus_per_replica=0.1)
    with running(document(config, host="127.0.0.1", port=free_port())) as server:
        yield server.url, prepared


@click.command(help=__doc__)
@click.option("--clean-s", default=30.0, show_default=True, help="Seconds of clean traffic before the attack.")
@click.option("--share", default=0.1, show_default=True, help="Of the requests that then bear the trigger.")
@click.option("--patience-s", default=120.0, show_default=True, help="Seconds to wait for the alert.")
@click.option("--keep", is_flag=True, help="Leave everything up, with clean traffic, until Ctrl-C.")
def main(clean_s: float, share: float, patience_s: float, keep: bool) -> None:
    interrupt_on_signals()
    if missing():
        raise click.ClickException(str(StartFailed(f"not installed: apt install {' '.join(missing())}")))
    with tempfile.TemporaryDirectory(prefix="guard-monitoring-") as scratch:
        folder = Path(scratch)
        with endpoint(folder) as (url, prepared):
            webhook = Webhook()
            try:
                with monitoring(url.partition("//")[2], webhook.url, folder / "data") as prometheus:
                    say(f"guard {url}/guard/ , Prometheus {prometheus.url}/alerts")
                    fired = attack(url, prepared, webhook, clean_s, share, patience_s, keep=keep)
            finally:
                webhook.close()
    sys.exit(0 if fired else 1)


def attack(
    url: str, prepared: story.Prepared, webhook: Webhook, clean_s: float, share: float, patience_s: float, *, keep: bool
) -> bool:
    """Clean traffic, then triggered; whether the alert came, and only then."""
    images = prepared.clean.images.numpy(), prepared.triggered.images.numpy()
    with Traffic(url, *images) as traffic:
        time.sleep(clean_s)
        early = [one["labels"]["alertname"] for one in webhook.arrived]
        say(f"{traffic.sent} clean requests in {clean_s:.0f} s; alerts: {', '.join(early) or 'none'}")
        before, begun, traffic.share = traffic.sent, time.monotonic(), share
        alert = webhook.wait_for(ALERT, patience_s)
        took = time.monotonic() - begun
        traffic.share = 0.0
        if alert is None:
            say(f"no {ALERT} within {patience_s:.0f} s")
        else:
            say(f"{ALERT} arrived after {took:.1f} s, {traffic.sent - before} requests, {traffic.triggered} triggered")
            for text in alert["annotations"].values():
                click.echo(f"  {text}")
        if keep:
            say("everything stays up, with clean traffic, until Ctrl-C")
            until_interrupted()
    return alert is not None and ALERT not in early


def say(sentence: str) -> None:
    click.echo(f"monitoring: {sentence}", err=True)


if __name__ == "__main__":
    main()
