"""Where the original network runs, if not beside its guard, and how it is asked there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote

from pydantic import Field, field_validator, model_validator

from deployments.settings import Settings, address, refusal
from guard.errors import BadSetting

Outputs = Literal["logits", "probabilities"]
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Of the connection or of the body: the guard's own requests have their own.
OURS = frozenset(
    (
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "inference-header-content-length",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


class UpstreamSettings(Settings):
    """A model on an Open Inference Protocol v2 server.

    url: its address, up to ``/v2``. model, version: its name there (no version: the server's choice). input, output:
    the names of its tensors. outputs: what the output is; probabilities become log p. datatype: how images travel.
    mean, std: one value a channel; FP32 images x in [0, 1] are sent as (x − mean) / std, for a server that wants them
    normalised. binary: raw tensors instead of JSON. timeout_s: for the whole answer; connect_timeout_s: for its
    connection. headers: sent with every request; ``${NAME}`` is replaced from the environment. forward: headers of
    the client's request that are passed on. verify: before the first request, compare with the artifact's original
    network; tolerance: how far logits may be off, as a share of their range.
    """

    url: str
    model: str = Field(min_length=1)
    version: str | None = Field(default=None, min_length=1)
    input: str = "images"
    output: str = "logits"
    outputs: Outputs = "logits"
    datatype: Literal["FP32", "UINT8"] = "FP32"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    binary: bool = True
    timeout_s: float = Field(default=10.0, gt=0)
    connect_timeout_s: float = Field(default=2.0, gt=0)
    headers: dict[str, str] = Field(default_factory=dict)
    forward: tuple[str, ...] = ("traceparent", "tracestate", "x-request-id")
    verify: bool = True
    tolerance: float = Field(default=0.05, gt=0)

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = address("", value)
        if parts.query or parts.fragment or re.search(r"/v2(/|$)", parts.path):
            raise refusal("", "expected the address up to /v2, without it: the model goes into upstream.model")
        return value.rstrip("/")

    @field_validator("forward")
    @classmethod
    def _forwardable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        lower = tuple(name.lower() for name in value)
        for name in lower:
            if name in OURS:
                raise refusal("", f"{name} belongs to one connection or body: leave it out")
        return lower

    @field_validator("headers")
    @classmethod
    def _fixed(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name.lower() in OURS:
                raise refusal("", f"{name} belongs to one connection or body: leave it out")
        return value

    @model_validator(mode="after")
    def _normalisation(self) -> UpstreamSettings:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise refusal("mean", "mean and std go together, one value a channel each")
        if any(value <= 0 for value in self.std or ()):
            raise refusal("std", "expected values above 0")
        if self.mean and self.datatype == "UINT8":
            raise refusal("datatype", "normalised images are FP32: set datatype FP32, or leave mean and std out")
        return self

    @property
    def normalisation(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """(mean, std)."""
        return self.mean, self.std

    @property
    def path(self) -> str:
        """The model's address on its server."""
        version = "" if self.version is None else f"/versions/{quote(self.version, safe='')}"
        return f"/v2/models/{quote(self.model, safe='')}{version}"

    def secrets(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """``headers`` as they are sent, names in lower case.

        Raises:
            BadSetting: a variable is not in the environment.
        """

        return filled(self.headers, "upstream.headers", environ)


def filled(headers: Mapping[str, str], setting: str, environ: Mapping[str, str]) -> dict[str, str]:
    """``headers`` with every ``${NAME}`` replaced from the environment, names in lower case. setting: what errors call
    them.

    Raises:
        BadSetting: a variable is not in the environment.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise BadSetting(
                f"setting {setting}.{name}: the environment has no {found[1]}: set it where the replicas run",
                field=f"{setting}.{name}",
            )
        return environ[found[1]]

    sent = {}
    for name, text in headers.items():
        sent[name.lower()] = VARIABLE.sub(value, text)
    return sent


class OriginalSettings(Settings):
    """How a deployment that runs the original network is asked.

    method: takes images float32 [n, C, H, W] in [0, 1], as a numpy array, and returns [n, K]. outputs: what these are.
    timeout_s: for one answer. verify, tolerance: see `UpstreamSettings`.
    """

    method: str = Field(default="__call__", min_length=1)
    outputs: Outputs = "logits"
    timeout_s: float = Field(default=30.0, gt=0)
    verify: bool = True
    tolerance: float = Field(default=0.05, gt=0)
