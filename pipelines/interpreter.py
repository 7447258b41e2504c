"""The interpreter, set for long-lived servers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator

GC_THRESHOLD = 50_000
"""Objects allocated and not freed before a collection of the youngest generation; default 700."""
STREAM_THRESHOLDS = 5_000, 4, 200_000
"""Of a stream: young objects in a few milliseconds, all of them once in 5e9 such objects.

A state of 100,000 cards is two million objects without a cycle, and a full collection over them
stops every thread for 0.3 to 0.7 s, by default whenever a quarter of them has changed.
"""
SWITCH_INTERVAL_S = 0.001
"""Longest time a thread holds the interpreter while others wait; default 0.005."""
BESIDE_S = 0.0002
"""The same while a thread works that nobody waits for."""
_M_ARENA_MAX = -8
"""mallopt(3)"""
_DEFAULT_S = sys.getswitchinterval()
_asked: list[float] = []
_lock = threading.Lock()


@contextlib.contextmanager
def _switching(seconds: float) -> Iterator[None]:
    """Inside the block threads hold the interpreter so long at most, or shorter if others ask."""
    with _lock:
        _asked.append(seconds)
        sys.setswitchinterval(min(_asked))
    try:
        yield
    finally:
        with _lock:
            _asked.remove(seconds)
            sys.setswitchinterval(min(_asked, default=_DEFAULT_S))


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """Inside the block threads give the interpreter up sooner to those that somebody waits for.

    A payment takes the interpreter back some ten times, each time after up to the switch interval
    of a thread that does not let go of it, such as one that loads a model.
    """
    with _switching(BESIDE_S):
        yield


def one_heap() -> None:
    """Let all threads allocate from one heap, as glibc keeps one for each.

    What a thread of a heap of its own has freed at the heap's end stays with the process. Works
    where no second thread has allocated anything yet: call it first.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inside the block what lives by now is never looked through for garbage (``gc.freeze``).

    A full collection over all that torch and models bring takes 0.1 s, after an export up to 0.3;
    whoever then makes many objects, such as a report, has several. New garbage is found as before.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def set_for_serving(thresholds: tuple[int, ...] = (GC_THRESHOLD,)) -> Iterator[None]:
    """Inside the block collect garbage less often, and switch between threads more often.

    Objects that live by now are :func:`frozen`. Requests and records leave next to no cycles, and
    at the default threshold looking for them takes an eighth of the CPU. A payment waits several
    times for threads that analyse a CT, each time for up to the switch interval.

    Args:
        thresholds: of the generations, as ``gc.set_threshold`` takes them.
    """
    before = gc.get_threshold()
    with frozen():
        gc.set_threshold(*thresholds)
        try:
            with _switching(SWITCH_INTERVAL_S):
                yield
        finally:
            gc.set_threshold(*before)
