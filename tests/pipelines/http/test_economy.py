"""What the HTTP door does not spend: time on the idle, on clients that left, on lost causes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import Raw, error, running, until, watch
from test_bounds import GOOD, HELD, ROUTE
from tiny_verticals import GATE, Gate, Tiny

from plinth.engine.metrics import REGISTRY


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(GATE, str(tmp_path))
    return Gate(tmp_path)


def rows_run() -> float:
    """Rows the device has run for the model of ``tiny``."""
    return REGISTRY.get_sample_value("plinth_batch_rows_sum", {"model": "twice"}) or 0.0


def test_work_whose_clients_left_behind_a_long_batch_is_never_run(gate: Gate) -> None:
    with running({"tiny": Tiny()}) as server, ThreadPoolExecutor() as pool:
        before = rows_run()
        held = pool.submit(server.post, ROUTE, json=HELD)
        gate.await_arrival()
        clients = [Raw(server) for _ in range(5)]
        for client in clients:
            client.post(ROUTE, GOOD)
        until(lambda: server.engine.status()["urgent_rows"] == 5)
        for client in clients:
            client.__exit__()
        until(lambda: server.engine.status()["urgent_rows"] == 0)
        gate.open()
        assert held.result().status_code == 200
        assert server.post(ROUTE, json=GOOD).status_code == 200
        assert rows_run() - before == 2


def test_lost_causes_are_refused_while_the_device_is_still_busy(gate: Gate) -> None:
    """Both refusals come before the batch that holds the device has ended."""
    deadline = {"x-slo-deadline-ms": "0.001"}
    with (
        running({"tiny": Tiny()}, engine={"max_queue": 2}) as server,
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(server.post, ROUTE, json=HELD)
        gate.await_arrival()
        waits = pool.submit(server.post, ROUTE, json=GOOD)
        until(lambda: server.engine.status()["urgent_rows"] == 1)
        hopeless = server.post(ROUTE, json=GOOD, headers=deadline)
        full = server.post(ROUTE, json=[GOOD] * 2)
        gate.open()
        assert [held.result().status_code, waits.result().status_code] == [200, 200]
    found = error(hopeless, 503, "deadline")
    assert found["rows_ahead"] == 1
    assert found["predicted_seconds"] > found["deadline_seconds"] == 1e-6
    assert found["retry_after_seconds"] >= 0
    error(full, 429, "queue_full")
    assert int(hopeless.headers["retry-after"]) >= 1
    assert int(full.headers["retry-after"]) >= 1


def test_an_idle_server_uses_less_than_a_hundredth_of_a_core() -> None:
    with running({"tiny": Tiny()}) as server:
        server.post(ROUTE, json=GOOD)
        device = next(t for t in threading.enumerate() if t.name == "plinth-device")
        clocks = [time.pthread_getcpuclockid(t.ident or 0) for t in (server.thread, device)]
        watch(0.3)  # what the answer left to do
        before = [time.clock_gettime(clock) for clock in clocks]
        watch(2.0)
        spent = [time.clock_gettime(clock) - at for clock, at in zip(clocks, before, strict=True)]
    assert spent[1] == 0.0
    assert sum(spent) < 0.02
