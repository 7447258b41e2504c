"""Lanes in processes of their own: what crosses, and what becomes of work when one ends."""

import os
import signal
import threading

import psutil
import pytest
import torch
from torch import nn

from plinth.engine import Call, ConfigError, DeadlineRefused, Engine, ModelError, Sla
from plinth.engine.lanes import fork_server
from tests.engine.lane_models import CARD, RAISE, SEGFAULT, STOP, doubles, net, rows

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("importable")]
WAIT = 120
PATIENT = Sla(deadline_ms=100_000)


def pids() -> list[int]:
    """The worker processes of this one, oldest first."""
    found = psutil.Process().children(recursive=True)
    own = [each for each in found if each.name() == fork_server.NAME]
    return [each.pid for each in sorted(own, key=psutil.Process.create_time)]


def ask(engine: Engine, values: torch.Tensor, sla: Sla | None = PATIENT):
    return engine.submit(Call("net", values), sla)


def until_running(engine: Engine, deaths: int) -> None:
    """Answers come, and every lane that died is back."""
    while True:
        assert torch.equal(ask(engine, rows(1, 2)).result(WAIT).value, 2 * rows(1, 2))
        lanes = engine.status()["lanes"]
        if sum(lane["deaths"] for lane in lanes) >= deaths and all(
            lane["state"] == "running" for lane in lanes
        ):
            return


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Two worker processes that the tests of this file wear out in turns."""
    made = Engine(devices=["process:cpu", "process:cpu"], threads=1, hung_seconds=2.0)
    made.add(doubles(tmp_path_factory.mktemp("store")), batch_range=(1, 4), sla=PATIENT)
    with made:
        yield made


def deaths(engine: Engine) -> int:
    return sum(lane["deaths"] for lane in engine.status()["lanes"])


def test_lanes_that_are_alike_share_one_model_of_costs_also_before_it_learned_anything():
    assert Engine(devices=["process:cpu", "process:cpu"])._batcher.lanes.kinds == 1


def test_every_caller_gets_its_own_rows_as_in_this_process(engine):
    asked = [ask(engine, rows(n, 1 + n % 7), None if n % 3 else PATIENT) for n in range(100)]
    for n, future in enumerate(asked):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1 + n % 7))
    lanes = engine.status()["lanes"]
    assert [(lane["name"], lane["kind"], lane["state"]) for lane in lanes] == [
        ("process:cpu/0", "process", "running"),
        ("process:cpu/1", "process", "running"),
    ]


@pytest.mark.parametrize(
    "by", [signal.SIGKILL, signal.SIGSTOP, pytest.param(signal.SIGSEGV, marks=pytest.mark.soak)]
)
def test_a_process_that_is_killed_or_stopped_loses_nothing_and_is_started_again(engine, by):
    before = deaths(engine)
    asked = [ask(engine, rows(n, 3), None if n % 3 else PATIENT) for n in range(60)]
    os.kill(pids()[0], by)
    asked += [ask(engine, rows(n, 3)) for n in range(60, 400)]
    for n, future in enumerate(asked):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 3))
    until_running(engine, before + 1)


@pytest.mark.soak
def test_one_that_is_killed_while_idle_costs_nothing(engine):
    before = deaths(engine)
    for pid in pids():
        os.kill(pid, signal.SIGKILL)
    until_running(engine, before + 2)


@pytest.mark.soak
def test_all_lanes_come_back_when_the_server_that_forked_them_is_killed(engine):
    before, first = deaths(engine), pids()
    (server,) = {psutil.Process(pid).ppid() for pid in first}
    assert server != os.getpid(), "they are forked, not started anew"
    os.kill(server, signal.SIGKILL)
    until_running(engine, before + 2)
    assert not set(pids()) & set(first)


@pytest.mark.soak
def test_where_nothing_can_be_forked_a_lane_is_started_anew(tmp_path, monkeypatch):
    def refuses(*_: object) -> None:
        raise OSError("the fork server has 2 threads")

    before = pids()
    monkeypatch.setattr(fork_server.ForkServer, "fork", refuses)
    with Engine(devices=["process:cpu"], threads=1) as engine:
        engine.add(doubles(tmp_path), sla=PATIENT)
        assert torch.equal(ask(engine, rows(2, 2)).result(WAIT).value, 2 * rows(2, 2))
        assert pids() == before


@pytest.mark.soak
@pytest.mark.parametrize("poison", [SEGFAULT, STOP])
def test_a_row_that_ends_processes_is_found_and_fails_alone(engine, poison):
    bad = ask(engine, torch.full((1, 4), poison))
    others = [ask(engine, rows(n, 1)) for n in range(12)]
    assert isinstance(bad.exception(WAIT), ModelError)
    for n, future in enumerate(others):
        assert torch.equal(future.result(WAIT).value, 2 * rows(n, 1))


def test_what_a_model_raises_there_is_told_without_its_words(engine, caplog):
    error = ask(engine, torch.full((1, 4), RAISE)).exception(WAIT)
    assert isinstance(error, ModelError)
    assert "ValueError" in str(error)
    assert CARD not in str(error) + caplog.text


@pytest.mark.soak
def test_models_come_and_go_while_calls_run(engine, tmp_path):
    wrong: list[int] = []
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            value = ask(engine, rows(5, 2)).result(WAIT).value
            if not (torch.equal(value, 2 * rows(5, 2)) or torch.equal(value, 3 * rows(5, 2))):
                wrong.append(1)

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        engine.add(doubles(tmp_path, "2", 3.0), batch_range=(1, 4), sla=PATIENT)
        assert torch.equal(ask(engine, rows(1, 2)).result(WAIT).value, 3 * rows(1, 2))
        engine.add(doubles(tmp_path, "3", 2.0), batch_range=(1, 4), sla=PATIENT)
        third = engine.add_lane("process:cpu")
        engine.drain_lane(third)
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert len(pids()) == 2


class Branches(nn.Module):
    """No graph: what runs depends on the values."""

    def forward(self, x):
        return x if bool((x > 0).all()) else -x


def test_a_module_that_cannot_be_sent_is_refused_before_it_serves(engine):
    with pytest.raises(ModelError, match="cannot be exported"):
        engine.add(net("branches", Branches()))
    assert list(engine.contracts()) == ["net"]


def test_a_model_that_was_changed_since_it_was_stored_is_not_served(engine, tmp_path):
    model = doubles(tmp_path, "4")
    with torch.no_grad():
        model.module.factor.fill_(5.0)
    with pytest.raises(ModelError, match="other answers in a worker process"):
        engine.add(model)


@pytest.mark.soak
def test_no_process_outlives_its_engine_even_one_that_was_never_started(tmp_path):
    before = set(pids())
    engine = Engine(devices=["process:cpu"], threads=1)
    engine.add(doubles(tmp_path))
    assert len(set(pids()) - before) == 1
    engine.close()
    assert set(pids()) == before


@pytest.mark.soak
def test_while_the_only_process_starts_again_what_would_be_late_is_refused_at_once(tmp_path):
    before = set(pids())
    with Engine(devices=["process:cpu"], threads=1) as engine:
        engine.add(doubles(tmp_path), sla=PATIENT)
        assert ask(engine, rows(1, 1)).result(WAIT)
        (pid,) = set(pids()) - before
        os.kill(pid, signal.SIGKILL)
        while True:  # before it is noticed they are answered
            refused = ask(engine, rows(1, 1), Sla(deadline_ms=500)).exception(WAIT)
            if refused is not None:
                break
        assert isinstance(refused, DeadlineRefused)
        assert 0.5 < refused.retry_after < 60
        assert torch.equal(ask(engine, rows(2, 2)).result(WAIT).value, 2 * rows(2, 2))


@pytest.mark.soak
def test_lanes_in_processes_and_in_this_one_share_the_queue(tmp_path):
    with Engine(devices=["cpu", "process:cpu"], threads=1) as engine:
        engine.add(net(), batch_range=(1, 4), sla=PATIENT)  # in no store: its program is sent
        while not all(lane["utilisation"] for lane in engine.status()["lanes"]):
            asked = [ask(engine, rows(n, 4)) for n in range(40)]
            for n, future in enumerate(asked):
                assert torch.equal(future.result(WAIT).value, 2 * rows(n, 4))


@pytest.mark.parametrize(
    ("devices", "options", "match"),
    [
        (["process:tpu"], {}, "tpu"),
        (["process:cpu"], {"pipeline_depth": 17}, "expected 1 to 16"),
        (["process:cpu"], {"hung_seconds": 0.0}, "hung_seconds is 0.0"),
    ],
)
def test_impossible_settings_are_refused(devices, options, match):
    with pytest.raises(ConfigError, match=match):
        Engine(devices=devices, **options)


@pytest.mark.soak
def test_twenty_seconds_of_seeded_chaos_lose_nothing_and_tell_nobody_twice():
    import chaos_lanes

    result = chaos_lanes.chaos(seconds=20, lanes=2, seed=7, every=1.0)
    assert chaos_lanes.is_right(result), result
    assert result["deaths"] > 0
    assert result["outcomes"]["answered"] > 100
