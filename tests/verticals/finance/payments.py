"""Payments and labels as senders write them, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from plinth.engine import Call, Refused
from plinth.verticals.contract import Written
from plinth.verticals.finance import FraudScoring
from plinth.verticals.finance.decisions.reasons import MASKED
from plinth.verticals.finance.schema import Record
from plinth.verticals.finance.training.simulator import rfc3339
from plinth.verticals.testing import feed
from plinth.verticals.testing.flows import drive

NOON = 1_756_728_000_000
"""Monday 2025-09-01T12:00:00Z, epoch milliseconds."""
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


def payment(number: int = 1, at: int = NOON, **changes: Any) -> bytes:
    """One transaction as JSON."""
    record = {
        "schema_version": 1,
        "transaction_id": f"x{number}",
        "event_time": rfc3339(at),
        "amount": 42.5,
        "currency": "EUR",
        "card": "tok_1",
        "customer_id": "c1",
        "terminal_id": "t1",
    }
    return json.dumps(record | changes).encode()


def label(number: int = 1, at: int = NOON, known: int = NOON + DAY, **changes: Any) -> bytes:
    """One label as JSON: transaction ``number`` was fraud."""
    record = {
        "schema_version": 1,
        "transaction_id": f"x{number}",
        "terminal_id": "t1",
        "event_time": rfc3339(at),
        "fraud": True,
        "label_time": rfc3339(known),
    }
    return json.dumps(record | changes).encode()


def written(vertical: FraudScoring, requests: Sequence[Record]) -> list[dict[str, Any]]:
    """Answers and evidence of records as an audited door has them, read again."""
    models = {model.spec.name: model.module.eval() for model in vertical.models()}
    vertical.audited = True
    flow = vertical.answers(requests)
    found = []
    for one in drive(flow, lambda call: models[call.model](call.rows).detach()):
        assert isinstance(one, Written)
        assert one.evidence is not None
        texts, numbers, _ = one.evidence
        made_from = json.loads(b"{%b,%b}" % (texts, numbers))
        found.append({"answer": json.loads(one.value), "evidence": made_from, "key": one.key})
    return found


def leave_reasons_out(call: Call) -> None:
    """Refuse a call that explains an alert, as an engine without time for it; 1,024 rows each."""
    if bool((call.rows[-1] == MASKED).all()):  # type: ignore[index]
        raise Refused("there is no time for reasons")


def features(vertical: FraudScoring, *raws: bytes) -> list[dict[str, float]]:
    """What the model is shown of some records: one dictionary per transaction."""
    from plinth.verticals.finance.features.online import MODEL_FEATURES
    from plinth.verticals.finance.model import fraud_lite

    seen: list[list[float]] = []

    def answer(call: Any) -> Any:
        seen.extend(call.rows.tolist())
        return fraud_lite().eval()(call.rows) * 0

    feed(vertical.infer([vertical.parse(raw) for raw in raws]), answer)
    return [dict(zip(MODEL_FEATURES, row, strict=True)) for row in seen]
