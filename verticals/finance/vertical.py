"""Fraud scoring as a vertical: transactions in, decisions out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from math import inf
from typing import Any, ClassVar

import numpy as np
import orjson
import torch
from pydantic import BaseModel
from torch import Tensor

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import (
    Call,
    ConfigError,
    Flow,
    InputError,
    Model,
    Refused,
    Sla,
    Timing,
)
from plinth.verticals.contract import Settings, Vertical
from plinth.verticals.finance.drift import DriftWatch
from plinth.verticals.finance.features import persistence
from plinth.verticals.finance.features.online import (
    FEATURES,
    MODEL_FEATURES,
    RISK_REACH,
    Batch,
    Event,
    FeatureState,
    Flag,
    Labelled,
    Limits,
)
from plinth.verticals.finance.features.timeline import DAY, NEVER
from plinth.verticals.finance.metrics import PARTIAL_DECISIONS, RULE_HITS, TableMetrics
from plinth.verticals.finance.reasons import (
    NO_TIME,
    contributions,
    main_reasons,
    masked_rows,
    why_other,
)
from plinth.verticals.finance.rules import Payments, Verdict
from plinth.verticals.finance.schema import (
    LATEST,
    AuditedDecision,
    Decision,
    FollowUp,
    Label,
    Reason,
    Record,
    Transaction,
    is_follow_up,
    is_label,
    is_payment,
    milliseconds,
    read,
)
from plinth.verticals.finance.settings import FraudSettings
from plinth.verticals.finance.tally import FraudTally
from plinth.verticals.finance.versions import Serving, Variant, Versions

MAX_REASONS = 4
_NO_RULE = Verdict()
MAX_EXPLAINED = 64
"""Alerts explained in one call: about a thousand rows, whatever the number of alerts."""
LATE, PARTIAL, DUPLICATE, CONFLICT = (
    flag.value for flag in (Flag.LATE, Flag.PARTIAL, Flag.DUPLICATE, Flag.CONFLICT)
)
_TOLD = (
    *("kind", "event_time", "amount", "currency", "customer_id", "terminal_id", "device_id"),
    *("fraud", "label_time"),
)
"""What of a record an audit keeps."""


class FraudScoring(Vertical[Record, Decision]):
    """Scores card payments with real-time features, a model, and rules beside it.

    Labels (what became known of earlier payments) come as records among the transactions, so
    that they share their order, their offsets and their replay; each is answered as ``noted``, and
    so is what was done with a payment later: its capture, reversal or refund.

    A transaction enters the feature state before the model is asked, exactly once: when the
    engine then refuses, it stays counted, and the same transaction sent again is known by its
    id, is not counted again, and gets the features of its first time.

    Args:
        settings: the table ``[verticals.finance]``.
        clock: seconds since 1970-01-01T00:00Z, for records that bring no time of receipt.
    """

    name: ClassVar[str] = "finance"
    summary: ClassVar[str] = "Fraud scores for card payments, with decisions and reasons."
    action: ClassVar[str] = "score"
    request = Transaction
    response = Decision
    settings_type = FraudSettings
    sla: ClassVar[Sla] = Sla(deadline_ms=150, on_overload="degrade")

    def __init__(
        self, settings: Settings | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(settings)
        if not isinstance(self.settings, FraudSettings):
            raise ConfigError(f"finance takes FraudSettings, not {type(settings).__name__}")
        given = self.settings
        self._given = given
        self._clock = clock
        self.rules = given.rule_book().compiled()
        self.state = FeatureState(
            Limits(
                lateness_ms=round(given.lateness_days * DAY),
                max_cards=given.max_cards,
                max_terminals=given.max_terminals,
                max_customers=given.max_customers,
                max_devices=given.max_devices,
                max_events=given.max_events,
            )
        )
        self._shared = False
        self._moved = self._started = NEVER
        self._known_past = inf, datetime.min.replace(tzinfo=UTC)
        me = weakref.ref(self)
        self._tables = TableMetrics(lambda: found.state if (found := me()) else None)
        self.versions = Versions(given, clock)

    def models(self) -> Sequence[Model]:
        """Load the champion and its cheaper variant, and take over their thresholds.

        Raises:
            ModelError: not in the store, damaged, or not of this kind.
            ConfigError: the thresholds contradict each other.
        """
        return self.versions.load()

    @property
    def variants(self) -> Sequence[Variant]:
        """The model that answers now, and its cheaper variant."""
        return self.versions.serving.variants

    @property
    def drift(self) -> DriftWatch | None:
        """What the model's payments are held against."""
        return self.versions.serving.drift

    def next_models(self) -> Sequence[Model]:
        return self.versions.next_models()

    def models_loaded(self) -> None:
        self.versions.loaded()

    def background(self) -> Flow[None] | None:
        return self.versions.background()

    def background_done(self, timing: Timing) -> None:
        self.versions.background_done(timing)

    def tally(self) -> FraudTally:
        return FraudTally(self._given.rates)

    def reconfigure(self, settings: Settings) -> None:
        if not isinstance(settings, FraudSettings):
            raise ConfigError(f"finance takes FraudSettings, not {type(settings).__name__}")
        self.rules = settings.rule_book().compiled()
        self.versions.take_over(settings)

    def example(self) -> Transaction:
        return Transaction(
            transaction_id="example-1",
            event_time=datetime(2025, 9, 1, 12, 0, tzinfo=UTC),
            amount=42.5,
            currency=next(iter(self._given.rates)),
            card="tok_9f86d081884c7d65",
            customer_id="c000001",
            terminal_id="t000001",
        )

    def infer(self, requests: Sequence[Record]) -> Flow[list[Decision | InputError]]:
        serving = self.versions.serving
        serving.flows += 1
        try:
            return (yield from self._judged(requests, serving))
        finally:
            serving.flows -= 1

    def _judged(
        self, requests: Sequence[Record], serving: Serving
    ) -> Flow[list[Decision | InputError]]:
        results: list[Decision | InputError | None] = []
        batch = self.state.update(self._taken_in(requests, results))
        self._tables.count_evictions(self.state)
        if not len(batch.rows):
            return [result for result in results if result is not None]
        rows = torch.from_numpy(batch.rows[:, : len(MODEL_FEATURES)].copy())
        output: Tensor = yield Call(serving.name, rows)
        scores = output[:, 0].float().tolist()
        answered = [serving.variants[place] for place in output[:, 1].int().tolist()]

        reasons: dict[int, list[Reason]] = {}
        pairs = enumerate(zip(scores, answered, strict=True))
        alerts = [place for place, (score, by) in pairs if score >= by.review]
        for first in range(0, len(alerts), MAX_EXPLAINED):
            part = alerts[first : first + MAX_EXPLAINED]
            try:
                masked: Tensor = yield Call(serving.name, masked_rows(rows[part]))
            except Refused:
                reasons |= {place: [NO_TIME] for place in part}
            else:
                effects = contributions(masked[:, 0])
                found = map(main_reasons, effects.tolist())
                reasons |= zip(part, found, strict=True)
        asked = [
            request
            for request, result in zip(requests, results, strict=True)
            if result is None and is_payment(request)
        ]
        told = output.detach().float().numpy()
        if self.versions.shadow is not None:
            self.versions.shadow.offer(asked, batch, told)
        if serving.drift is not None:
            ends = milliseconds(asked[0].event_time), milliseconds(asked[-1].event_time)
            serving.drift.take(ends, batch, told, self.state, self._started)
        decisions = iter(self._decisions(asked, batch, scores, answered, reasons))
        return [next(decisions) if result is None else result for result in results]

    def record_types(self) -> Sequence[type[BaseModel]]:
        return (Transaction, Label, FollowUp)

    def parse(self, raw: bytes) -> Record:
        return self.parse_at(raw, self._clock())

    def parse_at(self, raw: bytes, received: float | None) -> Record:
        made = read(raw, self._given.unknown_fields, self._given.card_numbers_in_ids)
        ahead = self._given.max_ahead_seconds
        if ahead is None or received is None:
            return made
        since, until = self._known_past
        if received < since or made.event_time > until or is_label(made):
            latest = received + ahead
            if made.event_time.timestamp() > latest:
                raise self._future("event_time")
            if is_label(made) and made.label_time.timestamp() > latest:
                raise self._future("label_time")
            # the limit only grows with the time of receipt, so this one holds for later records
            until = datetime.fromtimestamp(min(latest, LATEST.timestamp()), UTC)
            self._known_past = received, until
        return made

    def encode(self, result: Decision) -> bytes:
        fields = vars(result)
        if result.extra is None:
            fields = fields.copy()
            del fields["extra"]
        return orjson.dumps(fields, default=vars)

    def evidence(self, request: Record, result: Decision) -> dict[str, Any]:
        """What was judged, its features, and the thresholds and model that judged; no card."""
        told = vars(request)
        record = {name: told[name] for name in _TOLD if told.get(name) is not None}
        found: dict[str, Any] = {"record": record}
        if isinstance(result, AuditedDecision):
            row, by = result._row
            found["features"] = dict(zip(FEATURES, row.tolist(), strict=True))
            found["thresholds"] = {"review": by.review, "decline": by.decline}
            found["model_digest"] = by.digest
        return found

    def why_other(self, before: bytes, now: bytes) -> list[str]:
        return why_other(orjson.loads(before), orjson.loads(now))

    def key(self, request: Record) -> str | None:
        return request.card

    def see_partitions(self, mine: int, total: int) -> None:
        self._shared = mine < total and not self._given.colocated

    def together(self, request: Record) -> Sequence[str | None]:
        if not self._given.colocated:
            return ()
        if is_follow_up(request):
            return request.card, None, None, None
        if is_label(request):
            return request.card, None, request.terminal_id, None
        return request.card, request.customer_id, request.terminal_id, request.device_id

    def see_growth(self, at: float | None) -> None:
        self._moved = NEVER if at is None else round(at * 1e3)

    def see_start(self, at: float | None) -> None:
        self._started = NEVER if at is None else round(at * 1e3)

    def observe(self, requests: Sequence[Record]) -> None:
        """Take records in without scoring them; what :meth:`infer` refuses is left out."""
        self.state.update(self._taken_in(requests, []))

    def snapshot(self) -> bytes:
        return persistence.pack(self.state)

    def restore(self, state: bytes) -> None:
        self.state = persistence.unpack(state, self.state.limits)

    def _taken_in(
        self,
        requests: Sequence[Record],
        results: list[Decision | InputError | None],
    ) -> Iterator[Event]:
        """Events of the transactions, in order; labels take effect in between.

        Args:
            requests: what came.
            results: gets one entry for each: the answer, or ``None`` where the model gives it.
        """
        for request in requests:
            if is_payment(request):
                event = self._event(request)
                if isinstance(event, InputError):
                    results.append(event)
                else:
                    results.append(None)
                    yield event
            elif is_label(request):
                results.append(self._note(request))
            else:
                results.append(_noted(request))

    def _note(self, label: Label) -> Decision | InputError:
        made = Labelled(
            label.transaction_id,
            label.terminal_id,
            milliseconds(label.event_time),
            milliseconds(label.label_time),
            label.fraud,
            label.card,
        )
        try:
            found = self.state.label(made, max(self._moved, self._started))
        except InputError as error:
            return error
        if self.drift is not None and label.fraud:
            self.drift.label()
        if self.versions.shadow is not None:
            self.versions.shadow.note(label)
        return _noted(label, partial=not found)

    def _event(self, request: Transaction) -> Event | InputError:
        rate = self._given.rates.get(request.currency)
        if rate is None:
            return InputError(
                f"currency: expected one of {', '.join(sorted(self._given.rates))}",
                field="currency",
                reason="unknown_currency",
                hint="add its rate to [verticals.finance.rates]",
            )
        return Event(
            request.transaction_id,
            milliseconds(request.event_time),
            request.amount * rate,
            request.card,
            request.customer_id,
            request.terminal_id,
            request.device_id,
        )

    def _future(self, field: str) -> InputError:
        return InputError(
            f"{field}: more than {self._given.max_ahead_seconds:g} s in the future",
            field=field,
            reason="future_event",
            hint="check the sender's clock and time zone",
        )

    def _decisions(
        self,
        asked: Sequence[Transaction],
        batch: Batch,
        scores: Sequence[float],
        answered: Sequence[Variant],
        reasons: dict[int, list[Reason]],
    ) -> list[Decision]:
        decisions: list[Decision] = []
        make = AuditedDecision if self.audited else Decision
        verdicts = self._verdicts(asked, batch, scores)
        lacking_until = self._lacking_until()
        rows = zip(asked, batch.flags.tolist(), scores, answered, strict=True)
        for place, (request, flag, score, by) in enumerate(rows):
            verdict = verdicts.get(place, _NO_RULE)
            extra = request.model_extra
            apart = self._shared or (
                lacking_until > NEVER and milliseconds(request.event_time) <= lacking_until
            )
            special: dict[str, Any] = (
                {
                    "features_late": bool(flag & LATE),
                    "features_partial": apart or bool(flag & PARTIAL),
                    "duplicate": bool(flag & DUPLICATE),
                    "conflict": bool(flag & CONFLICT),
                    "extra": extra,
                }
                if flag or apart or extra
                else {}
            )
            decision = make(
                transaction_id=request.transaction_id,
                score=score,
                decision=by.stricter(verdict.action, score),
                reason_codes=[*verdict.reasons, *reasons.get(place, [])][:MAX_REASONS],
                model=by.model,
                model_version=by.version,
                rules_version=self.rules.version,
                **special,
            )
            if isinstance(decision, AuditedDecision):
                decision._row = batch.rows[place], by
            decisions.append(decision)
        if partial := sum(decision.features_partial for decision in decisions):
            PARTIAL_DECISIONS.inc(partial)
        return decisions

    def _lacking_until(self) -> int:
        """Up to this event time windows reach below what this state has seen, or a move of keys."""
        unseen = max(self._moved, self._started)
        return unseen + RISK_REACH + self.state.limits.lateness_ms if unseen > NEVER else NEVER

    def _verdicts(
        self, asked: Sequence[Transaction], batch: Batch, scores: Sequence[float]
    ) -> dict[int, Verdict]:
        rates = self._given.rates
        payments = Payments(
            asked,
            np.array([one.amount * rates[one.currency] for one in asked], dtype=np.float64),
            batch.rows,
            batch.flags,
            np.array(scores, dtype=np.float32),
        )
        verdicts, hits = self.rules.apply(payments)
        shadows = {rule.code for rule in self.rules.rules if rule.shadow} if hits else ()
        for code, count in hits.items():
            RULE_HITS.labels(code, "shadow" if code in shadows else "applied").inc(count)
        return verdicts


def _noted(record: Label | FollowUp, *, partial: bool = False) -> Decision:
    return Decision(
        transaction_id=record.transaction_id,
        score=None,
        decision="noted",
        reason_codes=[],
        model=None,
        model_version=None,
        features_partial=partial,
        extra=record.model_extra,
    )
