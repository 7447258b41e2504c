"""Catches I/O, processes and threads in code that promised to have none.

Python's audit events report every file, socket and process, whichever library opened it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

_seen: ContextVar[list[str] | None] = ContextVar("_seen", default=None)
_EVENTS = ("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn")
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")


@contextmanager
def watched(seen: list[str]) -> Iterator[None]:
    """Note what the body opens or starts.

    Args:
        seen: gets a phrase for each file or socket the body opens and each process or thread
            it starts; Python's own imports and time zones are left out.
    """
    _install()
    before = set(threading.enumerate())
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)
        seen += [f"started the thread {t.name!r}" for t in set(threading.enumerate()) - before]


@cache
def _install() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    seen = _seen.get()
    if seen is None:
        return
    if event.startswith(_EVENTS):
        seen.append(f"{event}()")
    elif event == "open" and not _is_python(args[0]):
        seen.append(f"opened {args[0]!r}")


def _is_python(path: object) -> bool:
    if not isinstance(path, str | bytes):
        return False
    name = path if isinstance(path, str) else path.decode(errors="replace")
    homes = (sys.prefix, sys.base_prefix, "/usr/share/zoneinfo")
    return Path(name).suffix in _CODE or name.startswith(homes)
