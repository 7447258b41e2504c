"""What models raise fails their own rows; if the device thread ends, everybody is told."""

import asyncio
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import nn

from plinth.engine import (
    Batcher,
    Call,
    ConfigError,
    DeadlineRefused,
    Engine,
    EngineFailed,
    LatencyModel,
    Model,
    ModelError,
    ModelSpec,
    Refused,
    Sla,
    TensorSpec,
    Work,
)
from plinth.engine.errors import OutOfMemory

BAD = 1000.0
PATIENT = Sla(deadline_ms=60_000)


class OfItsOwn(BaseException):
    """Not even an Exception."""


class Picky(nn.Module):
    """Raises where a row holds 1000."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.batches: list[int] = []

    def forward(self, x):
        self.batches.append(len(x))
        if bool((x >= BAD).any()):
            raise self.error
        return x * 2


def picky(error: BaseException | None = None) -> Model:
    spec = ModelSpec(
        name="picky",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    return Model(spec, Picky(error or AssertionError("card 4111 1111 1111 1111")).eval())


def rows(value: float, count: int = 1) -> Call:
    return Call("picky", torch.full((count, 4), value))


@pytest.mark.parametrize(
    "error",
    [
        *(AssertionError("no"), KeyboardInterrupt(), SystemExit(3), MemoryError(), OfItsOwn()),
        *(StopIteration(), GeneratorExit(), Refused("not you"), ZeroDivisionError()),
        *(InvalidArgument("indices element out of data bounds"), RuntimeError("no such kernel")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_model_raises_fails_its_own_call_and_the_next_is_answered(error):
    with Engine(threads=1) as engine:
        engine.add(picky(error), batch_range=(1, 8))
        bad = engine.submit(rows(BAD))
        with pytest.raises((ModelError, OutOfMemory)):
            bad.result(30)
        assert engine.submit(rows(1.0)).result(30).value.tolist() == [[2.0] * 4]
        assert engine.state == "running"


def test_a_callers_error_names_the_model_and_the_kind_but_no_message():
    with Engine(threads=1) as engine:
        engine.add(picky())
        with pytest.raises(ModelError, match="picky failed on 1 rows: AssertionError") as caught:
            engine.submit(rows(BAD)).result(30)
    assert "4111" not in str(caught.value.as_dict())
    assert caught.value.hint


def held(engine: Engine, sla: Sla = PATIENT):
    """Hold the device thread in a callback, so that what is submitted next makes one batch."""
    entered, go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        entered.set()
        assert go.wait(30)

    engine.submit(rows(0.0), sla).add_done_callback(hold)
    assert entered.wait(30)
    return go


def test_one_poisoned_row_among_a_thousand_is_the_only_failure(caplog):
    model = picky()
    with Engine(threads=1) as engine:
        engine.add(model, sla=PATIENT, batch_range=(1, 1024))
        go = held(engine)
        model.module.batches.clear()
        calls = [engine.submit(rows(BAD if n == 637 else float(n % 9))) for n in range(1000)]
        go.set()
        outcomes = [call.exception(60) for call in calls]
    assert [n for n, error in enumerate(outcomes) if error] == [637]
    assert isinstance(outcomes[637], ModelError)
    assert calls[8].result().value.tolist() == [[16.0] * 4]
    assert len(model.module.batches) <= 1 + 2 * 10, "two halves on each of log2(1000) levels"
    assert "picky failed on 1 rows: AssertionError" in caplog.text
    assert "4111" not in caplog.text


def test_a_callers_own_rows_stay_together():
    with Engine(threads=1) as engine:
        engine.add(picky(), sla=PATIENT)
        go = held(engine)
        mixed = torch.ones(5, 4)
        mixed[3] = BAD
        calls = [engine.submit(rows(1.0, 3)), engine.submit(Call("picky", mixed))]
        calls += [engine.submit(rows(2.0, 7)) for _ in range(6)]
        go.set()
        errors = [type(call.exception(30)) for call in calls]
    assert errors == [type(None), ModelError, *[type(None)] * 6]
    assert all(calls[n].result().value.shape == (7, 4) for n in range(2, 8))


def test_background_neighbours_are_answered_too():
    with Engine(threads=1) as engine:
        engine.add(picky(), batch_range=(1, 64))
        go = held(engine, Sla())
        calls = [engine.submit(rows(BAD if n == 5 else 1.0)) for n in range(40)]
        go.set()
        errors = [call.exception(30) for call in calls]
        assert engine.status()["background_rows"] == 0
    assert [n for n, error in enumerate(errors) if error] == [5]


def test_a_model_that_always_fails_is_not_searched_for_ever():
    model = picky()
    with Engine(threads=1) as engine:
        engine.add(model, sla=PATIENT)
        go = held(engine)
        model.module.batches.clear()
        calls = [engine.submit(rows(BAD)) for _ in range(1000)]
        go.set()
        assert all(isinstance(call.exception(60), ModelError) for call in calls)
        assert len(model.module.batches) <= 32 + 2 * 8 + 1000 // 128 + 1
        assert engine.submit(rows(1.0)).result(30).value.sum() == 8


COST = 0.010


def searched(poison: set[int], count: int, deadline_ms: float) -> tuple[dict, int]:
    """Callers of one row, in one failing batch, in virtual time; outcomes and batches that ran."""
    latency = LatencyModel()
    for size in (1, 128):
        latency.seed("a", size, COST)
    batcher = Batcher(latency)
    works = [Work("a", 1, 0.0, Sla(deadline_ms=deadline_ms), owner=object()) for _ in range(count)]
    outcomes: dict[Work, str] = {}
    for work in works:
        assert batcher.admit(work, 0.0) is None
    now, ran = 0.0, 0
    while batcher:
        batch, refused = batcher.next(now)
        outcomes |= {refusal.work: "refused" for refusal in refused}
        if batch is None:
            continue
        now, ran = now + COST, ran + 1
        if any(works.index(part.work) in poison for part in batch.parts):
            outcomes |= dict.fromkeys(batcher.failed(batch, now), "failed")
            continue
        batcher.finished(batch, COST, now)
        in_time = {part.work: now <= part.work.deadline + 1e-9 for part in batch.parts}
        outcomes |= {work: "answered" if kept else "late" for work, kept in in_time.items()}
    return {n: outcomes[work] for n, work in enumerate(works)}, ran


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_up_to_eight_culprits_are_found_whoever_they_are(data):
    count = data.draw(st.integers(1, 128))
    poison = data.draw(st.sets(st.integers(0, count - 1), max_size=8))
    outcomes, ran = searched(poison, count, 60_000)
    assert {n for n, became in outcomes.items() if became == "failed"} == poison
    assert all(became in ("failed", "answered") for became in outcomes.values())
    assert ran <= 1 + 2 * len(poison) * count.bit_length()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_the_search_makes_too_late_is_refused_and_never_late(data):
    count = data.draw(st.integers(1, 128))
    poison = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    outcomes, ran = searched(poison, count, data.draw(st.sampled_from([15, 45, 100, 2000])))
    assert set(outcomes) == set(range(count))
    assert "late" not in outcomes.values()
    assert not {n for n in poison if outcomes[n] == "answered"}
    assert ran <= 1 + 2 * 8 * 8 + 1


def test_a_neighbour_that_cannot_be_retried_in_time_is_refused():
    outcomes, _ = searched({3}, 64, 15)
    assert set(outcomes.values()) == {"refused"}


class Dying(Batcher):
    """Raises when it is asked for a batch, once it is told to."""

    armed = False

    def next(self, now, lane=None):
        if self.armed:
            raise ZeroDivisionError("a fault of ours")
        return super().next(now, lane)


def dead_engine() -> tuple[Engine, list]:
    """An engine whose device thread ended while ten callers waited."""
    batcher = Dying(LatencyModel())
    engine = Engine(batcher, threads=1)
    engine.add(picky())
    engine.start()
    go = held(engine)
    calls = [engine.submit(rows(1.0), PATIENT if n % 2 else None) for n in range(10)]
    batcher.armed = True
    go.set()
    return engine, calls


def test_when_the_device_thread_ends_every_caller_is_told_and_status_says_so():
    engine, calls = dead_engine()
    for call in calls:
        with pytest.raises(EngineFailed, match="ended: ZeroDivisionError") as caught:
            call.result(1.0)
    assert "start()" in caught.value.hint
    status = engine.status()
    assert (status["running"], status["state"]) == (False, "failed")
    assert status["failure"] == engine.failure == "ZeroDivisionError"
    with pytest.raises(EngineFailed):
        engine.submit(rows(1.0)).result(1.0)
    with pytest.raises(EngineFailed):
        engine.run(call for call in [rows(1.0)])
    with pytest.raises(EngineFailed):
        asyncio.run(engine.run_async(call for call in [rows(1.0)]))
    engine.close()
    assert engine.state == "failed", "closing does not make it well"


def test_an_engine_that_failed_can_be_started_anew():
    engine, calls = dead_engine()
    assert calls[0].exception(1.0)
    engine._batcher.armed = False
    engine.start()
    assert engine.failure is None
    assert engine.submit(rows(1.0)).result(30).value.sum() == 8
    engine.close()


def test_callers_in_an_event_loop_are_told_too():
    batcher = Dying(LatencyModel())
    engine = Engine(batcher, threads=1)
    engine.add(picky())
    engine.start()
    go = held(engine)

    async def ask():
        asked = [asyncio.create_task(engine.run_async(c for c in [rows(1.0)])) for _ in range(5)]
        while engine.status()["background_rows"] < 5:
            await asyncio.to_thread(lambda: None)
        batcher.armed = True
        go.set()
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5.0)

    assert [type(error) for error in asyncio.run(ask())] == [EngineFailed] * 5


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(1), KeyboardInterrupt()])
def test_a_callback_that_raises_ends_nothing(error):
    def callback(_: object) -> None:
        raise error

    with Engine(threads=1) as engine:
        engine.add(picky())
        engine.submit(rows(1.0)).add_done_callback(callback)
        assert engine.submit(rows(1.0)).result(30).value.sum() == 8
        assert engine.state == "running"


def test_a_callback_may_submit_but_not_wait_for_itself():
    with Engine(threads=1) as engine:
        engine.add(picky())
        inner, refused = [], []
        done = threading.Event()

        def callback(_: object) -> None:
            inner.append(engine.submit(rows(3.0)))
            try:
                engine.run(call for call in [rows(1.0)])
            except ConfigError as error:
                refused.append(error)
            done.set()

        engine.submit(rows(1.0)).add_done_callback(callback)
        assert done.wait(30)
        assert inner[0].result(30).value.sum() == 24
        assert "would wait for itself" in str(refused[0])


def test_an_event_loop_that_closed_before_its_answer_came_harms_nobody():
    with Engine(threads=1) as engine:
        engine.add(picky())
        go = held(engine)
        loop = asyncio.new_event_loop()
        task = loop.create_task(engine.run_async(call for call in [rows(1.0)]))
        while not engine.status()["background_rows"]:
            loop.run_until_complete(asyncio.to_thread(lambda: None))
        loop.stop()
        loop.run_forever()
        task._log_destroy_pending = False
        loop.close()
        go.set()
        assert engine.submit(rows(1.0)).result(30).value.sum() == 8
        assert engine.state == "running"


def test_cancelling_while_the_batch_runs_leaves_the_others_alone():
    with Engine(threads=1) as engine:
        engine.add(picky(), sla=PATIENT)
        go = held(engine)
        calls = [engine.submit(rows(BAD if n == 3 else 1.0)) for n in range(20)]
        assert all(call.cancel() for call in calls[::2])
        go.set()
        for n, call in enumerate(calls):
            if n % 2:
                assert isinstance(call.exception(30), ModelError) == (n == 3)
        assert engine.status()["urgent_rows"] == 0


def test_what_cannot_be_in_time_is_still_refused_with_its_reason():
    with Engine(threads=1) as engine:
        engine.add(picky())
        with pytest.raises(DeadlineRefused):
            engine.submit(rows(1.0), Sla(deadline_ms=1e-6)).result(30)
