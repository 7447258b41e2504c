"""The highest rate that holds a promise: the search, without clock or network.

A rate *holds* when its trials together show, with the stated confidence, that at least the
promised share of the requests is answered in time. The search grows the rate until it does not
hold, halves the gap, and then tries the best rate again with new arrivals, because the best of
many noisy trials is otherwise too good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

Verdict = Literal["held", "missed", "undecided", "client"]


@dataclass(frozen=True, slots=True)
class Goal:
    """The promise, and how surely it must be shown.

    Args:
        sla: seconds from when a request is due to its whole answer.
        quantile: share of all offered requests that must be answered within it.
        confidence: of the one-sided Wilson bound on that share. It takes requests as
            independent; stalls make them less so, which is why rates are tried again.
    """

    sla: float
    quantile: float = 0.99
    confidence: float = 0.95

    def enough(self) -> int:
        """Requests that can show the share when half of the allowed misses happen."""
        return math.ceil(4 * self._z**2 * self.quantile / (1 - self.quantile))

    def verdict(self, in_time: int, offered: int) -> Verdict:
        """What so many answers in time say of the share."""
        if not offered:
            return "undecided"
        low, high = wilson(in_time, offered, self._z)
        if low >= self.quantile:
            return "held"
        return "missed" if high < self.quantile else "undecided"

    @property
    def _z(self) -> float:
        return NormalDist().inv_cdf(self.confidence)


def wilson(hits: int, of: int, z: float) -> tuple[float, float]:
    """Score interval of a share (E. B. Wilson, JASA 22, 1927).

    Args:
        hits: successes.
        of: tries, above 0.
        z: standard deviations of the bound, 1.645 for 95 % on one side.
    """
    share = hits / of
    middle = share + z * z / (2 * of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return (middle - reach) / scale, (middle + reach) / scale


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one rate.

    Args:
        offered: requests that were due.
        in_time: those answered within the SLA.
        problems: why the client, not the server, may have been the limit.
        detail: whatever the report wants.
    """

    offered: int
    in_time: int
    problems: tuple[str, ...] = ()
    detail: Any = None


@dataclass(frozen=True, slots=True)
class Step:
    """All trials of one visit to a rate (per second) and what they show together."""

    rate: float
    trials: tuple[Trial, ...]
    verdict: Verdict
    purpose: Literal["search", "confirm"] = "search"

    @property
    def share(self) -> float:
        """Share answered in time."""
        return sum(t.in_time for t in self.trials) / max(sum(t.offered for t in self.trials), 1)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the search found.

    Args:
        rate: the highest rate that held and was confirmed, per second; ``None``: none did.
        ceiling: the lowest rate that did not hold, if any.
        limit: what ended the search: the ``server``, the ``client`` that could not send more,
            or the ``max_rate`` it was given.
        steps: in the order they ran.
    """

    rate: float | None
    ceiling: float | None
    limit: Literal["server", "client", "max_rate"]
    steps: tuple[Step, ...]


Measure = Callable[[float, int], Trial]
"""Runs one trial at a rate; the number differs in each call and seeds the arrivals."""


@dataclass(slots=True)
class Search:
    """Looks for the highest rate that holds.

    Args:
        measure: runs one trial.
        goal: what must hold.
        start: first rate tried, per second.
        least: no rate below this is tried.
        most: no rate above this is tried.
        growth: factor between rates until one does not hold.
        tolerance: the gap that is small enough, as a share of the rate.
        repeats: most trials at one rate; one that is still undecided then counts as missed.
        confirm: trials with new arrivals that the answer must hold in, together.
        on_step: told of each step.
    """

    measure: Measure
    goal: Goal
    start: float = 50.0
    least: float = 1.0
    most: float = math.inf
    growth: float = 2.0
    tolerance: float = 0.05
    repeats: int = 3
    confirm: int = 2
    on_step: Callable[[Step], None] = lambda step: None
    _steps: list[Step] = field(init=False, default_factory=list)
    _trials: int = field(init=False, default=0)

    def run(self) -> Answer:
        """Search; a few dozen trials at most."""
        low, high = self._bracket()
        while low is not None and high is not None and high - low > self.tolerance * high:
            middle = math.sqrt(low * high)
            if self._holds(middle):
                low = middle
            else:
                high = middle
        while low is not None and not self._confirmed(low):
            high, low = low, low * (1 - self.tolerance)
            low = None if low < self.least else low
        return Answer(low, high, self._limit(high), tuple(self._steps))

    def _bracket(self) -> tuple[float | None, float | None]:
        """A rate that holds and one that does not; either may be missing."""
        rate = min(max(self.start, self.least), self.most)
        if self._holds(rate):
            while rate < self.most:
                below, rate = rate, min(rate * self.growth, self.most)
                if not self._holds(rate):
                    return below, rate
            return rate, None
        while rate > self.least:
            above, rate = rate, max(rate / self.growth, self.least)
            if self._holds(rate):
                return rate, above
        return None, rate

    def _limit(self, ceiling: float | None) -> Literal["server", "client", "max_rate"]:
        if ceiling is None:
            return "max_rate"
        verdicts = [step.verdict for step in self._steps if step.rate == ceiling]
        return "client" if verdicts[-1] == "client" else "server"

    def _holds(self, rate: float) -> bool:
        trials: list[Trial] = []
        while self._verdict(trials) == "undecided" and len(trials) < self.repeats:
            trials.append(self._trial(rate))
        return self._note(Step(rate, tuple(trials), self._blame(trials)))

    def _confirmed(self, rate: float) -> bool:
        trials = [self._trial(rate) for _ in range(self.confirm)]
        verdict = self._blame(trials) if trials else "held"
        return not trials or self._note(Step(rate, tuple(trials), verdict, "confirm"))

    def _trial(self, rate: float) -> Trial:
        self._trials += 1
        return self.measure(rate, self._trials)

    def _verdict(self, trials: list[Trial]) -> Verdict:
        return self.goal.verdict(sum(t.in_time for t in trials), sum(t.offered for t in trials))

    def _blame(self, trials: list[Trial]) -> Verdict:
        """The verdict; a rate that was not held while the client lagged tells of the client."""
        verdict = self._verdict(trials)
        lagged = verdict != "held" and any(trial.problems for trial in trials)
        return "client" if lagged else verdict

    def _note(self, step: Step) -> bool:
        self._steps.append(step)
        self.on_step(step)
        return step.verdict == "held"
