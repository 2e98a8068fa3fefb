"""What the guard is compared with: the user's own network behind the same queue and HTTP, and nothing at all."""

# No `from __future__ import annotations`: Serve reads the types of what it is given.

from contextlib import asynccontextmanager
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp


@serve.ingress()
class BareReplica:
    """Reads and answers the Open Inference Protocol as the guard does, and runs the user's module in between."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        import torch

        from benchmarks.serving_cost import CLASSES, SIZE, Bare, network
        from deployments.config import Limits
        from deployments.policy import Answer
        from deployments.protocol.bodies import Model
        from deployments.protocol.v2 import JSON_LENGTH, parse_infer, render_infer
        from guard.types import InputSpec

        torch.set_num_threads(1)
        bare = Bare(network()[0])
        model = Model("bare", "1", InputSpec(3, SIZE, SIZE), tuple(map(str, range(CLASSES))))
        limits = Limits()

        async def infer(request: Request) -> Response:
            ask = parse_infer(await request.body(), model, limits, json_length=request.headers.get(JSON_LENGTH))
            logits = await bare.logits(ask.images)
            body = render_infer(Answer("observe", logits, logits.argmax(1)), ask, model)
            headers = {} if body.json_length is None else {JSON_LENGTH: str(body.json_length)}
            return Response(body.content, media_type="application/json", headers=headers)

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> Any:
            await bare.start()
            yield
            await bare.close()

        return Starlette(routes=[Route("/v2/models/bare/infer", infer, methods=["POST"])], lifespan=lifespan)


def bare() -> Application:
    """One replica with the settings of the guard's."""
    deploy = serve.deployment(
        name="classifier",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=1000,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    return deploy(BareReplica).bind()


async def _nothing(_request: Request) -> Response:
    return PlainTextResponse("ok")


nothing = Starlette(routes=[Route("/", _nothing)])
