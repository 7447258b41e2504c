"""What the site of the documentation needs beside ``docs/``: pages from the top of the repository.

README, CONTRIBUTING, CHANGELOG and SECURITY are pages, and so are the cells of the notebook. Links
to other files of the repository lead to ``repo_url``, or, where there is none, are their words.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
}
NOTEBOOK, TOUR = "examples/python_api.ipynb", "python-api.md"
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in ``docs/``."""
    for name, page in TOP.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, TOUR, content=as_markdown(ROOT / NOTEBOOK)))
    return files


def as_markdown(notebook: Path) -> str:
    """The cells of a notebook, code in fences."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    made = []
    for cell in cells:
        text = "".join(cell["source"])
        made.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(made) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of ``docs/`` to their pages, or to the repository."""
    here = posixpath.dirname(page.file.src_uri)

    def led(found: re.Match[str]) -> str:
        words, target = found.groups()
        name, hash_, anchor = target.partition("#")
        if not name or "://" in name or target.startswith("mailto:"):
            return found[0]
        there = posixpath.normpath(posixpath.join(here, name))
        if files.get_file_from_path(there) is not None:
            return found[0]
        path = posixpath.normpath(posixpath.join("docs", there)) if ".." in there else there
        if path == NOTEBOOK:
            return f"[{words}]({posixpath.relpath(TOUR, here or '.')})"
        if path in TOP:
            return f"[{words}]({posixpath.relpath(TOP[path], here or '.')}{hash_}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # mkdocs says that it leads nowhere
        return f"[{words}]({config.repo_url}/blob/main/{path})" if config.repo_url else words

    return _LINK.sub(led, markdown)
