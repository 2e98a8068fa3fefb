"""``/metrics``: what all replicas of all nodes counted, merged, in the Prometheus text format.

Its own small application, without torch and beside the classifier, so that load on the one cannot block the other.
Where there are API keys, it takes one of the role administration.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import BadRequest
from deployments.http.headers import SafeHeaders
from deployments.keys import Keys
from deployments.watch.watch import Watch

PREFIX, STATE = "/metrics", "/state"


def build_metrics_app(watch: Watch, keys: Keys | None = None) -> ASGIApp:
    """The application, mounted at /metrics: the text format there, and at `STATE` below it JSON for the page."""
    keys = keys or Keys()

    async def answer(scope: Scope) -> Response:
        headers = Headers(scope=scope)
        try:
            keys.require("administration", headers.get("authorization"), headers.get("x-api-key"))
        except BadRequest as error:
            return JSONResponse({"error": str(error), "field": error.field}, error.status, error.headers)
        path = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix(PREFIX).rstrip("/")
        if path not in ("", STATE):
            return JSONResponse({"error": "there is nothing here", "field": None}, 404)
        if scope["method"] not in ("GET", "HEAD"):
            return JSONResponse({"error": "only GET", "field": None}, 405, {"allow": "GET, HEAD"})
        if not watch.complete():
            wait = "the counters of other nodes are not all here yet: try again in a few seconds"
            return JSONResponse({"error": wait, "field": None}, 503, {"retry-after": "5"})
        if path == STATE:
            return JSONResponse(await run_in_threadpool(watch.state))
        body = await run_in_threadpool(watch.render)
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await (await answer(scope))(scope, receive, send)

    @asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        watch.start()
        yield
        await run_in_threadpool(watch.close)

    return SafeHeaders(Router(redirect_slashes=False, default=serve, lifespan=lifespan))
