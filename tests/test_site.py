"""The site of the documentation builds without a warning, and the notebook's cells run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "python_api.ipynb"
sys.path.insert(0, str(ROOT / "tests"))

from commands import Command  # noqa: E402


@pytest.mark.needs("mkdocs", "material")
def test_the_site_builds_strictly_and_takes_nothing_from_another(tmp_path: Path) -> None:
    """Every page is in its table of contents, every link and anchor leads somewhere."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {name[:-5] for name in pages}
    for name, html in pages.items():
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="?(?:https?:)?//', html), name
        assert not re.search(r'<link[^>]+stylesheet[^>]+href="?(?:https?:)?//', html), name
    assert 'href="serving.html#who-may-ask"' in pages["pages.html"]
    assert 'href="CONTRIBUTING.html"' in pages["index.html"]
    assert 'href="python-api.html"' in pages["index.html"]
    assert "assert</span>" in pages["python-api.html"]


def test_the_cells_of_the_notebook_run_from_top_to_bottom(tmp_path: Path) -> None:
    """The cells assert what they show; what they print is not stored."""
    told = json.loads(NOTEBOOK.read_text())
    assert told["nbformat"] == 4
    cells = [cell for cell in told["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    program = "\n\n".join("".join(cell["source"]) for cell in cells)
    running = Command([program], tmp_path, {}, tmp_path / "said.txt")
    try:
        assert running.wait(200) == 0, running.said
    finally:
        running.end()
    assert "deadline - would finish" in running.said
    assert "Amount above the hard limit" in running.said
