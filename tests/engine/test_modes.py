"""How lanes share work: rounds, whole requests, shares of large ones; the same bits in all."""

from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plinth.engine import Batcher, Call, ConfigError, Engine, LatencyModel, Sla, Work
from plinth.engine.devices.device import pick
from plinth.engine.runtime.modes import Modes
from plinth.engine.scheduler.simulate import Change, Replay, poisson
from plinth.engine.scheduler.work import Shares
from tests.engine.lane_models import changed, net, rows

NAME, WAIT = str(pick("auto")), 60
PATIENT = Sla(deadline_ms=60_000)
COST = {"a": lambda n, _: 0.020 + 0.001 * n, "b": lambda n, _: 0.010 + 0.002 * n}


def costs() -> LatencyModel:
    latency = LatencyModel()
    for key, cost in COST.items():
        for many in (1, 128):
            latency.seed(key, many, cost(many, 0))
    return latency


def in_rounds(lanes: int) -> Batcher:
    made = Batcher(costs(), rounds=True)
    for _ in range(lanes - 1):
        made.add_lane()
    return made


# -- sync: rounds, in virtual time ------------------------------------------------------------
ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["a", "b"]),
        st.integers(1, 20),
        st.sampled_from([200, 900, None]),
    ),
    min_size=1,
    max_size=40,
)
EVENTS = st.lists(
    st.tuples(st.floats(0, 1.5), st.sampled_from(["join", "drain", "die"])), max_size=4
)


def expect_rounds(run: Replay, lanes: int) -> None:
    """What started at one time is one round: of one key, one batch a lane, over before the next."""
    rounds = [list(each) for _, each in groupby(run.trace.ran, key=lambda ran: ran.start)]
    for one in rounds:
        assert len({ran.batch.key for ran in one}) == 1
        assert len({ran.batch.lane for ran in one}) == len(one) <= lanes
    for before, after in pairwise(rounds):
        assert max(ran.start + ran.seconds for ran in before) <= after[0].start + 1e-9


@settings(deadline=None)
@given(st.integers(1, 5), ARRIVALS, EVENTS)
def test_rounds_never_overlap_hold_one_key_each_and_lose_nothing(lanes, arrivals, events):
    queue = in_rounds(lanes)
    works = [
        Work(key, many, at, Sla(deadline_ms=due))
        for at, key, many, due in sorted(arrivals, key=lambda each: each[0])
    ]

    run = Replay(queue, COST)
    run.through(works, changes=[Change(at, changed(kind)) for at, kind in sorted(events)])
    assert not queue
    if not events:
        expect_rounds(run, lanes)
    done: dict[Work, list[int]] = {each: [] for each in works}
    for ran in run.trace.ran:
        if id(ran) not in run.lost:
            for part in ran.batch.parts:
                done[part.work] += range(part.first, part.first + part.rows)
    for each in works:
        finished = each in run.trace.finish
        assert sorted(done[each]) == (list(range(each.rows)) if finished else [])
        assert finished or each.sla.deadline_ms is not None


@given(st.integers(2, 8), st.integers(1, 60))
def test_every_lane_gets_an_even_share_of_a_round(lanes, many):
    queue = in_rounds(lanes)
    for _ in range(many):
        queue.admit(Work("a", 1, 0.0, PATIENT), 0.0)
    shares = []
    while (lane := queue.free_lane()) is not None and len(shares) < lanes:
        batch, refused = queue.next(0.0, lane)
        assert not refused
        shares.append(batch)
    assert len(shares) == min(lanes, -(-many // -(-many // lanes)))
    assert sum(each.rows for each in shares) == many
    assert max(each.rows for each in shares) == -(-many // lanes)
    assert queue.free_lane() is None, "the next round waits for all of this one"


def test_a_share_whose_lane_leaves_before_it_fetched_it_waits_for_the_next_round():
    queue = in_rounds(2)
    works = [Work("a", 1, 0.0, PATIENT) for _ in range(4)]
    for each in works:
        queue.admit(each, 0.0)
    first, _ = queue.next(0.0, 0)
    queue.drop_lane(1)
    assert (queue.free_lane(), queue.urgent_rows) == (None, 2)
    queue.finished(first, 0.02, 0.02)
    second, _ = queue.next(0.02, 0)
    assert {part.work for part in (*first.parts, *second.parts)} == set(works)


# -- hybrid: by the request alone -------------------------------------------------------------
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 200))
def test_hybrid_shares_out_by_the_number_of_items_and_lanes_alone(items, lanes, threshold):
    modes = Modes("hybrid", threshold)
    units = modes.units(costs(), "a", items, lanes, 128)
    assert units == (min(lanes, items) if items >= threshold and min(lanes, items) > 1 else 1)
    assert Modes("async", threshold).units(costs(), "a", items, lanes, 128) == 1
    assert Modes("sync").units(costs(), "a", items, lanes, 128) == min(lanes, items)


@given(st.integers(2, 8))
def test_auto_shares_out_from_where_it_pays_and_never_below(lanes):
    units = [Modes("hybrid").units(costs(), "a", items, lanes, 128) for items in range(1, 129)]
    shared = [items for items, parts in enumerate(units, 1) if parts > 1]
    assert shared == list(range(shared[0], 129)), "one threshold"
    assert units == sorted(units), "more items, no fewer shares"
    assert max(units) <= lanes
    for items in shared:
        share = -(-items // units[items - 1])
        assert COST["a"](share, 0) <= 0.8 * COST["a"](items, 0)
        assert COST["a"](share, 0) / share <= 1.25 * COST["a"](128, 0) / 128


def shared_out(items: int, parts: int, at: float, due: float) -> list[Work]:
    """The shares of one request; each knows them all."""
    owner: list[Work] = []
    together, step = Shares(), -(-items // parts)
    for first in range(0, items, step):
        work = Work("a", min(step, items - first), at, Sla(deadline_ms=due), owner, first)
        if parts > 1:
            work.shares = together
        owner.append(work)
    return owner


class Whole(Replay):
    """Requests stand and fall with each of their shares."""

    def refuse(self, work: Work) -> None:
        for mate in work.owner:
            self.batcher.cancel(mate)


def over_lanes(lanes: int, most: int = 128) -> Whole:
    queue = Batcher(costs())
    queue.register("a", most)
    for _ in range(lanes - 1):
        queue.add_lane()
    return Whole(queue, COST)


def answered(run: Whole, requests: list[list[Work]]) -> int:
    """How many requests had all of their shares in time."""
    finish = run.trace.finish
    return sum(
        all(finish.get(share, float("inf")) <= share.deadline + 1e-9 for share in each)
        for each in requests
    )


@given(st.integers(2, 8), st.integers(16, 128))
def test_lanes_that_are_idle_take_a_share_each_and_end_together(lanes, items):
    run = over_lanes(lanes)
    run.through(shared_out(items, lanes, 0.0, 10_000))
    rows = [ran.batch.rows for ran in run.trace.ran]
    assert sum(rows) == items
    assert max(rows) == -(-items // lanes)
    assert all(ran.start == 0.0 for ran in run.trace.ran)


def test_a_lane_leaves_shares_to_others_only_as_far_as_these_end_them_no_later():
    run = over_lanes(2)
    run.through([Work("a", 128, 0.0, PATIENT), *shared_out(64, 4, 0.010, 60_000)])
    first, second = run.trace.ran
    assert (first.batch.rows, second.batch.rows) == (128, 64), "the other lane is busy for longer"
    run = over_lanes(2)
    run.through([Work("a", 20, 0.0, PATIENT), *shared_out(128, 4, 0.010, 60_000)])
    assert [ran.batch.rows for ran in run.trace.ran] == [20, 64, 64]


@pytest.mark.parametrize("load", [0.9, 1.0, 1.2, 2.0])
@pytest.mark.parametrize("items", [48, 96, 160])
def test_in_a_flood_requests_that_are_shared_out_lose_nothing_against_whole_ones(items, load):
    """Large shares of many requests would run in turns, and each request would end late."""
    lanes, found = 4, []
    rate = load * lanes * 128 / COST["a"](128, 0) / items
    arrivals = poisson(rate, 12.0, 7)
    for parts in (1, lanes):
        run = over_lanes(lanes)
        each = min(parts, -(-items // 16))
        requests = [
            shared_out(items, each if parts > 1 else -(-items // 128), float(at), 1_000)
            for at in arrivals
        ]
        run.through([share for one in requests for share in one])
        found.append(answered(run, requests))
    assert found[1] >= 0.98 * found[0]


@settings(deadline=None)
@given(
    st.integers(2, 5),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 200), st.sampled_from([300, 2_000])), max_size=40
    ),
    EVENTS,
)
def test_shares_run_once_each_or_are_refused_with_all_of_their_request(lanes, arrivals, events):
    run = over_lanes(lanes)
    requests = [shared_out(items, lanes, at, due) for at, items, due in sorted(arrivals)]
    works = [share for one in requests for share in one]
    run.through(works, changes=[Change(at, changed(kind)) for at, kind in sorted(events)])
    assert not run.batcher
    for share in works:
        ran = [
            ran
            for ran in run.trace.ran
            if id(ran) not in run.lost and any(part.work is share for part in ran.batch.parts)
        ]
        assert len(ran) == (share in run.trace.finish)
        assert share in run.trace.finish or share.gone or share.deadline < float("inf")


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"mode": "hybird"}, "expected sync, async or hybrid"),
        ({"mod": "sync"}, "modes.mod is unknown"),
        ({"sync_threshold": 0}, "sync_threshold is 0"),
        ({"sync_threshold": True}, "sync_threshold is True"),
        ({"mode": "sync", "pipeline_depth": 2}, "expected 1 in mode sync"),
        ({"communication_backend": "nccl"}, "does not have for cpu"),
        ({"communication_backend": "smoke"}, "does not have for cpu"),
    ],
)
@pytest.mark.cpu
def test_an_impossible_table_is_refused_at_start(table, match):
    with pytest.raises(ConfigError, match=match):
        Engine(modes=table)


def test_the_depth_is_named_once():
    with pytest.raises(ConfigError, match="2 in modes"):
        Engine(pipeline_depth=2, modes={"pipeline_depth": 2})


# -- all modes on real lanes ------------------------------------------------------------------
def flow(values: torch.Tensor):
    doubled = yield Call("net", values)
    return doubled


class Rowwise(nn.Module):
    """Bits of a row do not depend on its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.7))

    def forward(self, x):
        return torch.tanh(x * self.factor) - x


MODES = [
    None,
    {"mode": "async"},
    {"mode": "sync"},
    {"mode": "hybrid", "sync_threshold": 8},
    {"mode": "hybrid"},
]


def test_the_same_flow_gives_the_same_bits_in_every_mode_and_the_answer_says_which():
    answers, modes = [], []
    module = Rowwise()
    for table in MODES:
        with Engine(devices=[NAME] * 3, threads=1, modes=table) as engine:
            engine.add(net(module=module), batch_range=(1, 16), sla=PATIENT)
            small = engine.run(flow(rows(0, 1)))
            large = [engine.submit(Call("net", rows(n, 30))) for n in range(8)]
            whole = engine.run(flow(rows(0, 30)))
            values = [future.result(WAIT).value for future in large]
            answers.append(torch.cat([small.value, whole.value, *values]))
            modes.append((small.modes, whole.modes, engine.status()["mode"]))
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    shared = {"net": "sync"}
    assert modes[0][2] == "hybrid", "the default"
    assert modes[1] == ({}, {}, "async")
    assert modes[2] == ({}, shared, "sync"), "one row has nothing to share out"
    assert modes[3] == ({}, shared, "hybrid")


def test_answers_of_a_round_come_in_the_order_of_their_requests():
    told: list[int] = []
    with Engine(devices=[NAME] * 3, threads=1, modes={"mode": "sync"}) as engine:
        engine.add(net(), batch_range=(1, 4), sla=PATIENT)
        futures = []
        for n in range(60):
            futures.append(engine.submit(Call("net", rows(n, 1 + n % 5))))
            futures[-1].add_done_callback(lambda _, n=n: told.append(n))
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1 + n % 5))
    assert sorted(told) == list(range(60))
    ones = [n for n in told if n % 5 == 0]
    assert ones == sorted(ones)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices": "cpu"}, "devices is 'cpu', expected a list of names"),
        ({"devices": ["cpu", None]}, r"devices is \['cpu', None\], expected a list of names"),
        ({"device": 0}, r"devices is \(0,\), expected a list of names"),
        ({"devices": ["cpu"] * 2000}, "devices names 2000 lanes, expected 1024 at most"),
        ({"threads": 0}, "threads is 0, expected a whole number"),
        ({"threads": 1.5}, "threads is 1.5, expected a whole number"),
        ({"pipeline_depth": True}, "pipeline_depth is True, expected a whole number"),
        ({"hung_seconds": float("nan")}, "hung_seconds is nan"),
        ({"max_queue": 0}, "max_queue is 0, expected 1 row or more"),
        ({"modes": {"pipeline_depth": "auto"}}, "modes.pipeline_depth is 'auto', expected a whole"),
        ({"modes": ["sync"]}, r"modes is \['sync'\], expected a table"),
        ({"modes": "sync"}, "modes is 'sync', expected a table"),
    ],
)
def test_settings_that_no_lane_could_run_with_are_refused_before_it_starts(given, told):
    with pytest.raises(ConfigError, match=told):
        Engine(**given)
