"""Urgent work of one work class under one promise, in order of deadline."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter

from plinth.engine.scheduler.work import Work

_RATE_MEMORY = 0.4  # seconds; how fast the arrival rate is forgotten
_ROUNDING = 1e-9  # seconds
_BY_DEADLINE = attrgetter("deadline")
_BY_ROWS = attrgetter("rows")


def rows_of(works: Sequence[Work]) -> int:
    """Rows of several pieces of work."""
    return sum(map(_BY_ROWS, works))


class Stream:
    """Urgent work of one work class whose promises are alike: less than twice one another.

    Args:
        key: the work class.
        quantile: share of answers the promise covers.

    Attributes:
        promise: the shortest allowed time seen, seconds.
        works: what waits, earliest deadline first.
        rows: rows that wait.
        used: seconds of the device that it had; comparable with other streams that wait.
        seen: when work last came, seconds.
    """

    __slots__ = ("_rate", "key", "promise", "quantile", "rows", "seen", "used", "works")

    def __init__(self, key: str, quantile: float) -> None:
        self.key = key
        self.quantile = quantile
        self.promise = float("inf")
        self.works: list[Work] = []
        self.rows = 0
        self.used = 0.0
        self.seen = float("-inf")
        self._rate = 0.0

    @property
    def first(self) -> float:
        """The earliest deadline; something waits."""
        return self.works[0].deadline

    def arrived(self, rows: int, promise: float, now: float) -> None:
        """Count rows that came, taken in or not."""
        self._rate = self.rate(now) + rows / _RATE_MEMORY
        self.seen = now
        self.promise = min(self.promise, promise)

    def rate(self, now: float) -> float:
        """Rows per second that arrive at present."""
        return self._rate * max(0.0, 1 - (now - self.seen) / _RATE_MEMORY)

    def add(self, work: Work, level: float) -> None:
        """Take work in.

        Args:
            work: it has run in no part.
            level: what the stream that was last served had used. A stream that had nothing
                waiting starts there: idle time is not saved up (start-time fair queueing;
                Goyal, Vin and Cheng, SIGCOMM 1996).
        """
        if not self.works:
            self.used = max(self.used, level)
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
                self.cut(place, 1)
                return True
            place += 1
        return False

    def cut(self, first: int, count: int) -> list[Work]:
        """Take ``count`` pieces of work out, from place ``first`` on."""
        out = self.works[first : first + count]
        del self.works[first : first + count]
        self.rows -= rows_of(out)
        return out

    def largest(self, most: int, end: Callable[[int], float]) -> tuple[int, int]:
        """The largest batch of which every row is in time, of the oldest rows that can be.

        Nexus drops what is too old for a batch of the size that keeps up with the load (Shen
        et al., SOSP 2019, section 6.3); here that size is the largest that is possible.

        Args:
            most: rows it may have.
            end: when a batch of so many rows would end, seconds; it grows with the rows.

        Returns:
            The place of its first piece of work, and how many; (0, 0) when none is in time.
        """
        works = self.works
        if self.rows <= most and end(self.rows) <= self.first + _ROUNDING:
            return 0, len(works)
        # From the youngest back there are more rows and less time: where do the two meet?
        tail = works[: -most - 1 : -1]
        sizes = list(accumulate(map(_BY_ROWS, tail)))
        low, high = 0, bisect_right(sizes, most)
        while low < high:
            middle = (low + high) // 2
            if end(sizes[middle]) <= tail[middle].deadline + _ROUNDING:
                low = middle + 1
            else:
                high = middle
        rows = sizes[low - 1] if low else 0
        if low < len(tail):  # there are rows for a larger batch, but not time for all of them
            between = range(rows + 1, min(most, sizes[low] - 1) + 1)
            rows += bisect_right(between, tail[low].deadline + _ROUNDING, key=end)
        first, count, packed = self._pack(rows, most, end)
        while packed < rows:  # work of several rows packs badly, and older work may have time
            rows = packed if count else min(1, rows - 1)
            older = self._pack(rows, most, end)
            if count and older[0] >= first:
                break
            first, count, packed = older
        return (first, count) if count else (0, 0)

    def _pack(self, rows: int, most: int, end: Callable[[int], float]) -> tuple[int, int, int]:
        """The fullest batch that begins with the oldest work which has time for ``rows``.

        Returns:
            The place of its first piece of work, how many, and their rows.
        """
        works = self.works
        first = bisect_left(works, end(rows) - _ROUNDING, key=_BY_DEADLINE)
        while first < len(works):
            in_time = works[first].deadline + _ROUNDING
            packed = list(accumulate(map(_BY_ROWS, works[first : first + most])))
            count = min(bisect_right(packed, most), bisect_right(packed, in_time, key=end))
            if count:
                return first, count, packed[count - 1]
            first += 1  # it alone is too large
        return first, 0, 0
