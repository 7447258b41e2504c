"""An ASGI application behind a connection: everything but the record routes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from plinth.pipelines.http.wire import answer
from plinth.pipelines.http.wire.connection import MAX_UNSENT, Exchange

Message = MutableMapping[str, Any]
Asgi = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
_QUEUED = 256 << 10  # bytes of a body that wait for the application
_BODILESS = (204, 304)


class AsgiExchange:
    """Drives an ASGI application for one request (ASGI 3.0, HTTP specification 2.4).

    Args:
        exchange: whose body nobody has read.
        limit: bytes of the body.

    Attributes:
        models: that ran for the answer, with their versions.
    """

    def __init__(self, exchange: Exchange, limit: int) -> None:
        self._exchange = exchange
        self._limit = limit
        self._parts: deque[bytes] = deque()
        self._queued = 0
        self._last = exchange.complete
        self._told = self._gone = False
        self._reading = exchange.complete
        self._changed = asyncio.Event()
        self._head: bytes | None = None
        self._status = 0
        self.models, self.timing = "", b""
        self._chunked = self._ended = False
        exchange.gone = self._left

    @property
    def status(self) -> int:
        """Status of the answer, 0 while there is none."""
        return self._status

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self._ended

    def scope(self) -> dict[str, Any]:
        """The ASGI scope of the request."""
        head = self._exchange.head
        connection = self._exchange.connection
        try:
            here = connection.plug.getsockname()[:2] if connection else None
            client = connection.plug.getpeername()[:2] if connection else None
        except OSError:
            here = client = None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": f"1.{head.minor}",
            "method": head.method.decode("ascii"),
            "scheme": "http" if connection is None or connection.plain else "https",
            "path": unquote(head.path.decode("ascii")),
            "raw_path": head.path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.pairs,
            "server": here,
            "client": client,
            "state": {
                "waited": self._exchange.began - self._exchange.arrived,
                "caller": self._exchange.caller,
            },
        }

    # -- the body ----------------------------------------------------------------------------
    async def receive(self) -> Message:
        """The next piece of the body, then word that the client has left."""
        if not self._reading:
            self._reading = True
            self._exchange.stream(self._limit, self._piece)
        while not (self._parts or self._gone or (self._last and not self._told)):
            self._changed.clear()
            await self._changed.wait()
        if self._parts or (self._last and not self._told and not self._gone):
            return self._next()
        return {"type": "http.disconnect"}

    def _next(self) -> Message:
        part = b"".join(self._parts)
        self._parts.clear()
        if self._queued >= _QUEUED and self._exchange.connection is not None:
            self._exchange.connection.pause(False)
        self._queued = 0
        self._told = self._last
        return {"type": "http.request", "body": part, "more_body": not self._last}

    def _piece(self, part: bytes, last: bool) -> None:
        if part:
            self._parts.append(part)
            self._queued += len(part)
        self._last = last
        if self._queued >= _QUEUED and not last and self._exchange.connection is not None:
            self._exchange.connection.pause(True)
        self._changed.set()

    def _left(self) -> None:
        self._gone = True
        self._changed.set()

    # -- the answer --------------------------------------------------------------------------
    async def send(self, message: Message) -> None:
        """Take a message of the application; waits while the client does not read.

        Raises:
            OSError: the client has left.
        """
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._start(message)
        elif message["type"] == "http.response.body":
            self._write(message.get("body", b""), message.get("more_body", False))
            await self._taken()
        if self._exchange.connection is None and not self._ended:
            raise OSError("the client has left")

    def _start(self, message: Message) -> None:
        self._status = message["status"]
        fields = [(bytes(n).lower(), bytes(v)) for n, v in message.get("headers", ())]
        about = dict(fields)
        self.models = about.get(b"x-plinth-models", b"").decode("latin-1")
        self.timing = about.get(b"x-plinth-timing", b"")
        exchange, connection = self._exchange, self._exchange.connection
        sized = self._status in _BODILESS or any(name == b"content-length" for name, _ in fields)
        self._chunked = not sized and exchange.head.minor == 1
        if self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        if not self._reading:
            self._reading = True
            exchange.swallow()
        if connection is not None and not connection.keeps(exchange):
            exchange.closing = True
            fields.append((b"connection", b"close"))
        self._head = answer.head(self._status, fields) + b"\r\n"

    def _write(self, body: bytes, more: bool) -> None:
        connection = self._exchange.connection
        if connection is None:
            self._ended = not more
            return
        if self._exchange.head.method == b"HEAD" or self._status in _BODILESS:
            body = b""
        elif self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body += b"" if more else b"0\r\n\r\n"
        data, self._head = (self._head or b"") + body, None
        if data:
            self._exchange.started = True
            connection.write(data)
        if not more:
            self._ended = True
            self._exchange.end()

    async def _taken(self) -> None:
        """Wait until the client has taken most of what was sent."""
        connection = self._exchange.connection
        if connection is None or connection.unsent <= MAX_UNSENT:
            return
        drained = asyncio.Event()
        connection.drained = drained.set
        try:
            await drained.wait()
        finally:
            connection.drained = None

    def abandon(self) -> None:
        """End an answer that broke off in the middle: the client must not take it for whole."""
        connection = self._exchange.connection
        if connection is not None:
            connection.close()
