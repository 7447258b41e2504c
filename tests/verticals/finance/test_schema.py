"""What senders may write, and what they are told when they may not."""

from __future__ import annotations

import json
import re
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from payments import NOON, label, payment

from plinth.engine import InputError
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.timeline import milliseconds
from plinth.verticals.finance.schema import (
    Decision,
    Label,
    Transaction,
    UnknownFields,
    read,
)

MARKER = "marker-4711"


def refusal(raw: bytes, unknown: UnknownFields = "ignore") -> InputError:
    with pytest.raises(InputError) as caught:
        read(raw, unknown)
    return caught.value


def test_a_payment_is_read_with_its_time_in_milliseconds() -> None:
    made = read(payment(event_time="2025-09-01T14:00:00.123456+02:00", device_id="d1"))
    assert isinstance(made, Transaction)
    assert milliseconds(made.event_time) == NOON + 123
    assert (made.amount, made.currency, made.device_id) == (42.5, "EUR", "d1")


def test_a_record_with_fraud_in_it_is_a_label() -> None:
    made = read(label())
    assert isinstance(made, Label)
    assert made.fraud
    assert read(made.model_dump_json().encode()) == made


@pytest.mark.parametrize("raw", [b"", b"{", b"not json", b"\xff\xfe", b"[" * 9999, b'{"a": 1,}'])
def test_malformed_json_says_so(raw: bytes) -> None:
    assert refusal(raw).reason == "malformed_json"


@pytest.mark.parametrize("raw", [b"null", b"[]", b'"text"', b"17"])
def test_only_objects_are_records(raw: bytes) -> None:
    assert refusal(raw).reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("schema_version", "1"),
        ("transaction_id", ""),
        ("transaction_id", 17),
        ("transaction_id", "with space"),
        ("transaction_id", "x" * 65),
        ("transaction_id", "snow\u2603"),
        ("event_time", "2025-09-01T12:00:00"),
        ("event_time", "2025-09-01"),
        ("event_time", "yesterday"),
        ("event_time", 1_756_728_000),
        ("event_time", "1756728000"),
        ("event_time", "1756728000000"),
        ("received_time", "1756728000.5"),
        ("event_time", "1999-12-31T23:59:59Z"),
        ("event_time", "2100-01-01T00:00:00Z"),
        ("event_time", None),
        ("amount", -0.01),
        ("amount", -1.0),
        ("amount", 1e-5),
        ("amount", 1.000001e12),
        ("amount", 1e308),
        ("amount", "42.5"),
        ("amount", True),
        ("amount", None),
        ("amount", [1.0]),
        ("currency", "eur"),
        ("currency", "EURO"),
        ("currency", None),
        ("card", ""),
        ("card", "x" * 129),
        ("card", "tok 1"),
        ("customer_id", {}),
        ("terminal_id", None),
        ("device_id", ""),
        ("device_id", 5),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(field: str, value: Any) -> None:
    error = refusal(payment(**{field: value}))
    assert error.field == field
    assert error.hint


@pytest.mark.parametrize(
    ("time", "taken"),
    [
        ("1999-12-31T23:30:00-01:00", True),
        ("2000-01-01T00:30:00+01:00", False),
        ("2099-12-31T23:59:59.999999Z", True),
        ("2100-01-01T00:30:00+01:00", True),
        ("2099-12-31T23:30:00-01:00", False),
    ],
)
def test_times_lie_between_2000_and_2099_in_utc(time: str, taken: bool) -> None:
    raw = payment(event_time=time)
    if taken:
        assert read(raw).event_time == datetime.fromisoformat(time)
    else:
        error = refusal(raw)
        assert (error.field, error.reason) == ("event_time", "implausible_time")
        assert "2000 to 2099" in error.message


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_amounts_are_finite(word: str) -> None:
    raw = payment(amount=4242.0).replace(b"4242.0", word.encode())
    assert refusal(raw).field in ("amount", None)


@pytest.mark.parametrize("field", ["transaction_id", "event_time", "amount", "currency", "card"])
def test_a_missing_field_is_named(field: str) -> None:
    record = json.loads(payment())
    del record[field]
    error = refusal(json.dumps(record).encode())
    assert (error.field, error.reason) == (field, "missing")


def test_unknown_fields_are_ignored_kept_or_refused_as_asked() -> None:
    assert read(payment(merchant="m1")) == read(payment())
    assert read(payment(merchant="m1"), "keep").model_extra == {"merchant": "m1"}
    assert read(label(merchant="m1"), "keep").model_extra == {"merchant": "m1"}
    assert refusal(payment(merchant="m1"), "refuse").field == "merchant"
    odd = refusal(payment(**{"Jane Doe 4111111111111111": 1}), "refuse")
    assert odd.field == "an unknown field"
    assert "Jane" not in str(odd.as_dict())


SPELLINGS: dict[str, Any] = {
    "plain": "4111111111111111", "spaces": "4111 1111 1111 1111", "dashes": "4111-1111-1111-1111",
    "doubled": "4111--1111--1111--1111", "single": "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
    "commas": "4111,1111,1111,1111", "brackets": "(4111)1111#1111*1111",
    "hash": "#4111111111111111",
    "wide": "\uff14\uff11\uff11\uff11" + "\uff11" * 12, "arabic": "\u0664" + "\u0661" * 15,
    "hard": "4111\u00a01111\u00a01111\u00a01111", "long dash": "4111\u20131111\u20131111\u20131111",
    "within": "paid by pan=4111111111111111;2512", "after": "caf\u00e9 4111 1111 1111 1111 ok",
    "number": 4111111111111111, "float": 4111111111111111.0, "less": -4111111111111111,
    "json": json.dumps({"pan": "4111111111111111", "n": [4111111111111111]}),
}  # fmt: skip
"""A card number as people and programs write it."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_card_number_in_a_field_that_is_kept_has_stars_whoever_spells_it(spelling: str) -> None:
    pan = SPELLINGS[spelling]
    kept = {"a": pan, "deep": {"list": [1, {"b": pan}]}, "id": "m1", "n": 5.5, "yes": True}
    for record in (payment, label):
        extra = read(record(**kept, **{str(pan): 1}), "keep").model_extra
        assert extra is not None
        told = unicodedata.normalize("NFKC", str(extra))
        assert "*" in told
        assert not re.search(r"(1[^0-9*]*){8}", told), told
        assert {name: extra[name] for name in ("id", "n", "yes")} == {
            "id": "m1",
            "n": 5.5,
            "yes": True,
        }


NOT_KEYS = st.sampled_from(['"', '":', '\\"amount\\":', " ", "{", "\u00e9"])


@given(
    field=st.sampled_from(list(json.loads(payment(device_id="d", note="n")))),
    gaps=st.tuples(*[st.sampled_from(["", " ", "\t", "\n  "])] * 2),
    last=st.booleans(),
    note=st.lists(NOT_KEYS, max_size=3).map("".join),
)
def test_a_field_that_is_there_twice_is_refused_however_it_is_written(
    field: str, gaps: tuple[str, str], last: bool, note: str
) -> None:
    record = json.loads(payment(device_id="d")) | {"note": note}
    pairs = [f"{json.dumps(k)}{gaps[0]}:{gaps[1]}{json.dumps(v)}" for k, v in record.items()]
    assert isinstance(read(("{" + ",".join(pairs) + "}").encode()), Transaction)
    again = f"{json.dumps(field)}{gaps[1]}:{gaps[0]}{json.dumps(record[field])}"
    pairs.insert(len(pairs) if last else 0, again)
    error = refusal(("{" + ",".join(pairs) + "}").encode())
    assert (error.field, error.reason) == (field, "duplicate_key")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", str(1 << 64), str(-(2**63) - 1)])
def test_a_number_that_is_kept_can_be_written_again(number: str) -> None:
    """What is counted before it cannot be answered would be counted for nothing."""
    raw = payment()[:-1] + b', "risk": {"points": [1, ' + number.encode() + b"]}}"
    assert read(raw, "ignore")
    with pytest.raises(InputError) as refused:
        read(raw, "keep")
    assert refused.value.reason == "number_out_of_range"
    kept = payment()[:-1] + b', "risk": [18446744073709551615, -9223372036854775808, 1.5]}'
    assert read(kept, "keep").model_extra == {"risk": [(1 << 64) - 1, -(1 << 63), 1.5]}


def test_a_label_is_told_by_its_field_however_that_is_written() -> None:
    escaped = label().replace(b'"fraud"', b'"fr\\u0061ud"')
    assert isinstance(read(escaped), Label)
    whole = json.loads(payment()) | json.loads(label())
    assert isinstance(read(json.dumps(whole).encode()), Label)
    assert isinstance(read(payment(note="fraud", device_id="x")), Transaction)


@pytest.mark.parametrize(
    "number", ["4111111111111111", "4111-1111-1111-1111", "378282246310005", "4111.1111/1111:1111"]
)
def test_card_numbers_are_refused_and_not_repeated(number: str) -> None:
    error = refusal(payment(card=number))
    assert (error.field, error.reason) == ("card", "raw_card_number")
    assert number not in str(error.as_dict())


@pytest.mark.parametrize("token", ["4111111111111112", "tok_4111", "9f86d081884c7d65", "1" * 20])
def test_tokens_are_taken(token: str) -> None:
    made = read(payment(card=token))
    assert isinstance(made, Transaction)
    assert made.card == token


@pytest.mark.parametrize("field", ["transaction_id", "customer_id", "terminal_id", "device_id"])
@pytest.mark.parametrize(
    "number",
    [
        "4111111111111111",
        "4111-1111-1111-1111",
        "4111--1111--1111--1111",
        "4111,1111|1111*1111",
        "4-1-1-1-1-1-1-1-1-1-1-1-1-1-1-1",
        "#4111111111111111;",
    ],
)
def test_an_id_that_looks_like_a_card_number_is_refused_unless_configured(
    field: str, number: str
) -> None:
    for raw in (
        payment(**{field: number}),
        payment(**{field: number}).replace(b'"4', b'"\\u0034'),
    ):
        error = refusal(raw)
        assert (error.field, error.reason) == (field, "raw_card_number")
        assert number not in str(error.as_dict())
        assert isinstance(read(raw, card_numbers="allow"), Transaction)
    assert isinstance(read(payment(**{field: "4111111111111112"})), Transaction)


def test_a_label_of_such_an_id_is_refused_too_and_the_vertical_may_allow_it() -> None:
    raw = label(transaction_id="4111111111111111")
    assert refusal(raw).field == "transaction_id"
    assert FraudScoring(FraudSettings(card_numbers_in_ids="allow")).parse(raw)
    with pytest.raises(InputError, match="transaction_id: looks like a card number"):
        FraudScoring().parse(raw)


@pytest.mark.parametrize("record", [payment, label])
def test_a_card_token_is_not_shown(record: Any) -> None:
    made = read(record(card=MARKER))
    assert made.card == MARKER
    assert MARKER not in repr(made)
    assert MARKER not in str(made)


@pytest.mark.parametrize(
    ("field", "value"), [("fraud", "yes"), ("label_time", None), ("terminal_id", 3)]
)
def test_a_wrong_label_is_refused_and_its_field_named(field: str, value: Any) -> None:
    assert refusal(label(**{field: value})).field == field


def test_nothing_is_known_of_a_payment_before_it_was_made() -> None:
    made = read(label())
    same = made.event_time.isoformat()
    assert read(label(label_time=same)).label_time == made.event_time
    error = refusal(label(label_time=(made.event_time - timedelta(milliseconds=1)).isoformat()))
    assert (error.field, error.reason) == ("label_time", "label_before_payment")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(MARKER),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = [*Transaction.model_fields, "fraud", "label_time", MARKER]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([payment(), label()]))
def test_whatever_comes_is_read_or_refused_without_repeating_it(
    changes: dict[str, Any], base: bytes
) -> None:
    made = outcome(json.dumps(json.loads(base) | changes).encode())
    if isinstance(made, InputError):
        assert made.reason
        assert MARKER not in str(made.as_dict())
    else:
        assert read(made.model_dump_json().encode()) == made


def outcome(raw: bytes) -> Transaction | Label | InputError:
    try:
        return read(raw)
    except InputError as error:
        return error


@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2099, 12, 31), timezones=st.just(UTC)),
    st.integers(0, 999_999),
)
def test_milliseconds_are_exact(time: datetime, micro: int) -> None:
    time = time.replace(microsecond=micro)
    whole = timedelta(milliseconds=milliseconds(time))
    assert (
        timedelta(0) <= time - datetime(1970, 1, 1, tzinfo=UTC) - whole < timedelta(milliseconds=1)
    )


def test_a_decision_is_small_json_and_reads_back() -> None:
    decision = Decision(
        transaction_id="x1",
        score=0.5,
        decision="review",
        reason_codes=[],
        model="fraud",
        model_version="1.0.0",
    )
    raw = FraudScoring().encode(decision)
    assert Decision.model_validate_json(raw) == decision
    assert json.loads(raw)["score"] == 0.5
    assert len(raw) < 250
