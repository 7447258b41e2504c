"""Whether a version that a rule promoted declines what it was promoted for, and no more.

A challenger shows its share of declined payments in shadow, and the rule bounds that. From then on
it declines in earnest, on payments that nobody had seen, so its first ones are held against what it
had shown; where it declines far more, what answered before answers again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from math import sqrt
from typing import Any

from prometheus_client import Gauge

from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance.succession.challenger import Promotion, most_declined

log = logging.getLogger(__name__)

LEAST, MOST = 1_000, 100_000
"""Payments after which a version is judged first, and last."""
CHANCE = 4.0
"""Standard deviations beyond the bound that are put down to chance."""
MAX_WAITING = 65_536
"""Chunks that wait to be counted; of more the oldest are left out."""

DECLINED = Gauge(
    "plinth_finance_probation_decline_share",
    "Share of payments that a version declines by its score since a rule promoted it.",
    registry=REGISTRY,
)
ALARM = Gauge(
    "plinth_finance_probation_alarm",
    "1 where it declined far more than in shadow, and was taken back.",
    registry=REGISTRY,
)


class Probation:
    """Counts what a version declines; :meth:`take` may be called by any thread.

    Args:
        bound: share of payments that it may decline, by its score; ``None``: nobody said.
    """

    def __init__(self, bound: float | None) -> None:
        self._bound = bound
        self._taken: deque[tuple[int, int]] = deque(maxlen=MAX_WAITING)
        self._payments = self._declined = 0

    @classmethod
    def of(cls, decision: Mapping[str, Any] | None, rule: Promotion | None) -> Probation:
        """That of the version that a decision let answer.

        Args:
            decision: the line of ``decisions.jsonl``; ``None``: there is none.
            rule: now in force; without one nothing is taken back.
        """
        if rule is None or decision is None or decision["by"] != "rule":
            return cls(None)
        why = decision.get("why")
        figures = why.get("figures") if isinstance(why, Mapping) else None
        if not isinstance(figures, Mapping) or "challenger_decline_share" not in figures:
            return cls(None)  # decided by an earlier Plinth, which did not look
        return cls(most_declined(rule, figures))

    def take(self, payments: int, declined: int) -> None:
        """Count payments, and how many of them the score declines."""
        if self._bound is not None:
            self._taken.append((payments, declined))

    def exceeded(self) -> dict[str, float] | None:
        """Figures where it declines far more than it may; ``None``: not as far as is known.

        "Far more" is beyond what chance gives: so many standard deviations of a binomial count.
        """
        if self._bound is None:
            return None
        while self._taken:
            payments, declined = self._taken.popleft()
            self._payments += payments
            self._declined += declined
        if self._payments < LEAST:
            return None
        share, allowed = self._declined / self._payments, self._bound * self._payments
        DECLINED.set(share)
        exceeded = self._declined > allowed + CHANCE * sqrt(max(allowed, 1.0))
        ALARM.set(exceeded)
        if exceeded:
            return {"payments": self._payments, "decline_share": share, "at_most": self._bound}
        if self._payments >= MOST:
            self._bound = None
            self._taken.clear()
        return None
