"""Lanes in actors of a Ray cluster: two nodes on this machine, and what becomes of work when
actors, nodes or the way there end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch

from plinth.engine import Call, ConfigError, DeviceError, Engine, ModelError, Sla
from plinth.engine.devices.device import pick
from plinth.engine.lanes import worker
from plinth.engine.lanes.base import Unit
from plinth.engine.lanes.cluster import lane as lane_module
from plinth.engine.lanes.cluster import nodes as nodes_module
from plinth.engine.lanes.cluster.lane import RayLane
from plinth.engine.lanes.cluster.settings import Cluster
from plinth.engine.runtime.loaded_model import load_model
from plinth.engine.scheduler.cost_model import LatencyModel
from tests.engine.cluster_nodes import cluster, free_port
from tests.engine.lane_models import ROOT, SEGFAULT, STOP, doubles, net, rows

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.needs("ray"),
    pytest.mark.usefixtures("importable"),
]
WAIT = 120
PATIENT = Sla(deadline_ms=100_000)


@pytest.fixture(scope="module")
def nodes():
    """A head, and a node that joined it; each has one core for lanes."""
    with TemporaryDirectory(prefix="plr") as folder, cluster(Path(folder)) as made:
        made.add(labels={"zone": "b"})
        yield made


@pytest.fixture(scope="module")
def engine(nodes, tmp_path_factory):
    """Two lanes that the tests of this file wear out in turns."""
    made = Engine(
        devices=["ray:cpu", "ray:cpu"], threads=1, hung_seconds=2.0, cluster=nodes.settings()
    )
    made.add(doubles(tmp_path_factory.mktemp("store")), batch_range=(1, 4), sla=PATIENT)
    with made:
        yield made


def ask(engine: Engine, values: torch.Tensor, sla: Sla | None = PATIENT):
    return engine.submit(Call("net", values), sla)


def lanes_of(engine: Engine) -> list[RayLane]:
    return [thread.lane for thread in engine._lanes.threads]


def deaths(engine: Engine) -> int:
    return sum(lane["deaths"] for lane in engine.status()["lanes"])


def until_running(engine: Engine, before: int) -> None:
    """Answers come, and every lane that died is back."""
    while True:
        assert torch.equal(ask(engine, rows(1, 2)).result(WAIT).value, 2 * rows(1, 2))
        lanes = engine.status()["lanes"]
        if deaths(engine) >= before and all(lane["state"] == "running" for lane in lanes):
            return


def test_lanes_spread_over_the_machines_and_everybody_gets_their_own_rows(engine, nodes):
    asked = [ask(engine, rows(n, 1 + n % 7), None if n % 3 else PATIENT) for n in range(100)]
    for n, future in enumerate(asked):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1 + n % 7))
    lanes = engine.status()["lanes"]
    assert [(lane["name"], lane["kind"], lane["state"]) for lane in lanes] == [
        ("ray:cpu/0", "ray", "running"),
        ("ray:cpu/1", "ray", "running"),
    ]
    assert {lane.about["node"] for lane in lanes_of(engine)} == {each.node for each in nodes.all}
    assert "ray" not in sys.modules  # it is other processes that talk to it


def test_a_payload_over_100_kb_crosses_as_it_is(engine, tmp_path):
    engine.add(net("wide", shape=(50_000,)), batch_range=(1, 4), sla=PATIENT)
    values = torch.randn(3, 50_000)
    assert torch.equal(engine.submit(Call("wide", values), PATIENT).result(WAIT).value, 2 * values)
    lane = lanes_of(engine)[0]
    with pytest.raises(ModelError, match="does not fit through the cluster"):
        lane.weigh(lane._link, {"x": torch.zeros(14_000_000)})


@pytest.mark.parametrize(
    "by", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)]
)
def test_an_actor_that_is_killed_or_stopped_loses_nothing_and_is_placed_again(engine, by):
    before = deaths(engine)
    asked = [ask(engine, rows(n, 3), None if n % 3 else PATIENT) for n in range(60)]
    os.kill(lanes_of(engine)[0].about["pid"], by)
    asked += [ask(engine, rows(n, 3)) for n in range(60, 400)]
    for n, future in enumerate(asked):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 3))
    until_running(engine, before + 1)


@pytest.mark.soak
@pytest.mark.parametrize("poison", [SEGFAULT, STOP])
def test_a_row_that_ends_actors_is_found_and_fails_alone(engine, poison):
    bad = ask(engine, torch.full((1, 4), poison))
    others = [ask(engine, rows(n, 1)) for n in range(12)]
    assert isinstance(bad.exception(WAIT), ModelError)
    for n, future in enumerate(others):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1))


def test_a_model_goes_once_to_a_machine_that_does_not_have_it(engine, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("plinth.engine.lanes.cluster.parcel.is_same", lambda _: False)
    sent: list[bytes] = []
    ask_link = lane_module.Link.ask
    monkeypatch.setattr(
        lane_module.Link,
        "ask",
        lambda link, kind, *more, **how: sent.append(kind) or ask_link(link, kind, *more, **how),
    )
    model = doubles(tmp_path, "5", 5.0)
    hidden = tmp_path / "net"
    lane = lanes_of(engine)[0]
    parcel = lane_module.Parcel.of(hidden / "5")
    moved = hidden.rename(tmp_path / "elsewhere")  # so that the machine finds nothing there
    try:
        link = lane._link
        assert link is not None
        wanted, _ = link.ask(worker.NEED, (parcel, False), WAIT).result(WAIT)
        assert sorted(wanted) == sorted(file.name for file in parcel.files)
    finally:
        moved.rename(hidden)
    for piece in parcel.pieces(wanted):
        link.ask(worker.PIECE, (parcel.digest, *piece), WAIT).result(WAIT)
    link.ask(worker.NEED, (parcel, True), WAIT).result(WAIT)
    kept = nodes.shelf / parcel.digest / "net" / "5"
    assert {each.name for each in kept.iterdir()} == {
        each.name for each in (hidden / "5").iterdir()
    }
    moved = hidden.rename(tmp_path / "elsewhere")
    assert link.ask(worker.NEED, (parcel, False), WAIT).result(WAIT)[0] == []
    loaded = load_model(model, Sla(), pick("cpu"), LatencyModel(), batch_range=(1, 4))
    moved.rename(hidden)
    lane.hold(loaded)
    ran = lane.submit(Unit(1, loaded.id, [{"x": rows(1, 2)}])).result(WAIT)
    assert torch.equal(ran.outputs["y"], 5 * rows(1, 2))


# -- bad input --------------------------------------------------------------------------------
def lane_of(settings: Cluster) -> RayLane:
    return RayLane(pick("cpu"), settings, 1)


def why_not(settings: Cluster) -> str:
    """Why a lane does not start."""
    lane = lane_of(settings)
    try:
        with pytest.raises(DeviceError) as refused:
            lane.start()
    finally:
        lane.close()
    return str(refused.value)


def test_what_no_machine_has_is_refused_with_what_they_have(nodes):
    told = why_not(nodes.settings(cpus=3.0, labels={"zone": "c"}))
    assert "no machine has room" in told
    assert "it needs CPU 3, labels zone = c; 127.0.0.1 has CPU 1" in told


@pytest.mark.soak
def test_lanes_are_placed_by_label(nodes):
    lane = lane_of(nodes.settings(labels={"zone": "b"}))
    try:
        lane.start()
        assert lane.about["node"] == nodes.all[1].node
    finally:
        lane.close()


def test_a_wrong_token_is_refused(nodes, tmp_path):
    other = tmp_path / "token"
    other.write_text("f" * 64)
    other.chmod(0o600)
    assert "refuses the token" in why_not(nodes.settings(token_file=other))


def test_a_token_that_is_missing_or_open_to_others_is_refused_at_once(nodes, tmp_path):
    with pytest.raises(ConfigError, match="no token of the cluster"):
        lane_of(nodes.settings(token_file=tmp_path / "none"))
    other = tmp_path / "token"
    other.write_text("f" * 64)
    other.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        lane_of(nodes.settings(token_file=other))


def test_an_address_where_nothing_answers_is_refused(nodes):
    assert "nothing answers at" in why_not(nodes.settings(address=f"127.0.0.1:{free_port()}"))


def test_an_address_in_use_is_refused(nodes):
    wanted = nodes_module.Wanted(nodes.address, head=True, token_file=nodes.token, store_mb=100)
    with pytest.raises(DeviceError, match="Address already in use"):
        nodes_module.start(wanted, nodes.folder)


@pytest.mark.soak
def test_another_plinth_on_the_machine_is_refused(nodes, monkeypatch):
    here = lane_module.identity() | {"Plinth": "9.9.9"}
    monkeypatch.setattr(lane_module, "identity", lambda: here)
    assert re.search(r"another Plinth .*: Plinth [\w.]+, here 9\.9\.9", why_not(nodes.settings()))


def test_a_lane_that_lies_about_its_outputs_is_refused():
    loaded = load_model(net(), Sla(), pick("cpu"), LatencyModel(), batch_range=(1, 4))
    good = {"y": torch.zeros(2, 4)}
    loaded.check_outputs(good, 2)
    for lie in (
        {},
        {"y": torch.zeros(2, 5)},
        {"y": torch.zeros(3, 4)},
        {"y": torch.ones(2, 4, dtype=torch.int64)},
    ):
        with pytest.raises(ModelError, match="a lane gave"):
            loaded.check_outputs(lie, 2)


@pytest.mark.soak
def test_a_cluster_that_lets_in_whoever_asks_is_refused(monkeypatch):
    environment = nodes_module.environment
    monkeypatch.setattr(
        nodes_module,
        "environment",
        lambda *given: environment(*given) | {"RAY_AUTH_MODE": "disabled"},
    )
    with TemporaryDirectory(prefix="plr") as folder, cluster(Path(folder)) as unguarded:
        assert "lets in whoever asks" in why_not(unguarded.settings())


# -- who dies ---------------------------------------------------------------------------------
MASTER = """
import sys, time
from pathlib import Path
from plinth.engine import Engine
from plinth.engine.lanes.cluster.settings import Cluster
from tests.engine.lane_models import doubles
cluster = Cluster(address=sys.argv[1], token_file=Path(sys.argv[2]), cpus=0.25)
with Engine(devices=["ray:cpu"], threads=1, cluster=cluster) as engine:
    engine.add(doubles(Path(sys.argv[3])))
    print(engine._lanes.threads[0].lane.about["pid"], flush=True)
    sys.stdin.read()
"""


@pytest.mark.soak
def test_actors_end_with_an_engine_that_is_killed(nodes, tmp_path):
    path = os.pathsep.join((f"{ROOT}/src", ROOT))
    master = subprocess.Popen(
        [sys.executable, "-c", MASTER, nodes.address, str(nodes.token), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with master:
        assert master.stdout is not None
        actor = psutil.Process(int(master.stdout.readline()))
        master.kill()
        _, alive = psutil.wait_procs([actor], 30)
    assert not alive


@pytest.mark.soak
def test_when_the_head_ends_other_lanes_go_on(tmp_path):
    with TemporaryDirectory(prefix="plr") as folder, cluster(Path(folder)) as alone:
        engine = Engine(devices=["cpu", "ray:cpu"], threads=1, cluster=alone.settings())
        engine.add(net(), batch_range=(1, 4), sla=PATIENT)
        with engine:
            alone.stop()
            number = 0
            while engine.status()["lanes"][1]["state"] != "dead":
                number += 1
                asked = ask(engine, rows(number, 2))
                assert torch.equal(asked.result(WAIT).value, 2 * rows(number, 2))
        assert number


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["cut", "raylet"])
def test_what_happens_to_another_host_is_noticed_within_seconds_and_nothing_is_lost(fault):
    import cut_link

    if os.geteuid() != 0 or subprocess.run(["ip", "netns"], check=False).returncode:
        pytest.skip("needs root and ip(8), to make hosts of network namespaces")
    found = cut_link.run(18, fault)
    assert set(found["outcomes"]) <= {"answered", "refused", "late"}
    assert (found["lost"], found["outcomes"]["late"]) == (0, 0)
    assert 0 < found["noticed_after_seconds"] < 2 * cut_link.SILENT_SECONDS + 4


@pytest.mark.soak
def test_half_a_minute_of_seeded_chaos_loses_nothing_and_tells_nobody_twice():
    import chaos_lanes

    result = chaos_lanes.chaos(seconds=30, lanes=2, seed=7, every=1.0, lane="ray:cpu")
    assert chaos_lanes.is_right(result), result
    assert result["deaths"] > 0


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"adress": "x"}, "cluster.adress is unknown"),
        ({"address": "here"}, None),
        ({"address": "here:port"}, "expected host:port"),
        ({"cpus": -1.0}, "cluster.cpus is -1.0"),
        ({"silent_seconds": 0.0}, "cluster.silent_seconds"),
        ({"labels": {"zone": 1}}, "cluster.labels.zone"),
        ({"resources": {"scanner": 0}}, "cluster.resources.scanner"),
    ],
)
def test_impossible_settings_are_refused(table, match):
    if match is None:
        assert Cluster.of(table).told  # a name without a port is one of Ray's own
        return
    with pytest.raises(ConfigError, match=match):
        Cluster.of(table)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("plinth.engine.lanes.cluster.settings.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="need Ray") as refused:
        Engine(devices=["ray:cpu"])
    assert "cluster" in str(refused.value.hint)
