"""A Ray of our own, on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.errors import StartFailed
from deployments.signals import SIGNALS

TRIES = 2
log = logging.getLogger(__name__)


def start(cpus: int, **options: Any) -> None:
    """Start Ray with so many CPUs; ``options``: more of `ray.init`. In `own_signals`, where the program has handlers.

    Once in some hundred starts Ray's raylet never comes up (2.60); what was started of it ends with the program, and
    another Ray is tried. Raises StartFailed where that fails as well.
    """
    import ray

    for left in reversed(range(TRIES)):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # of no narrower type, where the raylet does not come up
            if type(error) is not Exception or not left:
                raise StartFailed(f"Ray could not be started: {error}") from error
            log.warning("Ray did not come up: trying once more")
        else:
            return


@contextmanager
def own_signals() -> Iterator[None]:
    """For the start of a Ray, which puts handlers of signals in place: those that the program had come back."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in handlers.items():
                if callable(handler):
                    signal.signal(name, handler)
