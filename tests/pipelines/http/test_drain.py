"""SIGTERM amid a load: a real ``plinth serve``, real sockets, and a count of every request."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serving import running
from tiny_verticals import Tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from drain_under_load import Witness, send
from http_latency import requests_of, serving

ROUTE = "/v1/tiny/double"


def request_of(url: str, route: str, record: dict[str, object]) -> bytes:
    body = json.dumps(record).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
    head += "content-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.slow
def test_sigterm_amid_a_load_leaves_no_request_unanswered() -> None:
    with serving("finance", None) as (url, server):
        requests = requests_of(url, "finance", None)
        told = 0.0

        async def run() -> Witness:
            nonlocal told

            def tell() -> None:
                nonlocal told
                told = time.monotonic()
                server.send_signal(signal.SIGTERM)

            asyncio.get_running_loop().call_later(0.8, tell)
            return await send(url, requests, 300.0, 3.0, 32, 7)

        witness = asyncio.run(run())
        assert server.wait(timeout=30) == 0
        assert time.monotonic() - told < 25
    assert witness.sent > 100
    assert not witness.lost
    assert not witness.wrong
    assert witness.answers.keys() <= {200, 429, 503}


def test_a_request_on_its_way_when_the_server_drains_is_answered_and_ends_its_connection() -> None:
    """Sent just after, sent in two halves around it, and never sent."""
    with running({"tiny": Tiny()}) as server, ThreadPoolExecutor() as pool:
        url = server.server.url
        request = request_of(url, ROUTE, {"id": "a", "value": 2.5})
        base = urlsplit(url)
        with (
            socket.create_connection((base.hostname, base.port), timeout=20) as late,
            socket.create_connection((base.hostname, base.port), timeout=20) as split,
            socket.create_connection((base.hostname, base.port), timeout=20) as silent,
        ):
            for client in (late, split, silent):
                client.sendall(request)
                assert b'"twice":5.0' in client.recv(65536)
            split.sendall(request[:20])
            server.server.drain()
            ended = pool.submit(server.thread.join, 10)
            wait_until_closed(base.hostname, base.port)
            late.sendall(request)
            split.sendall(request[20:])
            for client in (late, split):
                answer = whole(client)
                assert answer.startswith(b"HTTP/1.1 200")
                assert b"connection: close" in answer
                assert b'"twice":5.0' in answer
            assert whole(silent) == b""
            ended.result(15)
            assert not server.thread.is_alive()


def whole(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection in order."""
    found = b""
    while data := client.recv(65536):
        found += data
    return found


def wait_until_closed(host: str | None, port: int | None) -> None:
    """Until the server takes no new connection: it drains."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            socket.create_connection((host or "", port or 0), timeout=5).close()
        except OSError:
            return
    raise AssertionError("the server still takes connections")
