"""A real server in a thread, for the tests of the HTTP door."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from engine import Engine
from pipelines.assembly import build_engine
from pipelines.config import Config
from pipelines.serve import Server, bind, create_app
from verticals import Vertical


class Running:
    """A server that answers at ``url``; ``client`` is an httpx client for it."""

    def __init__(self, server: Server, engine: Engine) -> None:
        self.server = server
        self.engine = engine
        self.client = httpx.Client(base_url=server.url, timeout=60)
        self.thread = threading.Thread(target=server.run)
        self.thread.start()

    def await_ready(self) -> None:
        """Until the warm-up is over; connections wait in the socket's backlog until then."""
        until(lambda: self.client.get("/health/ready").status_code == 200)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """POST below the server."""
        return self.client.post(path, **options)


@contextlib.contextmanager
def running(verticals: Mapping[str, Vertical[Any, Any]], **tables: Any) -> Iterator[Running]:
    """Serve verticals on a free port; tables are those of the config file.

    Args:
        verticals: by name.
        tables: such as ``serve={"max_items": 4}``.
    """
    serve = {"port": 0, "drain_seconds": 10.0} | tables.pop("serve", {})
    engine = {"backend": "eager", "precision": "fp32"} | tables.pop("engine", {})
    config = Config.model_validate({"engine": engine, "serve": serve, **tables})
    bound = bind(config.serve.host, config.serve.port)
    with build_engine(config, verticals) as engine:
        running = Running(Server(create_app(verticals, engine, config), config, bound), engine)
        try:
            running.await_ready()
            yield running
        finally:
            running.server.drain()
            running.thread.join(60)
            running.client.close()
            assert not running.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Look until the condition holds; at most a minute, for a machine with other things to do."""
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come true within a minute")


def error(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """The error object of a response that must have this status and reason."""
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["reason"] == reason, found
    assert found["message"]
    assert {"field", "hint"} <= found.keys()
    return found
