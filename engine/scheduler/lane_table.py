"""The lanes as the policy sees them: what a batch costs on each, and when each is free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from plinth.engine.errors import ConfigError
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.work import Batch, BatchKey

_MAX_HELPERS = 64
"""Busy lanes of each kind that are counted on for the shares of a request, at most."""

Start = tuple[LatencyModel, float]
"""What batches cost on some lanes, and when the first of those is free (seconds)."""
Job = tuple[BatchKey, int, int]
"""Batch key and rows of what waits, and the rows of a batch of it at most."""


@dataclass(slots=True, eq=False)
class LaneState:
    """One lane.

    Args:
        number: its name.
        costs: seconds by (batch key, rows) there; lanes that are alike share one model.
        depth: batches it is given before the first of them is done.

    Attributes:
        running: what it was given and has not done, in order.
        busy_until: when all of that is likely to be done.
        ended: what it did last, and when, while the next batch could have begun at once.
    """

    number: int
    costs: LatencyModel
    depth: int = 1
    running: list[Batch] = field(default_factory=list)
    busy_until: float = 0.0
    ended: tuple[BatchKey, float] | None = None

    def began(self, at: float) -> None:
        """A batch began at a time: how long that took since the last one is learned."""
        if self.ended is not None:
            key, since = self.ended
            self.costs.turned(key, max(0.0, at - since))
        self.ended = None

    def seconds(self, batches: Iterable[Batch]) -> float:
        """How long batches are likely to take here."""
        return sum(self.costs.predict(each.key, each.rows, 0.5) for each in batches)

    def free_at(self, now: float) -> float:
        """When it is likely to be free.

        A batch that is over its prediction by t seconds is expected to take t more.
        """
        if not self.running:
            return now
        over = now - self.busy_until
        if len(self.running) > 1:
            over += self.seconds(self.running[1:])
        return self.busy_until + 2 * max(0.0, over)


class LaneGroup:
    """Lanes that are alike: idle ones, and the others in order of when they are free.

    Args:
        costs: what a batch costs on any of them.
    """

    def __init__(self, costs: LatencyModel) -> None:
        self.costs = costs
        self.idle: dict[int, LaneState] = {}
        self._busy: list[tuple[float, int, LaneState]] = []

    def __bool__(self) -> bool:
        return bool(self.idle or self._busy)

    def add(self, lane: LaneState) -> None:
        """Take a lane in, or note that what it runs has changed."""
        if lane.running:
            insort(self._busy, (lane.busy_until, lane.number, lane))
        else:
            self.idle[lane.number] = lane

    def remove(self, lane: LaneState) -> None:
        """Forget a lane; what it runs and until when are as they were when it was added."""
        if self.idle.pop(lane.number, None) is None:
            del self._busy[bisect_left(self._busy, (lane.busy_until, lane.number))]

    def earliest(self, now: float, but: LaneState | None = None) -> float:
        """When the first of them is likely to be free; infinity when there is none.

        Args:
            now: seconds.
            but: a lane that does not count.
        """
        if len(self.idle) > (but is not None and but.number in self.idle):
            return now
        # Nobody is free before those that end next; of the overdue, the last ones may be.
        place = bisect_left(self._busy, (now,))
        found = float("inf")
        for at in (range(place, len(self._busy)), range(place - 1, -1, -1)):
            lane = next((self._busy[i][2] for i in at if self._busy[i][2] is not but), None)
            if lane is not None:
                found = min(found, lane.free_at(now))
        return found

    def rows_until(self, end: float, job: Job, now: float, but: LaneState) -> int:
        """Rows of a job that they do until a time, but for one lane, in a batch each."""
        key, rows, most = job

        def within(seconds: float) -> int:
            return self.costs.rows_within(key, seconds, most, 0.5) if seconds > 0 else 0

        total = (len(self.idle) - (but.number in self.idle)) * within(end - now)
        for *_, lane in self._busy[:_MAX_HELPERS]:
            if total >= rows or lane.busy_until >= end:
                break
            if lane is not but:
                total += within(end - lane.free_at(now))
        return total

    def with_room(self) -> LaneState | None:
        """An idle lane, or the one that is free first of those that may be given more."""
        if self.idle:
            return next(iter(self.idle.values()))
        return next((lane for *_, lane in self._busy if len(lane.running) < lane.depth), None)


class LaneTable:
    """Lanes by their number, in groups of those that are alike.

    To find the lane that is free first costs log(lanes) for each group, however many wait. A lane
    alone needs no group.
    """

    def __init__(self) -> None:
        self._lanes: dict[int, LaneState] = {}
        self._only: LaneState | None = None
        self._groups: dict[int, LaneGroup] = {}
        self._costs: dict[int, LatencyModel] = {}
        self._next_number = 0
        self._deep = False
        self._expected = float("inf")

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[LaneState]:
        return iter(self._lanes.values())

    @property
    def kinds(self) -> int:
        """How many groups of lanes there are that are not alike."""
        return len(self._groups) or len(self._lanes)

    def costs(self) -> list[LatencyModel]:
        """The cost models of all lanes that there were, each once."""
        return list(self._costs.values())

    def get(self, number: int | None) -> LaneState | None:
        """A lane by its number; ``None``: the first there is."""
        if number is None:
            return next(iter(self._lanes.values()), None)
        return self._lanes.get(number)

    def expect(self, at: float) -> None:
        """While there is no lane, plan with one that is there at a time."""
        self._expected = at

    def add(self, costs: LatencyModel, depth: int = 1, number: int | None = None) -> LaneState:
        """Let one more lane take batches.

        Args:
            costs: what they cost there.
            depth: how many it is given before the first is done.
            number: of one that was dropped and is back.

        Raises:
            ConfigError: the depth is not 1 or more.
        """
        if depth < 1:
            raise ConfigError(f"a lane's depth is {depth}, expected 1 or more")
        if number is None:
            number, self._next_number = self._next_number, self._next_number + 1
        lane = LaneState(number, costs, depth)
        self._lanes[lane.number] = lane
        self._costs[id(costs)] = costs
        self._deep = self._deep or depth > 1
        self._regroup(lane)
        return lane

    def drop(self, number: int) -> LaneState | None:
        """Give a lane nothing any more; ``None`` when there is no such lane."""
        lane = self._lanes.pop(number, None)
        if lane is not None:
            if self._groups:
                self._groups[id(lane.costs)].remove(lane)
            self._regroup()
        return lane

    def _regroup(self, new: LaneState | None = None) -> None:
        if len(self._lanes) < 2:
            self._only = next(iter(self._lanes.values()), None)
            self._groups.clear()
            return
        added = [] if new is None else [new] if self._groups else list(self._lanes.values())
        self._only = None
        for lane in added:
            self._groups.setdefault(id(lane.costs), LaneGroup(lane.costs)).add(lane)
        self._groups = {key: group for key, group in self._groups.items() if group}

    def deepen(self, lane: LaneState, depth: int) -> None:
        """Let a lane be given so many batches at once."""
        lane.depth, self._deep = depth, self._deep or depth > 1

    def change(self, lane: LaneState, running: list[Batch], busy_until: float) -> None:
        """Note what a lane runs now, and until when."""
        if lane is self._only:
            lane.running, lane.busy_until = running, busy_until
            return
        group = self._groups[id(lane.costs)]
        group.remove(lane)
        lane.running, lane.busy_until = running, busy_until
        group.add(lane)

    def done(self, batch: Batch, now: float) -> None:
        """A lane has done a batch, well or not, and is free from ``now`` on or runs its next."""
        lane = self._lanes.get(batch.lane)
        if lane is None:
            return
        lane.ended = None
        left = [each for each in lane.running if each is not batch]
        self.change(lane, left, now + lane.seconds(left) if left else now)

    def starts(self, now: float) -> list[Start]:
        """When the first lane of each group is likely to be free."""
        lane = self._only
        if lane is not None:
            return [(lane.costs, lane.free_at(now))]
        found = [(group.costs, group.earliest(now)) for group in self._groups.values()]
        return found or [(costs, max(now, self._expected)) for costs in self._costs.values()]

    def other_starts(self, lane: LaneState, now: float) -> list[Start]:
        """As :meth:`starts`, without one lane."""
        return [(group.costs, group.earliest(now, lane)) for group in self._groups.values()]

    def spare(self, lane: LaneState, now: float) -> list[Start]:
        """Where other lanes could take what this one leaves: idle, or not like this one."""
        found: list[Start] = []
        for group in self._groups.values():
            if group.costs is not lane.costs:
                found.append((group.costs, group.earliest(now)))
            elif len(group.idle) > (lane.number in group.idle):
                found.append((group.costs, now))
        return found

    def even_share(self, lane: LaneState, job: Job, now: float) -> int:
        """Rows of a job that a lane takes if all lanes are to end it together.

        The least rows that end here no sooner than the other lanes have done the rest, each in a
        batch from when it is free.
        """
        key, rows, most = job
        start = lane.free_at(now)

        def is_enough(own: int) -> bool:
            end = start + lane.costs.predict(key, own, 0.5)
            groups = self._groups.values()
            return own + sum(each.rows_until(end, job, now, lane) for each in groups) >= rows

        return bisect_left(range(1, min(rows, most)), True, key=is_enough) + 1

    def with_room(self, batch: tuple[BatchKey, int, float] | None) -> LaneState | None:
        """The lane to give a batch to: idle before busy, the faster one first.

        Args:
            batch: its key, rows, and the quantile of their cost; ``None``: any.
        """
        lane = self._only
        if lane is not None:
            return lane if len(lane.running) < lane.depth else None
        found = [
            lane
            for group in self._groups.values()
            if (group.idle or self._deep) and (lane := group.with_room()) is not None
        ]
        if len(found) < 2 or batch is None:
            return found[0] if found else None
        return min(found, key=lambda lane: (bool(lane.running), lane.costs.predict(*batch)))
