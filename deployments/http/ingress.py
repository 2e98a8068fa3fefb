"""The HTTP surface: routes, bodies in, JSON out. Every error is ``{"error": sentence, "field": name or null}``."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from deployments.config import Limits
from deployments.engine.catalogue import Catalogue
from deployments.engine.served import AnyServed
from deployments.engine.wrapped import Wrapped
from deployments.errors import BadRequest, NotFound, PassFailed, TooLarge, Unavailable, UnknownMedia, UpstreamFailed
from deployments.http import openapi, pages
from deployments.http.encodings import inflate
from deployments.http.headers import SafeHeaders
from deployments.http.page import shell
from deployments.http.schemas import Offer
from deployments.http.traces import TraceEcho
from deployments.keys import Keys, Role
from deployments.policy import Answer
from deployments.protocol import plain, v2
from deployments.protocol.bodies import Ask, Model

# Longer tensors, as JSON and as raw bytes, are read in a thread, so that others are answered meanwhile; and so is every
# image file and compressed body, whatever its length (1 KB may hold 32 million pixels).
ON_LOOP_JSON = 32 * 1024
ON_LOOP_RAW = 2**20
# So many are read at a time, lest the memory for decoded images (500 MB for the worst of 32 million pixels) adds up.
READERS = max(2, min(4, len(os.sched_getaffinity(0))))
INDEX_BYTES = 4096
# What metadata tells of the guard to whoever has no key of the role administration, where there are keys.
PUBLIC_FACTS = frozenset({"guard_mode"})
Parser = Callable[[bytes, Model, Limits], Ask]
Renderer = Callable[[Answer, Ask, Model], Response]
Handler = Callable[[Request], Awaitable[Response]]
log = logging.getLogger(__name__)


class Reading(NamedTuple):
    """How a body is read. on_loop: from this many bytes on, in a thread."""

    parse: Parser
    on_loop: int = 0


def build_http_app(models: Catalogue, version: str, keys: Keys | None = None) -> Starlette:
    """The application in front of ``models``; ``version`` is the server's own. Starts and closes them.

    ``keys``: who may ask; without any the server is open."""
    keys = keys or Keys()
    desk = Desk(models, version, keys)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await models.start()
        yield
        await models.close()
        desk.close()

    def get(path: str, handler: Handler, role: Role | None = "inference") -> Route:
        return Route(path, _answering(handler, keys, role), methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, _answering(handler, keys, "inference"), methods=["POST"])

    routes = [
        get("/v2", desk.server),
        get("/v2/health/live", desk.live, role=None),
        get("/v2/health/ready", desk.ready, role=None),
        get("/v2/models", desk.models),
        get("/v2/docs", desk.docs),
        get("/openapi.json", desk.openapi),
        *(get(path, desk.page, role=None) for path in ("/guard", "/guard/")),
        post("/v2/repository/index", desk.index),
        post("/v1/models/{name}:predict", desk.predict),
        post("/classify", desk.classify),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            get(model, desk.metadata),
            get(f"{model}/config", desk.configuration),
            get(f"{model}/ready", desk.ready, role=None),
            post(f"{model}/infer", desk.infer),
        ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
        middleware=[Middleware(TraceEcho), Middleware(SafeHeaders)],
    )
    app.router.redirect_slashes = False  # a redirect is no JSON
    return app


class Desk:
    """The handlers."""

    def __init__(self, models: Catalogue, version: str, keys: Keys) -> None:
        self._models = models
        self._version = version
        self._keys = keys
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def close(self) -> None:
        """Free the threads."""
        self._readers.shutdown(wait=False)

    async def server(self, _request: Request) -> Response:
        return JSONResponse(v2.render_server(self._version))

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        try:
            ready = self._find(request).ready if "name" in request.path_params else self._models.ready
        except NotFound:
            if not self._keys.required:
                raise
            raise NotFound("model_name: no such model or version", field="model_name") from None  # probes have no key
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"models": [classifier.model.name for classifier in self._models]})

    async def index(self, request: Request) -> Response:
        ready_only = v2.parse_index(await _content(request, await _body(request, INDEX_BYTES), INDEX_BYTES))
        models = [(classifier.model, classifier.ready) for classifier in self._models]
        return JSONResponse(v2.render_index(models, ready_only=ready_only))

    async def configuration(self, request: Request) -> Response:
        name = self._find(request).model.name
        raise NotFound(
            f"config: there is no such file for models here: GET /v2/models/{name} tells of it", field="path"
        )

    async def metadata(self, request: Request) -> Response:
        classifier = self._find(request)
        facts = classifier.facts()
        if "administration" not in request.state.roles:
            facts = {name: fact for name, fact in facts.items() if name in PUBLIC_FACTS}
        return JSONResponse(v2.render_metadata(classifier.model, facts))

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(self._document())

    async def docs(self, _request: Request) -> Response:
        return HTMLResponse(pages.page(self._document()), headers={"content-security-policy": pages.policy()})

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(shell.shell(), headers={"content-security-policy": shell.policy()})

    async def infer(self, request: Request) -> Response:
        return await self._answer(request, _tensors(request), _infer_response)

    async def predict(self, request: Request) -> Response:
        return await self._answer(request, _instances(request), _json(plain.render_predict))

    async def classify(self, request: Request) -> Response:
        return await self._answer(request, _one_file(request), _json(plain.render_classify))

    async def _answer(self, request: Request, reading: Reading, render: Renderer) -> Response:
        """Body, images, answer, body: the way of every request. The total time starts when its body is here."""
        classifier = self._find(request)
        model, limits = classifier.model, classifier.config.limits
        with classifier.visit() as live:
            if "scores" in request.state.roles:
                live = live.model_copy(update={"expose_scores": True})
            body = await _body(request, limits.body_bytes)
            with classifier.metrics.stage("total"):
                async with _while_connected(request):
                    with classifier.metrics.stage("decode"):
                        body = await _content(request, body, limits.body_bytes)
                        if len(body) < reading.on_loop:
                            ask = reading.parse(body, model, limits)
                        else:
                            work = asyncio.get_running_loop().run_in_executor
                            ask = await work(self._readers, reading.parse, body, model, limits)
                    answer = await classifier.infer(ask.images, live, request.headers)
                return render(answer, ask, model._replace(version=answer.version or model.version))

    def _document(self) -> dict[str, Any]:
        """The OpenAPI document of the models as they are now."""
        offers = [Offer(one.model, one.config.limits, isinstance(one, Wrapped)) for one in self._models]
        return openapi.document(offers, self._version, secured=self._keys.required)

    def _find(self, request: Request) -> AnyServed:
        """The model of the path, or of ``?model=`` where the path names none."""
        name = request.path_params.get("name") or request.query_params.get("model")
        return self._models.find(name, request.path_params.get("version"))


def _answering(handler: Handler, keys: Keys, role: Role | None) -> Handler:
    """``handler`` for whoever has ``role`` (None: everybody), with every error turned into a JSON answer; what is not
    ours goes to the log, not to the client. The key is looked at before the body is read."""

    async def answer(request: Request) -> Response:
        try:
            if role is not None:
                given = request.headers
                request.state.roles = keys.require(role, given.get("authorization"), given.get("x-api-key"))
            return await handler(request)
        except Unavailable as error:
            return _error(error.status, str(error), headers={"retry-after": str(error.retry_after_s)})
        except BadRequest as error:
            return _error(error.status, str(error), error.field, error.headers)
        except UpstreamFailed as error:
            return _error(error.status, str(error), error.field)
        except PassFailed as error:
            return _error(error.status, str(error))
        except Exception:
            log.exception("%s %s", request.method, request.url.path)
            return _error(500, "internal error: the server's log has the reason")

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(
        status,
        f"{request.method} {request.url.path}: {'no such route' if status == 404 else 'not allowed'}",
        "path",
        getattr(error, "headers", None),
    )


def _error(status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": message, "field": field}, status_code=status, headers=headers)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body; refused as soon as it is known to be longer than ``limit``."""
    declared = request.headers.get("content-length", "")
    length = int(declared[:19]) if declared.isdecimal() else 0
    chunks = bytearray()
    if length <= limit:
        try:
            async for chunk in request.stream():
                chunks += chunk
                if len(chunks) > limit:
                    break
        except ClientDisconnect as error:
            raise BadRequest("body: the client went away before it had sent all of it", field="body") from error
    if max(length, len(chunks)) > limit:
        raise TooLarge(f"body: more than {limit} bytes: send fewer images a request", field="body")
    return bytes(chunks)


@asynccontextmanager
async def _while_connected(request: Request) -> AsyncIterator[None]:
    """Ends the block, and gives up its place in every queue, once the client has gone; BadRequest then.

    The body must have been read."""
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        if task is not None:
            task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task is not None and task.uncancel() == 0:
            raise BadRequest("connection: the client went away before its answer", field="connection") from None
        raise
    finally:
        watching.cancel()


async def _content(request: Request, body: bytes, limit: int) -> bytes:
    """``body`` without its Content-Encoding."""
    encoding = ",".join(request.headers.getlist("content-encoding")).strip().lower()
    return body if encoding in ("", "identity") else await asyncio.to_thread(inflate, body, encoding, limit)


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _files(request: Request) -> Reading:
    return Reading(partial(plain.parse_images, content_type=request.headers.get("content-type", "")))


def _one_file(request: Request) -> Reading:
    return Reading(partial(plain.parse_image, content_type=request.headers.get("content-type", "")))


def _instances(request: Request) -> Reading:
    return _files(request) if _media(request).startswith(("image/", "multipart/")) else Reading(plain.parse_predict)


def _tensors(request: Request) -> Reading:
    """JSON tensors, whatever the content type says, unless the request is surely something else; raw ones where the
    header says so."""
    media, json_length = _media(request), request.headers.get(v2.JSON_LENGTH)
    if media.startswith(("image/", "multipart/")) or (media == "application/octet-stream" and json_length is None):
        return Reading(_no_tensors, ON_LOOP_RAW)
    if json_length is None:
        return Reading(v2.parse_infer, ON_LOOP_JSON)
    short = len(json_length) < 5  # up to 9,999 bytes of JSON
    return Reading(partial(v2.parse_infer, json_length=json_length), ON_LOOP_RAW if short else 0)


def _no_tensors(_body: bytes, _model: Model, _limits: Limits) -> Ask:
    raise UnknownMedia(
        "content-type: expected application/json with tensors as JSON, or raw tensors behind it and the header "
        f"{v2.JSON_LENGTH}; image files go to /classify or :predict",
        field="content-type",
    )


def _json(render: Callable[[Answer, Ask, Model], dict[str, Any]]) -> Renderer:
    return lambda answer, ask, model: JSONResponse(render(answer, ask, model))


def _infer_response(answer: Answer, ask: Ask, model: Model) -> Response:
    content, json_length = v2.render_infer(answer, ask, model)
    if json_length is None:
        return Response(content, media_type="application/json")
    headers = {v2.JSON_LENGTH: str(json_length)}
    return Response(content, headers=headers, media_type="application/octet-stream")
