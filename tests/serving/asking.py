"""An application asked in process, from code that is not async."""

from __future__ import annotations

import asyncio
from functools import partialmethod
from typing import Any

import httpx
from starlette.types import ASGIApp


class Client:
    """``app`` between start and close, if it has either; requests as httpx takes them."""

    def __init__(self, app: ASGIApp) -> None:
        router = getattr(app, "router", None)
        self._lifespan = router.lifespan_context(app) if router else None
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard")
        self._runner = asyncio.Runner()

    def __enter__(self) -> Client:
        if self._lifespan:
            self._runner.run(self._lifespan.__aenter__())
        return self

    def __exit__(self, *_error: object) -> None:
        if self._lifespan:
            self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.run(self._http.aclose())
        self._runner.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._runner.run(self._http.request(method, path, **options))

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")
