"""The policy over several lanes, in virtual time: one queue, and lanes that come, go and die."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.engine import Batcher, LatencyModel, Sla, Work
from plinth.engine.scheduler import batcher as policy
from plinth.engine.scheduler.simulate import (
    Change,
    Replay,
    Setting,
    fluid,
    poisson,
    pooled,
    replay,
    round_robin,
    routed,
    shortest_queue,
    two_choices,
    warmed_lanes,
)
from tests.engine.lane_models import changed

pytestmark = pytest.mark.cpu

SCENE = Setting()
URGENT = Sla(deadline_ms=200)
SEED = 7


def costs(speed: float = 1.0) -> LatencyModel:
    """20 ms and 1 ms a row on a lane of speed 1, for urgent "a" and background "volume"."""
    latency = LatencyModel()
    for key in ("a", "volume"):
        for rows in (1, 128):
            latency.seed(key, rows, (0.020 + 0.001 * rows) / speed)
    return latency


def batcher(*speeds: float, **settings_) -> Batcher:
    """A lane for each speed; those of one speed are alike."""
    models = {speed: costs(speed) for speed in speeds}
    made = Batcher(models[speeds[0]], **settings_)
    for speed in speeds[1:]:
        made.add_lane(models[speed])
    made.register("volume", max_rows=8)
    return made


def work(arrival: float = 0.0, key: str = "a", rows: int = 1, sla: Sla = URGENT) -> Work:
    return Work(key, rows, arrival, sla)


def test_a_lane_that_leaves_work_to_a_faster_one_is_not_the_one_that_is_asked():
    """What is faster for one row may be slower for all that wait; both must mean the same lane."""
    latencies = [LatencyModel(), LatencyModel()]
    for latency, one, eight in zip(latencies, (0.010, 0.012), (0.080, 0.020), strict=True):
        latency.seed("a", 1, one)
        latency.seed("a", 8, eight)
    made = Batcher(latencies[0])
    made.add_lane(latencies[1])
    made.register("a", max_rows=8)
    made.admit(work(rows=8), 0.0)
    assert made.next(0.0, made.free_lane())[0] is not None


def test_a_lone_request_goes_to_the_fastest_lane_that_is_idle():
    queue = batcher(1.0, 4.0, 2.0)
    queue.admit(work(), 0.0)
    assert queue.free_lane() == 1
    assert queue.next(0.0, 1)[0].predicted == pytest.approx(0.021 / 4)
    queue.admit(work(), 0.001)
    assert queue.free_lane() == 2


def test_each_batch_is_planned_with_the_costs_of_its_lane():
    queue = batcher(1.0, 4.0)
    for _ in range(256):
        queue.admit(work(sla=Sla(deadline_ms=100)), 0.0)
    fast, _ = queue.next(0.0, 1)
    slow, refused = queue.next(0.0, 0)
    assert (fast.rows, fast.lane, fast.predicted) == (128, 1, pytest.approx(0.037))
    assert (slow.rows, slow.lane, refused) == (80, 0, [])
    assert queue.urgent_rows == 48, "the fast lane does them next"


def test_a_slow_lane_leaves_to_a_fast_one_what_that_does_sooner():
    queue = batcher(1.0, 4.0)
    queue.admit(work(), 0.0)
    first, _ = queue.next(0.0, 1)
    queue.admit(work(arrival=0.001), 0.001)
    assert queue.next(0.001, 0) == (None, []), "free after 5 ms, and four times as fast"
    queue.finished(first, first.predicted, first.predicted)
    assert queue.next(first.predicted, 1)[0].rows == 1


def test_what_a_slow_lane_cannot_do_in_time_is_not_refused_while_a_fast_one_can():
    queue = batcher(1.0, 4.0)
    tight = Sla(deadline_ms=20)
    assert queue.admit(work(sla=tight), 0.0) is None
    assert queue.next(0.0, 0) == (None, [])
    assert queue.next(0.0, 1)[0].rows == 1


def test_rows_too_old_for_one_idle_lane_are_left_to_the_next():
    queue = batcher(1.0, 1.0)
    for n in range(200):
        queue.admit(work(arrival=n * 0.0005), n * 0.0005)
    first, refused = queue.next(0.1, 0)
    assert refused == []
    second, _ = queue.next(0.1, 1)
    assert first.rows + second.rows > 150


def test_an_urgent_row_waits_for_the_lane_that_is_free_first():
    queue = batcher(1.0, 1.0)
    for rows in (60, 30):
        queue.admit(work(rows=rows), 0.0)
        queue.next(0.0, queue.free_lane())
    refusal = queue.admit(work(sla=Sla(deadline_ms=60)), 0.0)
    assert refusal.error.predicted == pytest.approx(0.050 + 0.021), "the shorter of the two"
    assert queue.admit(work(sla=Sla(deadline_ms=72)), 0.0) is None


def test_a_batch_need_not_be_short_for_tighter_promises_that_another_lane_keeps():
    tight, loose = Sla(deadline_ms=100), Sla(deadline_ms=1000)
    for lanes, rows in ((1, range(40, 81)), (2, range(128, 129))):
        queue = batcher(*[1.0] * lanes)
        queue.register("volume", max_rows=128)
        queue.admit(work(sla=tight), 0.0)
        queue.finished(queue.next(0.0, 0)[0], 0.021, 0.021)
        for _ in range(300):
            queue.admit(work(arrival=0.022, key="volume", sla=loose), 0.022)
        assert queue.next(0.022, 0)[0].rows in rows


def test_background_work_fills_every_lane_with_slices_inside_the_bound():
    queue = batcher(1.0, 1.0, 4.0)
    queue.register_sla(Sla(deadline_ms=100))
    queue.admit(work(key="volume", rows=100, sla=Sla()), 0.0)
    slices = [queue.next(0.0, lane)[0] for lane in range(3)]
    assert all(each.predicted <= queue.blocking_bound + 1e-9 for each in slices)
    firsts = sorted((part.first, part.rows) for each in slices for part in each.parts)
    assert [first for first, _ in firsts] == [0, firsts[0][1], firsts[0][1] + firsts[1][1]]


def test_rows_of_a_slice_given_in_vain_run_again_and_no_others():
    queue = batcher(1.0, 1.0)
    patient = work(key="volume", rows=24, sla=Sla())
    queue.admit(patient, 0.0)
    first, second = queue.next(0.0, 0)[0], queue.next(0.0, 1)[0]
    assert queue.died(first, 0.01) == []
    queue.finished(second, 0.028, 0.028)
    ran = [second.parts[0]]
    while queue:
        batch, _ = queue.next(0.1, 1)
        queue.finished(batch, 0.028, 0.128)
        ran += batch.parts
    rows = sorted(number for part in ran for number in range(part.first, part.first + part.rows))
    assert rows == list(range(24))


def test_a_batch_that_three_lanes_die_on_is_searched_for_what_ends_them():
    queue = batcher(*[1.0] * 10)
    works = [work(sla=Sla(deadline_ms=60_000)) for _ in range(8)]
    for each in works:
        queue.admit(each, 0.0)
    failed, deaths, answered = [], 0, []
    while queue:
        lane = queue.free_lane()
        batch, _ = queue.next(0.0, lane)
        if any(part.work is works[5] for part in batch.parts):
            queue.drop_lane(lane)
            failed += queue.died(batch, 0.0)
            deaths += 1
        else:
            answered += [part.work for part in batch.parts]
            queue.finished(batch, batch.predicted, 0.0)
    assert failed == [works[5]]
    assert len(answered) == 7
    assert deaths == 3 + 3, "three, and one for each level of halves"


LANES = st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=1, max_size=5)
ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["a", "volume"]),
        st.integers(1, 20),
        st.sampled_from([30, 200, 900, None]),
    ),
    max_size=60,
)
EVENTS = st.lists(
    st.tuples(st.floats(0, 1.5), st.sampled_from(["join", "drain", "die"])), max_size=6
)


@settings(deadline=None)
@given(LANES, ARRIVALS, EVENTS)
def test_nothing_is_lost_or_runs_twice_while_lanes_come_and_go(speeds, arrivals, events):
    """Lane 0 stays. Each row of what was not refused runs once on a lane that lived to the end."""
    queue = batcher(*speeds)
    everything = [
        work(arrival, key, rows, Sla(deadline_ms=deadline))
        for arrival, key, rows, deadline in sorted(arrivals, key=lambda each: each[0])
    ]
    scaled = [SCENE.faster(speed) for speed in speeds]
    by_lane = {n: dict.fromkeys(("a", "volume"), each.cost) for n, each in enumerate(scaled)}
    usual = dict.fromkeys(("a", "volume"), scaled[0].cost)

    changes = [Change(at, changed(kind)) for at, kind in sorted(events)]
    run = Replay(queue, usual, by_lane)
    run.through(everything, changes=changes)
    assert not queue
    lost = run.lost
    rows: dict[Work, list[int]] = {each: [] for each in everything}
    for ran in run.trace.ran:
        if id(ran) not in lost:
            for part in ran.batch.parts:
                rows[part.work] += range(part.first, part.first + part.rows)
    for each in everything:
        done = sorted(rows[each])
        assert done == (list(range(each.rows)) if each in run.trace.finish else [])
        if each in run.trace.finish and each.deaths == 0 and len(set(speeds)) == 1 and not events:
            assert run.trace.finish[each] <= each.deadline + 1e-6
        if each.sla.deadline_ms is None:
            assert each in run.trace.finish, "background work is never refused"


@pytest.mark.parametrize("load", [0.5, 1.25, 1.75])
@pytest.mark.parametrize("lanes", [2, 4])
def test_so_many_lanes_reach_98_percent_of_the_fluid_bound(lanes, load):
    rate = load * lanes * SCENE.capacity
    scene = Setting(duration=max(1.5, 12_000 / rate))
    arrivals = poisson(rate, scene.duration, SEED)
    made = pooled(scene, arrivals, [1.0] * lanes).goodput(0.4, scene.duration)
    assert made >= 0.98 * fluid(scene, len(arrivals) / scene.duration, [1.0] * lanes)


@pytest.mark.parametrize("lanes", [2, 4])
def test_lanes_that_are_just_enough_do_more_when_they_start_one_after_the_other(lanes, monkeypatch):
    rate = lanes * SCENE.capacity
    scene = Setting(duration=12_000 / rate)
    arrivals = poisson(rate, scene.duration, SEED)
    bound = fluid(scene, len(arrivals) / scene.duration, [1.0] * lanes)
    apart = pooled(scene, arrivals, [1.0] * lanes).goodput(0.4, scene.duration)
    monkeypatch.setattr(policy, "_MAX_SPACED", 0)
    together = pooled(scene, arrivals, [1.0] * lanes).goodput(0.4, scene.duration)
    assert apart >= 0.965 * bound
    assert apart > together


@pytest.mark.parametrize("load", [0.5, 1.5])
def test_one_lane_four_times_as_fast_as_the_others_is_used_for_what_it_can(load):
    speeds = [4.0, 1.0, 1.0, 1.0]
    rate = load * sum(speeds) * SCENE.capacity
    scene = Setting(duration=2.0)
    arrivals = poisson(rate, scene.duration, SEED)
    made = pooled(scene, arrivals, speeds).goodput(0.4, scene.duration)
    assert made >= 0.97 * fluid(scene, len(arrivals) / scene.duration, speeds)


def test_one_queue_does_no_worse_than_a_queue_per_lane():
    lanes, load = 8, 1.0
    rate = load * lanes * SCENE.capacity
    scene = Setting(duration=3.0)
    arrivals = poisson(rate, scene.duration, SEED)
    ours = pooled(scene, arrivals, [1.0] * lanes).goodput(0.4, scene.duration)
    for choose in (round_robin, shortest_queue, two_choices):
        each = routed(scene, arrivals, lanes, choose)
        assert ours >= sum(trace.goodput(0.4, scene.duration) for trace in each), choose


def test_background_work_on_all_lanes_makes_no_urgent_work_miss():
    speeds, scene = [1.0] * 4, Setting(duration=4.0)
    run = warmed_lanes(scene, speeds)
    run.batcher.register_sla(URGENT)
    run.batcher.register("volume", max_rows=8)
    usual = dict.fromkeys(("a", "volume"), scene.cost)
    for lane in run.batcher.lanes.costs():
        for rows in (1, 8):
            lane.seed("volume", rows, scene.cost(rows))
    arrivals = poisson(0.4 * 4 * scene.capacity, scene.duration, SEED)
    urgent = [work(float(at)) for at in arrivals]
    patient = [work(key="volume", rows=100_000, sla=Sla()) for _ in range(4)]
    trace = replay(run.batcher, [*patient, *urgent], usual, until=scene.duration)
    outcome = trace.outcome(urgent, scene.duration)
    assert outcome.late == 0
    assert outcome.in_sla >= 0.99 * outcome.offered
    assert outcome.busy >= 0.98 * 4 * scene.duration


def test_a_join_and_a_death_change_what_is_answered_at_once():
    scene = Setting(duration=6.0)
    rate = 1.6 * scene.capacity
    works = [work(float(at)) for at in poisson(rate, scene.duration, SEED)]
    queue = batcher(1.0)
    joined: list[int] = []

    def join(made: Batcher):
        joined.append(made.add_lane())
        return []

    trace = replay(
        queue,
        works,
        {"a": scene.cost},
        changes=[Change(2.0, join), Change(4.0, lambda _: [joined[0]])],
    )
    before, during, after = (trace.goodput(at, at + 1.5) for at in (0.4, 2.4, 4.4))
    assert during >= 0.98 * rate > 1.5 * before
    assert after == pytest.approx(before, rel=0.1)
    assert trace.outcome(works, scene.duration).late == 0
