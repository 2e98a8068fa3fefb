"""The HTTP surface: routes, bodies in, JSON out. Every error is ``{"error": sentence, "field": name or null}``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deployments import plain, protocol
from deployments.bodies import Ask, Model
from deployments.catalogue import Catalogue
from deployments.classifier import Classifier
from deployments.config import Limits
from deployments.errors import BadRequest, PassFailed, TooLarge, Unavailable, UnknownMedia
from deployments.policy import Answer

# Longer tensors, and image files of any length (1 KB may hold 32 million pixels), are read in a thread, so that others
# are answered meanwhile.
OFF_LOOP_BYTES = 32 * 1024
Parser = Callable[[bytes, Model, Limits], Ask]
Renderer = Callable[[Answer, Ask, Model], dict[str, Any]]
Handler = Callable[[Request], Awaitable[Response]]
log = logging.getLogger(__name__)


def build_http_app(models: Catalogue, version: str) -> Starlette:
    """The application in front of ``models``; ``version`` is the server's own. Starts and closes them."""
    desk = Desk(models, version)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await models.start()
        yield
        await models.close()

    def get(path: str, handler: Handler) -> Route:
        return Route(path, _answering(handler), methods=["GET"])

    def post(path: str, handler: Handler) -> Route:
        return Route(path, _answering(handler), methods=["POST"])

    routes = [
        get("/v2", desk.server),
        get("/v2/health/live", desk.live),
        get("/v2/health/ready", desk.ready),
        post("/v1/models/{name}:predict", desk.predict),
        post("/classify", desk.classify),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [get(model, desk.metadata), get(f"{model}/ready", desk.ready), post(f"{model}/infer", desk.infer)]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False  # a redirect is no JSON
    return app


class Desk:
    """The handlers."""

    def __init__(self, models: Catalogue, version: str) -> None:
        self._models = models
        self._version = version

    async def server(self, _request: Request) -> Response:
        return JSONResponse({"name": "guard", "version": self._version, "extensions": ["guard"]})

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        ready = self._find(request).ready if "name" in request.path_params else self._models.ready
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def metadata(self, request: Request) -> Response:
        classifier = self._find(request)
        return JSONResponse(protocol.render_metadata(classifier.model, classifier.facts()))

    async def infer(self, request: Request) -> Response:
        return await self._answer(request, _tensors(request), protocol.render_infer)

    async def predict(self, request: Request) -> Response:
        return await self._answer(request, _instances(request), plain.render_predict)

    async def classify(self, request: Request) -> Response:
        return await self._answer(request, _one_file(request), plain.render_classify)

    async def _answer(self, request: Request, parse: Parser, render: Renderer) -> Response:
        """Body, images, answer, body: the way of every request. The total time starts when its body is here."""
        classifier = self._find(request)
        model, limits = classifier.model, classifier.config.limits
        with classifier.visit() as live:
            body = await _body(request, limits.body_bytes)
            with classifier.metrics.stage("total"):
                with classifier.metrics.stage("decode"):
                    if len(body) < OFF_LOOP_BYTES and parse in (protocol.parse_infer, _no_tensors):
                        ask = parse(body, model, limits)
                    else:
                        ask = await asyncio.to_thread(parse, body, model, limits)
                answer = await classifier.infer(ask.images, live)
                return JSONResponse(render(answer, ask, model))

    def _find(self, request: Request) -> Classifier:
        """The model of the path, or of ``?model=`` where the path names none."""
        name = request.path_params.get("name") or request.query_params.get("model")
        return self._models.find(name, request.path_params.get("version"))


def _answering(handler: Handler) -> Handler:
    """``handler`` with every error turned into a JSON answer; what is not ours goes to the log, not to the client."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Unavailable as error:
            return _error(error.status, str(error), headers={"retry-after": str(error.retry_after_s)})
        except (BadRequest, PassFailed) as error:
            return _error(error.status, str(error), getattr(error, "field", None))
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


def _error(status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message, "field": field}, status_code=status, headers=headers)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body; refused as soon as it is known to be longer than ``limit``."""
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
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


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _files(request: Request) -> Parser:
    return partial(plain.parse_images, content_type=request.headers.get("content-type", ""))


def _one_file(request: Request) -> Parser:
    return partial(plain.parse_image, content_type=request.headers.get("content-type", ""))


def _instances(request: Request) -> Parser:
    return _files(request) if _media(request).startswith(("image/", "multipart/")) else plain.parse_predict


def _tensors(request: Request) -> Parser:
    """JSON tensors, whatever the content type says, unless the request is surely something else."""
    media = _media(request)
    if media.startswith(("image/", "multipart/")) or media == "application/octet-stream":
        return _no_tensors
    return _no_tensors if "inference-header-content-length" in request.headers else protocol.parse_infer


def _no_tensors(_body: bytes, _model: Model, _limits: Limits) -> Ask:
    raise UnknownMedia(
        "content-type: expected application/json with tensors as JSON; image files go to /classify or :predict",
        field="content-type",
    )
