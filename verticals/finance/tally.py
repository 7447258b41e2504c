"""What decisions on a history would have come to: alerts, frauds stopped, money, by rule too."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from plinth.verticals.contract import Tally
from plinth.verticals.finance.decisions.rules import REUSED_ID, Payments, Rules
from plinth.verticals.finance.features.online import Flag
from plinth.verticals.finance.features.timeline import milliseconds
from plinth.verticals.finance.schema import (
    Decision,
    Label,
    Record,
    is_follow_up,
    is_label,
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


class Stopped(NamedTuple):
    """What one rule, several or the score would have stopped.

    Shares are NaN where nothing is known that they would be a share of. Amounts are in base
    currency; payments of which nothing is known count in the first three figures alone.
    """

    payments: int
    amount: float
    payments_per_day: float
    frauds: int
    amount_of_frauds: float
    genuine: int
    amount_of_genuine: float
    precision: float
    recall: float
    recall_of_amount: float
    alone: int
    """Stopped by nothing else: neither another rule in force nor the score."""


class RuleTally:
    """What each rule would have stopped on a history: payments, money, precision, recall.

    Of a payment are kept 32 bytes, and 4 for each rule that held.

    Args:
        rules: that were applied.
        review: score from which the model asks for a review.
        label_days: a payment this old without a label is genuine.
    """

    def __init__(self, rules: Rules, review: float, label_days: float) -> None:
        self._rules, self._review, self._label_days = rules, review, label_days
        self._parts: list[npt.NDArray[Any]] = []
        self._count = 0
        self._held: defaultdict[str, list[npt.NDArray[np.int32]]] = defaultdict(list)
        self._labels: dict[int, bool] = {}

    def see(self, payments: Payments, held: Mapping[str, Sequence[int]]) -> None:
        """Take in payments and where each rule held; a payment that came before is left out."""
        new = (payments.flags & Flag.DUPLICATE.value) == 0
        place = self._count + np.cumsum(new) - 1
        part = np.zeros(int(new.sum()), SEEN)
        part["key"] = [key_of(one) for one, kept in zip(payments.asked, new, strict=True) if kept]
        times = [milliseconds(one.event_time) for one in payments.asked]
        part["time"] = np.array(times, np.int64)[new]
        part["amount"], part["score"] = payments.amounts[new], payments.scores[new]
        self._parts.append(part)
        self._count += len(part)
        for code, where in held.items():
            at = np.asarray(where)
            self._held[code].append(place[at[new[at]]].astype(np.int32))

    def note(self, label: Label) -> None:
        """Take in what became known of a payment; the last label counts."""
        self._labels[key_of(label)] = label.fraud

    def figures(self) -> dict[str, Stopped]:
        """Each rule by its code, then ``rules`` in force together, ``score``, and both.

        Those in shadow are told by their code alone.
        """
        seen = np.concatenate([np.zeros(0, SEEN), *self._parts])
        fraud = truth_of(seen, self._labels, self._label_days)
        marks: dict[str, npt.NDArray[np.bool_]] = {}
        for code in [*(rule.code for rule in self._rules.rules), REUSED_ID.code]:
            marks[code] = np.zeros(len(seen), bool)
            if code in self._held:
                marks[code][np.concatenate(self._held[code])] = True
        shadows = {rule.code for rule in self._rules.rules if rule.shadow}
        score = seen["score"] >= self._review
        active = [mark for code, mark in marks.items() if code not in shadows]
        times = np.sum([*active, score], axis=0, dtype=np.int64)
        found = {
            code: _stopped(seen, fraud, mark, times == (0 if code in shadows else 1))
            for code, mark in marks.items()
        }
        rules = np.any(active, axis=0) if active else np.zeros(len(seen), bool)
        found["rules"] = _stopped(seen, fraud, rules, ~score)
        found["score"] = _stopped(seen, fraud, score, ~rules)
        found["rules and score"] = _stopped(seen, fraud, rules | score, np.ones(len(seen), bool))
        return found

    def known(self) -> dict[str, float]:
        """What the shares are shares of: payments, days, frauds, genuine ones, amounts."""
        seen = np.concatenate([np.zeros(0, SEEN), *self._parts])
        fraud = truth_of(seen, self._labels, self._label_days)
        return {
            "payments": len(seen),
            "days": days_of(seen),
            "frauds": int((fraud == 1).sum()),
            "genuine": int((fraud == 0).sum()),
            "amount": round(float(seen["amount"].sum()), 2),
            "amount_of_frauds": round(float(seen["amount"][fraud == 1].sum()), 2),
        }


SEEN = np.dtype(
    [("key", np.uint64), ("time", np.int64), ("amount", np.float64), ("score", np.float32)]
)
"""A payment: what a label names it by, milliseconds, base currency, score."""


class Named(Protocol):
    """What names a payment."""

    @property
    def transaction_id(self) -> str:
        """Its id."""

    @property
    def terminal_id(self) -> str:
        """Where it was made."""

    @property
    def event_time(self) -> datetime:
        """When it was made."""


def key_of(payment: Named | str) -> int:
    """64 bits of what a label names its payment by: transaction, terminal, milliseconds."""
    words = payment
    if not isinstance(words, str):
        words = f"{words.transaction_id} {words.terminal_id} {milliseconds(words.event_time)}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest())


def truth_of(
    seen: npt.NDArray[Any], labels: Mapping[int, bool], label_days: float
) -> npt.NDArray[np.int8]:
    """1 for a fraud, 0 for a genuine payment, -1 for what is too young to say.

    Args:
        seen: (n,) payments, dtype :data:`SEEN`.
        labels: whether it was fraud, by the payment's key.
        label_days: a payment this old without a label is genuine.
    """
    if not len(seen):
        return np.zeros(0, np.int8)
    old = seen["time"] <= seen["time"].max() - label_days * _DAY
    fraud = np.where(old, 0, -1).astype(np.int8)
    if labels:
        keys = np.array(list(labels), np.uint64)
        told = np.array(list(labels.values()), np.int8)
        order = np.argsort(keys)
        at = np.minimum(np.searchsorted(keys, seen["key"], sorter=order), len(keys) - 1)
        mine = keys[order][at] == seen["key"]
        fraud[mine] = told[order][at][mine]
    return fraud


def days_of(seen: npt.NDArray[Any]) -> float:
    """Days from the first payment to the last, at least one."""
    return max(1.0, float(np.ptp(seen["time"])) / _DAY) if len(seen) else 1.0


def _stopped(
    seen: npt.NDArray[Any],
    fraud: npt.NDArray[np.int8],
    mark: npt.NDArray[np.bool_],
    alone: npt.NDArray[np.bool_],
) -> Stopped:
    def count(chosen: npt.NDArray[np.bool_]) -> tuple[int, float]:
        return int(chosen.sum()), round(float(seen["amount"][chosen].sum()), 2)

    def share(part: float, whole: float) -> float:
        return round(part / whole, 4) if whole else float("nan")

    payments, amount = count(mark)
    frauds, fraud_amount = count(mark & (fraud == 1))
    genuine, genuine_amount = count(mark & (fraud == 0))
    all_frauds, all_amount = count(fraud == 1)
    return Stopped(
        payments,
        amount,
        round(payments / days_of(seen), 3),
        frauds,
        fraud_amount,
        genuine,
        genuine_amount,
        share(frauds, frauds + genuine),
        share(frauds, all_frauds),
        share(fraud_amount, all_amount),
        int((mark & alone).sum()),
    )
