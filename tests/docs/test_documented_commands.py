"""Every command of the pages is one that its program takes, and what can run here does, as written.

`running.PARSED_ONLY` lists what is not run, and why. Whatever it does not list runs: a command that is new in a page
runs with it, or the test of that page fails.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pages import ROOT, Block, blocks_in, documented, mentions, mentions_in, options_in, statements, statements_in
from parsers import CHECKS, faults, known_options
from running import (
    CHECKPOINT,
    PARSED_ONLY,
    PYTHON_ELSEWHERE,
    SHARED,
    STANDS,
    Step,
    Told,
    apart,
    listed,
    pages_that_run,
    run,
    steps,
    steps_of,
)

from guard.cli import main

PAGES = documented()
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
MENTIONED_ALONE = {"git", "apt", "openssl"}  # programs of others that pages name amid the text
AMID_THE_TEXT = {  # what runs in no time: the mention, and the folder in which it holds
    "openssl rand -hex 32": ".",
    "promtool check config prometheus.yaml": "deployments/monitoring",
    "promtool test rules FILE": "tests/monitoring/rules",
}
TAKEN = "port 8000 is taken, and this machine lets nobody have a network of their own"


def marks(page: str) -> list[pytest.MarkDecorator]:
    """What a page takes: the machine for itself where it serves, and for one networks of others."""
    found = [pytest.mark.alone] if any("guard serve" in step.text for step in steps_of(page)) else []
    if page == CHECKPOINT:
        absent = not (SHARED / "models" / "networks.py").is_file()
        found += [pytest.mark.shared, pytest.mark.skipif(absent, reason="../shared is absent")]
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_programs_take_the_commands(page: Path) -> None:
    """Commands, options, routes and files exist, what is required is there, choices and numbers are possible."""
    blocks = [command for one in statements(page) for command in one.commands]
    assert [fault for command in (*blocks, *mentions(page)) for fault in faults(command)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_amid_the_text_exist(page: Path) -> None:
    """Code such as `--start 0.5` is an option of a command of ours."""
    found = options_in(page.read_text(), page.name)
    assert [(where, option) for where, option in found if option not in known_options()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_nothing_is_left_out(page: Path) -> None:
    """Each command runs, or is in the list; each mention has a parser; in `bash` nothing is to be filled in."""
    asked = {step.where for step in steps(page)}
    for one in statements(page):
        assert (one.where in asked) != (listed(one) is not None), one
        assert one.info != "bash" or not STANDS.search(one.text), f"{one.where}: a placeholder: make it a block `sh`"
    assert {command.program for command in mentions(page)} <= CHECKS.keys() | MENTIONED_ALONE


@pytest.mark.parametrize("page", [pytest.param(page, marks=marks(page)) for page in pages_that_run()])
def test_a_page_runs(page: str, ran: Callable[[str], Told]) -> None:
    """Its commands in order, each ending well; `guard serve` comes up, answers the page's requests, and ends with 0."""
    if not apart() and any("guard serve" in step.text for step in steps_of(page)) and _taken(8000):
        pytest.skip(TAKEN)
    told = ran(page)
    assert (told.status, told.at) == (0, "end"), f"{told.at}: {told.errors[-3000:]}"


def test_the_list_is_short_and_used() -> None:
    """Each line of the list stands for a command that a page shows, and names tests that are there."""
    shown = [str(command) for page in PAGES for one in statements(page) for command in one.commands]
    shown += [str(command) for page in PAGES for command in mentions(page)]
    for line in PARSED_ONLY:
        assert any(re.fullmatch(line.pattern, command) for command in shown), line
        assert all((ROOT / test).is_file() for test in line.tests), line
    assert all((ROOT / page).is_file() and (ROOT / test).is_file() for page, test in PYTHON_ELSEWHERE.items())


def test_there_is_something_to_test() -> None:
    """The pages show that many commands, and that many run; servers among them, with requests to each."""
    found = [one for page in PAGES for one in statements(page)]
    running = [step for page in PAGES for step in steps(page)]
    assert len(found) >= 50
    assert len(running) >= 30
    assert sum("guard serve" in step.text and "--print-config" not in step.text for step in running) >= 4
    assert sum("curl" in step.text for step in running) >= 4
    assert len([command for page in PAGES for command in mentions(page)]) >= 100


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("guard fit --no-such-option", "No such option '--no-such-option'"),
        ("guard fit MODEL --clean DATA", "'--out' is missing"),
        ("guard fit MODEL --clean DATA --out DIR --bounds tight", "'tight' is not one of"),
        ("guard fit MODEL --clean DATA --out DIR --fpr little", "'little' is not a valid float"),
        ("guard serve DIR DIR", "too much: DIR"),
        ("guard mend MODEL", "no command mend"),
        ("guard quarantine FOLDER throw", "no command throw"),
        ("make tea", "no target tea"),
        ("make bench DATUM=x", "does not read DATUM"),
        ("make bench-small", "DATA: where CIFAR-10 is"),
        ("python -m benchmarks.twin_costs", "no module benchmarks.twin_costs"),
        ("python -m benchmarks.load --second 8", "No such option '--second'"),
        ("python -m benchmarks.lab run tiny --data x", "'tiny' is not one of"),
        ("python -m pytest tests/none.py", "no tests at tests/none.py"),
        ("curl http://127.0.0.1:8000/v3/models", "no route answers GET /v3/models"),
        ("curl -d @x http://127.0.0.1:8000/v2/health/ready", "no route answers POST /v2/health/ready"),
        ("helm install guard helm/guards -f values.yaml", "no chart at helm/guards"),
        ("serve deploy --nowhere guard.yaml", "No such option '--nowhere'"),
    ],
)
def test_a_wrong_command_is_found(line: str, fault: str) -> None:
    """In a block, behind a comment, a continuation or a pipe."""
    text = f"Text.\n\n1. List:\n\n   ```bash\n   # first\n   true | \\\n     {line}  # last\n   ```\n"
    (block,) = blocks_in(text, "page.md")
    (one,) = statements_in(block)
    found = [fault for command in one.commands for fault in faults(command)]
    assert len(found) == 1, found
    assert fault in found[0]
    assert found[0].startswith("page.md:7: ")


def test_a_wrong_mention_is_found() -> None:
    """Over two lines of text as well; that something required is missing is none there."""
    found = mentions_in("So `guard fit\n--no-such-option` and `guard fit`, not `guard.yaml`.\n", "page.md")
    assert [str(command) for command in found] == ["guard fit --no-such-option", "guard fit"]
    assert [fault.partition(": ")[0] for command in found for fault in faults(command)] == ["page.md:1"]


def test_what_a_shell_takes_at_once() -> None:
    """Continuations, quotations over lines, here-documents and loops; what is piped, chained and redirected."""
    text = (
        "guard fit MODEL \\\n  --clean DATA > log 2>&1 &\ncurl -d 'a\n# b' http://x && echo done\n"
        "cat > f <<'EOF'\nguard nothing\nEOF\nA=1 B=2 guard score DIR <data> | head # | guard nothing\n"
        "for i in 1 2; do\n  guard inspect DIR\ndone\n"
    )
    found = list(statements_in(Block("p", 1, "sh", text)))
    assert [one.where for one in found] == ["p:1", "p:3", "p:5", "p:8", "p:9"]
    assert [[command.words for command in one.commands] for one in found] == [
        [("guard", "fit", "MODEL", "--clean", "DATA")],
        [("curl", "-d", "a\n# b", "http://x"), ("echo", "done")],
        [("cat",)],
        [("guard", "score", "DIR", "NAME"), ("head",)],
        [("guard", "inspect", "DIR")],
    ]


def test_a_script_stops_at_a_failure(tmp_path: Path) -> None:
    """A command that fails, one in a pipe, and a server that ends badly each end the script with their place."""
    for text in ("false", "false | true", "(sleep 0.2; exit 3) &"):
        told = run([Step("p:1", text)], tmp_path)
        assert told.status != 0, text
        assert told.at in ("p:1", "end")


def test_every_command_has_its_help() -> None:
    """`guard COMMAND --help`, as the README says."""
    names = main.list_commands(click.Context(main))
    assert len(names) >= 9
    assert [name for name in names if CliRunner().invoke(main, [name, "--help"]).exit_code] == []


@pytest.mark.parametrize("line", AMID_THE_TEXT)
def test_small_tools_run(line: str) -> None:
    """What the text tells to call for a key, or to check a file, where the program is here."""
    assert line in {str(command) for page in PAGES for command in mentions(page)}
    program, *words = line.split()
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    folder = ROOT / AMID_THE_TEXT[line]
    case = next(folder.glob("guard-*.yaml"), folder)
    call = [program, *(case.name if word == "FILE" else word for word in words)]
    assert subprocess.run(call, cwd=folder, capture_output=True, timeout=60).returncode == 0


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
