"""The interpreter, set for long-lived servers."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

GARBAGE_PACE = 50_000
"""Objects made and not freed after which cycles are looked for; Python's own is 700."""
SWITCH_SECONDS = 0.001
"""How long a thread may keep the others waiting; Python's own is 0.005."""


@contextlib.contextmanager
def set_for_serving() -> Iterator[None]:
    """Inside the block look for garbage less often, and let threads change more often.

    A full collection over all that torch brings stops everything for 0.1 s, so what lives by now
    is left out. Requests and records leave next to no cycles, and at Python's pace looking for
    them is an eighth of the CPU. A payment waits several times for threads that analyse a CT.
    """
    pace, switch = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_PACE, *pace[1:])
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(switch)
        gc.set_threshold(*pace)
        gc.unfreeze()
