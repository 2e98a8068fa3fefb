"""Settings: values that check themselves when they are built, and errors that name the key."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from guard.errors import BadSetting

REFUSAL = "refusal"
SECRETS = {"keys", "headers", "ssl_keyfile_password"}  # settings whose value no message repeats
ADDRESSES = {"url", "upstream", "events"}  # nor of these, where people put passwords
S = TypeVar("S", bound="Settings")


def refusal(key: str, sentence: str) -> PydanticCustomError:
    """What a validator of a whole object raises about one of its keys; that of a single setting gives ""."""
    return PydanticCustomError(REFUSAL, "{sentence}", {"key": key, "sentence": sentence})


def address(key: str, value: str, example: str = "http://host:port") -> SplitResult:
    """An HTTP address in its parts. What is refused is not repeated: it may hold a password."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address, a name that no server can have
        usable = False
    if not usable or not value.isprintable() or " " in value:
        raise refusal(key, f"expected {example} or {example.replace('http', 'https', 1)}")
    if parts.username or parts.password:
        raise refusal(key, "it is no place for credentials, as logs show it: give them as headers.authorization")
    return parts


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
                raise refusal(str(key), f"no such setting: {instead}")
        return values


def checked(kind: type[S], values: dict[str, Any], prefix: str = "") -> S:
    """``kind(**values)``, with pydantic's report turned into one sentence that names the first bad key.

    ``prefix``: where the values stand in a larger whole."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = first["type"] == REFUSAL
        places = [str(part) for part in first["loc"]]
        key = first["ctx"]["key"] if ours else ""
        field = prefix + ".".join([*places, key] if key else places)
        silent = ours or first["type"] == "missing" or SECRETS & {*places} or ADDRESSES & {*places[-1:]}
        got = "" if silent else f", got {first['input']!r}"
        raise BadSetting(f"setting {field}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}", field=field) from error
