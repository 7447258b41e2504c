"""Plans in virtual time: what so many lanes hold, and what one more would buy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plinth.engine.flow import Sla
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.simulate import Arrivals, Cost, Replay, Trace, poisson
from plinth.engine.scheduler.work import Work
from plinth.pipelines.plan.demand import CostFile, Costs, Patient

WARM = 0.1
"""Share of the time that is left out at the beginning, while the lanes fill."""
URGENT, PATIENT = "urgent", "background"
NEAR = 0.005
"""Share of all requests, up and down by their time in the engine, that one is taken for any of."""
Waits = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """What is planned for.

    Args:
        costs: what batches take.
        deadline: seconds from arrival to answer.
        quantile: share of requests that must be in time.
        rate: requests per second; with ``trace`` that of the trace.
        trace: arrival times, seconds; ``None``: Poisson arrivals.
        patient: background work; ``None``: there is none.
        seconds: of virtual time; a trace takes its own.
        seed: of arrivals and delays.
    """

    costs: CostFile
    deadline: float
    rate: float
    quantile: float = 0.99
    trace: Arrivals | None = None
    patient: Patient | None = None
    seconds: float = 20.0
    seed: int = 7

    def arrivals(self) -> Arrivals:
        """When requests come, seconds."""
        return poisson(self.rate, self.seconds, self.seed) if self.trace is None else self.trace

    @property
    def sla(self) -> Sla:
        """The promise of urgent work."""
        return Sla(deadline_ms=self.deadline * 1e3, quantile=self.quantile)


@dataclass(frozen=True, slots=True)
class Point:
    """What a number of lanes holds.

    Args:
        lanes: how many.
        in_time: share of requests that were answered in time.
        refused: share of requests that were refused.
        p50: milliseconds from arrival to answer, of those that were answered; likewise the others.
        busy: share of time that lanes worked.
        jobs: background jobs done in their period; those asked for, at most.
        jobs_possible: those that would be done if there were always one more.
    """

    lanes: int
    in_time: float
    refused: float
    p50: float
    p99: float
    p999: float
    busy: float
    jobs: float | None
    jobs_possible: float | None

    def holds(self, question: Question) -> bool:
        """Whether the promise is kept and all background work is done."""
        asked = question.patient
        done = asked is None or (self.jobs_possible or 0.0) >= asked.jobs
        return self.in_time >= question.quantile and done


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: a point for each number of lanes, and the smallest that holds."""

    points: list[Point]
    needed: int | None
    separate: tuple[int, int] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "lanes_needed": self.needed,
            "separate_pools": None if self.separate is None else list(self.separate),
            "saved": self.saved,
            "points": [asdict(point) for point in self.points],
        }

    @property
    def saved(self) -> float | None:
        """Share of lanes that one pool saves against two."""
        if self.needed is None or self.separate is None:
            return None
        return 1 - self.needed / sum(self.separate)


def plan(question: Question, lanes: Iterable[int]) -> Plan:
    """Try numbers of lanes, and find what separate pools would take."""
    points = [point(question, each) for each in lanes]
    needed = next((each.lanes for each in points if each.holds(question)), None)
    return Plan(points, needed, None if needed is None else _separate(question, needed))


def point(question: Question, lanes: int) -> Point:
    """What so many lanes hold."""
    patient = question.patient is not None
    trace, asked, seconds = _run(question, lanes, patient=patient)
    first = WARM * seconds
    counted = [work for work in asked if work.arrival >= first]
    waits = _with_outside(_in_engine(trace, counted, asked), question)
    answered = waits[np.isfinite(waits)]
    in_time = int(np.count_nonzero(waits <= question.deadline + 1e-9))
    shown = 1e3 * np.percentile(answered, [50, 99, 99.9]) if len(answered) else [float("nan")] * 3
    p50, p99, p999 = map(float, shown)
    spent = {True: 0.0, False: 0.0}
    rows = 0
    for ran in trace.ran:
        if ran.start >= first:
            spent[ran.batch.urgent] += min(ran.seconds, max(0.0, seconds - ran.start))
            rows += 0 if ran.batch.urgent else ran.batch.rows
    whole = lanes * (seconds - first)
    possible = jobs = None
    used = 1.0
    if question.patient is not None and question.costs.background is not None:
        each = question.costs.background.rows
        possible = rows / (seconds - first) * question.patient.seconds / each
        jobs = min(possible, question.patient.jobs)
        used = jobs / possible if possible else 0.0
    return Point(
        lanes,
        in_time / max(1, len(counted)),
        1 - len(answered) / max(1, len(counted)),
        p50,
        p99,
        p999,
        (spent[True] + used * spent[False]) / whole,
        jobs,
        possible,
    )


def _with_outside(waits: Waits, question: Question) -> Waits:
    """Add to the time in the engine what requests took outside of it that were there as long.

    As long as the others: the longest of a thousand has what the longest of those had that were
    measured, or about that. So the two go together as they did, at other loads too.

    Args:
        waits: seconds in the engine; infinity: refused.
        question: whose costs say what was measured.
    """
    outside: Waits = np.array(question.costs.urgent.outside)
    shares = np.argsort(np.argsort(waits, kind="stable"), kind="stable") / max(len(waits), 1)
    near = np.random.default_rng(question.seed).uniform(-NEAR, NEAR, len(waits))
    places = np.clip((shares + near) * len(outside), 0, len(outside) - 1).astype(int)
    found: Waits = waits + outside[places]
    return found


def _in_engine(trace: Trace, counted: Sequence[Work], asked: Mapping[Work, list[Work]]) -> Waits:
    """Seconds that requests were in the engine, also for what they asked then; infinity: refused.

    Args:
        trace: what became of all work.
        counted: what requests asked first.
        asked: what they asked after that.
    """
    return np.array(
        [
            trace.finish.get(work, np.inf)
            - work.arrival
            + max(
                (trace.finish.get(each, np.inf) - each.arrival for each in asked[work]), default=0
            )
            for work in counted
        ]
    )


def _run(
    question: Question, lanes: int, *, patient: bool
) -> tuple[Trace, dict[Work, list[Work]], float]:
    """What came of it; what each request asked after its first work; the seconds of it."""
    arrivals = question.arrivals()
    seconds = question.seconds if question.trace is None else float(arrivals[-1])
    rows = question.costs.urgent.rows
    asked: dict[Work, list[Work]] = {
        Work(URGENT, rows, float(at), question.sla): [] for at in arrivals
    }
    run, random = _pool(question, lanes), np.random.default_rng(question.seed)
    jobs: list[Work] = []
    if patient and question.costs.background is not None:
        jobs = _jobs(question.costs.background, lanes, random)

    def follow(work: Work, now: float) -> Sequence[Work]:
        if work in asked:
            asked[work] += _second(work, now, question, random)
            return asked[work]
        costs = question.costs.background
        if work.key != PATIENT or costs is None or costs.at_once is None:
            return []
        return [_job(costs, now, random)]

    run.follow, run.resumes = follow, float(np.median(_followed(question)))
    works = sorted([*jobs, *asked], key=lambda work: work.arrival)
    trace = run.through(works, seconds if jobs else float("inf"))
    return trace, asked, seconds


def _second(work: Work, now: float, question: Question, random: np.random.Generator) -> list[Work]:
    """What a request asks once its first work is done, of which its promise is part."""
    costs = question.costs.urgent
    if random.random() >= costs.again:
        return []
    at = now + float(random.choice(_followed(question)))
    left, pieces = costs.again_rows, list[Work]()
    while left:
        rows = min(left, costs.most)
        pieces.append(Work(URGENT, rows, at, question.sla, since=work.arrival))
        left -= rows
    return pieces


def _followed(question: Question) -> tuple[float, ...]:
    """Seconds from an answer of the engine until its caller asks it for more."""
    costs = question.costs.urgent
    return costs.followed or (0.5 * float(np.median(costs.outside)),)


def _jobs(costs: Costs, lanes: int, random: np.random.Generator) -> list[Work]:
    """The first background jobs."""
    if costs.at_once is None:
        # Several jobs at once, each without end: there is always one more slice.
        return [Work(PATIENT, 1 << 40, 0.0, Sla()) for _ in range(lanes)]
    jobs = (_job(costs, 0.0, random) for _ in range(costs.at_once))
    return sorted(jobs, key=lambda work: work.arrival)


def _job(costs: Costs, now: float, random: np.random.Generator) -> Work:
    """A job that comes after another; not all alike, or those that fell in step would stay so."""
    return Work(PATIENT, costs.rows, now + costs.between * random.uniform(0.5, 1.5), Sla())


def _pool(question: Question, lanes: int) -> Replay:
    """A warm batcher over so many lanes, and what its batches really take."""
    latency = LatencyModel()
    batcher = Batcher(latency, max_queue=4096 * lanes)
    costs: dict[str, Cost] = {}
    random = np.random.default_rng(question.seed)
    kinds = {URGENT: question.costs.urgent, PATIENT: question.costs.background}
    for key, each in kinds.items():
        if each is not None:
            batcher.register(key, each.most)
            for at, seconds in sorted(each.seconds.items()):
                latency.seed(key, at, seconds)
            costs[key] = _drawn(each, random)
    batcher.register_sla(question.sla)
    for _ in range(lanes - 1):
        batcher.add_lane()
    run = Replay(batcher, costs)
    turns = {key: np.array(each.turns) for key, each in kinds.items() if each is not None}
    run.turn = lambda batch: float(random.choice(turns[batch.key]))
    return run


def _drawn(costs: Costs, random: np.random.Generator) -> Cost:
    """What a batch really takes: its measured cost, and a delay that was measured too."""
    curve, delays = costs.curve(), np.array(costs.delays)

    def cost(rows: int, _: float) -> float:
        usual = curve.predict("a", rows, 0.5)
        return max(0.1 * usual, usual + float(random.choice(delays)))

    return cost


def _separate(question: Question, most: int) -> tuple[int, int] | None:
    """Lanes of two pools, one for urgent and one for background work, with nothing shared."""
    asked, costs = question.patient, question.costs.background
    if asked is None or costs is None:
        return None
    alone = Question(
        question.costs.model_copy(update={"background": None}),
        question.deadline,
        question.rate,
        question.quantile,
        question.trace,
        None,
        question.seconds,
        question.seed,
    )
    urgent = next(n for n in range(1, most + 1) if point(alone, n).holds(alone) or n == most)
    rate = asked.jobs / asked.seconds * costs.rows
    per_lane = max(
        rows / costs.curve().predict("a", rows, 0.5) for rows in (*costs.seconds, costs.most)
    )
    return urgent, max(1, ceil(rate / per_lane))


def rows_of(found: Plan) -> list[Mapping[str, Any]]:
    """Each point, with what the lane that was added to the one before has bought."""
    shown: list[Mapping[str, Any]] = []
    for at, each in enumerate(found.points):
        before = found.points[at - 1] if at else None
        gained = None if before is None else each.in_time - before.in_time
        more = None
        if before is not None and each.jobs_possible is not None:
            more = each.jobs_possible - (before.jobs_possible or 0.0)
        shown.append(asdict(each) | {"in_time_gained": gained, "jobs_gained": more})
    return shown
