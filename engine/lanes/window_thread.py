"""Windows of volumes are put together beside the lanes, so that no urgent row waits for it.

One window takes little, but with the last one of a row of windows whole planes are done, and
normalised and reduced at once: 75 ms of CPU for a chest CT, twice what a slice may take.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from plinth.engine.backends.base import cpu_threads
from plinth.engine.lanes.beside_thread import BesideThread

MAX_BYTES = 64 << 20
"""Outputs of windows that wait at most; a lane puts those beyond together itself."""


class WindowThread(BesideThread):
    """Puts windows together, one batch after the other; what waits when it is stopped, too.

    Args:
        lock: the engine's.
        threads: CPU threads of a lane, which it uses like one; ``None`` as torch has it.
        failed: told what a batch raised, which then was nobody's.
        idle: told, with the lock held, when nothing waits any more.
    """

    def __init__(
        self,
        lock: threading.RLock,
        threads: Callable[[], int | None],
        failed: Callable[[BaseException], None],
        idle: Callable[[], None],
    ) -> None:
        super().__init__(lock, "plinth-windows")
        self._threads = threads
        self._failed = failed
        self._idle = idle
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self.bytes = 0
        self.count = 0

    def offer(self, size: int, put: Callable[[], None]) -> bool:
        """Let the thread put a batch together; False: it has too much, or is to end.

        Args:
            size: bytes that are held until it is done.
            put: does it.
        """
        with self._changed:
            if self._over or self.bytes + size > MAX_BYTES:
                return False
            self._begin()
            self._waiting.append((size, put))
            self.bytes += size
            self.count += 1
            self._changed.notify()
            return True

    def _run(self) -> None:
        with cpu_threads(self._threads()):
            while (found := self._next()) is not None:
                size, put = found
                try:
                    put()
                except BaseException as error:  # noqa: BLE001 - ends the lanes, not this thread
                    self._failed(error)
                finally:
                    del found, put  # they hold the outputs
                    with self._changed:
                        self.bytes -= size
                        self.count -= 1
                        if not self.count:
                            self._idle()

    def _next(self) -> tuple[int, Callable[[], None]] | None:
        with self._changed:
            while not self._waiting:
                if self._over:
                    self._thread = None
                    return None
                self._changed.wait()
            return self._waiting.popleft()
