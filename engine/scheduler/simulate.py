"""Batching policies in virtual time: the Batcher that serves, against the usual policies.

Nothing here sleeps or reads a clock. A cost model stands in for the device, arrivals are
drawn from a seeded generator, and every policy sees the same arrivals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        ran: the batches, in order.
    """

    finish: dict[Work, float]
    ran: list[Ran]

    def outcome(self, works: Sequence[Work], duration: float) -> Outcome:
        """Counts over some of the work; the device was busy with all of it."""
        done = [work for work in works if work in self.finish]
        late = sum(self.finish[work] > work.deadline + 1e-9 for work in done)
        busy = sum(ran.seconds for ran in self.ran)
        refused = len(works) - len(done)
        return Outcome(len(works), len(done) - late, late, refused, duration, busy)


def replay(
    batcher: Batcher,
    works: Sequence[Work],
    costs: Mapping[str, Cost],
    until: float = float("inf"),
) -> Trace:
    """Run a batcher over work in virtual time.

    Args:
        batcher: made anew, its batch keys registered.
        works: in order of arrival, made anew: the batcher marks what it has taken of them.
        costs: what batches really take, by batch key.
        until: seconds after which no batch starts; for background work without end.
    """
    now, index = 0.0, 0
    trace = Trace({}, [])

    def admit(up_to: float) -> None:
        nonlocal index
        while index < len(works) and works[index].arrival <= up_to:
            batcher.admit(works[index], works[index].arrival)
            index += 1

    while (index < len(works) or batcher) and now < until:
        if not batcher:
            now = max(now, works[index].arrival)
        admit(now)
        batch, _ = batcher.next(now)
        if batch is None:
            continue
        seconds = costs[batch.key](batch.rows, now)
        trace.ran.append(Ran(now, seconds, batch))
        # What arrives while the device is busy is judged when it arrives.
        admit(now + seconds)
        now += seconds
        batcher.finished(batch, seconds, now)
        for part in batch.parts:
            if part.first + part.rows == part.work.rows:
                trace.finish[part.work] = now
    return trace


def warmed(settings: Mapping[str, Setting]) -> Batcher:
    """A batcher whose batch keys were measured at a few batch sizes, as at warm-up."""
    latency = LatencyModel()
    batcher = Batcher(latency)
    for key, setting in settings.items():
        batcher.register(key, max_rows=setting.max_rows)
        for rows in sorted({1, max(1, setting.max_rows // 4), setting.max_rows}):
            latency.seed(key, rows, setting.cost(rows))
    return batcher


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
