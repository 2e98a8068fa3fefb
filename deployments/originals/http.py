"""The original network on a server of its own, asked over HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import httpx
import numpy as np
from numpy.typing import NDArray

from deployments.errors import UpstreamBusy, UpstreamFailed, UpstreamLate, UpstreamRefused, UpstreamUnfit
from deployments.originals.original import as_logits
from deployments.originals.wire import decode, encode
from deployments.upstream import UpstreamSettings
from guard.errors import BadSetting, GuardError

# Larger bodies are made and read in a thread, so that others are answered meanwhile.
ON_LOOP_BYTES = 2**20
ON_LOOP_JSON = 32 * 1024
# Shorter than the 5 s after which many servers close an idle connection.
KEEP_ALIVE_S = 4.0
REFUSALS = {
    401: ("authorization", "the upstream wants other credentials: set upstream.headers, or pass on the client's"),
    403: ("authorization", "the upstream does not allow this with these credentials"),
    404: ("upstream.model", "the upstream knows no such model or version"),
}
log = logging.getLogger(__name__)


class UpstreamHttp:
    """See `deployments.originals.original.Original`. Connections are kept and as many as there are requests under way,
    which the server in front limits: a slow answer holds nobody else.

    Args:
        settings: where and how. channels, classes: of the guard's model.

    Raises:
        BadSetting: mean and std do not fit the channels, or a header's variable is not set.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        channels: int,
        classes: int,
    ) -> None:
        if settings.mean is not None and len(settings.mean) != channels:
            raise BadSetting(
                f"setting upstream.mean: the model has {channels} channels, got {len(settings.mean)} values",
                field="upstream.mean",
            )
        self._settings = settings
        self._classes = classes
        self._fixed = settings.secrets()
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            timeout=httpx.Timeout(settings.timeout_s, connect=settings.connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S),
        )

    async def logits(self, images: NDArray[np.float32], headers: Mapping[str, str]) -> NDArray[np.float32]:
        settings = self._settings
        if images.nbytes < (ON_LOOP_BYTES if settings.binary else ON_LOOP_JSON):
            body = encode(images, settings)
        else:
            body = await asyncio.to_thread(encode, images, settings)
        answer = await self._ask("POST", "/infer", body.content, {**self._passed_on(headers), **body.headers})
        if answer.status_code != 200:
            raise _refusal(answer)
        if len(answer.content) < ON_LOOP_JSON:
            output = decode(answer.content, answer.headers, settings.output)
        else:
            output = await asyncio.to_thread(decode, answer.content, answer.headers, settings.output)
        return as_logits(output, len(images), self._classes, settings.outputs)

    async def check(self) -> None:
        response = await self._ask("GET", "/ready", b"", {})
        if response.status_code in REFUSALS:
            raise _refusal(response)
        if response.status_code != 200:
            raise UpstreamFailed(f"upstream: the model is not ready there ({response.status_code})")

    async def close(self) -> None:
        await self._client.aclose()

    def _passed_on(self, headers: Mapping[str, str]) -> dict[str, str]:
        given = {name.lower(): value for name, value in headers.items()}
        return {name: given[name] for name in self._settings.forward if name in given}

    async def _ask(self, method: str, route: str, content: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """The answer to one request, whatever its status. Errors of the network become ours here."""
        sent = [
            (name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
            for name, value in {**headers, **self._fixed}.items()
        ]
        request = self._client.build_request(method, self._settings.path + route, content=content, headers=sent)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._send(request)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise UpstreamLate(
                f"upstream: no answer within {self._settings.timeout_s:g} s, or no connection within "
                f"{self._settings.connect_timeout_s:g} s"
            ) from error
        except httpx.HTTPError as error:
            log.warning("the upstream %s cannot be asked: %r", request.url, error)
            raise UpstreamFailed(
                "upstream: it cannot be reached, or hung up: the guard's log has the reason"
            ) from error

    async def _send(self, request: httpx.Request) -> httpx.Response:
        """Send it; once more, if it went over a kept connection that the upstream was just closing."""
        fresh = False

        async def trace(event: str, _info: object) -> None:
            nonlocal fresh
            fresh = fresh or event == "connection.connect_tcp.started"

        request.extensions["trace"] = trace
        try:
            return await self._client.send(request)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if fresh:
                raise
            return await self._client.send(request)


def _refusal(response: httpx.Response) -> GuardError:
    """What an answer without logits means to our client; the upstream's own words go to the log alone."""
    status = response.status_code
    log.warning("the upstream answered %s with %d: %.300r", response.request.url, status, response.text)
    if status in REFUSALS:
        field, sentence = REFUSALS[status]
        return UpstreamRefused(f"{field}: {sentence}", field=field, status=status)
    if status in (429, 503):
        return UpstreamBusy("upstream: it is busy: try again later", _seconds(response.headers.get("retry-after", "")))
    if status in (408, 504):
        return UpstreamLate(f"upstream: it ran out of time itself ({status})")
    if status < 400:
        return UpstreamFailed(f"upstream: it answered with status {status}: set upstream.url to where it finally is")
    if status < 500:
        return UpstreamUnfit(
            f"upstream: it refused the guard's request ({status}), for a reason in the guard's log: see the tensors' "
            "names, datatype, binary, and its largest batch"
        )
    return UpstreamFailed(f"upstream: it failed ({status})")


def _seconds(retry_after: str) -> int:
    """A Retry-After header, seconds or a date, as whole seconds from 1 to an hour."""
    try:
        if retry_after.isdecimal():
            wait = float(retry_after)
        else:
            wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
    except ValueError:
        return 1
    return math.ceil(min(max(wait, 1), 3600))
