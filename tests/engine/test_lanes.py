"""Several lanes under one engine: the contract that each kind of lane keeps, and what they share.

``PLINTH_TEST_DEVICE=fake`` runs all of it on the device made of Python, staged and in flight.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from plinth.engine import (
    Call,
    ConfigError,
    Engine,
    EngineFailed,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    Sla,
    TensorSpec,
    Tiling,
)
from plinth.engine.devices.device import Device, pick
from plinth.engine.lanes.base import Lane, LaneDied, Unit
from plinth.engine.lanes.cluster.lane import RayLane
from plinth.engine.lanes.gang import GangLane
from plinth.engine.lanes.local import LocalLane
from plinth.engine.lanes.process import ProcessLane
from plinth.engine.runtime.lane_worker import serve, serve_rank
from plinth.engine.runtime.loaded_model import load_model
from plinth.engine.scheduler.cost_model import LatencyModel
from tests.engine.cluster_nodes import cluster
from tests.engine.lane_models import CARD, RAISE, doubles, net, rows

HERE = pick("auto")
NAME = str(HERE)
WAIT = 60
PATIENT = Sla(deadline_ms=60_000)
pytestmark = pytest.mark.usefixtures("importable")


# -- the contract of a lane -------------------------------------------------------------------
KINDS = ["local", "local 2 deep"]
if HERE.kind == "cpu":
    KINDS = [
        "local",
        "process 2 deep",
        "gang 2 deep",
        pytest.param("ray 2 deep", marks=pytest.mark.needs("ray")),
    ]


@pytest.fixture(scope="module")
def nodes():
    """A cluster of this machine alone."""
    with TemporaryDirectory(prefix="plr") as folder, cluster(Path(folder)) as made:
        yield made


@pytest.fixture(params=KINDS, scope="module")
def lane(request):
    """A started lane of each kind that there is."""
    kind, depth = request.param.split()[0], int("".join(filter(str.isdigit, request.param)) or 1)
    made: Lane
    if kind == "gang":
        made = GangLane("gang:cpu:pipeline=2", serve_rank, 1, "gloo", depth=depth)
    elif kind == "ray":
        made = RayLane(HERE, request.getfixturevalue("nodes").settings(), 1, depth)
    else:
        process = kind == "process"
        made = ProcessLane(HERE, serve, 1, depth=depth) if process else LocalLane(HERE, depth)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def doubling(lane: Lane, tmp_path_factory):
    """A model that doubles, of a kind that the lane takes; a gang takes one in steps, stored."""
    if lane.kind != "gang":
        return net
    folder = tmp_path_factory.mktemp("store")
    doubles(folder, architecture="doubles-in-steps")
    return lambda: ModelStore(folder).load("net")


@pytest.fixture(scope="module")
def held(lane: Lane, doubling):
    """A model that the lane holds."""
    loaded = load_model(doubling(), Sla(), HERE, LatencyModel(), batch_range=(1, 64))
    lane.hold(loaded)
    return loaded


def test_a_unit_gives_the_rows_of_its_parts_in_their_order(lane, held):
    parts = [{"x": rows(n, n + 1)} for n in range(5)]
    ran = lane.submit(Unit(1, held.id, parts)).result(WAIT)
    assert torch.equal(ran.outputs["y"], 2 * torch.cat([part["x"] for part in parts]))
    assert ran.outputs["y"].device.type == "cpu"
    assert ran.seconds > 0
    assert (ran.largest, ran.halvings, ran.precision) == (64, 0, "eager/fp32")


def test_a_lane_takes_as_many_units_as_it_is_deep_and_answers_each_with_its_own(lane, held):
    futures = []
    for n in range(12):
        if len(futures) >= lane.depth:
            futures[-lane.depth].result(WAIT)
        futures.append(lane.submit(Unit(n, held.id, [{"x": rows(n, 3)}])))
    for n, future in enumerate(futures):
        assert torch.equal(future.result(WAIT).outputs["y"], 2 * rows(n, 3))


def test_what_a_model_raises_is_its_units_alone(lane, held, tmp_path):
    kind = "doubles-in-steps" if lane.kind == "gang" else "doubles"
    bad = load_model(
        doubles(tmp_path, architecture=kind), Sla(), HERE, LatencyModel(), batch_range=(1, 8)
    )
    lane.hold(bad)
    error = lane.submit(Unit(1, bad.id, [{"x": torch.full((1, 4), RAISE)}])).exception(WAIT)
    if lane.inline or HERE.kind != "cpu":
        assert isinstance(error, ValueError)
    else:
        assert str(error).startswith("model net failed in a worker process: ValueError")
        assert CARD not in str(error)
    assert torch.equal(
        lane.submit(Unit(2, held.id, [{"x": rows(0, 1)}])).result(WAIT).outputs["y"],
        2 * rows(0, 1),
    )


def test_a_lane_knows_a_model_for_as_long_as_somebody_holds_it(lane, doubling):
    loaded = load_model(doubling(), Sla(), HERE, LatencyModel(), batch_range=(1, 8))
    name = loaded.id
    gc.collect()
    assert not lane.can_run(name)
    lane.hold(loaded)
    assert lane.can_run(name)
    del loaded
    assert not lane.can_run(name)
    assert lane.submit(Unit(1, name, [{"x": rows(0, 1)}])).exception(WAIT) is not None


def test_closing_waits_for_what_the_lane_has_and_it_can_be_started_again(lane, held):
    futures = [lane.submit(Unit(n, held.id, [{"x": rows(n, 2)}])) for n in range(lane.depth)]
    lane.close()
    assert all(future.done() for future in futures)
    lane.start()
    assert (
        lane.submit(Unit(9, held.id, [{"x": rows(9, 2)}])).result(WAIT).outputs["y"].shape[0] == 2
    )


@pytest.mark.skipif(HERE.kind == "cpu", reason="a CPU that fails takes the process with it")
def test_a_device_that_fails_is_the_death_of_its_lane(lane, held, monkeypatch):
    def lost(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("plinth.engine.devices.staging.Launched.wait", lost)
    monkeypatch.setattr(Device, "failure", lambda _: "device-side assert triggered")
    error = lane.submit(Unit(1, held.id, [{"x": rows(0, 1)}])).exception(WAIT)
    assert isinstance(error, LaneDied)
    with pytest.raises(LaneDied, match="does nothing any more"):
        lane.start()


@pytest.mark.cpu
def test_an_impossible_depth_is_refused():
    with pytest.raises(ConfigError, match="pipeline_depth is 2, expected 1 on cpu"):
        LocalLane(HERE, depth=2)


# -- several under one engine -----------------------------------------------------------------
class Mortal(LocalLane):
    """A lane of this process that dies when it is told to: before it runs a unit, or after."""

    def __init__(self, device: Device, place: int) -> None:
        super().__init__(device, 1, place)
        self.deaths: list[str] = []
        self.ran = count()
        self.units = 0

    def run(self, unit: Unit):
        self.units = next(self.ran)
        if self.deaths and self.deaths.pop(0) == "now":
            raise LaneDied("it was switched off")
        return super().run(unit)


def ask(engine: Engine, number: int, many: int, sla: Sla | None = PATIENT):
    return engine.submit(Call("net", rows(number, many)), sla)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_caller_gets_its_own_rows_whichever_lane_runs_them(lanes):
    with Engine(devices=[NAME] * lanes, threads=1) as engine:
        engine.add(net(), batch_range=(1, 16))
        with ThreadPoolExecutor(6) as callers:
            asked = [
                callers.submit(ask, engine, n, 1 + n % 23, None if n % 5 == 0 else PATIENT)
                for n in range(300)
            ]
            for n, one in enumerate(asked):
                assert torch.equal(one.result(WAIT).result(WAIT).value, 2 * rows(n, 1 + n % 23))
        status = engine.status()
        assert [lane["state"] for lane in status["lanes"]] == ["running"] * lanes
        assert (status["urgent_rows"], status["background_rows"]) == (0, 0)


class Meets(nn.Module):
    """Keeps its rows in an attribute while it waits for another lane to be there as well."""

    barrier = threading.Barrier(2)

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    armed = False
    weights: set[int] = set()  # noqa: RUF012 - of all copies

    def forward(self, x):
        self.kept = x
        if Meets.armed:
            Meets.weights.add(id(self.factor))
            Meets.barrier.wait(WAIT)
        return self.kept * self.factor


def test_lanes_run_at_the_same_time_over_the_same_weights_and_keep_out_of_each_other():
    Meets.armed, Meets.weights = False, set()
    with Engine(devices=[NAME, NAME], threads=1) as engine:
        engine.add(net("net", Meets()), batch_range=(1, 4))
        Meets.armed = True
        futures = [ask(engine, n, 4) for n in range(10)]  # each fills a batch: five meetings
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))
        Meets.armed = False
    assert len(Meets.weights) == 1
    assert all(lane["utilisation"] > 0 for lane in engine.status()["lanes"])


class Identity3d(nn.Module):
    def forward(self, x):
        return x + 0


def test_a_volume_whose_windows_ran_on_several_lanes_is_blended_in_their_order():
    spec = ModelSpec(
        name="same",
        inputs=(TensorSpec(name="x", shape=(1, 4, 4, 4)),),
        outputs=(TensorSpec(name="y", shape=(1, 4, 4, 4)),),
    )
    volumes = [torch.randn(1, 9, 10, 11) for _ in range(4)]
    with Engine(devices=[NAME] * 3, threads=1) as engine:
        engine.add(Model(spec, Identity3d().eval()), batch_range=(1, 3))
        futures = [engine.submit(Call("same", v, Tiling((4, 4, 4), 0.5))) for v in volumes]
        for volume, future in zip(volumes, futures, strict=True):
            torch.testing.assert_close(future.result(WAIT).value, volume, rtol=1e-4, atol=1e-5)


def test_a_lane_that_dies_gives_its_batch_to_another_and_nothing_is_lost(caplog):
    mortal = Mortal(HERE, 1)
    engine = Engine(devices=[NAME], lanes=[mortal])
    engine.add(net(), batch_range=(1, 4))
    mortal.deaths = ["later", "later", "now"]
    with engine:
        futures = [ask(engine, n, 4, None if n % 3 == 0 else PATIENT) for n in range(200)]
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))
        while mortal.deaths:  # on a slow machine it had too little to do
            assert ask(engine, 1, 4).result(WAIT)
        dead = engine.status()["lanes"][1]
        assert (dead["state"], dead["in_flight"]) == ("dead", 0)
        assert engine.state == "running"
        assert "died: it was switched off" in caplog.text
        engine.start()  # as who looks after it would
        assert engine.status()["lanes"][1]["state"] == "running"
        assert torch.equal(ask(engine, 3, 4).result(WAIT).value, 2 * rows(3, 4))


def test_when_the_last_lane_dies_everybody_is_told():
    lanes = [Mortal(HERE, 0), Mortal(HERE, 1)]
    engine = Engine(lanes=lanes)
    engine.add(net(), batch_range=(1, 4))
    for lane in lanes:
        lane.deaths = ["later", "now"]
    with engine:
        futures = [ask(engine, n, 4, Sla()) for n in range(40)]
        told = [future.exception(WAIT) for future in futures]
        assert {type(error) for error in told} == {type(None), EngineFailed}
        assert engine.failure == "LaneDied"
        engine.start()
        assert torch.equal(ask(engine, 0, 4).result(WAIT).value, 2 * rows(0, 4))


def test_what_ends_lanes_is_found_and_fails_alone():
    """A call on which each lane dies takes three with it, then stands alone in its batch."""

    class Fragile(LocalLane):
        def run(self, unit: Unit):
            if any(bool((part["x"] == -1).any()) for part in unit.parts):
                raise LaneDied("it stumbled")
            return super().run(unit)

    engine = Engine(lanes=[Fragile(HERE, 1, n) for n in range(12)])
    engine.add(net(), batch_range=(1, 8), sla=PATIENT)
    with engine:
        poison = engine.submit(Call("net", torch.full((1, 4), -1.0)))
        others = [ask(engine, n, 1) for n in range(30)]
        assert isinstance(poison.exception(WAIT), ModelError)
        assert all(future.exception(WAIT) is None for future in others)
        states = [lane["state"] for lane in engine.status()["lanes"]]
        assert 3 <= states.count("dead") < 12


def test_a_lane_that_lies_about_its_outputs_fails_the_call_and_answers_nothing():
    class Liar(LocalLane):
        checked = False

        def run(self, unit: Unit):
            ran = super().run(unit)
            return ran._replace(outputs={name: each[:, :2] for name, each in ran.outputs.items()})

    with Engine(lanes=[Liar(HERE)]) as engine:
        engine.add(net(), batch_range=(1, 8))
        with pytest.raises(ModelError, match=r"a lane gave .* of 3 rows, expected"):
            ask(engine, 1, 3).result(WAIT)


def test_what_the_lane_that_is_woken_leaves_to_another_is_done_by_that_one():
    """The first lane is the faster one for a lone row, the second one for four."""
    lanes = [LocalLane(HERE, 1, 0), LocalLane(HERE, 1, 1)]
    lanes[1].costs = second = LatencyModel()
    engine = Engine(lanes=lanes)
    first = engine._batcher.latency
    engine.add(net(), batch_range=(1, 4), sla=PATIENT)
    with engine:
        assert ask(engine, 0, 1).result(WAIT)
        key = next(each.key for each in engine._models.all())
        for costs, seconds in ((first, (0.010, 0.050)), (second, (0.020, 0.021))):
            costs.forget(key)
            for many, cost in zip((1, 4), seconds, strict=True):
                costs.seed(key, many, cost)
        assert torch.equal(ask(engine, 1, 4).result(10).value, 2 * rows(1, 4))


class Waits(nn.Module):
    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x):
        assert self.gate.wait(WAIT)
        return 2 * x


def test_a_lane_that_joins_after_a_swap_runs_what_was_accepted_before():
    gate = threading.Event()
    gate.set()
    with Engine(devices=[NAME], threads=1) as engine:
        engine.add(net("net", Waits(gate)), batch_range=(1, 4), sla=PATIENT)
        gate.clear()
        asked = [ask(engine, n, 4) for n in range(3)]
        engine.add(net(), batch_range=(1, 4), sla=PATIENT)
        engine.add_lane(NAME)
        gate.set()
        for n, future in enumerate(asked):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))


def test_lanes_that_are_alike_are_planned_with_the_same_costs_before_any_are_known():
    engine = Engine(devices=["process:cpu", "process:cpu"])
    assert engine._batcher.lanes.kinds == 1
    engine.close()


def test_lanes_join_and_leave_while_calls_run():
    with Engine(devices=[NAME], threads=1) as engine:
        engine.add(net(), batch_range=(1, 8))
        stop = threading.Event()
        wrong: list[int] = []

        def caller(number: int) -> int:
            asked = 0
            while not stop.is_set():
                asked += 1
                value = ask(engine, number, 3, None if asked % 2 else PATIENT).result(WAIT).value
                if not torch.equal(value, 2 * rows(number, 3)):
                    wrong.append(number)
            return asked

        with ThreadPoolExecutor(4) as callers:
            running = [callers.submit(caller, n) for n in range(4)]
            for _ in range(5):
                second = engine.add_lane(NAME)
                engine.add(net("other"), batch_range=(1, 2))
                third = engine.add_lane(NAME)
                engine.drain_lane(second)
                engine.drain_lane(third)
            stop.set()
            assert all(one.result(WAIT) for one in running)
        assert wrong == []
        (only,) = engine.status()["lanes"]
        with pytest.raises(ConfigError, match="the only lane that is well"):
            engine.drain_lane(only["name"])
        with pytest.raises(ConfigError, match="no lane cpo"):
            engine.drain_lane("cpo/7")


def test_a_model_added_later_runs_on_every_lane():
    Meets.armed, Meets.weights = False, set()
    with Engine(devices=[NAME, NAME], threads=1) as engine:
        engine.add(net("first"), batch_range=(1, 4))
        engine.add(net("net", Meets()), batch_range=(1, 4))
        Meets.armed = True
        futures = [ask(engine, n, 4) for n in range(4)]
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))
        Meets.armed = False


@pytest.mark.skipif(HERE.kind == "cpu", reason="needs a second kind of device")
def test_lanes_of_unlike_devices_have_weights_and_costs_of_their_own():
    with Engine(devices=["cpu", NAME], threads=1) as engine:
        engine.add(net(), batch_range=(1, 8))
        futures = [ask(engine, n, 8) for n in range(60)]
        for n, future in enumerate(futures):
            assert torch.equal(future.result(WAIT).value, 2 * rows(n, 8))
        assert [lane["device"] for lane in engine.status()["lanes"]] == ["cpu", NAME]


def test_an_engine_needs_a_lane():
    with pytest.raises(ConfigError, match="no lane"):
        Engine(devices=[])


@pytest.mark.cpu
def test_lanes_of_the_cpu_share_its_threads_out():
    before = torch.get_num_threads()
    with Engine(devices=["cpu", "cpu"]) as engine:
        engine.add(net(), batch_range=(1, 4))
        assert ask(engine, 1, 2).result(WAIT).value.shape == (2, 4)
    assert torch.get_num_threads() == before
