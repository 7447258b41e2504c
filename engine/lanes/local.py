"""A device of this process, and the one thread that touches it."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable

from plinth.engine.backends.base import check_cpu_threads, cpu_threads, thread_state
from plinth.engine.devices.device import Device

_log = logging.getLogger("plinth.engine")


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
        self._joining = threading.Lock()
        self._thread_state: object = None

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is the lane's own thread."""
        return self._thread is threading.current_thread()

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
            self._ended(error)
