"""A device of this process, and the one thread that touches it.

On an accelerator a second one waits for what the first has launched.
"""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable

from plinth.engine.backends.base import check_cpu_threads, cpu_threads, thread_state
from plinth.engine.devices.device import Device

_log = logging.getLogger("plinth.engine")

_COLLECT_SECONDS = 60.0
"""For which the end of a lane waits for what its device still runs, at most."""


class LocalLane:
    """Runs one step after the other on a thread of its own until a step says that it is over.

    Args:
        device: what the thread alone may touch.
        step: waits for one batch and runs it; False ends the lane.
        ended: told in the lane's thread when it ends: None, or the name of the error that ended it.
            It is told of every end that Python can know of.
        threads: CPU threads of its steps; ``None`` as torch has it.
    """

    def __init__(
        self,
        device: Device,
        step: Callable[[], bool],
        ended: Callable[[str | None], None],
        threads: int | None = None,
    ) -> None:
        self.device = device
        self._step = step
        self._ended = ended
        self._threads = threads
        self._thread: threading.Thread | None = None
        self._later: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._collector: threading.Thread | None = None
        self._joining = threading.Lock()
        self._thread_state: object = None

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is a thread of the lane's own."""
        current = threading.current_thread()
        return current is self._thread or current is self._collector

    def runs_alike_here(self) -> bool:
        """Whether the calling thread would compute just what the lane's own does."""
        return self.device.kind == "cpu" and thread_state() == self._thread_state

    def start(self) -> None:
        """Start the thread; an earlier one has ended.

        Raises:
            ConfigError: a lane of this process runs with another number of threads.
        """
        check_cpu_threads(self._threads)
        self._thread = threading.Thread(target=self._run, name="plinth-device", daemon=True)
        self._thread.start()

    def later(self, rest: Callable[[], None]) -> None:
        """Do the rest of a step on the lane's second thread, behind the rests before.

        Args:
            rest: raises nothing.
        """
        if self._collector is None:
            self._collector = threading.Thread(
                target=self._collect, name="plinth-collect", daemon=True
            )
            self._collector.start()
        self._later.put(rest)

    def _collect(self) -> None:
        with cpu_threads(self._threads):
            while (rest := self._later.get()) is not None:
                rest()
                del rest  # it holds a batch, for as long as the next one takes to come

    def _end_collector(self) -> None:
        """Wait until all rests are done."""
        if self._collector is not None:
            self._later.put(None)
            self._collector.join(_COLLECT_SECONDS)
            self._collector = None

    def join(self) -> None:
        """Wait until the thread has ended; several callers may wait at once."""
        thread = self._thread
        if thread is not None and not self.is_current:
            with self._joining:
                thread.join()

    def _run(self) -> None:
        error: str | None = "it was stopped from outside"
        try:
            with cpu_threads(self._threads):
                self._thread_state = thread_state()
                while self._step():
                    pass
            error = None
        except BaseException as raised:  # noqa: BLE001 - a thread that dies says so and why
            error = type(raised).__name__
            frames = "".join(traceback.format_tb(raised.__traceback__))
            _log.critical("the device thread of %s ended: %s\n%s", self.device, error, frames)
        finally:
            self._end_collector()
            self._ended(error)
