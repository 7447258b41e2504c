"""The policy against the field's, in virtual time; the tables of docs/benchmarks.md.

A batch of n costs 20 ms + 1 ms x n, at most 128, every answer is due within 200 ms.
"""

from functools import cache

import pytest

from plinth.engine.scheduler.simulate import (
    Outcome,
    Setting,
    clairvoyant,
    elastic,
    poisson,
    queueing,
)

pytestmark = pytest.mark.cpu

SCENE = Setting(duration=15.0)
BRIEF = Setting(duration=5.0)
"""What the ceiling is computed for, as long as the scene itself."""
SEED = 7


@cache
def ceiling(rate: float) -> float:
    return clairvoyant(BRIEF, poisson(rate, BRIEF.duration, SEED)).goodput


@cache
def plinth(rate: float, scene: Setting = SCENE) -> Outcome:
    return elastic(scene, poisson(rate, scene.duration, SEED))


@pytest.mark.parametrize("rate", [865, 1000, pytest.param(1250, marks=pytest.mark.soak), 1500])
def test_overload_reaches_the_clairvoyant_ceiling(rate):
    assert plinth(rate, BRIEF).goodput >= 0.98 * ceiling(rate)
    assert plinth(rate, BRIEF).late == plinth(rate).late == 0


@pytest.mark.parametrize("rate", [400, 600, 800])
def test_below_capacity_nearly_everything_is_in_time(rate):
    ours = plinth(rate, BRIEF)
    assert ours.in_sla >= 0.98 * min(ours.offered, ceiling(rate) * BRIEF.duration)


@pytest.mark.parametrize("rate", [400, 600])
def test_no_avoidable_rejection_from_the_first_second_on(rate):
    first_seconds = Setting(duration=6.0)
    ours = elastic(first_seconds, poisson(rate, 6.0, SEED))
    assert (ours.refused, ours.late) == (0, 0)


@pytest.mark.parametrize("rate", [865, 1000, 1500])
def test_the_fields_habits_collapse_or_lose_a_sixth(rate):
    arrivals = poisson(rate, SCENE.duration, SEED)
    ours = plinth(rate).goodput
    assert queueing(SCENE, arrivals, window=0.01).goodput < 0.5 * ours
    assert queueing(SCENE, arrivals, timeout=SCENE.deadline).goodput < 0.5 * ours
    assert queueing(SCENE, arrivals, greedy=True).goodput < 0.5 * ours
    assert queueing(SCENE, arrivals, timeout=0.05).goodput < ours
