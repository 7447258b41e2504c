"""Who was answered and asks for more at once does not wait for a slice twice."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from torch import nn

from plinth.engine import Call, Engine, Model, ModelSpec, Sla, TensorSpec
from plinth.engine.scheduler.anticipation import Anticipation
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.simulate import Replay
from plinth.engine.scheduler.work import Work

SECONDS = 10.0
PROMISE = Sla(deadline_ms=150)
COSTS = {
    "payment": lambda rows, at=0.0: 0.0006 + 0.00001 * rows,
    "window": lambda rows, at=0.0: 0.001 + 0.0155 * rows,
}


def scene(again: float, resumes: float) -> tuple[float, float, int]:
    """600 payments a second beside windows without end.

    Args:
        again: share of payments that ask a second time once they are answered.
        resumes: seconds until they do.

    Returns:
        The median of all in ms, that of those who ask twice, and windows.
    """
    costs = LatencyModel()
    batcher = Batcher(costs)
    for key, most in (("payment", 256), ("window", 16)):
        batcher.register(key, most)
        for rows in (1, 4, 16, most):
            costs.seed(key, rows, COSTS[key](rows))
    batcher.register_sla(PROMISE)
    random = np.random.default_rng(0)
    arrivals = np.sort(random.uniform(0, SECONDS, random.poisson(600 * SECONDS)))
    payments = [Work("payment", 1, float(at), PROMISE) for at in arrivals]
    last = {work: work for work in payments}

    def follow(work: Work, now: float) -> list[Work]:
        if last.get(work) is not work or random.random() >= again:
            return []
        last[work] = Work("payment", 255, now + resumes, PROMISE, since=work.arrival)
        return [last[work]]

    run = Replay(batcher, COSTS)
    run.follow, run.resumes = follow, resumes
    trace = run.through([Work("window", 1 << 40, 0.0, Sla()), *payments], SECONDS)
    ended = [trace.finish.get(last[work], np.nan) - work.arrival for work in payments]
    twice = [end for work, end in zip(payments, ended, strict=True) if last[work] is not work]
    medians = [np.nanmedian(each) * 1e3 if each else 0.0 for each in (ended, twice)]
    return *medians, sum(ran.batch.rows for ran in trace.ran if ran.batch.key == "window")


def test_who_asks_twice_waits_for_one_slice_instead_of_two(monkeypatch):
    every, twice, windows = scene(again=0.04, resumes=0.0012)
    monkeypatch.setattr(Anticipation, "until", lambda _self, _lane, now: now)
    every_without, twice_without, windows_without = scene(again=0.04, resumes=0.0012)
    assert twice < 0.6 * twice_without
    assert every < every_without
    assert windows > 0.9 * windows_without


@pytest.mark.parametrize(("again", "resumes"), [(0.0, 0.0012), (0.04, 0.006)])
def test_where_nobody_asks_again_in_time_it_is_tried_now_and_then_only(monkeypatch, again, resumes):
    _, _, windows = scene(again, resumes)
    monkeypatch.setattr(Anticipation, "until", lambda _self, _lane, now: now)
    assert windows > 0.97 * scene(again, resumes)[2]


def test_a_slice_waits_once_for_a_tenth_of_its_time_and_on_its_own_lane():
    waits = Anticipation()
    waits.slice_begun(0.050)
    assert waits.until(0, 1.0) == 1.0  # nobody was answered
    waits.answered(0, 1.0)
    assert waits.until(1, 1.0) == 1.0
    assert waits.until(0, 1.0) == pytest.approx(1.005)
    waits.answered(0, 1.004)  # who is answered meanwhile does not make it longer
    assert waits.until(0, 1.004) == pytest.approx(1.005)
    assert waits.until(0, 1.006) == 1.006
    waits.resumed()
    waits.answered(0, 1.007)
    assert waits.until(0, 1.007) == 1.007  # once between two slices
    waits.slice_begun(0.050)
    waits.answered(0, 2.0)
    assert waits.until(0, 2.0) == pytest.approx(2.005)
    waits.resumed()
    assert waits.until(0, 2.001) == 2.001


class Noted(nn.Module):
    """Notes its name when it runs, once its gate is open."""

    ran: list[str] = []  # noqa: RUF012 - copies share it
    begun, gate = threading.Event(), threading.Event()

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        self.begun.set()
        self.gate.wait(30)
        self.ran.append(self.name)
        return x


def noted(name):
    shape = (TensorSpec(name="x", shape=(2,)),)
    spec = ModelSpec(name=name, inputs=shape, outputs=(TensorSpec(name="y", shape=(2,)),))
    return Model(spec, Noted(name))


def test_a_flow_asks_for_more_before_the_next_slice_begins():
    Noted.gate.set()

    def twice():
        first = yield Call("urgent", torch.ones(1, 2))
        return (yield Call("urgent", first + 1))

    def patient():
        return (yield Call("patient", torch.ones(1, 2)))

    async def both(engine):
        slices = [asyncio.create_task(engine.run_async(patient(), Sla())) for _ in range(4)]
        await asyncio.to_thread(Noted.begun.wait, 30)
        urgent = asyncio.create_task(engine.run_async(twice(), Sla(60_000)))
        await asyncio.to_thread(str)  # it has asked when this is over
        Noted.gate.set()
        answer = await urgent
        await asyncio.gather(*slices)
        return answer.value

    engine = Engine(device="cpu")
    engine.add(noted("urgent"), batch_range=(1, 4))
    engine.add(noted("patient"), batch_range=(1, 1))
    followed = []
    engine._batcher.latency.followed = lambda *told: followed.append(told)
    with engine:
        Noted.ran.clear()
        Noted.gate.clear()
        Noted.begun.clear()
        key = engine._models.get("patient").bucket({"x": torch.ones(1, 2)})
        engine._batcher.latency.forget(key)
        engine._batcher.latency.seed(key, 1, 20.0)  # so a slice may wait for two seconds
        assert torch.equal(asyncio.run(both(engine)), torch.full((1, 2), 2.0))
    assert Noted.ran[:3] == ["patient", "urgent", "urgent"]
    ((key, seconds),) = followed
    assert key.startswith("urgent@")
    assert 0 < seconds < 30
