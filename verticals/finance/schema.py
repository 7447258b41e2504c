"""The records at the doors: transactions in, decisions out, labels back."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import TypeIs

from plinth.engine.errors import InputError
from plinth.verticals.card_numbers import MIN_DIGITS, is_card_number, without_card_numbers
from plinth.verticals.double_keys import refuse_double_keys
from plinth.verticals.finance.plain import MAX_CARD, MAX_ID, PlainPayment

MIN_AMOUNT = 0.0001
"""The finest subdivision of a currency in ISO 4217; 0 verifies a card without a payment."""
MAX_AMOUNT = 1e12
"""In any currency; what it is worth has a bound of its own."""
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LATEST = datetime(2100, 1, 1, tzinfo=UTC)
_FIELD = re.compile(r"[a-z][a-z_]{0,39}")


def _no_card_number(token: str) -> str:
    if is_card_number(token):
        raise PydanticCustomError(
            "raw_card_number", "looks like a card number; send a token or keyed hash"
        )
    return token


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"^[!-~]+$")]
"""1 to 64 printable ASCII characters without spaces."""
_Token = Annotated[
    str,
    Field(min_length=1, max_length=MAX_CARD, pattern=r"^[!-~]+$"),
    AfterValidator(_no_card_number),
]
CardToken = Annotated[_Token, Field(repr=False)]
"""A token or keyed hash, 1 to 128 printable ASCII characters; never the card number itself."""


class _Written:
    """Times in JSON are dates that are written out; pydantic would guess the unit of a number."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        time = handler(source)
        written = core_schema.custom_error_schema(
            core_schema.str_schema(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt _]", strict=True),
            custom_error_type="datetime_parsing",
            custom_error_context={"error": "expected RFC 3339, such as 2025-09-01T12:00:00.000Z"},
        )
        read: Any = {**time, "strict": False}
        return core_schema.json_or_python_schema(core_schema.chain_schema([written, read]), time)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "format": "date-time"}


EventTime = Annotated[AwareDatetime, Field(ge=EARLIEST, lt=LATEST), _Written]
"""RFC 3339 with an offset, such as ``2025-09-01T12:00:00.000Z``; read in whole milliseconds."""


UnknownFields = Literal["ignore", "keep", "refuse"]
"""What becomes of fields that the schema does not have."""
CardNumbers = Literal["refuse", "allow"]
"""What becomes of a record with an id that looks like a card number. ``card`` never may."""
READING = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=True)


class Transaction(BaseModel):
    """One card payment to score, schema version 1. A record with ``fraud`` in it is a Label.

    Args:
        schema_version: 1.
        kind: ``payment``; what comes after one is a FollowUp.
        transaction_id: unique on the card; the same id again is the same payment.
        event_time: when the payment happened, RFC 3339 with an offset.
        amount: in ``currency``: 0.0001 or more, worth 10,000,000 of the base currency at most; or 0
            to verify the card (it is counted and scored like any other).
        currency: ISO 4217 code.
        card: token or keyed hash of the card.
        customer_id: who holds the card.
        terminal_id: where the payment is made: terminal, merchant or shop.
        device_id: the device of an online payment, if known.
        latitude, longitude: where the payment is made, degrees, if known; both or neither.
        received_time: when a door received it, in a history; training computes features in this
            order, so that they are what serving saw. Doors ignore it.
    """

    model_config = READING

    schema_version: Literal[1] = 1
    kind: Literal["payment"] = "payment"
    transaction_id: Id
    event_time: EventTime
    amount: Annotated[float, Field(ge=0, le=MAX_AMOUNT, allow_inf_nan=False)]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    card: CardToken
    customer_id: Id
    terminal_id: Id
    device_id: Id | None = None
    latitude: Annotated[float, Field(ge=-90, le=90, allow_inf_nan=False)] | None = None
    longitude: Annotated[float, Field(ge=-180, le=180, allow_inf_nan=False)] | None = None
    received_time: EventTime | None = None


class Label(BaseModel):
    """What became known of a transaction, schema version 1. Comes through the same doors.

    Args:
        schema_version: 1.
        transaction_id, terminal_id, event_time: as in the transaction.
        fraud: fraud or, to withdraw an earlier label, genuine.
        label_time: when this became known, RFC 3339; events before it never see the label.
        card: as in the transaction; needed where cards share transaction ids.
        received_time: when a door received it, in a history.
    """

    model_config = READING

    schema_version: Literal[1] = 1
    transaction_id: Id
    terminal_id: Id
    event_time: EventTime
    fraud: bool
    label_time: EventTime
    card: Annotated[_Token | None, Field(repr=False)] = None
    received_time: EventTime | None = None


class FollowUp(BaseModel):
    """What was done with a payment after it was asked for, schema version 1: noted, not counted.

    Features count what was asked for: who tests cards reverses his payments.

    Args:
        schema_version: 1.
        kind: ``capture``, ``reversal`` or ``refund``.
        transaction_id: of the payment.
        event_time: when this was done, RFC 3339 with an offset.
        card: as in the payment.
        amount: captured, taken back or paid back, in the payment's currency, if known.
        received_time: when a door received it, in a history.
    """

    model_config = READING

    schema_version: Literal[1] = 1
    kind: Literal["capture", "reversal", "refund"]
    transaction_id: Id
    event_time: EventTime
    card: CardToken
    amount: Annotated[float, Field(ge=0, le=MAX_AMOUNT, allow_inf_nan=False)] | None = None
    received_time: EventTime | None = None


class StrictTransaction(Transaction):
    """A transaction without unknown fields."""

    model_config = READING | ConfigDict(extra="forbid")


class StrictLabel(Label):
    """A label without unknown fields."""

    model_config = READING | ConfigDict(extra="forbid")


class StrictFollowUp(FollowUp):
    """A follow-up without unknown fields."""

    model_config = READING | ConfigDict(extra="forbid")


class OpenTransaction(Transaction):
    """A transaction with its unknown fields in ``model_extra``."""

    model_config = READING | ConfigDict(extra="allow")


class OpenLabel(Label):
    """A label with its unknown fields in ``model_extra``."""

    model_config = READING | ConfigDict(extra="allow")


class OpenFollowUp(FollowUp):
    """A follow-up with its unknown fields in ``model_extra``."""

    model_config = READING | ConfigDict(extra="allow")


Payment = Transaction | PlainPayment
"""A payment that was read, one way or the other."""
Record = Payment | Label | FollowUp
_TYPES: dict[UnknownFields, tuple[type[Transaction], type[Label], type[FollowUp]]] = {
    "ignore": (Transaction, Label, FollowUp),
    "keep": (OpenTransaction, OpenLabel, OpenFollowUp),
    "refuse": (StrictTransaction, StrictLabel, StrictFollowUp),
}
_PAYMENTS = frozenset((PlainPayment, *(payment for payment, _, _ in _TYPES.values())))
_LABELS = frozenset(label for _, label, _ in _TYPES.values())
_FOLLOW_UPS = frozenset(follow_up for _, _, follow_up in _TYPES.values())
_IDS = ("transaction_id", "terminal_id", "customer_id", "device_id")


def is_payment(record: Record) -> TypeIs[Payment]:
    """Whether a record is a payment; in a tenth of the time of pydantic's ``isinstance``."""
    return type(record) in _PAYMENTS


def is_label(record: Record) -> TypeIs[Label]:
    """Whether a record is a label."""
    return type(record) in _LABELS


def is_follow_up(record: Record) -> TypeIs[FollowUp]:
    """Whether a record is a capture, a reversal or a refund."""
    return type(record) in _FOLLOW_UPS


class Reason(BaseModel):
    """One reason for a decision: a fixed code and its fixed text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    text: str


class Decision(BaseModel):
    """The answer to one record.

    Args:
        transaction_id: of the record.
        score: calibrated probability of fraud, in [0, 1]; none for what is noted.
        decision: what to do with the payment; ``noted`` for a label or a follow-up.
        reason_codes: at most four: rules first, then what raised the score most.
        model: name of the model that gave the score: ``fraud``, or under load its cheaper
            variant.
        model_version: its version.
        rules_version: digest of the rules that were in force.
        features_late: a later event of the card had come before this one.
        features_partial: a window reached below what is remembered; counts may be too low.
        duplicate: this transaction was taken in before; nothing was counted again.
        conflict: and then it had another amount or terminal: judged by the amount asked for now,
            and at least reviewed (R04).
        extra: unknown fields of the record, where the settings keep them.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1
    transaction_id: str
    score: Annotated[float, Field(ge=0, le=1)] | None
    decision: Literal["approve", "review", "decline", "noted"]
    reason_codes: Annotated[list[Reason], Field(max_length=4)]
    model: str | None
    model_version: str | None
    rules_version: str | None = None
    features_late: bool = False
    features_partial: bool = False
    duplicate: bool = False
    conflict: bool = False
    extra: dict[str, Any] | None = None


_FIELDS = set(Decision.model_fields)


def unchecked(fields: dict[str, Any]) -> Decision:
    """A decision of fields that need no check, in a fifth of the time of one that checks them.

    Args:
        fields: all of :class:`Decision`, in its order; they become the decision's own.
    """
    decision = Decision.__new__(Decision)
    put = object.__setattr__
    put(decision, "__dict__", fields)
    put(decision, "__pydantic_fields_set__", _FIELDS)
    put(decision, "__pydantic_extra__", None)
    put(decision, "__pydantic_private__", None)
    return decision


def read(
    raw: bytes, unknown: UnknownFields = "ignore", card_numbers: CardNumbers = "refuse"
) -> Record:
    """One JSON record; one with a field ``fraud`` is a label, one of another kind a follow-up.

    Args:
        raw: one JSON object.
        unknown: what becomes of fields that the schema does not have; those that are kept have
            stars for what looks like a card number.
        card_numbers: what becomes of a record with an id that looks like a card number.

    Raises:
        InputError: names the first wrong field, and nothing the sender wrote.
    """
    made = _read(raw, unknown)
    if card_numbers == "refuse":
        _refuse_card_numbers(made)
    if made.model_extra:
        if not _can_be_written(made.model_extra):
            raise InputError(
                "an unknown field, which is kept, holds a number that JSON cannot say again: NaN, "
                "an infinity, or a whole number beyond 64 bits",
                reason="number_out_of_range",
                hint="send it as text, or set unknown_fields = 'ignore' in [verticals.finance]",
            )
        told = without_card_numbers(made.model_extra)
        made.model_extra.clear()
        made.model_extra.update(told)
    return made


def _can_be_written(value: Any) -> bool:
    """Whether a value that was read is written as JSON without being another one."""
    if isinstance(value, dict):
        return all(map(_can_be_written, value.values()))
    if isinstance(value, list):
        return all(map(_can_be_written, value))
    if isinstance(value, float):
        return isfinite(value)
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 64


def _refuse_card_numbers(record: Record) -> None:
    fields = vars(record)
    for field in _IDS:
        value = fields.get(field)
        if value is not None and len(value) >= MIN_DIGITS and is_card_number(value):
            raise InputError(
                f"{field}: looks like a card number; send a token or keyed hash",
                field=field,
                reason="raw_card_number",
                hint="if your ids are long numbers, give them a prefix, or set "
                "card_numbers_in_ids = 'allow' in [verticals.finance]",
            )


def _read(raw: bytes, unknown: UnknownFields) -> Record:
    payment, label, follow_up = _TYPES[unknown]
    other: type[Label | FollowUp] = label
    try:
        made: Transaction = payment.__pydantic_validator__.validate_json(raw)
    except ValidationError as error:
        found = _object(raw)
        if "fraud" not in found:
            if found.get("kind", "payment") == "payment":
                raise refusal(error) from None
            other = follow_up
    else:
        if 0 < made.amount < MIN_AMOUNT:
            raise InputError(
                f"amount: expected 0 or at least {MIN_AMOUNT:g}",
                field="amount",
                reason="too_small",
                hint="0 verifies a card; else send what is to be paid",
            )
        if (made.latitude is None) is not (made.longitude is None):
            missing = "latitude" if made.latitude is None else "longitude"
            raise InputError(
                f"{missing}: is missing",
                field=missing,
                reason="missing",
                hint="send latitude and longitude, or neither",
            )
        # Quotation marks of keys and texts, if no field is there twice, none is unknown, and
        # nothing is escaped. A field more adds at least two: equality proves that there is none.
        given = made.__pydantic_fields_set__
        texts = 6 + ("device_id" in given and made.device_id is not None) + ("kind" in given)
        texts += made.received_time is not None
        if raw.count(b'"') == 2 * (len(given) + texts):
            return made
        found = _object(raw)
        if "fraud" not in found:
            refuse_double_keys(raw, found)
            return made
    try:
        known = other.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from None
    if is_label(known) and known.label_time < known.event_time:
        raise InputError(
            "label_time: lies before event_time, when the payment was made",
            field="label_time",
            reason="label_before_payment",
            hint="are the two swapped, or has one another time zone?",
        )
    refuse_double_keys(raw, _object(raw))
    return known


def _object(raw: bytes) -> dict[str, Any]:
    """The record as it stands; empty where it is no object."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def refusal(error: ValidationError) -> InputError:
    """A pydantic error as one InputError that repeats nothing the sender wrote.

    Unknown fields are named only where the name is a plain word, as it may be anything.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    kind = str(first["type"])
    path = ".".join(str(part) for part in first["loc"])
    if kind == "json_invalid":
        return InputError(
            "the record is not valid JSON",
            hint="send one JSON object in UTF-8",
            reason="malformed_json",
        )
    if kind == "extra_forbidden" and not _FIELD.fullmatch(path):
        path = "an unknown field"
    more = error.error_count() - 1
    hint = "see the schema in the API docs"
    message = first["msg"]
    if kind == "timezone_aware":
        hint = "end the time with Z or an offset such as +02:00"
    if path.endswith("_time") and kind in ("greater_than_equal", "less_than"):
        kind, message = "implausible_time", "expected a time from 2000 to 2099"
    message += f" (and {more} more)" if more else ""
    return InputError(
        f"{path}: {message}" if path else message, field=path or None, hint=hint, reason=kind
    )
