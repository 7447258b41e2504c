"""Fraud scoring as a vertical: transactions in, decisions out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
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
    ModelError,
    Pause,
    Sla,
    Timing,
)
from plinth.verticals.contract import Query, Settings, StateError, StateStore, Vertical, Written
from plinth.verticals.finance.asked import Asked
from plinth.verticals.finance.cases.case_book import CaseBook, Scored
from plinth.verticals.finance.cases.heard import Heard, HeardPayment
from plinth.verticals.finance.cases.questions import (
    Alerts,
    AskAlerts,
    AskCase,
    AskLabel,
    AskModels,
    AskTape,
    AskWhatIf,
    CaseFile,
    Models,
    Tape,
    WhatIf,
)
from plinth.verticals.finance.cases.questions import Labelled as Marked
from plinth.verticals.finance.cases.standing import standing
from plinth.verticals.finance.decided import LEVELS, Decided
from plinth.verticals.finance.decisions.reasons import (
    ESTIMATED,
    NO_TIME,
    explain,
    first_question,
    why_other,
)
from plinth.verticals.finance.decisions.rules import REUSED_ID, Payments, Rules, Verdict
from plinth.verticals.finance.features import parts, persistence
from plinth.verticals.finance.features.online import (
    Batch,
    FeatureState,
    Flag,
    Labelled,
    Limits,
    Told,
    refused_amount,
)
from plinth.verticals.finance.features.timeline import DAY, NEVER, milliseconds
from plinth.verticals.finance.metrics import PARTIAL_DECISIONS, RULE_HITS, TableMetrics
from plinth.verticals.finance.reading import read_plain
from plinth.verticals.finance.schema import (
    LATEST,
    Decision,
    FollowUp,
    Label,
    Payment,
    Reason,
    Record,
    Transaction,
    is_follow_up,
    is_label,
    is_payment,
    read,
)
from plinth.verticals.finance.settings import FraudSettings
from plinth.verticals.finance.succession.drift import DriftWatch
from plinth.verticals.finance.tally import FraudTally, key_of
from plinth.verticals.finance.versions import Serving, Variant, Versions

Watch = Callable[[Payments, Mapping[str, Sequence[int]]], None]
"""Is shown payments with their scores, and the places where each rule held."""
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

    Attributes:
        watch: is shown what rules are applied to; a backtest sets it.
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
        self._features = given.program()
        self.rules = given.rule_book().compiled()
        self.state = FeatureState(
            Limits(
                lateness_ms=round(given.lateness_days * DAY),
                max_cards=given.max_cards,
                max_terminals=given.max_terminals,
                max_customers=given.max_customers,
                max_devices=given.max_devices,
                max_events=given.max_events,
            ),
            self._features,
        )
        self._store: StateStore | None = None
        self._shared = False
        self._moved = self._started = NEVER
        self.watch: Watch | None = None
        self._cases: CaseBook | None = None
        self._known_past = inf, datetime.min.replace(tzinfo=UTC)
        me = weakref.ref(self)
        self._tables = TableMetrics(lambda: found.state if (found := me()) else None)
        self.versions = Versions(given, clock, self._features)

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
        if settings.features != self._given.features:
            raise ConfigError(
                "other features are declared; they are taken up at a start alone",
                hint="start anew: the state is then built from the log with them",
            )
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
        with self.versions.asked() as serving:
            results, decided = yield from self._judged(requests, serving)
        made = iter(decided.decisions if decided is not None else ())
        return [next(made) if result is None else result for result in results]

    def answers(self, requests: Sequence[Record]) -> Flow[list[Decision | Written | InputError]]:
        with self.versions.asked() as serving:
            results, decided = yield from self._judged(requests, serving)
        made = iter(decided.written(audited=self.audited) if decided is not None else ())
        return [next(made) if result is None else result for result in results]

    def _judged(
        self, requests: Sequence[Record], serving: Serving
    ) -> Flow[tuple[list[Decision | InputError | None], Decided | None]]:
        """One entry for each request, ``None`` for the payments that were decided, and these."""
        results: list[Decision | InputError | None] = []
        frauds: list[Label] = []
        asked = self._asked(requests)
        batch = self.state.update(self._taken_in(requests, asked, results, frauds))
        self._tables.count_evictions(self.state)
        if not len(batch.rows):
            if serving.drift is not None:
                serving.drift.label(len(frauds))
            return results, None
        rows = torch.from_numpy(serving.columns.seen(batch.rows))
        ahead = _Ahead(serving, rows)
        output: Tensor = yield Call(serving.name, rows, then=ahead)
        told = output.detach().float().numpy()
        scores, by = told[:, 0].astype(np.float64), told[:, 1].astype(np.int64)
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ModelError(f"{serving.name} {serving.version} gave a score outside of [0, 1]")
        review, decline = np.array([(v.review, v.decline) for v in serving.variants]).T[:, by]
        alerts = _alerts(serving, output)
        if not alerts:
            yield Pause()  # an alert of the same batch asks for its reasons first
        why, reasons = yield from _explained(serving, rows, output, alerts, ahead)
        if self.versions.shadow is not None:
            self.versions.shadow.offer(asked.payments, batch, told)
        if serving.drift is not None:
            ends = asked.times[0], asked.times[-1]
            serving.drift.take(ends, batch, told, self.state, self._started)
            serving.drift.label(len(frauds))
        rules = self.rules  # others may come meanwhile; a decision names those it was made by
        verdicts = self._verdicts(rules, asked, batch, scores)
        levels = (scores >= review).astype(np.int64)
        levels[scores >= decline] = 2
        serving.probation.take(len(levels), int(np.count_nonzero(levels == 2)))
        for place, verdict in verdicts.items():
            levels[place] = max(levels[place], LEVELS[verdict.action])
        decided = Decided(
            asked, batch, scores.tolist(), by, serving.variants, levels, verdicts, reasons,
            self._partial(asked), rules.version, self._features.names,
        )  # fmt: skip
        if partial := np.count_nonzero(decided.flags & Flag.PARTIAL.value):
            PARTIAL_DECISIONS.inc(float(partial))
        if self._cases is not None:
            answered = [serving.variants[place] for place in by.tolist()]
            payments, worth = asked.payments, asked.worth
            scored = Scored(payments, decided.decisions, batch.rows, worth, answered, why)
            self._cases.take(scored, serving, self._rule_codes())
        return results, decided

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

    def parse_each(
        self, raws: Sequence[bytes], received: Sequence[float | None]
    ) -> list[Record | InputError]:
        if self._given.unknown_fields == "keep":
            return super().parse_each(raws, received)
        plain = read_plain(raws, self._given.card_numbers_in_ids)
        ahead = self._given.max_ahead_seconds
        found: list[Record | InputError] = []
        for raw, one, at in zip(raws, plain, received, strict=True):
            if one is not None and (
                ahead is None or at is None or one.milliseconds / 1e3 <= at + ahead
            ):
                found.append(one)
            else:
                found += super().parse_each([raw], [at])
        return found

    def encode(self, result: Decision) -> bytes:
        fields = vars(result)
        if result.extra is None:
            fields = fields.copy()
            del fields["extra"]
        return orjson.dumps(fields, default=vars)

    def queries(self) -> Sequence[Query]:
        """Alerts, their case files, labels for them, and other thresholds."""
        book = self._book()

        def case(asked: AskCase) -> CaseFile:
            return book.case(asked.alert, self.state)

        def what_if(asked: AskWhatIf) -> Callable[[], WhatIf]:
            return book.what_if(asked, self.variants[0].review)

        def models(asked: AskModels) -> Models:
            return standing(self.versions)

        return (
            Query("GET", "alerts", "Alerts.", AskAlerts, Alerts, book.alerts),
            Query("GET", "alerts/{alert}", "The case file of an alert.", AskCase, CaseFile, case),
            Query(
                "POST",
                "alerts/{alert}/label",
                "Say what became known of an alert.",
                AskLabel,
                Marked,
                self._mark,
            ),
            Query(
                "GET", "what-if", "What another threshold would give.", AskWhatIf, WhatIf, what_if
            ),
            Query("GET", "tape", "The last payments, and how many.", AskTape, Tape, book.tape),
            Query("GET", "models", "Champion, challenger, drift.", AskModels, Models, models),
        )

    def _book(self) -> CaseBook:
        if self._cases is None:
            self._cases = CaseBook(self._given.case_alerts, self._given.case_payments)
        return self._cases

    def _mark(self, asked: AskLabel) -> Marked | Callable[[], Marked]:
        """A person's label, as if it had come as a record now, to whoever decided the payment."""
        book = self._book()
        payment, now = book.payment(asked.alert), datetime.fromtimestamp(self._clock(), UTC)
        marked = Marked(
            alert=asked.alert,
            label="fraud" if asked.fraud else "genuine",
            label_time=now.isoformat(timespec="milliseconds"),
        )
        label = Label(
            transaction_id=payment.transaction_id,
            terminal_id=payment.terminal_id,
            event_time=payment.event_time,
            fraud=asked.fraud,
            label_time=now,
            card=payment.card,
        )
        if isinstance(payment, HeardPayment):
            return partial(self._reply, label, payment.reply, marked)
        frauds: list[Label] = []
        noted = self._note(label, frauds)
        if isinstance(noted, InputError):
            raise noted
        if self.drift is not None:
            self.drift.label(len(frauds))
        return self._once_durable(marked)

    def _once_durable(self, marked: Marked) -> Marked | Callable[[], Marked]:
        """The answer, or what waits until what it says is durable."""
        if self.settled is None:
            return marked
        durable = self.settled()

        def wait() -> Marked:
            durable.result()
            return marked

        return wait

    def _reply(self, label: Label, reply: Callable[[bytes], None] | None, marked: Marked) -> Marked:
        """Send a label to the stream that decided, then note it."""
        if reply is None:
            raise InputError(
                "a stream with a mapping decided this payment, which reads no label from here",
                reason="unsupported",
                hint="send the label as the messages of that stream have it",
            )
        reply(label.model_dump_json(exclude_none=True).encode())
        self._book().note(label)
        return marked

    def heard(self, told: Mapping[str, Any], reply: Callable[[bytes], None] | None) -> None:
        made = Heard.read(told)
        book, record = self._book(), made.evidence.record
        if made.is_label:
            place = record.terminal_id, milliseconds(record.event_time)
            words = f"{made.answer.transaction_id} {place[0]} {place[1]}"
            book.note_key(key_of(words), bool(record.fraud))
            return
        payment = made.payment(reply)
        rate = self._given.rates.get(payment.currency)
        if rate is None:
            raise InputError("its currency has no rate here", reason="unknown_currency")
        book.hear(
            payment,
            made.answer,
            payment.amount * rate,
            made.evidence.features,
            made.by,
            self.versions.serving,
            self._rule_codes(),
        )

    def _rule_codes(self) -> frozenset[str]:
        codes = frozenset(one.code for one in self.rules.rules if not one.shadow)
        return codes | {REUSED_ID.code}

    def evidence(self, request: Record, result: Decision) -> dict[str, Any]:
        """What was noted; no card. Of payments :meth:`answers` tells more."""
        told = vars(request)
        return {"record": {name: told[name] for name in _TOLD if told.get(name) is not None}}

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
        self.state.update(self._taken_in(requests, self._asked(requests), [], []))

    def snapshot(self) -> bytes:
        if self.state.shelves:
            raise StateError(
                "the state of finance is kept by parts, and is not in memory as a whole"
            )
        return persistence.pack(self.state)

    def restore(self, state: bytes) -> None:
        self._begin_with(persistence.unpack(state, self.state.limits, self._features))

    def _begin_with(self, state: FeatureState) -> None:
        """Go on with another state."""
        self.state = state
        if self.drift is not None:
            self.drift.begin_anew()  # the example of a warm-up is no payment, and has a day
        if self._cases is not None:
            self._cases.clear()  # its alerts are of payments that this state may not have seen

    @contextmanager
    def aside(self) -> Iterator[None]:
        kept = self.state
        self.state = FeatureState(kept.limits, self._features)
        try:
            yield
        finally:
            self._begin_with(kept)

    def keep_state_in(self, store: StateStore) -> None:
        state = self.state
        if state.shelves:
            state = FeatureState(state.limits, self._features)
        parts.keep_in(state, store)
        self._begin_with(state)
        self._store = store
        self.settled = store.durable if store.logs else None

    def unsaved(self) -> float:
        return self.state.unsaved

    def begin_checkpoint(self) -> None:
        if self._store is not None:
            parts.begin(self.state, self._store)

    def write_checkpoint(self, seconds: float) -> bool:
        return parts.write(self.state, seconds)

    def end_checkpoint(self, *, durable: bool) -> None:
        parts.end(self.state, durable=durable)

    def _asked(self, requests: Sequence[Record]) -> Asked:
        """The payments among them that can be judged."""
        return Asked.of([one for one in requests if is_payment(one)], self._given.rates)

    def _taken_in(
        self,
        requests: Sequence[Record],
        asked: Asked,
        results: list[Decision | InputError | None],
        frauds: list[Label],
    ) -> Iterator[Told]:
        """Events of the payments, in order; labels take effect in between.

        Args:
            requests: what came.
            asked: the payments among them that can be judged.
            results: gets one entry for each: the answer, or ``None`` where the model gives it.
            frauds: gets the labels by which a payment first became known as fraud.
        """
        if self._store is not None:
            parts.foresee(self.state, self._store, asked.names)
        if len(asked) == len(requests):
            results.extend([None] * len(requests))
            return asked.events()
        return self._in_order(requests, asked.events(), results, frauds)

    def _in_order(
        self,
        requests: Sequence[Record],
        events: Iterator[Told],
        results: list[Decision | InputError | None],
        frauds: list[Label],
    ) -> Iterator[Told]:
        for request in requests:
            if is_payment(request):
                refused = self._refused(request)
                results.append(refused)
                if refused is None:
                    yield next(events)
            elif is_label(request):
                results.append(self._note(request, frauds))
            else:
                results.append(_noted(request))

    def _note(self, label: Label, frauds: list[Label]) -> Decision | InputError:
        made = Labelled(
            label.transaction_id,
            label.terminal_id,
            milliseconds(label.event_time),
            milliseconds(label.label_time),
            label.fraud,
            label.card,
        )
        before = self.state.frauds
        try:
            found = self.state.label(made, max(self._moved, self._started))
        except InputError as error:
            return error
        if label.fraud and (self.state.frauds > before or not found):
            frauds.append(label)
        if self.versions.shadow is not None:
            self.versions.shadow.note(label)
        if self._cases is not None:
            self._cases.note(label)
        return _noted(label, partial=not found)

    def _refused(self, payment: Payment) -> InputError | None:
        """Why a payment cannot be judged; ``None``: it can."""
        rate = self._given.rates.get(payment.currency)
        if rate is None:
            return InputError(
                f"currency: expected one of {', '.join(sorted(self._given.rates))}",
                field="currency",
                reason="unknown_currency",
                hint="add its rate to [verticals.finance.rates]",
            )
        return refused_amount(payment, rate)

    def _future(self, field: str) -> InputError:
        return InputError(
            f"{field}: more than {self._given.max_ahead_seconds:g} s in the future",
            field=field,
            reason="future_event",
            hint="check the sender's clock and time zone, and its records' timestamps in Kafka",
        )

    def _partial(self, asked: Asked) -> npt.NDArray[np.bool_] | None:
        """Which payments have partial features by where they came from; ``None``: none of them."""
        if self._shared:
            return np.ones(len(asked), bool)
        until = self._lacking_until()
        if until == NEVER:
            return None
        return np.array(asked.times) <= until

    def _lacking_until(self) -> int:
        """Up to this event time windows reach below what this state has seen, or a move of keys."""
        unseen = max(self._moved, self._started)
        return (
            unseen + self._features.reach + self.state.limits.lateness_ms
            if unseen > NEVER
            else NEVER
        )

    def _verdicts(
        self,
        rules: Rules,
        asked: Asked,
        batch: Batch,
        scores: npt.NDArray[np.float64],
    ) -> dict[int, Verdict]:
        payments = Payments(
            asked.payments,
            np.array(asked.worth, dtype=np.float64),
            batch.rows,
            batch.flags,
            scores.astype(np.float32),
            self._features,
        )
        verdicts, hits = rules.apply(payments)
        shadows = {rule.code for rule in rules.rules if rule.shadow} if hits else ()
        for code, held in hits.items():
            RULE_HITS.labels(code, "shadow" if code in shadows else "applied").inc(len(held))
        if self.watch is not None:
            self.watch(payments, hits)
        return verdicts


def _alerts(serving: Serving, output: Tensor) -> list[int]:
    """The places of payments that are to be reviewed, or declined."""
    told = output.detach().float().numpy()
    review = np.array([variant.review for variant in serving.variants])
    return np.flatnonzero(told[:, 0] >= review[told[:, 1].astype(np.int64)]).tolist()


class _Ahead:
    """The first question for reasons, foreseen from the scores.

    Args:
        serving: whose scores.
        rows: of the payments, as the model has them.

    Attributes:
        call: the question; ``None``: nobody has foreseen one.
        about: the model that it is for, and the alerts.
    """

    def __init__(self, serving: Serving, rows: Tensor) -> None:
        self._serving = serving
        self._rows = rows
        self.call: Call | None = None
        self.about: tuple[str, list[int]] | None = None

    def __call__(self, output: Tensor) -> Call | None:
        """See :class:`plinth.engine.Call`."""
        serving, alerts = self._serving, _alerts(self._serving, output)
        for model, mine in _by_variant(serving, output, alerts):
            if mine:
                self.about = model, mine
                self.call = first_question(serving.reasons, model, self._rows[mine])
                break
        return self.call


def _by_variant(
    serving: Serving, output: Tensor, alerts: Sequence[int]
) -> list[tuple[str, list[int]]]:
    """What each variant is asked as, and the alerts that it has scored."""
    by = output[:, 1].int()
    return [
        (model, [place for place in alerts if by[place] == variant])
        for variant, model in enumerate(serving.asked_as)
    ]


def _explained(
    serving: Serving, rows: Tensor, output: Tensor, alerts: Sequence[int], ahead: _Ahead
) -> Flow[tuple[dict[int, list[float]], dict[int, list[Reason]]]]:
    """Effects of the groups, where they were found, and the reasons, by the place of the alert."""
    why: dict[int, list[float]] = {}
    reasons: dict[int, list[Reason]] = {}
    for variant, (model, mine) in enumerate(_by_variant(serving, output, alerts)):
        if not mine:
            continue
        first = ahead.call if ahead.about == (model, mine) else None
        found = yield from explain(serving.reasons, model, variant, rows[mine], first)
        for place, (effects, exact) in zip(mine, found, strict=True):
            if effects is None:
                reasons[place] = [NO_TIME]
                continue
            why[place] = effects.tolist()
            main = serving.reasons.main(why[place])
            reasons[place] = main if exact else [ESTIMATED, *main]
    return why, reasons


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
