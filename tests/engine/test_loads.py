"""Models that left memory come back beside the lanes, and what that takes counts for them alone."""

import threading
import time
from heapq import heappop, heappush

import pytest
import torch
from torch import Tensor, nn

from plinth.engine import (
    Batcher,
    Call,
    DeadlineRefused,
    Engine,
    LatencyModel,
    ModelError,
    ModelSpec,
    ModelStore,
    Sla,
    TensorSpec,
    Work,
    architecture,
)
from plinth.engine.memory import residency

pytestmark = pytest.mark.cpu
QUICK, SLOW, OTHER = "quick@1", "slow@1", "other@1"


class Hand:
    """A batcher of one lane, and models that leave and come back by hand."""

    def __init__(self) -> None:
        self.costs = LatencyModel()
        for key in (QUICK, SLOW, OTHER):
            self.costs.seed(key, 1, 0.002)
            self.costs.seed(key, 64, 0.010)
        self.batcher = Batcher(self.costs)
        self.loads = self.costs.loads
        self.away: set[str] = set()
        for key in (SLOW, OTHER):
            self.batcher.register(key, 64)
            self.loads.watch(key, lambda key=key: key in self.away)

    def ask(self, key: str, ms: float | None, now: float, rows: int = 1):
        return self.batcher.admit(Work(key, rows, now, Sla(deadline_ms=ms), owner=object()), now)


def test_loading_counts_in_the_promise_of_its_own_model_alone():
    hand = Hand()
    hand.away = {SLOW}
    hand.loads.learn(SLOW, 0.3)
    refusal = hand.ask(SLOW, 200, 0.0)
    assert isinstance(refusal.error, DeadlineRefused)
    assert refusal.error.predicted == pytest.approx(0.302)
    assert hand.ask(SLOW, 400, 0.0) is None
    assert hand.ask(QUICK, 20, 0.0) is None, "others are promised what they always are"
    batch, refused = hand.batcher.next(0.0)
    assert batch.key == QUICK
    assert not refused
    hand.batcher.finished(batch, 0.002, 0.002)
    assert hand.batcher.next(0.002) == (None, [])
    assert hand.batcher.held_until == pytest.approx(0.302)
    assert hand.batcher.waits_for_loads
    hand.loads.current = SLOW, 0.0
    assert hand.ask(SLOW, 200, 0.25) is None, "it is nearly there"
    hand.away.clear()
    hand.loads.current = None
    batch, _ = hand.batcher.next(0.3)
    assert (batch.key, batch.rows) == (SLOW, 2)


def test_a_load_that_takes_longer_is_expected_to_take_as_long_again():
    hand = Hand()
    hand.away = {SLOW}
    hand.loads.learn(SLOW, 0.1)
    hand.loads.current = SLOW, 0.0
    assert hand.ask(SLOW, 500, 0.0) is None
    assert hand.batcher.next(0.2) == (None, []), "0.1 s over, so done after 0.1 s more"
    batch, refused = hand.batcher.next(0.4)  # 0.3 s over: not before 0.7
    assert batch is None
    assert [type(each.error) for each in refused] == [DeadlineRefused]


def test_the_model_of_the_earliest_deadline_is_loaded_first_and_others_reckon_with_it():
    hand = Hand()
    hand.away = {SLOW, OTHER}
    for key in (SLOW, OTHER):
        hand.loads.learn(key, 0.2)
    assert hand.ask(OTHER, None, 0.0) is None
    assert hand.batcher.next_load() == (hand.loads, OTHER), "also for work without a deadline"
    assert hand.ask(SLOW, 300, 0.0) is None
    assert hand.batcher.next_load() == (hand.loads, SLOW)
    assert hand.ask(OTHER, 350, 0.0) is not None, "0.2 s for the one before, 0.2 s for its own"
    assert hand.ask(OTHER, 250, 0.0) is None, "it goes first"
    assert hand.batcher.next_load() == (hand.loads, OTHER)
    hand.loads.current = OTHER, 0.0
    assert hand.batcher.next_load() is None, "one at a time"
    lost = hand.batcher.lose(hand.loads, OTHER)
    assert len(lost) == 2
    hand.loads.ended(OTHER)
    assert not hand.batcher.waits_for(hand.loads, OTHER)
    assert hand.batcher.waits_for(hand.loads, SLOW)


def test_a_model_that_work_was_refused_for_the_want_of_is_loaded_for_the_next():
    hand = Hand()
    hand.away = {SLOW, OTHER}
    hand.loads.learn(SLOW, 0.3)
    assert hand.ask(SLOW, 100, 0.0) is not None
    assert hand.batcher.next_load() == (hand.loads, SLOW), "else it would be refused for ever"
    assert hand.ask(OTHER, 100, 0.0) is None
    assert hand.batcher.next_load() == (hand.loads, OTHER), "who waits goes first"
    assert hand.batcher.waits_for(hand.loads, SLOW)
    hand.loads.ended(SLOW)
    hand.away = {OTHER}
    assert hand.ask(SLOW, 100, 0.4) is None


def test_slices_of_a_model_that_is_away_do_not_hold_those_of_others():
    hand = Hand()
    hand.away = {SLOW}
    assert hand.ask(SLOW, None, 0.0, rows=4) is None
    assert hand.ask(QUICK, None, 0.0, rows=4) is None
    batch, _ = hand.batcher.next(0.0)
    assert batch.key == QUICK
    assert hand.batcher.background_rows == 8 - batch.rows


def test_in_virtual_time_nobody_else_misses_while_models_come_and_go():
    """Two models that push each other out, a third of 100 a second due in 30 ms."""
    hand, now, missed, answered = Hand(), 0.0, [], []
    hand.away = {OTHER}
    events: list[tuple[float, int, str]] = []
    for number in range(1000):
        heappush(events, (number / 100, number, QUICK))
    for number in range(20):
        heappush(events, (number / 2, 1000 + number, (SLOW, OTHER)[number % 2]))
    running = None  # the batch of the lane, and when it ends
    loading = 0.0  # when the load ends
    tick = 0.001
    while events or running or hand.batcher:
        while events and events[0][0] <= now:
            _, _, key = heappop(events)
            if hand.ask(key, 30 if key == QUICK else 450, now) is not None:
                missed.append(key)
        if hand.loads.current and now >= loading:
            model, since = hand.loads.current
            hand.loads.learn(model, now - since)
            hand.loads.current, hand.away = None, {SLOW, OTHER} - {model}
        if not hand.loads.current and (found := hand.batcher.next_load()):
            hand.loads.current, loading = (found[1], now), now + 0.3
        if running and now >= running[1]:
            batch, end = running
            hand.batcher.finished(batch, 0.002, now)
            answered += [(batch.key, end <= part.work.deadline) for part in batch.parts]
            running = None
        if not running:
            batch, refused = hand.batcher.next(now)
            missed += [each.work.key for each in refused]
            running = batch and (batch, now + 0.002)
        now += tick
    assert missed == []
    assert [key for key, _ in answered].count(QUICK) == 1000
    assert all(in_time for _, in_time in answered)


# -- the engine --------------------------------------------------------------------------------
class Wide(nn.Module):
    """Weights, 4 MB, that leave memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@architecture("wide-layers")
def wide(width: int) -> nn.Module:
    return Wide(width)


WIDTH = 512


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ModelStore:
    made = ModelStore(tmp_path_factory.mktemp("store"))
    for number, name in enumerate("abc"):
        torch.manual_seed(number)
        row = (TensorSpec(name="x", shape=(WIDTH,)),)
        spec = ModelSpec(
            name=name,
            architecture="wide-layers",
            config={"width": WIDTH},
            inputs=row,
            outputs=(TensorSpec(name="y", shape=(WIDTH,)),),
        )
        made.save(spec, wide(WIDTH))
    return made


class Gate:
    """Lets a model come back only when it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.asked, self.fails = threading.Event(), threading.Event(), False
        back = residency.Evictable._back

        def slow(runs) -> None:
            if runs.seat.away:
                self.asked.set()
                assert self.open.wait(60)
                if self.fails:
                    raise OSError("gone")
            back(runs)

        monkeypatch.setattr(residency.Evictable, "_back", slow)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


def engine_of(store: ModelStore, gate: Gate, fits: float, **options) -> Engine:
    """An engine whose budget holds so many of a, b and c; c came last, a is away."""
    models = [store.load(name) for name in "abc"]
    one = sum(t.nbytes for t in models[0].module.parameters())
    engine = Engine(
        backend="eager", threads=1, memory_budget=int(fits * one), evict_idle=True, **options
    )
    gate.open.set()
    for model in models:
        engine.add(model, batch_range=(1, 1))
    facts = engine.status()["models"]
    assert [facts[name]["resident"] for name in "abc"] == [False, fits > 2, True]
    gate.open.clear()
    return engine


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_urgent_work_of_others_runs_while_a_model_is_loaded(store, gate, devices):
    rows = torch.randn(1, WIDTH)
    with engine_of(store, gate, 2.5, devices=devices) as engine:
        first = engine.submit(Call("a", rows))
        assert gate.asked.wait(30)
        for _ in range(20):  # on the one lane there is
            engine.submit(Call("c", rows), Sla(deadline_ms=5000)).result(30)
        assert not first.done()
        gate.open.set()
        want = store.load("a").run({"x": rows})["y"]
        torch.testing.assert_close(first.result(30).value, want, rtol=1e-4, atol=1e-5)
        facts = engine.status()["models"]
        assert (facts["a"]["returns"], facts["b"]["resident"]) == (1, False)


def test_what_loading_took_is_learned_and_promised(store, gate, tmp_path):
    passed, rows, path = [0.0], torch.randn(1, WIDTH), tmp_path / "costs.json"
    clock = {"clock": lambda: time.monotonic() + passed[0]}
    with engine_of(store, gate, 1.5, latency_file=path, **clock) as engine:
        slow = engine.submit(Call("a", rows), Sla(deadline_ms=60_000))
        assert gate.asked.wait(30)
        passed[0] += 7.0
        gate.open.set()
        slow.result(30)
        engine.submit(Call("b", rows)).result(30)  # pushes a out
        with pytest.raises(DeadlineRefused) as caught:
            engine.submit(Call("a", rows), Sla(deadline_ms=5000)).result(30)
        assert caught.value.predicted > 7
        engine.submit(Call("a", rows)).result(30)
        engine.submit(Call("a", rows), Sla(deadline_ms=5000)).result(30)  # it is there
    with engine_of(store, gate, 1.5, latency_file=path, **clock) as engine:
        with pytest.raises(DeadlineRefused):
            engine.submit(Call("a", rows), Sla(deadline_ms=5000)).result(30)
        gate.open.set()
        engine.submit(Call("a", rows), Sla(deadline_ms=20_000)).result(30)


def test_the_first_batch_after_a_return_is_not_learned(store, gate, monkeypatch):
    passed, run = [0.0], residency.Evictable.run

    def slow(runs, inputs):
        passed[0] += 7.0 if runs.seat.cold else 0.0
        return run(runs, inputs)

    monkeypatch.setattr(residency.Evictable, "run", slow)
    rows = torch.randn(1, WIDTH)
    with engine_of(store, gate, 1.5, clock=lambda: time.monotonic() + passed[0]) as engine:
        gate.open.set()
        for name in "abab":
            engine.submit(Call(name, rows)).result(30)
        assert passed[0] == 28.0
        engine.submit(Call("b", rows), Sla(deadline_ms=5000)).result(30)


def test_who_waits_for_a_load_that_fails_is_told_and_the_next_one_tries_again(store, gate):
    rows = torch.randn(1, WIDTH)
    with engine_of(store, gate, 1.5) as engine:
        gate.fails = True
        gate.open.set()
        for call in [engine.submit(Call("a", rows), sla) for sla in (None, Sla(deadline_ms=9000))]:
            with pytest.raises(ModelError, match="a could not be loaded: OSError"):
                call.result(30)
        gate.fails = False
        for name in "caba":
            engine.submit(Call(name, rows)).result(30)
        assert engine.state == "running"


def test_a_deadline_is_told_while_its_model_is_being_loaded(store, gate):
    rows = torch.randn(1, WIDTH)
    with engine_of(store, gate, 1.5) as engine:
        call = engine.submit(Call("a", rows), Sla(deadline_ms=50))
        with pytest.raises(DeadlineRefused):
            call.result(30)
        gate.open.set()
        engine.submit(Call("b", rows)).result(30)  # what came back for nobody leaves again


@pytest.mark.parametrize("drain", [True, False])
def test_an_engine_that_ends_while_it_loads_ends(store, gate, drain):
    rows = torch.randn(1, WIDTH)
    engine = engine_of(store, gate, 1.5).start()
    call = engine.submit(Call("a", rows))
    assert gate.asked.wait(30)
    ended = threading.Thread(target=engine.close, args=(drain,))
    ended.start()
    if not drain:
        assert call.exception(30) is not None
    gate.open.set()
    ended.join(30)
    assert not ended.is_alive()
    assert drain == (call.exception(30) is None)
    with engine:
        engine.submit(Call("b", rows)).result(30)


def test_a_model_that_is_removed_while_it_is_loaded_answers_those_it_took(store, gate):
    rows = torch.randn(1, WIDTH)
    with engine_of(store, gate, 1.5) as engine:
        call = engine.submit(Call("a", rows))
        assert gate.asked.wait(30)
        engine.remove("a")
        gate.open.set()
        want = store.load("a").run({"x": rows})["y"]
        torch.testing.assert_close(call.result(30).value, want, rtol=1e-4, atol=1e-5)
        engine.submit(Call("b", rows)).result(30)
