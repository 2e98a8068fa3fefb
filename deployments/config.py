"""What a server is told: values that check themselves when they are built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from deployments.events.settings import EventSettings, QuarantineSettings
from deployments.keys import KeySettings
from deployments.settings import Settings, refusal
from deployments.upstream import UpstreamSettings
from guard.errors import BadSetting

Mode = Literal["observe", "flag", "reject", "correct"]
OnFailure = Literal["open", "closed"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
SERVER_WORDS = ("replicas", "cpus_per_replica", "metrics_dir")
MODEL_WORDS = ("mode", "expose_scores", "on_failure", "threshold", "sample", "artifact", "version", "device")
MODES: tuple[Mode, ...] = ("observe", "flag", "reject", "correct")


class Live(Settings):
    """What may change while the server runs. A request takes one snapshot and keeps it.

    mode: what happens to a flagged image. expose_scores: answers carry score and p-value, which tell an attacker
    how close a trigger came. on_failure: answer unguarded (open) or refuse (closed) when there is no verdict.
    threshold: flag below this p-value (None: the artifact's; mmdf alone has p-values). sample: the share of requests
    that get a verdict, in mode observe; in the other modes all do.
    """

    mode: Mode = "flag"
    expose_scores: bool = False
    on_failure: OnFailure = "open"
    threshold: float | None = Field(default=None, gt=0, lt=1)
    sample: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _all_are_judged(self) -> Live:
        if self.sample < 1 and self.mode != "observe":
            raise refusal("sample", f"it is for mode observe: in mode {self.mode} every request is judged")
        return self


class Limits(Settings):
    """The most that one request, and one queue, may hold. body_bytes: of a request's body. images: in a request.
    decoded_pixels: of all its image files together. queued_images: of all requests that wait in a replica.
    """

    body_bytes: int = Field(default=16 * 2**20, ge=1)
    images: int = Field(default=128, ge=1)
    decoded_pixels: int = Field(default=32_000_000, ge=1)
    queued_images: int = Field(default=512, ge=1)


class ModelConfig(Live):
    """One artifact under one name.

    artifact: the folder that ``guard fit`` wrote. name: the model's name in routes and metrics (default: the
    folder's name). version: in routes and answers. device: cpu, or cuda where there is one. max_batch_size: images
    that run at once; a request is never split. threads: 2 runs both networks of a request at the same time, 1 one
    after the other; auto is 2 where the replica may use two cores of a CPU. corrected_deadline_s: the corrected
    network counts as failed after this long (None: never). revision: any text; a change of it loads the artifact
    again, though its path and version are the same. stuck_after_s: a pass that takes longer makes the replica
    unhealthy. upstream: where the original network runs, if it is not to run here. events: where flagged requests
    are told of (None: nowhere). quarantine: where flagged images are kept (None: nowhere).
    """

    artifact: Path
    name: str = Field(pattern=NAME)
    version: str = Field(default="1", pattern=NAME)
    revision: str = ""
    device: str = "cpu"
    max_batch_size: int = Field(default=32, ge=1)
    threads: Literal["auto", 1, 2] = "auto"
    corrected_deadline_s: float | None = Field(default=None, gt=0)
    stuck_after_s: float = Field(default=60.0, gt=0)
    limits: Limits = Field(default_factory=Limits)
    upstream: UpstreamSettings | None = None
    events: EventSettings | None = None
    quarantine: QuarantineSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_from_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") is None and values.get("artifact") is not None:
            return values | {"name": name_of(values)}
        return values

    @property
    def live(self) -> Live:
        """The part that may change while the server runs."""
        return Live(**self.model_dump(include=set(Live.model_fields)))


SWITCHABLE = {*Live.model_fields, "artifact", "version", "revision"}


class GrpcSettings(Settings):
    """Where gRPC is served, by every replica of a node itself. host: the address that it listens at. port: which the
    replicas of a node share.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8001, ge=1, le=65535)


class ServeConfig(Settings):
    """Models behind one address, each replica holding all of them.

    replicas: processes. cpus_per_replica, gpus_per_replica: what Ray reserves for each (GPUs by default: one where a
    model runs on one; without any reserved, Ray hides them from the process). grpc: serve gRPC as well (None: no).
    keys: who may ask (without any key: everybody). metrics_dir: a folder of each node that its replicas share (default:
    one within Ray's session).
    """

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: float | None = Field(default=None, ge=0)
    grpc: GrpcSettings | None = None
    keys: KeySettings = Field(default_factory=KeySettings)
    metrics_dir: Path | None = None

    @property
    def gpus(self) -> float:
        """What Ray reserves of GPUs for a replica."""
        if self.gpus_per_replica is not None:
            return self.gpus_per_replica
        return float(any(model.device != "cpu" for model in self.models))

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise refusal("models", f"two are named {name}: give one of them another name")
        folders = [model.quarantine.folder for model in self.models if model.quarantine is not None]
        for folder in folders:
            if folders.count(folder) > 1:
                raise refusal("models", f"two keep flagged images in {folder}: give one of them another folder")
        return self


class BaseModelConfig(ModelConfig):
    """A model as ``args`` may leave it: ``user_config`` says the rest."""

    artifact: Path | None = None  # type: ignore[assignment]


class BaseConfig(ServeConfig):
    """`ServeConfig` before ``user_config``."""

    models: tuple[BaseModelConfig, ...] = Field(min_length=1)


def overlaid(models: Sequence[Any], said: Mapping[str, Any]) -> list[Any]:
    """``models``, settings as plain values, with what ``said`` says of each by its name.

    Raises:
        BadSetting: ``said`` names a model that is not there, or a setting that no running replica can change.
    """
    names = [name_of(model) for model in models]
    for name, settings in said.items():
        if name not in names:
            raise BadSetting(
                f"user_config.{name}: no such model: expected {', '.join(names)}", field=f"user_config.{name}"
            )
        for key in settings if isinstance(settings, dict) else ["it"]:
            if key not in SWITCHABLE:
                raise BadSetting(
                    f"user_config.{name}: {key} cannot change in a running replica: expected settings out of "
                    f"{', '.join(sorted(SWITCHABLE))}",
                    field=f"user_config.{name}",
                )
    return [
        model | said.get(name, {}) if isinstance(model, dict) else model
        for name, model in zip(names, models, strict=True)
    ]


def name_of(model: Any) -> str:
    """The name of a model given as plain values, by default the folder's."""
    values = model if isinstance(model, dict) else {}
    return str(values.get("name") or Path(str(values.get("artifact", ""))).resolve().name)


def overridden(args: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """``args`` of a `ServeConfig` with what the environment says in their place.

    GUARD_REPLICAS and the like set one value of the server; GUARD_MODE and the like set one of every model, and
    GUARD_RESNET18_MODE of the model resnet18. Only what a single word can say is read: no lists, no nested settings.
    """
    args = args | {key: environ[f"GUARD_{key.upper()}"] for key in SERVER_WORDS if f"GUARD_{key.upper()}" in environ}
    if not isinstance(args.get("models"), list):
        return args
    models = []
    for given in args["models"]:
        if isinstance(given, dict):
            own = "GUARD_" + re.sub(r"\W", "_", name_of(given).upper()) + "_"
            said = {word: environ.get(own + word.upper(), environ.get("GUARD_" + word.upper())) for word in MODEL_WORDS}
            given = given | {word: value for word, value in said.items() if value is not None}
        models.append(given)
    return args | {"models": models}
