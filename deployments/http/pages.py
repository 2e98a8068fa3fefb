"""The OpenAPI document as a page to read: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from deployments.http.headers import page_policy

TEMPLATE = Path(__file__).with_name("openapi.html")


def page(document: Mapping[str, Any]) -> str:
    """``document`` as HTML, every text in it escaped."""
    return _template().render(document=document)


@cache
def policy() -> str:
    """The Content-Security-Policy under which the page looks as it should: its own style sheet, by digest."""
    style = TEMPLATE.read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    return page_policy(base64.b64encode(hashlib.sha256(style.encode()).digest()).decode())


def _code(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    parts = [escape(part) if index % 2 == 0 else Markup("<code>%s</code>") % part
             for index, part in enumerate(text.split("`"))]  # fmt: skip
    return Markup("").join(parts)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    return environment.from_string(TEMPLATE.read_text("utf-8"))
