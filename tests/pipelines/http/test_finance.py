"""Fraud scoring through the HTTP door: a real vertical, real models, real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from serving import Running, error, running

from plinth.engine import ConfigError, PlinthError
from plinth.pipelines.snapshots import kept_states
from plinth.verticals import registry

ROUTE = "/v1/finance/score"


@pytest.fixture(scope="module")
def finance() -> Iterator[Running]:
    with running({"finance": registry.load("finance")}) as server:
        yield server


@pytest.fixture(scope="module")
def payment(finance: Running) -> dict[str, Any]:
    """The example of the API docs, which is a request that can be sent."""
    operation = finance.client.get("/openapi.json").json()["paths"][ROUTE]["post"]
    example: dict[str, Any] = operation["requestBody"]["content"]["application/json"]["example"]
    return example


def test_the_example_of_the_api_docs_is_answered(finance: Running, payment: dict[str, Any]) -> None:
    answer = finance.post(ROUTE, json=payment)
    assert answer.status_code == 200
    assert answer.json()["transaction_id"] == payment["transaction_id"]
    assert 0 <= answer.json()["score"] <= 1
    assert answer.json()["decision"] in ("approve", "review", "decline")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount": float("nan")}, None),
        ({"amount": float("inf")}, None),
        ({"amount": "a lot"}, "amount"),
        ({"amount": -1}, "amount"),
        ({"event_time": "yesterday"}, "event_time"),
        ({"event_time": "2999-01-01T00:00:00Z"}, "event_time"),
        ({"currency": "XXX"}, "currency"),
        ({"card": None}, "card"),
        ({"schema_version": 99}, "schema_version"),
    ],
)
def test_a_wrong_field_is_refused_by_name_and_its_value_kept_to_itself(
    finance: Running, payment: dict[str, Any], change: dict[str, Any], field: str | None
) -> None:
    body = json.dumps(payment | change)  # Python writes NaN and Infinity, as careless clients do
    answer = finance.post(ROUTE, content=body)
    assert answer.status_code in (400, 422), answer.text
    found = error(answer, answer.status_code, answer.json()["error"]["reason"])
    assert found["hint"]
    if field is not None:
        assert found["field"].split(".")[-1] == field
    assert payment["card"] not in answer.text


@pytest.mark.clock
def test_a_lone_payment_is_answered_within_10_ms(finance: Running, payment: dict[str, Any]) -> None:
    spent = []
    for number in range(200):
        body = json.dumps(payment | {"transaction_id": f"lone-{number}"})
        begun = time.perf_counter()
        assert finance.post(ROUTE, content=body).status_code == 200
        spent.append(time.perf_counter() - begun)
    assert median(spent) < 0.010


def test_what_was_known_of_a_card_outlives_the_server(
    tmp_path: Path, payment: dict[str, Any]
) -> None:
    def known(server: Running) -> bytes | None:
        assert server.post(ROUTE, json=payment).status_code == 200
        return vertical.snapshot()

    vertical = registry.load("finance")
    with kept_states(tmp_path, {"finance": vertical}), running({"finance": vertical}) as server:
        once = known(server)
    vertical = registry.load("finance")
    with kept_states(tmp_path, {"finance": vertical}):
        assert vertical.snapshot() == once
        with pytest.raises(ConfigError, match="in use"), kept_states(tmp_path, {}):
            pass
    (tmp_path / "finance.snapshot.part").mkdir()  # where the next state would be written first
    with (
        pytest.raises(PlinthError, match="the state of finance could not be kept"),
        kept_states(tmp_path, {"finance": vertical}),
    ):
        pass
    (tmp_path / "finance.snapshot.part").rmdir()
    damaged = tmp_path / "finance.snapshot"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    vertical = registry.load("finance")
    empty = vertical.snapshot()
    with kept_states(tmp_path, {"finance": vertical}):
        assert vertical.snapshot() == empty


def test_a_record_of_a_list_is_read_as_it_is_alone(
    finance: Running, payment: dict[str, Any]
) -> None:
    """Keys that stand twice, spaces and line ends included."""
    good = json.dumps(payment, indent=1).replace("\n", "\r\n\t")
    double = json.dumps(payment)[:-1] + ', "amount": 9999}'
    found = error(finance.post(ROUTE, content=double), 422, "duplicate_key")
    answer = finance.post(ROUTE, content=f" [\n{good} ,{double}, 5]\r\n").json()
    results = answer["results"]
    assert results[0]["result"]["decision"] in ("approve", "review", "decline")
    assert results[1]["error"] == found
    assert "error" in results[2]
    assert len(results) == 3
