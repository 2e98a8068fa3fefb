"""What a server is told: values that check themselves when they are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from guard.errors import BadSetting

Mode = Literal["observe", "flag", "reject", "correct"]
OnFailure = Literal["open", "closed"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
S = TypeVar("S", bound="Settings")
MODES: tuple[Mode, ...] = ("observe", "flag", "reject", "correct")


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error instead of a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Live(Settings):
    """What may change while the server runs. A request takes one snapshot and keeps it.

    mode: what happens to a flagged image. expose_scores: answers carry score and p-value, which tell an attacker
    how close a trigger came. on_failure: answer unguarded (open) or refuse (closed) when there is no verdict.
    """

    mode: Mode = "flag"
    expose_scores: bool = False
    on_failure: OnFailure = "open"


class Limits(Settings):
    """The most that one request, and one queue, may hold. decoded_pixels: of all its image files together."""

    body_bytes: int = Field(default=16 * 2**20, ge=1)
    images: int = Field(default=128, ge=1)
    decoded_pixels: int = Field(default=32_000_000, ge=1)
    queued_images: int = Field(default=512, ge=1)


class ServeConfig(Live):
    """One artifact behind one address.

    artifact: the folder that ``guard fit`` wrote. name: the model's name in routes and metrics (default: the
    folder's name). max_batch_size: images that run at once; a request is never split. corrected_deadline_s: the
    corrected network counts as failed after this long (None: never). stuck_after_s: a pass that takes longer makes
    the replica unhealthy. metrics_dir: an existing, empty folder of this node that the replicas share.
    """

    artifact: Path
    name: str = Field(pattern=NAME)
    version: str = Field(default="1", pattern=NAME)
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    max_batch_size: int = Field(default=32, ge=1)
    corrected_deadline_s: float | None = Field(default=None, gt=0)
    stuck_after_s: float = Field(default=60.0, gt=0)
    request_timeout_s: float = Field(default=60.0, gt=0)
    limits: Limits = Field(default_factory=Limits)
    metrics_dir: Path | None = None

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


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """``kind(**values)``, with pydantic's report turned into one sentence that names the first bad key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        got = f", got {first['input']!r}" if first["type"] not in ("missing", "extra_forbidden") else ""
        raise BadSetting(f"setting {field}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}", field=field) from error
