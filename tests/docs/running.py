"""Pages as shell scripts: what they show, in the order in which they show it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from pages import ROOT, Block, Statement, blocks, documented, statements, statements_in

SHARED = ROOT.parent / "shared"
CHECKPOINT = "docs/guard-a-checkpoint.md"
FRONT = "README.md"  # while its server is up, pages that take one for granted ask it
MARK = "\x1e"  # in front of a place in a page, on both of a script's outputs
TIMEOUT_S = 600.0
# Words in blocks that are not `bash`, and what is there to put in their place. A second DIR is another folder.
STAND_INS = {
    "MODEL": "networks.py:digits",
    "FILE": "weights.safetensors",
    "DATA": "clean.npz",
    "ARTIFACT": "artifacts/mine",
    "FOLDER": "flagged",
    "NAME": "mine",
}
STANDS = re.compile(rf"(?<![\w$.-])({'|'.join([*STAND_INS, 'DIR'])})(?![\w=.-])")

PRELUDE = """\
set -eu -o pipefail
server=
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
at() { printf '\\036%s\\n' "$1"; printf '\\036%s\\n' "$1" >&2; }
curl() { command curl --fail --max-time 60 "$@"; }
up() {
  for _ in $(seq 1200); do
    if grep -q '^guard: serving' "$1"; then return; fi
    if ! kill -0 "$server" 2>/dev/null; then break; fi
    sleep 0.1
  done
  cat "$1" >&2
  return 1
}
stop() { if [ -n "$server" ]; then kill -TERM "$server"; wait "$server"; server=; fi; }
"""
POSTLUDE = """\
at end
stop
for job in $(jobs -p); do kill "$job" 2>/dev/null || true; wait "$job"; done
"""


class Listed(NamedTuple):
    """Commands that are parsed and not run. pattern: the whole of the command. tests: what runs them or their like."""

    pattern: str
    reason: str
    tests: tuple[str, ...] = ()


PARSED_ONLY = (
    Listed(r"make demo|guard demo .*", "two minutes", ("tests/test_demo.py",)),
    Listed(r"make (test|check)", "would run itself, and linters"),
    Listed(r"make monitoring", "two minutes", ("tests/monitoring/test_stack_e2e.py",)),
    Listed(r"make (bench|bench-small|load|faults|soak)( .*)?", "minutes to hours", ("tests/test_benchmarks.py",)),
    Listed(
        r"python -m benchmarks\.lab (run|report) .*", "hours; writes over figures", ("tests/lab/test_laboratory.py",)
    ),
    Listed(r"python -m benchmarks\.(?!lab)\w+( .*)?", "minutes to hours", ("tests/test_benchmarks.py",)),
    Listed(r"make sbom", "a minute, and into the checkout"),
    Listed(r"make image.*|docker .*", "an image takes Docker and a network", ("tests/test_image.py",)),
    Listed(r"helm .*|kubectl .*", "a cluster", ("tests/helm/test_chart.py",)),
    Listed(r"guard scan .*", "minutes", ("tests/test_scan.py",)),
    Listed(r"guard fit .* --method bna", "minutes: it scans", ("tests/test_bna.py", "tests/serving/test_bna_e2e.py")),
    Listed(r"guard fit MODEL .* --out artifacts/mine-2", "the README's, into another folder"),
    Listed(r"guard serve artifacts/badnets-bna .*", "one server fewer here", ("tests/serving/test_bna_e2e.py",)),
    Listed(r"guard serve artifacts/digits --mode flag", "the README's, with another artifact"),
    Listed(r"guard serve artifacts/badnets --mode flag --port 8000 --replicas 2", "docs/configuration.md's, as a file"),
    Listed(r"serve (deploy|run|status).*", "a Ray cluster with its dashboard", ("tests/serving/test_deploy_e2e.py",)),
    Listed(r"python3 -m venv .*|python -m pip .*|pip .*|git clone .*|apt .*", "packages come over a network"),
)
PYTHON_ELSEWHERE = {  # pages whose Python another test runs
    "docs/endpoint.md": "tests/serving/test_tritonclient.py",
    "docs/wrap.md": "tests/serving/test_composition.py",
}


class Step(NamedTuple):
    """A statement or a block of Python that runs. text: as a shell takes it."""

    where: str
    text: str
    serves: bool = False


class Told(NamedTuple):
    """What a script said. at: where it was when it ended; "end" is good. printed: standard output by place."""

    folder: Path
    status: int
    at: str
    printed: dict[str, str]
    errors: str


def listed(statement: Statement) -> Listed | None:
    """Why it is parsed and not run; None where it runs."""
    if statement.synopsis:
        return Listed("", "tells how to call")
    commands = [str(command) for command in statement.commands]
    return next((one for one in PARSED_ONLY for command in commands if re.fullmatch(one.pattern, command)), None)


def steps(page: Path) -> list[Step]:
    """What of a page runs, in order."""
    found = []
    for block in blocks(page):
        if block.info == "python" and block.page not in PYTHON_ELSEWHERE:
            found.append(Step(f"{block.page}:{block.line}", f"python - <<'THE BLOCK ENDS'\n{block.text}THE BLOCK ENDS"))
        found += [_step(one, block) for one in statements_in(block) if listed(one) is None]
    return found


def asks_without_serving(page: Path) -> bool:
    """Whether it takes a running server for granted."""
    calls = [command.words for one in statements(page) if listed(one) is None for command in one.commands]
    return any(words[0] == "curl" for words in calls) and not any(words[:2] == ("guard", "serve") for words in calls)


def steps_of(page: str) -> list[Step]:
    """Its own; for `FRONT` also those of pages that ask a server and start none."""
    asking = [path for path in documented() if asks_without_serving(path)] if page == FRONT else []
    return [step for path in (ROOT / page, *asking) for step in steps(path)]


def pages_that_run() -> list[str]:
    """Pages with steps; those that ask a server and start none run with `FRONT`."""
    return [str(path.relative_to(ROOT)) for path in documented() if steps(path) and not asks_without_serving(path)]


def script(found: Iterable[Step]) -> str:
    """Bash that stops at the first failure, and whose last word is the clean end of each server."""
    lines = [PRELUDE]
    for number, step in enumerate(found):
        lines.append(f"at {shlex.quote(step.where)}")
        if step.serves:
            log = f"serve-{number}.log"
            lines += ["stop", f"( exec {step.text}\n) 2>{log} & server=$!", f"up {log}"]
        else:
            lines.append(step.text)
    return "\n".join([*lines, POSTLUDE])


def run(found: Sequence[Step], folder: Path) -> Told:
    """In ``folder``, with a network of its own where the machine lets us: every port is free, and nobody is outside."""
    path = folder / "page.sh"
    path.write_text(script(found))
    venv = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GUARD_")} | {
        "PATH": f"{venv}{os.pathsep}{os.environ['PATH']}",
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "KEY": "none-is-needed-here",
    }
    with (folder / "page.out").open("w") as out, (folder / "page.err").open("w") as err:
        call = [*apart(), "bash", path.name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": out, "stderr": err}
        process = subprocess.Popen(call, cwd=folder, env=environment, start_new_session=True, **pipes)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(b"y\n" * 10, timeout=TIMEOUT_S)  # for what asks first
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return _told(folder, process.returncode, (folder / "page.out").read_text(), (folder / "page.err").read_text())


@cache
def apart() -> tuple[str, ...]:
    """The call that gives a program processes and a network of its own; () where that is not allowed."""
    call = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
    lo = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return ()
    return (*call, *lo) if subprocess.run([*call, *lo, "true"], capture_output=True).returncode == 0 else ()


def _step(statement: Statement, block: Block) -> Step:
    text = statement.text if block.info == "bash" else stood_in(statement.text)
    words = statement.commands[0].words if len(statement.commands) == 1 else ()
    serves = words[:2] == ("guard", "serve") and "--print-config" not in words
    return Step(statement.where, text, serves and not text.rstrip().endswith("&"))


def stood_in(text: str) -> str:
    """With something real in the place of each placeholder."""
    return STANDS.sub(lambda word: STAND_INS.get(word[0], f"made-{crc32(text.encode()):x}"), text)


def made_by(found: Iterable[Step]) -> set[str]:
    """The files and folders that steps make, which must not be there before."""
    text = "\n".join(step.text for step in found)
    return set(re.findall(r"(?:--out |\.save\(\")([\w./-]+)", text))


def _told(folder: Path, status: int, out: str, err: str) -> Told:
    printed: dict[str, str] = {}
    for part in out.split(MARK)[1:]:
        where, _, rest = part.partition("\n")
        printed[where] = printed.get(where, "") + rest
    return Told(folder, status, next(reversed(printed), "start"), printed, err.rpartition(MARK)[2])
