"""Alerts over HTTP: case files, labels by click, other thresholds; no card number in any answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, running

from plinth.verticals import registry
from plinth.verticals.finance.training.simulator import (
    Population,
    Table,
    simulate,
    transactions_json,
)

ROUTE = "/v1/finance/score"
PEOPLE = Population(customers=40, terminals=30, days=12, radius=60, bad_cards=1.0)
SETTINGS = {"max_ahead_seconds": None, "review_threshold": 0.02, "case_alerts": 40}


@pytest.fixture(scope="module")
def table() -> Table:
    return simulate(PEOPLE, seed=4)


@pytest.fixture(scope="module")
def server(table: Table) -> Iterator[Running]:
    """A server that has scored some payments of which one is above the hard limit."""
    vertical = registry.load("finance", SETTINGS)
    with running({"finance": vertical}) as found:
        raws = [json.loads(raw) for raw in transactions_json(table)]
        raws[-1] |= {"amount": 9_000.0, "device_id": "d1"}
        for start in range(0, len(raws), 100):
            answer = found.post(ROUTE, json=raws[start : start + 100])
            assert answer.status_code == 200, answer.text
        yield found


@pytest.fixture(scope="module")
def last(table: Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(list(transactions_json(table))[-1])
    return found


def get(server: Running, path: str, **query: Any) -> Any:
    answer = server.client.get(f"/v1/finance/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_alerts_are_listed_newest_first_within_their_bound(
    server: Running, last: dict[str, Any]
) -> None:
    found = get(server, "alerts", limit=500)
    assert found["remembered"] == len(found["alerts"]) <= 40
    newest = found["alerts"][0]
    assert newest["transaction_id"] == last["transaction_id"]
    assert (newest["decision"], newest["amount"]) == ("decline", 9_000.0)
    assert newest["reasons"][0] == "Amount above the hard limit"
    declined = get(server, "alerts", decision="decline")["alerts"]
    assert {one["decision"] for one in declined} == {"decline"}
    assert len(get(server, "alerts", limit=2)["alerts"]) == 2


def test_a_case_file_tells_history_features_reasons_and_similar_alerts(
    server: Running, table: Table, last: dict[str, Any]
) -> None:
    alert = get(server, "alerts")["alerts"][0]
    case = get(server, f"alerts/{alert['id']}")
    assert case["alert"] == alert
    assert case["terminal_id"] == last["terminal_id"]
    assert case["review_threshold"] == 0.02
    assert case["features"]["amount"] == 9_000.0
    assert case["features"]["device_cards_24h"] == 1
    card = table["customer"] == table["customer"][-1]
    history = case["history"]
    assert [one["transaction_id"] for one in history] == [
        f"x{number:08d}" for number in table["transaction"][card][::-1][:50]
    ]
    assert history[0]["amount"] == 9_000.0
    assert history[0]["alert"] == alert["id"]
    assert [one["amount"] for one in history[1:4]] == table["amount"][card][::-1][1:4].tolist()
    rule, *others = case["reasons"]
    assert (rule["code"], rule["effect"], rule["features"]) == ("R01", None, {})
    assert others[0]["effect"] > 0.3
    for one in others:
        assert one["features"].items() <= case["features"].items()
    gaps = [one["distance"] for one in case["similar"]]
    assert len(gaps) == 5
    assert gaps == sorted(gaps)
    assert alert["id"] not in {one["id"] for one in case["similar"]}


def test_no_answer_holds_a_token_of_a_card_or_who_holds_it(
    server: Running, last: dict[str, Any]
) -> None:
    alerts = get(server, "alerts", limit=500)["alerts"]
    told = [alerts, *(get(server, f"alerts/{one['id']}") for one in alerts)]
    for secret in (last["card"], last["customer_id"], "tok_", '"d1"'):
        assert secret not in json.dumps(told)
    cards = {one["card"] for one in told[1:]}
    assert all(len(card) == 16 for card in cards)


def test_a_label_by_click_is_in_the_case_and_in_what_thresholds_give(server: Running) -> None:
    first, second = get(server, "alerts")["alerts"][1:3]
    for alert, fraud in ((first, True), (second, False)):
        path = f"/v1/finance/alerts/{alert['id']}/label"
        answer = server.post(path, json={"fraud": fraud})
        assert answer.status_code == 200, answer.text
        assert answer.json()["label"] == ("fraud" if fraud else "genuine")
    assert get(server, f"alerts/{first['id']}")["alert"]["label"] == "fraud"
    labelled = get(server, "alerts", labelled=True)["alerts"]
    assert {one["id"] for one in labelled} == {first["id"], second["id"]}
    found = get(server, "what-if", review_threshold=1.0, label_days=90)
    assert (found["frauds"], found["genuine"]) == (1, 1)
    assert found["amount_of_frauds"] == first["amount"]
    now, then = found["now"], found["then"]
    assert (now["precision"], now["recall"], now["amount_of_frauds"]) == (0.5, 1, first["amount"])
    assert then["alerts"] == 1, "the rule stays"
    assert (then["recall"], then["precision"]) == (0, None)
    everybody = get(server, "what-if", review_threshold=0.0, label_days=90)["then"]
    assert everybody["alerts"] == found["payments"]


def test_thresholds_count_what_was_decided(server: Running, table: Table) -> None:
    found = get(server, "what-if", review_threshold=0.02)
    assert found["payments"] == len(table)
    assert found["now"] == found["then"]
    assert found["now"]["alerts_per_day"] == pytest.approx(
        found["now"]["alerts"] / found["days"], abs=1e-3
    )
    higher = get(server, "what-if", review_threshold=0.5)["then"]
    assert higher["alerts"] < found["now"]["alerts"]


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("alerts?limit=0", 422, "limit"),
        ("alerts?limit=many", 422, "limit"),
        ("alerts?limti=5", 422, "limti"),
        ("alerts?limit=5&limit=6", 422, "limit"),
        ("alerts/0123456789abcdef", 404, "alert"),
        ("alerts/nope", 422, "alert"),
        ("what-if", 422, "review_threshold"),
        ("what-if?review_threshold=nan", 422, "review_threshold"),
    ],
)
def test_a_wrong_question_is_refused_by_its_field(
    server: Running, path: str, status: int, field: str
) -> None:
    answer = server.client.get(f"/v1/finance/{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["field"] == field


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"{}", 422), (b'{"fraud": "yes, I think"}', 422),
     (b'{"fraud": true, "fraud": false}', 422), (b'{"fraud": true, "fra\\u0075d": false}', 422),
     (b'{"fraud": true, "alert": "0123456789abcdef"}', 422), (b'{"fraud": true}', 404)],
)  # fmt: skip
def test_a_wrong_label_is_refused(server: Running, body: bytes, status: int) -> None:
    answer = server.post("/v1/finance/alerts/0123456789abcdef/label", content=body)
    assert answer.status_code == status
    page = server.client.post(
        "/v1/finance/alerts/0123456789abcdef/label",
        content=body,
        headers={"content-type": "text/x"},
    )
    assert page.status_code == 415, "a page of another site could send that"


def test_the_questions_stand_in_the_api_docs(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    case = document["paths"]["/v1/finance/alerts/{alert}"]["get"]
    (parameter,) = case["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("alert", "path", True)
    told = case["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert told == "#/components/schemas/finance.CaseFile"
    assert "finance.CaseReason" in document["components"]["schemas"]
