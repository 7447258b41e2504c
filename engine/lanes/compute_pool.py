"""Worker processes for the heavy steps of flows.

A step that crashes its worker, hangs or is cancelled costs that step alone: each worker has a
socket pair of its own, shares no lock or queue with the others, and is killed and started anew by
the one thread that it belongs to.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from plinth.engine.errors import (
    Cancelled,
    Closed,
    ComputeError,
    ConfigError,
    DeadlineRefused,
    PlinthError,
    QueueFull,
    Refused,
)
from plinth.engine.flow import Compute
from plinth.engine.lanes import fork_server
from plinth.engine.lanes import worker as child
from plinth.engine.lanes.worker_process import WorkerProcess

MAX_WAITING = 1024
"""Steps that may wait for a worker."""
START_SECONDS = 120.0
"""In which a new process takes its first step."""
IDLE_SECONDS = 300.0
"""After which a worker without work ends, and gives its memory back."""
_STARTS = 3
NICENESS = 10
"""Of the processes: whoever answers urgent calls goes first where the machine is short of CPU."""
_log = logging.getLogger("plinth.engine.compute")

Count = Callable[[str, str, float], None]
"""Told of each step: its name, its outcome, its seconds in a worker."""


@dataclass(eq=False)
class _Task:
    """One step on its way.

    Args:
        step: what is to run.
        seconds: in a worker, at most.
        begun: when it was asked for.
        worker: the process that has it.
        over: why nobody wants its result any more.
    """

    step: Compute
    seconds: float
    begun: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)
    worker: _Worker | None = None
    over: PlinthError | None = None

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Tell whoever waits; once."""
        with contextlib.suppress(Exception):  # cancelled, or told before
            if self.future.set_running_or_notify_cancel():
                if error is None:
                    self.future.set_result(value)
                else:
                    self.future.set_exception(error)


class ComputePool:
    """Runs steps in processes of its own, which start with the first steps and end when idle.

    Args:
        workers: processes at most.
        seconds: limit of a step that brings none.
        count: told of each step that is over; see :data:`Count`.

    Attributes:
        niceness: of processes that are started from now on.

    Raises:
        ConfigError: impossible numbers.
    """

    def __init__(self, workers: int, seconds: float, count: Count = lambda *_: None) -> None:
        if not 1 <= workers <= 256:
            raise ConfigError(f"compute_workers is {workers}, expected 0 to 256")
        if not 0 < seconds < 86_400:
            raise ConfigError(f"compute_seconds is {seconds}, expected 0 < seconds < 1 day")
        self.workers = workers
        self.seconds = seconds
        self._count = count
        self._changed = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._running: set[_Task] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False
        self._server: fork_server.ForkServer | None = None
        self.niceness = NICENESS

    def prepare(self, *modules: str) -> None:
        """Let another process import modules now, and fork the workers (Linux).

        Without it each worker is started anew with its first step, and imports what that takes.

        Args:
            modules: which import what the steps do.
        """
        with self._changed:
            if self._server is None and fork_server.is_possible():
                self._server = fork_server.shared(*modules)
                self._server.lease()

    def submit(self, step: Compute, within: float | None = None) -> Future[Any]:
        """Queue a step; cancelling the future takes it out of the queue, or ends its process.

        Args:
            step: what is to run.
            within: seconds until the flow's promise ends; ``None``: it has none.

        Raises:
            QueueFull: too many wait.
            Closed: the pool was closed.
        """
        if step.function.__module__ == "__main__":
            raise ConfigError(
                f"the step {step.name} is a function of the program that was started",
                hint="put it into a module of its own, which a worker process can import",
            )
        task = _Task(step, step.seconds or self.seconds)
        with self._changed:
            if self._closed:
                raise Closed("the engine was closed and takes no new work")
            if len(self._waiting) >= MAX_WAITING:
                raise QueueFull(
                    f"{MAX_WAITING} steps wait for a worker process",
                    retry_after=1.0,
                    hint="raise engine.compute_workers, or send less at once",
                )
            self._waiting.append(task)
            if self._idle < len(self._waiting) and len(self._threads) < self.workers:
                name = f"plinth-compute-{len(self._threads)}"
                thread = threading.Thread(target=self._serve, name=name, daemon=True)
                self._threads.add(thread)
                thread.start()
            self._changed.notify()
        timer = None
        if within is not None:
            timer = threading.Timer(within, self._overdue, (task, within))
            timer.daemon = True
            timer.start()
        watched = [task]  # given up with the call: the future holds its callbacks for ever
        task.future.add_done_callback(lambda done: self._done(watched.pop(), timer))
        return task.future

    def open(self) -> None:
        """Take steps again after :meth:`close`."""
        with self._changed:
            self._closed = False

    def close(self, drain: bool = True, *, wait: bool = True) -> None:
        """Take no more steps, and end all processes.

        Args:
            drain: finish what was taken first; otherwise it fails with :class:`Closed`.
            wait: return when they have ended.
        """
        with self._changed:
            self._closed = True
            threads = list(self._threads)
            self._changed.notify_all()
        if not drain:
            self.end_all(Closed("the engine was closed"))
        if not wait:
            return  # the fork server ends with the workers that still run, or with this process
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._changed:
            server, self._server = self._server, None
        if server is not None:
            server.give_back()

    def end_all(self, why: PlinthError) -> None:
        """Fail every step that waits or runs, and end the processes of the latter."""
        with self._changed:
            tasks = [*self._waiting, *self._running]
        for task in tasks:
            self._left(task, why)

    def _done(self, task: _Task, timer: threading.Timer | None) -> None:
        if timer is not None:
            timer.cancel()
        if task.future.cancelled():
            self._left(task, Cancelled("the client went away"))

    def _overdue(self, task: _Task, within: float) -> None:
        error = DeadlineRefused(
            f"the step {task.step.name} was not done when the deadline came",
            predicted=time.monotonic() - task.begun,
            deadline=within,
            rows_ahead=0,
            retry_after=max(within, 0.1),
        )
        self._left(task, error)

    def _left(self, task: _Task, why: PlinthError) -> None:
        """Nobody waits for a step any more: it leaves the queue, or its process ends."""
        with self._changed:
            task.over = why
            waits = task in self._waiting
            if waits:
                self._waiting.remove(task)
            elif task.worker is not None:
                task.worker.kill()
        if waits:
            task.settle(error=why)

    # -- the thread of one worker ----------------------------------------------------------------
    def _serve(self) -> None:
        slot = _Slot(self._server, self.niceness)
        try:
            while (task := self._next(slot)) is not None:
                try:
                    self._run(task, slot)
                except BaseException as error:  # noqa: BLE001 - it is whoever waits for it who hears
                    slot.drop()
                    task.settle(error=error)
                finally:
                    with self._changed:
                        self._running.discard(task)
                    del task  # it holds its result, for as long as the next one takes to come
        finally:
            slot.drop()

    def _next(self, slot: _Slot) -> _Task | None:
        """The next step; ``None``: the thread is to end, and is no more counted."""
        with self._changed:
            self._idle += 1
            until = time.monotonic() + (1.0 if slot.worker is None else IDLE_SECONDS)
            while not self._waiting and not self._closed:
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    break
            self._idle -= 1
            if not self._waiting:
                self._threads.discard(threading.current_thread())
                return None
            task = self._waiting.popleft()
            self._running.add(task)
            return task

    def _run(self, task: _Task, slot: _Slot) -> None:
        """Run a step, in a new process where there is none."""
        problem = ""
        for _ in range(_STARTS):
            worker = slot.ready()
            with self._changed:
                if task.future.cancelled() or task.over is not None:
                    task.settle(error=task.over)
                    return
                task.worker = worker
            begun = time.monotonic()
            try:
                outcome = worker.run(task)
            except _NotTakenError as error:  # the process ended before it had anything of this step
                slot.drop()
                problem = str(error)
                continue
            except Exception as error:  # noqa: BLE001 - what cannot be pickled, or read back, too
                slot.drop()
                self._over(task, begun, task.over or _told_as(task, error))
                return
            finally:
                with self._changed:
                    task.worker = None
            self._told(task, begun, outcome)
            return
        raise ComputeError(
            f"no worker process could be started for the step {task.step.name}: {problem}",
            hint="see the log; engine.compute_workers = 0 runs steps in the calling thread",
        )

    def _told(self, task: _Task, begun: float, outcome: child.Outcome) -> None:
        value, error, frames, records = outcome
        for name, level, text in records:
            logging.getLogger(name).log(level, "%s", text)
        if error is not None and not isinstance(error, PlinthError):
            _log.warning("step %s raised %s at\n%s", task.step.name, type(error).__name__, frames)
        self._over(task, begun, error, value)

    def _over(
        self, task: _Task, begun: float, error: BaseException | None, value: Any = None
    ) -> None:
        outcome = "done" if error is None else "raised"
        if isinstance(error, ComputeError | Refused):
            outcome = error.reason
        self._count(task.step.name, outcome, time.monotonic() - begun)
        task.settle(value, error)


class _NotTakenError(Exception):
    """The process ended before it had received the step."""


def _told_as(task: _Task, error: Exception) -> PlinthError:
    """The error of a step that did not come to its end, for the flow."""
    if isinstance(error, PlinthError):
        return error
    told = ComputeError(
        f"the step {task.step.name} could not be sent to its process and back: "
        f"{type(error).__name__}",
        hint="what its function takes and returns must be picklable, and fit into memory",
    )
    told.__cause__ = error
    return told


class _Slot:
    """The place of one process, of the thread that it belongs to.

    Args:
        server: forks it; ``None``: it is started anew.
        niceness: of the process.
    """

    def __init__(self, server: fork_server.ForkServer | None, niceness: int) -> None:
        self._server = server
        self._niceness = niceness
        self.worker: _Worker | None = None

    def ready(self) -> _Worker:
        """The process, started anew where it has ended."""
        if self.worker is None or not self.worker.alive:
            self.drop()
            self.worker = _Worker(self._server, self._niceness)
        return self.worker

    def drop(self) -> None:
        """End the process."""
        if self.worker is not None:
            self.worker.end()
            self.worker = None


class _Worker(WorkerProcess):
    """One process; used by the thread that made it, killed by any."""

    def __init__(self, server: fork_server.ForkServer | None, niceness: int) -> None:
        super().__init__(niceness, server=server)
        self._greeted = False

    def run(self, task: _Task) -> child.Outcome:
        """Run a step.

        Raises:
            _NotTakenError: the process ended before.
            ComputeError: it ended within, or took too long.
        """
        limit = time.monotonic() + START_SECONDS
        try:
            self.socket.settimeout(START_SECONDS)
            if not self._greeted:
                child.send(self.socket, b"p", sys.path)
                self._expect(child.TAKEN, task, limit)
                self._greeted = True
            child.send(self.socket, child.STEP, (task.step.function, task.step.arguments))
            self._expect(child.TAKEN, task, limit)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            raise _NotTakenError(self.how_it_ended()) from None
        limit = time.monotonic() + task.seconds
        try:
            outcome: child.Outcome = self._expect(child.DONE, task, limit)()
        except (ConnectionResetError, EOFError):
            raise ComputeError(
                f"the worker process ended in the step {task.step.name}: {self.how_it_ended()}",
                reason="worker_died",
                hint="a crash of a native library, or too little memory; the log may say more",
            ) from None
        return outcome

    def _expect(self, kind: bytes, task: _Task, limit: float) -> Callable[[], Any]:
        """What reads the next message, which is of this kind and comes before a time."""
        self.socket.settimeout(max(limit - time.monotonic(), 1e-3))
        try:
            message = child.receive(self.socket, keep=True)
        except TimeoutError:
            raise ComputeError(
                f"the step {task.step.name} was not done within {task.seconds:g} s",
                reason="time_limit",
                hint="its process was ended; raise engine.compute_seconds where more is right",
            ) from None
        if message is None:
            raise EOFError
        if message[0] != kind:
            raise EOFError(f"a message {message[0]!r}, expected {kind!r}")
        return message[1]
