"""The pages of the reference say what the code says, and the other pages leave out nothing that they are to explain."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import guard.cli
from deployments.config import ModelConfig, ServeConfig
from deployments.document import Document
from deployments.grpc.messages import MESSAGES
from deployments.http.openapi import document
from deployments.monitoring.dashboards.catalogue import DASHBOARDS
from deployments.series import SERIES

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE, PICTURES = DOCS / "reference", DOCS / "pictures"
PAGES = sorted(DOCS.rglob("*.md"))
COMMAND = "python docs/reference/generate.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """What the generator makes now, by page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        generate = importlib.import_module("generate")
    return {path.name: text for path, text in generate.files().items()}


def sections(page: Path) -> dict[str, str]:
    """The text below each title."""
    parts = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", ["cli.md", "configuration.md", "http.md", "metrics.md"])
def test_a_page_is_what_the_generator_makes(made: dict[str, str], name: str) -> None:
    assert (REFERENCE / name).read_text() == made[name], f"docs/reference/{name} is not current; run: {COMMAND}"


def test_the_generator_makes_every_page(made: dict[str, str]) -> None:
    assert {*made} == {path.name for path in REFERENCE.glob("*.md")}


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for below in command.list_commands(ctx):
            found = command.get_command(ctx, below)
            assert found is not None
            yield f"{name} {below}", found
            yield from commands(found, f"{name} {below}")


def test_every_command_has_a_section_with_all_its_options() -> None:
    told = sections(REFERENCE / "cli.md")
    found = dict(commands(guard.cli.main, "guard"))
    assert {"guard fit", "guard serve", "guard quarantine export"} <= {*found} <= {*told}
    for name, command in found.items():
        options = [option for one in command.params if isinstance(one, click.Option) for option in one.opts]
        assert re.findall(r"^\| `(--[\w-]+)", told[name], re.MULTILINE) == options, name


def test_every_setting_has_a_row() -> None:
    told = sections(REFERENCE / "configuration.md")
    for kind in (Document, ServeConfig, ModelConfig):
        assert re.findall(r"^\| `(\w+)` \|", told[kind.__name__], re.MULTILINE) == [*kind.model_fields]


def test_every_series_and_every_alert_is_there() -> None:
    told = sections(REFERENCE / "metrics.md")
    assert re.findall(r"^\| `(\w+)` \|", told["Metrics"], re.MULTILINE) == [*SERIES]
    runbooks = {path.stem for path in (DOCS / "runbooks").glob("Guard*.md")}
    assert {*re.findall(r"^\| \[(\w+)\]", told["Alerts"], re.MULTILINE)} == runbooks


def test_every_route_and_every_method_is_there() -> None:
    told = sections(REFERENCE / "http.md")
    routes = [f"{method.upper()} {path}" for path, one in document([], "0", secured=False)["paths"].items()
              for method in one]  # fmt: skip
    assert re.findall(r"^\| \[`([^`]*)`\]", told["Routes"], re.MULTILINE) == routes
    assert {*routes} <= {*told}
    for name in MESSAGES:
        assert f"message {name} {{" in told["gRPC"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_the_page_on_dashboards_explains_every_panel(dashboard) -> None:
    """Panel by panel, in their order, and no panel that is not there."""
    told = sections(DOCS / "dashboards.md")[dashboard.title]
    assert re.findall(r"^\| \*\*(.*?)\*\* \|", told, re.MULTILINE) == [panel.title for panel in dashboard.panels]


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "README.md"
    targets = {(DOCS / target).resolve() for target in re.findall(r"\]\((?!https?:)([^)#]+)", index.read_text())}
    alone = [page for page in PAGES if page.parent in (DOCS, REFERENCE) and page != index]
    assert {*alone, DOCS / "runbooks" / "README.md", DOCS / "decisions", DOCS.parent / "SECURITY.md"} <= targets


def anchors(page: Path) -> set[str]:
    """Those of its titles, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).strip().replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(plain)}(-\d+)?", one) is not None for one in found)
        found.append(f"{plain}-{again}" if again else plain)
    return {*found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_link_into_a_page_names_one_of_its_titles(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        there = (page.parent / target).resolve() if target else page
        assert anchor in anchors(there), f"{target}#{anchor}"


def test_pictures_are_small_described_and_used() -> None:
    """A drawing says in words what it shows, and has a ground of its own, for readers of dark pages."""
    text = "".join(page.read_text() for page in PAGES)
    for path in PICTURES.iterdir():
        assert path.stat().st_size < 60_000, path.name
        assert re.search(rf"!\[[^\]]{{20,}}\]\([./]*pictures/{re.escape(path.name)}\)", text), path.name
        if path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            assert all(root.findtext(f"{SVG}{tag}", "").strip() for tag in ("title", "desc")), path.name
            ground = root.find(f"{SVG}rect")
            assert ground is not None
            assert (root.get("viewBox"), ground.get("fill")) == (f"0 0 {ground.get('width')} {ground.get('height')}",
                                                                 "#fff"), path.name  # fmt: skip
