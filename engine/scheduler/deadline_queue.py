"""Urgent work of one batch key under one promise, in order of deadline."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter

from plinth.engine.scheduler.work import BatchKey, Suspects, Work

_RATE_MEMORY = 0.4  # seconds; how fast the arrival rate is forgotten
_ROUNDING = 1e-9  # seconds
_BY_DEADLINE = attrgetter("deadline")
_BY_ROWS = attrgetter("rows")


def rows_of(works: Sequence[Work]) -> int:
    """Rows of several pieces of work."""
    return sum(map(_BY_ROWS, works))


class DeadlineQueue:
    """Urgent work of one batch key whose promises are less than twice one another.

    Args:
        key: the batch key.
        quantile: share of answers the promise covers.
        suspects: for works of a batch that failed: those they may share a batch with.

    Attributes:
        promise: the shortest allowed time so far, seconds.
        works: what waits, earliest deadline first.
        rows: rows that wait.
        service: seconds of the device it received; comparable between queues that wait.
        last_arrival: when work last came, seconds.
    """

    __slots__ = (
        *("_rate", "key", "last_arrival", "promise", "quantile", "rows", "service", "suspects"),
        "works",
    )

    def __init__(self, key: BatchKey, quantile: float, suspects: Suspects | None = None) -> None:
        self.key = key
        self.quantile = quantile
        self.suspects = suspects
        self.promise = float("inf")
        self.works: list[Work] = []
        self.rows = 0
        self.service = 0.0
        self.last_arrival = float("-inf")
        self._rate = 0.0

    @property
    def first_deadline(self) -> float:
        """The earliest deadline; something waits."""
        return self.works[0].deadline

    def arrived(self, rows: int, promise: float, now: float) -> None:
        """Count rows that arrived, admitted or not."""
        self._rate = self.rate(now) + rows / _RATE_MEMORY
        self.last_arrival = now
        self.promise = min(self.promise, promise)

    def rate(self, now: float) -> float:
        """Rows per second that arrive at present."""
        return self._rate * max(0.0, 1 - (now - self.last_arrival) / _RATE_MEMORY)

    def add(self, work: Work, virtual_time: float) -> None:
        """Take work in.

        Args:
            work: it has run in no part.
            virtual_time: the service of the queue that was last served. An empty queue starts
                there: idle time is not saved up (start-time fair queueing; Goyal, Vin and Cheng,
                SIGCOMM 1996).
        """
        if not self.works:
            self.service = max(self.service, virtual_time)
        if not self.works or self.works[-1].deadline <= work.deadline:
            self.works.append(work)
        else:
            insort(self.works, work, key=_BY_DEADLINE)
        self.rows += work.rows

    def remove(self, work: Work) -> bool:
        """Take one piece of work out; False when it is not here."""
        place = bisect_left(self.works, work.deadline, key=_BY_DEADLINE)
        while place < len(self.works) and self.works[place].deadline == work.deadline:
            if self.works[place] is work:
                self.take(place, 1)
                return True
            place += 1
        return False

    def take(self, first: int, count: int) -> list[Work]:
        """Take ``count`` pieces of work out, from place ``first`` on."""
        out = self.works[first : first + count]
        del self.works[first : first + count]
        self.rows -= rows_of(out)
        return out

    def finishing_batch(
        self, chosen: tuple[int, int], max_rows: int, end: Callable[[int], float]
    ) -> tuple[int, int]:
        """A batch, or one that leaves out no share of a request that was begun and is in time.

        What the other shares took would be lost with it.

        Args:
            chosen: place of its first piece of work, and how many.
            max_rows: rows it may have.
            end: when a batch of so many rows would end, seconds; it grows with the rows.
        """
        for place, work in enumerate(self.works[: chosen[0]]):
            if work.shares is None or not work.shares.begun:
                continue
            packed = list(accumulate(map(_BY_ROWS, self.works[place : place + max_rows])))
            in_time = work.deadline + _ROUNDING
            count = min(bisect_right(packed, max_rows), bisect_right(packed, in_time, key=end))
            if count:
                return place, count
        return chosen

    def largest_batch(self, max_rows: int, end: Callable[[int], float]) -> tuple[int, int]:
        """The largest batch of which every row is in time, of the oldest rows that can be.

        Nexus drops what is too old for a batch of the size that keeps up with the load (Shen
        et al., SOSP 2019, section 6.3); here that size is the largest that is possible.

        Args:
            max_rows: rows it may have.
            end: when a batch of so many rows would end, seconds; it grows with the rows.

        Returns:
            The place of its first piece of work, and how many; (0, 0) when none is in time.
        """
        works = self.works
        if self.rows <= max_rows and end(self.rows) <= self.first_deadline + _ROUNDING:
            return 0, len(works)
        # From the youngest back there are more rows and less time: where do the two meet?
        tail = works[: -max_rows - 1 : -1]
        sizes = list(accumulate(map(_BY_ROWS, tail)))
        low, high = 0, bisect_right(sizes, max_rows)
        while low < high:
            middle = (low + high) // 2
            if end(sizes[middle]) <= tail[middle].deadline + _ROUNDING:
                low = middle + 1
            else:
                high = middle
        rows = sizes[low - 1] if low else 0
        if low < len(tail):  # there are rows for a larger batch, but not time for all of them
            between = range(rows + 1, min(max_rows, sizes[low] - 1) + 1)
            rows += bisect_right(between, tail[low].deadline + _ROUNDING, key=end)
        first, count, packed = self._pack(rows, max_rows, end)
        while packed < rows:  # work of several rows packs badly, and older work may have time
            rows = packed if count else min(1, rows - 1)
            older = self._pack(rows, max_rows, end)
            if count and older[0] >= first:
                break
            first, count, packed = older
        return (first, count) if count else (0, 0)

    def _pack(self, rows: int, max_rows: int, end: Callable[[int], float]) -> tuple[int, int, int]:
        """The fullest batch that begins with the oldest work which has time for ``rows``.

        Returns:
            The place of its first piece of work, how many, and their rows.
        """
        works = self.works
        first = bisect_left(works, end(rows) - _ROUNDING, key=_BY_DEADLINE)
        while first < len(works):
            in_time = works[first].deadline + _ROUNDING
            packed = list(accumulate(map(_BY_ROWS, works[first : first + max_rows])))
            count = min(bisect_right(packed, max_rows), bisect_right(packed, in_time, key=end))
            if count:
                return first, count, packed[count - 1]
            first += 1  # it alone is too large
        return first, 0, 0
