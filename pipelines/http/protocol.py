"""uvicorn's HTTP/1.1 protocol, bounded where it is open: the head of a request, and connections."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.http.body import too_slow
from plinth.pipelines.http.errors import Stop, body_of, error_response, status_of
from plinth.pipelines.http.fast_path import Exchange, Express
from plinth.pipelines.http.head_cache import END, Head, Heads

MAX_HEAD = 64 << 10
"""Bytes of request line and headers, counted in whole reads."""

FULL = Stop(
    "too many connections are open",
    reason="too_many_connections",
    hint="keep connections alive and use fewer, or raise serve.max_connections",
    headers={"connection": "close", "retry-after": "1"},
)
LINGER = 0.5
"""Seconds an idle connection stays open while the server drains: its client may just be sending."""

TOO_LARGE = Stop(
    f"the head of the request is larger than {MAX_HEAD:,} bytes",
    reason="head_too_large",
    hint="send large things in the body",
)
BROKEN = Stop("this is not HTTP/1.1", reason="malformed_http", hint="check the client")


class Protocol(HttpToolsProtocol):
    """One connection, which ends when the client keeps it waiting for the request timeout.

    A head must come whole in that time, and a client must not stop reading for as long.

    Args:
        settings: ``config.serve``.
        lanes: express lanes by the URL they begin at.
        heads: what is known of the heads of their requests; shared by all connections.
        options: those of uvicorn.
    """

    def __init__(
        self,
        settings: ServeConfig,
        lanes: Mapping[bytes, Express],
        heads: Heads,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._lanes = lanes
        self._heads = heads
        self._data = b""
        self._quiet_since = 0.0
        self._exchange: Exchange | None = None
        self.default_headers = self.server_state.default_headers
        self._most = settings.max_connections
        self._patience = settings.request_timeout_seconds
        self._head: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._unread: asyncio.TimerHandle | None = None
        self._begun = False
        self._draining = False
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; too many connections are answered, but with a refusal."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self._most:
            self.app, self._lanes, self._heads = error_response(FULL), {}, Heads()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_is_there()
        if self._linger is not None:
            self._linger.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server drains: answer what is on its way, and then close.

        An idle connection lingers. Closed at once, it would reset the requests that its client
        sent while it was being closed: with hundreds of requests a second there is always one.
        """
        self._draining = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif not self._begun:
            self._linger = self.loop.call_later(LINGER, self._leave)

    def _leave(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if self._begun or not idle or self.transport.is_closing():
            return
        if not _has_bytes(self.transport):
            self.transport.close()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._unread = self.loop.call_later(self._patience, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse, unless the head is known or grows without end."""
        self._data = b""
        if not self._begun and (self.cycle is None or self.cycle.response_complete):
            cut = data.find(END) + len(END)
            known = self._heads.find(data[:cut])
            if known is not None and len(data) == cut + known.length:
                self._head_is_there()
                exchange = self._exchange_of(known, data[cut:])
                exchange.more_body = False
                known.lane.take(exchange)
                return
            self._data = data
        super().data_received(data)
        if self._head is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._begun = True
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is whole; what answers a POST here is sent whole, and so in one write."""
        data, self._data = self._data, b""
        lane = self._lanes.get(self.url)
        if (
            lane is not None
            and self.parser.get_method() == b"POST"
            and (self.cycle is None or self.cycle.response_complete)
        ):
            head = lane.head(dict(self.headers), self.parser.should_keep_alive())
            if head is not None:
                # The timer goes on: the few bytes of the body are as good as part of the head.
                self._head_bytes = 0
                self._heads.learn(data, head)
                self._exchange = self._exchange_of(head)
                return
        self._head_is_there()
        super().on_headers_complete()
        if self._draining:
            self.cycle.keep_alive = False
        if self.scope["method"] == "POST" and not self.expect_100_continue:
            together: Any = _Together(self.transport)
            self.cycle.transport = together

    def _exchange_of(self, head: Head, body: bytes = b"") -> Exchange:
        exchange: Any = Exchange(self, head, body)
        if self._draining:
            exchange.keep_alive = False
        self.cycle = exchange
        return cast(Exchange, exchange)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._begun = False
        self._head_is_there()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer is written: let the next request come, for as long as connections are kept.

        The timer of a kept connection is not set anew for each request; it looks, when it goes
        off, how long it has been quiet.
        """
        self._quiet_since = self.loop.time()
        if self.timeout_keep_alive_task is None or self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it has been quiet for long enough."""
        self.timeout_keep_alive_task = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # the end of its answer sets the timer again
        left = self._quiet_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0:
            super().timeout_keep_alive_handler()
            return
        self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed."""
        self._refuse(BROKEN)

    def _await_head(self) -> None:
        self._head_is_there()
        self._head_bytes = 0
        self._head = self.loop.call_later(self._patience, self._give_up)

    def _head_is_there(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _give_up(self) -> None:
        self._head = None
        if self._exchange is not None and not self._exchange.taken:
            self._refuse(too_slow(self._patience))
        self.transport.close()

    def _refuse(self, error: Stop) -> None:
        self._head_is_there()
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": body_of(error)})
        self.transport.write(
            STATUS_LINE[status_of(error)]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()


def _has_bytes(transport: asyncio.Transport) -> bool:
    """Whether the client has sent something that nobody has read yet."""
    try:
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as same:
            return bool(same.recv(1, socket.MSG_PEEK))
    except OSError:  # nothing there
        return False


class _Together:
    """The transport of one answer: its head waits for its body, so that one write sends both.

    Two writes are two packets and wake the client twice: a tenth of a request's CPU.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self._begun = False
        self.is_closing = transport.is_closing
        self.close = transport.close

    def write(self, data: bytes) -> None:
        if not self._begun:
            self._begun, self._head = True, data
            return
        if self._head is not None:
            data, self._head = self._head + data, None
        self._transport.write(data)
