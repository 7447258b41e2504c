"""The most that two lanes could answer, against every schedule there is, and the policy's share."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from plinth.engine.scheduler.optimum import best_of_two
from plinth.engine.scheduler.simulate import Setting, poisson, pooled

pytestmark = pytest.mark.cpu


def by_trying_all(setting, arrivals):
    """Every batch of any of the rows, on either lane, at every step, nested ones too."""
    fixed, due = int(setting.fixed), int(setting.deadline)
    last = int(setting.duration) + due

    @cache
    def most(now, lanes, left):
        left = tuple(at for at in left if at + due >= now + fixed + 1)
        if not left or now > last:
            return 0
        best = most(now + 1, tuple(max(lane - 1, 0) for lane in lanes), left)
        come = [place for place, at in enumerate(left) if at <= now]
        for rows in range(1, min(setting.max_rows, len(come)) + 1) if not lanes[0] else ():
            then = tuple(sorted((fixed + rows, lanes[1])))
            for batch in combinations(come, rows):
                if left[batch[0]] + due >= now + fixed + rows:
                    rest = tuple(at for place, at in enumerate(left) if place not in batch)
                    best = max(best, rows + most(now, then, rest))
        return best

    return most(0, (0, 0), tuple(int(at) for at in arrivals))


@pytest.mark.parametrize("seed", range(25))
def test_it_is_what_trying_all_schedules_finds(seed):
    random = np.random.default_rng(seed)
    setting = Setting(
        fixed=int(random.integers(1, 4)),
        per_row=1,
        max_rows=int(random.integers(1, 4)),
        deadline=int(random.integers(4, 10)),
        duration=10,
    )
    arrivals = np.sort(random.integers(0, 10, random.integers(3, 9))).astype(float)
    assert best_of_two(setting, arrivals) == by_trying_all(setting, arrivals)


def test_it_bounds_the_policy_where_times_lie_between_steps():
    setting = Setting(fixed=0.0052, max_rows=24, deadline=0.0448, duration=0.5)
    arrivals = poisson(2 * setting.capacity, setting.duration, 3)
    best = best_of_two(setting, arrivals)
    made = pooled(setting, arrivals, [1.0, 1.0]).finish.items()
    kept = sum(at <= work.deadline + 1e-9 for work, at in made)
    assert 0.8 * best <= kept <= best <= len(arrivals)


@pytest.mark.soak
def test_two_lanes_that_are_just_enough_answer_98_percent_of_the_most_there_is():
    setting = Setting(duration=6.0)
    kept = best = 0
    for seed in (7, 8, 9):
        arrivals = poisson(2 * setting.capacity, setting.duration, seed)
        made = pooled(setting, arrivals, [1.0, 1.0]).finish.items()
        kept += sum(at <= work.deadline + 1e-9 for work, at in made)
        best += best_of_two(setting, arrivals)
    assert kept >= 0.98 * best
