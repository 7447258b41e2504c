"""Deadline-aware elastic batching: which rows run next, and which cannot make it.

No clock and no thread live here: every method takes ``now`` (seconds on any one monotonic
clock), so the policy that serves is the policy that the virtual-time simulator proves.

The policy, when the device is free:

1. Urgent work waits in streams: one work class, promises less than twice one another. The
   stream with the earliest deadline goes first. Where that would make another stream miss,
   the one that has had less of the device goes first (start-time fair queueing; Goyal, Vin
   and Cheng, SIGCOMM 1996).
2. The batch is the *largest* of which every row makes its deadline by the batch's own
   predicted finish; the rows too old for it are refused, degraded or made late. Meeting the
   first deadline at any price would shrink the batches until nothing is in time (Shen et al.,
   Nexus, SOSP 2019, section 6.3). What room is left goes to other streams of the work class.
3. A batch is kept short enough for streams with half of its promise or less, unless that
   would halve what the device does in a second. It may take what they have had more.
4. Without urgent work, or once background work is owed its minimum share, one slice of
   background work runs. Its predicted time stays below the blocking bound.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp
from operator import attrgetter

from plinth.engine.errors import ConfigError, DeadlineRefused, QueueFull
from plinth.engine.flow import Sla
from plinth.engine.scheduler.background import PROMISE_MEMORY, Background
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.deadline_queue import Stream, rows_of
from plinth.engine.scheduler.work import Batch, BatchSlice, Refusal, Work, WorkClass

_TIGHTER = 0.5  # of a promise, below which another is sheltered from its batches
_CROWD = 8  # times the room left that one stream may hold, so that none fills the queue
_WORTH = 0.5  # of the rows per second of the largest batch, below which it is not sheltered


class Batcher:
    """Orders work, forms batches, refuses what cannot be in time.

    Args:
        latency: the cost model; shared with the runtime, which lets it learn.
        max_queue: rows of urgent work that may wait; above it :class:`QueueFull`. One stream
            gets at most eight ninths of it, so that it cannot shut the others out (dynamic
            thresholds; Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
        background_share: share of the device, 0 to 1, that background work gets at least
            while it waits behind urgent work.
        slice_share: blocking bound: a background slice may take this share of the tightest
            promise in use.
        idle_slice: blocking bound in seconds while no promise is known.

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
        self._background = Background(latency, background_share, slice_share, idle_slice)
        self._classes: dict[str, WorkClass] = {}
        self._streams: dict[tuple[str, int, float], Stream] = {}
        self._rows = 0
        self._level = 0.0
        self._busy_until = 0.0
        self._running = False

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
            self._background.expect(sla.deadline_ms / 1e3)

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
    def offer(self, work: Work, now: float) -> Refusal | None:
        """Take work in, or say at once why not.

        Returns:
            None when it was taken (its ``key`` may have become the cheaper class), else the
            refusal: :class:`QueueFull`, or :class:`DeadlineRefused` for work that could not
            be in time even if it ran next.
        """
        if work.sla.deadline_ms is None:
            self._background.add(work)
            return None
        stream, room = self._stream(work), self.max_queue - self._rows
        if work.rows > room or stream.rows + work.rows > _CROWD * room:
            return Refusal(work, self._full(work, now))
        start = self._free(now)
        alone = self.latency.predict(work.key, work.rows, 0.5)
        promise = work.sla.deadline_ms / 1e3
        if now + alone <= work.deadline:  # else nobody could keep it
            stream.arrived(work.rows, promise, now)
        if start + alone <= work.deadline:
            self._add(stream, work)
            self._background.respect(promise)
            return None
        return self._overdue(work, now, start)

    def cancel(self, work: Work) -> None:
        """Forget work whose client went away; rows already on the device still finish."""
        if self._background.remove(work):
            return
        stream = self._streams.get(_name(work)) if work.left else None
        if stream is not None and stream.remove(work):
            self._rows -= work.rows

    def clear(self) -> list[Work]:
        """Forget all work that waits, and return it."""
        waiting = [work for stream in self._streams.values() for work in stream.works]
        self._streams.clear()
        self._rows = 0
        return [*self._background.clear(), *waiting]

    # -- the device is free ------------------------------------------------------------------
    def next(self, now: float) -> tuple[Batch | None, list[Refusal]]:
        """The batch to run now, and the work given up to make it possible."""
        refused: list[Refusal] = []
        if self._background.turn(now):
            self._forget(now)
        for stream in self._waiting():
            self._sweep(stream, now, refused)
        batch = self._slice() if self._background.owed else None
        if batch is None:
            batch = self._urgent_batch(now, refused) or self._slice()
        if batch is not None:
            self._busy_until = self._finish(batch.key, batch.rows, now)
            self._running = True
            self._background.account(batch)
        return batch, refused

    def finished(self, batch: Batch, seconds: float, now: float) -> None:
        """Learn what a batch really took; the device is free from ``now`` on."""
        self.latency.observe(batch.key, batch.rows, seconds)
        self._busy_until = now
        self._running = False

    def _slice(self) -> Batch | None:
        return self._background.slice(lambda key: self._class(key).most)

    # -- urgent ------------------------------------------------------------------------------
    def _urgent_batch(self, now: float, refused: list[Refusal]) -> Batch | None:
        while streams := self._waiting():
            streams.sort(key=attrgetter("first"))
            stream = self._choose(streams, now)
            bound = self._bound(stream, now)
            old, count = self._plan(stream, bound, now)
            self._drop(stream, old, now, refused)
            if count:
                self._level = stream.used
                return self._form(stream, count, bound, streams, now)
        return None

    def _choose(self, streams: list[Stream], now: float) -> Stream:
        """The earliest deadline, unless one who had less of the device would pay for it."""
        earliest = streams[0]
        poorer = [stream for stream in streams if stream.used < earliest.used]
        if poorer:
            end = now + self._seconds(earliest, now)
            for stream in sorted(poorer, key=attrgetter("used")):
                if end + self._seconds(stream, now) > stream.first:
                    return stream
        return earliest

    def _seconds(self, stream: Stream, now: float) -> float:
        """How long a batch of what waits in a stream may take."""
        rows = min(stream.rows, self._bound(stream, now))
        return self.latency.predict(stream.key, rows, stream.quantile)

    def _bound(self, stream: Stream, now: float) -> int:
        """Rows of a batch after which tighter streams can still be in time.

        Their oldest row that waits, or else one that comes right now, shall be in time in a
        batch with all that comes while it may wait. What they have had more of the device
        than this stream is its to take all the same.
        """
        key, quantile, latency = stream.key, stream.quantile, self.latency
        bound = most = self._class(key).most
        tighter = [
            other
            for other in self._streams.values()
            if other.promise <= _TIGHTER * stream.promise and now <= other.seen + PROMISE_MEMORY
        ]
        if not tighter:
            return most
        fastest = most / max(latency.predict(key, most, quantile), 1e-9)
        for other in tighter:
            allowed = other.first - now if other.works else other.promise
            rows = max(1, other.rows, round(other.rate(now) * other.promise))
            allowed -= latency.predict(other.key, rows, other.quantile)
            allowed += max(0.0, other.used - stream.used)
            short = latency.rows_within(key, allowed, bound, quantile)
            if short > 0 and short >= _WORTH * fastest * latency.predict(key, short, quantile):
                bound = short
        return bound

    def _plan(self, stream: Stream, bound: int, now: float) -> tuple[int, int]:
        """(works to give up, works to run) of one stream."""
        alone = stream.works[0].rows  # work is not divided, not even where batches shrank
        bound, most = max(bound, alone), max(self._class(stream.key).most, alone)
        # Last: if only the rare slow batch would miss, a likely answer beats a sure refusal.
        for rows, quantile in ((bound, stream.quantile), (most, stream.quantile), (most, 0.5)):
            best = stream.largest(rows, self._end(stream.key, quantile, now))
            if best[1]:
                return best
        return 1, 0

    def _form(
        self, stream: Stream, count: int, bound: int, streams: list[Stream], now: float
    ) -> Batch:
        """Take the first works of a stream, and rows of its kin that make none of them late."""
        key, quantile, works = stream.key, stream.quantile, stream.cut(0, count)
        first, rows, taken = works[0].deadline, rows_of(works), [(stream, works)]
        for kin in streams:
            if kin.key != key or kin is stream:
                continue
            room = self.latency.rows_within(key, first - now, bound, quantile) - rows
            if room < 1:
                break
            quantile = max(quantile, kin.quantile)
            works = kin.cut(*kin.largest(room, self._end(key, quantile, now, rows)))
            if works:
                first, rows = min(first, works[0].deadline), rows + rows_of(works)
                taken.append((kin, works))
        return self._take(key, taken, rows, quantile)

    def _take(
        self, key: str, taken: list[tuple[Stream, list[Work]]], rows: int, quantile: float
    ) -> Batch:
        """Make a batch; each stream is charged for its rows."""
        predicted, parts = self.latency.predict(key, rows, quantile), []
        for stream, works in taken:
            stream.used += predicted * rows_of(works) / rows
            for work in works:
                work.taken = work.rows
                parts.append(BatchSlice(work, 0, work.rows))
        self._rows -= rows
        return Batch(key, tuple(parts), rows, predicted, urgent=True)

    def _sweep(self, stream: Stream, now: float, refused: list[Refusal]) -> None:
        """Give up work that could not be in time even if it ran alone now."""
        hopeless = 0
        for work in stream.works:
            if self._finish(stream.key, work.rows, now) <= work.deadline:
                break
            hopeless += 1
        self._drop(stream, hopeless, now, refused)

    def _drop(self, stream: Stream, count: int, now: float, refused: list[Refusal]) -> None:
        """Take the first ``count`` pieces of work out of a stream, as their promises say."""
        for work in stream.cut(0, count) if count else ():
            self._rows -= work.rows
            refusal = self._overdue(work, now, now)
            if refusal is not None:
                refused.append(refusal)

    def _overdue(self, work: Work, now: float, start: float) -> Refusal | None:
        """Degrade, postpone or refuse work that misses its deadline, as its promise says."""
        cheaper = self._class(work.key).cheaper
        if work.sla.on_overload == "degrade" and cheaper is not None:
            if self._finish(cheaper, work.left, start) <= work.deadline:
                work.key = cheaper
                self._add(self._stream(work), work)
                return None
        elif work.sla.on_overload == "late":
            self._background.add(work)
            return None
        return Refusal(work, self._miss(work, now, start))

    # -- small parts -------------------------------------------------------------------------
    def _class(self, key: str) -> WorkClass:
        return self._classes.get(key) or self._classes.setdefault(key, WorkClass())

    def _stream(self, work: Work) -> Stream:
        name = _name(work)
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = Stream(work.key, work.sla.quantile)
        return stream

    def _waiting(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if stream.works]

    def _forget(self, now: float) -> None:
        """Drop streams that nothing came for lately: requests may bring any promise."""
        for name, stream in list(self._streams.items()):
            if not stream.works and now > stream.seen + PROMISE_MEMORY:
                del self._streams[name]

    def _add(self, stream: Stream, work: Work) -> None:
        stream.add(work, self._level)
        self._rows += work.rows

    def _free(self, now: float) -> float:
        """When the device is likely to be free.

        Of a batch that runs longer than predicted, nothing is known but that: it may take as long
        again as it is over.
        """
        over = now - self._busy_until if self._running else 0.0
        return max(now, self._busy_until) + max(0.0, over)

    def _finish(self, key: str, rows: int, start: float) -> float:
        """When rows that run next are likely to be done; what misses that is hopeless."""
        return start + self.latency.predict(key, rows, 0.5)

    def _end(self, key: str, quantile: float, now: float, ahead: int = 0) -> Callable[[int], float]:
        """When a batch of ``ahead`` and so many more rows ends, if it starts now."""
        predict = self.latency.predict
        return lambda rows: now + predict(key, ahead + rows, quantile)

    def _rows_of(self, key: str) -> int:
        return sum(stream.rows for stream in self._streams.values() if stream.key == key)

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

    def _drained(self, key: str, now: float) -> float:
        """Seconds until the device is free and what waits now has run."""
        most, rows = self._class(key).most, self._rows_of(key)
        batches = rows / most
        return self._free(now) - now + batches * self.latency.predict(key, most)


def _name(work: Work) -> tuple[str, int, float]:
    """The stream that work belongs to; promises within a factor of two share one."""
    return work.key, frexp(work.sla.deadline_ms or 0.0)[1], work.sla.quantile
