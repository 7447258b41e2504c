"""One call on its way through the engine, and the ways in which its caller waits."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from plinth.engine.errors import InputError, ModelError, PlinthError
from plinth.engine.flow import Call, Sla, Tensors, Timing
from plinth.engine.rows import as_mapping, row_count
from plinth.engine.runtime.flow_driver import Result
from plinth.engine.runtime.loaded_model import LoadedModel
from plinth.engine.scheduler.work import BatchKey, Work
from plinth.engine.tiling import WindowGrid, WindowMerger

_log = logging.getLogger(__name__)


class Waiter(Protocol):
    """A caller that waits for one call."""

    def settle(self, outcome: Result | PlinthError) -> None:
        """Hand over the result or the error; a caller that has left is passed over.

        Whatever a callback of the caller raises ends here: it runs in the device thread.
        """
        ...


def _finish(future: Future[Result] | asyncio.Future[Result], outcome: Result | PlinthError) -> None:
    """Finish a future, whatever state it is in and whatever its callbacks raise."""
    try:
        if future.done():
            return
        if isinstance(future, Future) and not future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Result):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
    except BaseException as error:  # noqa: BLE001 - a callback's own failure
        _log.error("a caller's callback raised %s", type(error).__name__)


class ThreadWaiter:
    """A caller that waits in a thread of its own.

    Args:
        future: what the caller holds.
    """

    def __init__(self, future: Future[Result]) -> None:
        self.future = future

    def settle(self, outcome: Result | PlinthError) -> None:
        """See :class:`Waiter`."""
        _finish(self.future, outcome)


class CallerWaiter:
    """A caller that waits for one call in its own thread, unless it runs the call itself."""

    __slots__ = ("_outcome", "_told")

    def __init__(self) -> None:
        self._outcome: Result | PlinthError | None = None
        self._told: threading.Event | None = None

    def settle(self, outcome: Result | PlinthError) -> None:
        """See :class:`Waiter`."""
        if self._outcome is None:
            self._outcome = outcome
            if self._told is not None:
                self._told.set()

    def wait(self, look: Callable[[], object], seconds: float) -> Result:
        """The result.

        Args:
            look: called every so many ``seconds`` while there is none.
            seconds: how often.

        Raises:
            PlinthError: what the call failed with.
        """
        if self._outcome is None:
            self._told = threading.Event()  # before the second look: who settles looks for it after
        while self._outcome is None:
            if self._told is not None and not self._told.wait(seconds):
                look()
        if isinstance(self._outcome, PlinthError):
            raise self._outcome
        return self._outcome


class Mailbox:
    """Outcomes for the callers of one event loop, which is woken once for many of them.

    Args:
        loop: where the callers wait; make the mailbox in its thread.
        resumed: called there when all whose outcomes another thread has posted have gone on.

    Attributes:
        crowded: several callers were woken together, the last time that any were.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, resumed: Callable[[], None]) -> None:
        self._loop = loop
        self._resumed = resumed
        self._thread = threading.get_ident()
        self._waiting: deque[tuple[asyncio.Future[Result], Result | PlinthError]] = deque()
        self._woken = False
        self.crowded = False

    def put(self, future: asyncio.Future[Result], outcome: Result | PlinthError) -> None:
        """Hand over an outcome; from other threads it lies until :meth:`post`."""
        self._waiting.append((future, outcome))
        if threading.get_ident() == self._thread:
            self._open()

    def post(self) -> None:
        """Wake the loop if something lies here."""
        if not self._waiting or self._woken:
            return
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._open_posted)
        except RuntimeError:
            self._waiting.clear()
            _log.debug("an event loop closed before its answers came")

    def _open(self) -> None:
        self._woken, self.crowded = False, len(self._waiting) > 1
        while self._waiting:
            _finish(*self._waiting.popleft())

    def _open_posted(self) -> None:
        self._open()
        self._loop.call_soon(self._resumed)  # behind the tasks that this has woken


class LoopWaiter:
    """A caller that waits in an event loop."""

    def __init__(self, mailbox: Mailbox, future: asyncio.Future[Result]) -> None:
        self.mailbox = mailbox
        self._future = future

    def settle(self, outcome: Result | PlinthError) -> None:
        """See :class:`Waiter`."""
        self.mailbox.put(self._future, outcome)


class ForeseenWaiter:
    """Nobody yet: the flow that is likely to wait for a call which the engine has asked for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcome: Result | PlinthError | None = None
        self._waiter: Waiter | None = None

    def settle(self, outcome: Result | PlinthError) -> None:
        """See :class:`Waiter`."""
        with self._lock:
            self._outcome = outcome
            waiter = self._waiter
        if waiter is not None:
            waiter.settle(outcome)

    def pass_on(self, waiter: Waiter) -> None:
        """The flow does wait: it is told, now or later."""
        with self._lock:
            self._waiter = waiter
            outcome = self._outcome
        if outcome is not None:
            waiter.settle(outcome)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A call that the engine has asked before its flow did.

    Args:
        call: the very object that the flow yields if it does ask it.
        request: what became of it.
        waiter: who waits for that.
    """

    call: Call
    request: Request
    waiter: ForeseenWaiter


@dataclass(slots=True, eq=False)
class Request:
    """One call on its way.

    Args:
        loaded: the model that was asked for.
        rows: what it runs on: tensors (n, ...) by input name, or one volume (c, z, y, x).
        key: its batch key.
        waiter: who waits for it.
        cheaper: the model that runs when time is short, and the batch key there.
        grid: the windows of a volume.
        since: when the flow that asks began; see :class:`Work`.
        then: what the flow is likely to ask next; see :class:`Call`.

    Attributes:
        sla: the promise that it brought; ``None``: its model's.
        foreseen: what was asked then.
        left: its caller went away.
        over: answered or failed; what still comes of it is passed over.
        mode: how it was given to the lanes: whole (``"async"``) or in shares (``"sync"``).
        number: its place in the order of arrival, where answers come in order.
        asked: when it came; ``due``: when its promise ends.
        lock: held by the lane that gives it rows; several may have some.
        answered: when it was.
        follows: when its flow was answered before and asks for more; ``None``: it was not.
    """

    loaded: LoadedModel
    rows: dict[str, Tensor]
    key: BatchKey
    waiter: Waiter
    cheaper: tuple[LoadedModel, BatchKey] | None = None
    grid: WindowGrid | None = None
    since: float | None = None
    then: Callable[[Any], Call | None] | None = None
    sla: Sla | None = None
    foreseen: Foreseen | None = None
    left: bool = False
    merger: WindowMerger | None = field(init=False)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    total: int = field(init=False)
    done: int = 0
    over: bool = False
    mode: str = "async"
    number: int = 0
    asked: float = 0.0
    due: float = float("inf")
    answered: float = 0.0
    follows: float | None = None
    timing: Timing = field(default_factory=Timing)
    works: list[Work] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _early: dict[int, tuple[int, dict[str, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.merger = (
            None if self.grid is None else WindowMerger(self.grid, self.loaded.reserve_windows)
        )
        self.total = row_count(self.rows) if self.grid is None else len(self.grid)

    def ran(self, key: BatchKey) -> LoadedModel:
        """The model that a batch key of this request stands for."""
        return (
            self.cheaper[0] if self.cheaper is not None and key == self.cheaper[1] else self.loaded
        )

    def take(self, first: int, count: int) -> dict[str, Tensor]:
        """Rows ``first`` to ``first + count`` (exclusive), or the windows of these numbers."""
        if self.grid is None:
            if count == self.total:
                return self.rows
            return {name: rows[first : first + count] for name, rows in self.rows.items()}
        name, volume = next(iter(self.rows.items()))
        return {name: self.grid.cut(volume, first, first + count)}

    def put(self, output: dict[str, Tensor], first: int, count: int) -> bool:
        """Take in rows of the output, in any order; whether all are there.

        Args:
            output: the rows, by output name.
            first: the number of the first of them, or of its window.
            count: how many.
        """
        self._early[first] = (count, output)
        while (found := self._early.pop(self.done, None)) is not None:
            rows, piece = found
            self.done += rows
            if self.merger is not None:
                self.merger.put(next(iter(piece.values())))
            else:
                self.outputs.append(piece)
        return self.done >= self.total

    def value(self) -> Tensors:
        """The whole output: a tensor, or tensors by name where the model has several."""
        if self.merger is not None:
            return self.merger.result()
        first = self.outputs[0]
        whole = {
            name: first[name]
            if len(self.outputs) == 1
            else torch.cat([part[name] for part in self.outputs])
            for name in first
        }
        return whole if len(whole) > 1 else next(iter(whole.values()))


def request_of(
    loaded: LoadedModel, call: Call, waiter: Waiter, cheaper: LoadedModel | None = None
) -> Request:
    """Check a call against its model's contract.

    Args:
        loaded: the model.
        call: what a flow asks for.
        waiter: who waits for the answer.
        cheaper: the model that runs when time is short.

    Raises:
        InputError: the rows are not what the model takes.
        ModelError: there are none, or a tiling on a model with several outputs.
    """
    spec = loaded.spec
    names = tuple(tensor.name for tensor in spec.inputs)
    rows = as_mapping(call.rows, names)
    if call.tiling is None:
        spec.check(rows)
        if not row_count(rows):
            raise ModelError(f"a call of {spec.name} has no rows")
        return Request(loaded, rows, loaded.bucket(rows), waiter, _degraded(cheaper, rows))
    volume = rows.get(names[0])
    if volume is None or volume.ndim != 4:
        shape: Any = None if volume is None else tuple(volume.shape)
        raise InputError(
            f"a call of {spec.name} with a tiling takes a volume (c, z, y, x), got {shape}",
            field=names[0],
        )
    if len(spec.outputs) > 1:
        raise ModelError(f"{spec.name} has {len(spec.outputs)} outputs, a tiling blends one")
    channels, z, y, x = volume.shape
    window = {names[0]: volume.new_empty((1, channels, *call.tiling.window), device="meta")}
    spec.check(window)
    grid, other = loaded.windows(call.tiling, (z, y, x)), _degraded(cheaper, window)
    return Request(loaded, rows, loaded.bucket(window), waiter, other, grid)


def _degraded(
    cheaper: LoadedModel | None, rows: dict[str, Tensor]
) -> tuple[LoadedModel, BatchKey] | None:
    return None if cheaper is None else (cheaper, cheaper.bucket(rows))
