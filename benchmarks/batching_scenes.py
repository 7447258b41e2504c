"""The Batcher that serves, in virtual time, on scenes that go wrong elsewhere.

    python benchmarks/batching_scenes.py [--seed 7] [--duration 60] [--json]

A batch of n costs 20 ms + 1 ms x n, at most 128, and answers are due within 200 ms, unless the
scene says otherwise. Arrivals are Poisson. Nothing sleeps; the result does not depend on the
machine.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

from plinth.engine.flow import Sla
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.simulate import (
    Arrivals,
    Outcome,
    Setting,
    Trace,
    bursts,
    clairvoyant,
    elastic,
    fair,
    full_speed,
    poisson,
    replay,
    steady,
    warmed,
)
from plinth.engine.scheduler.work import Work

DEVICE = Setting()
WINDOWS = Setting(fixed=0.005, per_row=0.025, max_rows=8)
"""Windows of a volume, as background work: 25 ms each."""

CAPACITY = DEVICE.capacity
SLOW = replace(DEVICE, fixed=2 * DEVICE.fixed, per_row=2 * DEVICE.per_row)
PROMISE = Sla(deadline_ms=DEVICE.deadline * 1e3)
TIGHT, LOOSE = Sla(deadline_ms=100), Sla(deadline_ms=1000)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table; rates per second.

    Args:
        scene: which scene.
        case: which part of it.
        offered: requests that came.
        in_time: answers within their deadline.
        ceiling: what could have been in time; how it is known differs by scene.
        late: answers after their deadline, a count.
        refused: requests that were refused, a count.
        more: figures of this scene alone.
    """

    scene: str
    case: str
    offered: float
    in_time: float
    ceiling: float
    late: int
    refused: int
    more: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """In time, as a share of the ceiling."""
        return self.in_time / self.ceiling


def line(
    scene: str, case: str, outcome: Outcome, ceiling: float, more: dict[str, float] | None = None
) -> Line:
    """A line from an outcome; a ceiling is at most what was offered."""
    offered = outcome.offered / outcome.duration
    most = min(ceiling, offered)
    counts = (outcome.late, outcome.refused)
    return Line(scene, case, offered, outcome.goodput, most, *counts, more or {})


def works(arrivals: Arrivals, sla: Sla, key: str = "a") -> list[Work]:
    """One row for each arrival."""
    return [Work(key, 1, float(at), sla) for at in arrivals]


def by_arrival(*streams: Sequence[Work]) -> list[Work]:
    """Streams of work as one."""
    return sorted((work for stream in streams for work in stream), key=lambda work: work.arrival)


def mixed_shapes(duration: float, seed: int) -> Iterator[Line]:
    """Two to four batch keys, alike or unlike, that never share a batch.

    The ceiling is ``simulate.steady``: the most answers in time, whoever goes
    without. ``least_of_fair_share`` holds each class against what it would have of an equal
    share of the device's time (``simulate.fair``), and names the worst off.
    """
    unlike = (
        Setting(0.010, 0.0005, 128),
        Setting(0.020, 0.001, 128),
        Setting(0.040, 0.002, 64),
    )
    cases = [(f"{count} shapes", (DEVICE,) * count) for count in (2, 3, 4)]
    for name, classes in [*cases, ("small, middle, large", unlike)]:
        for rate in (400, 1000):
            settings = {str(place): setting for place, setting in enumerate(classes)}
            each = rate / len(classes)
            streams = [
                works(poisson(each, duration, seed + place), PROMISE, key)
                for place, key in enumerate(settings)
            ]
            costs = {key: setting.cost for key, setting in settings.items()}
            trace = replay(warmed(settings), by_arrival(*streams), costs)
            parts = [trace.outcome(stream, duration) for stream in streams]
            shares = [part.in_sla / part.offered for part in parts]
            everything = trace.outcome(by_arrival(*streams), duration)
            offered = [(setting, each) for setting in classes]
            most, entitled = steady(offered), fair(offered)
            more = {
                "least_served_share": min(shares),
                "most_served_share": max(shares),
                "least_of_fair_share": least_of(parts, entitled),
            }
            yield line("mixed shapes", f"{name}, {rate}/s", everything, most, more)


def least_of(parts: Sequence[Outcome], entitled: Sequence[float]) -> float:
    """The worst-off part's answers in time, as a share of what it is entitled to."""
    pairs = zip(parts, entitled, strict=True)
    return min(part.goodput / min(most, part.offered / part.duration) for part, most in pairs)


def ceiling(setting: Setting, arrivals: Arrivals) -> float:
    """Clairvoyant answers in time per second; not worked out where a policy answers all."""
    alone = elastic(setting, arrivals)
    best = alone if alone.in_sla == alone.offered else clairvoyant(setting, arrivals)
    return best.goodput


def on_and_off(duration: float, seed: int) -> Iterator[Line]:
    """Half a second of load, half a second of silence. The ceiling is clairvoyant."""
    setting = replace(DEVICE, duration=duration)
    for rate in (800, 1200, 1600):
        arrivals = bursts(rate, duration, seed)
        most = ceiling(setting, arrivals)
        yield line("bursts", f"{rate}/s on, 0 off", elastic(setting, arrivals), most)


def drift(duration: float, seed: int) -> Iterator[Line]:
    """The device's cost doubles, or halves, at half-time and nobody tells the batcher.

    The ceiling is clairvoyant for the arrivals of each part at the cost of that part.
    """
    half = duration / 2
    for name, before, after in (("doubles", DEVICE, SLOW), ("halves", SLOW, DEVICE)):
        for rate in (250, 600):
            stream = works(poisson(rate, duration, seed), PROMISE)

            def cost(rows: int, at: float, then: Setting = after, now: Setting = before) -> float:
                return (then if at >= half else now).cost(rows)

            trace = replay(warmed({"a": before}), stream, {"a": cost})
            for part, setting, begin, end in (
                ("before", before, 0.0, half),
                ("first 5 s after", after, half, half + 5),
                ("from then on", after, half + 5, duration),
            ):
                inside = [work for work in stream if begin <= work.arrival < end]
                there = replace(setting, duration=end - begin)
                times = poisson(rate, duration, seed)
                times = times[(times >= begin) & (times < end)] - begin
                outcome = trace.outcome(inside, end - begin)
                most = ceiling(there, times)
                yield line(f"cost {name}", f"{rate}/s, {part}", outcome, most)


def two_promises(duration: float, seed: int) -> Iterator[Line]:
    """100 ms and 1 s, of one batch key or of two.

    The ceiling is each promise's fair share: what it would have of half of the device, every
    batch taking twice as long and nobody else there (processor sharing). It can be beaten by
    sharing batches, and where the other does not need its half. It is no upper bound: a device
    of one's own, less the time the other needs, would be one, but a batch cannot be
    interrupted, and who waits for the other's batch is late.
    """
    for name, keys in (("same shape", "aa"), ("two shapes", "ab")):
        for rates in ((300, 200), (200, 400), (100, 1000), (900, 200), (600, 1000)):
            streams = [
                works(poisson(rate, duration, seed + place), sla, key)
                for place, (rate, sla, key) in enumerate(
                    zip(rates, (TIGHT, LOOSE), keys, strict=True)
                )
            ]
            costs = dict.fromkeys(keys, DEVICE.cost)
            batcher = warmed(dict.fromkeys(keys, DEVICE))
            trace = replay(batcher, by_arrival(*streams), costs)
            for stream, rate, sla in zip(streams, rates, (TIGHT, LOOSE), strict=True):
                allowed = sla.deadline_ms or 0.0
                half = half_of(DEVICE, allowed / 1e3, rate)
                case = f"{name}, {rates[0]} + {rates[1]}/s: {allowed:g} ms"
                yield line("two promises", case, trace.outcome(stream, duration), half)


def half_of(device: Setting, deadline: float, rate: float) -> float:
    """Answers in time per second that half of a device gives, every batch taking twice as long."""
    slow = replace(device, fixed=2 * device.fixed, per_row=2 * device.per_row, deadline=deadline)
    return min(rate, full_speed(slow, rate))


def background(duration: float, seed: int) -> Iterator[Line]:
    """Urgent requests before windows of volumes without end.

    The ceiling is clairvoyant for the urgent requests alone, less the share of the device that
    background work is owed.
    """
    setting = replace(DEVICE, duration=duration)
    settings = {"a": setting, "volume": WINDOWS}
    overload = round(1.5 * CAPACITY)
    for rates in ((50,), (100,), (400,), (600,), (overload,), (20, overload)):
        spell = duration / len(rates)
        spells = (poisson(rate, spell, seed) + n * spell for n, rate in enumerate(rates))
        arrivals = np.concatenate(list(spells))
        stream = works(arrivals, PROMISE)
        volume = Work("volume", 10**9, 0.0, Sla())
        batcher = warmed(settings)
        batcher.register_sla(PROMISE)
        costs = {key: part.cost for key, part in settings.items()}
        trace = replay(batcher, by_arrival([volume], stream), costs, until=duration)
        ended = [work for work in stream if work.arrival < duration - DEVICE.deadline]
        outcome = trace.outcome(ended, duration - DEVICE.deadline)
        most = ceiling(setting, arrivals)
        if max(rates) > CAPACITY:
            most *= 1 - batcher.background_share
        more = background_figures(trace, batcher, duration)
        case = ", then ".join(f"{rate}/s" for rate in rates)
        yield line("background", f"{case} before windows", outcome, most, more)


def background_figures(trace: Trace, batcher: Batcher, duration: float) -> dict[str, float]:
    """Shares of the device, and the longest that background work kept an urgent request."""
    slices = [ran for ran in trace.ran if not ran.batch.urgent]
    urgent = [ran for ran in trace.ran if ran.batch.urgent]
    idle = duration - sum(ran.seconds for ran in urgent)
    spans = [
        sum(ran.seconds for ran in slices if begin <= ran.start < begin + 2.0) / 2.0
        for begin in range(0, int(duration) - 1, 2)
    ]
    ends = [ran.start + ran.seconds for ran in slices]
    longest = 0.0
    for ran in urgent:
        for part in ran.batch.parts:
            arrival, kept = part.work.arrival, 0.0
            for place in range(bisect_left(ends, arrival), len(slices)):
                if slices[place].start >= ran.start:
                    break
                kept += ends[place] - max(slices[place].start, arrival)
            longest = max(longest, kept)
    busy = sum(ran.seconds for ran in slices)
    return {
        "background_of_device": busy / duration,
        "background_of_idle": busy / idle,
        "least_background_in_2s": min(spans),
        "longest_kept_ms": longest * 1e3,
        "bound_ms": batcher.blocking_bound * 1e3,
    }


def cold_start(duration: float, seed: int) -> Iterator[Line]:
    """The first second of a server, warmed up or never measured. All should be in time."""
    for name in ("warmed up", "never measured"):
        for rate in (400, 600):
            stream = works(poisson(rate, min(duration, 10.0), seed), PROMISE)
            batcher = warmed({"a": DEVICE}) if name == "warmed up" else Batcher(LatencyModel())
            trace = replay(batcher, stream, {"a": DEVICE.cost})
            for end in (1.0, min(duration, 10.0)):
                outcome = trace.outcome([work for work in stream if work.arrival < end], end)
                yield line("cold start", f"{name}, {rate}/s, first {end:g} s", outcome, rate * 2.0)


SCENES = (mixed_shapes, on_and_off, drift, two_promises, background, cold_start)


def main() -> None:
    """Run all scenes and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--duration", type=float, default=60.0, help="seconds, 20 or more")
    given = parser.parse_args()
    if given.duration < 20:
        parser.error("the scenes need at least 20 seconds of virtual time")
    lines = [made for scene in SCENES for made in scene(given.duration, given.seed)]
    if given.json:
        print_json([asdict(made) for made in lines])
        return
    table = Table(title="requests per second")
    for head in ("scene", "case", "offered", "in time", "ceiling", "%", "late", "refused", ""):
        table.add_column(head)
    for made in lines:
        figures = (f"{made.offered:.0f}", f"{made.in_time:.1f}", f"{made.ceiling:.1f}")
        more = ", ".join(f"{name} {value:.3g}" for name, value in made.more.items())
        counts = (f"{100 * made.share:.1f}", str(made.late), str(made.refused))
        table.add_row(made.scene, made.case, *figures, *counts, more)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
