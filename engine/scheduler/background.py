"""Background work: no deadline, run in slices that are short against the promises in use."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from math import inf
from operator import attrgetter

from plinth.engine.errors import ConfigError
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.lane_table import LaneState
from plinth.engine.scheduler.work import Batch, BatchKey, BatchSlice, Work

_WORTH = 0.97
"""Share of its rows per second that a slice needs no more than while promises are in use."""
_PRICE = 0.5
"""Share of its rows per second that a slice gives up for each share of the tightest promise that it
is shorter by. So what is measured does not have to be exact."""
_TRIES = 16
"""Slices of several rows after which one has a single row, to see whether that has become worth it:
what is never run is never learned."""
_BY_SERVICE = attrgetter("service")
PROMISE_MEMORY = 5.0
"""Seconds for which a request's own promise bounds the slices, at least; at most twice that."""


class Background:
    """Work without a deadline: service by weight, one slice at a time, never starved.

    Args:
        share: share of the device, 0 to 1, that it gets at least while it waits.
        slice_share: a slice may take this share of the tightest promise in use.
        idle_slice: seconds a slice may take while no promise is known.

    Raises:
        ConfigError: an impossible share.
    """

    def __init__(self, share: float, slice_share: float, idle_slice: float) -> None:
        if not 0 <= share < 1:
            raise ConfigError(f"background_share is {share}, expected 0 <= share < 1")
        self.share = share
        self.slice_share = slice_share
        self.idle_slice = idle_slice
        self.rows = 0
        self._works: list[Work] = []
        self._registered = self._noted = self._noted_before = float("inf")
        self._next_rotation = 0.0
        self._deficit = 0.0
        self._virtual_time = 0.0
        self._larger = 0

    def __bool__(self) -> bool:
        return bool(self._works)

    @property
    def in_deficit(self) -> bool:
        """Whether it waits and has received less than its share."""
        return bool(self._works) and self._deficit > 0

    @property
    def first_key(self) -> BatchKey | None:
        """The batch key of the work that was served least."""
        return self._works[0].key if self._works else None

    def next_work(self, costs: LatencyModel) -> Work | None:
        """The least served work whose model lies in memory: what the next slice is of.

        Args:
            costs: what batches cost on the lane.
        """
        is_away = costs.loads.is_away
        return next((work for work in self._works if not is_away(work.key)), None)

    @property
    def bound(self) -> float:
        """Blocking bound: seconds that one slice may hold a lane."""
        return min(self.slice_share * self.tightest, self.idle_slice)

    @property
    def tightest(self) -> float:
        """The tightest promise in use, seconds; infinity when there is none."""
        return min(self._registered, self._noted, self._noted_before)

    def register_sla(self, seconds: float) -> None:
        """Let a promise (seconds) bound the slices for good."""
        self._registered = min(self._registered, seconds)

    def note_sla(self, seconds: float) -> None:
        """Let the promise of one request (seconds) bound the slices for some time."""
        self._noted = min(self._noted, seconds)

    def rotate(self, now: float) -> bool:
        """Forget promises not noted for a while; True when it was time to."""
        if now < self._next_rotation:
            return False
        self._noted_before, self._noted = self._noted, float("inf")
        self._next_rotation = now + PROMISE_MEMORY
        return True

    def add(self, work: Work) -> None:
        """Take work in, at the service of the least served: idle time is not saved up."""
        work.service = max(work.service, self._virtual_time)
        insort(self._works, work, key=_BY_SERVICE)
        self.rows += work.left

    def remove(self, work: Work) -> bool:
        """Take one piece of work out; False when it is not here."""
        if work not in self._works:
            return False
        self._works.remove(work)
        self.rows -= work.left
        return True

    def put_back(self, part: BatchSlice) -> None:
        """Let rows wait again that were given to the device in vain."""
        work, waits = part.work, part.work.left > 0
        work.put_back(part.first, part.rows)
        if waits:
            self.rows += part.rows
        else:
            self.add(work)

    def keys(self) -> set[BatchKey]:
        """The batch keys of what waits."""
        return {work.key for work in self._works}

    def past(self, now: float) -> list[Work]:
        """Work that was tried, see :attr:`Work.tried`, and whose deadline went by."""
        return [work for work in self._works if work.tried and work.deadline <= now]

    @property
    def first_try(self) -> float:
        """The earliest deadline of work that is tried; infinity: there is none."""
        return min((work.deadline for work in self._works if work.tried), default=inf)

    def waiting(self) -> list[Work]:
        """What waits, the least served first."""
        return list(self._works)

    def clear(self) -> list[Work]:
        """Take everything out."""
        out, self._works, self.rows = self._works, [], 0
        return out

    def slice(
        self,
        lane: LaneState,
        max_rows: Callable[[BatchKey], int],
        ahead: float = 0.0,
        beside: float = 0.0,
    ) -> Batch | None:
        """The next slice: the least served work first, filled up with work of the same key.

        While a promise is in use it has the fewest rows that keep nearly all rows per second that
        the bound allows: what comes meanwhile waits for no more of it than pays.

        Args:
            lane: where it runs. The slices that it may be given at once share the bound.
            max_rows: the largest batch of a key, rows.
            ahead: seconds of those it was given and has not done. None is added to them beyond
                the bound; one row alone may take longer, but not behind another slice.
            beside: seconds of the urgent batch that comes between two slices.
        """
        first = self.next_work(lane.costs)
        if first is None:
            return None
        self._virtual_time, key, suspects = first.service, first.key, first.suspects
        bound, costs = self.bound, lane.costs
        rows = self._tried(self._rows(key, lane, max_rows(key), beside))
        if ahead and ahead + costs.predict(key, rows, 0.5) > bound * (1 + 1e-9):
            return None
        parts: list[BatchSlice] = []
        looked_at = 0
        for work in self._works:
            if not rows:
                break
            looked_at += 1
            while rows and work.left and work.key == key and work.suspects is suspects:
                parts.append(work.take(rows))
                rows -= parts[-1].rows
        return self._batch(lane, key, tuple(parts), looked_at)

    def alone(self, work: Work, lane: LaneState) -> Batch | None:
        """The slice of work that comes while nothing waits, without adding it.

        Returns:
            None where a slice would not hold all of it, or its cost is unknown.
        """
        key, rows, costs = work.key, work.rows, lane.costs
        predicted = costs.predict(key, rows)
        if not predicted or self._rows(key, lane, rows) < rows:
            return None
        work.service = max(work.service, self._virtual_time) + predicted / work.sla.weight
        return Batch(key, (work.take(rows),), rows, predicted, urgent=False, lane=lane.number)

    def _rows(self, key: BatchKey, lane: LaneState, most: int, beside: float = 0.0) -> int:
        """Rows of a slice where more than enough wait, 1 to ``most``."""
        costs = lane.costs
        if not costs.predict(key, 1):
            return 1  # cost unknown: the smallest slice measures it
        rows = max(1, costs.rows_within(key, self.bound / lane.depth, most, 0.5))
        if self.tightest == float("inf"):
            return rows
        known, least = min((costs.tries(key, each), each) for each in (1, rows))
        if known < inf:
            return least
        rows = costs.rows_worth(key, rows, _WORTH)
        return costs.rows_weighed(key, rows, _PRICE / self.tightest, beside)

    def _tried(self, rows: int) -> int:
        """The rows of a slice, or now and then a single one; see ``_TRIES``."""
        if rows == 1 or self.tightest == float("inf"):
            return rows
        self._larger = (self._larger + 1) % _TRIES
        return rows if self._larger else 1

    def _batch(
        self, lane: LaneState, key: BatchKey, parts: tuple[BatchSlice, ...], looked_at: int
    ) -> Batch:
        total = sum(part.rows for part in parts)
        predicted = lane.costs.predict(key, total)
        for part in parts:
            part.work.service += predicted * part.rows / total / part.work.sla.weight
        self.rows -= total
        changed, self._works[:looked_at] = self._works[:looked_at], []
        for work in changed:
            if work.left:
                insort(self._works, work, key=_BY_SERVICE)
        return Batch(key, parts, total, predicted, urgent=False, lane=lane.number)

    def account(self, batch: Batch) -> None:
        """Keep the deficit, in seconds of the device, at most 1.

        While work waits, an urgent batch of t seconds adds t * share / (1 - share), a slice of t
        seconds subtracts t (deficit round robin; Shreedhar and Varghese, SIGCOMM 1995). Slices
        that ran in idle time count once at most, so that they are not paid back later.
        """
        if not batch.urgent:
            self._deficit = max(self._deficit, 0.0) - batch.predicted
        elif self._works:
            earned = batch.predicted * self.share / (1 - self.share)
            self._deficit = min(self._deficit + earned, 1.0)
        else:
            self._deficit = 0.0
