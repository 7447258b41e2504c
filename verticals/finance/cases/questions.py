"""The questions about alerts, and their answers, as they stand in the API docs.

Nothing here holds a card number or a token: cards, customers and devices are told by a keyed hash
whose key is made anew with each process.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from plinth.verticals.finance.schema import Id

_MODEL = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
AlertId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Of an alert: a keyed hash of its card and transaction."""
Probability = Annotated[float, Field(ge=0, le=1)]
Known = Literal["fraud", "genuine"]


class AskAlerts(BaseModel):
    """Which alerts are wanted.

    Args:
        limit: the first so many.
        order: newest first, or those first that may cost most.
        decision: of this decision alone.
        labelled: with a label, or without one.
    """

    model_config = _MODEL

    limit: Annotated[int, Field(ge=1, le=500)] = 50
    order: Literal["newest", "expected_loss"] = "newest"
    decision: Literal["review", "decline"] | None = None
    labelled: bool | None = None


class AskCase(BaseModel):
    """Which alert is meant."""

    model_config = _MODEL

    alert: AlertId


class AskLabel(BaseModel):
    """What became known of an alert's payment.

    Args:
        alert: which one.
        fraud: fraud or, to withdraw an earlier label, genuine.
    """

    model_config = _MODEL

    alert: AlertId
    fraud: bool


class AskWhatIf(BaseModel):
    """Which threshold is tried.

    Args:
        review_threshold: score from which people would look.
        label_days: a payment this old without a label is genuine.
    """

    model_config = _MODEL

    review_threshold: Probability
    label_days: Annotated[float, Field(ge=0, le=90)] = 7.0


class Alert(BaseModel):
    """One alert in a list; its expected loss is score times amount, in base currency."""

    model_config = _MODEL

    id: AlertId
    transaction_id: Id
    event_time: str
    amount: float
    currency: str
    decision: Literal["review", "decline"]
    score: Probability
    expected_loss: float
    reasons: list[str]
    label: Known | None


class Alerts(BaseModel):
    """Alerts in the order that was asked for, and how many are remembered."""

    model_config = _MODEL

    alerts: list[Alert]
    remembered: int


class CaseReason(BaseModel):
    """Why: a fixed code and text, and what it was made from.

    Args:
        code, text: as in the decision.
        effect: log-odds by which it raised the score; none for a rule.
        features: those behind it, with their values.
    """

    model_config = _MODEL

    code: str
    text: str
    effect: float | None
    features: dict[str, float]


class PastPayment(BaseModel):
    """One payment of the card; amounts in base currency."""

    model_config = _MODEL

    transaction_id: Id
    event_time: str
    amount: float
    terminal_id: Id
    label: Known | None
    alert: AlertId | None


class Similar(BaseModel):
    """Another alert, and how far its features are away: standard deviations, root mean square."""

    model_config = _MODEL

    id: AlertId
    distance: float
    decision: Literal["review", "decline"]
    score: Probability
    label: Known | None


class CaseFile(BaseModel):
    """All that is known of one alert.

    Args:
        alert: as in the list.
        model, model_version, rules_version: what decided.
        review_threshold, decline_threshold: that were in force.
        decided_by: this server, or a stream worker whose audit it reads.
        card, customer, device: keyed hashes: equal where they are the same, no more; an audit has
            no card.
        terminal_id: of the payment.
        features: every column.
        reasons: in words, the strongest first after the rules.
        history: payments of the card that are remembered, newest first, at most 50; of an alert of
            a stream worker those of the customer.
        similar: the nearest other alerts, at most 5.
    """

    model_config = _MODEL

    alert: Alert
    model: str
    model_version: str
    rules_version: str
    review_threshold: float
    decline_threshold: float
    decided_by: Literal["server", "stream"]
    card: str | None
    customer: str
    device: str | None
    terminal_id: Id
    features: dict[str, float]
    reasons: list[CaseReason]
    history: list[PastPayment]
    similar: list[Similar]


class Labelled(BaseModel):
    """The label was taken in."""

    model_config = _MODEL

    alert: AlertId
    label: Known
    label_time: str


class AtThreshold(BaseModel):
    """What one threshold gives on the payments that are remembered.

    Shares are none where nothing is known that they would be a share of; amounts in base currency.
    """

    model_config = _MODEL

    review_threshold: float
    alerts: int
    alerts_per_day: float
    precision: float | None
    recall: float | None
    frauds: int
    genuine: int
    amount_of_frauds: float
    amount_of_genuine: float


class WhatIf(BaseModel):
    """The threshold that is tried beside the one in force, rules as they are.

    Args:
        payments, days: remembered.
        frauds, genuine: of them, as far as known.
        amount_of_frauds: base currency.
        now, then: at the threshold in force, and at the one that is tried.
    """

    model_config = _MODEL

    payments: int
    days: float
    frauds: int
    genuine: int
    amount_of_frauds: float
    now: AtThreshold
    then: AtThreshold


class AskTape(BaseModel):
    """How many of the last payments are wanted."""

    model_config = _MODEL

    limit: Annotated[int, Field(ge=0, le=50)] = 12


class TapePayment(BaseModel):
    """One of the last payments; the alert of one that is no alert is none."""

    model_config = _MODEL

    transaction_id: Id
    event_time: str
    amount: float
    currency: str
    terminal_id: Id
    decision: str
    score: Probability
    alert: AlertId | None


class Tape(BaseModel):
    """What was decided since the start, payments that came again left out.

    Args:
        approved, reviewed, declined: how many.
        payments: the last ones, newest first.
    """

    model_config = _MODEL

    approved: int
    reviewed: int
    declined: int
    payments: list[TapePayment]


class AskModels(BaseModel):
    """No field: the models of this process."""

    model_config = _MODEL


class ChallengerStands(BaseModel):
    """The challenger beside the champion on the same payments.

    Args:
        version: of the challenger.
        figures: by measure, as in the metric ``plinth_finance_challenger``.
        unmet: what keeps it from being promoted, in words.
    """

    model_config = _MODEL

    version: str
    figures: dict[str, float]
    unmet: list[str]


class Drifted(BaseModel):
    """How far a feature, or the score, is from the model's training: stability index."""

    model_config = _MODEL

    name: str
    psi: float
    shifted: bool


class Models(BaseModel):
    """Which model answers, what stands beside it, and whether payments are as in its training.

    Args:
        champion: version that answers.
        review_threshold, decline_threshold: in force.
        challenger: none, or not yet heard of.
        drift: over the newest full days, the farthest first; empty until there are enough.
        drift_alarm: index above which a feature is shifted.
        labels_missing: far fewer frauds are labelled than the training had.
    """

    model_config = _MODEL

    champion: str
    review_threshold: float
    decline_threshold: float
    challenger: ChallengerStands | None
    drift: list[Drifted]
    drift_alarm: float
    labels_missing: bool
