"""Which models' weights lie in memory: together inside the budget; who was idle longest leaves.

A model that leaves is brought back for what waits for it, beside the lanes, which run others
meanwhile; where a batch comes first after all, it brings the model back itself. Weights in a mapped
file leave by giving their clean pages back, a compiled model by being let go of; that one is
compiled again. What a return takes is not what its batch costs: batches that were held up are told
by :data:`HELD_UP`, and nothing is learned from them.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from plinth.engine.backends.base import Executable, Wrapped, another
from plinth.engine.backends.eager import TorchExecutable, held_tensors
from plinth.engine.errors import ModelError, OutOfMemory
from plinth.engine.mapped import Pages, trim
from plinth.engine.memory.plan import MemoryPlan

MOST_WAIT = 30.0
"""Seconds that a batch waits for the memory of others that run."""


class HeldUp(threading.local):
    """Batches of the calling thread that waited for memory.

    Attributes:
        times: how many, so far: weights had to come back for them, or there was no room.
    """

    times = 0


HELD_UP = HeldUp()


@dataclass(slots=True, eq=False)
class Seat:
    """The place of one model's weights.

    Args:
        bytes: how many they are.
        leave: gives their memory back.
        back: brings them back.
        resident: their memory is theirs.
        away: they are not there, or not yet again.
        users: batches that were handed out, run or wait for them.
        kept: they came back for work that waits, and were not used since.
        cold: no batch has run since they came back; the first is slow, and nothing to learn from.
        returns: how often they came back.
        lock: held while they do.
    """

    bytes: int
    leave: Callable[[], None]
    back: Callable[[], None]
    resident: bool = True
    away: bool = False
    users: int = 0
    kept: bool = False
    cold: bool = False
    returns: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Residency:
    """The seats of one device.

    Args:
        free: bytes of the budget beside weights that always stay and what calls hold, now.
    """

    def __init__(self, free: Callable[[], int]) -> None:
        self._free = free
        self._seats: list[Seat] = []  # who was used longest ago comes first
        self._running: list[int] = []  # bytes of each batch that runs
        self._changed = threading.Condition()
        self._marks = threading.Lock()  # who may leave; never held for long, unlike the other

    def join(self, seat: Seat) -> None:
        """Take in a model; others leave until all fit."""
        with self._changed:
            self._seats.append(seat)
            self._make_room(seat, 0)

    def let_leave(self, needed: int) -> None:
        """Let idle models leave until so many bytes are free, or none is left that could."""
        with self._changed:
            self._make_room(Seat(needed, _nothing, _nothing), 0)

    def part(self, seat: Seat) -> None:
        """Forget a model."""
        with self._changed:
            if seat in self._seats:
                self._seats.remove(seat)
            self._changed.notify_all()

    @property
    def largest(self) -> int:
        """Bytes of the largest, which has to fit beside whatever runs."""
        return max((seat.bytes for seat in self._seats), default=0)

    @contextmanager
    def using(self, seat: Seat, forward: int) -> Iterator[None]:
        """Keep weights in memory for a block, and room for what it takes beside them.

        Raises:
            OutOfMemory: others ran for half a minute and left no room.
        """
        with self._changed:
            self._mark(seat, 1)
            if seat in self._seats:
                self._seats.remove(seat)
                self._seats.append(seat)
        begun = False
        try:
            with self._changed:
                waited = self._wait_for(seat, forward)
                self._running.append(forward)
                begun = True
                seat.returns += not seat.resident
                seat.resident = True
                HELD_UP.times += waited or seat.away or seat.cold
                seat.cold = False
            with seat.lock:
                seat.back()
                seat.away = False
            yield
        finally:
            with self._changed:
                self._mark(seat, -1)
                if begun:
                    self._running.remove(forward)
                self._changed.notify_all()

    def pin(self, seat: Seat) -> bool:
        """Keep weights that are in memory there for a batch, which waits for nothing.

        Returns:
            Whether they are; they stay until :meth:`unpin`.
        """
        with self._marks:
            here = seat.resident and not seat.away
            if here:
                seat.users += 1
                seat.kept = False
            return here

    def unpin(self, seat: Seat) -> None:
        """Let weights leave again that were kept for a batch."""
        with self._changed:
            self._mark(seat, -1)
            self._changed.notify_all()

    def bring_back(self, seat: Seat) -> bool:
        """Bring weights back, to stay until a batch has used them.

        Returns:
            False: there is no room beside those that are in use now.
        """
        with self._changed:
            others = [each for each in self._seats if each is not seat and each.resident]
            busy = bool(self._running) or any(each.users or each.kept for each in others)
            if self._make_room(seat, 0) > 0 and busy:
                return False
            if seat in self._seats:
                self._seats.remove(seat)
                self._seats.append(seat)
            with self._marks:
                seat.returns += not seat.resident
                seat.resident = seat.kept = seat.cold = True
        try:
            with seat.lock:
                seat.back()
                seat.away = False
        except BaseException:
            with self._marks:
                seat.resident, seat.away, seat.kept = False, True, False
            raise
        return True

    def _mark(self, seat: Seat, users: int) -> None:
        with self._marks:
            seat.users += users
            seat.kept = False

    def _wait_for(self, seat: Seat, forward: int) -> bool:
        """Wait until there is room for a batch; whether there was none at first."""
        until, waited = time.monotonic() + MOST_WAIT, False
        while (missing := self._make_room(seat, forward)) > 0 and self._running:
            waited = True
            if not self._changed.wait(until - time.monotonic()):
                raise OutOfMemory(
                    f"{missing} bytes are missing beside the batches that run",
                    needed=seat.bytes + forward,
                    available=seat.bytes + forward - missing,
                    hint="raise memory_budget, or use fewer lanes",
                )
        return waited

    def _make_room(self, seat: Seat, forward: int) -> int:
        """Let idle models leave; bytes that are missing still."""
        while True:
            taken = sum(each.bytes for each in self._seats if each.resident and each is not seat)
            taken += sum(self._running)
            missing = taken + seat.bytes + forward - self._free()
            if missing <= 0 or (idle := self._first_idle(seat)) is None:
                return missing
            idle.leave()

    def _first_idle(self, but: Seat) -> Seat | None:
        """Who was idle longest, and is away from now on; None: nobody is."""
        with self._marks:
            for seat in self._seats:
                if seat.resident and seat.bytes and not (seat.users or seat.kept or seat is but):
                    seat.resident, seat.away = False, True
                    return seat
        return None


def _nothing() -> None:
    """Of a seat that nobody takes."""


class Away:
    """What is known of an executable that has left memory.

    Args:
        gone: the executable.
    """

    def __init__(self, gone: Executable) -> None:
        self.backend, self.precision, self.device = gone.backend, gone.precision, gone.device
        self.weights, self.report = gone.weights, gone.report

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """It has to come back first.

        Raises:
            ModelError: always.
        """
        del inputs
        raise ModelError("a model that has left memory was run", hint="report it")

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`run`."""
        return self.run(inputs)

    def release(self) -> bool:
        """Nothing is kept."""
        return False

    def is_native(self, rows: int) -> bool:
        """Not while it is away."""
        del rows
        return False


class Evictable(Wrapped):
    """An executable whose weights leave memory while others need it.

    Args:
        inner: what runs.
        residency: the seats of its device.
        plan: what a batch takes.
        make: compiles it again; ``None``: its weights lie in a mapped file.
        beside: a module whose pages are given back when what was compiled of it leaves.
    """

    def __init__(
        self,
        inner: Executable,
        residency: Residency,
        plan: MemoryPlan | None,
        make: Callable[[], Executable] | None,
        beside: nn.Module | None = None,
    ) -> None:
        super().__init__(inner)
        self._made: Executable | None = inner
        self._make = make
        self._plan = plan
        self._residency = residency
        self._pages = Pages(held_tensors(inner.module)) if make is None else None  # type: ignore[attr-defined]
        self._beside = Pages(() if beside is None else held_tensors(beside))
        size = inner.weights if self._pages is None else self._pages.bytes
        if inner.report.get("memory"):  # layer by layer: nothing stays between two batches
            size = 0
        self.seat = Seat(size, self._leave, self._back)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`; brings the weights back first."""
        rows = len(next(iter(inputs.values())))
        plan = self._plan
        with self._residency.using(self.seat, plan.fixed + plan.per_row * rows if plan else 0):
            return self.inner.run(inputs)

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        with self._residency.using(self.seat, 0):
            return self.inner.probe(inputs)

    def release(self) -> bool:
        """See :class:`Executable`."""
        made = self._made
        return made is not None and made.release()

    def is_native(self, rows: int) -> bool:
        """Not while it would have to be brought back first."""
        made = self._made
        return self.seat.resident and made is not None and made.is_native(rows)

    @property
    def is_away(self) -> bool:
        """Whether a batch would have to wait for the weights."""
        return self.seat.away or not self.seat.resident

    @property
    def is_kept(self) -> bool:
        """Whether they came back for work that waits, and were not used since."""
        return self.seat.kept

    def pin(self) -> bool:
        """See :meth:`Residency.pin`."""
        return self._residency.pin(self.seat)

    def unpin(self) -> None:
        """See :meth:`Residency.unpin`."""
        self._residency.unpin(self.seat)

    def bring_back(self) -> bool:
        """See :meth:`Residency.bring_back`."""
        return self._residency.bring_back(self.seat)

    def let_go(self) -> None:
        """Let the weights leave although no batch has used them since they came back."""
        self.seat.kept = False

    def another(self) -> Evictable | None:
        """One more for another thread over the same weights, in the same seat."""
        made = another(self.inner) if self._pages is not None else None
        if made is None:
            return None
        other = copy.copy(self)
        other.inner = other._made = made
        return other

    def _leave(self) -> None:
        if self._pages is not None:
            self._pages.give_back()
            return
        self._made, self.inner = None, Away(self.inner)
        self._beside.give_back()
        trim()

    def _back(self) -> None:
        if self._pages is not None:
            self._pages.check()
            if self.seat.away:
                self._pages.read_ahead()
        elif self._made is None and self._make is not None:
            self._made = self.inner = self._make()


def evictable(
    executable: Executable,
    residency: Residency,
    plan: MemoryPlan | None,
    make: Callable[[], Executable] | None,
    beside: nn.Module,
) -> Evictable | None:
    """An executable that can leave memory; ``None`` where it cannot.

    Args:
        executable: what runs on the host.
        residency: the seats of its device.
        plan: what a batch takes.
        make: compiles it again, where that is known.
        beside: the model's module.
    """
    if isinstance(executable, TorchExecutable):
        pages = Pages(held_tensors(executable.module))
        if 2 * pages.bytes > executable.weights:
            return Evictable(executable, residency, plan, None)
        return None
    return None if make is None else Evictable(executable, residency, plan, make, beside)


def seats_status(executable: Any) -> dict[str, Any]:
    """Of a model that can leave memory: whether it lies there, and how often it came back."""
    seat = executable.seat if isinstance(executable, Evictable) else None
    return {} if seat is None else {"resident": seat.resident, "returns": seat.returns}
