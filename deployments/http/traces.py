"""W3C Trace Context: a caller finds the ``traceparent`` that it sent on the answer."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.traces import traceparent

HEADER = "traceparent"


class TraceEcho:
    """ASGI middleware: sets the ``traceparent`` of a request on its answer, whatever the answer is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = traceparent(Headers(scope=scope).getlist(HEADER)) if scope["type"] == "http" else None
        if value is None:
            await self._app(scope, receive, send)
            return

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = value
            await send(message)

        await self._app(scope, receive, echoing)
