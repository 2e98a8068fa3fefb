"""``/metrics``: what all replicas of this node counted, merged, in the Prometheus text format.

Its own small application, without torch and beside the classifier, so that load on the one cannot block the other.
Where there are API keys, it takes one of the role administration.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import BadRequest
from deployments.http.headers import SafeHeaders
from deployments.keys import Keys


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


def build_metrics_app(folder: Path, keys: Keys | None = None) -> ASGIApp:
    """The application. It answers at any path: the server mounts it at /metrics."""
    keys = keys or Keys()

    async def answer(headers: Headers) -> Response:
        try:
            keys.require("administration", headers.get("authorization"), headers.get("x-api-key"))
        except BadRequest as error:
            return JSONResponse({"error": str(error), "field": error.field}, error.status, error.headers)
        body = await run_in_threadpool(merged, folder)
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def scrape(scope: Scope, receive: Receive, send: Send) -> None:
        await (await answer(Headers(scope=scope)))(scope, receive, send)

    return SafeHeaders(Router(redirect_slashes=False, default=scrape))
