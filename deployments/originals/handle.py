"""The original network as a deployment of the user's own Ray Serve application, asked by its handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import UpstreamBusy, UpstreamFailed, UpstreamLate
from deployments.originals.original import as_logits
from deployments.upstream import OriginalSettings

log = logging.getLogger(__name__)


class HandleOriginal:
    """See `deployments.originals.original.Original`. Ray Serve itself waits until the deployment is there.

    Args:
        handle: of the deployment; it may return an array, a tensor or lists. asking: how it is asked. classes: K.
    """

    def __init__(self, handle: DeploymentHandle[Any], asking: OriginalSettings, classes: int) -> None:
        self._handle = handle.options(method_name=asking.method)
        self._asking = asking
        self._classes = classes

    async def logits(self, images: NDArray[np.float32], headers: Mapping[str, str]) -> NDArray[np.float32]:
        """The headers stay here: whoever holds a handle passes on what it wants to in arguments of its own."""
        try:
            async with asyncio.timeout(self._asking.timeout_s):
                answer = await self._handle.remote(images)
        except TimeoutError as error:
            raise UpstreamLate(f"original: no answer within {self._asking.timeout_s:g} s", field="original") from error
        except BackPressureError as error:
            raise UpstreamBusy("original: its queue is full: try again later") from error
        except (RayError, RayServeException) as error:
            log.warning("the original's deployment failed", exc_info=error)
            raise UpstreamFailed("original: its deployment failed: its log has the reason", field="original") from error
        return as_logits(_plain(answer), len(images), self._classes, self._asking.outputs)

    async def check(self) -> None:
        """Its own health checks are Ray Serve's affair."""

    async def close(self) -> None: ...


def _plain(answer: Any) -> Any:
    """A tensor of torch, which may want gradients or lie on a GPU, as one that numpy reads."""
    return answer.detach().cpu().float() if hasattr(answer, "detach") else answer
