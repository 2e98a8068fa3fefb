"""One run of Locust: users that post the same requests in turn, as fast as answers come or at a fixed rate.

Settings come from the environment variable GUARD_LOAD, as JSON: path, method, headers, bodies (a folder of files),
users, rate (requests a second of all users together, at random times; 0: as fast as answers come), warm_up_s, seconds,
out (where the milliseconds of every request answered in so many seconds after the warm-up go, as JSON, with the number
of failed ones).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any, cast

import gevent
from locust import FastHttpUser, events, task

SETTINGS = json.loads(os.environ["GUARD_LOAD"])
BODIES = itertools.cycle([path.read_bytes() for path in sorted(Path(SETTINGS["bodies"]).glob("*.bin"))] or [b""])
milliseconds: list[float] = []
failures: list[str] = []
begun = time.monotonic()


def note(response_time: float, exception: Exception | None, **_: Any) -> None:
    if not 0.0 <= time.monotonic() - begun - SETTINGS["warm_up_s"] < SETTINGS["seconds"]:
        return
    if exception is None:
        milliseconds.append(response_time)
    else:
        failures.append(str(exception))


def write(**_: Any) -> None:
    Path(SETTINGS["out"]).write_text(json.dumps({"milliseconds": milliseconds, "failures": failures}))


events.request.add_listener(note)  # type: ignore[no-untyped-call]
events.quitting.add_listener(write)  # type: ignore[no-untyped-call]


def pause(_user: FastHttpUser) -> float:
    """Exponential, so that the requests of many users arrive as a Poisson process; none as fast as answers come."""
    return random.expovariate(SETTINGS["rate"] / SETTINGS["users"]) if SETTINGS["rate"] else 0.0


class Client(FastHttpUser):
    """One connection."""

    wait_time = pause

    def on_start(self) -> None:
        """Users at a fixed rate begin with a pause, too."""
        gevent.sleep(pause(self))

    @task
    def ask(self) -> None:
        if SETTINGS["method"] == "GET":
            self.client.get(SETTINGS["path"])
        else:
            self.client.post(SETTINGS["path"], data=cast(Any, next(BODIES)), headers=SETTINGS["headers"])
