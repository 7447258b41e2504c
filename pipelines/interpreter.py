"""The interpreter, set for long-lived servers."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

GC_THRESHOLD = 50_000
"""Objects allocated and not freed before a collection of the youngest generation; default 700."""
SWITCH_INTERVAL_S = 0.001
"""Longest time a thread holds the interpreter while others wait; default 0.005."""


@contextlib.contextmanager
def set_for_serving() -> Iterator[None]:
    """Inside the block collect garbage less often, and switch between threads more often.

    Objects that live by now are frozen (``gc.freeze``): a full collection over all that torch
    brings stops every thread for 0.1 s. Requests and records leave next to no cycles, and at the
    default threshold looking for them takes an eighth of the CPU. A payment waits several times
    for threads that analyse a CT, each time for up to the switch interval.
    """
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, *threshold[1:])
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.unfreeze()
