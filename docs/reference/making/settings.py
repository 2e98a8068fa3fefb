"""The settings: every key of the configuration file, from the typed settings and their docstrings."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from deployments.config import MODEL_WORDS, SERVER_WORDS, SWITCHABLE, ServeConfig
from deployments.document import Application, Document, HttpOptions
from deployments.keys import VARIABLE
from deployments.settings import Settings
from deployments.upstream import OriginalSettings
from making.markdown import code, kind_of, link, sections, sentence, table

MIB = 2**20
NAMES = r"[a-z_]+\*?(?: \([^)]*\))?"
DEFAULT = re.compile(r"(?:default|None): ([^;)]*)")
KEYS = re.compile(rf"(?:(?<=^)|(?<=[.;] ))({NAMES}(?:, {NAMES})*): ")


def described(kind: type[Settings]) -> dict[str, str]:
    """What the docstrings of a kind of settings and of those before it say of each key: ``key: words. key, key: …``."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, Settings) or owner is Settings:
            continue
        parts = KEYS.split(" ".join((inspect.getdoc(owner) or "").split()))
        for names, words in zip(parts[1::2], parts[2::2], strict=True):
            for name in re.sub(r" \([^)]*\)", "", names).split(", "):
                keys = [key for key in kind.model_fields if re.fullmatch(name.replace("*", ".*"), key)]
                found |= dict.fromkeys(keys, sentence(words))
    return found


def _kinds() -> dict[type[Settings], str]:
    """All kinds of settings that the file may hold, and where; and those of a deployment in composition."""
    found: dict[type[Settings], str] = {}
    waiting: list[tuple[type[Settings], str]] = [
        (Document, ""),
        (HttpOptions, "http_options"),
        (Application, "applications[]"),
        (ServeConfig, "applications[].args"),
    ]
    for kind, place in waiting:  # which grows
        if kind in found:
            continue
        found[kind] = place
        for key, field in kind.model_fields.items():
            many = "[]" if "tuple" in str(field.annotation) else ""
            waiting += [(below, f"{place}.{key}{many}".strip(".")) for below in _nested(field.annotation)]
    return found | {OriginalSettings: ""}


def _nested(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _nested(part)]


def page() -> str:
    """Every key of the configuration file, kind by kind."""
    rows = [[code(f"GUARD_{word.upper()}"), f"`http_options.{word}`"] for word in ("host", "port")]
    rows += [[code(f"GUARD_{word.upper()}"), f"`{word}` of `args`"] for word in SERVER_WORDS]
    rows += [
        [f"`GUARD_{word.upper()}`, `GUARD_NAME_{word.upper()}`", f"`{word}` of every model, of the model NAME"]
        for word in MODEL_WORDS
    ]
    rows.append([code(VARIABLE), "[keys](../endpoint.md#api-keys), beside those of the file"])
    return sections(
        "# Settings",
        "All keys of the configuration file; how they go together, and how they change in a running server, tells "
        "[its page](../configuration.md). An unknown key is refused. *In place*: it may change without new replicas. "
        "A key without words is [Ray Serve's own](https://docs.ray.io/en/latest/serve/production-guide/config.html), "
        "or its name says it.",
        *(_settings(kind, place) for kind, place in _kinds().items()),
        "## In the environment\n\nThey win over the file and over options.",
        table(("variable", "sets"), rows),
    )


def _settings(kind: type[Settings], place: str) -> str:
    words = described(kind)
    properties = kind.model_json_schema()["properties"]
    live = SWITCHABLE & {*kind.model_fields} if "mode" in kind.model_fields else set()
    rows = []
    for key, field in kind.model_fields.items():
        below = _nested(field.annotation)
        told = words.get(key, _summary(below[0]) if below else "")
        default = field.get_default(call_default_factory=True)
        said = DEFAULT.search(told)
        if field.is_required() or (default is None and said):
            default = said[1] if said else "required"
        elif default is None:
            default = "none"
        else:
            default = "" if isinstance(default, Settings) else _plain(key, default)
        form = "list of " * (properties[key].get("type") == "array") + link(below[0].__name__) if below else ""
        changes = ["yes" if key in live else ""] if live else []
        rows.append([code(key), form or kind_of(properties[key]), default, *changes, told])
    titles = ("key", "kind", "default", *(("in place",) if live else ()), "what")
    where = f" At `{place}`." if place else ""
    return sections(f"## {kind.__name__}", _summary(kind) + where, table(titles, rows))


def _summary(kind: type[Settings]) -> str:
    """The first paragraph of its docstring, before it tells of keys."""
    first = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return KEYS.split(first)[0].strip().replace("``", "`")


def _plain(key: str, value: Any) -> str:
    return code(json.dumps(value)) + (f" ({value // MIB} MiB)" if "bytes" in key and value % MIB == 0 else "")
