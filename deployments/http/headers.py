"""Headers that every answer carries, so that no browser or cache does more with it than it should."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANSWER = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
PAGE = ((b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"))
POLICY = b"content-security-policy"
# Nothing is loaded, run, framed or sent; a page that needs more says so itself (`page_policy`).
STRICT = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page_policy(*style_digests: str, scripts: Sequence[str] = ()) -> str:
    """The policy of a page with style sheets and scripts inside: base64 of the SHA-256 of each one's text."""
    parts = [STRICT]
    for name, digests in (("style-src", style_digests), ("script-src", scripts)):
        if digests:
            parts.append(" ".join((name, *(f"'sha256-{digest}'" for digest in digests))))
    return "; ".join(parts)


class SafeHeaders:
    """``app`` with safe headers on its answers; on HTML pages, those of a page as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = with_safe(message.get("headers", ()))
            await send(message)

        await self._app(scope, receive, safe)


def with_safe(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """``headers`` (lower-case names) and what is missing."""
    out = [*headers, *ANSWER]
    if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
        out += PAGE
        if all(name != POLICY for name, _ in headers):
            out.append((POLICY, STRICT.encode()))
    return out
