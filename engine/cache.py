"""Where what was measured or compiled once is kept for the next run, and how much of it.

What was used longest ago is let go of when the folder holds more than its bound. Everything in it
can be made again, and whoever finds a file gone makes it again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from plinth.engine.errors import ConfigError

BOUND_MB = 20_000
"""Megabytes that the folder holds at most, where ``$PLINTH_CACHE_MB`` does not say it."""

FRESH_S = 900.0
"""Seconds in which nothing is let go of after it was used: somebody may be about to read it."""

STALE_S = 86_400.0
"""Seconds after which what was begun and never ended is taken for what a process left that died."""

EVERY_S = 30.0
"""Seconds between two looks at the folder of a process."""

KINDS = (
    *("onnx", "onnxruntime", "openvino", "openvino-graphs", "aotinductor", "quantised"),
    *("plans", "batch-ranges"),
)
_NESTED = ("openvino",)
"""Kinds whose entries lie in a folder for each version of the library."""

_looked = [float("-inf")]


def cache_root() -> Path:
    """``$PLINTH_CACHE``, else ``~/.cache/plinth``."""
    return Path(os.environ.get("PLINTH_CACHE") or "~/.cache/plinth").expanduser()


def cache_folder(name: str) -> Path:
    """A folder in :func:`cache_root`, made where it is not there; kept for this user alone."""
    folder = cache_root() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def cache_bound() -> int:
    """Bytes that the folder holds at most: ``$PLINTH_CACHE_MB``, else ``BOUND_MB``.

    Raises:
        ConfigError: the variable is no whole number of megabytes.
    """
    text = os.environ.get("PLINTH_CACHE_MB", "").strip() or str(BOUND_MB)
    if not text.isdecimal() or len(text) > 12:
        raise ConfigError(
            f"PLINTH_CACHE_MB is {text!r}, expected a whole number of megabytes",
            hint=f"leave it out for {BOUND_MB}",
        )
    return int(text) * 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one thing.

    Args:
        kind: one of ``KINDS``.
        paths: its files, or its folder.
        bytes: on disk.
        used: when it was made or last used, seconds since 1970.
    """

    kind: str
    paths: tuple[Path, ...]
    bytes: int
    used: float


def used(path: Path) -> None:
    """Note that a file or folder of the cache was used; its time of writing stays as it is."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def entries() -> list[Entry]:
    """What the cache holds, who was used longest ago first."""
    found = [entry for kind in KINDS for entry in _of_kind(kind)]
    return sorted(found, key=lambda entry: entry.used)


def keep_bound() -> int:
    """Let go of what was used longest ago until the folder is within its bound; bytes let go of.

    What was used within ``FRESH_S`` stays. Where another process is at it, nothing is done; this
    one looks at most every ``EVERY_S``.

    Raises:
        ConfigError: see :func:`cache_bound`.
    """
    bound = cache_bound()
    now = time.monotonic()
    if now - _looked[0] < EVERY_S:
        return 0
    _looked[0] = now
    try:
        with (cache_folder("bound") / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _let_go(bound)
    except OSError:  # another process is at it, or the disk cannot be written to
        return 0


def _let_go(bound: int) -> int:
    now, gone = time.time(), 0
    for kind in KINDS:
        for folder in _folders(kind):
            for left in folder.glob(".*"):
                with suppress(OSError):
                    if now - left.stat().st_mtime > STALE_S:
                        _remove(left)
    held = entries()
    over = sum(entry.bytes for entry in held) - bound
    for entry in held:
        if over - gone <= 0 or now - entry.used < FRESH_S:
            break
        for path in entry.paths:
            _remove(path)
        gone += entry.bytes
    return gone


def _remove(path: Path) -> None:
    """Remove a file, or a folder under another name first: nobody sees half of it."""
    with suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return
        going = path.with_name(f".gone-{os.getpid()}-{path.name.lstrip('.')}")
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def _folders(kind: str) -> list[Path]:
    root = cache_root() / kind
    if not root.is_dir():
        return []
    return [one for one in root.iterdir() if one.is_dir()] if kind in _NESTED else [root]


def _of_kind(kind: str) -> Iterator[Entry]:
    for folder in _folders(kind):
        together: dict[str, list[Path]] = defaultdict(list)
        with suppress(OSError):
            for path in folder.iterdir():
                if not path.name.startswith("."):
                    together[path.name.partition(".")[0]].append(path)
        for paths in together.values():
            with suppress(OSError):  # gone meanwhile
                times, sizes = zip(*map(_facts, paths), strict=True)
                yield Entry(kind, tuple(paths), sum(sizes), max(times))


def _facts(path: Path) -> tuple[float, int]:
    """When a file or folder was last used, and its bytes on disk."""
    own = path.stat()
    files = [own] if not path.is_dir() else [each.stat() for each in path.iterdir()]
    return max(own.st_atime, own.st_mtime), sum(each.st_blocks * 512 for each in files)
