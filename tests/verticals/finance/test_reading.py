"""What is read by columns is what the schema reads, and of anything odd it says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payments import NOON, label, payment

from plinth.engine import InputError
from plinth.verticals.contract import Vertical
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.asked import Asked
from plinth.verticals.finance.features.timeline import milliseconds
from plinth.verticals.finance.plain import PlainPayment
from plinth.verticals.finance.reading import FEWEST, read_plain
from plinth.verticals.finance.schema import CardNumbers, read

SAME = (
    *("transaction_id", "event_time", "amount", "currency", "card", "customer_id", "terminal_id"),
    *("device_id", "latitude", "longitude", "received_time", "model_extra"),
)
NUMBER = "4111111111111111"
TEXTS = [
    *("", "a", "tok 1", "é", '"', "\\", "\x7f", "\u2028", "x" * 64, "x" * 65, "y" * 128, "y" * 129),
    *(NUMBER, "4111-1111-1111-1111", "#4111#1111#1111#1111", f"t{NUMBER}", "0" * 13, "EUR", "eur"),
]
TIMES = [
    "2025-09-01T12:00:00Z",
    "2025-09-01T12:00:00.000Z",
    "2024-02-29T23:59:59.999Z",
    "2025-02-29T12:00:00Z",
    "2000-02-29T00:00:00Z",
    "1999-12-31T23:59:59.999Z",
    "2100-01-01T00:00:00Z",
    "2025-09-01T12:00:60Z",
    "2025-09-01T24:00:00Z",
    "2025-13-01T12:00:00Z",
    "2025-00-01T12:00:00Z",
    "2025-09-00T12:00:00Z",
    "2025-09-31T12:00:00Z",
    "2025-09-01_12:00:00Z",
    "2025-09-01t12:00:00z",
    "2025-09-01T12:00:00.123456Z",
    "2025-09-01T14:00:00+02:00",
    "2025-09-01T12:00:00",
    "2025-09-01",
    "2025-09-01T12:00:00,000Z",
    "2025-09-01T12:0٠:00Z",
    "2025-09-01T1a:00:00Z",
    "2099-12-31T23:59:59.999Z",
]
NUMBERS = [
    *(
        0,
        -0.0,
        1,
        1e-5,
        0.0001,
        0.1,
        1e7,
        10_000_000.01,
        5e-324,
        1e308,
        -1,
        True,
        None,
        "1",
        [],
        {},
    ),
    *(0.1 + 0.2, 123456.789012345678, 9007199254740993, 1e22, 90, -90.0, 180, 180.5),
]
SPELLED = ["-0", "0.0", "1E2", "1e-3", "01", "1.", ".5", "+1", "1e400", "NaN", "Infinity"]
SPELLED += ["0x10", "1.0e0", "1e+2"]
SPELLED += ["1" * 400, "0." + "1" * 400, "123456789012345678901234567890"]
FIELDS = [
    *("schema_version", "kind", "transaction_id", "event_time", "amount", "currency", "card"),
    *("customer_id", "terminal_id", "device_id", "latitude", "longitude", "received_time", "fraud"),
    *("milliseconds", "written", "version", "other"),
]
Change = Callable[[dict[str, str]], None]
"""Of the members of a record: names to JSON."""


def _told(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _put(name: str, value: str) -> Change:
    return lambda members: members.update({_told(name): value})


VALUES = st.one_of(
    st.sampled_from([*TEXTS, *TIMES, *NUMBERS]).map(_told),
    st.sampled_from(SPELLED),
    st.floats(0, 2e7).map(repr),
    st.text(max_size=20).map(json.dumps),
    st.sampled_from(["payment", "refund", "capture", 1, 1.0, 2, "1"]).map(_told),
)
CHANGES = st.one_of(
    st.builds(_put, st.sampled_from(FIELDS), VALUES),
    st.sampled_from(FIELDS).map(lambda name: lambda members: members.pop(_told(name), None)),
    st.tuples(st.sampled_from(FIELDS), VALUES).map(
        lambda pair: lambda members: members.update({f" {_told(pair[0])}": pair[1]})
    ),
    st.tuples(st.floats(-91, 91), st.floats(-181, 181)).map(
        lambda at: lambda m: m.update({'"latitude"': repr(at[0]), '"longitude"': repr(at[1])})
    ),
    st.just(lambda members: members.update({'"amo\\u0075nt"': "1"})),
)


def _changed(changes: list[Change], between: str) -> bytes:
    members = {_told(name): _told(value) for name, value in json.loads(payment()).items()}
    for change in changes:
        change(members)
    inner = f",{between}".join(f"{name}{between}:{value}" for name, value in members.items())
    return f"{between}{{{inner}}}{between}".encode("utf-8", "surrogatepass")


RECORDS = st.builds(_changed, st.lists(CHANGES, max_size=2), st.sampled_from(["", " ", "\n\t"]))


def _read(raw: bytes, cards: CardNumbers) -> dict[str, Any] | None:
    try:
        made = read(raw, "ignore", cards)
    except InputError:
        return None
    return {name: getattr(made, name, "none") for name in SAME}


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=4), st.sampled_from(["refuse", "allow"]))
def test_what_is_read_by_columns_is_what_the_schema_reads(
    odd: list[bytes], cards: CardNumbers
) -> None:
    plain = [payment(number) for number in range(FEWEST)]
    found = read_plain([*odd, *plain], cards)
    assert all(type(one) is PlainPayment for one in found[len(odd) :])  # whoever is odd beside it
    for raw, one in zip(odd, found, strict=False):
        if one is not None:
            wanted = _read(raw, cards)
            assert {name: getattr(one, name) for name in SAME} == wanted, raw
            assert repr(one.amount) == repr(wanted["amount"])
            assert one.milliseconds == milliseconds(wanted["event_time"])


def test_plain_are_the_ways_in_which_most_write() -> None:
    ways = [
        payment(),
        payment(amount=0),
        payment(amount=3),
        payment(event_time="2025-09-01T12:00:00Z"),
        payment(kind="payment", device_id="d1", latitude=48.2, longitude=-11.5),
        payment(device_id=None, latitude=None, longitude=None),
        payment(transaction_id="9" * 12, card="tok_" + "1" * 60),
    ]
    without = json.loads(payment())
    del without["schema_version"]
    ways.append(orjson.dumps(without))
    assert all(read_plain(ways * FEWEST, "refuse"))
    assert read_plain(ways, "refuse") == [None] * len(ways)  # too few to be worth it


@pytest.mark.parametrize(
    "raw",
    [
        payment(other=1),
        payment().replace(b'"amount": 42.5', b'"amount": 42.5, "amount": 4250'),
        payment().replace(b'"amount"', b'"amount": 4250, "amo\\u0075nt"'),
        payment(event_time="2025-09-01T14:00:00+02:00"),
        payment(card=NUMBER),
        payment(customer_id="4111 1111 1111 1111"),
        payment(amount=0.00001),
        payment(latitude=48.2),
        payment(latitude=91, longitude=0),
        label(),
    ],
)
def test_what_is_odd_is_left_to_the_schema(raw: bytes) -> None:
    plain = [payment(number) for number in range(FEWEST)]
    found = read_plain([*plain, raw, *plain], "refuse")
    assert [place for place, one in enumerate(found) if one is None] == [FEWEST]


def test_records_of_a_chunk_are_read_as_each_alone() -> None:
    raws = [payment(n, NOON + n * 50_000, card=f"tok_{n}") for n in range(FEWEST)]
    raws[3:3] = [payment(3, other=1), b"{", label(), payment(5, at=NOON + 700_000)]
    for unknown in ("ignore", "keep", "refuse"):
        vertical = FraudScoring(FraudSettings(unknown_fields=unknown))
        told = [float(NOON // 1_000)] * (len(raws) - 1) + [None]
        found = vertical.parse_each(raws, told)
        for raw, at, one in zip(raws, told, found, strict=True):
            (wanted,) = Vertical.parse_each(vertical, [raw], [at])
            assert isinstance(one, InputError) is isinstance(wanted, InputError)
            if isinstance(one, InputError) or isinstance(wanted, InputError):
                assert str(one) == str(wanted)
            else:
                assert (one.transaction_id, one.event_time) == (
                    wanted.transaction_id,
                    wanted.event_time,
                )
        assert sum(isinstance(one, InputError) for one in found) >= 9


def test_the_card_is_in_no_repr() -> None:
    one = read_plain([payment(card="tok_secret")] * FEWEST, "refuse")[0]
    assert one is not None
    assert "tok_secret" not in repr(one)


@pytest.mark.parametrize(
    "time", ["2025-09-01T12:00:00Z", "2025-09-01T12:00:00.000Z", "2025-09-01T12:00:00.120Z"]
)
def test_times_are_written_as_those_that_the_schema_read(time: str) -> None:
    raws = [payment(event_time=time)] * FEWEST
    plain = Asked.of([one for one in read_plain(raws, "refuse") if one is not None], {"EUR": 1.0})
    slow = Asked.of(
        [one for raw in raws if not isinstance(one := read(raw), type(None))], {"EUR": 1.0}
    )  # type: ignore[list-item]
    assert plain.plain is not None
    assert slow.plain is None
    assert plain.written_times() == slow.written_times()
    assert list(plain.events()) == list(slow.events())
