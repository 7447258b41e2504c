"""Callers are told at their deadline, whatever the lane does that has their rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_SHORTEST, _LONGEST = 0.005, 0.05
"""Seconds between two looks."""
END_SECONDS = 5.0
"""In which its thread ends, unless whoever it has just told does not come back."""
_log = logging.getLogger("plinth.engine")
_QUIET_LOOKS = 40
"""Looks that find nothing to wait for before it sleeps until it is woken."""


class DeadlineWatch:
    """A thread that looks for deadlines that went by while no lane came back.

    It sleeps while nothing with a deadline is accepted, so an idle engine does nothing.

    Args:
        lock: the engine's.
        look: called with the lock free: tells whoever is to be told, and gives the seconds until
            the next deadline; infinity when there is none.
    """

    def __init__(self, lock: threading.RLock, look: Callable[[], float]) -> None:
        self._wake = threading.Condition(lock)
        self._look = look
        self._thread: threading.Thread | None = None
        self._asleep = False
        self._over = True

    def start(self) -> None:
        """Start its thread, unless it runs; with the lock held."""
        if self._over:
            self._over = self._asleep = False
            self._thread = threading.Thread(target=self._run, name="plinth-deadlines", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Let its thread end, in its own time; with the lock held."""
        self._over = True
        self._wake.notify_all()

    def join(self) -> None:
        """Wait a little until its thread has ended, unless the caller is that thread.

        A callback of a future that it told, and that blocks, keeps it, but not its engine.
        """
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(END_SECONDS)
            if thread.is_alive():
                _log.warning("a callback that was told of a missed deadline has not come back")

    def accepted(self) -> None:
        """Something with a deadline was accepted; with the lock held."""
        if self._asleep:
            self._asleep = False
            self._wake.notify()

    @property
    def _is_over(self) -> bool:
        """Whether the calling thread is to end: it was stopped, and may have a successor."""
        return self._over or self._thread is not threading.current_thread()

    def _run(self) -> None:
        quiet, seconds = 0, _LONGEST
        while True:
            with self._wake:
                if quiet >= _QUIET_LOOKS and not self._is_over:
                    quiet, self._asleep = 0, True
                    while self._asleep and not self._is_over:
                        self._wake.wait()
                elif not self._is_over:
                    self._wake.wait(seconds)
                if self._is_over:
                    return
            left = self._look()
            quiet = quiet + 1 if left == float("inf") else 0
            seconds = min(max(left, _SHORTEST), _LONGEST)
