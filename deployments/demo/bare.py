"""The endpoint as it was before the guard: the same network behind the same engine, for the latency comparison."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ray import serve
from ray.serve import Application
from starlette.requests import Request

from guard.programs import load_program


class Bare:
    """Decodes the image, runs the user's network, answers with the label."""

    def __init__(self, program: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self._network = load_program(program).module()

    async def __call__(self, request: Request) -> dict[str, Any]:
        import torch

        with Image.open(io.BytesIO(await request.body())) as image:
            pixels = np.array(image.convert("RGB"))
        with torch.inference_mode():
            images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255.0
            return {"label": int(self._network(images).argmax(1))}


def build(program: Path) -> Application:
    """The application for the network in a ``.pt2`` file."""
    quiet = {"enable_access_log": False}
    return serve.deployment(name="bare", max_ongoing_requests=64, logging_config=quiet)(Bare).bind(program)
