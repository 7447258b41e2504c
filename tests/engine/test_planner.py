"""A plan gives each range of rows its fastest candidate, and is never worth less than eager."""

import json
import threading
import time
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from plinth.engine import Call, ConfigError, Engine, Model, ModelError, ModelSpec, TensorSpec
from plinth.engine.backends import Availability, backends, choice, eager, prepare
from plinth.engine.backends.eager import TorchExecutable
from plinth.engine.backends.planner import GAIN, Planned, ranges
from plinth.engine.devices.device import pick
from plinth.engine.memory import plan
from plinth.engine.precision.policy import PRESETS
from plinth.engine.precision.transforms import sharing_copy
from plinth.engine.runtime import loaded_model

CPU = pick("cpu")
EAGER, OTHER, LOW = LABELS = ("eager/fp32", "other/fp32", "eager/bf16")
COST = st.tuples(
    st.floats(10, 1000).map(lambda us: us * 1e-6),
    st.floats(0.01, 100).map(lambda us: us * 1e-6),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path))
    return tmp_path


def chosen(stretches, rows):
    """The label that runs so many rows."""
    return stretches[bisect_right([each.first for each in stretches], rows) - 1].label


@given(st.lists(COST, min_size=3, max_size=3), st.integers(1, 512))
def test_no_choice_is_slower_than_eager_at_any_number_of_rows_in_range(costs, most):
    """Costs are a fixed part and one for each row; 0.95 leaves room for where they cross."""

    def seconds(rows):
        return [fixed + per_row * rows for fixed, per_row in costs]

    stretches = ranges(LABELS, seconds, most, EAGER)
    assert [each.first for each in stretches] == sorted({each.first for each in stretches})
    assert stretches[0].first == 1
    for rows in range(1, most + 1):
        found = dict(zip(LABELS, seconds(rows), strict=True))
        taken = found[chosen(stretches, rows)]
        assert taken * 0.95 <= found[EAGER]
        assert taken * 0.95 <= GAIN * min(found[EAGER], found[OTHER])


@given(st.lists(COST, min_size=3, max_size=3))
@example([(10e-6, 4e-6), (15e-6, 1e-6), (11e-6, 2e-6)])  # a third candidate between two counts
def test_a_plan_changes_for_a_real_gain_only_and_bf16_needs_one_too(costs):
    def seconds(rows):
        return [fixed + per_row * rows for fixed, per_row in costs]

    stretches = ranges(LABELS, seconds, 128, EAGER)
    for before, after in pairwise(stretches):
        found = dict(zip(LABELS, seconds(after.first), strict=True))
        gained = found[before.label] / found[after.label]
        assert gained >= GAIN or found[before.label] > found[EAGER] * 0.999
    for each in stretches:
        found = dict(zip(LABELS, seconds(each.first), strict=True))
        if each.label == LOW and each.first == 1:
            assert found[LOW] * GAIN <= min(found[EAGER], found[OTHER])


def test_what_is_too_dear_to_measure_keeps_the_last_choice():
    stretches = ranges(LABELS[:2], lambda rows: [2.0, 1.0] if rows == 1 else None, 128, EAGER)
    assert [(each.first, each.label) for each in stretches] == [(1, OTHER)]


# -- real models and backends ------------------------------------------------------------------
def model(module: nn.Module, *shape: int, name: str = "net") -> Model:
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
    )
    return Model(spec, module.eval())


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(x)[0][:, -1])


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))


class Fake:
    """A backend with costs of its own: so many multiplications a call, and for each row."""

    automatic = True

    def __init__(self, name: str, fixed: int, per_row: int, **facts) -> None:
        self.name, self.fixed, self.per_row = name, fixed, per_row
        self.ready: threading.Event | None = facts.get("ready")
        self.off_from = facts.get("off_from", 1 << 30)
        self.extra = facts.get("extra", 0)
        self.compiled = 0

    def available(self):
        return Availability("1")

    def supports(self, model, device, policy):
        return None

    def compile(self, model, device, policy, threads):
        self.compiled += 1
        if self.ready is not None:
            self.ready.wait(30)
        product = torch.ones(64, 64)

        def run(x: Tensor) -> Tensor:
            for _ in range(self.fixed + self.per_row * len(x)):
                product @ product
            return model.module(x) * (1 if len(x) < self.off_from else 2)

        own = sharing_copy(model.module)
        made = TorchExecutable(self.name, model, own, device, compiled=run)
        made.weights += self.extra
        return made


@pytest.fixture
def only(monkeypatch):
    """Leaves eager and the given backends to the choice."""

    def keep(*fakes: Fake) -> None:
        for name in list(backends()):
            if name != "eager":
                monkeypatch.delitem(backends(), name)
        for fake in fakes:
            monkeypatch.setitem(backends(), fake.name, fake)

    return keep


def test_each_range_of_rows_runs_where_it_is_fastest_and_answers_stay_the_same(only):
    net = model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 1)), 8)
    slow = Fake("eager", 800, 0)
    only(Fake("flat", 80, 0), Fake("steep", 0, 8), slow)
    executable = prepare(net, CPU, "fp32", "auto", 1, most=128)
    assert isinstance(executable, Planned)
    runs = [each["runs"] for each in executable.report["plan"]]
    assert runs == ["steep/fp32", "flat/fp32"]
    assert 5 <= executable.report["plan"][1]["from_rows"] <= 16
    assert executable.backend == "steep+flat"
    for rows in (1, 4, 16, 128):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(executable.run({"x": x})["y"], net.module(x).detach())


def test_a_plan_is_remembered_and_only_its_members_are_compiled_again(only, cache):
    fast, slow = Fake("fast", 0, 0), Fake("slow", 800, 0)
    eager = Fake("eager", 800, 0)
    only(fast, slow, eager)
    first = prepare(model(mlp(), 8), CPU, "fp32", "auto", 1)
    assert first.report["plan"] == [{"from_rows": 1, "runs": "fast/fp32"}]
    again = prepare(model(mlp(), 8), CPU, "fp32", "auto", 1)
    assert again.report["plan"] == first.report["plan"]
    assert again.report["plan_source"] == "as measured before"
    assert (fast.compiled, slow.compiled) == (2, 1)
    other = mlp()
    other[0].extra = 1.0  # a plain attribute is part of the state
    prepare(model(other, 8), CPU, "fp32", "auto", 1)
    assert slow.compiled == 2
    for path in (cache / "plans").iterdir():
        path.write_text(json.dumps({"stretches": []}))
    assert prepare(model(mlp(), 8), CPU, "fp32", "auto", 1).report["plan"] == first.report["plan"]


def test_what_does_not_compile_in_time_is_left_out_with_the_reason(only, monkeypatch):
    ready = threading.Event()
    late = Fake("late", 0, 0, ready=ready)
    only(late, Fake("eager", 800, 0))
    monkeypatch.setattr(choice, "COMPILE_SECONDS", 0.05)
    report = prepare(model(mlp(), 8), CPU, "fp32").report
    assert report["resolved"]["backend"] == "eager"
    assert "not ready within 0.05 s" in report["refused"]["late/fp32"]
    ready.set()
    report = prepare(model(mlp(), 8), CPU, "fp32").report
    assert report["resolved"]["backend"] == "late", "the plan without it was not remembered"


@pytest.mark.cpu  # exporters are for the CPU's backends
def test_a_model_answers_while_a_late_export_of_it_goes_on(monkeypatch):
    """An exporter fills the module that it traces with tensors without values."""
    traced, ready = threading.Event(), threading.Event()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            # whoever calls a module meanwhile goes through the exporter's tracer, too
            if torch.compiler.is_exporting() and "/fp32" in threading.current_thread().name:
                traced.set()
                ready.wait(30)
            return self.layer(x)

    monkeypatch.setattr(choice, "COMPILE_SECONDS", 1.0)
    net = model(Watched(), 8)
    for _ in range(4):  # calls of modules in other threads may end an exporter before it traces
        executable = prepare(net, CPU, "fp32", "auto", 1)
        if traced.wait(10):
            break
    assert traced.is_set(), executable.report["refused"]
    x = torch.randn(3, 8)
    with torch.inference_mode():
        want = net.module(x)
        torch.testing.assert_close(executable.run({"x": x})["y"], want)
    ready.set()
    assert "not ready within 1 s" in executable.report["refused"]["onnxruntime/fp32"]


def test_what_is_wrong_at_some_number_of_rows_is_not_in_the_plan(only):
    only(Fake("wrong", 0, 0, off_from=100), Fake("eager", 800, 0))
    report = prepare(model(mlp(), 8), CPU, "fp32", "auto", 1, most=128).report
    assert report["plan"][-1]["runs"] == "eager/fp32"
    assert "at 128 rows" in report["refused"]["wrong/fp32"]
    only(Fake("wrong", 0, 0, off_from=1), Fake("eager", 800, 0))
    report = prepare(model(mlp(), 8), CPU, "fp32", "auto", 1, most=128).report
    assert "off the reference" in report["refused"]["wrong/fp32"]


def test_the_engine_serves_a_plan_and_tells_it(only):
    only(Fake("flat", 80, 0), Fake("steep", 0, 8), Fake("eager", 800, 0))
    net = model(mlp(), 8)

    def infer(rows):
        return (yield Call("net", rows))

    with Engine(device="cpu", backend="auto", threads=1) as engine:
        engine.add(net)
        facts = engine.status()["models"]["net"]
        assert [each["runs"] for each in facts["plan"]] == ["steep/fp32", "flat/fp32"]
        for rows in (1, 2, 100, 300):
            x = torch.randn(rows, 8)
            answer = engine.run(infer(x))
            torch.testing.assert_close(answer.value, net.module(x).detach())
            assert answer.precision == {"net": "steep+flat/fp32"}


@pytest.mark.cpu
def test_a_plan_that_does_not_fit_gives_way_to_its_smallest_member(only):
    large = 200_000_000
    only(Fake("flat", 80, 0, extra=large), Fake("steep", 0, 8), Fake("eager", 800, 0))
    roomy, tight = (
        Engine(backend="auto", threads=1, memory_budget=budget) for budget in (2 * large, large)
    )
    for engine, runs in ((roomy, ["steep/fp32", "flat/fp32"]), (tight, ["steep/fp32"])):
        engine.add(model(mlp(), 8))
        facts = engine.status()["models"]["net"]
        assert list(dict.fromkeys(each["runs"] for each in facts["plan"])) == runs
    assert "do not fit" in facts["reason"]


@pytest.mark.slow
@pytest.mark.clock
@pytest.mark.parametrize(("module", "shape"), [(mlp, (8,)), (Gru, (5, 8))])
def test_auto_is_never_much_slower_than_eager(module, shape):
    net = model(module(), *shape)
    eager = prepare(net, CPU, "fp32", "eager", 1)
    auto = prepare(net, CPU, "fp32", "auto", 1, most=128)
    for rows in (1, 2, 3, 6, 12, 24, 48, 96, 128):
        x = {"x": torch.randn(rows, *shape)}
        times = {eager: [], auto: []}
        for _ in range(40):
            for executable, taken in times.items():
                begun = time.thread_time()
                executable.run(x)
                taken.append(time.thread_time() - begun)
        assert min(times[auto]) * 0.95 <= min(times[eager]), rows


def test_a_slow_model_is_added_within_a_bound():
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            until = time.perf_counter() + 0.02 * len(x)
            while time.perf_counter() < until:
                pass
            return x[:, :1]

    begun = time.perf_counter()
    engine = Engine(threads=1, backend="auto")
    engine.add(model(Slow(), 8))
    assert time.perf_counter() - begun < 60  # 30 on a machine of its own


class Endless(nn.Module):
    """Takes as long for a row as the test says; counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.rows = threading.Event(), 0

    def __deepcopy__(self, _: object) -> "Endless":
        raise TypeError("a lock has no copy")

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        assert self.opened.wait(60)
        return x[:, :1]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_row_that_takes_for_ever_holds_no_start_up(monkeypatch, backend):
    monkeypatch.setattr(choice, "CHECK_SECONDS", 0.2)
    net = model(Endless(), 8)
    with Engine(threads=1, backend=backend) as engine:
        engine.add(net)  # ends
        facts = engine.status()["models"]["net"]
        assert "nothing was tried" in facts["reason"]
        assert (facts["backend"], facts["largest_batch"]) == ("eager", 1)
        net.module.opened.set()
        answer = engine.submit(Call("net", torch.arange(24.0).reshape(3, 8))).result(60)
        assert answer.value.flatten().tolist() == [0.0, 8.0, 16.0]


@pytest.mark.cpu  # an accelerator runs it once more, to see what stays in flight
def test_a_row_of_seconds_is_run_four_times_at_most(monkeypatch):
    """Twice when it is tried, once for its memory, once to see what it costs."""
    for name in ("SLOW_SECONDS", "TRIAL_SECONDS", "AGAIN_SECONDS"):
        monkeypatch.setattr(choice, name, 0.0)
    monkeypatch.setattr(loaded_model, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(plan, "_STRETCH_SECONDS", 0.0)
    net = model(Endless(), 8)
    net.module.opened.set()
    Engine(threads=1, backend="eager").add(net)
    assert net.module.rows == 4


class ColdStart(nn.Module):
    """Its first rows take 0.3 s of a processor, all others nothing."""

    def __init__(self):
        super().__init__()
        self.cold = 2  # a trial runs a module twice

    def forward(self, x):
        until = time.thread_time() + (0.3 if self.cold else 0.0)
        self.cold = max(0, self.cold - 1)
        while time.thread_time() < until:
            pass
        return x[:, :1] * 1


def test_a_cold_first_row_is_not_what_a_row_is_thought_to_cost(monkeypatch):
    for name in ("SLOW_SECONDS", "TRIAL_SECONDS", "AGAIN_SECONDS"):
        monkeypatch.setattr(choice, name, 0.1)
    monkeypatch.setattr(loaded_model, "_SAMPLE_SECONDS", 0.1)
    engine = Engine(threads=1, backend="eager")
    engine.add(model(ColdStart(), 8))
    loaded = engine._models.get("net")
    assert loaded.executable.report["row_seconds"] > 0.1
    assert engine._batcher.latency.predict(loaded.key, 1, 0.5) < 0.1


class Clocked(nn.Module):
    """Moves a clock on: by 1.5 s in its first two forwards, by 0.05 s in those after."""

    def __init__(self):
        super().__init__()
        self.now, self.forwards = 0.0, 0

    def forward(self, x):
        self.forwards += 1
        self.now += 1.5 if self.forwards <= 2 else 0.05
        return x.sum(1, keepdim=True)


def test_a_first_row_that_took_over_a_second_is_timed_again(monkeypatch):
    """Else the candidates are timed once each, and two threads got another plan than one."""
    net = model(Clocked(), 8)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: net.module.now)
    made = prepare(net, CPU, "fp32", "eager")
    assert net.module.forwards > 2
    assert "row_seconds" not in made.report


class Reuses(nn.Module):
    """Gives out its own memory, which the next forward fills anew."""

    def __init__(self):
        super().__init__()
        self.given = torch.zeros(2, 1)

    def forward(self, x):
        return self.given.copy_(x.sum(1, keepdim=True))


@pytest.mark.parametrize(("slow", "runs"), [(-1.0, 1), (60.0, 2)])
def test_what_a_module_gives_out_is_copied_also_where_a_probe_of_seconds_runs_once(
    slow, runs, monkeypatch
):
    monkeypatch.setattr(eager, "SLOW_SECONDS", slow)
    made = eager.Eager().compile(model(Reuses(), 8), CPU, PRESETS["fp32"], 1)
    made.probe({"x": torch.ones(2, 8)})
    kept = made.run({"x": torch.ones(2, 8)})
    made.run({"x": torch.full((2, 8), 5.0)})
    assert made.report["probe_runs"] == runs
    assert kept["y"].unique().tolist() == [8.0]


class InSteps(nn.Module):
    """Keeps its state in an attribute, as no two threads may use it at once."""

    def __init__(self):
        super().__init__()
        self.began, self.opened = threading.Event(), threading.Event()

    def forward(self, x):
        self.sum = torch.zeros_like(x)
        self.began.set()
        self.opened.wait(60)
        self.sum = self.sum + x
        return self.sum[:, :1]


def test_a_trial_that_was_given_up_does_not_run_beside_the_model_that_serves(monkeypatch):
    monkeypatch.setattr(choice, "CHECK_SECONDS", 0.2)
    net = model(InSteps(), 8)
    with Engine(threads=1, backend="eager") as engine:
        engine.add(net)  # the trial's forward is still under way
        assert net.module.began.is_set()
        net.module.began.clear()
        future = engine.submit(Call("net", torch.ones(1, 8)))
        assert not net.module.began.wait(0.2)
        net.module.opened.set()
        assert future.result(60).value.tolist() == [[1.0]]


def test_a_name_that_is_not_there_or_a_model_nothing_can_run_is_refused(only):
    only()
    with pytest.raises(ConfigError, match="no backend"):
        prepare(model(mlp(), 8), CPU, "fp32", "fast")
    with pytest.raises(ModelError, match="mixes the rows"):
        prepare(model(Mixing(), 8), CPU, "fp32")


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0))[:, :1]


class Timed(nn.Module):
    """Moves a clock on by so many seconds a row."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        NOW[0] += self.seconds * len(x)
        return x.sum(1, keepdim=True)


NOW = [0.0]


def test_a_candidate_far_behind_does_not_keep_the_others_from_being_timed(monkeypatch):
    """With eager at 0.4 s a row there is time for one row of it, and for four of the others."""
    monkeypatch.setattr(choice.time, "perf_counter", lambda: NOW[0])
    reference, fast, faster = (
        TorchExecutable("eager", model(Timed(s), 8), Timed(s).eval(), CPU, "fp32")
        for s in (0.4, 0.03, 0.02)
    )
    for each in (fast, faster):
        each.report["allowed"] = 1e-3
    one = {"x": torch.ones(1, 8)}
    outputs = reference.run(one)
    trial = choice._Trial("net", one, outputs, outputs, "given", 0.0, ())
    named = replace(model(Timed(0.4), 8), example=one)
    asked = choice._Asked(named, reference, [], None, "auto", 16, trial)
    found = {"eager/fp32": reference, "other/fp32": fast, "other/bf16": faster}
    stopwatch = choice._Stopwatch(asked, found)
    assert stopwatch.times(1) == pytest.approx([0.4, 0.03, 0.02])
    assert stopwatch.times(4)[1:] == pytest.approx([0.12, 0.08])
    assert stopwatch.times(16) is not None
    assert "20 times as slow" in stopwatch.dropped["eager/fp32"]
    assert "other/fp32" not in stopwatch.dropped
