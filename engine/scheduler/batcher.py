"""Deadline-aware elastic batching: which rows run next, and which cannot make it.

No clock and no thread live here: every method takes ``now`` (seconds on any one monotonic
clock), so the policy that serves is the policy that the virtual-time simulator proves.

The policy, when a lane is free:

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
   of background work runs. Its predicted time stays below the blocking bound, and it has the
   fewest rows that keep 97 % of the rows per second that this bound allows, or fewer still: a
   share of the tightest promise by which it is shorter is worth half that share of them.
5. A slice waits a moment for callers who were just answered and may ask for more at once, where
   that has paid off lately; see ``anticipation``.

With several lanes there is one queue for all. Each batch is planned with the costs of the lane
that runs it; rows that another lane can still do in time are left to it, and nobody is refused
before no lane can. A lane that would do the work later than a faster one that is soon free
leaves it there, unless that one could not take all of it. A batch need not be kept short
(rule 3) while another lane is free in time for the tighter queue. Of the shares of requests a
lane takes as many as let all lanes end together; under load, whole requests.

A model whose weights have left memory is loaded beside the lanes; what waits for it waits on, what
waits for others runs. How long that takes is learned and counts in what is promised.

Up to sixteen lanes that are alike, and get more rows of one queue than 85 % of what they can do,
start one after the other: up to 1/k of the time of a batch apart, and a tenth more, if no row is
late for it. Two that start together would share what waits, and pay twice what a batch costs
whatever its rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from math import frexp, inf
from operator import attrgetter

from plinth.engine.errors import ConfigError, DeadlineRefused, QueueFull
from plinth.engine.flow import Sla
from plinth.engine.scheduler.anticipation import Anticipation
from plinth.engine.scheduler.background import PROMISE_MEMORY, Background
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.deadline_queue import DeadlineQueue, rows_of
from plinth.engine.scheduler.lane_table import LaneState, LaneTable, Start
from plinth.engine.scheduler.loads import Loads
from plinth.engine.scheduler.rounds import Rounds
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
_BUSY = 0.85
"""Share of what the lanes can do from which on they start one after the other."""
_MAX_SPACED, _MIN_GAP = 16, 0.01
"""Lanes that do so at most; seconds between two starts below which it is not worth a wait."""
_LONGER = 1.1
"""Times the seconds between two starts that a lane waits at most: arrivals vary, and a batch that
has time left gets fuller by it."""
_WHOLE = 0.9
"""Share of its rows per second that a batch keeps at least, which begins no request in part."""
_PATIENCE = 3.0
"""Times what a lane's batches should take, for which it is waited for after they should be done."""
_LEAST_PATIENCE = 0.25
"""Seconds it is waited for at least: who is a little late, as after a collection of garbage, still
has an answer for those who can use a late one."""
_TRY, _TRY_TIMES = 0.1, 5.0
"""Seconds between two tries of work that seems hopeless, and in batches like it, at least."""
_LOOK = 0.005
"""Seconds after which a lane looks again, at the soonest, whether weights are back."""
_MAX_DEATHS = 3
"""Lanes that may end while they run the same batch before it is searched for what ends them."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a lane is waited for after it should be free.

    Args:
        least: seconds, at least.
        times: so many times what its batches should take.
        unknown: seconds, where nobody knows what they take.
    """

    least: float
    times: float
    unknown: float

    def seconds(self, predicted: float) -> float:
        """How long, for batches that are predicted to take so many seconds; 0: nobody knows."""
        return max(self.least, self.times * predicted if predicted else self.unknown)


@dataclass(slots=True)
class _Turn:
    """A lane asks for a batch.

    Args:
        lane: which.
        now: when it asks.
        start: when the batch would begin there.
        starts: when the first lane of each kind is free.
        spare: lanes that can take what this one leaves, likewise.
    """

    lane: LaneState
    now: float
    start: float
    starts: list[Start]
    spare: list[Start]
    others: list[Start] | None = field(default=None)

    @property
    def costs(self) -> LatencyModel:
        """What batches cost on this lane."""
        return self.lane.costs


class Batcher:
    """Orders work, forms batches, refuses what cannot be in time.

    Args:
        latency: the cost model of the first lane; shared with the runtime, which lets it learn.
        max_queue: rows of urgent work that may wait; above it :class:`QueueFull`. One
            deadline queue gets at most eight ninths of it, so that it cannot shut the others out
            (dynamic thresholds; Choudhury and Hahne, IEEE/ACM Trans. on Networking 6(2), 1998).
        background_share: share of the device, 0 to 1, that background work gets at least
            while it waits behind urgent work.
        slice_share: blocking bound: a background slice may take this share of the tightest
            promise in use.
        idle_slice: blocking bound in seconds while no promise is known.
        rounds: lanes work in rounds, one at a time; see :class:`Rounds`.

    Attributes:
        lanes: where batches run; there is one from the start.
        rounds: who may take what in rounds; ``None``: any lane that has room takes the next batch.
        held_until: when to ask :meth:`next` again, after it held back what waits; seconds.
        anticipation: told of callers who were answered and may ask for more.

    Raises:
        ConfigError: an impossible share, or no room in the queue.
    """

    def __init__(
        self,
        latency: LatencyModel,
        *,
        max_queue: int = 4096,
        background_share: float = 0.05,
        slice_share: float = 0.4,
        idle_slice: float = 0.1,
        rounds: bool = False,
    ) -> None:
        if not max_queue >= 1:
            raise ConfigError(f"max_queue is {max_queue}, expected 1 row or more")
        self.latency = latency
        self.rounds = Rounds() if rounds else None
        self.max_queue = max_queue
        self.lanes = LaneTable()
        self.lanes.add(latency)
        self._background = Background(background_share, slice_share, idle_slice)
        self._settings_by_key: OrderedDict[BatchKey, KeySettings] = OrderedDict()
        self._queues: dict[QueueName, DeadlineQueue] = {}
        self._rows = 0
        self._virtual_time = 0.0
        self._last_start = float("-inf")
        self.held_until = float("inf")
        self.anticipation = Anticipation()

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
                for costs in self.lanes.costs():
                    costs.forget(key)

    def shrink(self, key: BatchKey, max_rows: int) -> None:
        """Bound the batches of a key from now on, because larger ones did not fit."""
        settings = self._settings(key)
        settings.max_rows = min(settings.max_rows, max_rows)

    def register_sla(self, sla: Sla) -> None:
        """Make a promise known for good, so that slices leave it room before its first request."""
        if sla.deadline_ms is not None:
            self._background.register_sla(sla.deadline_ms / 1e3)

    # -- lanes -------------------------------------------------------------------------------
    @property
    def pipeline_depth(self) -> int:
        """Batches that the first lane is given before the first of them is done.

        The next one is planned for the time when they are, and slices share the blocking bound.
        """
        lane = self.lanes.get(None)
        return 1 if lane is None else lane.depth

    @pipeline_depth.setter
    def pipeline_depth(self, depth: int) -> None:
        lane = self.lanes.get(None)
        if lane is not None:
            self.lanes.deepen(lane, depth)

    def add_lane(self, costs: LatencyModel | None = None, depth: int = 1) -> int:
        """Let one more lane take batches; its number.

        Args:
            costs: what batches cost there, one model for all lanes that are alike; ``None``: as
                on the first lane.
            depth: batches it is given before the first of them is done.

        Raises:
            ConfigError: the depth is not 1 or more.
        """
        return self.lanes.add(self.latency if costs is None else costs, depth).number

    def drop_lane(self, number: int) -> list[Batch]:
        """Give a lane nothing any more; returns what it runs and was not done with."""
        lane = self.lanes.drop(number)
        unfetched = None if self.rounds is None else self.rounds.ready.pop(number, None)
        if unfetched is not None and lane is not None:
            lane.running.remove(unfetched)
            for part in unfetched.parts:
                if not part.work.gone:
                    self._put_back(part, unfetched.urgent, part.work.arrival)
        return [] if lane is None else list(lane.running)

    def free_lane(self) -> int | None:
        """The lane to ask :meth:`next` for: one that has room, the fastest of the idle ones."""
        if self.rounds is not None:
            return self.rounds.lane(self.lanes)
        lane = self.lanes.with_room(None if self.lanes.kinds < 2 else self._first())
        return None if lane is None else lane.number

    def _first(self) -> tuple[BatchKey, int, float] | None:
        """Key, rows and quantile that lanes are compared by: as when one leaves work to another."""
        waiting = self._waiting()
        if waiting:
            queue = min(waiting, key=attrgetter("first_deadline"))
            rows = min(queue.rows, self._settings(queue.key).max_rows)
            return queue.key, rows, queue.quantile
        key = self._background.first_key
        return None if key is None else (key, 1, 0.5)

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
    def has_promises(self) -> bool:
        """Whether a promise bounds the slices."""
        return self._background.tightest < float("inf")

    @property
    def blocking_bound(self) -> float:
        """Seconds that one background slice may hold the device."""
        return self._background.bound

    @property
    def has_unfetched(self) -> bool:
        """Whether a lane has not fetched its share of a round yet."""
        return self.rounds is not None and bool(self.rounds.ready)

    def __bool__(self) -> bool:
        return self._rows > 0 or bool(self._background) or self.has_unfetched

    # -- weights that are away ---------------------------------------------------------------
    def next_load(self) -> tuple[Loads, BatchKey] | None:
        """The model to load next: of the earliest deadline that waits for one.

        Then one that work was refused for the want of, so that the next has it; then of slices.

        Returns:
            Of which lanes, and the prefix of its batch keys; None while one is being loaded there,
            and where nothing waits for any.
        """
        for loads in self._loads():
            if loads.current is not None:
                continue
            urgent = [queue for queue in self._waiting() if loads.is_away(queue.key)]
            if urgent:
                return loads, loads.model_of(min(urgent, key=attrgetter("first_deadline")).key)
            waiting = (loads.model_of(work.key) for work in self._background.waiting())
            for model in (*loads.missed, *waiting):
                if loads.is_away(model):
                    return loads, model
            loads.missed.clear()
        return None

    def waits_for(self, loads: Loads, model: BatchKey) -> bool:
        """Whether anything waits for a model, or would have been in time with it."""
        return model in loads.missed or any(
            loads.model_of(key) == model for key in self._keys_waiting()
        )

    @property
    def waits_for_loads(self) -> bool:
        """Whether something waits, and all of it for weights, whichever lane is free."""
        if not self._loads():
            return False
        kinds = {id(lane.costs): lane.costs.loads for lane in self.lanes}
        keys = self._keys_waiting()
        return bool(keys) and all(each.is_away(key) for each in kinds.values() for key in keys)

    def lose(self, loads: Loads, model: BatchKey) -> list[Work]:
        """Take out, and return, all that waits for a model which cannot be loaded."""
        lost = [work for queue in self._waiting() for work in queue.works]
        lost = [
            work
            for work in (*lost, *self._background.waiting())
            if loads.model_of(work.key) == model
        ]
        for work in lost:
            self.cancel(work)
        return lost

    def _loads(self) -> list[Loads]:
        return [costs.loads for costs in self.lanes.costs() if costs.loads]

    def _keys_waiting(self) -> set[BatchKey]:
        return {queue.key for queue in self._waiting()} | self._background.keys()

    def _hold_for_loads(self, lane: LaneState, now: float) -> None:
        """Let a lane look again when a model that something waits for should be there."""
        loads = lane.costs.loads
        if loads:
            at = [loads.ready_at(key, now) for key in self._keys_waiting() if loads.is_away(key)]
            if at:
                self.held_until = min(self.held_until, max(min(at), now + _LOOK))

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
        starts = self.lanes.starts(now)
        promise = work.sla.deadline_ms / 1e3
        end = self._finish(work, starts, now)
        if end <= work.deadline or self._can_be_kept(work, starts, now):
            queue.arrived(work.rows, promise, now)
        if end <= work.deadline:
            self._add(queue, work)
            self._background.note_sla(promise)
            return None
        if self._is_tried(work, starts, now):
            self._background.add(work)
            return None
        return self._overdue(work, starts, now)

    def _is_tried(self, work: Work, starts: list[Start], now: float) -> bool:
        """Whether work that is too late by what was learned runs all the same, as a slice.

        What is never run is never learned: a stall of the first batch, or of several in a row,
        would close the door for good. So where what a batch costs is all that makes it late, and
        in warm-up it cost less, one is tried when none ran for five times what it should take.
        """
        settings, key, rows = self._settings(work.key), work.key, work.rows
        if now < settings.try_at or any(costs.loads.is_away(key) for costs, _ in starts):
            return False
        alone = min(costs.predict(key, rows, 0.5) for costs, _ in starts)
        hoped = min(costs.hoped(key, rows) for costs, _ in starts)
        allowed = work.deadline - now
        if alone <= allowed or hoped > allowed:
            return False
        settings.try_at, work.tried = now + max(_TRY, _TRY_TIMES * alone), True
        return True

    def alone(self, work: Work, now: float, lane: int) -> Batch | None:
        """The batch of work that comes while nothing waits, as :meth:`next` would form it.

        Args:
            work: all that there is to do.
            now: seconds.
            lane: one that runs nothing.

        Returns:
            None where it has to be admitted: something else waits or runs, lanes differ, it does
            not fit into one batch, its model is not in memory, or it would be late.
        """
        here, key, rows = self.lanes.get(lane), work.key, work.rows
        if self or here is None or here.running or self.lanes.kinds > 1 or self.rounds is not None:
            return None
        settings = self._settings_by_key.get(key)
        end = now + here.costs.predict(key, rows, 0.5)
        if settings is None or rows > min(settings.max_rows, self.max_queue) or end > work.deadline:
            return None
        if here.costs.loads.is_away(key):
            return None
        self._settings_by_key.move_to_end(key)
        if self._background.rotate(now):
            self._drop_idle_queues(now)
        due = work.sla.deadline_ms
        if due is None:
            batch = self._background.alone(work, here)
        else:
            batch = self._urgent_alone(work, due / 1e3, now, here)
        here.ended = None
        if batch is not None:
            self.lanes.change(here, [batch], end)
            self._background.account(batch)
        return batch

    def _urgent_alone(self, work: Work, promise: float, now: float, here: LaneState) -> Batch:
        queue = self._queue(work)
        queue.arrived(work.rows, promise, now)
        self._background.note_sla(promise)
        self._virtual_time = max(queue.service, self._virtual_time)
        predicted = here.costs.predict(work.key, work.rows, queue.quantile)
        queue.service = self._virtual_time + predicted
        part = work.take(work.rows)
        return Batch(work.key, (part,), work.rows, predicted, urgent=True, lane=here.number)

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
        if self.rounds is not None:
            unfetched, self.rounds.ready = self.rounds.ready.values(), {}
            waiting += [part.work for batch in unfetched for part in batch.parts]
        self._queues.clear()
        self._rows = 0
        for lane in self.lanes:
            self.lanes.change(lane, [], lane.busy_until)
        return [*self._background.clear(), *waiting]

    # -- a lane is free ----------------------------------------------------------------------
    def next(self, now: float, lane: int | None = None) -> tuple[Batch | None, list[Refusal]]:
        """The batch to give to a lane now, and the work refused to make it possible.

        It runs when those that the lane was given before are done. There is none while a slice
        of background work would add to others more than the blocking bound, or where another lane
        does better what waits.

        Args:
            now: seconds.
            lane: one that has room; what it was given beyond its depth counts as done. ``None``:
                the first one.
        """
        refused: list[Refusal] = []
        if self._background.rotate(now):
            self._drop_idle_queues(now)
        here = self.lanes.get(lane)
        if here is None:
            return None, refused
        if self.rounds is None:
            return self._next(here, now, refused), refused
        if not self.rounds.ready and not self.rounds.in_flight(self.lanes):
            self._form_round(now, refused)
        return self.rounds.ready.pop(here.number, None), refused

    def _next(self, here: LaneState, now: float, refused: list[Refusal]) -> Batch | None:
        if len(here.running) >= here.depth:
            kept = here.running[len(here.running) - here.depth + 1 :]
            self.lanes.change(here, kept, here.busy_until)
        start = here.free_at(now)
        self.held_until = float("inf")
        turn = _Turn(here, now, start, self.lanes.starts(now), self.lanes.spare(here, now))
        for queue in self._waiting():
            self._sweep(queue, turn.starts, now, refused)
        batch = self._slice(turn) if self._background.in_deficit else None
        if batch is None:
            batch = self._urgent_batch(turn, refused) or self._slice_unless_held(turn)
        if batch is None:
            here.ended = None
            self._hold_for_loads(here, now)
        else:
            end = start + here.costs.predict(batch.key, batch.rows, 0.5)
            self.lanes.change(here, [*here.running, batch], end)
            self._background.account(batch)
            if not batch.urgent:
                self.anticipation.slice_begun(batch.predicted)
        return batch

    def _form_round(self, now: float, refused: list[Refusal]) -> None:
        """One batch for every lane, of one key, as even as whole pieces of work allow."""
        rounds = self.rounds
        assert rounds is not None
        rounds.key = None
        for lane in list(self.lanes):
            batch = self._next(lane, now, refused)
            if batch is not None:
                waiting = self._alike(batch.key, batch.urgent) + batch.rows
                rounds.formed(batch, waiting, self.lanes)

    def _alike(self, key: BatchKey, urgent: bool) -> int:
        """Rows of a key that wait, of urgent work or of the other."""
        return self._rows_of(key) if urgent else self._background.rows

    def _max_rows(self, key: BatchKey, *, urgent: bool = True) -> int:
        """Rows of a batch of a key: what fits, or a lane's share of a round."""
        most, rounds = self._settings(key).max_rows, self.rounds
        if rounds is None:
            return most
        share = rounds.share
        if rounds.key is None:
            share = -(-self._alike(key, urgent) // len(self.lanes))
        return min(most, max(1, share))

    def sweep(self, now: float) -> list[Refusal]:
        """Take out what no lane can do in time any more, as :meth:`next` does; after one died."""
        refused: list[Refusal] = []
        starts = self.lanes.starts(now)
        for queue in self._waiting():
            self._sweep(queue, starts, now, refused)
        return refused

    def overdue(self, now: float) -> tuple[list[Refusal], float]:
        """Work whose deadline went by in the queue, or on a lane that does not come back.

        What waits and may yet be in time is left to :meth:`next`: when a late lane is free is a
        guess. A lane is waited for as long again as three batches like those it has, after it
        should have been free: what comes a little late is still an answer.

        Returns:
            What is to be told, and the seconds when to look again: infinity when no lane has, and
            nothing that waits has, a deadline.
        """
        found: list[Refusal] = []
        for queue in self._waiting():
            past = sum(1 for _ in takewhile(lambda work: work.deadline <= now, queue.works))
            if past:
                self._drop(queue, past, self.lanes.starts(now), now, found)
        for work in self._background.past(now):
            self.cancel(work)
            found.append(Refusal(work, self._miss(work, now, self.lanes.starts(now))))
        again = min((queue.first_deadline for queue in self._waiting()), default=float("inf"))
        again = min(again, self._background.first_try)
        for lane in self.lanes:
            urgent = [batch for batch in lane.running if _has_deadline(batch)]
            if not urgent:
                continue
            longer = max(_PATIENCE * lane.seconds(lane.running), _LEAST_PATIENCE)
            patience = lane.busy_until + longer
            for work in (part.work for batch in urgent for part in batch.parts):
                at = max(work.deadline, patience)
                if work.gone:
                    continue
                if at > now:
                    again = min(again, at)
                else:
                    found.append(Refusal(work, self._silent(work, now)))
        return found, again

    def hung(self, now: float, patience: Patience) -> tuple[list[int], float]:
        """Lanes that do not come back, while others wait for them.

        Args:
            now: seconds.
            patience: with them.

        Returns:
            Their numbers, and when the next one counts as hung; infinity: none runs, or nobody
            waits for it.
        """
        if all(lane.running for lane in self.lanes):
            return [], float("inf")
        at = self.hung_at(patience)
        later = (when for when in at.values() if when > now)
        return [number for number, when in at.items() if when <= now], min(later, default=inf)

    def hung_at(self, patience: Patience) -> dict[int, float]:
        """When each lane that runs something counts as hung, by its number."""
        return {
            lane.number: lane.busy_until + patience.seconds(lane.seconds(lane.running))
            for lane in self.lanes
            if lane.running
        }

    def _silent(self, work: Work, now: float) -> DeadlineRefused:
        allowed = work.deadline - work.begun
        return DeadlineRefused(
            f"no answer {(now - work.begun) * 1e3:.1f} ms after arrival from the lane that has "
            f"the rows, the deadline is {allowed * 1e3:.1f} ms",
            predicted=now - work.begun,
            deadline=allowed,
            rows_ahead=0,
            retry_after=self._drained(work.key, now),
        )

    def finished(self, batch: Batch, seconds: float | None, now: float) -> None:
        """Learn what a batch really took; its lane is free from ``now`` on, or runs the next.

        Args:
            batch: as it was given to the lane.
            seconds: what it took; ``None``: nothing is to be learned, as something else took time.
            now: seconds.
        """
        lane = self.lanes.get(batch.lane)
        if lane is not None:
            if seconds is not None:
                lane.began(now - seconds)
                lane.costs.observe(batch.key, batch.rows, seconds)
            self.lanes.done(batch, now)
            # Of several lanes, one may be left to wait for another; deep ones begin by themselves.
            at_once = len(self.lanes) == 1 and lane.depth == 1 and bool(self)
            if at_once:
                lane.ended = batch.key, now
        settings = self._settings(batch.key)
        settings.failures = 0
        settings.try_at = now + max(_TRY, _TRY_TIMES * (seconds or 0.0))  # learned just now

    def followed(self, key: BatchKey, seconds: float) -> None:
        """A caller who was answered asks for more, of this key, so many seconds after that."""
        self.anticipation.followed()
        self.latency.followed(key, seconds)

    def died(self, batch: Batch, now: float) -> list[Work]:
        """Let a batch wait again whose lane ended before it was done, at the head of the queue.

        A batch that three lanes ended on is searched for what ends them, as :meth:`failed` does.

        Returns:
            The work to fail, as :meth:`failed` returns it.
        """
        for part in batch.parts:
            part.work.deaths += 1
        if max(part.work.deaths for part in batch.parts) >= _MAX_DEATHS:
            return self.failed(batch, now)
        for part in batch.parts:
            if not part.work.gone:
                self._put_back(part, batch.urgent, now)
        return []

    def failed(self, batch: Batch, now: float) -> list[Work]:
        """Search a batch that failed for the callers at fault, by halves.

        Both halves wait again, each for a batch of its own: those that cannot be in time any more
        are refused like all others. One caller at fault among n costs at most log2(n) + 1 failing
        batches, and a search ends after 8 * log2(n) of them; a key whose batches keep failing (32
        in a row) is not searched at all.

        Returns:
            The work to fail: a caller that was alone, or, at a bound, all that is left.
        """
        self.lanes.done(batch, now)
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
        queue.arrived(0, work.deadline - work.begun, now)
        self._add(queue, work)

    def _slice_unless_held(self, turn: _Turn) -> Batch | None:
        """A slice, unless it is better begun when callers who were answered have asked for more."""
        if self._background:
            until = self.anticipation.until(turn.lane.number, turn.now)
            if until > turn.now:
                self.held_until = min(self.held_until, until)
                return None
        return self._slice(turn)

    def _slice(self, turn: _Turn) -> Batch | None:
        lane, ahead, rounds = turn.lane, 0.0, self.rounds
        if rounds is not None:
            first = self._background.next_work(lane.costs)
            if not rounds.may_slice(None if first is None else first.key):
                return None
        if lane.running:
            ahead = lane.seconds(each for each in lane.running if not each.urgent)
        costs, recent = lane.costs, turn.now - PROMISE_MEMORY
        between = max(
            (
                costs.predict(queue.key, 1, 0.5)
                for queue in self._queues.values()
                if queue.last_arrival >= recent
            ),
            default=0.0,
        )
        return self._background.slice(
            lane, lambda key: self._max_rows(key, urgent=False), ahead, between
        )

    # -- urgent ------------------------------------------------------------------------------
    def _urgent_batch(self, turn: _Turn, refused: list[Refusal]) -> Batch | None:
        left: list[DeadlineQueue] = []
        while queues := self._in_round(turn.costs):
            if left and not (queues := [queue for queue in queues if queue not in left]):
                return None
            queues.sort(key=attrgetter("first_deadline"))
            queue = self._choose(queues, turn)
            if self._is_better_elsewhere(queue, turn):
                left.append(queue)
                continue
            bound, gap = self._bound(queue, turn), self._gap(queue, turn)
            old, count = self._plan(queue, bound, turn)
            hopeless = self._hopeless(queue, old, turn)
            self._drop(queue, hopeless, turn.starts, turn.now, refused)
            if count:
                count = self._own_share(queue, (old - hopeless, count), turn)
                if gap and self._holds(queue, (old - hopeless, count), gap, turn):
                    return None
                self._virtual_time, self._last_start = queue.service, turn.now
                return self._form(queue, (old - hopeless, count), bound, queues, turn)
            if old > hopeless:
                left.append(queue)
        return None

    def _gap(self, queue: DeadlineQueue, turn: _Turn) -> float:
        """Seconds between two starts, where lanes start one after the other; 0: they do not."""
        lanes, key = len(self.lanes), queue.key
        if lanes < 2 or lanes > _MAX_SPACED or self.lanes.kinds > 1 or self.rounds is not None:
            return 0.0
        if len(self._queues) > 1 or self._background or turn.start > turn.now:
            return 0.0
        most = self._settings(key).max_rows
        full = turn.costs.predict(key, most, 0.5)
        gap = min(full, queue.promise * lanes / (lanes + 1)) / lanes
        loaded = queue.rate(turn.now) * full >= _BUSY * lanes * most
        return _LONGER * gap if loaded and gap >= _MIN_GAP else 0.0

    def _holds(
        self, queue: DeadlineQueue, chosen: tuple[int, int], gap: float, turn: _Turn
    ) -> bool:
        """Whether a batch is better begun later, for more rows; see the top of this module.

        Args:
            queue: whose rows it has.
            chosen: place of the first of its works, and how many.
            gap: seconds between two starts.
            turn: the lane's.
        """
        (first, count), key, quantile = chosen, queue.key, queue.quantile
        wait = self._last_start + gap - turn.now
        most = self._settings(key).max_rows
        works = queue.works[first : first + count]
        rows = rows_of(works)
        left = queue.works[first + count : first + count + 1]
        if wait <= 1e-6 or rows >= most:
            return False
        if left and (rows + left[0].rows > most or left[0].shares is not None):
            return False  # more rows would not come with it
        later = min(most, rows + 1 + round(queue.rate(turn.now) * wait))
        now, then = (turn.costs.predict(key, each, quantile) for each in (rows + 1, later))
        slack = works[0].deadline - turn.now - now
        wait = min(wait, slack / (1 + (then - now) / wait))
        if wait <= 1e-6:
            return False
        self.held_until = turn.now + wait
        return True

    def _own_share(
        self, queue: DeadlineQueue, chosen: tuple[int, int], turn: _Turn, ahead: int = 0
    ) -> int:
        """How many of chosen works a lane takes, where some are shares of a request.

        Shares are left to other lanes as far as those end them no later. Where all lanes are busy
        for longer, a request is not begun at the end of a batch that is hardly worse without.

        Args:
            queue: whose they are.
            chosen: place of the first, and how many.
            turn: whose lane takes them.
            ahead: rows that the batch has before them.
        """
        first, count = chosen
        works = queue.works[first : first + count]
        alone = len(self.lanes) < 2 or self.rounds is not None
        if alone or all(work.shares is None for work in works):
            return count
        waiting = ahead + queue.rows - rows_of(queue.works[:first])
        job = queue.key, waiting, self._settings(queue.key).max_rows
        most, rows = self.lanes.even_share(turn.lane, job, turn.now), ahead
        for place, work in enumerate(works):
            rows += work.rows
            if work.shares is not None and rows > most and (place or ahead):
                end = turn.start + turn.costs.predict(queue.key, rows, 0.5)
                if self._finish(work, self._others(turn), turn.now) <= end:
                    return place
        last = works[-1].shares
        if last is None or last.begun or queue.works[first + count : first + count + 1] == []:
            return count
        if queue.works[first + count].shares is not last:
            return count
        own = sum(work.shares is last for work in works)
        fewer = rows - rows_of(works[count - own :])
        cost = turn.costs.predict
        if fewer and fewer * cost(queue.key, rows, 0.5) >= _WHOLE * rows * cost(
            queue.key, fewer, 0.5
        ):
            return count - own
        return count

    def _choose(self, queues: list[DeadlineQueue], turn: _Turn) -> DeadlineQueue:
        """The earliest deadline, unless a queue with less service would miss because of it."""
        earliest = queues[0]
        behind = [queue for queue in queues if queue.service < earliest.service]
        if behind:
            end = turn.start + self._seconds(earliest, turn)
            for queue in sorted(behind, key=attrgetter("service")):
                if end + self._seconds(queue, turn) > queue.first_deadline:
                    return queue
        return earliest

    def _is_better_elsewhere(self, queue: DeadlineQueue, turn: _Turn) -> bool:
        """Whether lanes of another kind do all that waits, and comes meanwhile, sooner."""
        if self.lanes.kinds < 2:
            return False
        key, most = queue.key, self._settings(queue.key).max_rows
        here = turn.start + turn.costs.predict(key, min(queue.rows, most), queue.quantile)
        for costs, start in turn.starts:
            if costs is turn.costs or start > queue.first_deadline or costs.loads.is_away(key):
                continue
            rows = queue.rows + round(queue.rate(turn.now) * (start - turn.now))
            room = costs.rows_within(key, queue.first_deadline - start, most, queue.quantile)
            if rows <= room and start + costs.predict(key, rows, queue.quantile) < here:
                return True
        return False

    def _hopeless(self, queue: DeadlineQueue, old: int, turn: _Turn) -> int:
        """How many of the first works of a queue, too old for this lane, no other can do."""
        if not turn.spare:
            return old
        for place, work in enumerate(queue.works[:old]):
            if self._finish(work, turn.spare, turn.now) <= work.deadline:
                return place
        return old

    def _seconds(self, queue: DeadlineQueue, turn: _Turn) -> float:
        """How long a batch of what waits in a queue may take."""
        rows = min(queue.rows, self._bound(queue, turn))
        return turn.costs.predict(queue.key, rows, queue.quantile)

    def _bound(self, queue: DeadlineQueue, turn: _Turn) -> int:
        """Rows of a batch after which tighter queues can still be in time.

        For each of them, its oldest row (or one that arrives now) must be in time in a batch with
        all that arrives meanwhile: time allowed = (its deadline - now) - predicted(its rows) +
        max(0, its service - this service). One that another lane is free for in time does not
        bound this one.
        """
        key, quantile, costs, now = queue.key, queue.quantile, turn.costs, turn.start
        bound = max_rows = self._max_rows(key)
        tighter = [
            other
            for other in self._queues.values()
            if other.promise <= _TIGHT_RATIO * queue.promise
            and now <= other.last_arrival + PROMISE_MEMORY
            and (other.works or other.suspects is None)
        ]
        if not tighter:
            return max_rows
        fastest = max_rows / max(costs.predict(key, max_rows, quantile), 1e-9)
        for other in tighter:
            rows = max(1, other.rows, round(other.rate(now) * other.promise))
            if self._is_covered(other, rows, turn):
                continue
            allowed = (
                other.first_deadline - now
                if other.works
                else other.promise - (turn.start - turn.now)
            )
            allowed -= costs.predict(other.key, rows, other.quantile)
            allowed += max(0.0, other.service - queue.service)
            short = costs.rows_within(key, allowed, bound, quantile)
            least = _MIN_THROUGHPUT * fastest * costs.predict(key, short, quantile)
            if short > 0 and short >= least:
                bound = short
        return bound

    def _is_covered(self, queue: DeadlineQueue, rows: int, turn: _Turn) -> bool:
        """Whether another lane is free in time for so many rows of a queue."""
        if len(self.lanes) < 2 or rows > self._settings(queue.key).max_rows:
            return False
        due = queue.first_deadline if queue.works else turn.now + queue.promise
        return any(
            start + costs.predict(queue.key, rows, queue.quantile) <= due
            for costs, start in self._others(turn)
            if not costs.loads.is_away(queue.key)
        )

    def _others(self, turn: _Turn) -> list[Start]:
        """When the first of the other lanes of each kind is free."""
        if turn.others is None:
            turn.others = self.lanes.other_starts(turn.lane, turn.now)
        return turn.others

    def _plan(self, queue: DeadlineQueue, bound: int, turn: _Turn) -> tuple[int, int]:
        """(works that are too old for this lane, works to run behind them) of one queue."""
        alone = queue.works[0].rows  # urgent work is never divided, not even after shrink()
        bound, max_rows = max(bound, alone), max(self._max_rows(queue.key), alone)
        # Last resort, the median: a likely answer is better than a certain refusal.
        for rows, quantile in (
            (bound, queue.quantile),
            (max_rows, queue.quantile),
            (max_rows, 0.5),
        ):
            end = self._end(queue.key, quantile, turn)
            best = queue.largest_batch(rows, end)
            if best[1]:
                return queue.finishing_batch(best, rows, end) if best[0] else best
        return 1, 0

    def _form(
        self,
        queue: DeadlineQueue,
        chosen: tuple[int, int],
        bound: int,
        queues: list[DeadlineQueue],
        turn: _Turn,
    ) -> Batch:
        """Take works of a queue, and rows of the same key that make none of them late."""
        key, quantile, works = queue.key, queue.quantile, queue.take(*chosen)
        first, rows, taken = works[0].deadline, rows_of(works), [(queue, works)]
        for other in queues:
            if other.key != key or other is queue or other.suspects is not queue.suspects:
                continue
            room = turn.costs.rows_within(key, first - turn.start, bound, quantile) - rows
            if room < 1:
                break
            quantile = max(quantile, other.quantile)
            place, count = other.largest_batch(room, self._end(key, quantile, turn, rows))
            count = self._own_share(other, (place, count), turn, rows)
            works = other.take(place, count)
            if works:
                first, rows = min(first, works[0].deadline), rows + rows_of(works)
                taken.append((other, works))
        return self._batch_of(key, taken, quantile, turn)

    def _batch_of(
        self,
        key: BatchKey,
        taken: list[tuple[DeadlineQueue, list[Work]]],
        quantile: float,
        turn: _Turn,
    ) -> Batch:
        """Make a batch; each queue is charged for its rows."""
        rows, parts = sum(rows_of(works) for _, works in taken), list[BatchSlice]()
        predicted = turn.costs.predict(key, rows, quantile)
        for queue, works in taken:
            queue.service += predicted * rows_of(works) / rows
            for work in works:
                work.taken = work.rows
                if work.shares is not None:
                    work.shares.begun = True
                parts.append(BatchSlice(work, 0, work.rows))
        self._rows -= rows
        return Batch(key, tuple(parts), rows, predicted, urgent=True, lane=turn.lane.number)

    def _sweep(
        self, queue: DeadlineQueue, starts: list[Start], now: float, refused: list[Refusal]
    ) -> None:
        """Fail work that could not be in time even if it ran alone now, on any lane."""
        hopeless = 0
        for work in queue.works:
            if self._finish(work, starts, now) <= work.deadline:
                break
            hopeless += 1
        self._drop(queue, hopeless, starts, now, refused)

    def _drop(
        self,
        queue: DeadlineQueue,
        count: int,
        starts: list[Start],
        now: float,
        refused: list[Refusal],
    ) -> None:
        """Take the first ``count`` works out of a queue: refused, degraded or late by their Sla."""
        for work in queue.take(0, count) if count else ():
            self._rows -= work.rows
            refusal = self._overdue(work, starts, now)
            if refusal is not None:
                refused.append(refusal)

    def _overdue(self, work: Work, starts: list[Start], now: float) -> Refusal | None:
        """Degrade, postpone or refuse work that misses its deadline, as its promise says."""
        cheaper = self._settings(work.key).cheaper
        if work.sla.on_overload == "degrade" and cheaper is not None:
            if self._finish(work, starts, now, cheaper) <= work.deadline:
                work.key = cheaper
                self._add(self._queue(work), work)
                return None
        elif work.sla.on_overload == "late":
            self._background.add(work)
            return None
        return Refusal(work, self._miss(work, now, starts))

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
        for costs in self.lanes.costs():
            costs.keep(self._settings_by_key.keys())

    def _keys_in_use(self) -> set[BatchKey]:
        """Keys of what waits and runs, and those it may be degraded to."""
        keys = {queue.key for queue in self._queues.values() if queue.works}
        keys |= self._background.keys()
        keys.update(batch.key for lane in self.lanes for batch in lane.running)
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

    def _in_round(self, costs: LatencyModel) -> list[DeadlineQueue]:
        """The queues that the next batch of a lane may be of, by what batches cost there."""
        rounds, waiting, loads = self.rounds, self._waiting(), costs.loads
        if loads:
            waiting = [each for each in waiting if not loads.is_away(each.key)]
        if rounds is None or rounds.key is None:
            return waiting
        return [each for each in waiting if rounds.urgent and each.key == rounds.key]

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

    def _finish(
        self, work: Work, starts: list[Start], now: float, cheaper: BatchKey | None = None
    ) -> float:
        """When work that runs next on the best lane is done, by the median.

        Work that misses it is hopeless.

        Args:
            work: what is left of it.
            starts: when the first lane of each kind is free.
            now: seconds.
            cheaper: of another model that is to answer it.
        """
        key, rows = cheaper or work.key, work.left
        if len(starts) == 1:
            costs, start = starts[0]
            return self._begin(key, work, costs, start, now) + costs.predict(key, rows, 0.5)
        return min(
            self._begin(key, work, costs, start, now) + costs.predict(key, rows, 0.5)
            for costs, start in starts
        )

    def _begin(
        self, key: BatchKey, work: Work, costs: LatencyModel, start: float, now: float
    ) -> float:
        """When work can begin on a lane that is free at ``start``: its model may be away."""
        loads = costs.loads
        if not loads or not loads.is_away(key):
            return start
        sooner = [
            queue.key
            for queue in self._waiting()
            if queue.first_deadline < work.deadline and loads.is_away(queue.key)
        ]
        return max(start, loads.ready_at(key, now, sooner))

    def _can_be_kept(self, work: Work, starts: list[Start], now: float) -> bool:
        """Whether work would be in time if nothing else ran."""
        alone = [(costs, now) for costs, _ in starts]
        return self._finish(work, alone, now) <= work.deadline

    def _end(
        self, key: BatchKey, quantile: float, turn: _Turn, ahead: int = 0
    ) -> Callable[[int], float]:
        """When a batch of ``ahead`` and so many more rows ends on a lane."""
        predict, start = turn.costs.predict, turn.start
        return lambda rows: start + predict(key, ahead + rows, quantile)

    def _rows_of(self, key: BatchKey) -> int:
        return sum(queue.rows for queue in self._queues.values() if queue.key == key)

    def _full(self, work: Work, now: float) -> QueueFull:
        return QueueFull(
            f"the queue holds {self.urgent_rows} rows, at most {self.max_queue}",
            retry_after=self._drained(work.key, now),
            hint="send less, or try again",
        )

    def _miss(self, work: Work, now: float, starts: list[Start]) -> DeadlineRefused:
        for loads in self._loads():
            loads.miss(work.key)
        predicted = self._finish(work, starts, now) - work.begun
        allowed = work.deadline - work.begun
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
        """Seconds until a lane is free and what waits now has run."""
        max_rows, rows = self._settings(key).max_rows, self._rows_of(key)
        batches = rows / max_rows / max(1, len(self.lanes))
        free = min((start for _, start in self.lanes.starts(now)), default=now)
        return free - now + batches * self.latency.predict(key, max_rows)


def _has_deadline(batch: Batch) -> bool:
    """Whether somebody is to be told at a deadline while it runs."""
    return batch.urgent or any(part.work.tried for part in batch.parts)


def _queue_name(work: Work) -> QueueName:
    """The name of the queue that work belongs to; promises within a factor of two share one."""
    return work.key, frexp(work.sla.deadline_ms or 0.0)[1], work.sla.quantile, work.suspects
