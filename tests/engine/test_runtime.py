"""Flows through the real device thread."""

import asyncio
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from plinth.engine import (
    Call,
    DeadlineRefused,
    Engine,
    InputError,
    Model,
    ModelError,
    ModelSpec,
    Refused,
    Sla,
    TensorSpec,
    Tiling,
)


def model(name: str, module: nn.Module, shape=(4,), **facts) -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
        **facts,
    )
    return Model(spec, module.eval())


class Double(nn.Module):
    def forward(self, x):
        return x * 2


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such kernel")


def double(rows):
    return (yield Call("double", rows))


@pytest.fixture
def engine():
    made = Engine()
    made.add(model("double", Double()), sla=Sla(deadline_ms=5000))
    made.add(model("volume", Double(), (1, 4, 4, 4)), batch_range=(1, 4))
    made.add(model("broken", Double()))
    made._models.get("broken").model.module.forward = Broken().forward
    with made:
        yield made


def test_a_flow_is_answered_with_its_timing(engine):
    answer = engine.run(double(torch.ones(3, 4)))
    assert torch.equal(answer.value, torch.full((3, 4), 2.0))
    assert answer.models == {"double": "1"}
    assert answer.timing.batch_rows >= 3
    assert answer.timing.total >= answer.timing.device > 0


def test_many_callers_share_batches_and_each_gets_its_own_rows(engine):
    def ask(number: int) -> bool:
        rows = torch.full((1 + number % 5, 4), float(number))
        return torch.equal(engine.run(double(rows)).value, rows * 2)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))


def test_a_volume_is_cut_run_and_blended(engine):
    def flow(volume):
        return (yield Call("volume", volume, Tiling((4, 4, 4), overlap=0.5)))

    volume = torch.randn(1, 9, 11, 6)
    torch.testing.assert_close(engine.run(flow(volume)).value, volume * 2, rtol=1e-4, atol=1e-4)


def test_calls_larger_than_a_batch_are_split_and_joined_in_order(engine):
    rows = torch.arange(1200.0).reshape(300, 4)
    assert torch.equal(engine.run(double(rows)).value, rows * 2)


def test_the_event_loop_door(engine):
    async def both():
        return await asyncio.gather(
            *(engine.run_async(double(torch.ones(1, 4))) for _ in range(20))
        )

    assert all(answer.value.sum() == 8 for answer in asyncio.run(both()))


def test_nothing_is_kept_of_event_loops_that_are_closed(engine):
    loops = []

    async def once():
        loops.append(ref(asyncio.get_running_loop()))
        return await engine.run_async(double(torch.ones(1, 4)))

    for _ in range(20):
        asyncio.run(once())
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


def test_a_hopeless_deadline_is_refused_with_the_reason(engine):
    with pytest.raises(DeadlineRefused, match="the deadline is 0"):
        engine.run(double(torch.ones(1, 4)), Sla(deadline_ms=1e-6))


def test_the_promise_of_a_flow_counts_from_its_arrival_over_all_its_calls(engine):
    """Each call in time of itself is not enough: who asked waits for the flow."""
    seen = []

    def endless():
        while True:
            seen.append((yield Call("double", torch.ones(1, 4))))

    with pytest.raises(DeadlineRefused, match=r"the deadline is 100\.0 ms"):
        engine.run(endless(), Sla(deadline_ms=100))
    assert seen  # the first ones were in time
    with pytest.raises(DeadlineRefused, match=r"the deadline is 100\.0 ms"):
        asyncio.run(engine.run_async(endless(), Sla(deadline_ms=100)))


def test_a_flow_that_ends_after_its_promise_is_late_though_its_call_was_not():
    added = [0.0]

    def slow_end():
        found = yield Call("double", torch.ones(1, 4))
        added[0] = 30.0
        return found

    made = Engine(clock=lambda: time.monotonic() + added[0])
    made.add(model("double", Double()))
    with made:
        assert made.run(slow_end(), Sla(deadline_ms=20_000)).late
        assert not made.run(double(torch.ones(1, 4)), Sla(deadline_ms=20_000)).late


def test_overload_may_run_a_cheaper_model_and_says_so():
    made = Engine()
    made.add(model("double", Double(), cheaper="half"))
    made.add(model("half", Double()))
    made._batcher.latency.seed(made._models.get("double").key, 1, 9.0)
    with made:
        answer = made.run(double(torch.ones(1, 4)), Sla(deadline_ms=1000, on_overload="degrade"))
    assert answer.degraded == {"double": "half"}


def test_a_failing_model_tells_its_callers_and_the_engine_goes_on(engine):
    def flow():
        return (yield Call("broken", torch.ones(1, 4)))

    with pytest.raises(ModelError, match="broken failed on 1 rows: RuntimeError"):
        engine.run(flow())
    assert engine.run(double(torch.ones(1, 4))).value.sum() == 8


def test_a_flow_may_handle_a_refusal(engine):
    def careful():
        try:
            yield Call("double", torch.ones(1, 4))
        except Refused as error:
            return error.reason

    assert engine.run(careful(), Sla(deadline_ms=1e-6)).value == "deadline"


def test_bad_calls_are_named(engine):
    with pytest.raises(InputError, match="input x"):
        engine.run(double(torch.ones(1, 5)))
    with pytest.raises(ModelError, match="no rows"):
        engine.run(double(torch.ones(0, 4)))


@pytest.mark.parametrize("junk", [None, 5, [], [Call("double", torch.ones(1, 4))]])
def test_a_flow_that_yields_what_is_no_call_is_told_so(engine, junk):
    def flow():
        yield junk

    with pytest.raises(TypeError, match="expected one Call or Compute at a time"):
        engine.run(flow())


def test_rows_that_are_no_tensors_are_named(engine):
    with pytest.raises(InputError, match="rows of x are of type ndarray, expected a tensor"):
        engine.run(double(np.ones((1, 4), np.float32)))


class Tagged(torch.Tensor):
    """As other libraries carry what they know of an image."""


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (torch.ones(2, 4, device="meta"), "meta"),
        (torch.ones(2, 4).to_sparse(), "sparse_coo"),
        (torch.ones(2, 4).to_mkldnn(), "_mkldnn"),
        (torch.nested.nested_tensor([torch.ones(4)] * 2, layout=torch.jagged), "nested"),
        (FakeTensorMode().from_tensor(torch.ones(2, 4)), "FakeTensor"),
    ],
)
def test_tensors_without_values_of_their_own_are_refused_by_their_kind(engine, rows, kind):
    with pytest.raises(InputError, match=f"rows of x are a tensor of kind {kind}, expected"):
        engine.run(double(rows))


@pytest.mark.parametrize(
    "rows", [nn.Parameter(torch.ones(2, 4)), torch.ones(2, 4).as_subclass(Tagged)]
)
def test_classes_of_other_libraries_are_read_and_answered_as_plain_tensors(engine, rows):
    answer = engine.run(double(rows)).value
    assert type(answer) is torch.Tensor
    assert answer.tolist() == [[2.0] * 4] * 2


def test_a_flow_that_is_over_is_no_flow_without_an_answer(engine):
    flow = double(torch.ones(1, 4))
    assert engine.run(flow).value.sum() == 8
    with pytest.raises(TypeError, match="make a new one for each run"):
        engine.run(flow)
    begun = double(torch.ones(1, 4))
    next(begun)  # as another thread's run does
    with pytest.raises(TypeError, match="make a new one for each run"):
        engine.run(begun)


class Changes(nn.Module):
    """Breaks its contract on some rows, as a model that squeezes or filters does."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def forward(self, x):
        return self.broken(x) if bool((x[:, 0] == 99).any()) else x * 2


@pytest.mark.parametrize(
    ("broken", "got"),
    [
        (lambda x: x[:, :2], r"\(2, 2\) float32"),
        (lambda x: x.unsqueeze(1), r"\(2, 1, 4\) float32"),
        (lambda x: x > 0, r"\(2, 4\) bool"),
        (lambda x: x[:1], r"\(1, 4\) float32"),
        (lambda x: x.to("meta"), "a tensor without values"),
        pytest.param(  # the fake device has no sparse tensors
            lambda x: x.to_sparse(), "a tensor of torch.sparse_coo", marks=pytest.mark.cpu
        ),
    ],
)
def test_outputs_that_are_not_as_the_contract_says_are_refused(engine, broken, got):
    engine.add(model("changes", Changes(broken)), backend="eager")

    def ask(rows):
        return (yield Call("changes", rows))

    with pytest.raises(ModelError, match=rf"output y is {got} for 2 rows, expected \(2, 4\)"):
        engine.run(ask(torch.full((2, 4), 99.0)))
    assert engine.run(ask(torch.ones(2, 4))).value.sum() == 16
    with pytest.raises(ModelError, match="expected"):
        engine.add(model("wrong", nn.Flatten(0)), backend="eager")


def test_cancelled_work_leaves_the_queue(engine):
    future = engine.submit(Call("volume", torch.zeros(1, 64, 64, 64), Tiling((4, 4, 4))))
    assert future.cancel()
    assert engine.run(double(torch.ones(1, 4))).value.sum() == 8
    assert engine.status()["background_rows"] == 0


def test_closing_answers_everything_accepted():
    made = Engine()
    made.add(model("double", Double()))
    made.start()
    futures = [made.submit(Call("double", torch.ones(1, 4))) for _ in range(200)]
    made.close()
    assert all(future.result(timeout=0).value.sum() == 8 for future in futures)
    with pytest.raises(Refused, match="no new work"):
        made.run(double(torch.ones(1, 4)))


class Halve(nn.Module):
    def forward(self, x):
        return x[..., ::2]


def test_a_model_that_shrinks_its_windows_is_named_and_the_engine_goes_on(engine):
    spec = ModelSpec(
        name="halve",
        inputs=(TensorSpec(name="x", shape=(1, 4, 4, 4)),),
        outputs=(TensorSpec(name="y", shape=(1, 4, 4, None)),),
    )
    engine.add(Model(spec, Halve().eval()))

    def flow():
        return (yield Call("halve", torch.ones(1, 8, 8, 8), Tiling((4, 4, 4))))

    with pytest.raises(InputError, match=r"windows of \(4, 4, 4\) into \(4, 4, 2\)"):
        engine.run(flow())
    assert engine.run(double(torch.ones(1, 4))).value.sum() == 8


def test_a_volume_that_is_none_is_named(engine):
    def flow(volume):
        return (yield Call("volume", volume, Tiling((4, 4, 4))))

    with pytest.raises(InputError, match="a volume"):
        engine.run(flow(torch.ones(8, 8)))
    with pytest.raises(InputError, match="input x"):
        engine.run(flow(torch.ones(3, 8, 8, 8)))


def test_shapes_that_differ_are_never_put_into_one_batch():
    made = Engine()
    made.add(model("any", Double(), (None, None)), sla=Sla(deadline_ms=5000))
    made.start()
    sizes = [(1 + number % 3, 2 + number % 5) for number in range(60)]
    futures = [made.submit(Call("any", torch.ones(2, *size))) for size in sizes]
    for size, future in zip(sizes, futures, strict=True):
        assert torch.equal(future.result(timeout=10).value, torch.full((2, *size), 2.0))
    made.close()


def test_a_degraded_call_of_any_shape_goes_to_the_cheaper_model():
    made = Engine()
    made.add(model("any", Double(), (None,), cheaper="half"), batch_range=(1, 8))
    made.add(model("half", Double(), (None,)))
    made._batcher.latency.seed(made._models.get("any").key + "[x=4]", 1, 9.0)
    with made:
        sla = Sla(deadline_ms=1000, on_overload="degrade")
        answer = made.run((call for call in [Call("any", torch.ones(1, 4))]), sla)
    assert answer.degraded == {"any": "half"}
