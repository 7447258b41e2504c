"""What fraud scoring may be told: the table ``[verticals.finance]``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from plinth.verticals.contract import Settings
from plinth.verticals.finance.decisions.rules import RuleBook, limits, names_of
from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.features.program import STANDARD, Program, compiled
from plinth.verticals.finance.schema import CardNumbers, UnknownFields
from plinth.verticals.finance.succession.challenger import Promotion

STORE = Path(__file__).parent / "store"
Probability = Annotated[float, Field(ge=0, le=1)]
Entities = Annotated[int, Field(ge=8, le=100_000_000)]


class FraudSettings(Settings):
    """The table ``[verticals.finance]``.

    Args:
        store: folder of the model store; default: the one that comes with Plinth.
        model_version: default: the champion of the store, else the newest.
        review_threshold: score from which people look; default: each model's own.
        decline_threshold: score from which the payment is declined; default: each model's own.
        rates: currencies taken, and what one unit is worth in base currency.
        features: a table as :class:`Declaration`, or a TOML file with it: what is computed of each
            payment, in place of the standard features. Taken up at a start.
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
        challenger: a version that scores in shadow what the champion scores; ``newest``: the newest
            in the store behind the champion that was not rolled back.
        challenger_share: of cards whose payments it scores.
        challenger_payments: remembered with both scores, until their labels come.
        promotion: rule by which it becomes the champion: a table as :class:`Promotion`, or a TOML
            file with it, which is read again when it changes. Absent: a person promotes it.
        case_alerts: whose case files are remembered, about 2 KiB each, by doors that offer them.
        case_payments: payments whose scores they remember to try thresholds on, 29 bytes each.
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
    features: Declaration | None = None
    rules: RuleBook | None = None
    hard_amount: Annotated[float, Field(gt=0, lt=1e15)] | None = 5000.0
    max_card_count_5m: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = 10
    max_device_cards_24h: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = 5
    max_ahead_seconds: Annotated[float, Field(ge=0)] | None = 300.0
    lateness_days: Annotated[float, Field(ge=0, le=90)] = 7.0
    max_cards: Entities = 200_000
    max_terminals: Entities = 200_000
    max_customers: Entities = 200_000
    max_devices: Entities = 200_000
    max_events: Annotated[int, Field(ge=8, le=10_000_000_000)] = 10_000_000
    unknown_fields: UnknownFields = "ignore"
    card_numbers_in_ids: CardNumbers = "refuse"
    challenger: str | None = None
    challenger_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    challenger_payments: Annotated[int, Field(ge=1_000, le=100_000_000)] = 200_000
    promotion: Promotion | None = None
    case_alerts: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    case_payments: Annotated[int, Field(ge=1_000, le=100_000_000)] = 200_000
    drift_alarm: Annotated[float, Field(gt=0)] = 0.25
    missing_labels_alarm: Probability = 0.7
    colocated: bool = False
    live_tables: ClassVar[tuple[str, ...]] = ("features", "rules", "promotion")

    @field_validator("rules", mode="before")
    @classmethod
    def _rules_know_the_features(cls, rules: Any, info: ValidationInfo) -> Any:
        declared = info.data.get("features")
        if declared is None or not isinstance(rules, Mapping):
            return rules
        return {**rules, "names": names_of(compiled(declared))}

    @classmethod
    def live_table(cls, field: str, content: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        declared = others.get("features")
        if field != "rules" or declared is None:
            return content
        features = Declaration.model_validate(declared)
        return {**content, "names": names_of(compiled(features))}

    def program(self) -> Program:
        """The features, ready to be computed."""
        return STANDARD if self.features is None else compiled(self.features)

    @model_validator(mode="after")
    def _one_set_of_rules(self) -> FraudSettings:
        both = self.model_fields_set & {"hard_amount", "max_card_count_5m", "max_device_cards_24h"}
        if self.rules is not None and both:
            raise ValueError(f"rules takes the place of {min(both)}: write it as a rule, or leave")
        return self

    @model_validator(mode="after")
    def _something_to_promote(self) -> FraudSettings:
        if self.promotion is not None and self.challenger is None:
            raise ValueError("promotion needs a challenger: challenger = 'newest', or a version")
        if self.promotion is not None and self.model_version is not None:
            raise ValueError("model_version pins the champion: leave it, or leave promotion")
        return self

    def rule_book(self) -> RuleBook:
        """The rules in force: those given, or the built-in ones with their limits."""
        if self.rules is not None:
            return self.rules
        return limits(self.hard_amount, self.max_card_count_5m, self.max_device_cards_24h)
