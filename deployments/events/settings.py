"""What is told and kept of flagged requests, and where. Off unless a model says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, model_validator

from deployments.settings import Settings, address, refusal
from deployments.upstream import OURS, filled


class EventSettings(Settings):
    """Events for flagged requests, to an address or into a file.

    url: gets each event by POST. headers: sent with each; ``${NAME}`` is replaced from the environment. timeout_s: for
    a connection, and for its answer. retries: after the first try. file: gets one line an event; max_bytes: its size
    before it becomes ``file.1``; keep: how many of those stay. payloads: also tell what the request held and what was
    answered. queued: requests that may wait; queued_bytes: their images in memory, which wait with them where payloads
    are on. component, endpoint, service, namespace: what events say of where they come from, as KServe names it; no
    service: the model's name.
    """

    url: str | None = None
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    timeout_s: float = Field(default=5.0, gt=0)
    retries: int = Field(default=3, ge=0, le=10)
    file: Path | None = None
    max_bytes: int = Field(default=64 * 2**20, ge=1)
    keep: int = Field(default=4, ge=1, le=1000)
    payloads: bool = False
    queued: int = Field(default=256, ge=1)
    queued_bytes: int = Field(default=64 * 2**20, ge=1)
    component: str = Field(default="predictor", min_length=1)
    endpoint: str = Field(default="default", min_length=1)
    service: str | None = Field(default=None, min_length=1)
    namespace: str = Field(default="default", min_length=1)

    @model_validator(mode="after")
    def _one_place(self) -> EventSettings:
        if (self.url is None) == (self.file is None):
            raise refusal("url", "expected url or file, one of them: leave events out to have none")
        if self.url is None and self.headers:
            raise refusal("headers", "they go with url")
        if self.url is not None:
            address("url", self.url, "http://host:port/path")
        if self.file is not None:
            _check_absolute("file", self.file)
        for name in self.headers:
            if name.lower() in OURS:
                raise refusal("headers", f"{name} belongs to one connection or body: leave it out")
        return self

    def secrets(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """``headers`` as they are sent, names in lower case.

        Raises:
            BadSetting: a variable is not in the environment.
        """
        return filled(self.headers, "events.headers", environ)


class QuarantineSettings(Settings):
    """A folder of flagged images.

    folder: of one model, on each node; its replicas share it. max_images, max_bytes: of images and their lines, beyond
    which the oldest go; max_age_days: after which an image goes. queued: requests that may wait to be kept;
    queued_bytes: their images in memory.
    """

    folder: Path
    max_images: int = Field(default=1000, ge=1)
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    max_age_days: float = Field(default=7.0, gt=0)
    queued: int = Field(default=64, ge=1)
    queued_bytes: int = Field(default=64 * 2**20, ge=1)

    @model_validator(mode="after")
    def _on_every_node(self) -> QuarantineSettings:
        _check_absolute("folder", self.folder)
        return self


def _check_absolute(key: str, path: Path) -> None:
    """Replicas run elsewhere than the command, so a relative path would name another place."""
    if not path.is_absolute():
        raise refusal(key, f"{path} is relative: give a path that is the same on every node")
