"""The alerts of a process, and the scores of its payments: what case files are made from.

It is kept in memory, within bounds, and begins anew with the process.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from plinth.engine import InputError
from plinth.verticals.finance import schema
from plinth.verticals.finance.cases.heard import HeardPayment
from plinth.verticals.finance.cases.questions import (
    Alert,
    Alerts,
    AskAlerts,
    AskTape,
    AskWhatIf,
    AtThreshold,
    CaseFile,
    CaseReason,
    Known,
    PastPayment,
    Similar,
    Tape,
    TapePayment,
    WhatIf,
)
from plinth.verticals.finance.features.online import FeatureState
from plinth.verticals.finance.features.timeline import milliseconds
from plinth.verticals.finance.schema import Decision, Label
from plinth.verticals.finance.tally import SEEN, days_of, key_of, truth_of
from plinth.verticals.finance.versions import Serving, Variant

MAX_HISTORY = 50
MAX_SIMILAR = 5
MAX_HEARD = 20_000
"""Payments of stream workers among which those of a customer are found, about 400 bytes each."""
TAPE = 50
"""Payments of the tape."""
FOLD = 4_096
"""Payments that are written into the ring at once."""
Floats = npt.NDArray[np.float32]
Payment = schema.Payment | HeardPayment


class Scored(NamedTuple):
    """Payments of one flow as they were decided.

    Args:
        asked: the payments; decisions: one for each.
        rows: float32 (n, columns).
        amounts: base currency.
        by: the variant that answered each.
        effects: of the groups of reasons, by the payment's place, where they were asked for.
    """

    asked: Sequence[schema.Payment]
    decisions: Sequence[Decision]
    rows: Floats
    amounts: Sequence[float]
    by: Sequence[Variant]
    effects: Mapping[int, Sequence[float]]


class _Case(NamedTuple):
    payment: Payment
    decision: Decision
    amount: float  # base currency
    row: Floats
    effects: Sequence[float] | None
    by: Variant
    serving: Serving


class CaseBook:
    """Remembers alerts and scores; for the thread of the flows.

    Args:
        alerts: remembered at most, about 2 KiB each.
        payments: whose scores are remembered, 29 bytes each.
    """

    def __init__(self, alerts: int, payments: int) -> None:
        self._most, self._payments = alerts, payments
        self._secret = secrets.token_bytes(16)
        self._cases: OrderedDict[str, _Case] = OrderedDict()
        self._labels: OrderedDict[int, bool] = OrderedDict()
        self._parts: deque[npt.NDArray[Any]] = deque()
        self._waiting: list[tuple[Payment, float, Decision, bool]] = []
        self._count = 0
        self._last: deque[tuple[Payment, Decision]] = deque(maxlen=TAPE)
        self._heard: deque[tuple[HeardPayment, float]] = deque(maxlen=MAX_HEARD)
        self._decided: Counter[str] = Counter()

    def take(self, scored: Scored, serving: Serving, rules: frozenset[str]) -> None:
        """Take in what a flow decided.

        Args:
            scored: its payments; those that came before are left out.
            serving: the version that was asked.
            rules: codes of the rules in force.
        """
        rows = zip(scored.asked, scored.decisions, scored.amounts, scored.by, strict=True)
        for place, (payment, decision, amount, by) in enumerate(rows):
            effects, row = scored.effects.get(place), scored.rows[place]
            self._keep(_Case(payment, decision, amount, row, effects, by, serving), rules)
        if len(self._waiting) >= FOLD:
            self._fold()

    def hear(
        self,
        payment: HeardPayment,
        decision: Decision,
        amount: float,
        features: Mapping[str, float],
        by: Variant,
        serving: Serving,
        rules: frozenset[str],
    ) -> None:
        """Take in what a stream worker decided.

        Args:
            payment: it decided.
            decision: it gave.
            amount: base currency.
            features: by name.
            by: the variant that answered.
            serving: the version of this process, for the words of reasons.
            rules: codes of the rules in force.

        Raises:
            InputError: it sees other features than this process.
        """
        names = serving.columns.program.names
        if features.keys() != set(names):
            raise InputError("it sees other features", reason="other_features")
        row = np.array([features[name] for name in names], np.float32)
        self._keep(_Case(payment, decision, amount, row, None, by, serving), rules)
        if not decision.duplicate:
            self._heard.append((payment, amount))
        if len(self._waiting) >= FOLD:
            self._fold()

    def _keep(self, case: _Case, rules: frozenset[str]) -> None:
        payment, decision, ruled = case.payment, case.decision, False
        if decision.decision != "approve":
            ruled = any(reason.code in rules for reason in decision.reason_codes)
            name = self._alert_id(payment)
            self._cases[name] = case._replace(row=case.row.copy())
            self._cases.move_to_end(name)
            if len(self._cases) > self._most:
                self._cases.popitem(last=False)
        if not decision.duplicate:
            self._waiting.append((payment, case.amount, decision, ruled))
            self._last.append((payment, decision))
            self._decided[decision.decision] += 1

    def clear(self) -> None:
        """Forget all."""
        self._cases.clear()
        self._labels.clear()
        self._parts.clear()
        self._waiting.clear()
        self._count = 0
        self._last.clear()
        self._heard.clear()
        self._decided.clear()

    def note(self, label: Label) -> None:
        """Take in what became known of a payment."""
        self.note_key(key_of(label), label.fraud)

    def note_key(self, key: int, fraud: bool) -> None:
        """As :meth:`note`, of a payment by its key."""
        self._labels[key] = fraud
        self._labels.move_to_end(key)
        if len(self._labels) > self._payments:
            self._labels.popitem(last=False)

    def payment(self, alert: str) -> Payment:
        """The payment of an alert.

        Raises:
            InputError: there is none of this id.
        """
        return self._case(alert).payment

    # -- answers -------------------------------------------------------------------------------
    def alerts(self, asked: AskAlerts) -> Alerts:
        """Alerts, newest first or by what they may cost."""
        found: list[Alert] = []
        cases: Iterable[tuple[str, _Case]] = reversed(self._cases.items())
        if asked.order == "expected_loss":
            cases = sorted(cases, key=lambda one: -_expected_loss(one[1]))
        for name, case in cases:
            if len(found) >= asked.limit:
                break
            label = self._label(case.payment)
            if asked.decision not in (None, case.decision.decision):
                continue
            if asked.labelled is None or asked.labelled is (label is not None):
                found.append(self._alert(name, case))
        return Alerts(alerts=found, remembered=len(self._cases))

    def case(self, alert: str, state: FeatureState) -> CaseFile:
        """All that is known of an alert.

        Raises:
            InputError: there is none of this id.
        """
        case = self._case(alert)
        payment, decision, by = case.payment, case.decision, case.by
        names = case.serving.columns.program.names
        return CaseFile(
            alert=self._alert(alert, case),
            model=by.model,
            model_version=by.version,
            rules_version=str(decision.rules_version),
            review_threshold=by.review,
            decline_threshold=by.decline,
            decided_by="server" if payment.card is not None else "stream",
            card=None if payment.card is None else self._hash("card", payment.card),
            customer=self._hash("customer", payment.customer_id),
            device=None if payment.device_id is None else self._hash("device", payment.device_id),
            terminal_id=payment.terminal_id,
            features=dict(zip(names, map(float, case.row), strict=True)),
            reasons=_reasons(case, names),
            history=self._history(payment, state),
            similar=self._similar(alert, case),
        )

    def what_if(self, asked: AskWhatIf, review: float) -> Callable[[], WhatIf]:
        """What another threshold would have given on the payments that are remembered.

        Args:
            asked: the threshold.
            review: the one in force.

        Returns:
            Gives it, from copies: tens of milliseconds for 200,000 payments.
        """
        self._fold()
        parts, labels, most = list(self._parts), dict(self._labels), self._payments

        def answer() -> WhatIf:
            scored = np.concatenate([np.zeros(0, _SCORED), *parts])[-most:]
            seen, ruled = scored["seen"], scored["ruled"]
            fraud = truth_of(seen, labels, asked.label_days)
            return WhatIf(
                payments=len(seen),
                days=round(days_of(seen), 3),
                frauds=int((fraud == 1).sum()),
                genuine=int((fraud == 0).sum()),
                amount_of_frauds=round(float(seen["amount"][fraud == 1].sum()), 2),
                now=_at(review, seen, fraud, ruled),
                then=_at(asked.review_threshold, seen, fraud, ruled),
            )

        return answer

    def tape(self, asked: AskTape) -> Tape:
        """The last payments, and how many were decided how."""
        newest = list(reversed(self._last))[: asked.limit]
        return Tape(
            approved=self._decided["approve"],
            reviewed=self._decided["review"],
            declined=self._decided["decline"],
            payments=[self._on_tape(payment, decision) for payment, decision in newest],
        )

    # -- parts of them ---------------------------------------------------------------------------
    def _case(self, alert: str) -> _Case:
        found = self._cases.get(alert)
        if found is None:
            raise InputError(
                "there is no such alert, or it is no longer remembered",
                field="alert",
                reason="not_found",
                hint="raise case_alerts, or take the id from the list of alerts",
            )
        return found

    def _hash(self, kind: str, value: str) -> str:
        words = f"{kind}\0{value}".encode()
        return hashlib.blake2b(words, digest_size=8, key=self._secret).hexdigest()

    def _alert_id(self, payment: Payment) -> str:
        whose = payment.card
        if whose is None:
            whose = f"{payment.customer_id}\0{payment.terminal_id}\0{payment.event_time}"
        return self._hash("alert", f"{whose}\0{payment.transaction_id}")

    def _label(self, payment: Payment) -> Known | None:
        return _known(self._labels.get(key_of(payment)))

    def _alert(self, name: str, case: _Case) -> Alert:
        payment, decision = case.payment, case.decision
        return Alert(
            id=name,
            transaction_id=payment.transaction_id,
            event_time=_time(milliseconds(payment.event_time)),
            amount=payment.amount,
            currency=payment.currency,
            decision="decline" if decision.decision == "decline" else "review",
            score=decision.score or 0.0,
            expected_loss=round(_expected_loss(case), 2),
            reasons=[reason.text for reason in decision.reason_codes],
            label=self._label(payment),
        )

    def _on_tape(self, payment: Payment, decision: Decision) -> TapePayment:
        alert = None if decision.decision == "approve" else self._alert_id(payment)
        return TapePayment(
            transaction_id=payment.transaction_id,
            event_time=_time(milliseconds(payment.event_time)),
            amount=payment.amount,
            currency=payment.currency,
            terminal_id=payment.terminal_id,
            decision=decision.decision,
            score=decision.score or 0.0,
            alert=alert if alert in self._cases else None,
        )

    def _of_customer(self, customer: str) -> list[PastPayment]:
        """What stream workers decided of a customer, newest first."""
        mine = [one for one in reversed(self._heard) if one[0].customer_id == customer]
        found = []
        for past, amount in mine[:MAX_HISTORY]:
            alert = self._alert_id(past)
            found.append(
                PastPayment(
                    transaction_id=past.transaction_id,
                    event_time=_time(milliseconds(past.event_time)),
                    amount=amount,
                    terminal_id=past.terminal_id,
                    label=self._label(past),
                    alert=alert if alert in self._cases else None,
                )
            )
        return found

    def _history(self, payment: Payment, state: FeatureState) -> list[PastPayment]:
        if payment.card is None:
            return self._of_customer(payment.customer_id)
        found = []
        for past in state.history(payment.card, MAX_HISTORY):
            words = f"{past.transaction} {past.terminal} {past.time}"
            alert = self._hash("alert", f"{payment.card}\0{past.transaction}")
            found.append(
                PastPayment(
                    transaction_id=past.transaction,
                    event_time=_time(past.time),
                    amount=past.amount,
                    terminal_id=past.terminal,
                    label=_known(self._labels.get(key_of(words))),
                    alert=alert if alert in self._cases else None,
                )
            )
        return found

    def _similar(self, alert: str, case: _Case) -> list[Similar]:
        """The nearest alerts over log(1 + x) of the features, each in its own deviation."""
        names = list(self._cases)
        rows = np.log1p(np.stack([one.row for one in self._cases.values()]))
        spread = rows.std(axis=0)
        rows = rows[:, spread > 0] / spread[spread > 0]
        here = rows[names.index(alert)]
        gaps = (
            np.sqrt(np.square(rows - here).mean(axis=1)) if rows.shape[1] else np.zeros(len(rows))
        )
        nearest = [at for at in np.argsort(gaps, kind="stable") if names[at] != alert]
        return [
            Similar(
                id=names[at],
                distance=round(float(gaps[at]), 4),
                decision=self._alert(names[at], self._cases[names[at]]).decision,
                score=self._cases[names[at]].decision.score or 0.0,
                label=self._label(self._cases[names[at]].payment),
            )
            for at in nearest[:MAX_SIMILAR]
        ]

    def _fold(self) -> None:
        """Write what waits into the ring, and drop what is too old."""
        if not self._waiting:
            return
        part = np.zeros(len(self._waiting), _SCORED)
        part["seen"]["key"] = [key_of(payment) for payment, _, _, _ in self._waiting]
        part["seen"]["time"] = [milliseconds(one.event_time) for one, _, _, _ in self._waiting]
        part["seen"]["amount"] = [amount for _, amount, _, _ in self._waiting]
        part["seen"]["score"] = [decision.score for _, _, decision, _ in self._waiting]
        part["ruled"] = [ruled for _, _, _, ruled in self._waiting]
        self._waiting.clear()
        self._parts.append(part)
        self._count += len(part)
        while self._count - len(self._parts[0]) >= self._payments:
            self._count -= len(self._parts.popleft())


_SCORED = np.dtype([("seen", SEEN), ("ruled", np.bool_)])


def _known(fraud: bool | None) -> Known | None:
    return None if fraud is None else "fraud" if fraud else "genuine"


def _expected_loss(case: _Case) -> float:
    return (case.decision.score or 0.0) * case.amount


def _time(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1e3, UTC).isoformat(timespec="milliseconds")


def _reasons(case: _Case, names: tuple[str, ...]) -> list[CaseReason]:
    """The decision's reasons, each with what it was made from."""
    groups, found = case.serving.reasons, []
    values = dict(zip(names, map(float, case.row), strict=True))
    places: dict[str, int] = {one.code: place for place, one in enumerate(groups.reasons)}
    for reason in case.decision.reason_codes:
        at = places.get(reason.code)
        effect = None if at is None or case.effects is None else round(case.effects[at], 4)
        members = () if at is None else groups.members[at]
        found.append(
            CaseReason(
                code=reason.code,
                text=reason.text,
                effect=effect,
                features={name: values[name] for name in members},
            )
        )
    return found


def _at(
    threshold: float,
    seen: npt.NDArray[Any],
    fraud: npt.NDArray[np.int8],
    ruled: npt.NDArray[np.bool_],
) -> AtThreshold:
    alert = ruled | (seen["score"] >= np.float32(threshold))
    bad, good = alert & (fraud == 1), alert & (fraud == 0)
    frauds, genuine, all_ = int(bad.sum()), int(good.sum()), int((fraud == 1).sum())
    return AtThreshold(
        review_threshold=threshold,
        alerts=int(alert.sum()),
        alerts_per_day=round(int(alert.sum()) / days_of(seen), 3),
        precision=round(frauds / (frauds + genuine), 4) if frauds + genuine else None,
        recall=round(frauds / all_, 4) if all_ else None,
        frauds=frauds,
        genuine=genuine,
        amount_of_frauds=round(float(seen["amount"][bad].sum()), 2),
        amount_of_genuine=round(float(seen["amount"][good].sum()), 2),
    )
