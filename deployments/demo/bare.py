"""The endpoint as it was before the guard: the same network behind the same engine, for the latency comparison."""

# No `from __future__ import annotations`: Serve and FastAPI read the types at run time.

import io
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from PIL import Image
from ray import serve

api = FastAPI()


@serve.deployment(name="bare", max_ongoing_requests=64, logging_config={"enable_access_log": False})
@serve.ingress(api)
class Bare:
    """Decodes the image, runs the user's network, answers with the label."""

    def __init__(self, program: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self._network = torch.export.load(program).module()

    @api.post("/classify")
    async def classify(self, request: Request) -> dict[str, Any]:
        import torch

        with Image.open(io.BytesIO(await request.body())) as image:
            pixels = np.asarray(image.convert("RGB"))
        with torch.inference_mode():
            images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255.0
            return {"label": int(self._network(images).argmax(1))}
