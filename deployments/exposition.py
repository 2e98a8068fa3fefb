"""``/metrics``: what all replicas of this node counted, merged, in the Prometheus text format.

Its own small application, without torch and beside the classifier, so that load on the one cannot block the other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import Receive, Scope, Send


def merged(folder: Path) -> bytes:
    """The merged series of the processes that wrote into ``folder``. Gauges of dead processes are forgotten."""
    for path in folder.glob("gauge_live*.db"):
        found = re.search(r"_(\d+)\.db$", path.name)
        if found and not _running(int(found.group(1))):
            mark_process_dead(int(found.group(1)), path=str(folder))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def build_metrics_app(folder: Path) -> Router:
    """The application. It answers at any path: the server mounts it at /metrics."""

    async def scrape(scope: Scope, receive: Receive, send: Send) -> None:
        body = await run_in_threadpool(merged, folder)
        await Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})(scope, receive, send)

    return Router(redirect_slashes=False, default=scrape)
