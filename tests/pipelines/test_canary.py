"""A card number in any field, however spelled, leaves in dead letters alone, as it came."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from tally import started_engine

from plinth.engine import InputError
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.stream import dead_letters
from plinth.pipelines.stream.audit import AuditTrail
from plinth.pipelines.stream.chunks import Chunk, Outputs, Partition
from plinth.pipelines.stream.processor import Processor
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.cases.questions import AskAlerts, AskCase, AskTape

PAN = "4532015112830366"
FOUR = [PAN[at : at + 4] for at in range(0, 16, 4)]
SPELLINGS: dict[str, Any] = {
    "plain": PAN,
    "spaces": " ".join(FOUR),
    "dashes": "-".join(FOUR),
    "signs": "*".join(FOUR) + ";",
    "wide": "".join(chr(0xFF10 + int(digit)) for digit in PAN),
    "within": f"pan={PAN}|0927",
    "number": int(PAN),
    "float": float(PAN),
    "nested": {"more": [{"n": PAN}, {PAN: 1}, [int(PAN)]]},
    "json": json.dumps({"pan": PAN}),
}
PAYMENT = json.loads(FraudScoring().example().model_dump_json(exclude_none=True))
LABEL = {name: PAYMENT[name] for name in ("transaction_id", "terminal_id", "event_time")}
LABEL |= {"fraud": True, "label_time": PAYMENT["event_time"]}
KINDS = {"payment": PAYMENT, "label": LABEL, "refund": PAYMENT | {"kind": "refund"}}
OPTIONAL = ("device_id", "latitude", "received_time", "kind", "note", PAN)
LETTERS = re.compile(r"[A-Za-z]")


def records() -> Iterator[dict[str, Any]]:
    """Each kind of record with the number in each of its fields; ids with letters may have it."""
    for kind in KINDS.values():
        for name in [*kind, *OPTIONAL]:
            for spelled in SPELLINGS.values():
                token = isinstance(spelled, str) and LETTERS.search(spelled) and name != "note"
                if not token:
                    yield kind | {name: spelled}


def holds(text: str | bytes) -> bool:
    """Whether the card number is in there, whatever stands between its digits."""
    plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return PAN in re.sub(r"[^0-9A-Za-z]", "", unicodedata.normalize("NFKC", plain))


def test_no_output_of_a_stream_has_it(caplog: pytest.LogCaptureFixture) -> None:
    given = {"unknown_fields": "keep", "review_threshold": 0.0, "max_ahead_seconds": None}
    vertical = FraudScoring(FraudSettings.model_validate(given))
    vertical.audited = True
    questions = {query.path: query for query in vertical.queries()}
    raws = [json.dumps(one).encode() for one in records()]
    log: list[Any] = [
        SimpleNamespace(
            topic="t", partition=0, offset=at, timestamp=1, key=b"k", value=raw, headers=()
        )
        for at, raw in enumerate(raws)
    ]
    place = Partition("t", 0)
    with started_engine(vertical) as engine, caplog.at_level(logging.DEBUG):
        steps = Processor(vertical, engine).process(Chunk(log, {place: 0}, {place: len(log)}))
        made = _result(steps)
        AuditTrail("finance", None).add(made)
    told = [text for _, text in made.audit]
    about: dict[str, str] = {"group": "g", "vertical": "finance", "app": "1"}
    refused = answered = 0
    for message in made.messages:
        if message.error is None:
            answered += 1
            told += [message.value or b"", message.key or b""]
        else:
            refused += 1
            headers = dead_letters.headers(message.record, message.error, **about)
            told += [value for _, value in headers]
            told.append(str(message.error.as_dict()).encode())
    assert min(refused, answered) > 20, "some are refused, some answered with stars"
    alerts: Any = questions["alerts"].answer(AskAlerts(limit=500))
    cases = [questions["alerts/{alert}"].answer(AskCase(alert=one.id)) for one in alerts.alerts]
    tape = questions["tape"].answer(AskTape())
    told += [one.model_dump_json().encode() for one in (alerts, tape, *cases)]
    assert cases
    told += [caplog.text.encode(), generate_latest(REGISTRY), vertical.snapshot()]
    assert [text[:300] for text in told if holds(text)] == []


def test_no_answer_over_http_has_it() -> None:
    vertical = FraudScoring(FraudSettings(unknown_fields="keep", max_ahead_seconds=None))
    requests = []
    for one in records():
        with suppress(InputError):
            requests.append(vertical.parse(json.dumps(one).encode()))
    with started_engine(vertical) as engine:
        decisions = engine.run(vertical.infer(requests)).value
    told = [vertical.encode(one) for one in decisions if not isinstance(one, InputError)]
    assert b"****" in b"".join(told)
    assert [text for text in told if holds(text)] == []


def _result(steps: Any) -> Outputs:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: Outputs = end.value
            return made
