"""Deadline-aware elastic batching: which rows run next, and which cannot make it.

No clock and no thread live here: every method takes ``now`` (seconds on any one monotonic
clock), so the policy that serves is the policy that the virtual-time simulator proves.

The policy, when the device is free:

1. Urgent work of each work class is ordered by deadline. If the device can clear the queue
   without a miss, the batch is what fits before the first deadline. Otherwise it is the
   *largest* batch of which every row still makes its deadline by the batch's own predicted
   finish; the rows too old for it are refused, degraded or made late. Meeting the first
   deadline at any price would shrink the batches until nothing is in time (Shen et al.,
   Nexus, SOSP 2019, section 6.3).
2. Between work classes, the earliest deadline goes first.
3. Without urgent work, or once background work is owed its minimum share, one slice of
   background work runs. Its predicted time stays below the blocking bound.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter

from engine.errors import ConfigError, DeadlineRefused, QueueFull
from engine.flow import Sla
from engine.latency import LatencyModel
from engine.work import Batch, Part, Refusal, Work, WorkClass

_LOOK_AHEAD = 3  # batches after which a queue of mixed promises counts as overload
_RATE_MEMORY = 0.4  # seconds; how fast the arrival rate is forgotten
_PROMISE_MEMORY = 5.0  # seconds; a request's own promise bounds slices as long, to twice as long
_BY_DEADLINE = attrgetter("deadline")


class Batcher:
    """Orders work, forms batches, refuses what cannot be in time.

    Args:
        latency: the cost model; shared with the runtime, which lets it learn.
        max_queue: rows of urgent work that may wait; above it :class:`QueueFull`.
        background_share: share of the device, 0 to 1, that background work gets at least
            while it waits behind urgent work.
        slice_share: blocking bound: a background slice may take this share of the tightest
            promise in use.
        idle_slice: blocking bound in seconds while no promise is known.
    """

    def __init__(
        self,
        latency: LatencyModel,
        *,
        max_queue: int = 4096,
        background_share: float = 0.05,
        slice_share: float = 0.4,
        idle_slice: float = 0.1,
    ) -> None:
        if not 0 <= background_share < 1:
            raise ConfigError(f"background_share is {background_share}, expected 0 <= share < 1")
        self.latency = latency
        self.max_queue = max_queue
        self.background_share = background_share
        self.slice_share = slice_share
        self.idle_slice = idle_slice
        self._classes: dict[str, WorkClass] = {}
        self._urgent: dict[str, list[Work]] = {}
        self._background: list[Work] = []
        self._rows: dict[str, int] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._expected = self._recent = self._earlier = float("inf")
        self._turn = 0.0
        self._busy_until = 0.0
        self._credit = 0.0
        self._floor = 0.0

    # -- settings and state ------------------------------------------------------------------
    def register(self, key: str, most: int = 128, cheaper: str | None = None) -> None:
        """Make a work class known; work of unknown classes gets batches of up to 128 rows."""
        if most < 1:
            raise ConfigError(f"the largest batch of {key} is {most} rows, expected 1 or more")
        self._classes[key] = WorkClass(most, cheaper)

    def shrink(self, key: str, most: int) -> None:
        """Bound the batches of a work class from now on, because larger ones did not fit."""
        self._class(key).most = most

    def expect(self, sla: Sla) -> None:
        """Make a promise known for good, so that slices respect it before its first request."""
        if sla.deadline_ms is not None:
            self._expected = min(self._expected, sla.deadline_ms / 1e3)

    @property
    def urgent_rows(self) -> int:
        """Rows of urgent work that wait."""
        return sum(self._rows.values())

    @property
    def background_rows(self) -> int:
        """Rows of background work that wait."""
        return sum(work.left for work in self._background)

    def __bool__(self) -> bool:
        return bool(self._background) or any(self._urgent.values())

    # -- arrival -----------------------------------------------------------------------------
    def offer(self, work: Work, now: float) -> Refusal | None:
        """Take work in, or say at once why not.

        Returns:
            None when it was taken (its ``key`` may have become the cheaper class), else the
            refusal: :class:`QueueFull`, or :class:`DeadlineRefused` for work that could not
            be in time even if it ran next.
        """
        if work.sla.deadline_ms is None:
            self._add_background(work)
            return None
        if self.urgent_rows + work.rows > self.max_queue:
            return Refusal(work, self._full(work, now))
        self._count(work, now)
        start = max(now, self._busy_until)
        if self._finish(work.key, work.left, start) <= work.deadline:
            self._add_urgent(work)
            self._recent = min(self._recent, work.sla.deadline_ms / 1e3)
            return None
        return self._overdue(work, now, start)

    def cancel(self, work: Work) -> None:
        """Forget work whose client went away; rows already on the device still finish."""
        if work in self._background:
            self._background.remove(work)
        queue = self._urgent.get(work.key, [])
        if work in queue:
            queue.remove(work)
            self._rows[work.key] -= work.left

    def clear(self) -> list[Work]:
        """Forget all work that waits, and return it."""
        waiting = [*self._background, *(work for queue in self._urgent.values() for work in queue)]
        self._background.clear()
        self._urgent.clear()
        self._rows.clear()
        return waiting

    # -- the device is free ------------------------------------------------------------------
    def next(self, now: float) -> tuple[Batch | None, list[Refusal]]:
        """The batch to run now, and the work given up to make it possible."""
        refused: list[Refusal] = []
        if now >= self._turn:
            self._earlier, self._recent = self._recent, float("inf")
            self._turn = now + _PROMISE_MEMORY
        for key in list(self._urgent):
            self._sweep(key, now, refused)
        owed = self._background and self._credit > 0
        batch = self._slice(now) if owed else None
        if batch is None:
            batch = self._urgent_batch(now, refused) or self._slice(now)
        if batch is not None:
            self._busy_until = self._finish(batch.key, batch.rows, now)
            self._account(batch)
        return batch, refused

    def finished(self, batch: Batch, seconds: float, now: float) -> None:
        """Learn what a batch really took; the device is free from ``now`` on."""
        self.latency.observe(batch.key, batch.rows, seconds)
        self._busy_until = now

    # -- urgent ------------------------------------------------------------------------------
    def _urgent_batch(self, now: float, refused: list[Refusal]) -> Batch | None:
        while True:
            heads = [(queue[0].deadline, key) for key, queue in self._urgent.items() if queue]
            if not heads:
                return None
            key = min(heads)[1]
            skip, rows = self._plan(key, now)
            self._drop(key, skip, now, refused)
            if rows:
                return self._take(key, rows)

    def _plan(self, key: str, now: float) -> tuple[int, int]:
        """(work to give up, rows to run) for one work class."""
        queue = self._urgent[key]
        if self._clears(key, now):
            return 0, max(queue[0].left, self._fits(key, queue[0], now))
        left = self._rows[key]
        best = (0, 0)
        for skip, work in enumerate(queue):
            rows = min(left, self._fits(key, work, now))
            if rows > best[1]:
                best = (skip, rows)
            left -= work.left
            if left <= best[1]:
                break
        if best[1]:
            return best
        # Only the rare slow batch would miss: a likely answer is better than a sure refusal.
        rows = self._fits(key, queue[0], now, 0.5)
        return (0, rows) if rows else (1, 0)

    def _fits(self, key: str, work: Work, start: float, quantile: float | None = None) -> int:
        """Rows of a batch started at ``start`` that finishes before the deadline of ``work``."""
        slack, share = work.deadline - start, quantile or work.sla.quantile
        rows = self.latency.rows_within(key, slack, self._class(key).most, share)
        return rows if rows >= work.left else 0

    def _clears(self, key: str, now: float) -> bool:
        """Whether earliest deadline first, dropping nothing, empties the queue in time.

        Looks a few batches ahead, with arrivals going on at the present rate.
        """
        queue, most = self._urgent[key], self._class(key).most
        works = iter(queue)
        head = next(works, None)
        waiting, at, rate = float(self._rows[key]), now, self.rate(key, now)
        # With one promise, chains of shrinking batches are the very trap of the first deadline.
        alike = queue[0].sla.deadline_ms == queue[-1].sla.deadline_ms
        for _ in range(1 if alike else _LOOK_AHEAD):
            if head is None:
                return True
            rows = self._fits(key, head, at)
            if not rows:
                return False
            if rows >= min(waiting, most):
                return True
            seconds = self.latency.predict(key, rows, head.sla.quantile)
            waiting += rate * seconds - rows
            at += seconds
            head = _past(works, head, rows)
        return head is None

    def _take(self, key: str, rows: int) -> Batch:
        queue, parts, count = self._urgent[key], [], 0
        while queue and count + queue[0].left <= rows:
            work = queue.pop(0)
            parts.append(Part(work, work.taken, work.left))
            count += work.left
            work.taken = work.rows
        self._rows[key] -= count
        quantile = max(part.work.sla.quantile for part in parts)
        predicted = self.latency.predict(key, count, quantile)
        return Batch(key, tuple(parts), count, predicted, urgent=True)

    def _sweep(self, key: str, now: float, refused: list[Refusal]) -> None:
        """Give up work that could not be in time even if it ran alone now."""
        queue, hopeless = self._urgent[key], 0
        for work in queue:
            if self._finish(key, work.left, now) <= work.deadline:
                break
            hopeless += 1
        self._drop(key, hopeless, now, refused)

    def _drop(self, key: str, count: int, now: float, refused: list[Refusal]) -> None:
        """Take the first ``count`` pieces of work out of a queue, as their promises say."""
        dropped, self._urgent[key][:count] = self._urgent[key][:count], []
        for work in dropped:
            self._rows[key] -= work.left
            refusal = self._overdue(work, now, now)
            if refusal is not None:
                refused.append(refusal)

    def _overdue(self, work: Work, now: float, start: float) -> Refusal | None:
        """Degrade, postpone or refuse work that misses its deadline, as its promise says."""
        cheaper = self._class(work.key).cheaper
        if work.sla.on_overload == "degrade" and cheaper is not None:
            if self._finish(cheaper, work.left, start) <= work.deadline:
                work.key = cheaper
                self._add_urgent(work)
                return None
        elif work.sla.on_overload == "late":
            self._add_background(work)
            return None
        return Refusal(work, self._miss(work, now, start))

    # -- background --------------------------------------------------------------------------
    def _slice(self, now: float) -> Batch | None:
        """The next slice of background work: least-served job first, filled up by its kin."""
        jobs = sorted(self._background, key=attrgetter("used"))
        if not jobs:
            return None
        key = jobs[0].key
        most = self._class(key).most
        rows = max(1, self.latency.rows_within(key, self.blocking_bound, most, 0.5))
        if not self.latency.predict(key, 1):
            rows = 1  # nobody knows yet how long more would hold the device
        parts: list[Part] = []
        for work in jobs:
            count = min(rows, work.left)
            if work.key != key or not count:
                continue
            parts.append(Part(work, work.taken, count))
            work.taken += count
            rows -= count
        total = sum(part.rows for part in parts)
        predicted = self.latency.predict(key, total)
        for part in parts:
            part.work.used += predicted * part.rows / total / part.work.sla.weight
        self._floor = jobs[0].used
        self._background = [work for work in self._background if work.left]
        return Batch(key, tuple(parts), total, predicted, urgent=False)

    @property
    def blocking_bound(self) -> float:
        """Seconds that one background slice may hold the device."""
        tightest = min(self._expected, self._recent, self._earlier)
        return min(self.slice_share * tightest, self.idle_slice)

    def _account(self, batch: Batch) -> None:
        """Background work earns its share while it waits, and pays for what it gets."""
        if not batch.urgent:
            # Only the last slice is owed for: what ran in idle time was nobody's loss.
            self._credit = max(self._credit, 0.0) - batch.predicted
        elif self._background:
            share = self.background_share
            self._credit = min(self._credit + batch.predicted * share / (1 - share), 1.0)
        else:
            self._credit = 0.0

    # -- small parts -------------------------------------------------------------------------
    def _class(self, key: str) -> WorkClass:
        return self._classes.get(key) or self._classes.setdefault(key, WorkClass())

    def _add_urgent(self, work: Work) -> None:
        insort(self._urgent.setdefault(work.key, []), work, key=_BY_DEADLINE)
        self._rows[work.key] = self._rows.get(work.key, 0) + work.left

    def _add_background(self, work: Work) -> None:
        work.used = max(work.used, self._floor)
        self._background.append(work)

    def _finish(self, key: str, rows: int, start: float) -> float:
        """When rows that run next are likely to be done; what misses that is hopeless."""
        return start + self.latency.predict(key, rows, 0.5)

    def _count(self, work: Work, now: float) -> None:
        self._rates[work.key] = (self.rate(work.key, now) + work.rows / _RATE_MEMORY, now)

    def rate(self, key: str, now: float) -> float:
        """Rows per second of a work class that arrive at present."""
        rate, at = self._rates.get(key, (0.0, now))
        return rate * max(0.0, 1 - (now - at) / _RATE_MEMORY)

    def _full(self, work: Work, now: float) -> QueueFull:
        return QueueFull(
            f"the queue holds {self.urgent_rows} rows, at most {self.max_queue}",
            retry_after=self._drained(work.key, now),
            hint="send less, or try again",
        )

    def _miss(self, work: Work, now: float, start: float) -> DeadlineRefused:
        predicted = self._finish(work.key, work.left, start) - work.arrival
        allowed = work.deadline - work.arrival
        ahead = self._rows.get(work.key, 0)
        return DeadlineRefused(
            f"would finish {predicted * 1e3:.1f} ms after arrival with {ahead} rows in the queue, "
            f"the deadline is {allowed * 1e3:.1f} ms",
            predicted=predicted,
            deadline=allowed,
            rows_ahead=ahead,
            retry_after=self._drained(work.key, now),
        )

    def _drained(self, key: str, now: float) -> float:
        """Seconds until the device is free and what waits now has run."""
        most, rows = self._class(key).most, self._rows.get(key, 0)
        batches = rows / most
        return max(0.0, self._busy_until - now) + batches * self.latency.predict(key, most)


def _past(works: Iterator[Work], head: Work, rows: int) -> Work | None:
    """The first work behind the next ``rows`` rows, or None."""
    work: Work | None = head
    while work is not None and rows >= work.left:
        rows -= work.left
        work = next(works, None)
    return work
