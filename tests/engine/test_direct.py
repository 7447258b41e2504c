"""A small call that nothing else waits beside is run by its caller; all else by the lane."""

import asyncio
import threading

import pytest
import torch
from torch import nn

from plinth.engine import (
    Batcher,
    Call,
    Engine,
    EngineFailed,
    LatencyModel,
    Model,
    ModelSpec,
    Pause,
    Sla,
)
from plinth.engine import TensorSpec as Shape
from plinth.engine.backends import prepare
from plinth.engine.devices.device import pick
from plinth.engine.runtime import engine as runtime

pytestmark = pytest.mark.cpu  # on a device the lane alone may run

SLA = Sla(deadline_ms=60_000)


class Notes:
    """What happened in a model: the thread and the rows of each batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []
        self.interrupt: BaseException | None = None
        self.gate: threading.Event | None = None
        self.inside = threading.Event()


class Noting(nn.Module):
    """Doubles."""

    notes = Notes()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(2 * torch.eye(4))

    def forward(self, x):
        notes = Noting.notes
        notes.batches.append((threading.current_thread().name, len(x)))
        if notes.gate is not None:
            notes.inside.set()
            assert notes.gate.wait(60)
        if notes.interrupt is not None:
            raise notes.interrupt
        return self.linear(x)


class Native:
    """An executable that says what graphs say: nothing in it waits."""

    def __init__(self, executable) -> None:
        self._executable = executable
        self.native = True

    def __getattr__(self, name):
        return getattr(self._executable, name)

    def is_native(self, rows):
        return self.native


@pytest.fixture
def noting(monkeypatch):
    """A running engine with it, and its notes; however slow the machine, calls count as small."""
    monkeypatch.setattr(runtime, "DIRECT_SECONDS", 10.0)
    spec = ModelSpec(
        name="noting",
        inputs=(Shape(name="x", shape=(4,)),),
        outputs=(Shape(name="y", shape=(4,)),),
    )
    with Engine(Batcher(LatencyModel()), threads=1) as engine:
        engine.add(Model(spec, Noting().eval()), batch_range=(1, 8), sla=SLA)
        loaded = engine._models.get("noting")
        loaded.executable = Native(loaded.executable)
        Noting.notes = Notes()
        yield engine, Noting.notes


def flow(rows=1, value=1.0):
    return (yield Call("noting", torch.full((rows, 4), float(value))))


def here():
    return threading.current_thread().name


def as_the_lane():
    """The number of CPU threads that the engine of these tests has."""
    torch.set_num_threads(1)


def in_a_thread(work):
    """What work() gives in a new thread that has the lane's settings."""
    found = []

    def run():
        as_the_lane()
        found.append(work())

    thread = threading.Thread(target=run, name="caller")
    thread.start()
    thread.join(60)
    return found[0]


def test_a_small_call_on_an_idle_engine_runs_in_its_callers_thread(noting):
    engine, notes = noting
    answer = in_a_thread(lambda: engine.run(flow(3)))
    assert answer.value.tolist() == [[2.0] * 4] * 3
    assert notes.batches == [("caller", 3)]
    assert not answer.late
    assert answer.timing.batch_rows == 3


def test_a_call_that_takes_long_or_is_larger_than_a_batch_runs_on_the_lane(noting, monkeypatch):
    engine, notes = noting
    in_a_thread(lambda: engine.run(flow(20)))
    monkeypatch.setattr(runtime, "DIRECT_SECONDS", 0.0)
    in_a_thread(lambda: engine.run(flow(1)))
    assert {name for name, _ in notes.batches} == {"plinth-device"}
    assert sum(rows for _, rows in notes.batches) == 21


@pytest.mark.parametrize("mode", ["autocast", "device", "threads"])
def test_settings_of_the_calling_thread_do_not_reach_the_model(noting, mode):
    engine, notes = noting
    modes = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "device": lambda: torch.device("meta"),
        "threads": lambda: torch.inference_mode(False),
    }

    def work():
        rows = torch.full((1, 4), 1.001)

        def one():
            return (yield Call("noting", rows))

        if mode == "threads":
            torch.set_num_threads(2)
        with modes[mode]():
            return engine.run(one()).value

    value = in_a_thread(work)
    assert value.dtype == torch.float32
    assert value.tolist() == (2 * torch.full((1, 4), 1.001)).tolist()
    assert notes.batches == [("plinth-device", 1)]


def test_in_an_event_loop_one_call_runs_there_and_calls_of_one_pass_make_a_batch(noting):
    engine, notes = noting

    async def main():
        as_the_lane()
        await engine.run_async(flow(1))
        alone = list(notes.batches)
        notes.batches.clear()
        notes.gate = threading.Event()  # the lane's first batch waits until all have come
        calls = [asyncio.ensure_future(engine.run_async(flow(1, n))) for n in range(4)]
        asyncio.get_running_loop().call_soon(notes.gate.set)
        answers = await asyncio.gather(*calls)
        return alone, [float(answer.value[0, 0]) for answer in answers]

    alone, values = in_a_thread(lambda: asyncio.run(main()))
    assert alone == [("caller", 1)]
    assert values == [0.0, 2.0, 4.0, 6.0]
    assert {name for name, _ in notes.batches} == {"plinth-device"}


def test_who_pauses_lets_those_of_his_batch_ask_for_more_first(noting):
    engine, notes = noting
    engine._models.get("noting").executable.native = False  # it runs on the lane
    done = []

    def ends():
        yield Call("noting", torch.ones(1, 4))
        assert (yield Pause()) is None
        done.append("ended")
        return len(done)

    def asks():
        yield Call("noting", torch.ones(1, 4))
        done.append("asked")
        return (yield Call("noting", torch.ones(1, 4)))

    async def main():
        notes.gate = threading.Event()
        held = asyncio.ensure_future(engine.run_async(flow(8)))
        await asyncio.to_thread(notes.inside.wait, 60)
        calls = [asyncio.ensure_future(engine.run_async(f())) for f in (ends, ends, asks)]
        await asyncio.to_thread(str)  # they have asked when this is over
        notes.gate.set()
        await asyncio.gather(held, *calls)

    asyncio.run(main())
    assert [rows for _, rows in notes.batches[:2]] == [8, 3]
    assert done == ["asked", "ended", "ended"]
    assert engine.run(ends()).value == 4, "a caller that waits alone pauses for nobody"


def test_the_next_batch_is_formed_before_callers_are_told_and_nobody_is_forgotten(
    noting, monkeypatch
):
    engine, notes = noting
    notes.gate, waited = threading.Event(), []
    calls = [engine.submit(Call("noting", torch.ones(8, 4))) for _ in range(2)]
    assert notes.inside.wait(60)
    calls[0].add_done_callback(lambda _: waited.append(engine._batcher.urgent_rows))
    notes.gate.set()
    assert all(call.result(60).value.shape == (8, 4) for call in calls)
    assert waited == [0]

    notes.inside.clear()
    notes.gate.clear()
    calls = [engine.submit(Call("noting", torch.ones(8, 4))) for _ in range(2)]
    assert notes.inside.wait(60)
    monkeypatch.setattr(engine._batcher, "finished", lambda *_: 1 / 0)  # the books break
    notes.gate.set()
    assert calls[0].result(60).value.shape == (8, 4)
    with pytest.raises(EngineFailed):
        calls[1].result(60)


def test_a_module_that_may_wait_for_something_never_runs_in_an_event_loop(noting):
    engine, notes = noting
    engine._models.get("noting").executable.native = False

    async def main():
        as_the_lane()
        await engine.run_async(flow(1))

    in_a_thread(lambda: asyncio.run(main()))
    assert notes.batches == [("plinth-device", 1)]


@pytest.mark.parametrize(("backend", "native"), [("eager", False), ("onnxruntime", True)])
def test_a_backend_says_whether_it_runs_native_code(backend, native):
    spec = ModelSpec(
        name="linear",
        inputs=(Shape(name="x", shape=(4,)),),
        outputs=(Shape(name="y", shape=(4,)),),
    )
    made = prepare(Model(spec, nn.Linear(4, 4).eval()), pick("cpu"), "fp32", backend, 1)
    assert made.is_native(1) is native


def test_a_call_cancelled_before_it_ran_leaves_nothing_behind(noting):
    engine, notes = noting

    async def main():
        as_the_lane()
        task = asyncio.ensure_future(engine.run_async(flow(1)))
        asyncio.get_running_loop().call_soon(task.cancel)  # once it is admitted, before it runs
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await engine.run_async(flow(2))).value

    assert in_a_thread(lambda: asyncio.run(main())).shape == (2, 4)
    assert [rows for _, rows in notes.batches if rows == 2] == [2]
    assert engine.status()["urgent_rows"] == 0


def test_ctrl_c_reaches_the_caller_and_the_engine_goes_on(noting):
    engine, notes = noting

    def work():
        notes.interrupt = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            engine.run(flow(1))
        notes.interrupt = None
        return engine.run(flow(2)).value

    assert in_a_thread(work).tolist() == [[2.0] * 4] * 2
    assert engine.state == "running"


def test_what_breaks_the_engines_books_in_a_callers_thread_is_told_and_ends_the_engine(
    noting, monkeypatch
):
    engine, _ = noting

    def broken(*_):
        raise ZeroDivisionError("a fault of ours")

    def work():
        monkeypatch.setattr(engine._batcher, "finished", broken)
        assert engine.run(flow(1)).value.shape == (1, 4)  # it was answered before
        for _ in range(1000):
            if engine.state == "failed":
                break
            with pytest.raises(EngineFailed):
                engine.run(flow(1))
        monkeypatch.undo()
        return engine.state, engine.failure

    assert in_a_thread(work) == ("failed", "ZeroDivisionError")
    engine.start()
    assert in_a_thread(lambda: engine.run(flow(1))).value.tolist() == [[2.0] * 4]


def test_callers_of_many_threads_each_get_their_own_rows(noting):
    engine, notes = noting
    found: dict[int, list[float]] = {}

    def caller(number):
        as_the_lane()
        found[number] = [
            float(engine.run(flow(1 + turn % 3, number * 1000 + turn)).value[0, 0])
            for turn in range(50)
        ]

    threads = [threading.Thread(target=caller, args=(n,), name=f"caller-{n}") for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: [2.0 * (n * 1000 + turn) for turn in range(50)] for n in range(6)}
    assert sum(rows for _, rows in notes.batches) == 6 * sum(1 + turn % 3 for turn in range(50))
    assert engine.status()["urgent_rows"] == 0


def test_closing_waits_for_a_batch_that_a_caller_runs(noting):
    engine, notes = noting
    notes.gate = threading.Event()
    answers: list[object] = []
    caller = threading.Thread(
        target=lambda: (as_the_lane(), answers.append(engine.run(flow(1)).value.tolist()))
    )
    caller.start()
    assert notes.inside.wait(60)
    closer = threading.Thread(target=engine.close)
    closer.start()
    assert engine.state in ("running", "closing")
    notes.gate.set()
    closer.join(60)
    caller.join(60)
    assert answers == [[[2.0] * 4]]
    assert engine.state == "closed"
