"""Which Plinth runs here, so that no two that differ answer for each other."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

from plinth.distribution import version


@cache
def identity() -> dict[str, str]:
    """Versions of Plinth, torch and Python, and the SHA-256 of the engine's code."""
    root = Path(__file__).parents[2]
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda each: each.relative_to(root).as_posix()):
        code.update(path.relative_to(root).as_posix().encode() + b"\0")
        code.update(path.read_bytes() + b"\0")
    return {
        "Plinth": version(),
        "code": code.hexdigest()[:12],
        "torch": torch.__version__.partition("+")[0],
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
