"""W3C Trace Context: a caller finds the ``traceparent`` that it sent on the answer."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "traceparent"
# Version, trace, parent, flags. Version ff and zeros as trace or parent are invalid; later versions may add parts.
FORMAT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")


def traceparent(given: list[str]) -> str | None:
    """The one valid value among the headers of a request; None where there is none, or several."""
    match = FORMAT.fullmatch(given[0]) if len(given) == 1 else None
    return None if match is None or (match[1] == "00" and match[2] is not None) else match[0]


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
