"""On an accelerator: rows staged in pinned memory, batches in flight, graphs, a device that fails.

``PLINTH_TEST_DEVICE=fake`` (or ``cuda``) ``pytest tests/engine/test_pipeline.py``.
"""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from plinth.engine import (
    Call,
    Cancelled,
    DeviceError,
    Engine,
    EngineFailed,
    Model,
    ModelError,
    ModelSpec,
    Sla,
    TensorSpec,
)
from plinth.engine.devices import staging
from plinth.engine.devices.device import Device, pick
from plinth.engine.devices.staging import Launched

pytestmark = pytest.mark.skipif(pick("auto").kind == "cpu", reason="needs an accelerator")
WAIT = 60


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path_factory.mktemp("cache")))


class Double(nn.Module):
    calls = 0

    def forward(self, x):
        Double.calls += 1
        return x * 2


class Waits(nn.Module):
    """Waits for the device, which no graph can."""

    def forward(self, x):
        return x * 2 if float(x.sum()) < 1e9 else x


class Picky(nn.Module):
    """Raises when it is told to."""

    def __init__(self):
        super().__init__()
        self.broken = False

    def forward(self, x):
        if self.broken:
            raise ValueError("no")
        return x * 2


def model(module: nn.Module, name: str = "net") -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    return Model(spec, module.eval())


def rows(number: int, count: int) -> torch.Tensor:
    return torch.arange(count * 4.0).reshape(count, 4) + 1000 * number


class Gate:
    """Holds back what comes from the device until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.opened = threading.Event()
        self.waiting = threading.Semaphore(0)
        usual = Launched.wait

        def wait(launched):
            self.waiting.release()
            assert self.opened.wait(WAIT)
            return usual(launched)

        monkeypatch.setattr(Launched, "wait", wait)

    def open(self) -> None:
        self.opened.set()


def launches(monkeypatch) -> threading.Semaphore:
    """Released once for each batch that is launched."""
    launched = threading.Semaphore(0)
    usual = staging.Staging.launch

    def launch(self, run, parts):
        found = usual(self, run, parts)
        launched.release()
        return found

    monkeypatch.setattr(staging.Staging, "launch", launch)
    return launched


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_caller_gets_its_own_rows_and_pinned_memory_is_used_again(monkeypatch, depth, graphs):
    asked = []
    usual = Device.pinned
    monkeypatch.setattr(
        Device, "pinned", lambda self, size: asked.append(size) or usual(self, size)
    )
    with Engine(pipeline_depth=depth, graphs=graphs) as engine:
        engine.add(model(Double()))
        futures = [
            engine.submit(Call("net", rows(n, 1 + n % 17)), Sla(deadline_ms=60_000))
            for n in range(200)
        ]
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1 + n % 17))
    assert len(asked) <= 2 * depth  # one buffer each way and batch in flight: 4 KiB hold all
    assert not asked or max(asked) <= 4096


def test_so_many_batches_are_in_flight_and_no_more(monkeypatch):
    with Engine(pipeline_depth=2) as engine:
        engine.add(model(Double()), batch_range=(1, 4))
        gate, launched = Gate(monkeypatch), launches(monkeypatch)
        futures = [engine.submit(Call("net", rows(n, 4)), Sla(60_000)) for n in range(5)]
        for _ in range(2):
            assert launched.acquire(timeout=WAIT)
        assert gate.waiting.acquire(timeout=WAIT)
        assert engine.status()["urgent_rows"] == 3 * 4
        assert not launched.acquire(blocking=False)
        gate.open()
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))


def test_cancelled_and_refused_work_behind_a_batch_in_flight(monkeypatch):
    with Engine(pipeline_depth=1) as engine:
        engine.add(model(Double()), batch_range=(1, 4))
        gate, launched = Gate(monkeypatch), launches(monkeypatch)
        first = engine.submit(Call("net", rows(0, 4)), Sla(60_000))
        assert launched.acquire(timeout=WAIT)
        gone = engine.submit(Call("net", rows(1, 4)), Sla(60_000))
        assert gone.cancel()
        assert engine.status()["urgent_rows"] == 0
        gate.open()
        assert torch.equal(first.result(WAIT).value, 2 * rows(0, 4))
    assert not launched.acquire(blocking=False)
    assert gone.cancelled() or isinstance(gone.exception(), Cancelled)


def test_a_model_that_raises_fails_its_callers_and_the_device_goes_on():
    module = Picky()
    with Engine() as engine:
        engine.add(model(module))
        module.broken = True
        with pytest.raises(ModelError, match="ValueError"):
            engine.submit(Call("net", rows(0, 2))).result(WAIT)
        module.broken = False
        assert torch.equal(
            engine.submit(Call("net", rows(1, 2))).result(WAIT).value, 2 * rows(1, 2)
        )


def test_closing_answers_what_is_in_flight():
    engine = Engine(pipeline_depth=2).start()
    engine.add(model(Double()), batch_range=(1, 4))
    futures = [engine.submit(Call("net", rows(n, 4))) for n in range(40)]
    engine.close()
    for n, future in enumerate(futures):
        assert torch.equal(future.result(0).value, 2 * rows(n, 4))
    assert engine.state == "closed"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_device_that_fails_is_said_to_everybody_and_is_not_started_again(monkeypatch, depth):
    engine = Engine(pipeline_depth=depth).start()
    engine.add(model(Double()), batch_range=(1, 4))

    def lost(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(Device, "failure", lambda _: "device-side assert triggered")
    monkeypatch.setattr(Launched, "wait", lost)
    futures = [engine.submit(Call("net", rows(n, 4))) for n in range(6)]
    for future in futures:
        assert isinstance(future.exception(WAIT), EngineFailed)
    with pytest.raises(DeviceError, match="does nothing any more in this process"):
        engine.start()
    assert engine.failure == "LaneDied"
    monkeypatch.undo()
    with engine:  # had it only looked so
        assert torch.equal(
            engine.submit(Call("net", rows(1, 2))).result(WAIT).value, 2 * rows(1, 2)
        )


def test_graphs_replay_without_the_models_python_where_that_is_faster(monkeypatch):
    monkeypatch.setattr("plinth.engine.runtime.graphs.LOSS", 1e9)  # as if it were
    with Engine(graphs=True) as engine:
        engine.add(model(Double()), batch_range=(1, 12))
        loaded = engine._models.get("net")
        assert [last for _, last in loaded.executable.report["graphs"]["rows"]] == [1, 2, 4, 8, 12]
        calls = Double.calls
        for count in range(1, 13):
            value = engine.submit(Call("net", rows(count, count))).result(WAIT).value
            assert torch.equal(value, 2 * rows(count, count))
        assert Double.calls == calls
        assert loaded.executable.release()
        assert torch.equal(
            engine.submit(Call("net", rows(3, 3))).result(WAIT).value, 2 * rows(3, 3)
        )
        assert Double.calls == calls + 1


def test_numbers_of_rows_that_padding_would_slow_have_graphs_of_their_own(monkeypatch):
    def by_rows(self, run, inputs):
        return len(next(iter(inputs.values())))

    monkeypatch.setattr("plinth.engine.runtime.graphs.Graphed._seconds", by_rows)
    with Engine(graphs=True) as engine:
        engine.add(model(Double()), batch_range=(1, 12))
        kept = engine._models.get("net").executable.report["graphs"]["rows"]
        assert kept == [[n, n] for n in (1, 2, 3, 4, 5, 6, 7, 8, 12)]
        for count in range(1, 13):
            calls, value = Double.calls, engine.submit(Call("net", rows(count, count))).result(WAIT)
            assert torch.equal(value.value, 2 * rows(count, count))
            assert Double.calls == calls + (count in (9, 10, 11))


def test_what_cannot_be_captured_runs_without_graphs_and_says_why():
    with Engine(graphs=True) as engine:
        engine.add(model(Waits()), batch_range=(1, 8))
        said = engine._models.get("net").executable.report["graphs"]
        assert said["rows"] == []
        assert "not captured at 1 rows" in said["reason"]
        assert torch.equal(
            engine.submit(Call("net", rows(1, 3))).result(WAIT).value, 2 * rows(1, 3)
        )


class Counts(nn.Module):
    """Adds what only its Python knows."""

    at = 0

    def forward(self, x):
        self.at += 1
        return x + self.at


class Recalls(nn.Module):
    """Adds what its Python learned of the rows, while it could."""

    total = 0.0

    def forward(self, x):
        with contextlib.suppress(RuntimeError):  # nothing is read during a capture
            self.total = float(x.sum())
        return x + self.total


@pytest.mark.parametrize("net", [Counts, Recalls])
def test_a_graph_that_is_off_is_not_kept_for_one_row_either(net):
    from plinth.engine.backends.eager import Eager
    from plinth.engine.precision.policy import PRESETS
    from plinth.engine.runtime.graphs import Graphed

    made = model(net())
    graphed = Graphed(Eager().compile(made, pick("auto"), PRESETS["fp32"], None))
    graphed.capture(made.rows, 4, 1 << 30)
    assert graphed.report["graphs"]["rows"] == []
    assert ("off the forward" if net is Counts else "1 rows") in graphed.report["graphs"]["reason"]


DIES = """
import torch
from torch import nn
from plinth.engine import Call, DeviceError, Engine, EngineFailed, Model, ModelSpec, TensorSpec

spec = ModelSpec(
    name="table",
    inputs=(TensorSpec(name="ids", shape=(2,), dtype="int64"),),
    outputs=(TensorSpec(name="y", shape=(2, 3)),),
)
engine = Engine(pipeline_depth={depth}).start()
engine.add(Model(spec, nn.Embedding(10, 3).eval()))
futures = [engine.submit(Call("table", torch.tensor([[0, n]]))) for n in (1, 2, 99, 3, 4)]
told = [type(future.exception(60)).__name__ for future in futures]
assert set(told) <= {{"NoneType", "EngineFailed"}} and told[2] == "EngineFailed", told
try:
    engine.start()
except DeviceError as error:
    print(error)
"""


@pytest.mark.skipif(pick("auto").kind == "fakeacc", reason="only a real device dies of it")
@pytest.mark.parametrize("depth", [1, 2])
def test_an_index_outside_a_table_ends_the_engine_and_is_said_to_everybody(depth):
    done = subprocess.run(
        [sys.executable, "-c", DIES.format(depth=depth)], capture_output=True, text=True, timeout=60
    )
    assert "does nothing any more in this process" in done.stdout, done.stderr[-2000:]
    assert "give integers bounds" in done.stdout


class Sizes(nn.Module):
    """Notes how many rows came, and in which thread."""

    seen: list[tuple[str, int]] = []  # noqa: RUF012 - copies on the device share it

    def __init__(self, convolves):
        super().__init__()
        self.seen.clear()
        if convolves:
            self.unused = nn.Conv1d(1, 1, 1)

    def forward(self, x):
        self.seen.append((threading.current_thread().name, len(x)))
        return x * 2


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("convolves", "sizes"), [(True, [1, 2, 4, 6, 3, 5]), (False, [1, 2, 4, 6])]
)
def test_sizes_have_run_in_the_lanes_thread_before_a_model_serves(running, convolves, sizes):
    net = Sizes(convolves)
    engine = Engine(device="auto", threads=1)
    try:
        if running:
            engine.start()
        engine.add(model(net), batch_range=(1, 6))
        engine.start()
        there = [count for name, count in net.seen if name == "plinth-device"]
        assert there == sizes
        assert engine.submit(Call("net", rows(0, 3))).result(WAIT).value[2, 3] == 22
    finally:
        engine.close()
