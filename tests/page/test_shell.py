"""The page before any browser: what is sent, under which policy, to whom."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from pathlib import Path

import httpx
import pytest

from deployments.http.headers import STRICT
from deployments.http.page.shell import FOLDER, SCRIPTS, policy, shell
from deployments.keys import Keys, parse_variable

KEYS = "administration:admin-0123456789abcdef"


@pytest.mark.parametrize("path", ["/guard", "/guard/"])
@pytest.mark.parametrize("keys", [None, Keys(parse_variable(KEYS))])
def test_the_page_takes_no_key_for_it_holds_nothing(serve, replica, path: str, keys) -> None:
    """With or without keys, and with or without models, it is the same text."""
    watch, url = serve(keys)
    replica()
    watch.look()
    answer = httpx.get(url + path)
    assert answer.status_code == 200
    assert answer.text == shell()
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers.get_list("content-security-policy") == [policy()]
    assert (answer.headers["x-frame-options"], answer.headers["cache-control"]) == ("DENY", "no-store")


def test_the_policy_allows_what_the_page_brings_and_no_more() -> None:
    """One style sheet and one script, each by digest; nothing inline beside them, nothing from elsewhere."""
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (inside,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", shell(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy()
    assert policy().startswith(STRICT)
    assert "unsafe" not in policy()
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", shell())
    assert not re.findall(r'\s(?:style|on\w+)="', shell())


def test_the_script_never_makes_markup_of_text() -> None:
    for name in SCRIPTS:
        text = (FOLDER / name).read_text("utf-8")
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|cookie", text), (
            name
        )


def test_the_files_are_in_the_package() -> None:
    """What the page is made of is installed with it."""
    told = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["deployments.http.page"]
    installed = {path.name for pattern in patterns for path in FOLDER.glob(pattern)}
    assert installed == {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {*SCRIPTS} < installed
