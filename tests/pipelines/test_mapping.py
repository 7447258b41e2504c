"""Messages of somebody else become records as a file declares it, or say what is wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import re
import struct
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tally import TallyVertical, started_engine

from plinth.engine import ConfigError, Engine, InputError
from plinth.pipelines.cli.main import main
from plinth.pipelines.formats import registry as formats_registry
from plinth.pipelines.formats.mapping import DeclaredMapping, load_mapping
from plinth.pipelines.formats.registry import RegistryAway
from plinth.pipelines.stream.chunks import Chunk, Partition
from plinth.pipelines.stream.processor import KeyPlaces, Processor
from plinth.verticals.finance import FraudScoring

OURS = """
[[message]]
name = "authorisation"
when = {"header.type" = ["AUTH", 100]}

[message.fields]
transaction_id = "auth.id"
event_time = {path = "auth.at", time = "milliseconds"}
amount = {path = "auth.amount", unit = "minor"}
currency = {path = "auth.ccy", values = {978 = "EUR", 840 = "USD", 392 = "JPY"}}
card = "card.token"
customer_id = {path = "card.holder", as = "text"}
terminal_id = {join = ["merchant.id", "merchant.terminal"]}
device_id = {path = "device", optional = true}

[[message]]
name = "chargeback"
when = {"header.type" = "CHARGEBACK"}

[message.fields]
fraud = {constant = true}
transaction_id = "auth.id"
event_time = {path = "auth.at", time = "milliseconds"}
label_time = {path = "reported", time = "%d.%m.%Y %H:%M", zone = "Europe/Berlin"}
terminal_id = {join = ["merchant.id", "merchant.terminal"]}
card = "card.token"

[[message]]
name = "reversal"
when = {"header.type" = 400}

[message.fields]
kind = {constant = "reversal"}
transaction_id = "auth.id"
event_time = {path = "auth.at", time = "milliseconds"}
card = "card.token"

[[message]]
name = "heartbeat"
when = {"header.type" = "PING"}
skip = true
"""
AUTH: dict[str, Any] = {
    "header": {"type": "AUTH"},
    "auth": {"id": "a1", "at": 1_756_728_000_123, "amount": 4250, "ccy": 978, "mcc": 5411},
    "card": {"token": "tok_9", "holder": 17},
    "merchant": {"id": "m1", "terminal": "t1"},
}
RECORD = {
    "transaction_id": "a1", "event_time": "2025-09-01T12:00:00.123Z", "amount": 42.5,
    "currency": "EUR", "card": "tok_9", "customer_id": "17", "terminal_id": "m1:t1",
}  # fmt: skip
ONE_FIELD = """
[[message]]
name = "spend"
[message.fields]
card = "card"
id = "id"
amount = {field}
"""


@pytest.fixture(scope="module")
def finance() -> FraudScoring:
    return FraudScoring()


def mapping_of(folder: Path, text: str, vertical: Any) -> DeclaredMapping:
    file = folder / "mapping.toml"
    file.write_text(text)
    return load_mapping(file, vertical)


@pytest.fixture
def ours(tmp_path: Path, finance: FraudScoring) -> DeclaredMapping:
    return mapping_of(tmp_path, OURS, finance)


def record(mapping: DeclaredMapping, message: Any) -> dict[str, Any]:
    made = mapping.record(json.dumps(message).encode())
    assert made is not None
    return dict(json.loads(made))


def test_an_authorisation_becomes_a_payment(ours: DeclaredMapping, finance: FraudScoring) -> None:
    assert record(ours, AUTH) == RECORD
    assert record(ours, AUTH | {"device": "d1"}) == RECORD | {"device_id": "d1"}
    payment = finance.parse_at(ours.record(json.dumps(AUTH).encode()) or b"", None)
    assert payment.card == "tok_9"


def test_minor_units_have_the_digits_of_their_currency(ours: DeclaredMapping) -> None:
    for number, code, amount in ((840, "USD", 42.5), (392, "JPY", 4250.0)):
        made = record(ours, AUTH | {"auth": AUTH["auth"] | {"ccy": number}})
        assert (made["currency"], made["amount"]) == (code, amount)


def test_a_chargeback_becomes_a_label_and_a_reversal_is_noted(
    ours: DeclaredMapping, finance: FraudScoring
) -> None:
    head = {"header": {"type": "CHARGEBACK"}, "reported": "08.09.2025 11:30"}
    made = record(ours, AUTH | head)
    assert (made["fraud"], made["label_time"]) == (True, "2025-09-08T09:30:00.000Z")
    assert finance.parse_at(json.dumps(made).encode(), None).fraud is True
    made = record(ours, AUTH | {"header": {"type": "400"}})
    noted = finance.infer([finance.parse_at(json.dumps(made).encode(), None)])
    with pytest.raises(StopIteration) as end:
        next(noted)
    assert end.value.value[0].decision == "noted"


def test_a_heartbeat_is_no_record_and_a_kind_nobody_declared_is_refused(
    ours: DeclaredMapping,
) -> None:
    assert ours.record(b'{"header": {"type": "PING"}}') is None
    with pytest.raises(InputError, match=r"header\.type") as refused:
        ours.record(b'{"header": {"type": "SECRET"}}')
    assert refused.value.reason == "unmapped_message"
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "given", "becomes"),
    [
        ('"a"', 12.5, 12.5),
        ('{path = "a", as = "number"}', "0012.50", 12.5),
        ('{path = "a", unit = "0.01"}', "1999", 19.99),
        ('{path = "a", unit = "0.01"}', 1999, 19.99),
        ('{path = "a", unit = 1000}', 0.0021, 2.1),
        ('{path = "a", unit = "-0.01"}', -1999, 19.99),
        ('{path = "a", default = 1}', None, 1),
        ('{path = "a", values = {true = 5, LOW = 1}}', True, 5),
        ('{path = "a", as = "boolean"}', "FALSE", False),
        ('{path = "a", as = "text"}', 12345678901234567890, "12345678901234567890"),
        ('{path = "a", time = "seconds"}', "1756728000.1239", "2025-09-01T12:00:00.123Z"),
        ('{path = "a", time = "microseconds"}', 1756728000123456, "2025-09-01T12:00:00.123Z"),
        ('{path = "a", time = "iso"}', "2025-09-01T14:00:00.5+02:00", "2025-09-01T12:00:00.500Z"),
        ('{path = "a", time = "iso", zone = "Europe/Berlin"}', "2025-09-01T14:00:00",
         "2025-09-01T12:00:00.000Z"),
        ('{path = "a", time = "iso", zone = "Europe/Berlin"}', "2025-12-01T14:00:00",
         "2025-12-01T13:00:00.000Z"),
        ('{path = "a", time = "iso", zone = "Europe/Berlin", ambiguous = "later"}',
         "2025-10-26T02:30:00", "2025-10-26T01:30:00.000Z"),
        ('{path = "a", time = "%Y%m%d%H%M%S%z"}', "20250901140000+0200",
         "2025-09-01T12:00:00.000Z"),
        ('{path = "a", time = "%d.%m.%y %I %p", zone = "UTC"}', "01.09.25 02 PM",
         "2025-09-01T14:00:00.000Z"),
        ('{join = ["a", "auth.id"]}', "x", "x:a1"),
        ('{join = ["a", "auth.id"], separator = ""}', "x:y", "x:ya1"),
    ],
)  # fmt: skip
def test_what_a_value_becomes(
    tmp_path: Path, finance: FraudScoring, field: str, given: Any, becomes: Any
) -> None:
    text = OURS.replace('{path = "auth.amount", unit = "minor"}', field)
    made = record(mapping_of(tmp_path, text, finance), AUTH | {"a": given})
    assert made["amount"] == becomes
    assert type(made["amount"]) is type(becomes)


@pytest.mark.parametrize(
    ("field", "given", "reason"),
    [
        ('"a"', None, "missing"),
        ('"a"', {"b": 1}, "type"),
        ('{path = "a", as = "number"}', "1,234.50", "number"),
        ('{path = "a", as = "number"}', "NaN", "number"),
        ('{path = "a", unit = "0.01"}', True, "number"),
        ('{path = "a", unit = "minor"}', 12.34, "not_whole"),
        ('{path = "a", unit = "minor"}', "12.00", "not_whole"),
        ('{path = "a", unit = "minor"}', 12.0, "not_whole"),
        ('{path = "a", as = "text"}', 1.5, "text"),
        ('{path = "a", as = "boolean"}', "ja", "boolean"),
        ('{path = "a", values = {LOW = 1}}', "HIGH", "unknown_value"),
        ('{path = "a", time = "seconds"}', 1756728000123456, "time"),
        ('{path = "a", time = "iso"}', "2025-09-01T14:00:00", "time_zone"),
        ('{path = "a", time = "iso"}', "2025-09-01", "time"),
        ('{path = "a", time = "iso"}', 1756728000, "time"),
        ('{path = "a", time = "iso", zone = "Europe/Berlin"}', "2025-10-26T02:30:00",
         "ambiguous_time"),
        ('{path = "a", time = "iso", zone = "Europe/Berlin"}', "2025-03-30T02:30:00", "time"),
        ('{path = "a", keyed_hash_env = "CARD_KEY"}', "\t", "missing"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_by_field_and_place_without_itself(
    tmp_path: Path,
    finance: FraudScoring,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    given: Any,
    reason: str,
) -> None:
    monkeypatch.setenv("CARD_KEY", "k" * 32)
    text = OURS.replace('{path = "auth.amount", unit = "minor"}', field)
    with pytest.raises(InputError, match=r"amount: .* \(at a of the message\)") as refused:
        record(mapping_of(tmp_path, text, finance), AUTH | {"a": given})
    assert (refused.value.field, refused.value.reason) == ("amount", reason)
    assert given is None or str(given) not in str(refused.value)


def test_an_empty_text_is_nothing_where_a_field_is_optional(ours: DeclaredMapping) -> None:
    assert "device_id" not in record(ours, AUTH | {"device": ""})
    assert record(ours, AUTH | {"device": "d"})["device_id"] == "d"


@pytest.mark.parametrize(
    ("merchant", "terminal", "reason"),
    [("a:b", "c", "separator"), ("a", "b:c", "separator"), ("", "c", "missing")],
)
def test_texts_that_are_joined_never_give_what_others_give(
    ours: DeclaredMapping, merchant: str, terminal: str, reason: str
) -> None:
    with pytest.raises(InputError, match="terminal_id") as refused:
        record(ours, AUTH | {"merchant": {"id": merchant, "terminal": terminal}})
    assert refused.value.reason == reason


@given(cents=st.integers(0, 10**12), text=st.booleans())
def test_cents_lose_nothing(cents: int, text: bool) -> None:
    from plinth.pipelines.formats.fields import FieldMapping

    read = FieldMapping(path="a", unit="0.01").reader("amount", ())
    made = read({"a": str(cents) if text else cents}, {})
    assert made == float(Decimal(cents) / 100)


def test_a_key_that_is_there_twice_is_refused_and_quotation_marks_in_texts_are_not(
    ours: DeclaredMapping,
) -> None:
    raw = json.dumps(AUTH).encode()
    with pytest.raises(InputError) as refused:
        ours.record(raw.replace(b'"amount": 4250', b'"amount": 4250, "amount": 1'))
    assert refused.value.reason == "duplicate_key"
    assert ours.record(raw.replace(b'"m1"', b'"m\\"1"'))
    hidden = raw.replace(b'"m1"', b'"\\u0022\\u0022"')
    with pytest.raises(InputError):
        ours.record(hidden.replace(b'"amount": 4250', b'"amount": 4250, "amount": 1'))
    for wrong in (b"[1]", b"{", b'{"a": NaN}', b"\xff", b"", b'{"a":' * 600 + b"1" + b"}" * 600):
        with pytest.raises(InputError):
            ours.record(wrong)


def test_what_no_field_takes_is_ignored_kept_or_refused(
    tmp_path: Path, finance: FraudScoring
) -> None:
    def with_(word: str) -> DeclaredMapping:
        name = 'name = "authorisation"'
        text = OURS.replace(name, f'{name}\nunknown_fields = "{word}"')
        return mapping_of(tmp_path, text, finance)

    assert record(with_("ignore"), AUTH) == RECORD
    assert record(with_("keep"), AUTH) == RECORD | {"unmapped": {"auth.mcc": 5411}}
    with pytest.raises(InputError) as refused:
        record(with_("refuse"), AUTH)
    assert refused.value.reason == "unknown_field"
    for number, kept in ((2**64 - 1, True), (-(2**63), True), (2**64, False), (-(2**80), False)):
        message = AUTH | {"trace": number}
        assert record(with_("ignore"), message) == RECORD
        if kept:
            assert record(with_("keep"), message)["unmapped"]["trace"] == number
        else:
            with pytest.raises(InputError) as refused:
                record(with_("keep"), message)
            assert refused.value.reason == "number_out_of_range"


def test_a_card_number_becomes_a_token_with_a_key_of_the_environment(
    tmp_path: Path, finance: FraudScoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OURS.replace('"card.token"', '{path = "card.pan", keyed_hash_env = "CARD_KEY"}')
    with pytest.raises(ConfigError, match="CARD_KEY"):
        mapping_of(tmp_path, text, finance)
    monkeypatch.setenv("CARD_KEY", "k" * 32)
    message = AUTH | {"card": {"pan": "4111111111111111", "holder": 17}}
    token = record(mapping_of(tmp_path, text, finance), message)["card"]
    assert token.startswith("tok_")
    assert len(token) == 36
    assert "4111" not in token
    mapping = mapping_of(tmp_path, text, finance)
    for spelled in (
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111   ",
        4111111111111111,
    ):
        again = AUTH | {"card": {"pan": spelled, "holder": 17}}
        assert record(mapping, again)["card"] == token, "one card, whoever spells it"
    other = AUTH | {"card": {"pan": "4111 1111 1111 1112", "holder": 17}}
    assert record(mapping, other)["card"] != token
    spelled = [
        "Jos\u00e9 Nu\u00f1ez",
        "Jose\u0301 Nun\u0303ez",
        "Jos\u00e9 Nu\u00f1ez   ",
        "0017",
        "17",
    ]
    found = [
        record(mapping, AUTH | {"card": {"pan": text, "holder": 17}})["card"] for text in spelled
    ]
    assert len({*found[:3]}) == 1, "one text, however it is composed and padded"
    assert len({*found}) == 3, "a leading zero is part of an id"


@pytest.mark.parametrize(
    ("change", "with_", "says"),
    [
        ('terminal_id = {join', 'terminal = {join', "terminal_id is missing: Transaction needs it"),
        ('amount = {path', 'amuont = {path', "did you mean 'amount'"),
        ('unit = "minor"', 'untt = "minor"', r"message authorisation: fields\.amount\.?.*untt"),
        ('unit = "minor"', 'unit = "minor", as = "text"', "unit is of numbers"),
        ('"auth.id"', '"auth..id"', "is not a path"),
        ('time = "milliseconds"', 'time = "millis"', "is none of iso"),
        ('time = "milliseconds"', 'time = "%Y-%m-%d"', "give a zone"),
        ('time = "milliseconds"', 'time = "%Y-%m-%d %H:%M %Z", zone = "UTC"', "take %z"),
        ('time = "milliseconds"', 'time = "%Y-%M-%d", zone = "UTC"', "%M: minutes"),
        ('time = "milliseconds"', 'time = "%Y-%m-%d %I:%M", zone = "UTC"', "%I needs %p"),
        ('time = "milliseconds"', 'time = "%H:%M:%S", zone = "UTC"', "expected year"),
        ('unit = "minor"', 'unit = "1e-400"', "expected a unit from"),
        ('zone = "Europe/Berlin"', 'zone = "Berlin"', "Europe/Berlin is one"),
        ('skip = true', '', "skip = true"),
        ('name = "reversal"', 'name = "chargeback"', "two messages are named chargeback"),
        ('when = {"header.type" = ["AUTH", 100]}', '', "those below it get none"),
        ('"auth.id"', '{path = "auth.id", optional = true}', "Transaction needs it"),
        ('[[message]]', '[[mesage]]', "message"),
    ],
)  # fmt: skip
def test_a_wrong_mapping_is_refused_at_the_start_by_name(
    tmp_path: Path, finance: FraudScoring, change: str, with_: str, says: str
) -> None:
    assert change in OURS
    with pytest.raises(ConfigError, match=says) as wrong:
        mapping_of(tmp_path, OURS.replace(change, with_), finance)
    assert "mapping.toml" in str(wrong.value)


def test_check_mapping_shows_what_becomes_of_a_sample_and_writes_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sample, out = tmp_path / "m.toml", tmp_path / "s.jsonl", tmp_path / "r.jsonl"
    file.write_text(OURS)
    card = AUTH | {"card": {"token": "4111111111111111", "holder": 1}}
    bad = AUTH | {"auth": AUTH["auth"] | {"at": 1_756_728_000}}
    messages = [AUTH, {"header": {"type": "PING"}}, card, bad, {"header": {"type": "NEW"}}]
    sample.write_text("\n".join(map(json.dumps, messages)) + "\n{oops\n")

    def check(*arguments: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            main(["check-mapping", "finance", str(sample), "--mapping", str(file), *arguments])
        text = capsys.readouterr().out
        assert "4111111111111111" not in text
        return int(end.value.code or 0), json.loads(text) if "--json" in arguments else {}

    code, found = check("--json", "--out", str(out))
    assert code == 1
    assert (found["skipped"], found["wrong"]) == (1, 4)
    assert found["messages"]["authorisation"] == {"messages": 3, "records": 1}
    amount = next(one for one in found["fields"] if one["field"] == "amount")
    assert (amount["from"], amount["example"], amount["becomes"]) == ("auth.amount", "4250", "42.5")
    assert {"message": "authorisation", "path": "auth.mcc", "count": 3} in found["not_taken"]
    assert {(one["first"].rpartition(":")[2], one["message"]) for one in found["problems"]} == {
        ("3", "authorisation"), ("4", "authorisation"), ("5", "(none)"), ("6", "(none)"),
    }  # fmt: skip
    assert [json.loads(line) for line in out.read_text().splitlines()] == [RECORD]
    sample.write_text(json.dumps(AUTH | {"auth": AUTH["auth"] | {"ccy": 840}}))
    code, found = check("--json")
    assert (code, found["wrong"], found["messages"]["authorisation"]["records"]) == (0, 0, 1)
    assert "currency: expected one of EUR" in found["problems"][0]["text"]
    sample.write_text(json.dumps(AUTH))
    assert check()[0] == 0
    out.unlink()
    stamped = f"CreateTime:1756728001500\t{json.dumps(AUTH)}"
    sample.write_text(f"{stamped}\nLogAppendTime:1\t{json.dumps(AUTH)}\n{json.dumps(AUTH)}\n")
    code, found = check("--json", "--out", str(out))
    assert found["wrong"] == 1, "from so long before the payment, the second is of the future"
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        RECORD | {"received_time": "2025-09-01T12:00:01.500Z"}, RECORD,
    ]  # fmt: skip


def test_the_example_and_the_mappings_of_the_documentation_are_right(
    tmp_path: Path, finance: FraudScoring
) -> None:
    root = Path(__file__).resolve().parents[2]
    example = load_mapping(root / "examples" / "mapping.toml", finance)
    lines = (root / "examples" / "messages.jsonl").read_bytes().splitlines()
    made = [example.record(line) for line in lines]
    assert [one is None for one in made] == [False, False, False, True, False, False]
    for one in made:
        assert one is None or finance.parse_at(one, None)
    page = (root / "docs" / "own-messages.md").read_text()
    declared = [t for t in re.findall(r"(?ms)^```toml\n(.*?)^```", page) if "[[message]]" in t]
    assert len(declared) == 3
    assert mapping_of(tmp_path, declared[0], finance).messages
    if find_spec("fastavro") is not None:
        text = re.sub("(?m)^(username|cafile).*$", "", declared[1])
        assert mapping_of(tmp_path, text, finance).registry
    assert mapping_of(tmp_path, declared[2], finance).registry


# -- Avro ----------------------------------------------------------------------------------
MONEY = {
    "type": "record", "name": "bank.Money", "fields": [
        {"name": "value", "type": {"type": "bytes", "logicalType": "decimal",
                                   "precision": 12, "scale": 2}},
        {"name": "currency", "type": "string"},
    ],
}  # fmt: skip
PAYMENT = {
    "type": "record", "name": "bank.Payment", "fields": [
        {"name": "id", "type": "string"},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "money", "type": "bank.Money"},
        {"name": "card", "type": "string"},
        {"name": "device", "type": ["null", "string"], "default": None},
    ],
}  # fmt: skip
AVRO = """
[format]
type = "avro"
[format.registry]
url = "{url}"
timeout_s = 1.0
retry_s = 0.001
{more}
[[message]]
name = "payment"
[message.fields]
transaction_id = "id"
event_time = {{path = "at", time = "iso"}}
amount = {{path = "money.value", as = "number"}}
currency = "money.currency"
card = "card"
customer_id = {{constant = "unknown"}}
terminal_id = {{constant = "web"}}
device_id = {{path = "device", optional = true}}
"""


class Registry:
    """Speaks the part of the REST API that readers use, on loopback."""

    def __init__(self) -> None:
        self.paths: dict[str, Any] = {
            "/schemas/ids/7": {
                "schema": json.dumps(PAYMENT),
                "references": [{"name": "bank.Money", "subject": "money-value", "version": 1}],
            },
            "/subjects/money-value/versions/1": {
                "subject": "money-value", "version": 1, "id": 6, "schema": json.dumps(MONEY),
            },
            "/schemas/ids/9": {"schemaType": "PROTOBUF", "schema": "syntax = 'proto3';"},
        }  # fmt: skip
        self.asked: list[str] = []
        self.status = 200
        self.missing: Any = {"error_code": 40403, "message": "Schema not found"}
        self.authorization: str | None = None
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                registry.authorization = self.headers["Authorization"]
                found = registry.paths.get(self.path)
                status = registry.status if found or registry.status != 200 else 404
                body = json.dumps(found or registry.missing).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on stderr."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def registry() -> Iterator[Registry]:
    one = Registry()
    yield one
    one.close()


def framed(number: int = 7, **changes: Any) -> bytes:
    import fastavro

    named: dict[str, Any] = {}
    fastavro.parse_schema(MONEY, named_schemas=named)
    schema = fastavro.parse_schema(PAYMENT, named_schemas=named)
    payment = {
        "id": "p1", "at": 1_756_728_000_123, "card": "tok_9", "device": "d1",
        "money": {"value": Decimal("12.34"), "currency": "EUR"},
    }  # fmt: skip
    body = BytesIO()
    fastavro.schemaless_writer(body, schema, payment | changes)
    return struct.pack(">bI", 0, number) + body.getvalue()


@pytest.mark.needs("fastavro")
def test_avro_is_read_by_the_schema_it_names_which_is_asked_for_once(
    tmp_path: Path, registry: Registry, finance: FraudScoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLINTH_REGISTRY_PASSWORD", "hunter2")
    text = AVRO.format(url=registry.url, more='username = "plinth"')
    mapping = mapping_of(tmp_path, text, finance)
    for _ in range(3):
        made = json.loads(mapping.record(framed()) or b"")
    assert made == {
        "transaction_id": "p1", "event_time": "2025-09-01T12:00:00.123Z", "amount": 12.34,
        "currency": "EUR", "card": "tok_9", "customer_id": "unknown", "terminal_id": "web",
        "device_id": "d1",
    }  # fmt: skip
    assert "device_id" not in json.loads(mapping.record(framed(device=None)) or b"")
    assert registry.asked == ["/schemas/ids/7", "/subjects/money-value/versions/1"]
    assert (registry.authorization or "").startswith("Basic ")


@pytest.mark.needs("fastavro")
def test_a_message_at_fault_is_refused_and_a_registry_that_is_away_is_waited_for(
    tmp_path: Path, registry: Registry, finance: FraudScoring
) -> None:
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    good = framed()
    wrong = {
        b'{"id": "p1"}': "not_avro", good[:4]: "not_avro", framed(8): "unknown_schema",
        framed(9): "unknown_schema", good[:-3]: "malformed_avro", good + b"x": "malformed_avro",
    }  # fmt: skip
    for raw, reason in wrong.items():
        with pytest.raises(InputError) as refused:
            mapping.record(raw)
        assert refused.value.reason == reason
    registry.paths["/schemas/ids/8"] = registry.paths["/schemas/ids/7"]
    assert mapping.record(framed(8)), "asked again after retry_s"
    registry.status = 503
    with pytest.raises(RegistryAway, match="503"):
        mapping.prepare([framed(10)])
    assert mapping.record(good), "what is known needs no registry"
    registry.close()
    with pytest.raises(RegistryAway, match="registry at"):
        mapping.record(framed(10))


@pytest.mark.needs("fastavro")
def test_whatever_bytes_come_they_are_a_record_or_refused(
    tmp_path: Path, registry: Registry, finance: FraudScoring
) -> None:
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    outcomes: set[str] = set()

    @given(tail=st.binary(max_size=60), cut=st.integers(5, 40))
    def send(tail: bytes, cut: int) -> None:
        try:
            mapping.record(framed()[:cut] + tail)
            outcomes.add("record")
        except InputError as refused:
            outcomes.add(refused.reason)

    send()
    assert "malformed_avro" in outcomes


NOTHING = {"type": "record", "name": "Nothing", "fields": []}


@pytest.mark.needs("fastavro")
@pytest.mark.parametrize(
    "fields",
    [
        {"id": ["string", {"type": "array", "items": "null"}]},
        {"id": "string", "a": NOTHING, "b": {"type": "array", "items": "Nothing"}},
        {"a": {"type": "map", "values": {"type": "array", "items": NOTHING}}, "id": "string"},
        {"id": "string", "next": ["null", "bomb"]},
        {
            "id": {
                "type": "record",
                "name": "n",
                "fields": [{"name": "x", "type": ["null", "bomb"]}],
            }
        },
    ],
    ids=["nulls", "by name", "in a map", "itself", "itself through another"],
)
def test_a_schema_whose_values_may_be_endless_is_refused(
    tmp_path: Path, registry: Registry, finance: FraudScoring, fields: dict[str, Any]
) -> None:
    """Five bytes say that there are 2^34 nothings, and 5,000 nest deeper than a stack holds."""
    declared = [{"name": name, "type": kind} for name, kind in fields.items()]
    schema = {"type": "record", "name": "bomb", "fields": declared}
    registry.paths["/schemas/ids/8"] = {"schema": json.dumps(schema)}
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    with pytest.raises(InputError) as refused:
        mapping.record(b"\0\0\0\0\x08\x02" + b"\x80\x80\x80\x80\x80\x01" + b"\0")
    assert refused.value.reason == "unknown_schema"


def record_of(name: str, *types: Any) -> dict[str, Any]:
    fields = [{"name": f"f{at}", "type": kind} for at, kind in enumerate(types)]
    return {"type": "record", "name": name, "fields": fields}


EMPTY = record_of("E")
DOUBLED = [EMPTY, *(record_of(f"D{n}", *[f"D{n - 1}" if n else "E"] * 2) for n in range(40))]
DEEP = [EMPTY, *(record_of(f"N{n}", f"N{n - 1}" if n else "string") for n in range(5_000))]


@pytest.mark.needs("fastavro")
@pytest.mark.parametrize(
    "schema",
    [
        record_of("Node", ["null", "Node"]),
        record_of("bank.Node", {"type": "map", "values": record_of("In", ["null", "Node"])}),
        record_of("R", EMPTY, {"type": "array", "items": "E"}),
        record_of("a.b.R", EMPTY, {"type": "array", "items": "a.b.E"}),
        record_of("R", EMPTY, {"type": "array", "items": {"type": "array", "items": "E"}}),
        record_of("R", {"type": "fixed", "name": "F", "size": 0}, {"type": "array", "items": "F"}),
        record_of("R", record_of("Q", EMPTY, "E"), {"type": "array", "items": "Q"}),
        record_of("R", {"type": "array", "items": "far.None"}),
        DOUBLED,
        DEEP,
    ],
)
def test_a_schema_with_values_out_of_nothing_or_without_end_is_refused(
    tmp_path: Path, registry: Registry, finance: FraudScoring, schema: Any
) -> None:
    """The library's reader calls itself for each type within a type, in C, without a limit."""
    far = record_of("far.None", "null")
    registry.paths["/subjects/far/versions/1"] = {"schema": json.dumps(far)}
    registry.paths["/schemas/ids/8"] = {
        "schema": json.dumps(schema),
        "references": [{"name": "far.None", "subject": "far", "version": 1}],
    }
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    with pytest.raises(InputError) as refused:
        mapping.record(b"\0\0\0\0\x08" + b"\x02" * 5_000 + b"\0")
    assert refused.value.reason == "unknown_schema"


@pytest.mark.needs("fastavro")
def test_looking_at_records_of_others_does_without_a_registry(
    tmp_path: Path, registry: Registry, finance: FraudScoring
) -> None:
    registry.status = 503
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    with started_engine(TallyVertical()) as engine:
        processor = Processor(finance, engine, mapping=mapping, places=KeyPlaces())
        other: Any = SimpleNamespace(value=framed(), timestamp=9, topic="in", partition=1, offset=0)
        processor.look([other])
    assert registry.asked == ["/schemas/ids/7"]


def evolved(**changes: Any) -> dict[str, Any]:
    """The schema of payments with fields of other types, none or new ones."""
    fields = {field["name"]: field["type"] for field in PAYMENT["fields"]} | changes
    kept = [{"name": name, "type": kind} for name, kind in fields.items() if kind is not None]
    return PAYMENT | {"fields": kept}


def sent(registry: Registry, number: int, schema: Any, value: Any) -> bytes:
    """A message of a schema that the registry then has under that number."""
    import fastavro

    found = {
        "schema": json.dumps(schema),
        "references": registry.paths["/schemas/ids/7"]["references"],
    }
    registry.paths[f"/schemas/ids/{number}"] = found
    named: dict[str, Any] = {}
    fastavro.parse_schema(MONEY, named_schemas=named)
    body = BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(schema, named_schemas=named), value)
    return struct.pack(">bI", 0, number) + body.getvalue()


@pytest.mark.needs("fastavro")
@pytest.mark.parametrize(
    ("types", "values", "end"),
    [
        ({"mcc": "int"}, {"mcc": 5411}, "same"),
        ({"device": "string"}, {"device": "d1"}, "same"),
        ({"at": {"type": "long", "logicalType": "timestamp-micros"}}, {}, "same"),
        ({"device": None}, {}, "without device_id"),
        ({"card": None, "pan_token": "string"}, {"pan_token": "tok_9"}, "missing"),
        ({"device": {"type": "array", "items": "string"}}, {"device": ["d1"]}, "type"),
        ({"money": {"type": "array", "items": "bank.Money"}}, {}, "type"),
        ({"money": "double"}, {"money": 12.34}, "type"),
        ({"card": "bytes"}, {"card": b"tok_9"}, "type"),
        ({"at": "long"}, {"at": 1_756_728_000_123}, "time"),
    ],
)
def test_a_schema_that_changes_gives_the_same_record_or_says_which_field_does_not(
    tmp_path: Path, registry: Registry, finance: FraudScoring, types: Any, values: Any, end: str
) -> None:
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    same = json.loads(mapping.record(framed()) or b"")
    money = {"value": Decimal("12.34"), "currency": "EUR"}
    payment = {"id": "p1", "at": datetime(2025, 9, 1, 12, 0, 0, 123_000, UTC), "card": "tok_9",
               "device": "d1", "money": [money] if "money" in types else money}  # fmt: skip
    raw = sent(registry, 8, evolved(**types), payment | values)
    if end.startswith(("same", "without")):
        same.pop(end.partition(" ")[2], None)
        assert json.loads(mapping.record(raw) or b"") == same
        return
    with pytest.raises(InputError) as refused:
        mapping.record(raw)
    assert refused.value.reason == end
    assert "tok_9" not in str(refused.value)


@pytest.mark.needs("fastavro")
@pytest.mark.parametrize("union", [False, True])
def test_types_of_one_topic_are_told_apart_by_their_names(
    tmp_path: Path, registry: Registry, finance: FraudScoring, union: bool
) -> None:
    """A refund has the fields of a payment: only its name says that it is none."""
    refund = PAYMENT | {"name": "bank.Refund"}
    text = AVRO.format(url=registry.url, more="")
    text = text.replace('name = "payment"', 'name = "payment"\ntype = "bank.Payment"')
    text += '[[message]]\nname = "refund"\ntype = ["bank.Refund", "bank.Void"]\nskip = true\n'
    mapping = mapping_of(tmp_path, text, finance)
    money = {"value": Decimal("12.34"), "currency": "EUR"}
    value = {"id": "p1", "at": 1_756_728_000_123, "card": "tok_9", "device": None, "money": money}
    kinds: list[Any] = [PAYMENT, refund, PAYMENT | {"name": "bank.Order"}]
    ends = []
    for number, kind in enumerate(kinds, 20):
        told = kinds if union else kind
        one = (kind["name"], value) if union else value
        try:
            ends.append(mapping.record(sent(registry, number, told, one)) is not None)
        except InputError as refused:
            ends.append(refused.message)
    assert ends == [True, False, "no [[message]] of the mapping fits the type bank.Order"]


@pytest.mark.needs("fastavro")
def test_a_registry_that_is_slow_or_leads_elsewhere_holds_nobody_up_and_goes_on(
    tmp_path: Path, registry: Registry, finance: FraudScoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    monkeypatch.setattr(formats_registry, "HOLD_S", -1.0)
    with pytest.raises(RegistryAway, match="asking goes on"):
        mapping.prepare([framed()])
    monkeypatch.setattr(formats_registry, "HOLD_S", 10.0)
    money = registry.paths.pop("/subjects/money-value/versions/1")
    registry.paths["/subjects/money-value/versions/1"] = {"schema": 5}
    with pytest.raises(RegistryAway, match="not one of a schema registry"):
        mapping.prepare([framed()])
    registry.paths["/subjects/money-value/versions/1"] = money
    mapping.prepare([framed()])
    assert registry.asked.count("/schemas/ids/7") == 1, "what it gave is kept"
    for missing in ("default backend", {"error_code": 404}, [40403], {"error_code": "40403"}):
        registry.missing = missing  # a proxy says so, whose registry may have the schema
        with pytest.raises(RegistryAway, match="it answers 404"):
            mapping.prepare([framed(10)])
    for status, hint in (
        (302, "the address that it leads to"),
        (401, "password_env"),
        (500, "500"),
    ):
        registry.status = status
        with pytest.raises(RegistryAway, match=hint):
            mapping.prepare([framed(10)])


def test_a_type_is_not_of_json(tmp_path: Path, finance: FraudScoring) -> None:
    text = OURS.replace('name = "chargeback"', 'name = "chargeback"\ntype = "x"')
    with pytest.raises(ConfigError, match="chargeback: type is of Avro and Protobuf"):
        mapping_of(tmp_path, text, finance)


@pytest.mark.needs("fastavro")
def test_a_stream_waits_for_a_registry_and_makes_no_dead_letters_meanwhile(
    tmp_path: Path, registry: Registry, finance: FraudScoring
) -> None:
    mapping = mapping_of(tmp_path, AVRO.format(url=registry.url, more=""), finance)
    one: Any = SimpleNamespace(value=framed()[:-3], timestamp=9, topic="in", partition=0, offset=0)
    place, engine = Partition("in", 0), Engine()
    steps = Processor(finance, engine, mapping=mapping).process(
        Chunk([one], {place: 0}, {place: 1})
    )
    for status in (503, 401, 302, 500):
        registry.status = status
        assert next(steps) == 1.0
    registry.status = 200
    with pytest.raises(StopIteration) as end:
        next(steps)
    (message,) = end.value.value.messages
    assert message.error.reason == "malformed_avro"


# -- Protobuf ------------------------------------------------------------------------------
BUF = AVRO.replace('"avro"', '"protobuf"')


def declared_in_protobuf() -> tuple[Any, Any]:
    """Two files, as a compiler gives them: money, and payments with money and Google's time."""
    from google.protobuf import descriptor_pb2

    money = descriptor_pb2.FileDescriptorProto(name="bank/money.proto", package="bank")
    money.syntax = "proto3"
    one = money.message_type.add(name="Money")
    one.field.add(name="value", number=1, type=9, label=1)
    one.field.add(name="currency", number=2, type=14, type_name=".bank.Currency", label=1)
    kinds = money.enum_type.add(name="Currency")
    kinds.value.add(name="NONE", number=0)
    kinds.value.add(name="EUR", number=1)
    file = descriptor_pb2.FileDescriptorProto(name="default", package="bank", syntax="proto3")
    file.dependency.extend(["bank/money.proto", "google/protobuf/timestamp.proto"])
    file.message_type.add(name="Other")
    outer = file.message_type.add(name="Event")
    payment = outer.nested_type.add(name="Payment")
    payment.field.add(name="id", number=1, type=9, label=1)
    payment.field.add(name="at", number=2, type=11, type_name=".google.protobuf.Timestamp", label=1)
    payment.field.add(name="money", number=3, type=11, type_name=".bank.Money", label=1)
    payment.field.add(name="card", number=4, type=9, label=1)
    payment.field.add(name="device", number=5, type=9, label=1, proto3_optional=True, oneof_index=0)
    payment.oneof_decl.add(name="_device")
    payment.field.add(name="count", number=6, type=3, label=1)
    return money, file


def serialized(file: Any) -> dict[str, Any]:
    return {
        "schemaType": "PROTOBUF", "schema": base64.b64encode(file.SerializeToString()).decode()
    }  # fmt: skip


@pytest.fixture
def buf(registry: Registry) -> Registry:
    """The registry, with schemas of Protobuf, compiled as they are asked for."""
    money, file = declared_in_protobuf()
    query = "?format=serialized"
    reference = {"name": "bank/money.proto", "subject": "money", "version": 2}
    registry.paths[f"/schemas/ids/7{query}"] = serialized(file) | {"references": [reference]}
    registry.paths[f"/subjects/money/versions/2{query}"] = serialized(money)
    registry.paths[f"/schemas/ids/9{query}"] = {"schemaType": "AVRO", "schema": '"string"'}
    registry.paths[f"/schemas/ids/10{query}"] = serialized(file)
    registry.paths[f"/schemas/ids/11{query}"] = {"schemaType": "PROTOBUF", "schema": "syntax"}
    return registry


def in_protobuf(number: int = 7, path: bytes = b"\x04\x02\x00", **more: Any) -> bytes:
    """A message, behind the path to its type: the first within the second of the file."""
    from google.protobuf import descriptor_pool, message_factory, timestamp_pb2

    pool = descriptor_pool.DescriptorPool()
    time = timestamp_pb2.DESCRIPTOR.serialized_pb
    for raw in (time, *(one.SerializeToString() for one in declared_in_protobuf())):
        pool.AddSerializedFile(raw)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("bank.Event.Payment"))
    value = kind(id="p1", card="tok_9", money={"value": "12.34", "currency": 1}, **more)
    value.at.FromJsonString("2025-09-01T12:00:00.123Z")
    return struct.pack(">bI", 0, number) + path + value.SerializeToString()


@pytest.mark.needs("google.protobuf")
def test_protobuf_is_read_by_the_schema_and_the_path_that_it_names(
    tmp_path: Path, buf: Registry, finance: FraudScoring
) -> None:
    mapping = mapping_of(tmp_path, BUF.format(url=buf.url, more=""), finance)
    for _ in range(3):
        made = json.loads(mapping.record(in_protobuf(device="d1")) or b"")
    assert made == {
        "transaction_id": "p1", "event_time": "2025-09-01T12:00:00.123Z", "amount": 12.34,
        "currency": "EUR", "card": "tok_9", "customer_id": "unknown", "terminal_id": "web",
        "device_id": "d1",
    }  # fmt: skip
    assert "device_id" not in json.loads(mapping.record(in_protobuf()) or b"")
    assert buf.asked == [
        "/schemas/ids/7?format=serialized", "/subjects/money/versions/2?format=serialized",
    ]  # fmt: skip
    assert mapping.decode(in_protobuf(count=1 << 60)).value["count"] == str(1 << 60), "exact"


def changed_in_protobuf(name: str, to: dict[str, Any]) -> tuple[Any, Any]:
    """The file with another declaration of one field of payments, or none, and that class."""
    from google.protobuf import descriptor_pool, message_factory, timestamp_pb2

    money, file = declared_in_protobuf()
    payment = file.message_type[1].nested_type[0]
    kept = [field for field in payment.field if field.name != name]
    number = next((field.number for field in payment.field if field.name == name), 20)
    del payment.field[:]
    payment.field.extend(kept)
    if to:
        payment.field.add(**{"name": name, "number": number, "label": 1, **to})
    if name == "device":
        del payment.oneof_decl[:]
    pool = descriptor_pool.DescriptorPool()
    raws = [timestamp_pb2.DESCRIPTOR.serialized_pb]
    for raw in raws + [one.SerializeToString() for one in (money, file)]:
        pool.AddSerializedFile(raw)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("bank.Event.Payment"))
    return file, kind


@pytest.mark.needs("google.protobuf")
@pytest.mark.parametrize(
    ("name", "to", "value", "end"),
    [
        ("count", {"type": 5}, 7, "same"),
        ("mcc", {"type": 5}, 5411, "same"),
        ("device", {"type": 9}, "d1", "same"),
        ("device", {"type": 9, "label": 3}, ["d1"], "type"),
        ("device", {"type": 12}, b"d1", "other device_id"),
        ("device", {"type": 3}, 17, "other device_id"),
        ("device", {}, None, "no device_id"),
        ("card", {}, None, "missing"),
        ("card", {"name": "token", "type": 9}, "tok_9", "missing"),
        ("money", {"type": 9}, "12.34", "type"),
        ("money", {"type": 11, "type_name": ".bank.Money", "label": 3}, "list", "type"),
        ("at", {"type": 3}, 1_756_728_000_123, "time"),
    ],
)
def test_a_protobuf_schema_that_changes_gives_the_same_record_or_says_which_field_does_not(
    tmp_path: Path, buf: Registry, finance: FraudScoring, name: str, to: Any, value: Any, end: str
) -> None:
    mapping = mapping_of(tmp_path, BUF.format(url=buf.url, more=""), finance)
    same = json.loads(mapping.record(in_protobuf(device="d1")) or b"")
    file, kind = changed_in_protobuf(name, to)
    buf.paths["/schemas/ids/8?format=serialized"] = serialized(file) | {
        "references": buf.paths["/schemas/ids/7?format=serialized"]["references"]
    }
    one = {"value": "12.34", "currency": 1}
    values: dict[str, Any] = {"id": "p1", "card": "tok_9", "money": one, "device": "d1"}
    values.pop(name, None)
    if value is not None:
        values[to.get("name", name)] = [one] if value == "list" else value
    made = kind(**values)
    if name != "at":
        made.at.FromJsonString("2025-09-01T12:00:00.123Z")
    raw = struct.pack(">bI", 0, 8) + b"\x04\x02\x00" + made.SerializeToString()
    if end.startswith(("same", "other", "no")):
        found = json.loads(mapping.record(raw) or b"")
        told = found.pop("device_id", None), same.pop("device_id")
        assert found == same
        assert (told[0] == told[1], told[0] is None) == (end == "same", end.startswith("no"))
        return
    with pytest.raises(InputError) as refused:
        mapping.record(raw)
    assert refused.value.reason == end


@pytest.mark.needs("google.protobuf")
def test_a_protobuf_message_at_fault_is_refused(
    tmp_path: Path, buf: Registry, finance: FraudScoring
) -> None:
    mapping = mapping_of(tmp_path, BUF.format(url=buf.url, more=""), finance)
    good = in_protobuf()
    wrong = {
        b'{"id": "p1"}': "not_protobuf",
        in_protobuf(8): "unknown_schema",
        in_protobuf(9): "unknown_schema",
        in_protobuf(10): "unknown_schema",  # without the file that it imports
        in_protobuf(11): "unknown_schema",
        good[:-3]: "malformed_protobuf",
        good[:6]: "malformed_protobuf",
        in_protobuf(path=b"\x04\x02\x08"): "malformed_protobuf",  # no such type in there
        in_protobuf(path=b"\x04\x06\x00"): "malformed_protobuf",
        in_protobuf(path=b"\x01"): "malformed_protobuf",  # fewer than none
        in_protobuf(path=b"\xff" * 9): "malformed_protobuf",
        in_protobuf(path=b"\x7e"): "malformed_protobuf",
    }
    for raw, reason in wrong.items():
        with pytest.raises(InputError) as refused:
            mapping.record(raw)
        assert refused.value.reason == reason
    with pytest.raises(InputError) as refused:  # the first message of the file, which has no fields
        mapping.record(in_protobuf(path=b"\x00"))
    assert refused.value.reason == "missing"
    others = '[[message]]\nname = "other"\ntype = "bank.Other"\nskip = true\n[[message]]'
    text = BUF.format(url=buf.url, more="").replace("[[message]]", others)
    apart = mapping_of(tmp_path, text, finance)
    assert apart.record(in_protobuf(path=b"\x00")) is None
    assert apart.record(good) == mapping.record(good)
    draw = random.Random(0)
    for _ in range(500):  # whatever comes is read or refused
        raw = good[: draw.randrange(5, len(good))] + draw.randbytes(draw.randrange(12))
        with contextlib.suppress(InputError):
            assert mapping.decode(raw).value.keys() <= {
                "id",
                "at",
                "money",
                "card",
                "device",
                "count",
            }
