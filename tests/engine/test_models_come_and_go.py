"""Models added, replaced, shared and removed while calls run; what is kept stays inside bounds."""

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from plinth.engine import (
    Batcher,
    Call,
    Engine,
    LatencyModel,
    Model,
    ModelError,
    ModelSpec,
    Sla,
    TensorSpec,
    Work,
)
from plinth.engine.errors import OutOfMemory
from plinth.engine.metrics import REGISTRY
from plinth.engine.runtime import loaded_model
from plinth.engine.runtime.recent import Recent
from plinth.engine.scheduler.batcher import MAX_KEYS

SLA = Sla(deadline_ms=60_000)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


def scale(factor: float, name: str = "scale", version: str = "1", shape=(4,), **facts) -> Model:
    spec = ModelSpec(
        name=name,
        version=version,
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
        **facts,
    )
    return Model(spec, Scale(factor).eval())


def ask(engine: Engine, name: str = "scale") -> float:
    return engine.submit(Call(name, torch.ones(1, 4)), SLA).result(30).value[0, 0].item()


class Padded(Scale):
    def forward(self, x):
        return (x.repeat(1, 4096) * self.factor)[:, :4]


@pytest.mark.cpu
def test_what_was_measured_of_a_model_holds_for_another_of_its_structure(monkeypatch):
    runs, measure = [], loaded_model.measure

    def counted(*args, **options):
        runs.append(args)
        return measure(*args, **options)

    monkeypatch.setattr(loaded_model, "measure", counted)
    with Engine(threads=1) as engine:

        def measured(model: Model) -> bool:
            before = len(runs)
            engine.add(model, batch_range=(1, 8))
            return len(runs) > before

        table = engine._lanes.models
        assert measured(scale(2.0))
        first = table.get("scale")
        assert not measured(scale(3.0, version="2"))
        second = table.get("scale")
        for told in ("fixed", "per_row", "weights"):
            assert getattr(second.plan, told) == getattr(first.plan, told)
        assert second.most == first.most
        assert engine._batcher.latency.learned(second.key)
        assert ask(engine) == 3.0
        padded = scale(2.0, version="3")
        assert measured(Model(padded.spec, Padded(2.0).eval()))
        assert table.get("scale").plan.per_row > first.plan.per_row
        assert measured(scale(2.0, version="4", shape=(5,)))


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_model_added_again_with_other_weights_serves_the_new_ones(version):
    with Engine(threads=1) as engine:
        engine.add(scale(2.0), batch_range=(1, 8))
        old = weakref.ref(engine._models.get("scale").model.module)
        assert ask(engine) == 2.0
        engine.add(scale(3.0, version=version), batch_range=(1, 8))
        assert ask(engine) == 3.0
        gc.collect()
        assert old() is None, "the old one is freed"
        assert engine.status()["models"]["scale"]["version"] == version


def test_calls_accepted_before_a_replacement_are_answered_by_the_old_model():
    entered, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        entered.set()
        assert go.wait(30)

    with Engine(threads=1) as engine:
        engine.add(scale(2.0), batch_range=(1, 8))
        engine.submit(Call("scale", torch.ones(1, 4))).add_done_callback(hold)
        assert entered.wait(30)
        before = [engine.submit(Call("scale", torch.ones(1, 4)), SLA) for _ in range(20)]
        engine.add(scale(3.0), batch_range=(1, 8))
        after = [engine.submit(Call("scale", torch.ones(1, 4)), SLA) for _ in range(20)]
        go.set()
        assert {call.result(30).value[0, 0].item() for call in before} == {2.0}
        assert {call.result(30).value[0, 0].item() for call in after} == {3.0}


def test_the_same_model_added_twice_is_loaded_once():
    with Engine(threads=1) as engine:
        engine.add(scale(2.0), batch_range=(1, 8))
        loaded = engine._models.get("scale")
        engine.add(scale(2.0), sla=SLA, batch_range=(1, 8))
        assert engine._models.get("scale") is loaded
        assert loaded.sla == SLA
        engine.add(scale(2.0), batch_range=(1, 4))
        assert engine.status()["models"]["scale"]["largest_batch"] == 4


def test_a_removed_model_is_gone_and_its_memory_free():
    with Engine(threads=1) as engine:
        engine.add(scale(2.0), batch_range=(1, 8))
        engine.add(scale(5.0, "other"), batch_range=(1, 8))
        gone = weakref.ref(engine._models.get("scale").model.module)
        accepted = engine.submit(Call("scale", torch.ones(1, 4)), SLA)
        engine.remove("scale")
        assert accepted.result(30).value[0, 0].item() == 2.0
        with pytest.raises(ModelError, match="there is no model scale"):
            ask(engine)
        with pytest.raises(ModelError, match="there is no model scale"):
            engine.remove("scale")
        assert ask(engine, "other") == 5.0
        del accepted
        gc.collect()
        assert gone() is None
        assert list(engine.status()["models"]) == ["other"]


def churn(seconds: float, shapes: int = 400) -> int:
    """Calls of many shapes while models are added, replaced and removed; how many were answered."""
    with Engine(threads=1) as engine:
        engine.add(scale(1.0, "any", shape=(None,)))
        engine.add(scale(1.0, "swapped"), batch_range=(1, 4))
        stop, answered = threading.Event(), [0, 0, 0]

        def shape_after_shape(place: int) -> None:
            size = 0
            while not stop.is_set():
                size = size % shapes + 1
                rows = torch.full((1, size), float(place))
                result = engine.submit(Call("any", rows), SLA).result(30)
                assert torch.equal(result.value, rows)
                answered[place] += 1

        def swapped(place: int) -> None:
            while not stop.is_set():
                result = engine.submit(Call("swapped", torch.ones(2, 4)), SLA).result(30)
                assert len(set(result.value.flatten().tolist())) == 1, "old and new never mix"
                answered[place] += 1

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(*of) for of in ((shape_after_shape, 0), (shape_after_shape, 1))]
            asking.append(pool.submit(swapped, 2))
            until, turn = time.monotonic() + seconds, 0

            def enough() -> bool:
                """The time is over, and on a busy machine something came of it."""
                now = time.monotonic()
                return now > until and ((turn > 3 and sum(answered) > 20) or now > until + 60)

            try:
                while not enough() and not any(call.done() for call in asking):
                    turn += 1
                    engine.add(scale(float(turn), "swapped"), batch_range=(1, 4))
                    engine.add(scale(float(turn), "passing", shape=(None,)))
                    engine.remove("passing")
            finally:
                stop.set()
            for call in asking:
                call.result(60)
        assert engine.state == "running"
        assert turn > 3
        return sum(answered)


def test_an_answer_that_is_kept_keeps_no_model_and_no_rows():
    with Engine(threads=1) as engine:
        engine.add(scale(2.0))
        rows = torch.ones(1, 4)
        loaded, given = weakref.ref(engine._models.get("scale")), weakref.ref(rows)
        future = engine.submit(Call("scale", rows), SLA)
        assert future.result(30).ran.name == "scale"
        engine.remove("scale")
        del rows
        ask_other = scale(3.0, "other")  # the lane has something else in hand then
        engine.add(ask_other)
        assert ask(engine, "other") == 3
        gc.collect()
        assert loaded() is None
        assert given() is None
        assert future.result().value.sum() == 8


def test_nothing_is_lost_while_models_come_and_go():
    assert churn(1.5) > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_while_models_come_and_go_for_long():
    """For minutes: ``CHURN_SECONDS=300 pytest tests/engine/test_models_come_and_go.py -k long``."""
    assert churn(float(os.environ.get("CHURN_SECONDS", "8")), 3000) > 100


def test_shapes_of_clients_leave_a_bounded_number_of_keys_and_none_in_use_is_dropped():
    latency = LatencyModel()
    batcher = Batcher(latency, max_queue=10_000)
    batcher.register("model", 16, pinned=True)
    latency.seed("model", 1, 0.001)
    waiting = Work("kept", 1, 0.0, Sla(deadline_ms=80_000_000))
    batcher.register("kept", 7)
    latency.seed("kept", 1, 1e-6)
    assert batcher.admit(waiting, 0.0) is None
    batcher.admit(Work("patient", 1, 0.0, Sla()), 0.0)
    batcher.register("patient", 3)
    for size in range(3000):
        key = f"model[x={size}]"
        batcher.register(key, 4)
        latency.observe(key, 1, 0.001)
        batcher.admit(Work(key, 1, 0.0, SLA), 0.0) if size < 10 else None
    assert len(latency) <= MAX_KEYS
    assert len(batcher._settings_by_key) <= MAX_KEYS
    for key in ("model", "kept", "patient", *(f"model[x={size}]" for size in range(10))):
        assert batcher.knows(key), key
    assert latency.predict("kept", 1, 0.5) > 0


def test_more_shapes_than_are_kept_go_through_an_engine():
    with Engine(threads=1) as engine:
        engine.add(scale(2.0, "any", shape=(None,)))
        for size in range(1, 1501):
            call = engine.submit(Call("any", torch.ones(1, size)), SLA)
            if size % 500 == 0:
                assert call.result(30).value.sum() == 2 * size
        call.result(30)
        assert len(engine._batcher._settings_by_key) <= MAX_KEYS
        assert len(engine._batcher.latency) <= MAX_KEYS


def wide(name: str) -> Model:
    """100 kB of weights."""
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=(None, 160)),),
        outputs=(TensorSpec(name="y", shape=(None, 160)),),
    )
    return Model(spec, nn.Linear(160, 160, bias=False).eval())


@pytest.mark.cpu  # storages of the fake device hold no bytes
def test_models_of_one_engine_share_its_budget():
    engine = Engine(threads=1, memory_budget=350_000)
    for name in ("one", "two", "three"):
        engine.add(wide(name), batch_range=(1, 2))
    with pytest.raises(OutOfMemory, match=r"four has 102400 bytes.*one, three, two hold 307200"):
        engine.add(wide("four"), batch_range=(1, 2))
    engine.remove("two")
    engine.add(wide("four"), batch_range=(1, 2))
    assert list(engine.status()["models"]) == ["one", "three", "four"]


@pytest.mark.cpu  # as above
def test_largest_batches_are_cut_beside_another_model_and_widen_when_it_has_gone():
    def largest() -> int:
        return int(engine.status()["models"]["scale"]["largest_batch"])

    spec = ModelSpec(
        name="scale",
        inputs=(TensorSpec(name="x", shape=(160, 160)),),
        outputs=(TensorSpec(name="y", shape=(160, 160)),),
    )
    engine = Engine(threads=1, memory_budget=8_000_000)
    engine.add(Model(spec, nn.Linear(160, 160, bias=False).eval()), batch_range=(1, 64))
    alone = largest()
    assert 2 < alone < 64
    other = TensorSpec(name="x", shape=(1000,)), TensorSpec(name="y", shape=(1500,))
    large = ModelSpec(name="large", inputs=other[:1], outputs=other[1:])
    engine.add(Model(large, nn.Linear(1000, 1500, bias=False).eval()), batch_range=(1, 1))
    assert largest() < alone
    engine.remove("large")
    assert largest() == alone


def test_two_engines_have_metrics_and_models_of_their_own():
    def of(registry, kind: str = "urgent") -> float:
        return registry.get_sample_value("plinth_queue_rows", {"kind": kind})

    entered, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        entered.set()
        assert go.wait(30)

    with Engine(threads=1) as one, Engine(threads=1) as two:
        one.add(scale(2.0), batch_range=(1, 1))
        two.add(scale(7.0), batch_range=(1, 1))
        one.submit(Call("scale", torch.ones(1, 4))).add_done_callback(hold)
        assert entered.wait(30)
        before = of(REGISTRY)
        calls = [one.submit(Call("scale", torch.ones(1, 4)), SLA) for _ in range(5)]
        assert (of(one.metrics.registry), of(two.metrics.registry)) == (5.0, 0.0)
        assert of(REGISTRY) - before == 5.0
        assert ask(two) == 7.0
        go.set()
        assert [call.result(30).value[0, 0].item() for call in calls] == [2.0] * 5
        answered = {"model": "scale", "outcome": "answered"}
        assert one.metrics.registry.get_sample_value("plinth_calls_total", answered) == 6
        assert two.metrics.registry.get_sample_value("plinth_calls_total", answered) == 1


def test_what_an_engine_counted_stays_counted_when_it_is_gone():
    def answered() -> float:
        labels = {"model": "swapped", "outcome": "answered"}
        return REGISTRY.get_sample_value("plinth_calls_total", labels) or 0.0

    before = answered()
    engine = Engine(threads=1)
    engine.add(scale(1.0, "swapped"), batch_range=(1, 1))
    with engine:
        ask(engine, "swapped")
    assert answered() == before + 1
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert answered() == before + 1


def test_few_rows_of_recent_calls_are_kept_and_no_large_ones():
    recent = Recent()
    for number in range(20_000):
        recent.see({"x": torch.full((3, 2), float(number))})
    numbers = [int(row["x"][0, 0]) for row in recent.rows()]
    assert len(numbers) == 8
    assert all(row["x"].shape == (1, 2) for row in recent.rows())
    assert min(numbers) > 20_000 - 10 * 2048, "old ones have given way"
    assert len(set(numbers)) == 8
    assert max(numbers) - min(numbers) > 100, "not the last eight"
    large = Recent()
    large.see({"x": torch.zeros(2, 1 << 20)})
    assert large.rows() == []
    mine = torch.zeros(1, 2)
    large.see({"x": mine})
    mine += 1
    assert not large.rows()[0]["x"].any(), "a row of the caller is copied"
