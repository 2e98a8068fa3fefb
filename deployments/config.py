"""What a server is told: values that check themselves when they are built."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from guard.errors import BadSetting

Mode = Literal["observe", "flag", "reject", "correct"]
OnFailure = Literal["open", "closed"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
REFUSAL = "refusal"
S = TypeVar("S", bound="Settings")
MODES: tuple[Mode, ...] = ("observe", "flag", "reject", "correct")


def _refusal(key: str, sentence: str) -> PydanticCustomError:
    """What a validator of a whole object raises about one of its keys."""
    return PydanticCustomError(REFUSAL, "{sentence}", {"key": key, "sentence": sentence})


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error instead of a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, 1)
                instead = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.model_fields)}"
                raise _refusal(str(key), f"no such setting: {instead}")
        return values


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
            raise _refusal("sample", f"it is for mode observe: in mode {self.mode} every request is judged")
        return self


class Limits(Settings):
    """The most that one request, and one queue, may hold. decoded_pixels: of all its image files together."""

    body_bytes: int = Field(default=16 * 2**20, ge=1)
    images: int = Field(default=128, ge=1)
    decoded_pixels: int = Field(default=32_000_000, ge=1)
    queued_images: int = Field(default=512, ge=1)


class ModelConfig(Live):
    """One artifact under one name.

    artifact: the folder that ``guard fit`` wrote. name: the model's name in routes and metrics (default: the
    folder's name). device: cpu, or cuda where there is one. max_batch_size: images that run at once; a request is
    never split. threads: 2 runs both networks of a request at the same time, 1 one after the other; auto is 2 where
    the replica may use two cores of a CPU. corrected_deadline_s: the corrected network counts as failed after this
    long (None: never). stuck_after_s: a pass that takes longer makes the replica unhealthy.
    """

    artifact: Path
    name: str = Field(pattern=NAME)
    version: str = Field(default="1", pattern=NAME)
    device: str = "cpu"
    max_batch_size: int = Field(default=32, ge=1)
    threads: Literal["auto", 1, 2] = "auto"
    corrected_deadline_s: float | None = Field(default=None, gt=0)
    stuck_after_s: float = Field(default=60.0, gt=0)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="before")
    @classmethod
    def _name_from_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") is None and "artifact" in values:
            return values | {"name": Path(values["artifact"]).resolve().name}
        return values

    @field_validator("artifact")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.resolve()

    @property
    def live(self) -> Live:
        """The part that may change while the server runs."""
        return Live(**self.model_dump(include=set(Live.model_fields)))


class ServeConfig(Settings):
    """Models behind one address, each replica holding all of them.

    replicas: processes. cpus_per_replica: what Ray reserves for each. metrics_dir: a folder of each node that its
    replicas share (default: one within Ray's session).
    """

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    metrics_dir: Path | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise _refusal("models", f"two are named {name}: give one of them another name")
        return self


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """``kind(**values)``, with pydantic's report turned into one sentence that names the first bad key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = first["type"] == REFUSAL
        field = ".".join(str(part) for part in (*first["loc"], *([first["ctx"]["key"]] if ours else [])))
        got = "" if ours or first["type"] == "missing" else f", got {first['input']!r}"
        raise BadSetting(f"setting {field}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}", field=field) from error
