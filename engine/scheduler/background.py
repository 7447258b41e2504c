"""Background work: what has no deadline, in slices short enough for those who have one."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from plinth.engine.errors import ConfigError
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.work import Batch, BatchSlice, Work

PROMISE_MEMORY = 5.0
"""Seconds that a request's own promise is respected after it, at least; at most twice that."""


class Background:
    """Work without a deadline: shares by weight, one slice at a time, never starved.

    Args:
        latency: the cost model.
        share: share of the device, 0 to 1, that it gets at least while it waits.
        slice_share: a slice may take this share of the tightest promise in use.
        idle_slice: seconds a slice may take while no promise is known.

    Raises:
        ConfigError: an impossible share.
    """

    def __init__(
        self, latency: LatencyModel, share: float, slice_share: float, idle_slice: float
    ) -> None:
        if not 0 <= share < 1:
            raise ConfigError(f"background_share is {share}, expected 0 <= share < 1")
        self.latency = latency
        self.share = share
        self.slice_share = slice_share
        self.idle_slice = idle_slice
        self.rows = 0
        self._jobs: list[Work] = []
        self._expected = self._recent = self._earlier = float("inf")
        self._turn = 0.0
        self._credit = 0.0
        self._floor = 0.0

    def __bool__(self) -> bool:
        return bool(self._jobs)

    @property
    def owed(self) -> bool:
        """Whether it waits and has had less than its share."""
        return bool(self._jobs) and self._credit > 0

    @property
    def bound(self) -> float:
        """Blocking bound: seconds that one slice may hold the device."""
        tightest = min(self._expected, self._recent, self._earlier)
        return min(self.slice_share * tightest, self.idle_slice)

    def expect(self, seconds: float) -> None:
        """Respect a promise for good."""
        self._expected = min(self._expected, seconds)

    def respect(self, seconds: float) -> None:
        """Respect the promise of a request for some time."""
        self._recent = min(self._recent, seconds)

    def turn(self, now: float) -> bool:
        """Forget promises that nobody has made lately; True when it was time to."""
        if now < self._turn:
            return False
        self._earlier, self._recent = self._recent, float("inf")
        self._turn = now + PROMISE_MEMORY
        return True

    def add(self, work: Work) -> None:
        """Take work in; it starts level with the least served."""
        work.used = max(work.used, self._floor)
        self._jobs.append(work)
        self.rows += work.left

    def remove(self, work: Work) -> bool:
        """Take one piece of work out; False when it is not here."""
        if work not in self._jobs:
            return False
        self._jobs.remove(work)
        self.rows -= work.left
        return True

    def clear(self) -> list[Work]:
        """Take everything out."""
        out, self._jobs, self.rows = self._jobs, [], 0
        return out

    def slice(self, most: Callable[[str], int]) -> Batch | None:
        """The next slice: the least served job first, filled up by its kin.

        Args:
            most: the largest batch of a work class, rows.
        """
        if not self._jobs:
            return None
        self._jobs.sort(key=attrgetter("used"))
        self._floor, key = self._jobs[0].used, self._jobs[0].key
        rows = max(1, self.latency.rows_within(key, self.bound, most(key), 0.5))
        if not self.latency.predict(key, 1):
            rows = 1  # nobody knows yet how long more would hold the device
        parts: list[BatchSlice] = []
        for work in self._jobs:
            if not rows:
                break
            if work.key == key:
                parts.append(BatchSlice(work, work.taken, min(rows, work.left)))
                work.taken += parts[-1].rows
                rows -= parts[-1].rows
        return self._batch(key, tuple(parts))

    def _batch(self, key: str, parts: tuple[BatchSlice, ...]) -> Batch:
        total = sum(part.rows for part in parts)
        predicted = self.latency.predict(key, total)
        for part in parts:
            part.work.used += predicted * part.rows / total / part.work.sla.weight
        self.rows -= total
        self._jobs = [work for work in self._jobs if work.left]
        return Batch(key, parts, total, predicted, urgent=False)

    def account(self, batch: Batch) -> None:
        """Earn a share of what urgent batches take while work waits; pay for slices."""
        if not batch.urgent:
            # Only the last slice is owed for: what ran in idle time was nobody's loss.
            self._credit = max(self._credit, 0.0) - batch.predicted
        elif self._jobs:
            self._credit = min(self._credit + batch.predicted * self.share / (1 - self.share), 1.0)
        else:
            self._credit = 0.0
