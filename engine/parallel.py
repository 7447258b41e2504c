"""Work on a few threads: what frees the interpreter's lock, and modules that are needed later."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MOST = 8
"""Threads at most: decoders are bound by memory beyond."""


def spread(work: Callable[[T], R], parts: Iterable[T], threads: int | None = None) -> list[R]:
    """Do ``work`` with each part, several at a time; what it gave, in the order of parts.

    Worth it only where ``work`` spends its time in native code that lets other threads run. A
    single part, or a single CPU, is done in the caller's thread, which always takes its share.

    Args:
        work: called once with each part, in any order; must not wait for another part.
        parts: all of them.
        threads: at the same time; by default the CPUs of this process, up to eight.

    Raises:
        BaseException: of the first part, in their order, whose work raised; parts not begun then
            are left out.
    """
    todo = deque(enumerate(parts))
    width = min(threads or len(os.sched_getaffinity(0)), MOST, len(todo))
    found: dict[int, R] = {}
    failed: dict[int, BaseException] = {}

    def take() -> None:
        while not failed:
            try:
                number, part = todo.popleft()
            except IndexError:
                return
            try:
                found[number] = work(part)
            except BaseException as error:  # noqa: BLE001 - raised below, in the order of parts
                failed[number] = error

    if width < 2:
        take()
    else:
        with ThreadPoolExecutor(width - 1, thread_name_prefix="plinth-spread") as pool:
            others = [pool.submit(take) for _ in range(width - 1)]
            take()
        for done in others:
            done.result()
    if failed:  # parts are begun in their order, so that this is the first of all that would fail
        raise failed[min(failed)]
    return [found[number] for number in sorted(found)]


def import_ahead(*modules: str) -> None:
    """Import modules in a thread of their own, so that they are there when they are needed.

    Whoever imports one meanwhile waits for it, as the interpreter sees to. One that cannot be
    imported raises where it is used, not here.

    Args:
        modules: by their full names, in the order in which they are imported.
    """
    missing = [name for name in modules if name not in sys.modules]
    if not missing:
        return

    def load() -> None:
        for name in missing:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    threading.Thread(target=load, name="plinth-import", daemon=True).start()
