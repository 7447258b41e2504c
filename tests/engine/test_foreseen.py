"""What a flow asks next, asked for it as soon as its call is answered."""

import asyncio
import threading

import pytest
import torch
from torch import nn

from plinth.engine import (
    Call,
    Engine,
    InputError,
    Model,
    ModelSpec,
    QueueFull,
    Sla,
    TensorSpec,
    Tiling,
)

SOON = Sla(deadline_ms=10_000)
RAN: list[str] = []
ROWS = torch.arange(8.0).reshape(2, 4)


class Double(nn.Module):
    def forward(self, x):
        RAN.append("rows")
        return x * 2


class Slow(nn.Module):
    """A window that a lane is busy with until somebody lets it end."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.free = threading.Event(), threading.Event()

    def forward(self, x):
        if bool((x == 7).any()):
            RAN.append("window")
            self.begun.set()
            self.free.wait(10)
        return x


@pytest.fixture
def slow():
    RAN.clear()
    return Slow()


@pytest.fixture
def engine(slow):
    with Engine(threads=1) as engine:
        rows = {"inputs": (TensorSpec(name="x", shape=(4,)),)}
        spec = ModelSpec(name="double", outputs=(TensorSpec(name="y", shape=(4,)),), **rows)
        engine.add(Model(spec, Double()), batch_range=(1, 64), sla=SOON, backend="eager")
        cube = (TensorSpec(name="x", shape=(1, 2, 2, 2)),)
        spec = ModelSpec(name="slow", inputs=cube, outputs=(cube[0].model_copy(),))
        engine.add(Model(spec, slow), batch_range=(1, 1), backend="eager")
        yield engine
        slow.free.set()


class Beside:
    """Windows that wait, so that one would begin between two questions of a flow."""

    def __init__(self, engine, slow):
        self.engine, self.slow = engine, slow

    def __enter__(self):
        volume = torch.full((1, 2, 2, 16), 7.0)
        self.volume = self.engine.submit(Call("slow", volume, Tiling((2, 2, 2), overlap=0.0)))
        assert self.slow.begun.wait(10)
        admit = self.engine._batcher.admit

        def admitted(work, now):
            refusal = admit(work, now)
            if work.sla.deadline_ms is not None:
                self.slow.free.set()  # the window ends now
            return refusal

        self.engine._batcher.admit = admitted
        return self

    def __exit__(self, *_):
        self.slow.free.set()
        self.volume.result(10)


def flow(then, ask=None):
    """Two calls; ``ask``: what the second one is, by what was foreseen."""
    seen = []

    def remembered(output):
        seen.append(then(output))
        return seen[-1]

    first = yield Call("double", ROWS, then=remembered)
    foreseen = seen[-1] if seen else None
    call = ask(first) if ask is not None else foreseen or then(first)
    second = None if call is None else (yield call)
    return first, second, foreseen is not None


def again(output):
    return Call("double", output + 1)


def driven(engine, slow, made, how):
    """Drive a flow that comes while a window runs, which ends then."""
    with Beside(engine, slow):
        if how == "loop":
            return asyncio.run(engine.run_async(made, SOON)).value
        return engine.run(made, SOON).value


@pytest.mark.parametrize("how", ["loop", "thread"])
def test_it_is_asked_before_the_next_window_and_answered_as_if_the_flow_had(engine, slow, how):
    first, second, was_foreseen = driven(engine, slow, flow(again), how)
    assert was_foreseen
    assert first.tolist() == (ROWS * 2).tolist()
    assert second.tolist() == ((ROWS * 2 + 1) * 2).tolist()
    ran = RAN[RAN.index("window") :]
    assert ran[:4] == ["window", "rows", "rows", "window"]


@pytest.mark.parametrize("how", ["loop", "thread"])
@pytest.mark.parametrize("ask", [lambda first: Call("double", first * 0), lambda first: None])
def test_a_flow_that_asks_another_thing_or_nothing_has_that(engine, slow, how, ask):
    _, second, was_foreseen = driven(engine, slow, flow(again, ask), how)
    assert was_foreseen
    assert second is None or not second.any()
    assert not engine._requests


def wrong(output):
    raise ZeroDivisionError


@pytest.mark.parametrize("then", [wrong, lambda output: Call("double", torch.ones(1, 9)), str])
def test_what_cannot_be_foreseen_is_told_where_the_flow_asks_it(engine, slow, then):
    _, second, _ = driven(engine, slow, flow(then, again), "loop")
    assert second.tolist() == ((ROWS * 2 + 1) * 2).tolist()


def test_what_was_foreseen_and_refused_is_raised_in_the_flow(engine, slow):
    def large(output):
        return Call("double", torch.ones(1 << 13, 4))

    def asks():
        seen = []
        yield Call("double", ROWS, then=lambda output: seen.append(large(output)) or seen[0])
        try:
            yield seen[0]
        except QueueFull as error:
            return type(error).__name__

    assert driven(engine, slow, asks(), "loop") == "QueueFull"


def test_nothing_is_foreseen_where_no_background_work_waits(engine):
    _, second, was_foreseen = engine.run(flow(again), SOON).value
    assert not was_foreseen
    assert second.tolist() == ((ROWS * 2 + 1) * 2).tolist()
    with pytest.raises(InputError):
        engine.run(flow(lambda output: Call("double", torch.ones(1, 9))), SOON)


def test_a_flow_that_is_cancelled_takes_what_was_foreseen_with_it(engine, slow):
    async def cancelled():
        def then(output):
            loop.call_soon_threadsafe(task.cancel)
            return again(output)

        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(engine.run_async(flow(then), SOON))
        with pytest.raises(asyncio.CancelledError):
            await task

    with Beside(engine, slow):
        asyncio.run(cancelled())
    assert not engine._requests
