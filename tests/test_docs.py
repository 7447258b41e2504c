"""The documentation is true: its code runs, its settings and commands exist, its links lead."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import plinth
from plinth.engine import ConfigError
from plinth.pipelines.cli.demo import Board
from plinth.pipelines.config.settings import load
from plinth.verticals import registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from commands import Command  # noqa: E402
from pages import BLOCKS, PAGES, Block, blocks_of, check_plinth, commands  # noqa: E402

BUILT_IN = registry.names()
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTIONAL = {"sklearn", "transformers", "openvino"}
"""Packages of requirements-extras.lock that a page may import."""


def in_language(*languages: str) -> Any:
    chosen = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", chosen, ids=str)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    blocks = [b for b in blocks_of(page) if b.language == "python"]
    if not blocks:
        return
    imported = re.findall(r"(?m)^(?:from|import) (\w+)", "\n".join(b.text for b in blocks))
    absent = [name for name in OPTIONAL & set(imported) if importlib.util.find_spec(name) is None]
    if absent and not os.environ.get("PLINTH_REQUIRE_EXTRAS"):
        pytest.skip(f"not installed: {absent}; make extras")
    for block in blocks:
        compile("\n" * block.line + block.text, page.name, "exec")
    running = Command([program(blocks)], tmp_path, {}, tmp_path / "said.txt")
    try:
        assert running.wait(110) == 0, running.said
    finally:
        running.end()


def program(blocks: list[Block]) -> str:
    """The blocks that are run, each at its lines of the page."""
    lines: list[str] = []
    for block in blocks:
        if block.run:
            lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    return "\n".join(lines)


@pytest.fixture
def plug_ins_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages say is an entry point is installed, without its code."""
    info = tmp_path / "pages-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pages\nVersion: 1.0\n")
    points = re.findall(
        r'(?m)^\[project\.entry-points\."plinth\.verticals"\]\n(.+)$',
        "\n".join(block.text for block in BLOCKS if block.language == "toml"),
    )
    (info / "entry_points.txt").write_text("\n".join(["[plinth.verticals]", *points]))
    monkeypatch.syspath_prepend(tmp_path)


@in_language("toml")
@pytest.mark.usefixtures("plug_ins_of_the_pages")
def test_toml_is_valid_and_plinth_takes_it(block: Block, tmp_path: Path) -> None:
    tables = tomllib.loads(block.text)
    config = pytest.importorskip("plinth.pipelines.config.settings")
    if not tables.keys() & config.Config.model_fields.keys():
        return
    file = tmp_path / "plinth.toml"
    file.write_text(block.text)
    checked = config.load(file, env={})
    for name, table in checked.verticals.items():
        if name in BUILT_IN:
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


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"(?m)^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text())
    assert headings, "the changelog has no '## VERSION (DATE)'"
    assert headings[0][0] == project["version"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|unreleased", date) for _, date in headings)
    assert plinth.__version__ == project["version"], "install this checkout again: make setup"


def test_the_lock_has_a_version_of_everything_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [line for lines in project["optional-dependencies"].values() for line in lines]
    lock = "\n".join(path.read_text() for path in ROOT.glob("requirements*.lock"))
    locked = {
        canonicalize_name(name): version
        for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)$", lock)
    }
    for line in [*project["dependencies"], *asked]:
        need = Requirement(line)
        if need.name != project["name"]:
            version = locked.get(canonicalize_name(need.name))
            assert version is not None, f"neither lock has {need.name}"
            assert version in need.specifier, f"{need}, but {version} is locked"


def test_the_errors_of_a_config_read_as_they_are_shown(tmp_path: Path) -> None:
    """The text block of docs/configuration.md with two mistakes, made again."""
    (shown,) = [
        block.text
        for block in BLOCKS
        if block.page.name == "configuration.md" and block.language == "text"
    ]
    file = tmp_path / "plinth.toml"
    file.write_text("\n\n\n\n[serve]\nprot = 1\n\n[batch]\nworkers = 0\n")
    with pytest.raises(ConfigError) as refused:
        load(file, env={})
    assert f"error: {refused.value.message}".replace(f"{tmp_path}/", "") == shown.strip()


def test_the_demo_is_shown_with_the_rows_it_has() -> None:
    """Left of the bar in README's block: what ``plinth demo`` prints there."""
    (shown,) = [b.text for b in BLOCKS if b.page.name == "README.md" and b.language == "text"]
    rows = [line.partition("│")[0].strip() for line in shown.splitlines() if "│" in line]
    board = [name for name, _ in Board(events=1).rows()]
    assert rows[: len(board)] == board
    source = (ROOT / "pipelines" / "cli" / "demo.py").read_text()
    for said in shown.splitlines()[:2]:
        assert said in source
