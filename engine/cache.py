"""Where what was measured or compiled once is kept for the next run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """``$PLINTH_CACHE/<name>``, else ``~/.cache/plinth/<name>``; kept for this user alone."""
    folder = Path(os.environ.get("PLINTH_CACHE") or "~/.cache/plinth").expanduser() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
