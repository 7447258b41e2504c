"""Fraud scoring through the HTTP door: a real vertical, real models, real sockets."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from serving import Running, error, running
from tally import TallyVertical

from plinth.engine import ConfigError, PlinthError
from plinth.pipelines.state.snapshots import kept_states, write_snapshot
from plinth.pipelines.state.store import DiskStore
from plinth.verticals import registry
from plinth.verticals.contract import StateError
from plinth.verticals.finance import FraudScoring

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
@pytest.mark.parametrize(
    ("cards", "decisions", "seconds"),
    [(200, {"approve"}, 0.010), (1, {"review", "decline"}, 0.050)],
    ids=["of a card of its own", "an alert, with its reasons"],
)
def test_a_lone_payment_is_answered_within_milliseconds(
    finance: Running,
    payment: dict[str, Any],
    cards: int,
    decisions: set[str],
    seconds: float,
) -> None:
    spent = []
    for number in range(200):
        who = dict.fromkeys(("card", "customer_id", "terminal_id"), f"{cards}-{number % cards}")
        own = {"transaction_id": f"lone-{cards}-{number}"} | who
        body = json.dumps(payment | own)
        begun = time.perf_counter()
        answer = finance.post(ROUTE, content=body)
        taken = time.perf_counter() - begun
        if answer.json()["decision"] in decisions:
            spent.append(taken)
    assert len(spent) > 100
    assert median(spent) < seconds


def test_what_was_known_of_a_card_outlives_the_server(
    tmp_path: Path, payment: dict[str, Any]
) -> None:
    tmp_path, copied = tmp_path / "state", tmp_path / "copied"
    example, payment = payment, payment | {"card": "tok_another"}

    def known(vertical: FraudScoring) -> bool:
        card = vertical.state.cards.peek(payment["card"])
        return card is not None and payment["transaction_id"] in card.known

    vertical = FraudScoring()
    with (
        kept_states(tmp_path, {"finance": vertical}) as states,
        running({"finance": vertical}, states=states) as server,
    ):
        assert server.post(ROUTE, json=payment).status_code == 200
        assert known(vertical)
        shutil.copytree(tmp_path, copied)  # what the disk has if the process ends here
    for folder in (copied, tmp_path):
        vertical = FraudScoring()
        with kept_states(folder, {"finance": vertical}):
            assert known(vertical)
    vertical = FraudScoring()
    with kept_states(tmp_path, {"finance": vertical}):
        assert known(vertical)
        assert vertical.state.cards.peek(example["card"]) is None, "that is the warm-up's"
        with pytest.raises(ConfigError, match="in use"), kept_states(tmp_path, {}):
            pass
    with closing(DiskStore(tmp_path / "else" / "finance", {"vertical": "other"})) as store:
        store.commit({}).result(30)
    with (
        pytest.raises(ConfigError, match="move the folder away"),
        kept_states(tmp_path / "else", {"finance": FraudScoring()}),
    ):
        pass
    (tmp_path / "finance" / "parts.lmdb").write_bytes(bytes(10_000))
    with (
        pytest.raises(ConfigError, match="cannot be opened"),
        kept_states(tmp_path, {"finance": FraudScoring()}),
    ):
        pass


def test_a_state_by_parts_begins_with_the_snapshot_of_an_earlier_version(tmp_path: Path) -> None:
    before, example = FraudScoring(), FraudScoring().example()
    before.observe([example])
    origin = {"vertical": "finance", "door": "http"}
    write_snapshot(tmp_path / "finance.snapshot", origin, before.snapshot())
    for _ in range(2):
        now = FraudScoring()
        with kept_states(tmp_path, {"finance": now}):
            card = now.state.cards.peek(example.card)
            assert card is not None
            assert card.known == {example.transaction_id}
            with pytest.raises(StateError, match="by parts"):
                now.snapshot()
        (tmp_path / "finance.snapshot").unlink(missing_ok=True)


def test_the_state_of_a_vertical_without_parts_is_kept_when_the_server_ends(tmp_path: Path) -> None:
    vertical = TallyVertical()
    with kept_states(tmp_path, {"tally": vertical}):
        vertical.observe([vertical.example()])
    (tmp_path / "tally.snapshot.part").mkdir()  # where the next state would be written first
    with (
        pytest.raises(PlinthError, match="the state of tally could not be kept"),
        kept_states(tmp_path, {"tally": TallyVertical()}),
    ):
        pass
    (tmp_path / "tally.snapshot.part").rmdir()
    again = TallyVertical()
    with kept_states(tmp_path, {"tally": again}):
        assert again.snapshot() == vertical.snapshot() != TallyVertical().snapshot()
    damaged = tmp_path / "tally.snapshot"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = TallyVertical()
    with kept_states(tmp_path, {"tally": again}):
        assert again.snapshot() == TallyVertical().snapshot()


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
