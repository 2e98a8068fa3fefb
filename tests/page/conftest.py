"""The page in a real browser, on real routes, over counters that a process of their own writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from looking import CHROMIUM, DRIVER, Browser
from served import Replica, Server, Site

from deployments.keys import Keys
from deployments.watch.watch import Watch

DIGITS = [str(digit) for digit in (7, 0, 1, 2, 3, 4, 5, 6, 8, 9)]


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Makes a process that counts, of one model named digits unless told otherwise."""
    with ExitStack() as opened:

        def make(*models: tuple[str, list[str], bool]) -> Replica:
            one = Replica(tmp_path, list(models) or [("digits", DIGITS, True)])
            opened.callback(one.close)
            return one

        yield make


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Watch, str]]]:
    """Starts a site over the counters; its watch and its address."""
    with ExitStack() as opened:

        def start(keys: Keys | None = None) -> tuple[Watch, str]:
            site = Site(tmp_path, keys)
            return site.watch, opened.enter_context(Server(site.app)).url

        yield start


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("chromium is not installed (Debian: apt install chromium chromium-driver)")
    one = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield one
    finally:
        one.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Chromium on an empty page, with nothing in its console."""
    chromium.complaints()
    yield chromium
    chromium.media()
    chromium.desk()
    chromium.get("about:blank")
    chromium.complaints()
