"""The documentation is true: its code runs, its settings and commands exist, its links lead."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from plinth.verticals import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] if path.is_file())
FENCE = re.compile(r"^( *)```(\w*)[^`]*$")
NO_RUN = re.compile(r"<!--\s*no-run:\s*(\S.*?)\s*-->")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
RUNNER = """\
import json, sys
name, blocks = json.load(sys.stdin)
namespace = {"__name__": "__main__"}
for line, code, run in blocks:
    body = compile("\\n" * line + code, name, "exec")
    if run:
        exec(body, namespace)
"""


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


def in_language(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    blocks = [b for b in blocks_of(page) if b.language == "python"]
    if not blocks:
        return
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([page_id(page), [(b.line, b.text, b.run) for b in blocks]]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@in_language("toml")
def test_toml_is_valid_and_plinth_takes_it(block: Block, tmp_path: Path) -> None:
    tables = tomllib.loads(block.text)
    config = pytest.importorskip("plinth.pipelines.config.settings")
    if not tables.keys() & config.Config.model_fields.keys():
        return
    file = tmp_path / "plinth.toml"
    file.write_text(block.text)
    checked = config.load(file, env={})
    for name, table in checked.verticals.items():
        if name in registry.names():
            kind = registry.find(name).settings_type
            config.validated(kind, table.settings, ("verticals", name), checked.origin)


@in_language("console", "bash", "sh")
def test_commands_and_their_options_exist(block: Block) -> None:
    for words in commands(block.text):
        match words:
            case ["plinth", *rest]:
                check_plinth(rest, str(block))
            case ["make", target, *_]:
                targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
                assert target in targets, f"{block}: the Makefile has no target {target!r}"
            case ["python" | "python3", "-m", module, *_]:
                assert importlib.util.find_spec(module), f"{block}: there is no module {module}"


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
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


def check_plinth(words: list[str], where: str) -> None:
    cli = pytest.importorskip("plinth.pipelines.cli.main")
    command: Any = get_command(cli.app)
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


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page_id(page)} links to {target}, which is not there"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page_id(page)} links to {target}: no such heading"


def without_code(page: Path) -> str:
    return re.sub(r"(?ms)^ *```.*?^ *```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ +(.+?) *$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("$ plinth sevre", "there is no `plinth sevre`"),
        ("$ PORT=1 plinth serve --prot 9", "has no option --prot"),
        ("plinth list --json | jq . && plinth batch . --uot x", "has no option --uot"),
    ],
)
def test_a_wrong_command_would_be_noticed(line: str, complaint: str) -> None:
    *_, words = [words for words in commands(line) if words[0] == "plinth"]
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check_plinth(words[1:], "here")
