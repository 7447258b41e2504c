"""A lane in a process of its own: batches cross as arrays in shared memory, models by recipe.

Whatever ends the process (a native crash, the kernel, ``kill -9``) or stops it (SIGSTOP, a forward
that hangs) is the death of the lane, never of the engine: what it was given has to run elsewhere,
and :meth:`RemoteLane.start` starts another process that holds the same models.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, finalize

from torch import Tensor

from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, DeviceError, ModelError
from plinth.engine.lanes import fork_server
from plinth.engine.lanes import worker as child
from plinth.engine.lanes.base import Held, Lane, LaneDied, Ran, Unit
from plinth.engine.lanes.worker import (
    ENDED,
    FORGET,
    LOAD,
    LOGGED,
    READY,
    REPLY,
    UNIT,
)
from plinth.engine.lanes.worker_process import KILL_SECONDS, WorkerProcess
from plinth.engine.scheduler.cost_model import LatencyModel

HUNG_SECONDS = 10.0
"""A batch that takes no longer is never taken for hung, however fast it usually is."""
HUNG_TIMES = 20.0
"""A batch is taken for hung once it took so many times as long as was predicted."""
UNKNOWN_SECONDS = 120.0
"""In which a batch of unknown cost has to be done."""
START_SECONDS = 120.0
"""In which a new process takes its first unit, and in which it loads a model."""
MAX_DEPTH = 16
_KEPT = 1 << 20
"""Bytes from which an output stays where it came: a process may have 65,530 mappings of memory."""
_log = logging.getLogger("plinth.engine.lanes")

Serve = Callable[[int, int], None]
"""What the process runs: the descriptor of its socket, CPU threads of a forward."""


@dataclass(slots=True)
class _Asked:
    """A message that was sent and is not answered.

    Args:
        limit: seconds in which it has to be, from its turn on.
        unit: the process does one after the other; the rest goes on beside.
        sent: when.
    """

    future: Future[tuple[Any, float]]
    limit: float
    unit: bool
    sent: float


class RemoteLane(Lane):
    """Runs batches on the CPU in other processes, which :meth:`connect` starts.

    Args:
        device: the CPU.
        threads: CPU threads of a forward.
        depth: batches sent to it before the first is done; ``None``: 1.
        costs: what batches cost there; ``None``: as on the engine's own lanes on the CPU.
        hung_seconds: a batch is taken for hung after the longer of this and 20 times what it is
            predicted to take, or 120 s where that is unknown; its process is killed.

    Attributes:
        alone: messages lie in one piece of memory each.

    Raises:
        ConfigError: another device than the CPU, or an impossible depth or bound.
    """

    revives = True
    alone = False

    def __init__(
        self,
        device: Device,
        threads: int,
        depth: int | None = None,
        costs: LatencyModel | None = None,
        hung_seconds: float = HUNG_SECONDS,
    ) -> None:
        if device.kind != "cpu":
            raise ConfigError(
                f"{self.kind}:{device} is no lane: its processes run on the CPU",
                hint=f"name {device} itself, or {self.kind}:cpu",
            )
        if depth is not None and not 1 <= depth <= MAX_DEPTH:
            raise ConfigError(f"pipeline_depth is {depth}, expected 1 to {MAX_DEPTH}")
        if not 0 < hung_seconds <= 3600:
            raise ConfigError(f"hung_seconds is {hung_seconds}, expected 0 < hung_seconds <= 3600")
        super().__init__(device, depth or 1, costs)
        self.hung_seconds = hung_seconds
        self.threads = threads
        self._models: WeakValueDictionary[str, Held] = WeakValueDictionary()
        self._gone: deque[str] = deque()
        self._changing = threading.RLock()
        self._link: Link | None = None

    @property
    def label(self) -> str:
        """See :class:`Lane`."""
        return f"{self.kind}:{self.device}"

    @property
    def pid(self) -> int | None:
        """The number of its process; ``None`` while there is none."""
        link = self._link
        return None if link is None or link.why is not None else link.pid

    def launch(self) -> None:
        """See :class:`Lane`."""
        with self._changing:
            if self._link is None:
                self._link = self.connect()

    def start(self) -> None:
        """See :class:`Lane`."""
        with self._changing:
            link = self._link
            if link is None or link.why is not None:
                link = self._link = self.connect()
            link.await_ready()
            for model in list(self._models.values()):
                try:
                    self.load(link, model)
                except ModelError as error:
                    link.kill()
                    raise DeviceError(error.message, hint=error.hint) from error

    def hold(self, model: Held) -> None:
        """See :class:`Lane`; the process loads it, and its answers are held against the engine's.

        Raises:
            ModelError: it cannot be sent, loaded there, or gives other answers there.
        """
        with self._changing:
            if model.id in self._models:
                return
            self.launch()
            link = self._link
            assert link is not None
            if link.why is None:
                link.await_ready()
                self.load(link, model)
            self._models[model.id] = model
            finalize(model, self._gone.append, model.id)

    @abstractmethod
    def connect(self) -> Link:
        """Start what serves; :meth:`Link.await_ready` waits until it does."""

    def load(self, link: Link, model: Held) -> None:
        """Let its process load a model, and hold its answers against the engine's.

        Raises:
            ModelError: it cannot be sent, loaded there, or gives other answers there.
        """
        if model.id in link.loaded:
            return
        recipe = model.recipe()
        try:
            self.bring(link, recipe)
            found, _ = link.ask(LOAD, (model.id, recipe), START_SECONDS).result()
        except LaneDied as error:
            raise ModelError(
                f"model {model.id.partition('/')[0]} could not be loaded by a worker process: "
                f"{error.message}",
                hint="see the log",
            ) from error
        model.check(found)
        link.loaded.add(model.id)

    def bring(self, link: Link, recipe: object) -> None:
        """Let the process have the files that a recipe names, before it loads it.

        Raises:
            ModelError, LaneDied: it cannot.
        """

    def can_run(self, model: str) -> bool:
        """See :class:`Lane`."""
        return model in self._models

    def submit(self, unit: Unit) -> Future[Ran]:
        """See :class:`Lane`."""
        future: Future[Ran] = Future()
        link = self._link
        try:
            if link is None:
                raise LaneDied(f"the lane {self.label} was not started")
            while self._gone:
                link.tell(FORGET, self._gone.popleft())
            model = self._models[unit.model]
            rows = model.joined(list(unit.parts))
            self.weigh(link, rows)
            asked = link.ask(UNIT, (unit.model, rows), self._limit(unit), unit=True)
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            future.set_exception(error)
        else:
            asked.add_done_callback(lambda done: _settle(future, done))
        return future

    def weigh(self, link: Link, rows: dict[str, Tensor]) -> None:
        """Refuse rows that cannot cross.

        Raises:
            ModelError: they are too large.
        """

    def _limit(self, unit: Unit) -> float:
        return max(
            self.hung_seconds, HUNG_TIMES * unit.seconds if unit.seconds else UNKNOWN_SECONDS
        )

    def is_current(self) -> bool:
        """See :class:`Lane`."""
        return self._link is not None and self._link.is_current

    def discard(self) -> None:
        """See :class:`Lane`."""
        link = self._link
        if link is not None:
            link.close()

    def close(self) -> None:
        """See :class:`Lane`."""
        self.discard()

    def accept(self, about: object) -> None:
        """Refuse a process by what it said of itself when it was ready.

        Raises:
            DeviceError: it is another than it should be.
        """

    def is_over(self, link: Link) -> None:
        """Told when a process has ended, before anybody else is."""


class ProcessLane(RemoteLane):
    """Runs batches on the CPU in a worker process.

    Args:
        device: the CPU.
        serve: a function of a module, which the process runs until its socket ends.
        threads: CPU threads of a forward.
        options: depth, costs and hung_seconds as :class:`RemoteLane` takes them.

    Raises:
        ConfigError: another device than the CPU, or an impossible depth or bound.
    """

    def __init__(self, device: Device, serve: Serve, threads: int, **options: Any) -> None:
        super().__init__(device, threads, **options)
        self._serve = serve
        self._leasing = threading.Lock()
        self._server: fork_server.ForkServer | None = None

    @property
    def kind(self) -> str:
        """See :class:`Lane`."""
        return "process"

    def connect(self) -> Link:
        """See :class:`RemoteLane`."""
        return Link(self, self._open_process)

    def close(self) -> None:
        """See :class:`Lane`; :meth:`discard` leaves the server that forks the next process."""
        super().close()
        with self._leasing:
            server, self._server = self._server, None
        if server is not None:
            server.give_back()

    def _open_process(self) -> WorkerProcess:
        process = WorkerProcess(0, server=self._leased())
        child.send(process.socket, b"p", sys.path)
        given = (self._serve, (process.descriptor, self.threads))
        child.send(process.socket, child.STEP, given)
        return process

    def _leased(self) -> fork_server.ForkServer | None:
        """What forks its processes, until it is closed; ``None``: nothing does, here."""
        with self._leasing:
            if self._server is None and fork_server.is_possible():
                server = fork_server.shared(self._serve.__module__)
                server.lease()
                self._server = server
            return self._server


class Link:
    """One process of a lane and what was sent to it; its thread reads what comes back.

    Args:
        lane: whose.
        opened: starts the process, in the thread.

    Attributes:
        why: how the process ended; ``None``: it has not.
        about: what it said of itself when it was ready.
        silent: machines that did not answer.
        loaded: the models that it holds.
    """

    def __init__(self, lane: RemoteLane, opened: Callable[[], WorkerProcess]) -> None:
        self.pid: int | None = None
        self.why: str | None = None
        self.about: Any = None
        self.silent: list[str] = []
        self.loaded: set[str] = set()
        self._lane = lane
        self._open = opened
        self._process: WorkerProcess | None = None
        self._lock = threading.Lock()
        self._asked: dict[int, _Asked] = {}
        self._numbers = count()
        self._last = 0.0
        self._closing: float | None = None
        self._reason: str | None = None
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._live, name="plinth-process-lane", daemon=True)
        self.thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is its own."""
        return threading.current_thread() is self.thread

    def await_ready(self) -> None:
        """Wait until the process serves.

        Raises:
            DeviceError: it ended before, or takes too long.
        """
        if not self._ready.wait(START_SECONDS):
            self.kill()
        if self.why is not None or not self._ready.is_set():
            raise DeviceError(
                f"a worker process of {self._lane.label} did not start: {self.why or 'too slow'}",
                hint="see the log",
            )
        try:
            self._lane.accept(self.about)
        except DeviceError:
            self.kill()
            raise

    def ask(
        self, kind: bytes, value: tuple[Any, ...], limit: float, *, unit: bool = False
    ) -> Future[tuple[Any, float]]:
        """Send a message; the future has the answer, and the seconds that it took.

        Raises:
            LaneDied: the process has ended.
        """
        asked = _Asked(Future(), limit, unit, time.monotonic())
        with self._lock:
            if self.why is not None or self._process is None:
                raise LaneDied(f"the process of {self._lane.label} ended: {self.why}")
            number = next(self._numbers)
            self._asked[number] = asked
            try:
                sent, alone = (number, *value), self._lane.alone
                child.send(self._process.socket, kind, sent, alone=alone)
            except OSError:
                self.kill()  # who reads tells what becomes of it
            except BaseException:
                del self._asked[number]
                raise
        return asked.future

    def tell(self, kind: bytes, value: Any) -> None:
        """Send a message that is not answered; one that cannot be sent ends the process."""
        with self._lock:
            if self._process is not None and self.why is None:
                try:
                    child.send(self._process.socket, kind, value, alone=self._lane.alone)
                except OSError:
                    self.kill()

    def close(self) -> None:
        """Wait for what was sent, and let the process end."""
        with self._lock:
            left = [each.future for each in self._asked.values()]
        wait(left)  # each is answered within its limit, or its process is killed
        with self._lock:
            self._closing = time.monotonic()
            if self._process is not None and self.why is None:
                try:
                    self._process.socket.shutdown(socket.SHUT_WR)
                except OSError:
                    self.kill()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()

    # -- its thread --------------------------------------------------------------------------
    def _live(self) -> None:
        why = "it was not started"
        try:
            process = self._open()
            process.socket.settimeout(min(1.0, self._lane.hung_seconds / 4))
            with self._lock:
                self._process, self.pid = process, process.pid
            why = self._read(process)
        except Exception as error:  # noqa: BLE001 - whoever waits hears of it below
            why = f"{type(error).__name__}: {error}"
        finally:
            self._over(why)

    def _read(self, process: WorkerProcess) -> str:
        """Hand on what comes until the process ends; how it ended."""
        while True:
            try:
                message = child.receive(process.socket, keep=False)
            except TimeoutError:
                late = self._overdue()
                if late is None:
                    continue
                process.kill()
                return late
            except ConnectionResetError:
                message = None
            if message is None:
                return self._reason or process.how_it_ended()
            self._handle(*message)

    def _overdue(self) -> str | None:
        """Why the process is taken for hung; ``None``: it is not."""
        now = time.monotonic()
        with self._lock:
            if self._closing is not None:
                return "it did not end" if now > self._closing + KILL_SECONDS else None
            units = [each for each in self._asked.values() if each.unit][:1]
            for each in (*units, *(other for other in self._asked.values() if not other.unit)):
                begun = max(each.sent, self._last) if each.unit else each.sent
                if now > begun + each.limit:
                    what = "a batch" if each.unit else "loading a model"
                    return f"{what} took more than {each.limit:.1f} s: it hangs, and was killed"
        return None

    def _handle(self, kind: bytes, read: Callable[[], Any]) -> None:
        if kind == READY:
            self.about = read()
            self._ready.set()
        elif kind == ENDED:
            self._reason, self.silent = read()
        elif kind == LOGGED:
            name, level, text = read()
            logging.getLogger(name).log(level, "%s", text)
        elif kind == REPLY:
            number, value, error, frames = read()
            now = time.monotonic()
            with self._lock:
                asked = self._asked.pop(number)
            seconds = now - asked.sent
            if asked.unit:
                seconds, self._last = now - max(asked.sent, self._last), now
            if error is None:
                asked.future.set_result((value, seconds))
            else:
                if frames:
                    _log.warning("a model raised in %s at\n%s", self._lane.label, frames)
                asked.future.set_exception(error)

    def _over(self, why: str) -> None:
        if self._process is not None:
            self._process.end()
        with self._lock:
            self.why = why
            lost, self._asked = list(self._asked.values()), {}
        self._lane.is_over(self)
        self._ready.set()
        died = LaneDied(f"the process of {self._lane.label} ended: {why}")
        for asked in lost:
            asked.future.set_exception(died)
        if self._closing is None and self._lane.lost is not None:
            self._lane.lost(died)


def _settle(future: Future[Ran], done: Future[tuple[Any, float]]) -> None:
    error = done.exception()
    if error is not None:
        future.set_exception(error)
        return
    (outputs, largest, halvings, precision), seconds = done.result()
    kept = {name: each.clone() if each.nbytes < _KEPT else each for name, each in outputs.items()}
    future.set_result(Ran(kept, seconds, largest, halvings, precision))
