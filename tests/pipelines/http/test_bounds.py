"""The HTTP door against clients that are too many, too slow, too large, or gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Raw, Running, error, running, until
from test_uploads import ZIP, zipped
from tiny_verticals import GATE, Gate, Page, Shelf, Tiny

ROUTE = "/v1/tiny/double"
GOOD = {"id": "a", "value": 2.5}
HELD = {"id": "a", "value": 1000}


class Heavy(Tiny):
    """Its flow is driven on a thread."""

    heavy = True


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with running({"tiny": Tiny()}) as server:
        yield server


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv(GATE, str(tmp_path))
    return Gate(tmp_path)


# -- heads and connections -----------------------------------------------------------------------
def test_what_is_not_http_is_400(tiny: Running) -> None:
    with Raw(tiny) as client:
        client.send("HELLO\n\n")
        status, _, body = client.answer()
        assert (status, body["error"]["reason"]) == (400, "malformed_http")
        assert client.file.read() == b""


def test_a_huge_head_is_431(tiny: Running) -> None:
    with Raw(tiny) as client:
        client.send("POST /v1/tiny/double HTTP/1.1\nX-Large: " + "a" * 70_000)
        status, _, body = client.answer()
        assert (status, body["error"]["reason"]) == (431, "head_too_large")
        assert client.file.read() == b""


@pytest.mark.parametrize("begun", ["", "POST / HTTP/1.1\nHost:"])
def test_a_head_that_does_not_come_ends_the_connection(begun: str) -> None:
    with (
        running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.1}) as server,
        Raw(server) as client,
    ):
        client.send(begun)
        assert client.file.read() == b""


def test_a_body_that_does_not_come_is_408() -> None:
    with (
        running({"tiny": Tiny()}, serve={"request_timeout_seconds": 0.1}) as server,
        Raw(server) as client,
    ):
        client.send(
            f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 9\n\n"
        )
        status, headers, body = client.answer()
        assert (status, body["error"]["reason"]) == (408, "body_too_slow")
        assert headers["connection"] == "close"


def test_connections_are_bounded() -> None:
    with running({"tiny": Tiny()}, serve={"max_connections": 2}) as server:
        with Raw(server) as second, Raw(server) as third:
            third.post(ROUTE, GOOD)
            status, headers, body = third.answer()
            assert (status, body["error"]["reason"]) == (503, "too_many_connections")
            assert headers["retry-after"] == "1"
            assert third.file.read() == b""
            second.post(ROUTE, GOOD)
            assert second.answer()[0] == 200
        assert server.post(ROUTE, json=GOOD).status_code == 200


def test_requests_in_work_are_bounded_but_health_answers(gate: Gate) -> None:
    with (
        running({"tiny": Tiny()}, serve={"max_requests": 1}) as server,
        ThreadPoolExecutor() as pool,
    ):
        held = pool.submit(server.post, ROUTE, json=HELD)
        gate.await_arrival()
        response = server.post(ROUTE, json=GOOD)
        error(response, 429, "queue_full")
        assert response.headers["retry-after"] == "1"
        assert server.client.get("/health/live").status_code == 200
        gate.open()
        assert held.result().status_code == 200


def test_requests_in_one_go_are_answered_in_order(tiny: Running) -> None:
    with Raw(tiny) as client:
        for value in (1, 2, 3):
            client.post(ROUTE, {"id": "a", "value": value})
        assert [client.answer()[2]["twice"] for _ in range(3)] == [2.0, 4.0, 6.0]


def test_a_client_may_ask_before_it_sends_the_body(tiny: Running) -> None:
    body = json.dumps(GOOD).encode()
    with Raw(tiny) as client:
        head = f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        head += "Expect: 100-continue\n"
        client.send(f"{head}Content-Length: {len(body)}\n\n")
        assert client.answer()[0] == 100
        client.send("", body)
        assert client.answer()[2] == {"id": "a", "twice": 5.0}


def test_a_client_that_does_not_read_loses_its_connection() -> None:
    size = 64 << 20

    class Large(Shelf):
        name = "large"

        def write(self, result: Page, folder: Path) -> list[Path]:
            with (folder / "large.bin").open("wb") as out:
                out.truncate(size)
            return [folder / "large.bin"]

    with running({"large": Large()}, serve={"request_timeout_seconds": 0.5}) as server:
        job = server.post("/v1/large/read", content=zipped({"a.txt": "1"}), headers=ZIP).json()
        until(lambda: server.client.get(job["url"]).json()["state"] == "done")
        with Raw(server) as client:
            client.send(f"GET {job['url']}/files/large.bin HTTP/1.1\nHost: x\n\n")
            ended = 'route="/v1/large/jobs/{job}/files/{name:path}",status="200"} 1.0'
            until(lambda: ended in server.client.get("/metrics").text)
            assert len(client.file.read()) < size


# -- clients that leave ---------------------------------------------------------------------------
@pytest.mark.parametrize("vertical", [Tiny(), Heavy()], ids=["light", "heavy"])
def test_a_vanished_client_frees_its_place(vertical: Tiny, gate: Gate) -> None:
    """While one request is in the model, another waits in the queue and its client leaves."""
    with running({"tiny": vertical}) as server, ThreadPoolExecutor() as pool:
        held = pool.submit(server.post, ROUTE, json=HELD)
        gate.await_arrival()
        with Raw(server) as client:
            client.post(ROUTE, GOOD)
            until(lambda: server.engine.status()["urgent_rows"] == 1)
        until(lambda: server.engine.status()["urgent_rows"] == 0)
        gate.open()
        assert held.result().status_code == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("body", [GOOD, [GOOD]], ids=["one", "list"])
def test_a_client_that_has_said_all_is_answered(tiny: Running, body: Any, version: str) -> None:
    """As ``nc -N`` does: it ends its side of the connection and waits."""
    sent = json.dumps(body).encode()
    head = f"POST {ROUTE} HTTP/{version}\nHost: x\nContent-Type: application/json\n"
    for pieces in (1, 2):
        with Raw(tiny) as client:
            client.send(f"{head}Content-Length: {len(sent)}\n\n", sent if pieces == 1 else b"")
            if pieces == 2:
                client.socket.sendall(sent)
            client.socket.shutdown(socket.SHUT_WR)
            status, _, told = client.answer()
            while status == 100:
                status, _, told = client.answer()
            assert (status, str(told).count("'twice': 5.0")) == (200, 1)
            assert client.file.read() == b""


def test_requests_in_one_go_are_all_answered_to_a_client_that_has_said_all(tiny: Running) -> None:
    with Raw(tiny) as client:
        client.send("GET /health/live HTTP/1.1\nHost: x\n\n" * 3)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.file.read().count(b"HTTP/1.1 200 OK") == 3


def test_who_has_said_all_waits_for_the_model_and_who_says_half_is_not_answered(gate: Gate) -> None:
    with running({"tiny": Tiny()}) as server, Raw(server) as client, Raw(server) as half:
        client.post(ROUTE, HELD)
        gate.await_arrival()
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer()[0] == 100
        half.send(f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Length: 10\n\n", b"{")
        half.socket.shutdown(socket.SHUT_WR)
        assert half.file.read() == b""
        gate.open()
        assert client.answer()[0] == 200
        assert client.file.read() == b""


def test_a_heavy_vertical_is_answered_refused_and_told_of_faults() -> None:
    with running({"tiny": Heavy()}) as server:
        assert server.post(ROUTE, json=GOOD).json() == {"id": "a", "twice": 5.0}
        error(server.post(ROUTE, json={"id": "a", "value": 13}), 422, "unlucky")
        error(server.post(ROUTE, json={"id": "a", "value": 666}), 500, "internal")
        late = server.post(ROUTE, json=GOOD, headers={"x-slo-deadline-ms": "0.0001"})
        error(late, 503, "deadline")
