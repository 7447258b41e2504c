"""The garbage collector, at a pace that suits long-lived servers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

PACE = 50_000
"""Objects made and not freed after which cycles are looked for; Python's own is 700."""


@contextlib.contextmanager
def slow_garbage() -> Iterator[None]:
    """Look for cycles less often inside the block, and never in what lives by now.

    A full collection over all that torch brings stops everything for 0.1 s. Requests and records
    leave next to no cycles, and at Python's pace looking for them is an eighth of the CPU.
    """
    pace = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(PACE, *pace[1:])
    try:
        yield
    finally:
        gc.set_threshold(*pace)
        gc.unfreeze()
