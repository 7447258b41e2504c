"""The scheduling policy, with the clock in the test's own hand."""

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plinth.engine import (
    Batcher,
    ConfigError,
    DeadlineRefused,
    LatencyModel,
    QueueFull,
    Sla,
    Work,
)
from plinth.engine.scheduler.deadline_queue import DeadlineQueue, rows_of

pytestmark = pytest.mark.cpu

URGENT = Sla(deadline_ms=200)


def batcher(**settings) -> Batcher:
    """A device that takes 20 ms and 1 ms a row for "a" and "b", 2 ms flat for "cheap"."""
    latency = LatencyModel()
    for key in ("a", "b", "volume"):
        for rows in (1, 128):
            latency.seed(key, rows, 0.020 + 0.001 * rows)
    latency.seed("cheap", 1, 0.002)
    latency.seed("cheap", 128, 0.002)
    made = Batcher(latency, **settings)
    made.register("a", max_rows=128, cheaper="cheap")
    made.register("volume", max_rows=8)
    return made


def work(arrival: float = 0.0, key: str = "a", rows: int = 1, sla: Sla = URGENT) -> Work:
    return Work(key, rows, arrival, sla)


def test_a_lone_request_runs_at_once():
    queue = batcher()
    assert queue.admit(work(), 0.0) is None
    batch, refused = queue.next(0.0)
    assert (batch.rows, batch.urgent, refused) == (1, True, [])
    assert batch.predicted == pytest.approx(0.021)


def test_how_long_a_lane_takes_to_begin_again_is_learned_while_work_waits(monkeypatch):
    queue, turns = batcher(), []
    monkeypatch.setattr(queue.latency, "turned", lambda *turn: turns.append(turn))
    for rows in (128, 2, 1):
        queue.admit(work(rows=rows, sla=Sla(deadline_ms=900)), 0.0)
    queue.finished(queue.next(0.0)[0], 0.148, 0.148)
    queue.finished(queue.next(0.1485)[0], 0.023, 0.174)  # it began at 151 ms
    assert turns == [("a", pytest.approx(0.003))]
    queue.admit(work(1.0), 1.0)
    queue.finished(queue.next(1.0)[0], 0.021, 1.021)
    queue.finished(queue.alone(work(1.5), 1.5, 0), 0.021, 1.521)
    assert len(turns) == 1, "nothing waited when the batch before was done"
    for n in range(2):
        queue.admit(work(2.0, sla=Sla(deadline_ms=(22, 900)[n])), 2.0)
    queue.finished(queue.next(2.0)[0], 0.021, 2.021)
    queue.clear()
    assert queue.next(2.03)[0] is None
    queue.finished(queue.alone(work(3.0), 3.0, 0), 0.021, 3.021)
    for _ in range(3):
        queue.admit(work(4.0, rows=128, sla=Sla(deadline_ms=900)), 4.0)
    queue.finished(queue.next(4.0)[0], 0.148, 4.148)
    queue.failed(queue.next(4.148)[0], 4.3)
    queue.finished(queue.next(4.3)[0], 0.148, 4.45)
    assert len(turns) == 1, "the batch between failed"


PROMISES = st.sampled_from([Sla(), URGENT, Sla(deadline_ms=22), Sla(deadline_ms=900, quantile=0.5)])


@given(st.lists(st.tuples(PROMISES, st.integers(1, 130), st.floats(0.001, 0.3)), max_size=12))
def test_work_that_nothing_waits_beside_gets_the_batch_it_would_get_over_the_queue(calls):
    short, long = batcher(), batcher()
    now, ends = 0.0, 0.0
    for sla, rows, pause in calls:
        now = max(now + pause, ends)
        lone, queued = work(now, rows=rows, sla=sla), work(now, rows=rows, sla=sla)
        batch = short.alone(lone, now, 0)
        if batch is None:  # then it goes over the queue, and may be refused or cut
            short.admit(lone, now)
            batch, _ = short.next(now)
        long.admit(queued, now)
        want, _ = long.next(now)
        assert (batch is None) == (want is None)
        while batch is not None and want is not None:
            facts = ("key", "rows", "predicted", "urgent", "lane")
            assert [getattr(batch, f) for f in facts] == [getattr(want, f) for f in facts]
            assert (lone.taken, lone.service) == (queued.taken, pytest.approx(queued.service))
            ends = now = now + 0.020 + 0.001 * rows
            for each, done in ((short, batch), (long, want)):
                each.finished(done, 0.020 + 0.001 * done.rows, now)
            (batch, _), (want, _) = short.next(now), long.next(now)
        assert short.blocking_bound == long.blocking_bound
        services = [[q.service for q in each._queues.values()] for each in (short, long)]
        assert services[0] == pytest.approx(services[1])


def test_work_beside_other_work_goes_over_the_queue():
    queue = batcher()
    assert queue.alone(work(rows=129), 0.0, 0) is None
    assert queue.alone(work(sla=Sla(deadline_ms=20)), 0.0, 0) is None
    queue.admit(work(), 0.0)
    assert queue.alone(work(), 0.0, 0) is None
    running, _ = queue.next(0.0)
    assert queue.alone(work(), 0.0, 0) is None
    queue.finished(running, 0.021, 0.021)
    assert queue.alone(work(), 0.0, 0).rows == 1


def test_the_earliest_deadline_goes_first_across_work_classes():
    queue = batcher()
    queue.admit(work(key="a", sla=Sla(deadline_ms=500)), 0.0)
    queue.admit(work(key="b", sla=Sla(deadline_ms=100)), 0.0)
    assert queue.next(0.0)[0].key == "b"
    assert queue.next(0.021)[0].key == "a"


def test_different_shapes_never_close_each_others_batches():
    queue = batcher()
    for index in range(20):
        queue.admit(work(key="ab"[index % 2]), 0.0)
    assert [queue.next(0.0)[0].rows, queue.next(0.03)[0].rows] == [10, 10]


def offer_many(queue: Batcher, count: int, **of) -> None:
    for _ in range(count):
        assert queue.admit(work(**of), of.get("arrival", 0.0)) is None


TIGHT, LOOSE = Sla(deadline_ms=100), Sla(deadline_ms=1000)


def test_a_tight_promise_is_kept_beside_a_crowd_of_loose_ones():
    queue = batcher()
    offer_many(queue, 300, sla=LOOSE)
    offer_many(queue, 5, sla=TIGHT)
    batch, refused = queue.next(0.0)
    assert refused == []
    assert sum(part.work.sla is TIGHT for part in batch.parts) == 5
    assert batch.rows == 80  # what 100 ms allow; the rest of it is loose
    assert batch.predicted <= 0.1


def test_a_batch_of_loose_promises_is_kept_short_for_tight_ones_that_may_come():
    queue = batcher()
    offer_many(queue, 1, key="a", sla=TIGHT)
    offer_many(queue, 1, key="b", sla=LOOSE)
    assert [queue.next(0.0)[0].key, queue.next(0.021)[0].key] == ["a", "b"]
    offer_many(queue, 300, key="b", arrival=0.042, sla=LOOSE)
    batch, _ = queue.next(0.042)
    comes = queue.latency.predict("a", 1)
    assert 0.04 < batch.predicted <= 0.1 - comes


def test_where_both_cannot_be_in_time_the_one_that_had_less_goes_first():
    queue = batcher()
    ran = []
    for turn in range(8):
        now = turn * 0.2
        offer_many(queue, 70, key="a", arrival=now)
        offer_many(queue, 60, key="b", arrival=now + 0.001)
        ran.append(queue.next(now + 0.15)[0])
        queue.next(now + 0.2)  # what waits is given up
    assert [batch.key for batch in ran[:4]] in (list("abab"), list("baba"))


def test_a_stream_that_was_idle_has_saved_nothing_up():
    queue = batcher()
    for turn in range(50):  # "b" alone has the device for long
        offer_many(queue, 60, key="b", arrival=float(turn))
        batch, _ = queue.next(float(turn))
        queue.finished(batch, batch.predicted, turn + batch.predicted)
    keys = []
    for turn in range(50, 60):
        offer_many(queue, 60, key="a", arrival=turn + 0.001)
        offer_many(queue, 60, key="b", arrival=float(turn))
        for wait in (0.1, 0.2):
            batch, _ = queue.next(turn + wait)
            if batch:
                queue.finished(batch, batch.predicted, turn + wait + batch.predicted)
                keys.append(batch.key)
    assert keys.count("a") <= keys.count("b") + 2


def test_one_crowd_cannot_fill_the_queue_and_shut_out_the_others():
    queue = batcher(max_queue=900)
    refusals = [queue.admit(work(sla=LOOSE), 0.0) for _ in range(2000)]
    assert 790 <= refusals.count(None) <= 810
    assert queue.admit(work(sla=TIGHT), 0.0) is None
    assert queue.admit(work(key="b"), 0.0) is None


def test_a_hopeless_deadline_is_refused_on_arrival_with_the_reason():
    queue = batcher()
    queue.admit(work(rows=100), 0.0)
    queue.next(0.0)  # holds the device for 120 ms
    refusal = queue.admit(work(arrival=0.01, sla=Sla(deadline_ms=100)), 0.01)
    assert isinstance(refusal.error, DeadlineRefused)
    body = refusal.error.as_dict()
    assert body["reason"] == "deadline"
    assert body["predicted_seconds"] == pytest.approx(0.131)
    assert body["deadline_seconds"] == pytest.approx(0.1)
    assert body["retry_after_seconds"] == pytest.approx(0.11)


def test_under_overload_the_rows_too_old_for_a_full_batch_are_given_up():
    queue = batcher()
    for index in range(150):
        queue.admit(work(arrival=index * 0.001), index * 0.001)
    batch, refused = queue.next(0.150)
    assert batch.rows > 80
    assert all(part.work.deadline >= 0.150 + batch.predicted for part in batch.parts)
    assert refused
    assert all(isinstance(item.error, DeadlineRefused) for item in refused)


def test_overload_can_degrade_to_a_cheaper_model_or_run_late():
    for overload, key in (("degrade", "cheap"), ("late", "a")):
        queue = batcher()
        sla = Sla(deadline_ms=15, on_overload=overload)
        assert queue.admit(work(sla=sla), 0.0) is None
        assert queue.next(0.0)[0].key == key


def test_a_full_queue_refuses_at_once():
    queue = batcher(max_queue=2)
    assert queue.admit(work(rows=2), 0.0) is None
    refusal = queue.admit(work(), 0.0)
    assert isinstance(refusal.error, QueueFull)
    assert refusal.error.retry_after > 0


def test_cancelled_work_leaves_the_queue():
    queue = batcher()
    gone, kept, patient = work(), work(), work(key="volume", rows=9, sla=Sla())
    for item in (gone, kept, patient):
        queue.admit(item, 0.0)
    queue.cancel(gone)
    queue.cancel(patient)
    assert [part.work for part in queue.next(0.0)[0].parts] == [kept]
    assert queue.next(0.1) == (None, [])
    assert not queue


def test_background_slices_respect_the_tightest_promise():
    queue = batcher(slice_share=0.12)
    queue.register_sla(URGENT)
    queue.admit(work(key="volume", rows=500, sla=Sla()), 0.0)
    batch, _ = queue.next(0.0)
    assert not batch.urgent
    assert batch.rows == 4  # 24 ms = 0.12 x 200 ms
    assert batch.predicted <= queue.blocking_bound + 1e-9


@pytest.mark.parametrize(
    ("fixed", "per_row", "rows"),
    [(0.0, 0.010, 1), (0.0005, 0.010, 1), (0.001, 0.010, 2), (0.020, 0.001, 54), (0.0, 0.100, 1)],
)
def test_a_slice_is_as_short_as_pays_while_promises_are_in_use(fixed, per_row, rows):
    latency = LatencyModel()
    for n in (1, 128):
        latency.seed("volume", n, fixed + per_row * n)
    queue = Batcher(latency)
    queue.register("volume", max_rows=128)
    queue.admit(work(key="volume", rows=500, sla=Sla()), 0.0)
    alone, _ = queue.next(0.0)
    assert alone.rows == max(1, int((queue.blocking_bound - fixed) / per_row + 1e-9))
    queue.finished(alone, alone.predicted, alone.predicted)
    queue.register_sla(URGENT)
    beside, _ = queue.next(1.0)
    most = max(1, int((queue.blocking_bound - fixed) / per_row + 1e-9))
    assert beside.rows == rows <= most
    assert rows / (fixed + per_row * rows) >= 0.94 * most / (fixed + per_row * most)


def test_a_requests_own_promise_bounds_slices_for_some_seconds_only():
    queue = batcher(slice_share=0.4)
    queue.register_sla(URGENT)
    assert queue.blocking_bound == pytest.approx(0.08)
    assert queue.admit(work(sla=Sla(deadline_ms=0.1)), 0.0) is not None  # nobody can keep that
    assert queue.admit(work(sla=Sla(deadline_ms=50)), 0.0) is None
    queue.next(0.0)
    assert queue.blocking_bound == pytest.approx(0.02)
    queue.next(4.9)
    assert queue.blocking_bound == pytest.approx(0.02)
    queue.next(10.1)
    queue.next(20.2)
    assert queue.blocking_bound == pytest.approx(0.08)


def test_the_first_slice_of_a_class_nobody_measured_is_one_row():
    queue = batcher()
    queue.register_sla(URGENT)
    queue.admit(work(key="new", rows=500, sla=Sla()), 0.0)
    first, _ = queue.next(0.0)
    assert first.rows == 1
    queue.finished(first, 0.010, 0.010)
    second, _ = queue.next(0.010)
    assert 2 <= second.rows <= 16  # in 80 ms, if half of the 10 ms was fixed cost


@pytest.mark.parametrize("known", [{}, {1: 0.013, 4: 0.040}])
def test_slices_end_up_as_short_as_pays_though_single_rows_seemed_slow_at_first(known):
    latency, random = LatencyModel(), Random(1)
    for rows, seconds in known.items():
        latency.seed("new", rows, seconds)
    queue = Batcher(latency)
    queue.register("new", max_rows=4)
    queue.register_sla(URGENT)
    queue.admit(work(key="new", rows=100_000, sla=Sla()), 0.0)
    now, sizes = 0.0, list[int]()
    while now < 60.0:
        slice_, _ = queue.next(now)
        cold = 2.0 if not known and len(sizes) < 3 else 1.0
        seconds = cold * 0.010 * slice_.rows * (1 + random.expovariate(20))
        now += seconds
        queue.finished(slice_, seconds, now)
        sizes.append(slice_.rows)
    assert sum(sizes[-500:]) < 1100, "of two rows and fewer"
    assert known or sizes[20:].count(1) > 0.9 * len(sizes[20:]), "soon"


def test_slices_have_several_rows_where_that_pays_though_the_first_were_slow():
    queue, now, sizes = batcher(), 0.0, list[int]()
    queue.register("new", max_rows=64)
    queue.register_sla(URGENT)
    queue.admit(work(key="new", rows=100_000, sla=Sla()), 0.0)
    while now < 20.0:
        slice_, _ = queue.next(now)
        seconds = (3.0 if len(sizes) < 2 else 1.0) * (0.020 + 0.001 * slice_.rows)
        now += seconds
        queue.finished(slice_, seconds, now)
        sizes.append(slice_.rows)
    assert 40 <= sorted(sizes[-100:])[50] <= 60
    assert 3 <= sizes[-100:].count(1) <= 10, "what is never run is never learned"


@pytest.mark.parametrize(("usual", "slow"), [(0, 1), (1, 2), (5, 8), (30, 8), (300, 12)])
def test_a_stall_never_closes_the_door_for_good(usual, slow):
    costs = LatencyModel()
    for rows in (1, 128):
        costs.seed("model", rows, 0.002)
    batcher, now = Batcher(costs), 0.0

    def ask(seconds: float) -> bool:
        nonlocal now
        now += 0.01
        refusal = batcher.admit(work(now, "model", sla=Sla(deadline_ms=50)), now)
        batch, _ = batcher.next(now)
        if batch is not None:
            now += seconds
            batcher.finished(batch, seconds, now)
        return refusal is None

    for seconds in [0.002] * usual + [0.2] * slow:
        ask(seconds)
    answered = [ask(0.002) for _ in range(1500)]
    assert all(answered[1000:]), "after ten seconds at most"


def test_what_even_warm_up_could_not_do_in_time_is_never_tried():
    costs = LatencyModel()
    costs.seed("model", 1, 0.002)
    batcher = Batcher(costs)
    for at in range(100):
        assert batcher.admit(work(at, "model", sla=Sla(deadline_ms=1)), at) is not None
    assert not batcher


def test_who_is_tried_in_vain_is_told_at_his_deadline():
    costs = LatencyModel()
    costs.seed("model", 1, 0.002)
    costs.observe("model", 1, 0.2)
    batcher = Batcher(costs)
    first, second = (work(at, "model", sla=Sla(deadline_ms=50)) for at in (0.0, 0.0))
    assert batcher.admit(first, 0.0) is None
    assert batcher.admit(second, 0.0) is not None, "one at a time"
    assert batcher.overdue(0.0) == ([], 0.05)
    batch, _ = batcher.next(0.0)
    assert batch.parts[0].work is first
    refused, _ = batcher.overdue(5.0)
    assert [each.work for each in refused] == [first]
    batcher.finished(batch, 0.2, 0.2)
    third = work(1.5, "model", sla=Sla(deadline_ms=50))
    assert batcher.admit(third, 1.5) is None
    refused, again = batcher.overdue(1.6)
    assert ([each.work for each in refused], again) == ([third], float("inf"))
    assert not batcher


@pytest.mark.parametrize("weight", [0.0, 5e-324, 1e-7, 1e7, float("inf"), float("nan")])
def test_a_weight_by_which_service_would_be_no_number_is_refused(weight):
    with pytest.raises(ConfigError, match="weight"):
        Sla(weight=weight)


def test_background_work_shares_by_weight():
    queue = batcher(idle_slice=0.021)
    heavy, light = (work(key="volume", rows=400, sla=Sla(weight=w)) for w in (3.0, 1.0))
    queue.admit(heavy, 0.0)
    queue.admit(light, 0.0)
    for step in range(200):
        queue.next(step * 0.021)
    assert heavy.taken == pytest.approx(150, abs=2)
    assert light.taken == pytest.approx(50, abs=2)


def test_what_background_work_took_of_idle_time_is_not_held_against_it():
    queue = batcher(background_share=0.1)
    queue.admit(work(key="volume", rows=10_000, sla=Sla()), 0.0)
    for _ in range(100):  # nobody else is there
        now = queue.latency.predict("volume", 8)
        queue.finished(queue.next(0.0)[0], now, now)
    seen = []
    for turn in range(30):
        queue.admit(work(arrival=float(turn), rows=100), float(turn))
        seen.append(queue.next(float(turn))[0].urgent)
        if not seen[-1]:
            queue.next(float(turn))
    assert seen.count(False) >= 2


def test_background_work_never_starves_behind_urgent_work():
    queue = batcher(background_share=0.1)
    patient = work(key="volume", rows=10_000, sla=Sla())
    queue.admit(patient, 0.0)
    now = spent = 0.0
    while now < 20.0:
        for _ in range(64):
            queue.admit(work(arrival=now), now)
        batch, _ = queue.next(now)
        spent += 0.0 if batch.urgent else batch.predicted
        now += batch.predicted
    assert spent / now == pytest.approx(0.1, abs=0.02)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1),
            st.sampled_from("ab"),
            st.integers(1, 20),
            st.sampled_from([30, 200, 900, None]),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_nothing_runs_twice_and_what_runs_is_in_time(arrivals):
    queue = batcher()
    everything, answered = [], []
    now = 0.0
    for arrival, key, rows, deadline in sorted(arrivals, key=lambda item: item[0]):
        now = max(now, arrival)
        item = work(arrival=now, key=key, rows=rows, sla=Sla(deadline_ms=deadline))
        everything.append(item)
        if queue.admit(item, now):
            answered.append(item)
    ran = dict.fromkeys(everything, 0)
    while queue:
        batch, refused = queue.next(now)
        answered += [refusal.work for refusal in refused]
        if batch is None:
            continue
        now += batch.predicted
        queue.finished(batch, batch.predicted, now)
        for part in batch.parts:
            assert part.first == ran[part.work]
            ran[part.work] += part.rows
            assert part.work.deadline >= now - 1e-6
    for item in everything:
        assert ran[item] == (0 if item in answered else item.rows)


@example([(0.25, 1), (0.25, 4), (0.25, 9), (0.03125, 1)], 13)
@given(
    st.lists(st.tuples(st.floats(0, 0.3), st.integers(1, 9)), min_size=1, max_size=80),
    st.integers(1, 40),
)
def test_the_largest_batch_is_in_time_and_no_batch_of_what_is_left_is_larger(waiting, most):
    stream = DeadlineQueue("a", 0.99)
    for deadline, rows in waiting:
        sla = Sla(deadline_ms=1 + deadline * 1e3)
        stream.add(Work("a", rows, 0.0, sla), 0.0)
    first, count = stream.largest_batch(most, lambda rows: 0.020 + 0.001 * rows)
    rows = rows_of(stream.works[first : first + count])
    can = [int((work.deadline - 0.020) / 0.001 + 1e-6) for work in stream.works]
    fits = [min(most, rows) for rows in can]
    if count:
        assert rows <= fits[first]
    for work, room in zip(stream.works[:first], fits, strict=False):
        assert room < rows or work.rows > room  # given up because of its age or size alone
    if all(work.rows == 1 for work in stream.works):
        best = max(min(stream.rows - skip, room) for skip, room in enumerate(fits))
        assert rows == max(0, best)
    assert bool(count) == any(
        room >= work.rows for work, room in zip(stream.works, fits, strict=True)
    )


def test_work_of_several_rows_is_not_given_up_for_packing_badly():
    queue = batcher()
    for rows in (128, 128, 44):
        queue.admit(work(rows=rows, sla=LOOSE), 0.0)
    ran = [queue.next(now) for now in (0.0, 0.2, 0.4)]
    assert [(batch.rows, refused) for batch, refused in ran] == [(128, []), (128, []), (44, [])]


def test_stalls_longer_than_the_promise_do_not_close_the_door_for_good():
    made = batcher()
    for turn in range(20):
        made.admit(work(float(turn)), float(turn))
        batch, _ = made.next(float(turn))
        assert batch is not None
        made.finished(batch, 0.9 if turn % 5 == 4 else 0.021, turn + 0.9)
    late = work(30.0)
    assert made.admit(late, 30.0) is None
    batch, refused = made.next(30.0)
    assert batch is not None
    assert not refused


def test_a_batch_that_overruns_is_not_taken_to_end_at_any_moment():
    queue = batcher()
    queue.admit(work(), 0.0)
    batch, _ = queue.next(0.0)  # predicted to end at 0.021
    tight = Sla(deadline_ms=60)
    assert queue.admit(work(arrival=0.04, sla=tight), 0.04) is None  # free at 0.059, say
    refusal = queue.admit(work(arrival=0.08, sla=tight), 0.08)  # free at 0.139, as likely as not
    assert isinstance(refusal.error, DeadlineRefused)
    assert refusal.error.predicted == pytest.approx(0.08)
    queue.finished(batch, 0.09, 0.09)
    assert queue.admit(work(arrival=0.09, sla=Sla(deadline_ms=150)), 0.09) is None


def test_with_two_in_flight_the_second_is_planned_for_the_end_of_the_first():
    queue = batcher()
    queue.pipeline_depth = 2
    offer_many(queue, 60)
    first, _ = queue.next(0.0)
    assert (first.rows, first.predicted) == (60, pytest.approx(0.08))
    offer_many(queue, 100, sla=Sla(deadline_ms=150))
    second, refused = queue.next(0.0)
    assert refused == []
    assert second.rows == 50  # 150 ms less the 80 of the first are 20 and one for each row
    queue.finished(first, 0.08, 0.08)
    queue.finished(second, 0.07, 0.15)
    _, refused = queue.next(0.15)
    assert len(refused) == 50, "they could not be in time behind both"


@given(st.integers(1, 4), st.integers(1, 40), st.floats(0.05, 2.0))
def test_slices_in_flight_take_the_blocking_bound_together(depth, rows, promise):
    queue = batcher()
    queue.pipeline_depth = depth
    queue.register_sla(Sla(deadline_ms=promise * 1e3))
    queue.admit(work(key="volume", rows=rows, sla=Sla()), 0.0)
    running = []
    while len(running) < depth and (batch := queue.next(0.0)[0]) is not None:
        running.append(batch)
    assert running, "the first one runs whatever it takes"
    taken = sum(queue.latency.predict(each.key, each.rows, 0.5) for each in running)
    one = queue.latency.predict("volume", 1, 0.5)
    assert taken <= max(queue.blocking_bound, one) * (1 + 1e-6)
