"""Which connections are read, when, and how many requests may be in work at once.

An edge-triggered epoll set names the connections that have bytes for 0.3 µs each without reading
them. So the server knows how long each has waited, and reads no more than it can serve:

- **Order.** First come, first served, while the oldest has waited for less than half of the
  promise: a queue that a pause left behind is worked off in time. Beyond it the newest is read
  first: what is served can still be in time. (Facebook's adaptive LIFO: Maurer, "Fail at Scale",
  ACM Queue 13(8), 2015.)
- **Bound.** No more than :attr:`Limit.room` requests are begun. The bound falls by a tenth in
  every round of 50 ms in which more than a twentieth of the answers were refused by the engine or
  took two thirds of the promise, and grows by a tenth when it was reached and they did not.
- **Fairness.** Whoever has waited for half of the promise (or 50 ms while nothing can be begun) is
  read, the oldest first, and answered or refused: three for every four requests begun, or for a
  quarter of the time while nothing can be begun. So each connection gets an answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

TURN = 64
"""Requests begun in one turn of the event loop."""
STALE = 1 / 2
"""Share of the promise after which the newest are served first, and the oldest are refused."""
BLOCKED = 0.05
"""Seconds after which a connection is read although nothing can be begun, to be told so."""
PER_BEGUN = 3 / 4
"""Stale connections read for each request that was begun: a refusal costs a third of an answer."""
WHILE_BLOCKED = 1 / 4
"""Share of the time that may go into reading the stale while nothing can be begun."""
_ROUND = 0.05  # seconds between two looks at the bound
FLOOR = 64
"""Requests that may always be in work: two batches of a quick model."""


class Waiting(Protocol):
    """A connection with bytes to read."""

    arrived: float
    queued: bool

    @property
    def wants_read(self) -> bool:
        """Whether it is still there and waits to be read."""
        ...

    def read(self) -> None:
        """Read once."""
        ...

    def read_stale(self) -> None:
        """Read once, what has waited for too long."""
        ...


class Limit:
    """The bound on requests in work, which follows what is answered in time.

    Args:
        most: it never grows beyond.

    Attributes:
        floor: it never falls below; two batches of the slowest model, so that the device need not
            wait for the requests of the next batch to be read.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_work = 0
        self.floor = FLOOR
        self.freed: Callable[[], None] | None = None
        self._bound = float(min(most, 256))
        self._good = self._bad = 0
        self._reached = False
        self._looked = 0.0

    @property
    def room(self) -> int:
        """How many more requests may be begun; below 1: none."""
        return int(self._bound) - self.in_work

    def begin(self) -> None:
        """A request is begun."""
        self.in_work += 1
        if self.in_work >= self._bound:
            self._reached = True

    def end(self, now: float, congested: bool) -> None:
        """A request is answered.

        Args:
            now: seconds, monotonic.
            congested: the engine had no time for it, or it took long.
        """
        self.in_work -= 1
        if congested:
            self._bad += 1
        else:
            self._good += 1
        if now - self._looked > _ROUND:
            self._adapt()
            self._looked = now
        if self.freed is not None:
            self.freed()

    def _adapt(self) -> None:
        floor = min(self.most, self.floor)
        if self._bad * 20 > self._bad + self._good:
            self._bound = max(float(floor), self._bound * 0.9)
        elif self._reached:
            self._bound = min(float(self.most), self._bound * 1.1 + 1)
        self._good = self._bad = 0
        self._reached = False


class ReadyQueue:
    """Connections with a new request, in the order in which their bytes came.

    Args:
        promise: seconds; the tightest of what is served, ``None`` without one.
    """

    def __init__(self, promise: float | None) -> None:
        self._stale = (promise or 2e9) * STALE
        self._waiting: deque[Waiting] = deque()
        self._credit = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, connection: Waiting, now: float) -> None:
        """A connection has bytes."""
        connection.arrived = now
        connection.queued = True
        self._waiting.append(connection)

    def next(self, now: float) -> Waiting | None:
        """Whose turn it is."""
        waiting = self._waiting
        while waiting:
            newest_first = now - waiting[0].arrived > self._stale
            found = waiting.pop() if newest_first else waiting.popleft()
            found.queued = False
            if found.wants_read:
                return found
        return None

    def next_stale(self, now: float, blocked: bool) -> Waiting | None:
        """The oldest, if it has waited for too long and there is time for it.

        Args:
            now: seconds, monotonic.
            blocked: nothing can be begun.
        """
        waiting = self._waiting
        patience = min(self._stale, BLOCKED) if blocked else self._stale
        while waiting and (blocked or self._credit >= 1):
            if now - waiting[0].arrived < patience:
                return None
            found = waiting.popleft()
            found.queued = False
            if found.wants_read:
                self._credit -= 0 if blocked else 1
                return found
        return None

    def begun(self, count: int) -> None:
        """So many requests were read in their turn."""
        self._credit = min(float(TURN), self._credit + PER_BEGUN * count)
