"""The built-in page as one document: it holds no data, which its script asks of ``/metrics/state``."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from deployments.http.headers import page_policy

FOLDER = Path(__file__).parent
SCRIPTS = ("dom.js", "numbers.js", "charts.js", "panels.js", "live.js")  # one module, in this order
# Beside its own style and script: it asks this server alone, shows pictures that came with the answer, and the browser
# itself refuses to make markup of text.
MORE = ("connect-src 'self'", "img-src data:", "require-trusted-types-for 'script'", "trusted-types 'none'")


@cache
def shell() -> str:
    """The page."""
    style, script = _insides()
    html = (FOLDER / "page.html").read_text("utf-8")
    return html.replace("<style></style>", f"<style>{style}</style>").replace("></script>", f">{script}</script>")


@cache
def policy() -> str:
    """The Content-Security-Policy under which the page works."""
    style, script = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in _insides())
    return "; ".join((page_policy(style, scripts=(script,)), *MORE))


@cache
def _insides() -> tuple[str, str]:
    """Style sheet and script."""
    style = (FOLDER / "page.css").read_text("utf-8")
    return style, "\n".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
