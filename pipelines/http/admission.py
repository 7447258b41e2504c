"""How long requests waited in their sockets before an event loop read them."""

from __future__ import annotations

import asyncio
import time

_REST = 0.0002  # seconds without anything to do after which a loop counts as idle


class Turn:
    """The turns of the event loop, as the requests that are read in them see them.

    Sockets are asked once a turn. A loop that was idle read a request as it came; in a loop
    that never rested, it may have waited since the sockets were asked the time before.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.cost = 50e-6
        self.begun = self._active = 0.0
        self._waited = 0.0
        self._open = False

    def age(self, now: float) -> float:
        """Seconds that a request read now may have waited in its socket, at most."""
        if not self._open:
            self._open = True
            self._waited = now - self.begun if now - self._active < _REST else 0.0
            self.begun, self.taken = now, 0
            asyncio.get_running_loop().call_soon(self._close)
        self._active = now
        return self._waited + now - self.begun

    def served(self, count: int, reading: float, writing: float) -> None:
        """Answers were written: what reading one and writing all took the loop (seconds).

        A stall of the machine is no cost of a request, and must not close the door after it.
        """
        seen = min(reading + writing / count, 2 * self.cost)
        self.cost += 0.05 * (seen - self.cost)
        self._active = time.perf_counter()

    def _close(self) -> None:
        self._open = False
