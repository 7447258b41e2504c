"""Models ready on the device: compiled as asked, measured, bounded, and seen in the metrics."""

import asyncio
import json
import time

import pytest
import torch
from torch import nn

from plinth.engine import (
    Call,
    Closed,
    ConfigError,
    DeadlineRefused,
    Engine,
    Model,
    ModelSpec,
    Sla,
    TensorSpec,
    Tiling,
)
from plinth.engine.backends import prepare
from plinth.engine.backends.base import Wrapped
from plinth.engine.backends.blocks import Blocks, _plan
from plinth.engine.devices.device import pick
from plinth.engine.errors import OutOfMemory
from plinth.engine.metrics import REGISTRY
from plinth.engine.runtime.batch_range import find
from tests.engine import fake_accelerator
from tests.engine.conftest import DEVICE


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))


def model(name: str, module: nn.Module, outputs: tuple[str, ...] = ("y",)) -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=tuple(TensorSpec(name=output, shape=(4,)) for output in outputs),
    )
    return Model(spec, module.eval())


class Double(nn.Module):
    def forward(self, x):
        return x * 2


class SumAndDifference(nn.Module):
    def forward(self, x):
        return x + 1, x - 1


class Small(nn.Module):
    """Has memory for so many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x):
        if len(x) > self.rows:
            raise MemoryError(f"{len(x)} rows")
        return x * 2


class Quadratic(nn.Module):
    """Costs most per row at the ends: a fixed part, and one that grows with the square."""

    def forward(self, x):
        n = len(x)
        work = torch.ones(200 + n * n // 8, 64)
        return x * 2 + 0 * (work @ work.T[:, :64]).sum()


def call(name: str, rows: torch.Tensor):
    return (yield Call(name, rows))


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.cpu
def test_backend_and_precision_are_the_engines_unless_a_model_names_its_own():
    engine = Engine(backend="onnxruntime")
    engine.add(model("plain", nn.Linear(4, 4)))
    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine.add(model("other", two), backend="eager", precision="bf16")
    with engine:
        status = engine.status()["models"]
        assert (status["plain"]["backend"], status["plain"]["precision"]) == ("onnxruntime", "fp32")
        assert (status["other"]["backend"], status["other"]["precision"]) == ("eager", "bf16")
        assert engine.run(call("plain", torch.ones(3, 4))).value.shape == (3, 4)
        with pytest.raises(ConfigError, match="no backend 'onnxruntim'"):
            engine.add(model("wrong", nn.Linear(4, 4)), backend="onnxruntim")


def test_a_model_with_several_outputs_answers_by_name():
    with Engine() as engine:
        engine.add(model("both", SumAndDifference(), ("sum", "difference")))
        value = engine.run(call("both", torch.ones(300, 4))).value
    assert value["sum"].sum() == 300 * 8
    assert value["difference"].abs().sum() == 0


def test_what_does_not_fit_is_run_in_halves_and_nothing_is_lost():
    module = Small(128)
    engine = Engine()
    engine.add(model("small", module))
    module.rows = 5
    rows = torch.arange(400.0).reshape(100, 4)
    with engine:
        assert torch.equal(engine.run(call("small", rows)).value, rows * 2)
        assert engine.status()["models"]["small"]["largest_batch"] <= 5
        assert metric("plinth_out_of_memory_total", model="small") >= 1
        module.rows = 0
        with pytest.raises(OutOfMemory, match="one row does not fit"):
            engine.run(call("small", rows))


class Widening(nn.Module):
    """Takes 4 KiB a row on the way."""

    def forward(self, x):
        return x.repeat(1, 256).reshape(len(x), 256, -1).mean(1)


@pytest.mark.skipif(DEVICE != "fake", reason="fills the fake device")
def test_a_device_that_is_full_is_given_halves_and_nothing_is_lost():
    engine = Engine()
    engine.add(model("widening", Widening()), batch_range=(1, 64))
    rows = torch.arange(256.0).reshape(64, 4)
    fake_accelerator.CAPACITY.append(20 << 10)
    try:
        with engine:
            calls = [engine.submit(Call("widening", rows)) for _ in range(4)]
            assert all(torch.equal(call.result(60).value, rows) for call in calls)
            assert engine.status()["models"]["widening"]["largest_batch"] <= 5
            assert metric("plinth_out_of_memory_total", model="widening") >= 1
            fake_accelerator.CAPACITY[-1] = 1 << 10
            with pytest.raises(OutOfMemory, match="one row does not fit"):
                engine.submit(Call("widening", rows[:1])).result(60)
    finally:
        fake_accelerator.CAPACITY.clear()


@pytest.mark.cpu
def test_the_automatic_way_of_a_model_of_blocks_is_the_same_in_every_process():
    plain = model("by-rule", nn.Linear(4, 4))
    blocks = Model(plain.spec.model_copy(update={"block": 8}), plain.module)
    engine = Engine(backend="auto", precision="auto")
    engine.add(blocks)
    status = engine.status()["models"]["by-rule"]
    assert (status["backend"], status["precision"]) == ("onnxruntime", "fp32")
    assert status["reason"] == "as asked for"


class Counted(nn.Module):
    """Twice the rows; keeps how many came each time."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return 2 * x


def test_a_model_of_blocks_always_gets_so_many_rows_and_each_caller_its_own():
    counted = Counted()
    plain = model("in-blocks", counted)
    blocks = Model(plain.spec.model_copy(update={"block": 8}), counted)
    with Engine() as engine:
        engine.add(blocks, batch_range=(1, 20))
        ready = engine.run(call("in-blocks", torch.zeros(1, 4))) and len(counted.seen)
        for rows in (1, 7, 8, 9, 50):
            x = torch.randn(rows, 4)
            assert torch.equal(engine.run(call("in-blocks", x)).value, 2 * x)
    assert set(counted.seen[ready:]) == {8}
    assert len(counted.seen) - ready == 1 + 1 + 1 + 2 + 8  # 50 rows are batches of 20, 20 and 10


class Kernels(Wrapped):
    """A library whose forwards of many rows add an error, or give the same for every row."""

    def __init__(self, inner, error=0.0, blind=False, of=None):
        super().__init__(inner)
        self.error, self.blind, self.of, self.seen = error, blind, of, []

    def run(self, inputs):
        rows = len(inputs["x"])
        self.seen.append(rows)
        found = inputs["x"] * (not self.blind)
        if rows == (self.of or rows):
            found[8:9] += self.error
        return {"y": found}

    def is_native(self, rows):
        return True


@pytest.mark.parametrize("how", [{}, {"error": 1e-3}, {"blind": True}])
def test_blocks_go_together_where_a_trial_saw_the_same_bits(how):
    plain = model("in-blocks", nn.Identity())
    kernels = Kernels(prepare(plain, pick("cpu"), "fp32", "eager"), **how)
    blocks = Blocks(kernels, 8).widened(plain.spec)
    assert blocks.sizes == (() if how else (128, 64, 32, 16))
    kernels.seen.clear()
    rows = torch.randn(205, 4)
    found = blocks.run({"x": rows})["y"]
    assert kernels.seen == ([8] * 26 if how else [128, 64, 16])
    assert torch.equal(found, rows * (not how.get("blind")))
    assert blocks.run({"x": rows[:8]})["y"].shape == (8, 4)


@pytest.mark.parametrize(
    ("count", "fixed", "wanted"),
    [
        (3, 0.0, (2, 1)),
        (3, 1.5, (4,)),  # a forward of four takes less than two that fit
        (20, 2.0, (16, 4)),
        (31, 2.0, (16, 16)),
        (0, 2.0, ()),
        (100, 0.0, (16, 16, 16, 16, 16, 16, 4)),
    ],
)
def test_forwards_are_filled_up_where_fewer_take_less(count, fixed, wanted):
    assert _plan(count, (16, 8, 4, 2, 1), fixed) == wanted


def test_a_size_with_other_bits_is_left_out():
    plain = model("in-blocks", nn.Identity())
    kernels = Kernels(prepare(plain, pick("cpu"), "fp32", "eager"), error=1e-3, of=64)
    assert Blocks(kernels, 8).widened(plain.spec).sizes == (128, 32, 16)


@pytest.mark.cpu
def test_a_row_has_the_same_bits_alone_and_among_many_on_onnx_runtime():
    layers = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 4))
    plain = model("bits", layers)
    blocks = Model(plain.spec.model_copy(update={"block": 32}), plain.module)
    rows = torch.randn(301, 4)
    with Engine(backend="onnxruntime") as engine:
        engine.add(blocks, batch_range=(1, 301))
        together = engine.run(call("bits", rows)).value
        alone = torch.cat([engine.run(call("bits", row[None])).value for row in rows[::7]])
    assert torch.equal(together[::7], alone)


def test_a_model_that_exceeds_the_budget_is_refused_with_its_bytes():
    with pytest.raises(OutOfMemory, match="160000 bytes of weights, the budget is 100000"):
        Engine(memory_budget=100_000).add(model("large", Wide()))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 10_000))

    def forward(self, x):
        return x + 0 * (x @ self.weight).sum(1, keepdim=True)


@pytest.mark.cpu
def test_what_compiling_takes_at_its_peak_is_part_of_the_budget():
    spec = ModelSpec(
        name="wide",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(400_000,)),),
    )
    wide = Model(spec, nn.Linear(4, 400_000).eval())
    weights = 4 * 5 * 400_000
    with Engine(backend="onnxruntime", memory_budget=5 * weights // 2) as engine:
        said = rf"compiling wide with onnxruntime takes about {3 * weights} bytes at its peak"
        with pytest.raises(OutOfMemory, match=said) as refusal:
            engine.add(wide)
        assert (refusal.value.needed, refusal.value.available) == (3 * weights, 5 * weights // 2)
        engine.add(wide, backend="auto", batch_range=(1, 1))
        assert engine.status()["models"]["wide"]["backend"] == "eager"


@pytest.mark.cpu
@pytest.mark.clock
def test_the_knee_of_the_throughput_curve_is_found_and_remembered():
    quadratic = model("quadratic", Quadratic())
    executable = prepare(quadratic, pick("cpu"), "fp32", "eager", threads=1)
    found = find(executable, quadratic.spec.example, 512)
    rate = {rows: rows / seconds for rows, seconds in found.seconds.items()}
    assert 1 < found.most < 512
    assert rate[found.most] >= 0.8 * max(rate.values())

    first, second = Engine(threads=1), Engine(threads=1)
    first.add(quadratic, batch_range="auto")
    begun = time.process_time()
    second.add(quadratic, batch_range="auto")
    assert time.process_time() - begun < 1.0, "it was measured again"
    sizes = [e.status()["models"]["quadratic"]["largest_batch"] for e in (first, second)]
    assert sizes[0] == sizes[1] < 512


@pytest.mark.cpu
def test_metrics_tell_outcomes_batches_and_causes():
    with Engine() as engine:
        engine.add(model("counted", Double()), sla=Sla(deadline_ms=1000))
        engine.run(call("counted", torch.ones(3, 4)))
        with pytest.raises(DeadlineRefused):
            engine.run(call("counted", torch.ones(3, 4)), Sla(deadline_ms=1e-6))
    assert metric("plinth_calls_total", model="counted", outcome="answered") == 1
    assert metric("plinth_calls_total", model="counted", outcome="deadline") == 1
    assert metric("plinth_sla_misses_total", model="counted", cause="deadline") == 1
    assert metric("plinth_batch_rows_sum", model="counted") == 3
    assert metric("plinth_call_seconds_count", model="counted") == 1
    assert metric("plinth_device_busy_seconds_total", device="cpu") > 0
    assert metric("plinth_device_bytes", device="cpu", kind="available") > 1e6


def test_an_answer_after_its_deadline_is_counted_with_its_cause():
    module = Small(128)
    engine = Engine()
    engine.add(model("slow", module), sla=Sla(deadline_ms=30))
    product = torch.ones(300, 300)
    forward = module.forward

    def slow(x):
        until = time.perf_counter() + 0.06
        while time.perf_counter() < until:
            product @ product
        return forward(x)

    module.forward = slow
    with engine:
        assert engine.run(call("slow", torch.ones(1, 4))).late
    assert metric("plinth_sla_misses_total", model="slow", cause="slow_batch") == 1


def test_closing_without_draining_fails_what_waits():
    engine = Engine()
    spec = ModelSpec(
        name="windows",
        inputs=(TensorSpec(name="x", shape=(1, 4, 4, 4)),),
        outputs=(TensorSpec(name="y", shape=(1, 4, 4, 4)),),
    )
    engine.add(Model(spec, Double().eval()), batch_range=(1, 1))
    engine.start()
    future = engine.submit(Call("windows", torch.zeros(1, 96, 96, 96), Tiling((4, 4, 4))))
    engine.close(drain=False)
    with pytest.raises(Closed):
        future.result(timeout=0)


def test_many_flows_of_one_event_loop_get_their_own_answers_and_may_be_cancelled():
    async def main(engine: Engine) -> list[bool]:
        async def ask(number: int) -> bool:
            rows = torch.full((1, 4), float(number))
            answer = await engine.run_async(call("double", rows))
            return torch.equal(answer.value, rows * 2)

        tasks = [asyncio.create_task(ask(number)) for number in range(300)]
        await asyncio.wait(tasks[:1])
        late = asyncio.create_task(ask(1))
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        return await asyncio.gather(*tasks)

    with Engine() as engine:
        engine.add(model("double", Double()), sla=Sla(deadline_ms=5000))
        assert all(asyncio.run(main(engine)))


@pytest.mark.cpu
def test_costs_learned_are_kept_for_the_next_run(tmp_path):
    path = tmp_path / "latency.json"
    with Engine(latency_file=path) as engine:
        engine.add(model("kept", Double()))
        engine.run(call("kept", torch.ones(3, 4)))
    (key,) = json.loads(path.read_text())["seconds"]
    assert key.startswith("kept@1#")
    assert key.endswith("/cpu/eager/fp32")
    Engine(latency_file=path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not a latency file"):
        Engine(latency_file=path)
