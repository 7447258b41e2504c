"""The blocks of the documentation: README, CONTRIBUTING and all pages in docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command

from plinth.pipelines.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    if path.is_file()
)
FENCE = re.compile(r"^( *)```(\w*)[^`]*$")
NO_RUN = re.compile(r"<!--\s*no-run:\s*(\S.*?)\s*-->")
ASSIGNED = re.compile(r"(\w+)=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is that of its fence, counted from 1."""

    page: Path
    line: int
    language: str
    text: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            before = lines[number].strip() or before
            number += 1
            continue
        start, indent = number, len(fence[1])
        number += 1
        while lines[number].strip() != "```":
            number += 1
        text = "\n".join(line[indent:] for line in lines[start + 1 : number])
        yield Block(page, start + 1, fence[2], text + "\n", not NO_RUN.fullmatch(before))
        before = ""
        number += 1


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a console block as words: after ``$`` where there is one, else every line."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line.strip()[1:] for line in lines if line.strip().startswith("$ ")]
    for line in prompted or lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>()"):
                if words:
                    yield words
                words = []
            elif words or not ASSIGNED.fullmatch(word):
                words.append(word)


def assigned(text: str) -> Iterator[str]:
    """Names of the variables that commands of a console block are given."""
    for line in text.replace("\\\n", " ").splitlines():
        for word in line.strip().removeprefix("$").split():
            if not (found := ASSIGNED.fullmatch(word)):
                break
            yield found[1]


def check_plinth(words: list[str], where: str) -> None:
    """A command line has only options and commands that there are; ``where`` says whose it is."""
    command: Any = get_command(app)
    known: set[str] = set()
    for word in words:
        known |= {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
        known |= {"--help", "-h"}
        if word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word):
            option = word.partition("=")[0]
            assert option in known, f"{where}: `plinth {' '.join(words)}` has no option {option}"
        elif hasattr(command, "commands"):
            assert word in command.commands, f"{where}: there is no `plinth {word}`"
            command = command.commands[word]
