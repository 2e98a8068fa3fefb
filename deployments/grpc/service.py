"""``inference.GRPCInferenceService`` of the Open Inference Protocol, next to the HTTP routes in the same process.

A client that cancels, or whose deadline passes, gives up its place in the queue. Errors have the sentences that HTTP
has, and these codes:

====================  =================================================================================================
INVALID_ARGUMENT      cannot be read, or does not fit the model (HTTP 400, 415, 422)
UNAUTHENTICATED       no API key, or an unknown one (401)
PERMISSION_DENIED     a key without the role (403)
NOT_FOUND             no such model or version (404)
RESOURCE_EXHAUSTED    more bytes or images than this server takes (413)
UNAVAILABLE           try again later (503), or the original's server cannot be reached or failed (502)
DEADLINE_EXCEEDED     the original's server took too long (504)
INTERNAL              the classifier failed, or the server did (500); the reason is in the server's log
====================  =================================================================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from deployments.engine.catalogue import Catalogue
from deployments.errors import BadRequest, NotFound, PassFailed, TooLarge, Unavailable, UpstreamFailed
from deployments.grpc import tensors
from deployments.grpc.messages import SERVICE, message
from deployments.keys import Keys, Role, Roles
from deployments.protocol import v2
from guard.errors import BadSetting

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Longer messages are read in a thread, so that others are answered meanwhile: raw tensors, and values one by one.
ON_LOOP_RAW = 2**20
ON_LOOP_TYPED = 32 * 1024
# Calls beyond what the queues hold, so that our own refusal speaks first, and the probes among them are answered.
SPARE_CALLS = 64
log = logging.getLogger(__name__)


class Call(NamedTuple):
    """One call. request: its message, of ``size`` bytes. headers: its metadata, but for binary ones. roles: what the
    caller may do."""

    request: Any
    size: int
    headers: Mapping[str, str]
    roles: Roles


Method = Callable[[Call], Awaitable[Any]]


class GrpcServer:
    """Serves ``models`` on ``host``:``port``, which all processes of a host that ask for it share (SO_REUSEPORT).

    Args:
        version: the server's own. port: 0 takes a free one. keys: who may ask (None: everybody).
    """

    def __init__(self, models: Catalogue, version: str, *, host: str, port: int, keys: Keys | None = None) -> None:
        self._models = models
        self._desk = Desk(models, version)
        self._keys = keys or Keys()
        self._host = host
        self.port = port
        self._server: Any = None

    async def start(self) -> None:
        """Accept calls on the running event loop. The models are there by now: messages are as long as they take.

        Raises:
            BadSetting: the address cannot be had.
        """
        limits = [classifier.config.limits for classifier in self._models]
        calls = sum(classifier.config.max_batch_size for classifier in self._models)
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", max(one.body_bytes for one in limits)),
            ),
            maximum_concurrent_rpcs=calls + sum(one.queued_images for one in limits) + SPARE_CALLS,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError as error:
            raise BadSetting(
                f"grpc.port: cannot listen on {host}:{self.port}: name a free port, and an address of this host",
                field="grpc.port",
            ) from error
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, answer those under way for ``grace_s`` at most.

        The models are closed afterwards. gRPC says CANCELLED to a call that comes as this begins, later UNAVAILABLE.
        """
        if self._server is not None:
            await self._server.stop(grace_s)

    def _handlers(self) -> grpc.GenericRpcHandler:
        desk = self._desk
        methods: dict[str, tuple[Method, Role | None]] = {
            "ServerLive": (desk.server_live, None),
            "ServerReady": (desk.server_ready, None),
            "ModelReady": (partial(desk.model_ready, named=not self._keys.required), None),
            "ServerMetadata": (desk.server_metadata, "inference"),
            "ModelMetadata": (desk.model_metadata, "inference"),
            "ModelInfer": (desk.model_infer, "inference"),
            "RepositoryIndex": (desk.repository_index, "inference"),
        }
        # Without a deserialiser here, which would answer what it cannot read as a failure of the server.
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(_answering(name, method, self._keys, role))
                for name, (method, role) in methods.items()
            },
        )


class Desk:
    """The methods."""

    def __init__(self, models: Catalogue, version: str) -> None:
        self._models = models
        self._version = version

    async def server_live(self, _call: Call) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, _call: Call) -> Any:
        return message("ServerReadyResponse")(ready=self._models.ready)

    async def model_ready(self, call: Call, *, named: bool) -> Any:
        """``named``: whether who asks without a key may learn which models there are."""
        try:
            classifier = self._models.find(call.request.name, call.request.version)
        except NotFound:
            if named:
                raise
            raise NotFound("model_name: no such model or version", field="model_name") from None
        return message("ModelReadyResponse")(ready=classifier.ready)

    async def server_metadata(self, _call: Call) -> Any:
        return message("ServerMetadataResponse")(**v2.render_server(self._version))

    async def model_metadata(self, call: Call) -> Any:
        return tensors.render_metadata(self._models.find(call.request.name, call.request.version).model)

    async def repository_index(self, call: Call) -> Any:
        models = [(classifier.model, classifier.ready) for classifier in self._models]
        index = v2.render_index(models, ready_only=call.request.ready)
        return message("RepositoryIndexResponse")(models=index)

    async def model_infer(self, call: Call) -> Any:
        """Message, images, answer, message: as over HTTP."""
        request = call.request
        classifier = self._models.find(request.model_name, request.model_version)
        model, limits = classifier.model, classifier.config.limits
        with classifier.visit() as live:
            if "scores" in call.roles:
                live = live.model_copy(update={"expose_scores": True})
            with classifier.metrics.stage("total"):
                with classifier.metrics.stage("decode"):
                    if call.size > limits.body_bytes:
                        raise TooLarge(
                            f"message: more than {limits.body_bytes} bytes: send fewer images a request",
                            field="message",
                        )
                    if call.size < (ON_LOOP_RAW if request.raw_input_contents else ON_LOOP_TYPED):
                        ask = tensors.parse_infer(request, model, limits)
                    else:
                        ask = await asyncio.to_thread(tensors.parse_infer, request, model, limits)
                answer = await classifier.infer(ask.images, live, call.headers)
                answered = model._replace(version=answer.version or model.version)
                return tensors.render_infer(answer, ask, answered)


def _answering(name: str, method: Method, keys: Keys, role: Role | None) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """``method`` from bytes to bytes for whoever has ``role`` (None: everybody), with every error turned into a status;
    what is not ours goes to the log, not to the client."""
    kind = message(f"{name}Request")

    async def answer(body: bytes, context: Any) -> bytes:
        try:
            metadata = context.invocation_metadata() or ()
            headers = {key: value for key, value in metadata if isinstance(value, str)}
            roles: Roles = frozenset()
            if role is not None:
                roles = keys.require(role, headers.get("authorization"), headers.get("x-api-key"))
            response = await method(Call(_read(kind, body), len(body), headers, roles))
            return bytes(response.SerializeToString())
        except (BadRequest, PassFailed, Unavailable, UpstreamFailed) as error:
            refusal = CODES[error.status], str(error)
        except Exception:
            log.exception("%s", name)
            refusal = CODES[500], "internal error: the server's log has the reason"
        return bytes(await context.abort(*refusal))  # never returns

    return answer


def _read(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise BadRequest(f"message: not a {kind.DESCRIPTOR.name}", field="message") from error
