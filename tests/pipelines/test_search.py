"""The search for the highest rate, in virtual time, on servers whose capacity is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from plinth.pipelines.bench.load import poisson
from plinth.pipelines.bench.search import Answer, Goal, Search, Step, Trial, wilson

SERVICE, SLA = 0.001, 0.010  # seconds


def latencies(rate: float, seconds: float, seed: int, service: float = SERVICE) -> np.ndarray:
    """Of a server that answers one after the other (Lindley's recursion)."""
    due = poisson(rate, seconds, seed)
    steps = np.arange(1, len(due) + 1) * service
    finish = steps + np.maximum.accumulate(due - steps + service)
    return finish - due


def queue(seconds: float) -> Callable[[float, int], Trial]:
    def measure(rate: float, number: int) -> Trial:
        found = latencies(rate, seconds, number)
        return Trial(len(found), int(np.count_nonzero(found <= SLA)))

    return measure


def true_capacity() -> float:
    """The rate at which 99 % of very many requests are in time, found the slow way."""
    rates = np.arange(700, 990, 10)
    shares = [np.mean(latencies(float(rate), 1000.0, 1) <= SLA) for rate in rates]
    return float(rates[np.flatnonzero(np.array(shares) >= 0.99)[-1]])


def step(capacity: float) -> Callable[[float, int], Trial]:
    """A server that is perfect up to a rate and useless beyond."""
    return lambda rate, number: Trial(10_000, 10_000 if rate <= capacity else 0)


def test_the_capacity_of_a_queue_is_found() -> None:
    truth = true_capacity()
    assert 700 < truth < 980
    answer = Search(queue(30.0), Goal(SLA), start=50.0).run()
    assert answer.rate == pytest.approx(truth, rel=0.08)
    assert answer.rate <= truth * 1.03, "never much more than is true"
    assert answer.limit == "server"
    assert answer.steps[-1].purpose == "confirm"
    assert answer.steps[-1].verdict == "held"


@given(capacity=st.floats(2.0, 1e5), start=st.floats(1.0, 1e5))
def test_the_answer_is_within_the_tolerance_from_any_start(capacity: float, start: float) -> None:
    answer = Search(step(capacity), Goal(SLA), start=start).run()
    assert answer.rate is not None
    assert answer.ceiling is not None
    assert answer.rate <= capacity < answer.ceiling
    assert answer.rate >= 0.95 * answer.ceiling
    assert len(answer.steps) < 60


def test_no_rate_holds() -> None:
    answer = Search(step(0.0), Goal(SLA), start=64.0, least=4.0).run()
    assert answer == Answer(None, 4.0, "server", answer.steps)
    assert [s.rate for s in answer.steps] == [64, 32, 16, 8, 4]


def test_the_greatest_rate_allowed_is_not_exceeded() -> None:
    tried: list[float] = []
    answer = Search(
        step(1e9), Goal(SLA), start=50.0, most=300.0, on_step=lambda s: tried.append(s.rate)
    ).run()
    assert (answer.rate, answer.ceiling, answer.limit) == (300.0, None, "max_rate")
    assert tried == [50, 100, 200, 300, 300]


def test_a_lagging_client_is_not_taken_for_the_servers_limit() -> None:
    def measure(rate: float, number: int) -> Trial:
        lag = ("the client was late",) if rate > 100 else ()
        return Trial(10_000, 10_000 if rate <= 100 else 5_000, lag)

    answer = Search(measure, Goal(SLA), start=50.0).run()
    assert answer.rate == pytest.approx(100.0, rel=0.05)
    assert answer.limit == "client"
    held = Search(lambda rate, n: Trial(9_999, 9_999, ("late",)), Goal(SLA), most=400.0).run()
    assert held.rate == 400.0, "what was in time in spite of the lag was in time"


def test_a_lucky_best_is_tried_again_and_given_up() -> None:
    """Above 100/s this server keeps its promise now and then; one such trial is no answer."""
    visits: dict[float, int] = {}

    def measure(rate: float, number: int) -> Trial:
        visits[rate] = visits.get(rate, 0) + 1
        lucky = rate <= 100 or (rate < 180 and visits[rate] == 1)
        return Trial(10_000, 10_000 if lucky else 0)

    answer = Search(measure, Goal(SLA), start=50.0).run()
    assert answer.rate is not None
    assert 90 < answer.rate <= 100
    failed = [s for s in answer.steps if s.purpose == "confirm" and s.verdict == "missed"]
    assert failed
    assert Search(measure, Goal(SLA), start=170.0, confirm=0).run().rate > 100


def test_an_unclear_rate_is_tried_again_and_then_counts_as_missed() -> None:
    goal = Goal(SLA)
    few = goal.enough() // 4
    steps: list[Step] = []
    Search(
        lambda rate, n: Trial(few, few - (rate > 50) * (few // 100)),
        goal, start=50.0, most=100.0, repeats=5, confirm=0, on_step=steps.append,
    ).run()  # fmt: skip
    assert (steps[0].rate, steps[0].verdict) == (50.0, "held")
    assert (steps[1].rate, steps[1].verdict) == (100.0, "undecided")
    assert len(steps[1].trials) == 5
    assert steps[1].share == pytest.approx(0.99, abs=0.003)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(case: tuple[int, int]) -> None:
    hits, of = case
    low, high = wilson(hits, of, 1.6448536269514722)
    known = binomtest(hits, of).proportion_ci(0.90, method="wilson")
    assert low == pytest.approx(known.low, abs=1e-9)
    assert high == pytest.approx(known.high, abs=1e-9)


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.999])
def test_enough_requests_can_show_the_share(quantile: float) -> None:
    goal = Goal(SLA, quantile)
    count = goal.enough()
    assert goal.verdict(math.ceil(count * (1 + quantile) / 2), count) == "held"
    assert goal.verdict(round(count * quantile), count) == "undecided"
    assert goal.verdict(round(count * (1 - 3 * (1 - quantile))), count) == "missed"
    assert goal.verdict(0, 0) == "undecided"
