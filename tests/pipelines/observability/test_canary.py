"""What must be nowhere: card numbers and names, planted in all that a client can send."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, served
from tiny_verticals import install

CARD, NAME, TOKEN = "4012888888881881", "Grietje Canary-Zwart", "s3cr3t-canary-key"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Served, Path]]:
    """``plinth serve`` in a process of its own, which logs JSON."""
    log = tmp_path / "log.jsonl"
    settings = {
        "PLINTH_LOG_JSON": "1",
        "PLINTH_SERVE__REQUEST_LOG": str(tmp_path / "requests.jsonl"),
        "PLINTH_ENGINE__BACKEND": "eager",
        "PLINTH_ENGINE__PRECISION": "fp32",
    }
    words = [sys.executable, "-m", "plinth", "serve", "finance", "tiny", "--port", "0"]
    env = install(tmp_path / "site") | settings
    with served(words, log, env=env, cwd=tmp_path) as found:
        yield found, tmp_path / "requests.jsonl"


def attempts(client: httpx.Client) -> list[httpx.Response]:
    """Each way to say something wrong, and a few right ones, with the canaries in it."""
    typed = {"content-type": "application/json"}
    bodies: list[Any] = [
        {"transaction_id": CARD, "card_id": NAME, "amount": NAME},
        {"card_id": CARD, NAME: CARD},
        {CARD: {NAME: [CARD]}},
        [{"id": CARD, "value": NAME}, {"id": NAME, "value": 1}, CARD],
        {"id": NAME, "value": CARD},
        {"id": CARD, "value": 1},
        CARD,
        {"inputs": [{"name": "rows", "datatype": CARD, "shape": [1, 1], "data": [CARD]}]},
        {"inputs": [{"name": "rows", "datatype": "FP32", "shape": [1, 1], "data": [NAME]}]},
        {"inputs": [], "parameters": {"priority": CARD, "sequence_id": NAME}, "id": CARD},
    ]
    paths = (
        *("/v1/finance/score", "/v1/tiny/double", "/v2/models/twice/infer"),
        *(f"/v2/models/{CARD}/infer", f"/v1/{CARD}/{NAME}", "/v2/repository/index"),
        f"/v2/repository/models/{CARD}/load",
    )
    found = [client.post(path, json=body) for path in paths for body in bodies]
    for path in paths[:3]:
        found += [
            client.post(path, content=f'{{"{CARD}": {NAME}'.encode(), headers=typed),
            client.post(path, content=CARD.encode(), headers={"content-type": f"text/{CARD}"}),
            client.post(path, json={}, headers={"x-slo-deadline-ms": CARD}),
            client.post(path, json={}, headers={"inference-header-content-length": CARD}),
            client.post(path, json={}, headers={"host": f"{CARD}.example.com"}),
            client.post(path, json={}, headers={"origin": f"http://{CARD}"}),
        ]
    found += [
        client.get(f"/{CARD}", params={"name": NAME}, headers={"authorization": f"Bearer {TOKEN}"}),
        client.get("/", headers={"accept": "text/html", "user-agent": NAME, "x-api-key": TOKEN}),
        client.request("DELETE", f"/v1/finance/jobs/{CARD}"),
        client.request("DELETE", "/v1/tiny/double", params={"card": CARD}),
    ]
    return found


def test_nothing_that_was_sent_is_in_a_log_a_metric_or_an_error(
    server: tuple[Served, Path],
) -> None:
    process, requests = server
    with httpx.Client(base_url=process.url, timeout=60) as client:
        answers = attempts(client)
        assert {answer.status_code for answer in answers} >= {200, 400, 403, 404, 405, 415, 422}
        assert not [answer for answer in answers if answer.status_code in (500, 502, 504)]
        shown = client.get("/metrics").text + client.get("/v1/status").text
    said = process.drain()
    lines = [json.loads(line) for line in said.splitlines()]
    assert {"time", "level", "logger", "event"} <= lines[0].keys()
    assert lines[-1]["event"] == "drained, good bye"
    assert len(requests.read_text().splitlines()) >= len(answers)
    refused = [answer for answer in answers if answer.status_code != 200]
    nowhere = {
        "log": said,
        "metrics": shown,
        "requests": requests.read_text(),
        "errors": "".join(answer.text + str(answer.headers) for answer in refused),
    }
    for where, text in nowhere.items():
        for canary in (CARD, NAME, NAME.split()[1], TOKEN):
            assert canary.lower() not in text.lower(), where
