"""API keys: who may ask what. Without a key the server is open.

===============  =================================================================================================
role             may
===============  =================================================================================================
inference        ask for answers, metadata and the OpenAPI document
scores           the same; answers carry score and p-value even where ``expose_scores`` is off, except in observe
administration   everything: the above, ``/metrics``, and in metadata the facts of the artifact
===============  =================================================================================================

A file of keys has one line each, ``role key`` or ``role sha256:HEX``, and comments after ``#`` at a line's start; it is
read again when it changes. The environment variable has ``role:key`` or ``role:sha256:HEX``, separated by commas. Keys
are held as SHA-256 digests alone, which is enough for what nobody can guess: short keys are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from deployments.errors import Forbidden, Unauthorized
from deployments.settings import Settings
from guard.errors import BadSetting

Role = Literal["inference", "scores", "administration"]
Roles = frozenset[Role]
ROLES: tuple[Role, ...] = get_args(Role)
IMPLIED: dict[Role, Roles] = {
    "inference": frozenset({"inference"}),
    "scores": frozenset({"inference", "scores"}),
    "administration": frozenset(ROLES),
}
# Without keys everybody may do everything, and the setting expose_scores alone decides on scores.
OPEN: Roles = frozenset({"inference", "administration"})
VARIABLE = "GUARD_API_KEYS"
SHORTEST = 16
RECHECK_S = 1.0
KEY = re.compile(r"[!-~]+")
HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
log = logging.getLogger(__name__)


class KeySettings(Settings):
    """Where keys come from; both places may hold some.

    file: one line a key. environment: take those of the variable GUARD_API_KEYS, if it is set.
    """

    file: Path | None = None
    environment: bool = True


class Held(NamedTuple):
    """One key, as its SHA-256 digest. It shows its role alone."""

    role: Role
    digest: bytes

    def __repr__(self) -> str:
        return f"Held({self.role})"


class Keys:
    """The keys of one server.

    Args:
        fixed: keys that stay. file: more keys, read now and again whenever the file has changed, checked at most once
            a second; a new version that cannot be used is logged, and the keys of the one before stay. clock: seconds.

    Raises:
        BadSetting: the file cannot be read, or does not hold keys.
    """

    def __init__(
        self, fixed: Iterable[Held] = (), file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fixed = tuple(fixed)
        self._file = file
        self._clock = clock
        self._seen: tuple[int, ...] | None = None
        self._filed: tuple[Held, ...] = ()
        self._checked = clock()
        if file is not None:
            self._seen = _signature(file)
            self._filed = _read(file)

    @classmethod
    def from_settings(cls, settings: KeySettings, environ: Mapping[str, str] = os.environ) -> Keys:
        """The keys of the file and of the environment. A variable that is set and empty is refused, not open."""
        text = environ.get(VARIABLE) if settings.environment else None
        return cls(() if text is None else parse_variable(text), settings.file)

    def __repr__(self) -> str:
        return f"Keys({len(self._fixed) + len(self._filed)})"

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._file is not None or bool(self._fixed)

    def roles(self, authorization: str | None, api_key: str | None) -> Roles:
        """What the holder of the key may do; the headers are Authorization (``Bearer KEY``) and X-API-Key, which counts
        where both are given.

        Raises:
            Unauthorized: keys are required, and none or an unknown one is given.
        """
        if not self.required:
            return OPEN
        scheme, _, token = (authorization or "").strip().partition(" ")
        given = api_key or (token.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise Unauthorized(
                "authorization: this server takes requests with an API key: send it as Authorization: Bearer KEY or "
                "as X-API-Key: KEY",
                field="authorization",
            )
        digest = _digest(given)
        found: Roles = frozenset()
        for held in self._current():
            if hmac.compare_digest(held.digest, digest):
                found |= IMPLIED[held.role]
        if not found:
            field = "x-api-key" if api_key else "authorization"
            raise Unauthorized(
                f"{field}: unknown API key: it may have been replaced; ask who runs this server", field=field
            )
        return found

    def require(self, role: Role, authorization: str | None, api_key: str | None) -> Roles:
        """As ``roles``, of a holder who must have ``role``.

        Raises:
            Unauthorized: as ``roles``. Forbidden: the key is known and has not the role.
        """
        found = self.roles(authorization, api_key)
        if role not in found:
            raise Forbidden(
                f"authorization: this takes a key of the role {role}: yours has {', '.join(sorted(found))}",
                field="authorization",
            )
        return found

    def _current(self) -> tuple[Held, ...]:
        """All keys, those of the file as it is now."""
        if self._file is not None and self._clock() - self._checked >= RECHECK_S:
            self._checked = self._clock()
            self._refresh(self._file)
        return self._fixed + self._filed

    def _refresh(self, file: Path) -> None:
        signature = _signature(file)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._filed = _read(file)
        except BadSetting as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%s: read again, %d keys", file, len(self._filed))


def parse_file(text: str, name: str) -> tuple[Held, ...]:
    """The keys of a file's text; ``name`` is the file's in errors, which never repeat what a line holds."""
    return _parse(_lines(text, name), name)


def parse_variable(text: str) -> tuple[Held, ...]:
    """The keys of the environment variable."""
    entries = [one.strip() for one in text.split(",") if one.strip()]
    named = ((f"{VARIABLE}, entry {i}", *one.partition(":")[::2]) for i, one in enumerate(entries, 1))
    return _parse(named, VARIABLE)


def _lines(text: str, name: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            role, *rest = line.split(None, 1)
            yield f"{name}, line {number}", role, "".join(rest)


def _parse(entries: Iterable[tuple[str, str, str]], name: str) -> tuple[Held, ...]:
    """The keys of (place, role, key); errors name the place and never what it holds."""
    held = tuple(_held(place, role.strip(), key.strip()) for place, role, key in entries)
    if not held:
        raise BadSetting(f"keys: {name} holds no key: add one, or take the setting away to be open", field="keys")
    return held


def _held(place: str, role: str, key: str) -> Held:
    known: Role | None = next((one for one in ROLES if one == role), None)
    if known is None:
        raise BadSetting(f"keys: {place}: expected a role first, one of {', '.join(ROLES)}", field="keys")
    if key.startswith("sha256:"):
        hashed = HASHED.fullmatch(key)
        if hashed is None:
            raise BadSetting(f"keys: {place}: expected 64 hexadecimal digits after sha256:", field="keys")
        return Held(known, bytes.fromhex(hashed[1]))
    if len(key) < SHORTEST or not KEY.fullmatch(key):
        raise BadSetting(
            f"keys: {place}: expected a key of {SHORTEST} or more letters, digits and signs without spaces: make one "
            "with: openssl rand -hex 32",
            field="keys",
        )
    return Held(known, _digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()


def _signature(file: Path) -> tuple[int, ...] | None:
    """What changes when the file does; None where it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read(file: Path) -> tuple[Held, ...]:
    """The keys of the file. Warns where others than its owner may read or write it."""
    try:
        text = file.read_text("utf-8")
        found = file.stat()
    except OSError as error:
        raise BadSetting(f"keys.file: {file}: {error.strerror}: name a file of keys", field="keys.file") from None
    except UnicodeDecodeError:
        raise BadSetting(f"keys.file: {file}: not text in UTF-8", field="keys.file") from None
    ours = found.st_uid == os.getuid()
    if found.st_mode & (stat.S_IRWXO | (stat.S_IRWXG if ours else stat.S_IWGRP)):  # else the group is how we read it
        log.warning("%s: others than its owner may read or write this file of keys: chmod 600 it", file)
    return parse_file(text, str(file))
