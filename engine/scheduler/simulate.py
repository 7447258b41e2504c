"""Batching policies in virtual time: the Batcher that serves, against the usual policies.

Nothing here sleeps or reads a clock. A cost model stands in for the device, arrivals are
drawn from a seeded generator, and every policy sees the same arrivals.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from plinth.engine.flow import Sla
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.work import Batch, Work

Arrivals = NDArray[np.float64]
Cost = Callable[[int, float], float]
"""Seconds that a batch of n rows takes when it starts at a time (seconds)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One scene: a device's cost, a promise and how long it runs.

    Args:
        fixed: seconds a batch costs whatever its size.
        per_row: seconds each row adds.
        max_rows: largest batch, rows.
        deadline: allowed seconds from arrival to answer.
        duration: seconds of arrivals.
    """

    fixed: float = 0.020
    per_row: float = 0.001
    max_rows: int = 128
    deadline: float = 0.200
    duration: float = 60.0

    def cost(self, rows: int, at: float = 0.0) -> float:
        """Seconds a batch of ``rows`` takes."""
        return self.fixed + self.per_row * rows

    def faster(self, speed: float) -> Setting:
        """The same on a device that is so many times as fast."""
        return replace(self, fixed=self.fixed / speed, per_row=self.per_row / speed)

    @property
    def capacity(self) -> float:
        """Rows per second in batches of the largest size."""
        return self.max_rows / self.cost(self.max_rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the arrivals: counts, and the seconds the device was busy."""

    offered: int
    in_sla: int
    late: int
    refused: int
    duration: float
    busy: float

    @property
    def goodput(self) -> float:
        """Answers within the deadline, per second."""
        return self.in_sla / self.duration


def poisson(rate: float, duration: float, seed: int) -> Arrivals:
    """Arrival times (seconds, sorted) of a Poisson process of ``rate`` per second."""
    random = np.random.default_rng(seed)
    return np.sort(random.uniform(0, duration, random.poisson(rate * duration)))


def bursts(rate: float, duration: float, seed: int, on: float = 0.5, off: float = 0.5) -> Arrivals:
    """On/off arrivals: Poisson of ``rate`` for ``on`` seconds, silence for ``off``."""
    times = poisson(rate, duration * on / (on + off), seed)
    cycle = np.floor(times / on)
    return times + cycle * off


@dataclass(frozen=True, slots=True)
class Ran:
    """A batch that ran, from ``start`` on for ``seconds``."""

    start: float
    seconds: float
    batch: Batch


@dataclass(frozen=True, slots=True)
class Trace:
    """What a batcher made of its work.

    Args:
        finish: when each piece of work that was answered had its last row done.
        ran: the batches, in the order in which they began.
    """

    finish: dict[Work, float]
    ran: list[Ran]

    def outcome(self, works: Sequence[Work], duration: float) -> Outcome:
        """Counts over some of the work; the lanes were busy with all of it."""
        done = [work for work in works if work in self.finish]
        late = sum(self.finish[work] > work.deadline + 1e-9 for work in done)
        busy = sum(ran.seconds for ran in self.ran)
        refused = len(works) - len(done)
        return Outcome(len(works), len(done) - late, late, refused, duration, busy)

    def goodput(self, first: float, last: float) -> float:
        """Answers in time per second, of those given between two times (seconds)."""
        kept = sum(
            first <= at < last and at <= work.deadline + 1e-9 for work, at in self.finish.items()
        )
        return kept / (last - first)


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happens to the lanes at a time (seconds), such as one that joins.

    Args:
        at: when.
        make: does it; gives the lanes whose batches are lost with them.
    """

    at: float
    make: Callable[[Batcher], Sequence[int]]


class Replay:
    """A batcher and its lanes in virtual time, event by event.

    Args:
        batcher: made anew, its batch keys and lanes registered.
        costs: what batches really take, by batch key.
        lane_costs: the same for lanes that are not like the others, by number.

    Attributes:
        lost: the ``id`` of batches whose lane died before they ended.
        follow: the work that comes because some was done, and when that was (seconds); it arrives
            then or later.
        resumes: seconds from the end of an urgent batch until its callers have asked for more.
        turn: seconds from the end of a batch until its lane begins the next.
    """

    follow: Callable[[Work, float], Sequence[Work]] | None = None
    resumes: float = 0.0
    turn: Callable[[Batch], float] | None = None

    def __init__(
        self,
        batcher: Batcher,
        costs: Mapping[str, Cost],
        lane_costs: Mapping[int, Mapping[str, Cost]] | None = None,
    ) -> None:
        self.batcher = batcher
        self.trace = Trace({}, [])
        self._costs = costs
        self._lane_costs = lane_costs or {}
        self._ends: list[tuple[float, int, Ran]] = []
        self._turning: list[tuple[float, int, Ran]] = []
        self._held = self._resumed = float("inf")
        self._left: dict[Work, int] = {}
        self._following: list[tuple[float, int, Work]] = []
        self._numbers = count()
        self._dead: set[int] = set()
        self.lost: set[int] = set()

    @property
    def next_end(self) -> float:
        """When the next batch ends; infinity when none runs."""
        return self._ends[0][0] if self._ends else float("inf")

    def start(self, now: float) -> None:
        """Give batches to all lanes that are free, as far as there are any."""
        self._held = float("inf")
        while self.batcher and (lane := self.batcher.free_lane()) is not None:
            waiting = self.batcher.urgent_rows + self.batcher.background_rows
            batch, refused = self.batcher.next(now, lane)
            for each in refused:
                self.refuse(each.work)
            if batch is None:
                if self.batcher.urgent_rows + self.batcher.background_rows == waiting:
                    self._held = self.batcher.held_until
                    return  # what waits is left to a lane that is busy, or for later
                continue
            seconds = self._lane_costs.get(lane, self._costs)[batch.key](batch.rows, now)
            ran = Ran(now, seconds, batch)
            self.trace.ran.append(ran)
            heapq.heappush(self._ends, (now + seconds, len(self.trace.ran), ran))

    def refuse(self, work: Work) -> None:
        """Told of work that was refused; what stands and falls with it can be cancelled here."""

    def end(self) -> float:
        """Let the next batch end; returns when that is."""
        now, number, ran = heapq.heappop(self._ends)
        batch = ran.batch
        if batch.lane in self._dead:
            self.lost.add(id(ran))
            return now
        if self.turn is None:
            self.batcher.finished(batch, ran.seconds, now)
        else:
            heapq.heappush(self._turning, (now + self.turn(batch), number, ran))
        if batch.urgent and self.follow is not None:
            self.batcher.anticipation.answered(batch.lane, now)
            self._resumed = now + self.resumes
        for part in batch.parts:
            left = self._left.get(part.work, part.work.rows) - part.rows
            if left:
                self._left[part.work] = left
            else:
                self._left.pop(part.work, None)
                self.trace.finish[part.work] = now
                for each in () if self.follow is None else self.follow(part.work, now):
                    self._follow(each, now)
        return now

    def _admit(self, work: Work) -> None:
        if not work.gone and self.batcher.admit(work, work.arrival) is not None:
            self.refuse(work)

    def _follow(self, work: Work, now: float) -> None:
        """Work that comes because some was done: at once, before a lane begins anything, or later.

        What comes at once was foreseen: nobody has to be waited for.
        """
        if work.arrival <= now:
            self._admit(work)
        else:
            self._add(work)

    def _add(self, work: Work) -> None:
        heapq.heappush(self._following, (work.arrival, next(self._numbers), work))

    def change(self, change: Change) -> None:
        """Let something happen to the lanes: what was lost with one waits again."""
        for lane in change.make(self.batcher):
            self._dead.add(lane)
            for batch in self.batcher.drop_lane(lane):
                self.batcher.died(batch, change.at)

    def through(
        self,
        works: Sequence[Work],
        until: float = float("inf"),
        changes: Sequence[Change] = (),
    ) -> Trace:
        """Run work through; see :func:`replay`."""
        coming, changing = deque(works), deque(changes)
        while True:
            arrival = coming[0].arrival if coming else float("inf")
            changed = changing[0].at if changing else float("inf")
            following = self._following[0][0] if self._following else float("inf")
            resumed = self._resumed if self._held < float("inf") else float("inf")
            turned = self._turning[0][0] if self._turning else float("inf")
            now = min(arrival, following, changed, self.next_end, turned, self._held, resumed)
            if now == float("inf") or now >= until:
                while self.next_end < float("inf"):
                    self.end()
                return self.trace
            # What arrives while the lanes are busy is judged as it arrives, before they are free.
            if now == changed:
                self.change(changing.popleft())
            elif now == arrival:
                while coming and coming[0].arrival <= now:
                    self._admit(coming.popleft())
            elif now == following:
                work = heapq.heappop(self._following)[2]
                if work.sla.deadline_ms is not None:
                    self.batcher.anticipation.followed()
                self._admit(work)
            elif now == resumed:
                self._resumed = float("inf")
                self.batcher.anticipation.resumed()
            elif now == self.next_end:
                self.end()
            elif now == turned:
                ran = heapq.heappop(self._turning)[2]
                self.batcher.finished(ran.batch, ran.seconds, now)
            self.start(now)


def replay(
    batcher: Batcher,
    works: Sequence[Work],
    costs: Mapping[str, Cost],
    until: float = float("inf"),
    *,
    lane_costs: Mapping[int, Mapping[str, Cost]] | None = None,
    changes: Sequence[Change] = (),
) -> Trace:
    """Run a batcher over work in virtual time, on all its lanes.

    Args:
        batcher: made anew, its batch keys and lanes registered.
        works: in order of arrival, made anew: the batcher marks what it has taken of them.
        costs: what batches really take, by batch key.
        until: seconds after which no batch starts; for background work without end.
        lane_costs: the same for lanes that are not like the others, by number.
        changes: lanes that join, leave and die, in order of time.
    """
    return Replay(batcher, costs, lane_costs).through(works, until, changes)


def warmed(settings: Mapping[str, Setting]) -> Batcher:
    """A batcher whose batch keys were measured at a few batch sizes, as at warm-up."""
    latency = LatencyModel()
    batcher = Batcher(latency)
    for key, setting in settings.items():
        batcher.register(key, max_rows=setting.max_rows)
        for rows in sorted({1, max(1, setting.max_rows // 4), setting.max_rows}):
            latency.seed(key, rows, setting.cost(rows))
    return batcher


def warmed_lanes(setting: Setting, speeds: Sequence[float]) -> Replay:
    """A batcher of one batch key over lanes so many times as fast as the setting says."""
    made: dict[float, tuple[LatencyModel, Setting]] = {}
    for speed in speeds:
        if speed not in made:
            scaled = setting.faster(speed)
            made[speed] = (warmed({"a": scaled}).latency, scaled)
    batcher = Batcher(made[speeds[0]][0], max_queue=4096 * len(speeds))
    batcher.register("a", max_rows=setting.max_rows)
    costs: dict[int, Mapping[str, Cost]] = {0: {"a": made[speeds[0]][1].cost}}
    for speed in speeds[1:]:
        latency, scaled = made[speed]
        costs[batcher.add_lane(latency)] = {"a": scaled.cost}
    return Replay(batcher, {"a": setting.cost}, costs)


def pooled(
    setting: Setting,
    arrivals: Arrivals,
    speeds: Sequence[float],
    patient: Sequence[Work] = (),
) -> Trace:
    """Plinth's own Batcher over lanes: one queue for all.

    Args:
        setting: the scene.
        arrivals: times of urgent rows, seconds.
        speeds: of each lane, against the setting.
        patient: background work, there from the start.
    """
    run = warmed_lanes(setting, speeds)
    promise = Sla(deadline_ms=setting.deadline * 1e3)
    run.batcher.register_sla(promise)
    works = [Work("a", 1, float(at), promise) for at in arrivals]
    until = setting.duration if patient else float("inf")
    return run.through([*patient, *works], until)


Choose = Callable[[NDArray[np.int64], np.random.Generator, int], int]
"""The lane that a request goes to: rows of each lane, waiting or running, and its number."""


def round_robin(rows: NDArray[np.int64], _: np.random.Generator, number: int) -> int:
    """One lane after the other."""
    return number % len(rows)


def shortest_queue(rows: NDArray[np.int64], _: np.random.Generator, number: int) -> int:
    """The lane with the fewest rows (Weber, J. Appl. Prob. 15(2), 1978)."""
    return int(rows.argmin())


def two_choices(rows: NDArray[np.int64], random: np.random.Generator, number: int) -> int:
    """The shorter queue of two at random (Mitzenmacher, IEEE TPDS 12(10), 2001)."""
    first, second = (int(each) for each in random.integers(0, len(rows), 2))
    return first if rows[first] <= rows[second] else second


def routed(
    setting: Setting, arrivals: Arrivals, lanes: int, choose: Choose, seed: int = 0
) -> list[Trace]:
    """A queue per lane, each with the same batching and shedding; a request stays where it went.

    Args:
        setting: the scene.
        arrivals: times, seconds.
        lanes: how many, all alike.
        choose: the lane of a request.
        seed: of the choices.
    """
    promise = Sla(deadline_ms=setting.deadline * 1e3)
    runs = [warmed_lanes(setting, [1.0]) for _ in range(lanes)]
    rows, random = np.zeros(lanes, dtype=np.int64), np.random.default_rng(seed)
    ends: list[tuple[float, int]] = []

    def begin(lane: int, now: float) -> None:
        run = runs[lane]
        idle = run.next_end == float("inf")
        run.start(now)
        rows[lane] = run.batcher.urgent_rows
        if run.next_end < float("inf"):
            rows[lane] += run.trace.ran[-1].batch.rows
            if idle:
                heapq.heappush(ends, (run.next_end, lane))

    def end_until(now: float) -> None:
        while ends and ends[0][0] < now:
            at, lane = heapq.heappop(ends)
            runs[lane].end()
            begin(lane, at)

    for number, at in enumerate(arrivals):
        end_until(float(at))
        lane = choose(rows, random, number)
        runs[lane].batcher.admit(Work("a", 1, float(at), promise), float(at))
        begin(lane, float(at))
    end_until(float("inf"))
    return [run.trace for run in runs]


def elastic(setting: Setting, arrivals: Arrivals) -> Outcome:
    """Plinth's own Batcher, warmed up; one batch key and one promise."""
    promise = Sla(deadline_ms=setting.deadline * 1e3)
    works = [Work("a", 1, float(at), promise) for at in arrivals]
    trace = replay(warmed({"a": setting}), works, {"a": setting.cost})
    return trace.outcome(works, setting.duration)


def queueing(
    setting: Setting,
    arrivals: Arrivals,
    *,
    window: float = 0.0,
    bound: int | None = None,
    timeout: float | None = None,
    greedy: bool = False,
) -> Outcome:
    """The field's usual batchers, first come first served.

    Args:
        setting: the scene.
        arrivals: times, seconds.
        window: seconds to wait for a batch to fill, from the oldest request on.
        bound: requests that may wait; more are refused.
        timeout: seconds after which a waiting request is refused.
        greedy: the batch is as large as the oldest request's deadline allows.
    """
    now, index, in_sla, late, refused, busy = 0.0, 0, 0, 0, 0, 0.0
    queue: list[float] = []
    limit = bound if bound is not None else len(arrivals)

    def admit(until: float) -> None:
        nonlocal index, refused
        while index < len(arrivals) and arrivals[index] <= until:
            if len(queue) < limit:
                queue.append(float(arrivals[index]))
            else:
                refused += 1
            index += 1

    while index < len(arrivals) or queue:
        if not queue:
            now = max(now, float(arrivals[index]))
        admit(now)
        if timeout is not None:
            fresh = [at for at in queue if now - at <= timeout]
            refused += len(queue) - len(fresh)
            queue[:] = fresh
        if not queue:
            continue
        if len(queue) < setting.max_rows and now < queue[0] + window:
            coming = float(arrivals[index]) if index < len(arrivals) else float("inf")
            now = min(queue[0] + window, coming)
            continue
        rows = min(len(queue), setting.max_rows)
        if greedy:
            slack = queue[0] + setting.deadline - now
            rows = min(rows, max(1, int((slack - setting.fixed) / setting.per_row)))
        seconds = setting.cost(rows)
        taken, queue[:rows] = queue[:rows], []
        admit(now + seconds)
        now, busy = now + seconds, busy + seconds
        missed = sum(at + setting.deadline < now - 1e-9 for at in taken)
        late += missed
        in_sla += rows - missed
    return Outcome(len(arrivals), in_sla, late, refused, setting.duration, busy)


def clairvoyant(setting: Setting, arrivals: Arrivals, tick: float = 0.001) -> Outcome:
    """The most answers in time that any policy could give, knowing all arrivals beforehand.

    Dynamic programming over (start of a batch, first request not yet decided), exact for
    batches that start on multiples of ``tick``. With one deadline for all, the best n of the
    eligible requests are the n oldest, so requests are decided in order of arrival.
    """
    steps = int((setting.duration + setting.deadline) / tick) + 1
    times = np.arange(steps + 1) * tick
    sizes = np.arange(1, setting.max_rows + 1)
    seconds = setting.fixed + setting.per_row * sizes
    spans = np.rint(seconds / tick).astype(int)
    tail = int(spans[-1]) + 1
    here = np.searchsorted(arrivals, times, side="right")
    low = np.searchsorted(arrivals, times + seconds[0] - setting.deadline - 1e-9)
    low_all = np.concatenate([low, np.full(tail, len(arrivals))])
    eligible = np.stack(
        [np.searchsorted(arrivals, times + cost - setting.deadline - 1e-9) for cost in seconds], 1
    )
    width = int((here - low).max()) + 2
    best = np.zeros((steps + 1 + tail, width), dtype=np.int32)
    flat = best.reshape(-1)
    for step in range(steps - 1, -1, -1):
        first = low[step] + np.arange(width)
        value = best[step + 1, np.clip(first - low_all[step + 1], 0, width - 1)]
        waiting = here[step] - low[step]
        if waiting > 0:
            size = sizes[:waiting]
            end = np.maximum(first[: waiting + 1, None], eligible[step, : len(size)]) + size
            then = step + spans[: len(size)]
            oldest = low_all[then]
            # What is over by then is lost; what has not come yet cannot have run.
            place = np.minimum(np.maximum(end, oldest), here[step]) + (then * width - oldest)
            gain = np.where(end <= here[step], flat.take(place) + size, -1)
            value[: waiting + 1] = np.maximum(value[: waiting + 1], gain.max(1))
        best[step] = value
    count = int(best[0, 0])
    lost = len(arrivals) - count
    return Outcome(len(arrivals), count, 0, lost, setting.duration, float("nan"))


def full_speed(setting: Setting, rate: float) -> float:
    """The most rows per second of one batch key while the device does nothing else.

    A batch of n rows finds at most ``rate * (deadline - cost(n))`` rows young enough to be in
    time, so n is bounded. Arrivals come evenly; bunched ones may carry a policy a little above.
    """
    young = rate * (setting.deadline - setting.fixed) / (1 + rate * setting.per_row)
    rows = min(float(setting.max_rows), young)
    return rows / (setting.fixed + setting.per_row * rows)


def fluid(setting: Setting, rate: float, speeds: Sequence[float]) -> float:
    """The most answers in time per second of lanes of these speeds, in the long run.

    Each lane is taken to have the youngest rows of all arrivals to itself, so no policy that
    knows all arrivals can do better while they come evenly.

    Args:
        setting: the scene.
        rate: rows offered per second.
        speeds: of each lane, against the setting.
    """
    return min(rate, sum(full_speed(setting.faster(speed), rate) for speed in speeds))


def steady(classes: Sequence[tuple[Setting, float]]) -> float:
    """The most answers in time per second, in the long run, when arrivals come evenly.

    The classes that give most per second of the device come first; the others may get nothing.
    Nobody waits here while another class holds the device, so no policy can have quite as much.

    Args:
        classes: batch keys that share the device: setting, and rows per second offered.
    """
    made = sorted(((full_speed(*each), each[1]) for each in classes), reverse=True)
    total, left = 0.0, 1.0
    for speed, rate in made:
        share = min(left, rate / speed)
        total, left = total + share * speed, left - share
    return total


def fair(classes: Sequence[tuple[Setting, float]]) -> list[float]:
    """Answers in time per second of each class, when the device's time is shared out equally.

    What one class does not need goes to the others (max-min fairness). As in :func:`steady`,
    nobody waits while another class holds the device.

    Args:
        classes: as for :func:`steady`.
    """
    speeds = [full_speed(*each) for each in classes]
    needs = [rate / speed for speed, (_, rate) in zip(speeds, classes, strict=True)]
    made, left = [0.0] * len(classes), 1.0
    for done, place in enumerate(sorted(range(len(classes)), key=needs.__getitem__)):
        share = min(needs[place], left / (len(classes) - done))
        made[place], left = share * speeds[place], left - share
    return made
