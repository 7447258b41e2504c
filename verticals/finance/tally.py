"""What decisions on a history would have come to: alerts, frauds stopped, money."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from plinth.verticals.contract import Tally
from plinth.verticals.finance.schema import (
    Decision,
    Record,
    is_follow_up,
    is_label,
    milliseconds,
)

_DAY = 86_400_000
_Payment = tuple[str, str, int]
"""Transaction id, terminal, time: what a label names a payment by."""


@dataclass(slots=True)
class _Known:
    """Payments of one kind: how many, how many of them stopped, and their amounts."""

    count: int = 0
    stopped: int = 0
    amount: float = 0.0
    amount_stopped: float = 0.0


@dataclass(slots=True)
class _Figures:
    decisions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    amount_declined: float = 0.0
    first: int | None = None
    last: int = 0


class FraudTally(Tally):
    """Adds up decisions, and what labels later say of them.

    A payment that was reviewed or declined counts as stopped. Payments are remembered by id,
    terminal and time, about 200 bytes each, since labels come later.

    Args:
        rates: base currency of one unit, by currency.
    """

    def __init__(self, rates: dict[str, float]) -> None:
        super().__init__()
        self._rates = rates
        self._seen: dict[_Payment, tuple[bool, float]] = {}
        self._fraud: dict[_Payment, bool] = {}
        self._unknown = 0
        self._sums = _Figures()

    def add(self, request: Record | None, result: Any) -> str:
        """See :class:`Tally`."""
        word = super().add(request, result)
        if request is None or not isinstance(result, Decision) or is_follow_up(request):
            return word
        name = (request.transaction_id, request.terminal_id, milliseconds(request.event_time))
        if is_label(request):
            self._fraud[name] = request.fraud
            return "noted"
        sums = self._sums
        amount = request.amount * self._rates[request.currency]
        sums.decisions[result.decision] += 1
        sums.reasons.update(reason.code for reason in result.reason_codes)
        sums.amount_declined += amount if result.decision == "decline" else 0.0
        sums.first = name[2] if sums.first is None else min(sums.first, name[2])
        sums.last = max(sums.last, name[2])
        if not result.duplicate:
            self._seen[name] = (result.decision != "approve", amount)
        return result.decision

    def _known(self, fraud: bool) -> _Known:
        known = _Known()
        for name, was_fraud in self._fraud.items():
            if was_fraud is not fraud or name not in self._seen:
                continue
            stopped, amount = self._seen[name]
            known.count += 1
            known.amount += amount
            known.stopped += stopped
            known.amount_stopped += amount if stopped else 0.0
        return known

    def figures(self) -> dict[str, float]:
        """See :class:`Tally`; amounts in base currency.

        Precision is over labelled payments; it tells nothing where frauds alone are labelled.
        """
        sums = self._sums
        fraud, genuine = self._known(True), self._known(False)
        alerts = sums.decisions["review"] + sums.decisions["decline"]
        days = max(1.0, (sums.last - (sums.first or 0)) / _DAY)
        stopped = fraud.stopped + genuine.stopped
        return {
            "payments": sums.decisions.total(),
            "approved": sums.decisions["approve"],
            "reviewed": sums.decisions["review"],
            "declined": sums.decisions["decline"],
            "refused": self.refused,
            "alerts per day": round(alerts / days, 3),
            "amount declined": round(sums.amount_declined, 2),
            "labelled frauds": fraud.count,
            "frauds stopped": fraud.stopped,
            "amount of frauds": round(fraud.amount, 2),
            "amount of frauds stopped": round(fraud.amount_stopped, 2),
            "labelled genuine": genuine.count,
            "genuine stopped": genuine.stopped,
            "precision": (
                round(fraud.stopped / stopped, 4) if stopped and genuine.count else float("nan")
            ),
            "recall": round(fraud.stopped / fraud.count, 4) if fraud.count else float("nan"),
            **{f"reason {code}": count for code, count in sorted(sums.reasons.items())},
        }
