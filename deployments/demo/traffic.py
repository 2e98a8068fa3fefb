"""A client of the demo's endpoint: images as PNG over HTTP, one at a time, with the time each answer took."""

from __future__ import annotations

import io
import time
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from guard.errors import GuardError
from guard.progress import Progress


class Answers(NamedTuple):
    """bodies: the JSON answer to each image. seconds: float [N], what each took."""

    bodies: list[dict[str, Any]]
    seconds: NDArray[np.float64]


def png(image: Tensor) -> bytes:
    """A uint8 image [3, H, W] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def classify(url: str, images: Tensor, progress: Progress, what: str) -> Answers:
    """POST each image to ``url``/classify."""
    (answers,) = classify_in_turn([url], images, progress, what)
    return answers


def classify_in_turn(urls: list[str], images: Tensor, progress: Progress, what: str) -> list[Answers]:
    """POST each image to every address in turn, so that noise of the machine falls on all alike."""
    bodies: list[list[dict[str, Any]]] = [[] for _ in urls]
    seconds: list[list[float]] = [[] for _ in urls]
    with httpx.Client(timeout=60.0) as client, progress(f"send {len(images)} {what} images", len(images)) as advance:
        for image in images:
            payload = png(image)
            for index, url in enumerate(urls):
                begun = time.perf_counter()
                response = client.post(f"{url}/classify", content=payload, headers={"content-type": "image/png"})
                seconds[index].append(time.perf_counter() - begun)
                if response.status_code != 200:
                    raise GuardError(f"demo: {url}/classify answered {response.status_code}: {response.text[:200]}")
                bodies[index].append(response.json())
            advance(1)
    return [Answers(answered, np.array(took)) for answered, took in zip(bodies, seconds, strict=True)]


def latency(seconds: NDArray[np.float64]) -> dict[str, float]:
    """p50 and p99 in milliseconds."""
    return {"p50": float(np.quantile(seconds, 0.5) * 1e3), "p99": float(np.quantile(seconds, 0.99) * 1e3)}
