"""Where a measurement was made: machine, software, commit, and how busy the machine was."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from plinth import __version__
from plinth.distribution import version

LIBRARIES = ("torch", "numpy", "onnxruntime", "uvloop", "httptools", "mlcommons-loadgen")


def describe() -> dict[str, Any]:
    """All of it, ready for JSON; ``None`` for what cannot be found out here."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "architecture": platform.machine(),
            "cores": psutil.cpu_count(logical=False),
            "threads": psutil.cpu_count(),
            "usable_threads": _usable(),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": [round(load, 2) for load in psutil.getloadavg()],
        },
        "software": {
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "plinth": __version__,
            "commit": commit(),
            **{name: version(name) for name in LIBRARIES},
        },
    }


def cpu_model() -> str | None:
    """The processor's name as it gives it itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def commit() -> str | None:
    """The git commit this code is run from, with ``+changes`` when files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # else another repository
        head = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _usable() -> int | None:
    """Threads this process may run on: fewer than the machine has when it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
