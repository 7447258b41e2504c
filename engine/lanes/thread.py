"""The engine's own side of a lane: the thread that asks for its batches and gives it them."""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from plinth.engine.backends.base import check_cpu_threads, cpu_threads, thread_state
from plinth.engine.errors import PlinthError
from plinth.engine.lanes.base import Lane, LaneDied
from plinth.engine.lanes.load_thread import Leaves

_TRIES = 3
"""Starts of a lane that died before it is left dead."""
_PAUSE = 0.1
"""Seconds, times 4 for each start that failed."""
_log = logging.getLogger("plinth.engine")


class StoppedFromOutside(Exception):
    """A thread ended without a word."""


class LaneThread:
    """Runs one step after the other on a thread of its own until a step says that it is over.

    Args:
        lane: what the steps give batches to.
        lock: the engine's.
        step: waits for one batch and gives it to the lane; False ends the thread.
        ended: told in the thread when it ends: None, or the error that ended it. It is told of
            every end that Python can know of.
        back: told in the thread when the lane is well again after it died; False: nobody needs it.
        threads: CPU threads of its steps; ``None`` as torch has it.

    Attributes:
        number: the lane's in the batcher.
        cpu_threads: of its steps; ``None`` as torch has it.
        wake: notified when there may be something to do.
        in_flight: batches that the lane has: from this thread, or from a caller.
        busy: seconds for which it ran batches.
        draining: it ends as soon as the lane has done what it was given.
        died: why the lane does nothing any more.
        reviving: it died and is being started again.
        given_up: batches that a round waited for in vain; others run them.
        absent: it takes no batches until it has come back from those.
        answering: it has come back in time, and its answers are being handed out.
        deaths: how often it died.
        died_at: when it last did.
        over: the thread has ended, or is about to.
        chores: what the thread does before its next step, one behind each.
        answers: of the batch that it has run, which its next step tells.
        pinned: a model that does not leave memory before the batch that the lane has is done.
    """

    def __init__(
        self,
        lane: Lane,
        lock: threading.RLock,
        step: Callable[[LaneThread], bool],
        ended: Callable[[LaneThread, BaseException | None], None],
        back: Callable[[LaneThread], bool],
        threads: int | None = None,
    ) -> None:
        self.lane = lane
        self.number = -1
        self.wake = threading.Condition(lock)
        self.in_flight = 0
        self.busy = 0.0
        self.draining = False
        self.died: BaseException | None = None
        self.reviving = False
        self.given_up: list[object] = []
        self.absent = self.answering = False
        self.deaths = 0
        self.died_at = 0.0
        self.over = True
        self.chores: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self.answers: list[Any] = []
        self.pinned: Leaves | None = None
        self._step = step
        self._ended = ended
        self._back = back
        self.cpu_threads = threads
        self._thread: threading.Thread | None = None
        self._joining = threading.Lock()
        self._thread_state: object = None

    @property
    def name(self) -> str:
        """What status pages call it: the device, and the number of the lane."""
        return f"{self.lane.label}/{self.number}"

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller is its thread, or one in which its lane is done with batches."""
        return self.is_own or self.lane.is_current()

    @property
    def is_own(self) -> bool:
        """Whether the caller is its thread."""
        return threading.current_thread() is self._thread

    @property
    def is_well(self) -> bool:
        """Whether it takes batches, or ends those that it has."""
        return not (self.over or self.absent or self.died is not None)

    @property
    def has_room(self) -> bool:
        """Whether the lane may be given one more batch."""
        return self.in_flight < self.lane.depth and not self.absent and self.died is None

    @property
    def takes_more(self) -> bool:
        """Whether it may be given one more batch, and is not to end."""
        return self.has_room and not self.over and not self.draining

    def runs_alike_here(self) -> bool:
        """Whether the calling thread would compute just what the lane's own does."""
        lane = self.lane
        return lane.inline and lane.device.kind == "cpu" and thread_state() == self._thread_state

    def unpin(self) -> None:
        """The batch that it was given has been run."""
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            pinned.unpin()

    def status(self, elapsed: float) -> dict[str, Any]:
        """For status pages; ``elapsed``: seconds since the engine was made."""
        draining = "draining" if self.draining else "running"
        away = "hung" if self.absent and not self.over else "stopped"
        dead = "restarting" if self.reviving else "dead" if self.died is not None else away
        return {
            "name": self.name,
            "kind": self.lane.kind,
            "device": str(self.lane.device),
            "machine": self.lane.where,
            "state": draining if self.is_well else dead,
            "deaths": self.deaths,
            "in_flight": self.in_flight,
            "utilisation": self.busy / max(elapsed, 1e-9),
            **self.lane.facts(),
        }

    def start(self) -> None:
        """Start lane and thread; an earlier one has ended.

        Raises:
            ConfigError: an engine of this process runs with another number of threads.
            DeviceError: the lane cannot be started.
        """
        check_cpu_threads(self.cpu_threads)
        self.lane.start()
        self.in_flight, self.died, self.over = 0, None, False
        self.given_up, self.absent = [], False
        self._thread = threading.Thread(target=self._run, name="plinth-device", daemon=True)
        self._thread.start()

    def do(self, chores: Iterable[Callable[[], None]]) -> list[Future[None]]:
        """Let the thread do something between its steps, or once it is started.

        Returns:
            For each the end of it, which tells what it raised; none ends the thread.
        """
        made = [(chore, Future[None]()) for chore in chores]
        with self.wake:
            self.chores.extend(made)
            self.wake.notify()
        return [future for _, future in made]

    def _do_chore(self) -> None:
        if self.chores and not self.answers:
            chore, future = self.chores.popleft()
            try:
                chore()
            except BaseException as error:  # noqa: BLE001 - told to whoever asked for it
                future.set_exception(error)
            else:
                future.set_result(None)

    def join(self, seconds: float = -1) -> bool:
        """Wait until the thread has ended, or so long; several callers may wait at once.

        Returns:
            Whether nobody has to wait for it any more.
        """
        thread = self._thread
        if thread is None or self.is_current:
            return True
        if not self._joining.acquire(timeout=seconds):
            return False
        try:
            thread.join(None if seconds < 0 else seconds)
            return not thread.is_alive()
        finally:
            self._joining.release()

    def _steps(self) -> bool:
        """Run steps until one is the last, or the lane dies; True when it is well again."""
        try:
            self._do_chore()
            while self._step(self):
                self._do_chore()
            return False
        except LaneDied as error:
            if error is not self.died or not self._revived():
                raise
            return True

    def _revived(self) -> bool:
        """Start a lane that died again, if that can help; False: it stays as it is."""
        try:
            if not self.reviving:
                return False
            self.lane.discard()
            for number in range(_TRIES):
                with self.wake:
                    if number and not self.draining:
                        self.wake.wait(_PAUSE * 4**number)
                    if self.draining:
                        return False
                try:
                    self.lane.start()
                except PlinthError as error:
                    _log.error("lane %s: %s", self.name, error)
                else:
                    return self._back(self)
            return False
        finally:
            self.reviving = False

    def _run(self) -> None:
        error: BaseException | None = StoppedFromOutside()
        try:
            with cpu_threads(self.cpu_threads):
                self._thread_state = thread_state()
                while self._steps():
                    pass
            error = None
        except BaseException as raised:  # noqa: BLE001 - a thread that dies says so and why
            error = raised
            frames = "".join(traceback.format_tb(raised.__traceback__))
            name = type(raised).__name__
            _log.critical("the device thread of %s ended: %s\n%s", self.name, name, frames)
        finally:
            while self.chores:
                _, future = self.chores.popleft()
                future.cancel()
                future.set_running_or_notify_cancel()  # only then those who wait are told
            self.lane.close()
            self._ended(self, error)
