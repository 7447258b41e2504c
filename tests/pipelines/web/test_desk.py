"""The desk of alerts, in a real browser: a tape, a queue, a case, labels by key, thresholds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, error, running, until
from tiny_verticals import Tiny

from plinth.engine import Model
from plinth.pipelines.identity.key_file import add
from plinth.pipelines.live.models import following
from plinth.pipelines.web.desk import LEVELS, threshold
from plinth.verticals import Vertical
from plinth.verticals.finance import FraudScoring
from plinth.verticals.finance.settings import FraudSettings
from plinth.verticals.finance.succession.champion import Champion
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json

HERE = Path(__file__)
if (stores := str(HERE.parents[2] / "verticals" / "finance")) not in sys.path:
    sys.path.insert(0, stores)
from stores import add_version  # noqa: E402

PEOPLE = Population(customers=60, terminals=40, days=20, radius=60, bad_cards=1.0)
ROUTE, PAGE = "/v1/finance/score", "/ui/desk/finance"
PATIENT = {"x-slo-deadline-ms": "60000"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Twenty days of payments are scored, by a champion with a challenger beside it.

    Its clock runs a hundred times as fast, for the challenger is looked at every ten seconds.
    """
    store = tmp_path_factory.mktemp("store")
    add_version(store, "1.0.0")
    Champion(store).promote("1.0.0", by="person", champion=None)
    add_version(store, "2.0.0", noise=0.02)
    began = time.time()
    vertical = FraudScoring(
        FraudSettings(
            store=store, challenger="newest", max_ahead_seconds=None, review_threshold=0.02
        ),
        clock=lambda: began + 100 * (time.time() - began),
    )
    with running({"finance": vertical, "tiny": Tiny()}, serve={"web": True}) as found:

        def load(_: Vertical[Any, Any], model: Model) -> None:
            found.engine.add(model)

        with following(found.engine, [vertical], load):
            until(lambda: vertical.versions.shadow is not None)
            raws = [json.loads(raw) for raw in transactions_json(simulate(PEOPLE, seed=4))]
            raws[-1] |= {"amount": 9_000.0, "device_id": "d1"}
            for start in range(0, len(raws), 200):
                answer = found.post(ROUTE, json=raws[start : start + 200], headers=PATIENT)
                assert answer.status_code == 200, answer.text
            yield found


def get(server: Running, path: str, **query: Any) -> Any:
    answer = server.client.get(f"/v1/finance/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.needs("playwright")
def test_a_day_at_the_desk(server: Running, page: Any) -> None:
    """The tape runs; the dearest alert is first; keys move, decide, and the next one is there."""
    page.goto(server.server.url + PAGE)
    last = page.locator("#last tbody tr").first
    last.get_by_text("9,000.00").wait_for()
    assert "decline" in last.inner_text()
    before = get(server, "tape")
    payment = {**FraudScoring().example().model_dump(mode="json", exclude_none=True)}
    payment |= {"transaction_id": "while-looking", "event_time": "2018-05-09T12:00:00Z"}
    assert server.post(ROUTE, json=payment, headers=PATIENT).status_code == 200
    last.get_by_text("while-looking").wait_for()
    assert get(server, "tape")["approved"] == before["approved"] + 1

    queue = get(server, "alerts", order="expected_loss", labelled=False)["alerts"]
    links = page.locator("#queue [data-alert]")
    shown = [one.get_attribute("data-alert") for one in links.all()]
    assert shown == [one["id"] for one in queue]
    losses = [one["expected_loss"] for one in queue]
    assert losses == sorted(losses, reverse=True)
    assert queue[0]["reasons"][0] in page.locator("#queue tbody tr").first.inner_text()

    second = queue[1]
    for _ in range(2):
        page.keyboard.press("j")
    heading = page.locator("#h-case")
    heading.get_by_text(second["transaction_id"]).wait_for()
    case = page.locator("#case").inner_text()
    assert f"{second['amount']:,.2f} EUR" in case
    assert case.count(second["transaction_id"]) == 2, "it is one of the card's payments"
    page.keyboard.press("d")
    page.get_by_text(f"payment {second['transaction_id']} is fraud").wait_for()
    heading.get_by_text(queue[0]["transaction_id"]).wait_for()
    assert page.locator(f"#queue [data-alert='{second['id']}']").count() == 0
    assert get(server, f"alerts/{second['id']}")["alert"]["label"] == "fraud"
    page.keyboard.press("a")
    page.get_by_text(f"payment {queue[0]['transaction_id']} is genuine").wait_for()
    page.locator("[name=labelled]").select_option("yes")
    page.locator("#queue .chip", has_text="genuine").wait_for()
    assert links.count() == 2


@pytest.mark.needs("playwright")
def test_the_slider_tries_a_threshold_on_what_is_known(server: Running, page: Any) -> None:
    dearest = get(server, "alerts", order="expected_loss", labelled=False)["alerts"][0]["id"]
    answer = server.post(f"/v1/finance/alerts/{dearest}/label", json={"fraud": True})
    assert answer.status_code == 200, answer.text
    page.goto(server.server.url + PAGE)
    tried = page.locator("#what-if tbody tr").nth(1)
    assert tried.locator("th").inner_text().startswith("0.02"), "it begins with what is in force"
    page.locator("[name=level]").fill("300")
    tried.get_by_text("0.1 tried").wait_for()
    told = get(server, "what-if", review_threshold=0.1)["then"]
    cells = [cell.inner_text() for cell in tried.locator("td").all()]
    assert cells[0] == f"{told['alerts_per_day']:,.1f}"
    assert cells[1:3] == [f"{100 * told[one]:.1f} %" for one in ("precision", "recall")]
    assert cells[4] == f"{told['amount_of_frauds']:,.2f}"


def test_challenger_and_drift_stand_beside_the_champion(server: Running) -> None:
    def told() -> Any:
        return get(server, "models")

    until(lambda: bool(told()["challenger"] and told()["challenger"]["figures"].get("psi")))
    found = told()
    assert found["champion"] == "1.0.0"
    assert found["challenger"]["version"] == "2.0.0"
    assert any(words.startswith("frauds: ") for words in found["challenger"]["unmet"])
    indices = [one["psi"] for one in found["drift"]]
    assert indices, "the example of the warm-up took no day from the payments"
    assert indices == sorted(indices, reverse=True)
    page = server.client.get(f"{PAGE}/models").text
    assert "Challenger 2.0.0" in page
    assert all(words in page.replace("&gt;", ">") for words in found["challenger"]["unmet"])
    assert found["drift"][0]["name"] in page


def test_an_alert_that_is_gone_is_told_so_and_a_wrong_word_refused(server: Running) -> None:
    gone = f"{PAGE}/alerts/0123456789abcdef"
    assert "no longer remembered" in server.client.get(gone).text
    assert "Refused: " in server.client.post(gone, data={"fraud": "true"}).text
    alert = get(server, "alerts")["alerts"][0]
    answer = server.client.post(f"{PAGE}/alerts/{alert['id']}", data={"fraud": "perhaps"})
    assert "Refused: " in answer.text
    assert get(server, f"alerts/{alert['id']}")["alert"]["label"] == alert["label"]
    for wrong in ("level=-1", "level=x", "label_days=-3", "level=nan"):
        assert server.client.get(f"{PAGE}/what-if?{wrong}").status_code == 422, wrong
    error(server.client.get("/ui/desk/tiny"), 404, "not_found")
    error(server.client.get("/ui/desk/nobody"), 404, "not_found")
    assert server.client.get(PAGE).text.count("finance desk</a>") == 1


def test_the_desk_asks_for_a_key_that_may_score(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    given = {
        who: {"x-api-key": add(keys, who, table)}
        for who, table in {
            "reader": {"role": "read"},
            "analyst": {"role": "score", "only": ("finance",)},
            "other": {"role": "score", "only": ("tiny",)},
        }.items()
    }
    serve = {"web": True, "keys": keys}
    with running({"finance": FraudScoring(), "tiny": Tiny()}, serve=serve) as server:
        for who, code in (("reader", 403), ("analyst", 200), ("other", 403)):
            for path in (PAGE, f"{PAGE}/what-if", f"{PAGE}/models"):
                assert server.client.get(path, headers=given[who]).status_code == code, who
        assert server.client.get(PAGE).status_code == 401
        answer = server.client.post(f"{PAGE}/alerts/0123456789abcdef", headers=given["reader"])
        assert answer.status_code == 403
        assert "desk" not in server.client.get("/ui", headers=given["reader"]).text


def test_the_slider_reaches_from_a_ten_thousandth_to_one() -> None:
    assert threshold(0) == pytest.approx(1e-4)
    assert threshold(LEVELS) == 1.0
