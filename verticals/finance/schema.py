"""The records at the doors: transactions in, decisions out, labels back."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import TypeIs

from plinth.engine.errors import InputError

MIN_AMOUNT = 0.0001
"""The finest subdivision of a currency in ISO 4217; 0 verifies a card without a payment."""
MAX_AMOUNT = 10_000_000.0
"""No single card payment is larger; a larger one is a fault of the sender."""
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)
LATEST = datetime(2100, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
MIN_DIGITS = 13
"""Of a card number."""
_DIGITS = re.compile(r"(?:[-._/:]?[0-9]){13,19}")
_FIELD = re.compile(r"[a-z][a-z_]{0,39}")


def _is_card_number(token: str) -> bool:
    """Whether it has the length and the check digit (Luhn, ISO/IEC 7812-1) of a card number."""
    if len(token) < MIN_DIGITS or not token[:1].isdigit() or _DIGITS.fullmatch(token) is None:
        return False
    digits = [int(char) for char in reversed(token) if char.isdigit()]
    doubled = (d * 2 - 9 if d > 4 else d * 2 for d in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _no_card_number(token: str) -> str:
    if _is_card_number(token):
        raise PydanticCustomError(
            "raw_card_number", "looks like a card number; send a token or keyed hash"
        )
    return token


def _plausible_time(time: datetime) -> datetime:
    if not EARLIEST <= time < LATEST:
        raise PydanticCustomError("implausible_time", "expected a time from 2000 to 2099")
    return time


Id = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[!-~]+$")]
"""1 to 64 printable ASCII characters without spaces."""
_Token = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$"), AfterValidator(_no_card_number)
]
CardToken = Annotated[_Token, Field(repr=False)]
"""A token or keyed hash, 1 to 128 printable ASCII characters; never the card number itself."""
EventTime = Annotated[AwareDatetime, AfterValidator(_plausible_time)]
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
        transaction_id: unique on the card; the same id again is the same payment.
        event_time: when the payment happened, RFC 3339 with an offset.
        amount: in ``currency``: 0.0001 to 10,000,000, or 0 to verify the card (it is counted and
            scored like any other).
        currency: ISO 4217 code.
        card: token or keyed hash of the card.
        customer_id: who holds the card.
        terminal_id: where the payment is made: terminal, merchant or shop.
        device_id: the device of an online payment, if known.
    """

    model_config = READING

    schema_version: Literal[1] = 1
    transaction_id: Id
    event_time: EventTime
    amount: Annotated[float, Field(ge=0, le=MAX_AMOUNT, allow_inf_nan=False)]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    card: CardToken
    customer_id: Id
    terminal_id: Id
    device_id: Id | None = None


class Label(BaseModel):
    """What became known of a transaction, schema version 1. Comes through the same doors.

    Args:
        schema_version: 1.
        transaction_id, terminal_id, event_time: as in the transaction.
        fraud: fraud or, to withdraw an earlier label, genuine.
        label_time: when this became known, RFC 3339; events before it never see the label.
        card: as in the transaction; needed where cards share transaction ids.
    """

    model_config = READING

    schema_version: Literal[1] = 1
    transaction_id: Id
    terminal_id: Id
    event_time: EventTime
    fraud: bool
    label_time: EventTime
    card: Annotated[_Token | None, Field(repr=False)] = None


class StrictTransaction(Transaction):
    """A transaction without unknown fields."""

    model_config = READING | ConfigDict(extra="forbid")


class StrictLabel(Label):
    """A label without unknown fields."""

    model_config = READING | ConfigDict(extra="forbid")


class OpenTransaction(Transaction):
    """A transaction with its unknown fields in ``model_extra``."""

    model_config = READING | ConfigDict(extra="allow")


class OpenLabel(Label):
    """A label with its unknown fields in ``model_extra``."""

    model_config = READING | ConfigDict(extra="allow")


_TYPES: dict[UnknownFields, tuple[type[Transaction], type[Label]]] = {
    "ignore": (Transaction, Label),
    "keep": (OpenTransaction, OpenLabel),
    "refuse": (StrictTransaction, StrictLabel),
}
_LABELS = frozenset(label for _, label in _TYPES.values())
_LABEL_IDS = ("transaction_id", "terminal_id")
_PAYMENT_IDS = (*_LABEL_IDS, "customer_id", "device_id")


def is_label(record: Transaction | Label) -> TypeIs[Label]:
    """Whether a record is a label; in a tenth of the time of pydantic's ``isinstance``."""
    return type(record) in _LABELS


class Reason(BaseModel):
    """One reason for a decision: a fixed code and its fixed text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    text: str


class Decision(BaseModel):
    """The answer to one record.

    Args:
        transaction_id: of the record.
        score: calibrated probability of fraud, in [0, 1]; none for a label.
        decision: what to do with the payment; ``noted`` for a label.
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


def read(
    raw: bytes, unknown: UnknownFields = "ignore", card_numbers: CardNumbers = "refuse"
) -> Transaction | Label:
    """One JSON record; a record with a field ``fraud`` is a label.

    Args:
        raw: one JSON object.
        unknown: what becomes of fields that the schema does not have.
        card_numbers: what becomes of a record with an id that looks like a card number.

    Raises:
        InputError: names the first wrong field, and nothing the sender wrote.
    """
    made = _read(raw, unknown)
    if card_numbers == "refuse":
        _refuse_card_numbers(made)
    return made


def _refuse_card_numbers(record: Transaction | Label) -> None:
    for field in _LABEL_IDS if is_label(record) else _PAYMENT_IDS:
        value = getattr(record, field)
        if value is not None and len(value) >= MIN_DIGITS and _is_card_number(value):
            raise InputError(
                f"{field}: looks like a card number; send a token or keyed hash",
                field=field,
                reason="raw_card_number",
                hint="if your ids are long numbers, give them a prefix, or set "
                "card_numbers_in_ids = 'allow' in [verticals.finance]",
            )


def _read(raw: bytes, unknown: UnknownFields) -> Transaction | Label:
    payment, label = _TYPES[unknown]
    try:
        made: Transaction = payment.__pydantic_validator__.validate_json(raw)
    except ValidationError as error:
        if not _says_fraud(raw):
            raise refusal(error) from None
    else:
        if 0 < made.amount < MIN_AMOUNT:
            raise InputError(
                f"amount: expected 0 or at least {MIN_AMOUNT:g}",
                field="amount",
                reason="too_small",
                hint="0 verifies a card; else send what is to be paid",
            )
        # Quotation marks of keys and texts, if no field is there twice, none is unknown, and
        # nothing is escaped. A field more adds at least two: equality proves that there is none.
        texts = 6 + (made.device_id is not None)
        if raw.count(b'"') == 2 * (len(made.model_fields_set) + texts):
            return made
        if not _says_fraud(raw):
            _refuse_double_keys(raw)
            return made
    try:
        known = label.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from None
    _refuse_double_keys(raw)
    return known


def _says_fraud(raw: bytes) -> bool:
    """Whether the record is an object with a field ``fraud``."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return False
    return isinstance(found, dict) and "fraud" in found


def _refuse_double_keys(raw: bytes) -> None:
    """Raise InputError where an object of the record has a key twice.

    Readers of JSON differ in which of the two counts, so none does.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            name = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            name = name if _FIELD.fullmatch(name) else "a field"
            raise InputError(
                f"{name}: is there twice",
                field=name,
                reason="duplicate_key",
                hint="send each field once",
            )
        return keys

    json.loads(raw, object_pairs_hook=unique)


def milliseconds(time: datetime) -> int:
    """Whole milliseconds since 1970-01-01T00:00Z; finer digits are cut off."""
    return (time - _EPOCH) // _MILLISECOND


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
    if kind == "timezone_aware":
        hint = "end the time with Z or an offset such as +02:00"
    message = first["msg"] + (f" (and {more} more)" if more else "")
    return InputError(
        f"{path}: {message}" if path else message, field=path or None, hint=hint, reason=kind
    )
