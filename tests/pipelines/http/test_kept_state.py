"""What was answered over HTTP is known after kill -9."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from http_latency import serving

from plinth.pipelines.state.snapshots import kept_states
from plinth.verticals.finance import FraudScoring, FraudSettings

ROUTE = "/v1/finance/score"


@pytest.mark.slow
@pytest.mark.soak
def test_a_killed_server_loses_nothing_that_it_answered(tmp_path: Path) -> None:
    config = tmp_path / "plinth.toml"
    config.write_text(
        f'[serve]\nstate_dir = "{tmp_path / "state"}"\n'
        "[verticals.finance]\nmax_ahead_seconds = 1e9\nmax_cards = 16\nreview_threshold = 0.0\n"
    )
    example: dict[str, Any] = json.loads(FraudScoring().example().model_dump_json())
    answered: list[tuple[str, str]] = []
    labelled: list[str] = []
    enough = threading.Event()

    def send(url: str, client: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as door:
            for number in range(10_000):
                card, name = f"tok_{client}_{number % 20}", f"x{client}-{number}"
                body = example | {"card": card, "transaction_id": name}
                try:
                    assert door.post(ROUTE, json=body).status_code == 200
                    answered.append((card, name))
                    if number % 10 == 0:
                        alert = door.get("/v1/finance/alerts", params={"limit": 1}).json()
                        one = alert["alerts"][0]["id"]
                        path = f"/v1/finance/alerts/{one}/label"
                        assert door.post(path, json={"fraud": True}).status_code == 200
                        labelled.append(one)
                except httpx.TransportError:
                    return  # the server is gone
                if len(answered) > 200:
                    enough.set()

    with serving("finance", config) as (url, server):
        clients = [threading.Thread(target=send, args=(url, n)) for n in range(4)]
        for one in clients:
            one.start()
        assert enough.wait(120)
        server.send_signal(signal.SIGKILL)
        for one in clients:
            one.join()
    vertical = FraudScoring(FraudSettings(max_cards=16))
    with kept_states(tmp_path / "state", {"finance": vertical}):
        for card, name in answered:
            found = vertical.state.cards.peek(card)
            assert found is not None
            assert name in found.known
        terminal = vertical.state.terminals.peek(example["terminal_id"])
        assert terminal is not None
        assert len(terminal.marks) >= len(set(labelled)) > 0
