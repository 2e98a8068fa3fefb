"""The commands that pages show: in fenced blocks, where a reader copies them, and in code amid the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SHELLS = frozenset({"bash", "sh", "shell", "console"})  # info strings; `bash`: as it stands, without placeholders
OURS = frozenset({"guard", "make", "python", "python3"})
OTHERS = frozenset({"apt", "curl", "docker", "git", "helm", "kubectl", "openssl", "pip", "promtool", "ray", "serve"})
PROGRAMS = OURS | OTHERS
KEYWORDS = frozenset(["do", "then", "else", "if", "while", "until", "!", "time", "sudo"])  # in front of a program
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?")
PLACEHOLDER = re.compile(r"<[A-Za-z][\w .-]*>|\b[A-Z]+\|[A-Z][\w.]*")  # <name>, DIR|FILE: no file, no pipe
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
SYNOPSIS = re.compile(
    r"\[[A-Z][\w .|]*\]|\bCOMMAND\b|…"
)  # `guard fit MODEL [OPTIONS]` tells how to call, and calls nothing


class Block(NamedTuple):
    """A fenced block. line: of its first line of text, from 1."""

    page: str
    line: int
    info: str
    text: str

    @property
    def shell(self) -> bool:
        """Whether its lines are commands: it says so, or says nothing and begins with a program that we know."""
        if self.info:
            return self.info.split()[0] in SHELLS
        first = next((line for line in self.text.splitlines() if line.strip() and not line.startswith("#")), "")
        return program(_split(first)) in PROGRAMS


class Command(NamedTuple):
    """One program with its arguments. whole: no mere mention, so that nothing required may be missing."""

    where: str
    words: tuple[str, ...]
    whole: bool

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return " ".join(self.words)


class Statement(NamedTuple):
    """What a shell takes at once: a line, with its continuations, its here-document or the rest of its loop."""

    where: str
    info: str
    text: str

    @property
    def commands(self) -> list[Command]:
        return [Command(self.where, words, not self.synopsis) for words in simple(SYNOPSIS.sub("", self.text))]

    @property
    def synopsis(self) -> bool:
        return SYNOPSIS.search(self.text) is not None


def documented() -> list[Path]:
    """README.md, SECURITY.md and all of docs/."""
    return [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    return blocks_in(page.read_text(), _name(page))


def statements(page: Path) -> list[Statement]:
    """Those of its shell blocks, in order."""
    return [one for block in blocks(page) for one in statements_in(block)]


def mentions(page: Path) -> list[Command]:
    return mentions_in(page.read_text(), _name(page))


def blocks_in(text: str, name: str) -> list[Block]:
    return [
        Block(name, text.count("\n", 0, found.start("text")) + 1, found["info"].strip(), dedent(found["text"]))
        for found in FENCE.finditer(text)
    ]


def statements_in(block: Block) -> Iterator[Statement]:
    if not block.shell:
        return
    lines = enumerate(block.text.splitlines(), block.line)
    for number, line in lines:
        taken = line.removeprefix("$ ") if block.info == "console" else line
        if not taken.strip() or taken.lstrip().startswith("#"):
            continue
        while not _complete(taken):
            _, more = next(lines, (0, None))
            if more is None:
                break
            taken += f"\n{more}"
        yield Statement(f"{block.page}:{number}", block.info, taken)


def mentions_in(text: str, name: str) -> list[Command]:
    """Code amid the text that begins with a program of ours and has at least one more word."""
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    found = []
    for span in SPAN.finditer(prose):
        where = f"{name}:{prose.count(chr(10), 0, span.start()) + 1}"
        for words in simple(" ".join(span[1].replace("\\|", "|").split())):
            if words[0] in PROGRAMS and len(words) > 1:
                found.append(Command(where, words, whole=False))
    return found


def options_in(text: str, name: str) -> list[tuple[str, str]]:
    """(where, option) of code amid the text that begins with an option: `--start 0.5`."""
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    return [
        (f"{name}:{prose.count(chr(10), 0, span.start()) + 1}", option)
        for span in SPAN.finditer(prose)
        if span[1].startswith("--")
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span[1])
    ]


def simple(text: str) -> list[tuple[str, ...]]:
    """The simple commands of a statement, without assignments in front, redirections and here-documents."""
    text = HEREDOC.sub("", text.split("\n")[0] + " ") if HEREDOC.search(text) else text
    found, words, skip = [], [], False
    for token in [*_split(text), ";"]:
        if set(token) <= set(";&|\n()"):
            found.append(words)
            words = []
        elif set(token) <= set("<>&"):
            skip = True
            if words and words[-1] in ("1", "2"):  # 2> FILE
                words.pop()
        elif skip:
            skip = False
        else:
            words.append(token)
    return [tuple(rest) for words in found if (rest := _bare(words))]


def program(words: list[str]) -> str:
    return next(iter(_bare(words)), "")


def _bare(words: list[str]) -> list[str]:
    """From the program on."""
    for index, word in enumerate(words):
        if word in ("for", "done", "fi"):
            return []
        if word not in KEYWORDS and not ASSIGNMENT.match(word):
            return [word.removeprefix(".venv/bin/"), *words[index + 1 :]]
    return []


def _split(text: str) -> list[str]:
    """Words and operators; the rest of a comment is none. [] where a quotation does not end."""
    lexer = shlex.shlex(PLACEHOLDER.sub("NAME", text.replace("\\\n", " ")), posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return list(_without_comments(lexer))
    except ValueError:
        return []


def _without_comments(tokens: Iterator[str]) -> Iterator[str]:
    for token in tokens:
        if token.startswith("#"):
            for rest in tokens:
                if "\n" in rest:
                    break
        else:
            yield token


def _complete(text: str) -> bool:
    """Whether a shell would not wait for more."""
    if text.endswith("\\"):
        return False
    if heredoc := HEREDOC.search(text):
        return text.splitlines()[-1].strip() == heredoc[1] and "\n" in text
    words = _split(text)
    if not words and text.strip() and not text.lstrip().startswith("#"):
        return False
    opened = sum(word in ("for", "while", "until", "if") for word in words)
    return opened <= sum(word in ("done", "fi") for word in words)


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()
