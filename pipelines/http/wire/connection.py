"""One connection: bytes in, one request at a time, bytes out, every wait bounded."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any, Protocol

from plinth.pipelines.http.wire.chunked import ChunkedBody
from plinth.pipelines.http.wire.head import (
    END,
    BadRequest,
    ParsedHead,
    check_beginning,
    empty_lines,
    known_head,
    plain_post,
)
from plinth.pipelines.http.wire.tls import TlsSocket

READ = 64 << 10
"""Bytes read at once, and the most that is kept of what follows a request."""
MAX_UNSENT = 256 << 10
"""Bytes of answers kept for a client that does not read; a producer waits above it."""
DISCARD = 64 << 10
"""Bytes of a body nobody wants that are read all the same, so that its connection can be kept."""
LINGER = 1.0
"""Seconds a closed connection may still send: closing over unread bytes would reset the answer."""
LINGER_BYTES = 256 << 10
"""Bytes it may still send."""
MIN_RATE = 64 << 10
"""Bytes per second that a streamed body must keep up on average, after its first grace."""

PARTING = 0.05
"""Seconds in the queue after which a client that ends its side has given up."""

HEAD, BODY, ANSWER, LINGERING, CLOSED = range(5)
"""What a connection waits for: a request, its body, its answer, the client's last bytes."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
Sink = Callable[[bytes, bool], None]
"""Takes a piece of a body, and whether it was the last."""


class Host(Protocol):
    """What a connection needs of the server it belongs to."""

    request_seconds: float
    keep_alive_seconds: float
    draining: bool

    def clock(self) -> float:
        """Seconds, monotonic."""
        ...

    def wake(self, connection: Connection) -> None:
        """Read the connection soon."""
        ...

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        ...

    def request(self, exchange: Exchange) -> None:
        """A head is whole: say what becomes of the request."""
        ...

    def stale(self, path: bytes, arrived: float) -> bytes | None:
        """The refusal of a POST to this path which has waited, or ``None``: it must be read."""
        ...

    def error(self, error: BadRequest) -> bytes:
        """The whole answer to what is no request."""
        ...


class Exchange:
    """One request and its answer.

    Args:
        connection: where it came from.
        head: of the request.
        arrived: when the request was there to be read, on the server's clock.
        began: when it was read.
    """

    __slots__ = (
        *("arrived", "began", "closing", "complete", "connection", "discarding", "ended"),
        *("gone", "head", "sla", "started", "surplus", "who", "caller"),
    )

    def __init__(
        self, connection: Connection, head: ParsedHead, arrived: float, began: float
    ) -> None:
        self.connection: Connection | None = connection
        self.head = head
        self.arrived = arrived
        self.began = began
        self.complete = head.length == 0
        self.started = self.closing = self.discarding = self.ended = False
        self.gone: Callable[[], None] | None = None
        self.surplus = connection.surplus
        self.sla: Any = None
        self.who = ""
        self.caller: Any = None

    def collect(self, limit: int, then: Callable[[Exchange, bytes], None]) -> None:
        """Read the whole body, at most ``limit`` bytes, then call ``then``."""
        if self.connection is not None:
            self.connection.collect(self, limit, then)

    def stream(self, limit: int, sink: Sink) -> None:
        """Give the body to ``sink`` piece by piece, at most ``limit`` bytes."""
        if self.connection is not None:
            self.connection.stream(self, limit, sink)

    def swallow(self) -> None:
        """Read past a body nobody wants, so that the connection can carry the next request."""
        length = self.head.length
        if self.connection is not None and (length is None or length <= DISCARD):
            self.discarding = True
            self.stream(DISCARD, lambda part, last: None)

    def refuse(self, answer: bytes) -> None:
        """Answer without a look at the body."""
        if self.connection is not None:
            self.connection.discard(self, answer)

    def respond(self, answer: bytes) -> None:
        """Send a whole answer: head and body."""
        connection = self.connection
        if connection is None:
            self.ended = True
            return
        if not connection.keeps(self):
            self.closing = True
            status, _, rest = answer.partition(b"\r\n")
            answer = status + b"\r\nconnection: close\r\n" + rest
        connection.write(answer)
        self.end()

    def end(self) -> None:
        """The answer is complete: the connection may carry the next request."""
        connection, self.connection = self.connection, None
        self.gone, self.ended = None, True
        if connection is not None:
            connection.answered(self)

    def lost(self) -> None:
        """The client has left."""
        self.connection = None
        gone, self.gone = self.gone, None
        if gone is not None:
            gone()


class Connection:
    """A client's connection, read only when the server says so.

    Args:
        plug: accepted, non-blocking.
        host: the server.
        surplus: it is one too many, kept for a question after the server's health.
    """

    __slots__ = (
        *("_body", "_buffer", "_closing", "_exchange", "_out", "_partial", "_paused", "_since"),
        *("arrived", "expires", "fd", "host", "plug", "queued", "readable", "state", "surplus"),
        *("drained", "_parted"),
    )

    def __init__(self, plug: socket.socket | TlsSocket, host: Host, surplus: bool = False) -> None:
        self.plug = plug
        self.fd = plug.fileno()
        self.host = host
        self.surplus = surplus
        self.state = HEAD
        self.readable = self.queued = False
        self.arrived = self._since = host.clock()
        self.expires = self._since + (1.0 if surplus else host.request_seconds)
        self.drained: Callable[[], None] | None = None
        self._buffer = b""  # came after what is being answered
        self._partial = b""  # of a head
        self._out = b""
        self._body: _Body | None = None
        self._exchange: Exchange | None = None
        self._closing = self._paused = self._parted = False

    @property
    def wants_read(self) -> bool:
        """Whether bytes of the client would be looked at now; not while it owes us reading."""
        return self.state in (HEAD, BODY, LINGERING) and not self._out and not self._paused

    @property
    def idle(self) -> bool:
        """Whether it waits for a request of which nothing has come."""
        return self.state == HEAD and not self._buffer and not self._partial

    @property
    def plain(self) -> bool:
        """Whether it is without TLS."""
        return isinstance(self.plug, socket.socket)

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken."""
        return len(self._out)

    # -- reading -----------------------------------------------------------------------------
    def read(self) -> None:
        """Read once and do what that asks for."""
        if self._buffer and self.state != LINGERING:
            data, self._buffer = self._buffer, b""
        else:
            data = self._receive()
        if self.state == LINGERING:
            self._linger(len(data))
        elif data:
            self._feed(data)
        if self.readable:
            self.host.wake(self)

    def _linger(self, count: int) -> None:
        self._since += count  # bytes, now that no time is counted
        if self._since > LINGER_BYTES:
            self.close()

    def read_stale(self) -> None:
        """As :meth:`read`, for a request that waited long: refuse it at next to no cost."""
        fresh = self.state == HEAD and not self._buffer and not self._partial
        if not fresh or self.surplus or self.host.draining:
            self.read()
            return
        data = self._receive()
        path = plain_post(data)
        answer = None if path is None else self.host.stale(path, self.arrived)
        if answer is not None:
            self._since = 0.0
            self.expires = self.host.clock() + self.host.keep_alive_seconds
            self.write(answer)
        elif data:
            self._feed(data)
        if self.readable:
            self.host.wake(self)

    def parted(self, now: float) -> None:
        """The client sends no more: it said all it had to say, or it has left.

        The two look alike, so what it sent is still answered (RFC 9112, section 9.6), but no work
        is done for one that has left: an interim answer (RFC 9110, section 15.2), which half a
        connection takes, makes a closed one say so. Who waited long in the queue has given up.

        Args:
            now: seconds, on the server's clock.
        """
        self._parted = True
        if self.state == HEAD and (now - self.arrived > PARTING if self.queued else self._spoke()):
            self.close()
            return
        asked = self._exchange
        if asked is None or self.state != ANSWER or self._out:
            return
        if asked.head.minor and not asked.started:
            self.write(_CONTINUE)

    def _spoke(self) -> bool:
        """Whether all that the client sent was read."""
        try:
            return not self._buffer and not self.plug.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _receive(self) -> bytes:
        """What is there, at most :data:`READ` bytes; the end of the connection closes it."""
        try:
            data = self.plug.recv(READ)
        except (BlockingIOError, InterruptedError):
            self.readable = False
            return b""
        except OSError:
            data = b""
        if not data:
            self.close()
        self.readable = self._parted or len(data) == READ
        return data

    def _feed(self, data: bytes) -> None:
        try:
            while data:
                if self.state == HEAD:
                    data = self._head(data)
                elif self.state == BODY:
                    assert self._body is not None
                    data = self._body.feed(data)
                else:
                    self._buffer = data if self.state == ANSWER else b""
                    return
        except BadRequest as error:
            self._fail(self.host.error(error))

    def _head(self, data: bytes) -> bytes:
        known = len(self._partial)
        if known:
            data, self._partial = self._partial + data, b""
        if data[:2] == b"\r\n":  # RFC 9112, section 2.2: empty lines before a request
            data, known = data[empty_lines(data) :], 0
        cut = data.find(END, max(0, known - 3))
        if cut < 0 or cut > READ:
            if not data or data == b"\r":
                self._partial = data
                return b""
            check_beginning(data, known)
            if not self._since:
                self._since = self.host.clock()
                self.expires = self._since + self.host.request_seconds
            self._partial = data
            return b""
        now = self.host.clock()
        exchange = Exchange(self, known_head(data[: cut + 2]), self.arrived, now)
        self._exchange = exchange
        self._since = now
        self.expires = now + self.host.request_seconds
        self.state = ANSWER
        self._buffer = data[cut + 4 :]
        self.host.request(exchange)
        return b""

    def collect(
        self, exchange: Exchange, limit: int, then: Callable[[Exchange, bytes], None]
    ) -> None:
        """See :meth:`Exchange.collect`."""
        length = exchange.head.length
        if length is not None and length <= len(self._buffer) and length <= limit:
            body, self._buffer = self._buffer[:length], self._buffer[length:]
            exchange.complete = True
            then(exchange, body)
            return
        parts: list[bytes] = []

        def sink(part: bytes, last: bool) -> None:
            parts.append(part)
            if last:
                then(exchange, b"".join(parts))

        self._expect(exchange, limit, sink, 0)

    def stream(self, exchange: Exchange, limit: int, sink: Sink) -> None:
        """See :meth:`Exchange.stream`."""
        if exchange.complete:
            sink(b"", True)
            return
        self._expect(exchange, limit, sink, MIN_RATE)

    def _expect(self, exchange: Exchange, limit: int, sink: Sink, rate: int) -> None:
        length = exchange.head.length
        if length is not None and length > limit:
            raise BadRequest(f"the body is larger than {limit:,} bytes", "body_too_large")
        self._body = _Body(self, exchange, limit, sink, rate)
        self.state = BODY
        if exchange.head.expects_continue and not self._buffer:
            self.write(_CONTINUE)
        if self._buffer:
            data, self._buffer = self._buffer, b""
            self._feed(data)
        if self.readable:
            self.host.wake(self)

    def discard(self, exchange: Exchange, answer: bytes) -> None:
        """See :meth:`Exchange.refuse`: a short body is read past, a long one ends it all."""
        length = exchange.head.length
        if length is not None and 0 < length <= len(self._buffer):
            self._buffer = self._buffer[length:]
            exchange.complete = True
        if (
            exchange.complete
            or length is None
            or length > DISCARD
            or exchange.head.expects_continue
        ):
            exchange.respond(answer)
        else:

            def sink(part: bytes, last: bool) -> None:
                if last:
                    exchange.respond(answer)

            self._expect(exchange, DISCARD, sink, 0)
            exchange.gone = None

    def body_ended(self, exchange: Exchange) -> None:
        """The whole body is here; what follows waits for the answer."""
        exchange.complete = True
        self._body = None
        self.state = ANSWER
        if exchange.ended:
            self.answered(exchange)

    def progressed(self, seen: int, rate: int) -> None:
        """A streamed body earns time with its bytes."""
        if rate:
            self.expires = self._since + self.host.request_seconds + seen / rate

    def pause(self, paused: bool) -> None:
        """Stop reading the body, or go on."""
        self._paused = paused
        if not paused:
            self.expires = max(self.expires, self.host.clock() + self.host.request_seconds)
            self.host.wake(self)

    # -- writing -----------------------------------------------------------------------------
    def write(self, data: bytes) -> None:
        """Send now what the client takes, and the rest when it takes more."""
        if self.state == CLOSED:
            return
        if self._out:
            self._out += data
            return
        try:
            sent = self.plug.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent < len(data):
            self._out = data[sent:]
            self.expires = self.host.clock() + self.host.request_seconds

    def flush(self) -> None:
        """The client may take more."""
        if not self._out:
            return
        try:
            sent = self.plug.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        self._out = self._out[sent:]
        if self._out:
            return
        idle = self.state == HEAD
        patience = self.host.keep_alive_seconds if idle else self.host.request_seconds
        self.expires = self.host.clock() + patience
        if self.drained is not None:
            self.drained()
        if self._closing:
            self._shut()
        else:
            self.host.wake(self)

    def keeps(self, exchange: Exchange) -> bool:
        """Whether the connection may carry another request after this answer."""
        return (
            exchange.head.keep_alive
            and (exchange.complete or exchange.discarding)
            and not exchange.closing
            and not self.host.draining
            and not self.surplus
        )

    def answered(self, exchange: Exchange) -> None:
        """The answer is written: on to the next request, or to the end."""
        if self._exchange is not exchange or self.state == CLOSED:
            return
        if exchange.discarding and not exchange.complete and self.state == BODY:
            return  # what is left of the body is read past first
        self._exchange = None
        if not self.keeps(exchange):
            self._shut()
            return
        self.state = HEAD
        self._since = 0.0
        self._paused = False
        if not self._out:
            self.expires = self.host.clock() + self.host.keep_alive_seconds
        if self._buffer or self.readable:
            self.host.wake(self)

    def _fail(self, answer: bytes) -> None:
        """Answer what ends the connection."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.started:  # no second answer inside the first
            exchange.lost()
            self.close()
            return
        status, _, rest = answer.partition(b"\r\n")
        self.write(status + b"\r\nconnection: close\r\n" + rest)
        if exchange is not None:
            exchange.lost()
        self._shut()

    # -- ending ------------------------------------------------------------------------------
    def expire(self, too_slow: Callable[[], bytes]) -> None:
        """Its time is up: whatever it waits for did not come."""
        if self._out:
            self.close()
        elif self.state == BODY and not self._paused:
            self._fail(too_slow())
        elif self.state == LINGERING:
            self.close()
        elif self.state == HEAD:
            if self.idle:
                self.read()  # a request may have come just now
            if self.state == HEAD and not self.unsent:
                self.close()

    def _shut(self) -> None:
        """End in order: what was written arrives even if the client is still sending."""
        if self.state in (CLOSED, LINGERING):
            return
        if self._out:
            self._closing = True
            return
        self._buffer, self._partial, self._body = b"", b"", None
        self.state = LINGERING
        self._since = 0.0
        self.expires = self.host.clock() + LINGER
        with contextlib.suppress(OSError):
            self.plug.shutdown(socket.SHUT_WR)
        self.read()

    def close(self) -> None:
        """End at once."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        exchange, self._exchange = self._exchange, None
        self._out = self._buffer = self._partial = b""
        self._body = None
        self.host.forget(self)
        self.plug.close()
        if self.drained is not None:
            self.drained()
        if exchange is not None:
            exchange.lost()


class _Body:
    """The body of one request on its way to a sink."""

    __slots__ = ("_chunked", "_connection", "_exchange", "_limit", "_rate", "_seen", "_sink")

    def __init__(
        self, connection: Connection, exchange: Exchange, limit: int, sink: Sink, rate: int
    ) -> None:
        self._connection = connection
        self._exchange = exchange
        self._limit = limit
        self._sink = sink
        self._rate = rate
        self._seen = 0
        self._chunked = ChunkedBody() if exchange.head.length is None else None

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body; the rest is returned."""
        if self._chunked is not None:
            part, rest = self._chunked.feed(data)
            last = self._chunked.done
        else:
            length = self._exchange.head.length or 0
            left = length - self._seen
            part, rest = data[:left], data[left:]
            last = len(part) == left
        self._seen += len(part)
        if self._seen > self._limit:
            raise BadRequest(f"the body is larger than {self._limit:,} bytes", "body_too_large")
        self._connection.progressed(self._seen, self._rate)
        if last:
            self._connection.body_ended(self._exchange)
        if part or last:
            self._sink(part, last)
        return rest
