"""Deadline-aware elastic batching: which rows run next, and which cannot make it.

No clock and no thread live here: every method takes ``now`` (seconds on any one monotonic
clock), so the policy that serves is the policy that the virtual-time simulator proves.

The policy, when the device is free:

1. Urgent work waits in deadline queues: one batch key, promises less than twice one another.
   The queue with the earliest deadline goes first. Where that would make another queue miss,
   the one with less service goes first (start-time fair queueing; Goyal, Vin and Cheng,
   SIGCOMM 1996). Service: seconds of the device that a queue has received.
2. The batch is the *largest* of which every row makes its deadline by the batch's own
   predicted finish; the rows too old for it are refused, degraded or made late. Meeting the
   first deadline at any price would shrink the batches until nothing is in time (Shen et al.,
   Nexus, SOSP 2019, section 6.3). Room that is left goes to other queues of the same key.
3. A batch is kept short enough for tighter queues (half of its promise or less), unless that
   would halve the rows per second. A tighter queue that already received more service may be
   delayed by the difference.
4. Without urgent work, or while background work is in deficit of its minimum share, one slice
   of background work runs. Its predicted time stays below the blocking bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import frexp
from operator import attrgetter

from plinth.engine.errors import ConfigError, DeadlineRefused, QueueFull
from plinth.engine.flow import Sla
from plinth.engine.scheduler.background import PROMISE_MEMORY, Background
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.deadline_queue import DeadlineQueue, rows_of
from plinth.engine.scheduler.work import (
    Batch,
    BatchKey,
    BatchSlice,
    KeySettings,
    Refusal,
    Search,
    Suspects,
    Work,
)

QueueName = tuple[BatchKey, int, float, Suspects | None]

_TIGHT_RATIO = 0.5
"""A queue is tighter than another when its promise is at most this share of the other's."""
_MAX_ROWS_PER_FREE_ROW = 8
"""One queue may hold at most so many rows for each row that is still free (dynamic threshold)."""
_MIN_THROUGHPUT = 0.5
"""A batch is cut short for a tighter queue down to this share of the best rows per second."""
MAX_KEYS = 1024
"""Batch keys that are remembered, and their cost curves; shapes come from clients."""
_MAX_QUEUES = 1024
"""Deadline queues above which idle ones are dropped at once, not after a while."""
_MAX_CULPRITS = 8
"""Callers at fault that the search in one failed batch finds at least."""
_MAX_FAILURES = 32
"""Batches of one key that fail in a row before none of them is searched any more."""


class Batcher:
    """Orders work, forms batches, refuses what cannot be in time.

    Args:
        latency: the cost model; shared with the runtime, which lets it learn.
        max_queue: rows of urgent work that may wait; above it :class:`QueueFull`. One
            deadline queue gets at most eight ninths of it, so that it cannot shut the others out
            (dynamic thresholds; Choudhury and Hahne, IEEE/ACM Trans. on Networking 6(2), 1998).
        background_share: share of the device, 0 to 1, that background work gets at least
            while it waits behind urgent work.
        slice_share: blocking bound: a background slice may take this share of the tightest
            promise in use.
        idle_slice: blocking bound in seconds while no promise is known.

    Attributes:
        pipeline_depth: batches that the device is given before the first of them is done. The next
            one is planned for the time when they are, and slices share the blocking bound.

    Raises:
        ConfigError: an impossible share.
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
        self.latency = latency
        self.max_queue = max_queue
        self.pipeline_depth = 1
        self._background = Background(latency, background_share, slice_share, idle_slice)
        self._settings_by_key: OrderedDict[BatchKey, KeySettings] = OrderedDict()
        self._queues: dict[QueueName, DeadlineQueue] = {}
        self._rows = 0
        self._virtual_time = 0.0
        self._busy_until = 0.0
        self._ahead = 0.0
        self._running: list[Batch] = []

    # -- settings and state ------------------------------------------------------------------
    def register(
        self,
        key: BatchKey,
        max_rows: int = 128,
        cheaper: BatchKey | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Make a batch key known; work of unknown keys gets batches of up to 128 rows.

        Beyond 1,024 keys, those that came least recently are dropped with their cost curves, but
        none that waits, runs or is pinned.
        """
        if max_rows < 1:
            raise ConfigError(f"the largest batch of {key} is {max_rows} rows, expected 1 or more")
        self._settings_by_key[key] = KeySettings(max_rows, cheaper, pinned)
        self._trim()

    def knows(self, key: BatchKey) -> bool:
        """Whether a key is registered."""
        return key in self._settings_by_key

    def forget(self, prefix: BatchKey) -> None:
        """Drop a key with all its shapes, and what was learned of it, except what is in use."""
        in_use = self._keys_in_use()
        for key in [
            key for key in self._settings_by_key if key == prefix or key.startswith(f"{prefix}[")
        ]:
            if key in in_use:
                self._settings_by_key[key].pinned = False
            else:
                del self._settings_by_key[key]
                self.latency.forget(key)

    def shrink(self, key: BatchKey, max_rows: int) -> None:
        """Bound the batches of a key from now on, because larger ones did not fit."""
        settings = self._settings(key)
        settings.max_rows = min(settings.max_rows, max_rows)

    def register_sla(self, sla: Sla) -> None:
        """Make a promise known for good, so that slices leave it room before its first request."""
        if sla.deadline_ms is not None:
            self._background.register_sla(sla.deadline_ms / 1e3)

    @property
    def urgent_rows(self) -> int:
        """Rows of urgent work that wait."""
        return self._rows

    @property
    def background_rows(self) -> int:
        """Rows of background work that wait."""
        return self._background.rows

    @property
    def background_share(self) -> float:
        """Share of the device that background work gets at least while it waits."""
        return self._background.share

    @property
    def blocking_bound(self) -> float:
        """Seconds that one background slice may hold the device."""
        return self._background.bound

    def __bool__(self) -> bool:
        return self._rows > 0 or bool(self._background)

    # -- arrival -----------------------------------------------------------------------------
    def admit(self, work: Work, now: float) -> Refusal | None:
        """Take work in, or say at once why not.

        Returns:
            None when it was taken (its ``key`` may have become the cheaper one), else the
            refusal: :class:`QueueFull`, or :class:`DeadlineRefused` for work that could not
            be in time even if it ran next.
        """
        if work.key in self._settings_by_key:
            self._settings_by_key.move_to_end(work.key)
        if work.sla.deadline_ms is None:
            self._background.add(work)
            return None
        queue, free = self._queue(work), self.max_queue - self._rows
        if work.rows > free or queue.rows + work.rows > _MAX_ROWS_PER_FREE_ROW * free:
            return Refusal(work, self._full(work, now))
        start = self._device_free(now)
        alone = self.latency.predict(work.key, work.rows, 0.5)
        promise = work.sla.deadline_ms / 1e3
        if now + alone <= work.deadline:  # else nobody could keep it
            queue.arrived(work.rows, promise, now)
        if start + alone <= work.deadline:
            self._add(queue, work)
            self._background.note_sla(promise)
            return None
        return self._overdue(work, now, start)

    def cancel(self, work: Work) -> None:
        """Forget work whose client went away; rows already on the device still finish."""
        work.gone = True
        if self._background.remove(work):
            return
        queue = self._queues.get(_queue_name(work)) if work.left else None
        if queue is not None and queue.remove(work):
            self._rows -= work.rows

    def clear(self) -> list[Work]:
        """Forget all work that waits, and return it."""
        waiting = [work for queue in self._queues.values() for work in queue.works]
        self._queues.clear()
        self._rows = 0
        self._running.clear()
        return [*self._background.clear(), *waiting]

    # -- the device is free ------------------------------------------------------------------
    def next(self, now: float) -> tuple[Batch | None, list[Refusal]]:
        """The batch to give to the device now, and the work refused to make it possible.

        It runs when those that the device was given before are done. There is none while a slice
        of background work would add to others more than the blocking bound.
        """
        refused: list[Refusal] = []
        if self._background.rotate(now):
            self._drop_idle_queues(now)
        while len(self._running) >= self.pipeline_depth:
            self._running.pop(0)  # done: the device is free for one more
        start = self._device_free(now) if self._running else now
        self._ahead = start - now
        for queue in self._waiting():
            self._sweep(queue, start, refused)
        batch = self._slice() if self._background.in_deficit else None
        if batch is None:
            batch = self._urgent_batch(start, refused) or self._slice()
        if batch is not None:
            self._busy_until = self._finish(batch.key, batch.rows, start)
            self._running.append(batch)
            self._background.account(batch)
        return batch, refused

    def finished(self, batch: Batch, seconds: float, now: float) -> None:
        """Learn what a batch really took; the device is free from ``now`` on, or runs the next."""
        self.latency.observe(batch.key, batch.rows, seconds)
        self._done(batch, now)
        self._settings(batch.key).failures = 0

    def _done(self, batch: Batch, now: float) -> None:
        if batch in self._running:
            self._running.remove(batch)
        self._busy_until = now + self._seconds_of(self._running) if self._running else now

    def _seconds_of(self, batches: Iterable[Batch]) -> float:
        return sum(self.latency.predict(each.key, each.rows, 0.5) for each in batches)

    def failed(self, batch: Batch, now: float) -> list[Work]:
        """Search a batch that failed for the callers at fault, by halves.

        Both halves wait again, each for a batch of its own: those that cannot be in time any more
        are refused like all others. One caller at fault among n costs at most log2(n) + 1 failing
        batches, and a search ends after 8 * log2(n) of them; a key whose batches keep failing (32
        in a row) is not searched at all.

        Returns:
            The work to fail: a caller that was alone, or, at a bound, all that is left.
        """
        self._done(batch, now)
        for name in [n for n, queue in self._queues.items() if queue.suspects and not queue.works]:
            del self._queues[name]
        settings = self._settings(batch.key)
        settings.failures += 1
        callers: dict[int, list[BatchSlice]] = {}
        for part in batch.parts:
            if not part.work.gone:
                callers.setdefault(id(part.work.owner or part.work), []).append(part)
        suspects = batch.parts[0].work.suspects
        search = suspects.search if suspects else Search(_MAX_CULPRITS * len(callers).bit_length())
        search.tries -= 1
        parts = list(callers.values())
        if len(parts) < 2 or search.tries < 0 or settings.failures > _MAX_FAILURES:
            return [part.work for own in parts for part in own]
        for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
            together = Suspects(search)
            for part in (part for own in half for part in own):
                part.work.suspects = together
                self._put_back(part, batch.urgent, now)
        return []

    def _put_back(self, part: BatchSlice, urgent: bool, now: float) -> None:
        work = part.work
        if not urgent:
            self._background.put_back(part)
            return
        work.taken = 0
        queue = self._queue(work)
        queue.arrived(0, work.deadline - work.arrival, now)
        self._add(queue, work)

    def _slice(self) -> Batch | None:
        ahead = 0.0
        if self._running:
            ahead = self._seconds_of(each for each in self._running if not each.urgent)
        return self._background.slice(
            lambda key: self._settings(key).max_rows, self.pipeline_depth, ahead
        )

    # -- urgent ------------------------------------------------------------------------------
    def _urgent_batch(self, now: float, refused: list[Refusal]) -> Batch | None:
        while queues := self._waiting():
            queues.sort(key=attrgetter("first_deadline"))
            queue = self._choose(queues, now)
            bound = self._bound(queue, now)
            old, count = self._plan(queue, bound, now)
            self._drop(queue, old, now, refused)
            if count:
                self._virtual_time = queue.service
                return self._form(queue, count, bound, queues, now)
        return None

    def _choose(self, queues: list[DeadlineQueue], now: float) -> DeadlineQueue:
        """The earliest deadline, unless a queue with less service would miss because of it."""
        earliest = queues[0]
        behind = [queue for queue in queues if queue.service < earliest.service]
        if behind:
            end = now + self._seconds(earliest, now)
            for queue in sorted(behind, key=attrgetter("service")):
                if end + self._seconds(queue, now) > queue.first_deadline:
                    return queue
        return earliest

    def _seconds(self, queue: DeadlineQueue, now: float) -> float:
        """How long a batch of what waits in a queue may take."""
        rows = min(queue.rows, self._bound(queue, now))
        return self.latency.predict(queue.key, rows, queue.quantile)

    def _bound(self, queue: DeadlineQueue, now: float) -> int:
        """Rows of a batch after which tighter queues can still be in time.

        For each of them, its oldest row (or one that arrives now) must be in time in a batch with
        all that arrives meanwhile: time allowed = (its deadline - now) - predicted(its rows) +
        max(0, its service - this service).
        """
        key, quantile, latency = queue.key, queue.quantile, self.latency
        bound = max_rows = self._settings(key).max_rows
        tighter = [
            other
            for other in self._queues.values()
            if other.promise <= _TIGHT_RATIO * queue.promise
            and now <= other.last_arrival + PROMISE_MEMORY
            and (other.works or other.suspects is None)
        ]
        if not tighter:
            return max_rows
        fastest = max_rows / max(latency.predict(key, max_rows, quantile), 1e-9)
        for other in tighter:
            allowed = other.first_deadline - now if other.works else other.promise - self._ahead
            rows = max(1, other.rows, round(other.rate(now) * other.promise))
            allowed -= latency.predict(other.key, rows, other.quantile)
            allowed += max(0.0, other.service - queue.service)
            short = latency.rows_within(key, allowed, bound, quantile)
            least = _MIN_THROUGHPUT * fastest * latency.predict(key, short, quantile)
            if short > 0 and short >= least:
                bound = short
        return bound

    def _plan(self, queue: DeadlineQueue, bound: int, now: float) -> tuple[int, int]:
        """(works to fail, works to run) of one queue."""
        alone = queue.works[0].rows  # urgent work is never divided, not even after shrink()
        bound, max_rows = max(bound, alone), max(self._settings(queue.key).max_rows, alone)
        # Last resort, the median: a likely answer is better than a certain refusal.
        for rows, quantile in (
            (bound, queue.quantile),
            (max_rows, queue.quantile),
            (max_rows, 0.5),
        ):
            best = queue.largest_batch(rows, self._end(queue.key, quantile, now))
            if best[1]:
                return best
        return 1, 0

    def _form(
        self, queue: DeadlineQueue, count: int, bound: int, queues: list[DeadlineQueue], now: float
    ) -> Batch:
        """Take the first works of a queue, and rows of the same key that make none of them late."""
        key, quantile, works = queue.key, queue.quantile, queue.take(0, count)
        first, rows, taken = works[0].deadline, rows_of(works), [(queue, works)]
        for other in queues:
            if other.key != key or other is queue or other.suspects is not queue.suspects:
                continue
            room = self.latency.rows_within(key, first - now, bound, quantile) - rows
            if room < 1:
                break
            quantile = max(quantile, other.quantile)
            works = other.take(*other.largest_batch(room, self._end(key, quantile, now, rows)))
            if works:
                first, rows = min(first, works[0].deadline), rows + rows_of(works)
                taken.append((other, works))
        return self._batch_of(key, taken, rows, quantile)

    def _batch_of(
        self,
        key: BatchKey,
        taken: list[tuple[DeadlineQueue, list[Work]]],
        rows: int,
        quantile: float,
    ) -> Batch:
        """Make a batch; each queue is charged for its rows."""
        predicted, parts = self.latency.predict(key, rows, quantile), []
        for queue, works in taken:
            queue.service += predicted * rows_of(works) / rows
            for work in works:
                work.taken = work.rows
                parts.append(BatchSlice(work, 0, work.rows))
        self._rows -= rows
        return Batch(key, tuple(parts), rows, predicted, urgent=True)

    def _sweep(self, queue: DeadlineQueue, now: float, refused: list[Refusal]) -> None:
        """Fail work that could not be in time even if it ran alone now."""
        hopeless = 0
        for work in queue.works:
            if self._finish(queue.key, work.rows, now) <= work.deadline:
                break
            hopeless += 1
        self._drop(queue, hopeless, now, refused)

    def _drop(self, queue: DeadlineQueue, count: int, now: float, refused: list[Refusal]) -> None:
        """Take the first ``count`` works out of a queue: refused, degraded or late by their Sla."""
        for work in queue.take(0, count) if count else ():
            self._rows -= work.rows
            refusal = self._overdue(work, now, now)
            if refusal is not None:
                refused.append(refusal)

    def _overdue(self, work: Work, now: float, start: float) -> Refusal | None:
        """Degrade, postpone or refuse work that misses its deadline, as its promise says."""
        cheaper = self._settings(work.key).cheaper
        if work.sla.on_overload == "degrade" and cheaper is not None:
            if self._finish(cheaper, work.left, start) <= work.deadline:
                work.key = cheaper
                self._add(self._queue(work), work)
                return None
        elif work.sla.on_overload == "late":
            self._background.add(work)
            return None
        return Refusal(work, self._miss(work, now, start))

    # -- small parts -------------------------------------------------------------------------
    def _settings(self, key: BatchKey) -> KeySettings:
        settings = self._settings_by_key.get(key)
        if settings is None:
            self.register(key)
            settings = self._settings_by_key[key]
        return settings

    def _trim(self) -> None:
        """Keep the table of keys, and the cost curves, inside their bound."""
        if len(self._settings_by_key) <= MAX_KEYS:
            return
        in_use = self._keys_in_use()
        spare = [
            key
            for key, settings in self._settings_by_key.items()
            if key not in in_use and not settings.pinned
        ]
        # A quarter at once: to find out what is in use takes a look at all that waits.
        for key in spare[: len(self._settings_by_key) - MAX_KEYS * 3 // 4]:
            del self._settings_by_key[key]
        self.latency.keep(self._settings_by_key.keys())

    def _keys_in_use(self) -> set[BatchKey]:
        """Keys of what waits and runs, and those it may be degraded to."""
        keys = {queue.key for queue in self._queues.values() if queue.works}
        keys |= self._background.keys()
        keys.update(each.key for each in self._running)
        known = (self._settings_by_key.get(key) for key in keys)
        return keys | {each.cheaper for each in known if each and each.cheaper}

    def _queue(self, work: Work) -> DeadlineQueue:
        name = _queue_name(work)
        queue = self._queues.get(name)
        if queue is None:
            if len(self._queues) >= _MAX_QUEUES:
                self._drop_idle_queues()
            queue = DeadlineQueue(work.key, work.sla.quantile, work.suspects)
            self._queues[name] = queue
        return queue

    def _waiting(self) -> list[DeadlineQueue]:
        return [queue for queue in self._queues.values() if queue.works]

    def _drop_idle_queues(self, now: float = float("inf")) -> None:
        """Drop queues that nothing came for lately: requests may bring any promise."""
        for name, queue in list(self._queues.items()):
            if not queue.works and now > queue.last_arrival + PROMISE_MEMORY:
                del self._queues[name]

    def _add(self, queue: DeadlineQueue, work: Work) -> None:
        queue.add(work, self._virtual_time)
        self._rows += work.rows

    def _device_free(self, now: float) -> float:
        """When the device is likely to be free.

        A batch that is over its prediction by t seconds is expected to take t more.
        """
        if not self._running:
            return max(now, self._busy_until)
        over = now - self._busy_until
        if len(self._running) > 1:
            over += self._seconds_of(self._running[1:])
        return self._busy_until + 2 * max(0.0, over)

    def _finish(self, key: BatchKey, rows: int, start: float) -> float:
        """When rows that run next are done, by the median; work that misses it is hopeless."""
        return start + self.latency.predict(key, rows, 0.5)

    def _end(
        self, key: BatchKey, quantile: float, now: float, ahead: int = 0
    ) -> Callable[[int], float]:
        """When a batch of ``ahead`` and so many more rows ends, if it starts now."""
        predict = self.latency.predict
        return lambda rows: now + predict(key, ahead + rows, quantile)

    def _rows_of(self, key: BatchKey) -> int:
        return sum(queue.rows for queue in self._queues.values() if queue.key == key)

    def _full(self, work: Work, now: float) -> QueueFull:
        return QueueFull(
            f"the queue holds {self.urgent_rows} rows, at most {self.max_queue}",
            retry_after=self._drained(work.key, now),
            hint="send less, or try again",
        )

    def _miss(self, work: Work, now: float, start: float) -> DeadlineRefused:
        predicted = self._finish(work.key, work.left, start) - work.arrival
        allowed = work.deadline - work.arrival
        ahead = self._rows_of(work.key)
        return DeadlineRefused(
            f"would finish {predicted * 1e3:.1f} ms after arrival with {ahead} rows in the queue, "
            f"the deadline is {allowed * 1e3:.1f} ms",
            predicted=predicted,
            deadline=allowed,
            rows_ahead=ahead,
            retry_after=self._drained(work.key, now),
        )

    def _drained(self, key: BatchKey, now: float) -> float:
        """Seconds until the device is free and what waits now has run."""
        max_rows, rows = self._settings(key).max_rows, self._rows_of(key)
        batches = rows / max_rows
        return self._device_free(now) - now + batches * self.latency.predict(key, max_rows)


def _queue_name(work: Work) -> QueueName:
    """The name of the queue that work belongs to; promises within a factor of two share one."""
    return work.key, frexp(work.sla.deadline_ms or 0.0)[1], work.sla.quantile, work.suspects
