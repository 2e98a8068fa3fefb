"""Locust, run against one server, and the requests that it sends."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEAD = 256  # bytes of JSON in front of the pixels
WARM_UP_S = 1.5


def write_bodies(folder: Path, requests: Sequence[NDArray[np.uint8]]) -> None:
    """The bodies of requests, each of images [n, C, H, W], as files in ``folder``: raw tensors, of which the labels are
    wanted."""
    folder.mkdir(parents=True)
    for index, images in enumerate(requests):
        tensor = {"name": "images", "shape": images.shape, "datatype": "UINT8",
                  "parameters": {"binary_data_size": images.nbytes}}  # fmt: skip
        head = json.dumps({"inputs": [tensor], "outputs": [{"name": "label"}]}).encode()
        (folder / f"{index:03}.bin").write_bytes(head.ljust(HEAD) + images.tobytes())


class Run:
    """Locust against the server at ``url``. folder: has the requests in ``bodies``, and is written to."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder

    def __call__(self, path: str, *, users: int, seconds: float, rate: float = 0, method: str = "POST") -> Any:
        """{"milliseconds": of every answer in so many seconds after the warm-up, "failures": texts}."""
        out = self._folder / "out.json"
        headers = {"Inference-Header-Content-Length": str(HEAD), "Content-Type": "application/octet-stream"}
        settings = {
            "path": path, "method": method, "headers": headers, "bodies": str(self._folder / "bodies"),
            "rate": rate, "users": users, "warm_up_s": WARM_UP_S, "seconds": seconds, "out": str(out),
        }  # fmt: skip
        subprocess.run(
            [
                *(sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "locustfile.py"), "--headless"),
                *("-u", str(users), "-r", str(users), "-t", f"{math.ceil(seconds + WARM_UP_S)}s", "--host", self._url),
                *("--only-summary", "--loglevel", "ERROR", "--exit-code-on-error", "0"),
            ],
            env=os.environ | {"GUARD_LOAD": json.dumps(settings)},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return json.loads(out.read_text())
