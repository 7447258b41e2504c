"""The life of an engine: started, idle, closed, by whichever thread and however often."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from plinth.engine import Call, Closed, Engine, EngineFailed, Model, ModelSpec, Sla, TensorSpec
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel


class Double(nn.Module):
    def forward(self, x):
        return x * 2


class Held(nn.Module):
    """Waits in the forward until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def forward(self, x):
        self.entered.set()
        assert self.go.wait(30)
        return x * 2


def model(module: nn.Module, name: str = "double") -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    return Model(spec, module.eval())


def double(name: str = "double"):
    return (yield Call(name, torch.ones(1, 4)))


def device_thread() -> threading.Thread:
    """Of the engine that was started last."""
    return [t for t in threading.enumerate() if t.name == "plinth-device"][-1]


def held(engine: Engine, module: Held):
    """One call in the forward, one behind it."""
    engine.add(model(module))
    engine.start()
    module.go.clear()
    module.entered.clear()
    first = engine.submit(Call("double", torch.ones(1, 4)))
    assert module.entered.wait(30)
    return first, engine.submit(Call("double", torch.ones(1, 4)))


@pytest.mark.parametrize("drain", [True, False])
def test_many_threads_may_close_at_once_and_each_returns_when_the_engine_has_ended(drain, tmp_path):
    engine, module = Engine(latency_file=tmp_path / "latency.json"), Held()
    first, second = held(engine, module)
    thread, together = device_thread(), threading.Barrier(9)

    def close() -> bool:
        together.wait(30)
        engine.close(drain=drain)
        return thread.is_alive()

    with ThreadPoolExecutor(8) as pool:
        closing = [pool.submit(close) for _ in range(8)]
        together.wait(30)
        module.go.set()
        assert [closed.result(30) for closed in closing] == [False] * 8
    assert first.result(0).value.sum() == 8
    if drain:
        assert second.result(0).value.sum() == 8
    assert not engine.status()["running"]
    assert not list(tmp_path.glob("*.part"))


def test_a_callback_in_the_device_thread_may_close_the_engine():
    engine, module = Engine(), Held()
    first, second = held(engine, module)
    thread = device_thread()
    first.add_done_callback(lambda _: engine.close())
    module.go.set()
    assert second.result(30).value.sum() == 8
    engine.close()
    assert not thread.is_alive()


@pytest.mark.parametrize("drain", [True, False])
def test_a_batch_that_hangs_keeps_nobody_who_closes_and_nobody_who_waits(drain):
    engine, module = Engine(hung_seconds=0.05), Held()
    asked = held(engine, module)
    thread = device_thread()
    for _ in range(2):
        with pytest.raises(EngineFailed, match=r"the batch on \w+(:0)?/0 does not end") as caught:
            engine.close(drain=drain)
        assert "end the process" in caught.value.hint
    with pytest.raises(EngineFailed, match="does not end"):
        engine.start()
    told = [future.exception(30) for future in asked]
    assert [type(error) for error in told] == [EngineFailed, EngineFailed if drain else Closed]
    module.go.set()
    thread.join(30)
    with engine:  # what hung has come back after all
        assert engine.run(double()).value.sum() == 8


def test_a_batch_that_takes_as_long_as_it_should_is_awaited():
    engine, module = Engine(hung_seconds=0.05), Held()
    first, second = held(engine, module)
    for lane in engine._batcher.lanes:
        lane.busy_until += 10.0
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(engine.close)
        with pytest.raises(TimeoutError):
            closing.result(0.5)
        module.go.set()
        closing.result(30)
    assert (first.result(0).value.sum(), second.result(0).value.sum()) == (8, 8)


def test_what_comes_before_the_start_or_after_the_end_is_told_so():
    engine = Engine()
    engine.add(model(Double()))
    with pytest.raises(Closed, match="before it is started") as caught:
        engine.run(double())
    assert "start()" in caught.value.hint
    with engine:
        engine.run(double())
    engine.close()
    for late in (lambda: engine.run(double()), lambda: engine.add(model(Double(), "other"))):
        with pytest.raises(Closed, match="was closed") as caught:
            late()
        assert "start() starts it again" in caught.value.hint
    with engine:
        assert engine.run(double()).value.sum() == 8


def watch(seconds: float) -> None:
    """Let the engine be for a stretch of time which is itself what a test is about."""
    threading.Event().wait(seconds)


def test_an_idle_engine_never_wakes():
    """Its thread's CPU time stands still; one turn of its loop would cost microseconds."""
    with Engine(Batcher(LatencyModel())) as engine:
        engine.add(model(Double()), sla=Sla(deadline_ms=5000))
        clock = time.pthread_getcpuclockid(device_thread().ident)
        engine.run(double())
        before = -1.0
        while before != (before := time.clock_gettime(clock)):
            watch(0.05)  # the turn that answered ends
        watch(1.0)
        assert time.clock_gettime(clock) == before


@pytest.mark.cpu
def test_a_fork_of_the_process_of_an_engine_is_told_so_and_leaves_it_alone():
    with Engine(devices=["process:cpu"], threads=1) as engine:
        engine.add(model(Double()))
        child = os.fork()
        if not child:
            code = 1
            try:
                for work in (lambda: engine.run(double()), engine.start):
                    with pytest.raises(EngineFailed, match="of which this is a fork"):
                        work()
                engine.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for _ in range(3):
            assert torch.equal(engine.run(double()).value, torch.full((1, 4), 2.0))


@pytest.mark.cpu
def test_a_lane_that_is_ready_after_the_engine_was_closed_is_ended(monkeypatch):
    engine = Engine(device="cpu", threads=1).start()
    prepare, lanes = engine._lanes.prepare, []

    def late(lane):
        thread = prepare(lane)
        engine.close()
        lanes.append(lane)
        return thread

    monkeypatch.setattr(engine._lanes, "prepare", late)
    with pytest.raises(Closed):
        engine.add_lane("process:cpu")
    assert lanes[0].pid is None
    assert [lane["state"] for lane in engine.status()["lanes"]] == ["stopped"]
