"""A thread that can be left behind.

kafka-python waits without bound in its transaction calls when a coordinator dies meanwhile, so
they run here, under deadlines of ours.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One call on a lane."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._late: Callable[[T], object] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Do the work and keep what came of it."""
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again by wait() in the caller
            self._error = error
        with self._lock:
            self._done.set()
        self._dispose()

    def abandon(self, late: Callable[[T], object]) -> None:
        """Nobody waits any more: hand the result to ``late`` if there will be one."""
        with self._lock:
            self._late = late
        self._dispose()

    def _dispose(self) -> None:
        with self._lock:
            late, self._late = (self._late, None) if self._done.is_set() else (None, self._late)
        if late is not None and self._error is None:
            late(self._value)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> T:
        """The result.

        Raises:
            TimeoutError: it is not there in time.
        """
        if not self._done.wait(seconds):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class Lane:
    """One daemon thread that runs jobs in order and may be left behind."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def start(self, work: Callable[[], T]) -> Job[T]:
        """Queue a call."""
        job = Job(work)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
