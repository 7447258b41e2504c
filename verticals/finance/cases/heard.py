"""What the audit of stream workers tells of their decisions, for the case files of a server.

An audit has no card: a payment is known by its customer, its terminal and its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from plinth.engine import InputError
from plinth.verticals.contract import invalid
from plinth.verticals.finance.schema import Decision, EventTime, Id
from plinth.verticals.finance.versions import Variant

_MODEL = ConfigDict(frozen=True, protected_namespaces=())


class HeardPayment(NamedTuple):
    """A payment that a stream worker decided; amounts as in :class:`Transaction`.

    Args:
        transaction_id, event_time, amount, currency, customer_id, terminal_id, device_id: its own.
        reply: writes a record to where the payment came from; none: it would not be read there.
        card: is not known.
    """

    transaction_id: str
    event_time: Any
    amount: float
    currency: str
    customer_id: str
    terminal_id: str
    device_id: str | None
    reply: Callable[[bytes], None] | None
    card: None = None


class _Record(BaseModel):
    model_config = _MODEL

    event_time: EventTime
    terminal_id: Id | None = None
    customer_id: Id | None = None
    device_id: Id | None = None
    amount: float | None = None
    currency: str | None = None
    fraud: bool | None = None


class _Thresholds(BaseModel):
    model_config = _MODEL

    review: float
    decline: float


class _Evidence(BaseModel):
    model_config = _MODEL

    record: _Record
    features: dict[str, float] = {}
    thresholds: _Thresholds | None = None
    model_digest: str = ""


class Heard(BaseModel):
    """An answer and what it was made from, as the audit has them."""

    model_config = _MODEL

    answer: Decision
    evidence: _Evidence

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Heard:
        """From a record of the audit.

        Raises:
            InputError: it is of no payment and no label.
        """
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise invalid(error) from None

    @property
    def is_label(self) -> bool:
        """Whether it tells what became known of a payment."""
        return self.evidence.record.fraud is not None

    def payment(self, reply: Callable[[bytes], None] | None) -> HeardPayment:
        """The payment that was decided.

        Raises:
            InputError: it is something else.
        """
        told = self.evidence.record
        if (
            self.answer.score is None
            or told.terminal_id is None
            or told.customer_id is None
            or told.amount is None
            or told.currency is None
        ):
            raise InputError("it is no payment", reason="unsupported")
        return HeardPayment(
            self.answer.transaction_id,
            told.event_time,
            told.amount,
            told.currency,
            told.customer_id,
            told.terminal_id,
            told.device_id,
            reply,
        )

    @property
    def by(self) -> Variant:
        """What decided.

        Raises:
            InputError: it does not say so.
        """
        given, at = self.answer, self.evidence.thresholds
        if at is None or given.model is None or given.model_version is None:
            raise InputError("it does not say what decided", reason="unsupported")
        digest = self.evidence.model_digest
        return Variant(given.model, given.model_version, at.review, at.decline, digest)
