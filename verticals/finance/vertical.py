"""Fraud scoring as a vertical: transactions in, decisions out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import orjson
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import (
    Call,
    ConfigError,
    Flow,
    InputError,
    Model,
    ModelError,
    ModelStore,
    Refused,
    Sla,
)
from plinth.verticals.contract import Settings, Vertical
from plinth.verticals.finance.drift import DriftWatch, Reference
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
from plinth.verticals.finance.rules import Action, Payments, RuleBook, Verdict, limits
from plinth.verticals.finance.schema import (
    LATEST,
    CardNumbers,
    Decision,
    FollowUp,
    Label,
    Reason,
    Record,
    Transaction,
    UnknownFields,
    is_follow_up,
    is_label,
    milliseconds,
    read,
)
from plinth.verticals.finance.tally import FraudTally

MODEL = "fraud"
MAX_REASONS = 4
MAX_EXPLAINED = 64
"""Alerts explained in one call: about a thousand rows, whatever the number of alerts."""
STORE = Path(__file__).parent / "store"
LATE, PARTIAL, DUPLICATE, CONFLICT = (
    flag.value for flag in (Flag.LATE, Flag.PARTIAL, Flag.DUPLICATE, Flag.CONFLICT)
)
_TOLD = (
    *("kind", "event_time", "amount", "currency", "customer_id", "terminal_id", "device_id"),
    *("fraud", "label_time"),
)
"""What of a record an audit keeps."""
Probability = Annotated[float, Field(ge=0, le=1)]
Entities = Annotated[int, Field(ge=8, le=100_000_000)]


class FraudSettings(Settings):
    """The table ``[verticals.finance]``.

    Args:
        store: folder of the model store; default: the one that comes with Plinth.
        model_version: default: the newest.
        review_threshold: score from which people look; default: each model's own.
        decline_threshold: score from which the payment is declined; default: each model's own.
        rates: currencies taken, and what one unit is worth in base currency.
        rules: a table as :class:`RuleBook`, or a TOML file with it, which is read again when it
            changes; it takes the place of the three limits below.
        hard_amount: base currency; above it the payment is declined. Absent: no such rule.
        max_card_count_5m: payments with a card in 5 minutes; above it, review.
        max_device_cards_24h: cards on a device in 24 hours; above it, review.
        max_ahead_seconds: an event this far ahead of the time its door received it (the record
            timestamp in Kafka, the clock over HTTP) is refused; one such event would push the
            whole history of its card out. Absent: any time is taken.
        lateness_days: events up to this late still have complete windows.
        max_cards, max_terminals, max_customers, max_devices: how many are remembered.
        max_events: events remembered over all cards together (about 300 bytes each), likewise
            over all terminals, customers and devices.
        unknown_fields: of records: ``ignore`` them, ``keep`` them in the decision's ``extra``, or
            ``refuse`` the record.
        card_numbers_in_ids: ``refuse`` records whose transaction, customer, terminal or device id
            has the length and the check digit of a card number, or ``allow`` them.
        drift_alarm: population stability index, against the payments of the model's training,
            above which a feature or the score is shifted.
        missing_labels_alarm: share of the labels expected from training that are missing, above
            which labels are not coming.
        colocated: records that share a card, terminal, customer or device always lie in one
            partition. Unless the input is keyed so, every decision of a stream that several
            workers share has ``features_partial``.
    """

    store: Path | None = None
    model_version: str | None = None
    review_threshold: Probability | None = None
    decline_threshold: Probability | None = None
    rates: dict[
        Annotated[str, Field(pattern=r"^[A-Z]{3}$")], Annotated[float, Field(ge=1e-6, le=100)]
    ] = Field(default_factory=lambda: {"EUR": 1.0}, min_length=1)
    rules: RuleBook | None = None
    hard_amount: Annotated[float, Field(gt=0)] | None = 5000.0
    max_card_count_5m: Annotated[int, Field(ge=1)] | None = 10
    max_device_cards_24h: Annotated[int, Field(ge=1)] | None = 5
    max_ahead_seconds: Annotated[float, Field(ge=0)] | None = 300.0
    lateness_days: Annotated[float, Field(ge=0, le=90)] = 7.0
    max_cards: Entities = 200_000
    max_terminals: Entities = 200_000
    max_customers: Entities = 200_000
    max_devices: Entities = 200_000
    max_events: Annotated[int, Field(ge=8, le=10_000_000_000)] = 10_000_000
    unknown_fields: UnknownFields = "ignore"
    card_numbers_in_ids: CardNumbers = "refuse"
    drift_alarm: Annotated[float, Field(gt=0)] = 0.25
    missing_labels_alarm: Probability = 0.7
    colocated: bool = False
    live_tables: ClassVar[tuple[str, ...]] = ("rules",)

    @model_validator(mode="after")
    def _one_set_of_rules(self) -> FraudSettings:
        both = self.model_fields_set & {"hard_amount", "max_card_count_5m", "max_device_cards_24h"}
        if self.rules is not None and both:
            raise ValueError(f"rules takes the place of {min(both)}: write it as a rule, or leave")
        return self

    def rule_book(self) -> RuleBook:
        """The rules in force: those given, or the built-in ones with their limits."""
        if self.rules is not None:
            return self.rules
        return limits(self.hard_amount, self.max_card_count_5m, self.max_device_cards_24h)


class Variant(NamedTuple):
    """A model that may answer, and from which scores on its answers matter."""

    model: str
    version: str
    review: float
    decline: float
    digest: str

    def stricter(self, action: Action, score: float) -> Action:
        """What the rules ask for, or the score, whichever is stricter."""
        if action == "decline" or score >= self.decline:
            return "decline"
        return "review" if action == "review" or score >= self.review else "approve"


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
        self.models()

    def models(self) -> Sequence[Model]:
        """Load ``fraud`` and its cheaper variant, and take over their thresholds.

        Raises:
            ModelError: not in the store, damaged, or not of this kind.
            ConfigError: the thresholds contradict each other.
        """
        store = ModelStore(self._given.store or STORE)
        main = store.load(MODEL, self._given.model_version)
        models = [main, store.load(main.spec.cheaper)] if main.spec.cheaper else [main]
        self.variants = [self._variant(model, place) for place, model in enumerate(models)]
        name, version = main.spec.name, main.spec.version
        found = Reference.read(store.facts(name, version), f"{name} {version}")
        given = self._given
        alarms = given.drift_alarm, given.missing_labels_alarm
        self.drift = None if found is None else DriftWatch(found, *alarms)
        return models

    def _variant(self, model: Model, place: int) -> Variant:
        spec, given = model.spec, self._given
        with torch.inference_mode():
            answer = model.module(torch.zeros(1, len(MODEL_FEATURES)))
        if answer.shape != (1, 2) or answer[0, 1] != place:
            raise ModelError(
                f"{spec.name} {spec.version} gave {tuple(answer.shape)} for one row of "
                f"{len(MODEL_FEATURES)} features, expected probability and variant {place}",
                hint="train it with python -m plinth.verticals.finance.training.train",
            )
        review, decline = given.review_threshold, given.decline_threshold
        review = spec.metrics.get("review_threshold", 0.5) if review is None else review
        decline = spec.metrics.get("decline_threshold", 0.9) if decline is None else decline
        if decline < review:
            raise ConfigError(
                f"decline_threshold {decline:g} is below review_threshold {review:g} "
                f"for {spec.name}",
                hint="set both",
            )
        return Variant(spec.name, spec.version, review, decline, model.digest())

    def tally(self) -> FraudTally:
        return FraudTally(self._given.rates)

    def reconfigure(self, settings: Settings) -> None:
        if not isinstance(settings, FraudSettings):
            raise ConfigError(f"finance takes FraudSettings, not {type(settings).__name__}")
        self.rules = settings.rule_book().compiled()

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
        results: list[Decision | InputError | None] = []
        batch = self.state.update(self._taken_in(requests, results))
        self._tables.count_evictions(self.state)
        if not len(batch.rows):
            return [result for result in results if result is not None]
        rows = torch.from_numpy(batch.rows[:, : len(MODEL_FEATURES)].copy())
        output: Tensor = yield Call(MODEL, rows)
        scores = output[:, 0].float().tolist()
        answered = [self.variants[place] for place in output[:, 1].int().tolist()]

        reasons: dict[int, list[Reason]] = {}
        pairs = enumerate(zip(scores, answered, strict=True))
        alerts = [place for place, (score, by) in pairs if score >= by.review]
        for first in range(0, len(alerts), MAX_EXPLAINED):
            part = alerts[first : first + MAX_EXPLAINED]
            try:
                masked: Tensor = yield Call(MODEL, masked_rows(rows[part]))
            except Refused:
                reasons |= {place: [NO_TIME] for place in part}
            else:
                effects = contributions(masked[:, 0])
                found = map(main_reasons, effects.tolist())
                reasons |= zip(part, found, strict=True)
        asked = [
            request
            for request, result in zip(requests, results, strict=True)
            if result is None and isinstance(request, Transaction)
        ]
        if self.drift is not None:
            ends = milliseconds(asked[0].event_time), milliseconds(asked[-1].event_time)
            self.drift.take(ends, batch, output.detach().float().numpy(), self.state, self._started)
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
        if result._row is not None:
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
            if is_label(request):
                results.append(self._note(request))
                continue
            if is_follow_up(request):
                results.append(_noted(request))
                continue
            event = self._event(request)
            if isinstance(event, InputError):
                results.append(event)
            else:
                results.append(None)
                yield event

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
        verdicts = self._verdicts(asked, batch, scores)
        rows = zip(asked, verdicts, batch.flags.tolist(), scores, answered, strict=True)
        for place, (request, verdict, flag, score, by) in enumerate(rows):
            extra = request.model_extra
            apart = self._shared or self._may_lack(request)
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
            decision = Decision(
                transaction_id=request.transaction_id,
                score=score,
                decision=by.stricter(verdict.action, score),
                reason_codes=[*verdict.reasons, *reasons.get(place, [])][:MAX_REASONS],
                model=by.model,
                model_version=by.version,
                rules_version=self.rules.version,
                **special,
            )
            if self.audited:
                decision._row = batch.rows[place], by
            decisions.append(decision)
        if partial := sum(decision.features_partial for decision in decisions):
            PARTIAL_DECISIONS.inc(partial)
        return decisions

    def _may_lack(self, request: Transaction) -> bool:
        """Whether a window reaches below what this state has seen, or the time when keys moved."""
        unseen = max(self._moved, self._started)
        reach = RISK_REACH + self.state.limits.lateness_ms
        return unseen > NEVER and milliseconds(request.event_time) <= unseen + reach

    def _verdicts(
        self, asked: Sequence[Transaction], batch: Batch, scores: Sequence[float]
    ) -> list[Verdict]:
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
