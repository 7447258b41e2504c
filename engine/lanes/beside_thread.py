"""A thread of the engine that works beside its lanes."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod


class BesideThread(ABC):
    """A thread that starts with the first work, and again after it has ended.

    Args:
        lock: the engine's.
        name: of the thread.
    """

    def __init__(self, lock: threading.RLock, name: str) -> None:
        self._changed = threading.Condition(lock)
        self._name = name
        self._thread: threading.Thread | None = None
        self._over = False

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def open(self) -> None:
        """Work again after :meth:`stop`; with the lock held."""
        self._over = False

    def stop(self) -> None:
        """Let the thread end; with the lock held."""
        self._over = True
        self._changed.notify()

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, unless the caller is that thread; so long at most."""
        thread = self._thread
        if thread is not None and not self.is_current:
            thread.join(seconds)

    def _begin(self) -> None:
        """Have a thread; with the lock held."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    @abstractmethod
    def _run(self) -> None:
        """Work until it is over; sets ``_thread`` to ``None`` before it ends, with the lock."""
