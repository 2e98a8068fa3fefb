"""Markdown in a few words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{value}`"


def sections(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def anchor(title: str) -> str:
    """The anchor that GitHub gives a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def link(title: str) -> str:
    return f"[{title}](#{anchor(title)})"


def sentence(text: str) -> str:
    """With a capital at its start and a full stop at its end."""
    text = text.strip().rstrip(".;")
    return f"{text[:1].upper()}{text[1:]}{'' if text[-1:] in '?…' else '.'}"


def kind_of(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in words."""
    if "anyOf" in schema:
        return " or ".join(kind_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(code(_word(one)) for one in schema.get("enum", [schema.get("const")]))
    if schema.get("format") == "path":
        return "path"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema['items'])}s" if isinstance(schema.get("items"), dict) else "list"
    name = {"string": "text", "integer": "whole number", "object": "mapping", "boolean": "true, false"}
    words = name.get(schema.get("type", ""), schema.get("type", "anything"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema]
    return f"{words} {', '.join(limits)}".strip()


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
