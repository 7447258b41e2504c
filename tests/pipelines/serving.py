"""Real servers for the tests of the doors: in a thread, or as a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from plinth.engine import Engine
from plinth.pipelines.assembly import build_engine
from plinth.pipelines.config.settings import Config
from plinth.pipelines.http.server import Server, bind, create_app
from plinth.verticals import Vertical


class Running:
    """A server that answers at ``url``; ``client`` is an httpx client for it."""

    def __init__(self, server: Server, engine: Engine, client: Mapping[str, Any]) -> None:
        self.server = server
        self.engine = engine
        self.client = httpx.Client(base_url=server.url, timeout=60, **client)
        self.thread = threading.Thread(target=server.run)
        self.thread.start()

    def post(self, path: str, **options: Any) -> httpx.Response:
        """POST below the server; a body whose type is not given is JSON."""
        headers = {"content-type": "application/json"} | dict(options.pop("headers", {}))
        if "files" in options:
            del headers["content-type"]
        return self.client.post(path, headers=headers, **options)


@contextlib.contextmanager
def running(verticals: Mapping[str, Vertical[Any, Any]], /, **tables: Any) -> Iterator[Running]:
    """Serve verticals on a free port; tables are those of the config file.

    Args:
        verticals: by name.
        tables: such as ``serve={"max_items": 4}``; ``client``: options of the httpx client;
            ``states``: those that are kept.
    """
    options, states = tables.pop("client", {}), tables.pop("states", ())
    serve = {"port": 0, "drain_seconds": 10.0} | tables.pop("serve", {})
    engine = {"backend": "eager", "precision": "fp32"} | tables.pop("engine", {})
    config = Config.model_validate({"engine": engine, "serve": serve, **tables})
    bound = bind(config.serve.host, config.serve.port)
    with build_engine(config, verticals) as engine:
        server = Server(create_app(verticals, engine, config, states), config, bound)
        running = Running(server, engine, options)
        try:
            await_ready(running.client)
            yield running
        finally:
            running.client.close()  # an open connection would linger
            running.server.drain()
            running.thread.join(60)
            assert not running.thread.is_alive()


class Served:
    """A server in a process of its own; ``url``: where, ``log``: the file that has what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        pattern = re.compile(r"serving .* on (https?://[^\s\"]+)")
        until(lambda: self.ended or pattern.search(log.read_text()) is not None)
        found = pattern.search(log.read_text())
        assert found is not None, log.read_text()
        self.url = found[1]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def drain(self) -> str:
        """Tell it to end, which it must do well; all that it said."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()
        return self.log.read_text()


@contextlib.contextmanager
def served(words: Sequence[str | Path], log: Path, **options: Any) -> Iterator[Served]:
    """A command that serves, from its start until it is ready, and at most to the block's end.

    Args:
        words: of the command.
        log: a file for what it says.
        options: of :class:`subprocess.Popen`.
    """
    with log.open("wb") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, **options)
    try:
        found = Served(process, log)
        with httpx.Client(base_url=found.url.replace("0.0.0.0", "127.0.0.1"), timeout=60) as client:  # noqa: S104
            await_ready(client)
        yield found
    finally:
        process.kill()
        process.wait(60)


def await_ready(client: httpx.Client) -> None:
    """Until the warm-up is over; connections wait in the socket's backlog until then."""
    until(lambda: client.get("/health/ready").status_code == 200)


class Raw:
    """A connection on which the test writes the bytes itself."""

    def __init__(self, server: Running) -> None:
        url = server.client.base_url
        self.socket = socket.create_connection((url.host, url.port or 0), timeout=60)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, head: str, body: bytes = b"") -> None:
        """Write a head, in which a line ends with a newline, and a body."""
        self.socket.sendall(head.replace("\n", "\r\n").encode() + body)

    def post(self, route: str, record: Any) -> None:
        """Send one record and do not wait."""
        body = json.dumps(record).encode()
        head = f"POST {route} HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        self.send(f"{head}Content-Length: {len(body)}\n\n", body)

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the next answer."""
        status, headers = int(self.file.readline().split()[1]), {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        body = self.file.read(int(headers.get("content-length", 0)))
        return status, headers, json.loads(body) if body else None


def until(condition: Callable[[], bool], minutes: int = 1) -> None:
    """Look until the condition holds; at most a minute, for a machine with other things to do."""
    pause = threading.Event()
    for _ in range(6000 * minutes):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"it did not come true within {minutes} min")


def settle(path: Path) -> None:
    """Let a file be as if it had been written a while ago."""
    past = time.time() - 60
    os.utime(path, (past, past))


def watch(seconds: float) -> None:
    """Let a server be for a stretch of time which is itself what a test is about."""
    threading.Event().wait(seconds)


def error(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """The error object of a response that must have this status and reason."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["reason"] == reason, found
    assert found["message"]
    assert {"field", "hint"} <= found.keys()
    return found
