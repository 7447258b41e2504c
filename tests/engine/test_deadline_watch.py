"""Callers are told at their deadline, whatever the lane does that has their rows."""

import os
import signal
import threading
import time

import psutil
import pytest
import torch
from torch import Tensor, nn

from plinth.engine import Batcher, Call, DeadlineRefused, Engine, LatencyModel, Sla, Work
from plinth.engine.lanes import deadline_watch, fork_server
from plinth.engine.scheduler.batcher import Patience
from tests.engine.lane_models import doubles, net, rows

WAIT = 60
STUCK = -7.0


class Gate(threading.Event):
    """An event that copies of a module have in common, so that each lane has a module."""

    def __deepcopy__(self, _: object) -> "Gate":
        return self


class Sticks(nn.Module):
    """Doubles its rows; one that says so waits until it is let go."""

    def __init__(self, free: threading.Event, *, once: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.free = free
        self.once = once
        self.begun = Gate()

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == STUCK).any()) and not (self.once and self.begun.is_set()):
            self.begun.set()
            self.free.wait(WAIT)
        return x * self.factor


def given(deadlines: list[float | None], seconds: float = 0.010) -> Batcher:
    """A batcher whose lane was given works of a row at 0 s, which take so long each."""
    latency = LatencyModel()
    latency.seed("a", 1, seconds)
    queue = Batcher(latency)
    queue.register("a", 1)
    queue.pipeline_depth = len(deadlines)
    for due in deadlines:
        queue.admit(Work("a", 1, 0.0, Sla(deadline_ms=due)), 0.0)
        queue.next(0.0)
    return queue


def test_a_lane_is_waited_for_a_little_and_then_those_past_their_deadline_are_told():
    queue = given([50.0, 400.0])
    assert queue.overdue(0.049) == ([], pytest.approx(0.270)), "20 ms, and a quarter of a second"
    (first,), again = queue.overdue(0.271)
    assert isinstance(first.error, DeadlineRefused)
    assert first.error.deadline == pytest.approx(0.050)
    assert again == pytest.approx(0.400)
    queue.cancel(first.work)
    (second,), again = queue.overdue(0.401)
    assert (second.work is not first.work, again) == (True, float("inf"))


def test_a_lane_with_long_batches_is_waited_for_longer():
    assert given([900.0], seconds=0.5).overdue(0.8) == ([], pytest.approx(2.0)), "four times 0.5 s"


def test_what_has_no_deadline_is_waited_for_as_long_as_it_takes():
    assert given([None]).overdue(1e6) == ([], float("inf"))


def test_what_waits_is_looked_at_when_its_deadline_goes_by():
    queue = given([1_000.0])
    soon, later = (Work("a", 1, 0.0, Sla(deadline_ms=due)) for due in (500.0, 600.0))
    for work in (soon, later):
        queue.admit(work, 0.0)
    assert queue.overdue(0.0) == ([], pytest.approx(0.5))
    (told,), again = queue.overdue(0.55)
    assert told.work is soon
    assert (queue.urgent_rows, again) == (1, pytest.approx(0.6)), "a late lane may yet be free"


@pytest.mark.cpu
def test_those_who_have_rows_on_a_lane_that_hangs_or_wait_behind_it_are_told_in_time():
    free = threading.Event()
    module = Sticks(free)
    with Engine(device="cpu", threads=1) as engine:
        engine.add(net(module=module), batch_range=(1, 1), sla=Sla(deadline_ms=5_000))
        begun = time.monotonic()
        soon = Sla(deadline_ms=200)
        stuck = engine.submit(Call("net", torch.full((1, 4), STUCK)), soon)
        behind = engine.submit(Call("net", rows(1, 1)), soon)
        for future in (stuck, behind):
            assert isinstance(future.exception(WAIT), DeadlineRefused)
        assert time.monotonic() - begun < 5.0
        assert not free.is_set()
        free.set()
        assert torch.equal(
            engine.submit(Call("net", rows(2, 1))).result(WAIT).value, 2 * rows(2, 1)
        )


@pytest.mark.cpu
def test_a_round_waits_no_longer_for_a_lane_that_hangs_than_that_takes_to_be_sure():
    free = Gate()
    modes = {"mode": "sync"}
    with Engine(devices=["cpu", "cpu"], threads=1, modes=modes, hung_seconds=0.05) as engine:
        engine.add(net(module=Sticks(free)), batch_range=(1, 1))
        for number in range(2):
            engine.submit(Call("net", rows(number, 1))).result(WAIT)  # costs are known
        with engine._lock:  # both are of one round
            stuck = engine.submit(Call("net", torch.full((1, 4), STUCK)))
            well = engine.submit(Call("net", rows(2, 1)))
        assert torch.equal(well.result(WAIT).value, 2 * rows(2, 1))
        assert not stuck.done()
        free.set()
        assert torch.equal(stuck.result(WAIT).value, torch.full((1, 4), 2 * STUCK))


@pytest.mark.cpu
def test_rounds_go_on_without_a_lane_that_hangs_until_it_is_back():
    free, modes = Gate(), {"mode": "sync"}
    with Engine(devices=["cpu", "cpu"], threads=1, modes=modes, hung_seconds=0.05) as engine:
        engine.add(net(module=Sticks(free, once=True)), batch_range=(1, 1))
        for number in range(2):
            engine.submit(Call("net", rows(number, 1))).result(WAIT)  # costs are known
        stuck = engine.submit(Call("net", torch.full((1, 4), STUCK)))
        others = [engine.submit(Call("net", rows(number, 3))) for number in range(5)]
        for number, future in enumerate(others):
            assert torch.equal(future.result(WAIT).value, 2 * rows(number, 3))
        assert torch.equal(stuck.result(WAIT).value, torch.full((1, 4), 2 * STUCK))
        assert [lane["state"] for lane in engine.status()["lanes"]].count("hung") == 1
        free.set()
        while any(lane["state"] == "hung" for lane in engine.status()["lanes"]):
            engine.submit(Call("net", rows(1, 1))).result(WAIT)
        found = engine.submit(Call("net", rows(7, 4))).result(WAIT).value
        assert torch.equal(found, 2 * rows(7, 4))
        assert [lane["in_flight"] for lane in engine.status()["lanes"]] == [0, 0]
    assert engine.state == "closed"


def test_a_lane_that_others_wait_for_counts_as_hung_later_if_its_batch_is_long_or_unknown():
    latency = LatencyModel()
    latency.seed("a", 1, 1.0)
    queue = Batcher(latency, rounds=True)
    queue.register("a", 1)
    other, patience = queue.add_lane(), Patience(10.0, 20.0, 120.0)
    for key in ("a", "unknown"):
        queue.register(key, 1)
        queue.admit(Work(key, 1, 0.0, Sla()), 0.0)
        lane = queue.free_lane()
        batch, _ = queue.next(0.0, lane)
        bound = 21.0 if key == "a" else 120.0
        assert queue.hung(bound - 0.01, patience) == ([], pytest.approx(bound))
        assert queue.hung(bound, patience) == ([lane], float("inf"))
        queue.finished(batch, 1.0, 1.0)
        queue.latency.forget("unknown")
    for number in (lane, other):
        queue.admit(Work("a", 1, 200.0 + number, Sla()), 200.0)
    for number in (lane, other):
        queue.next(200.0, number)
    assert queue.hung(1e6, patience) == ([], float("inf")), "nobody waits"


@pytest.mark.cpu
def test_an_engine_closes_though_a_callback_of_a_missed_deadline_blocks(monkeypatch, caplog):
    monkeypatch.setattr(deadline_watch, "END_SECONDS", 0.05)
    free, told, back = threading.Event(), threading.Event(), threading.Event()

    def block(_: object) -> None:
        assert threading.current_thread().name == "plinth-deadlines"
        told.set()
        back.wait(WAIT)

    engine, module = Engine(device="cpu", threads=1).start(), Sticks(free)
    engine.add(net(module=module), batch_range=(1, 1))
    stuck = engine.submit(Call("net", torch.full((1, 4), STUCK)))
    assert module.begun.wait(WAIT)
    late = engine.submit(Call("net", rows(1, 1)), Sla(deadline_ms=500))
    late.add_done_callback(block)
    assert told.wait(WAIT)
    free.set()
    stuck.result(WAIT)
    engine.close()
    assert "has not come back" in caplog.text
    back.set()


@pytest.mark.cpu
@pytest.mark.soak
@pytest.mark.usefixtures("importable")
def test_who_waits_for_a_stopped_process_is_told_at_the_deadline_not_when_it_is_missed(tmp_path):
    with Engine(devices=["process:cpu"], threads=1, hung_seconds=20.0) as engine:
        engine.add(doubles(tmp_path), batch_range=(1, 4), sla=Sla(deadline_ms=60_000))
        for child in psutil.Process().children(recursive=True):
            if child.name() == fork_server.NAME:
                os.kill(child.pid, signal.SIGSTOP)
        begun = time.monotonic()
        asked = [engine.submit(Call("net", rows(n, 3)), Sla(deadline_ms=400)) for n in range(9)]
        assert all(isinstance(each.exception(WAIT), DeadlineRefused) for each in asked)
        assert time.monotonic() - begun < 5.0
        for child in psutil.Process().children(recursive=True):
            if child.name() == fork_server.NAME:
                os.kill(child.pid, signal.SIGCONT)
