"""One process of the load generator: sends requests when they are due, over HTTP/1.1.

Connections are kept alive and carry one request at a time. A request that is due while all of
them are busy waits here, and its time runs from when it was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import math
import os
import re
import socket
import ssl
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import httptools

PENDING, OK, REFUSED, ERROR, TIMEOUT, UNSENT = range(6)
"""What became of a request; ``PENDING`` is replaced before the end."""

_SWEEP = 0.02  # seconds between two looks for requests whose time is up
_AGAIN = 0.05  # seconds until a refused connection is tried again
_WHOLE = re.compile(
    rb"HTTP/1\.1 (\d{3})[^\r\n]*\r\n"
    rb"(?:(?!connection:|transfer-encoding:)[^\r\n]+\r\n)*?content-length: *(\d+)\r\n"
    rb"(?:(?!connection:|transfer-encoding:)[^\r\n]+\r\n)*\r\n",
    re.IGNORECASE,
)
"""The head of an answer that needs no parser if its body came with it."""
ENGINE = re.compile(
    rb'x-plinth-timing:[^\r\n]*"queue_ms": ?([\d.]+), ?"device_ms": ?([\d.]+)', re.I
)
"""What an answer of Plinth says of its time in the engine."""
_ACCEPT = 0.0002  # seconds a server may need to accept a connection
_SPREAD = 0x9E3779B97F4A7C15  # odd: numbers that follow one another look unlike
_TOGETHER = 64  # connections opened at once, so that no backlog overflows


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they are.

    Args:
        host: name or address.
        port: TCP port.
        tls: speak TLS.
        requests: whole requests, head and body, sent in turn.
        connections: how many are kept open.
        timeout: seconds from when a request was due until it is given up.
        id_at: where 16 hexadecimal digits stand that differ in each request; ``None``: nowhere.
        pool_seconds: longest wait for a free connection.
    """

    host: str
    port: int
    tls: bool
    requests: tuple[bytes, ...]
    connections: int
    timeout: float
    id_at: int | None = None
    pool_seconds: float = math.inf


@dataclass(slots=True)
class Record:
    """What one process measured; times in seconds, one entry a request, in order of ``due``.

    Args:
        latency: from when the request was due to its whole answer; nan without one.
        lag: from when it was due until this process came to look at it.
        waited: from then until a connection was free; nan if it was never sent.
        outside: the latency less what the answer says of its time in the engine: door, network and
            this client; nan where it says nothing.
        outcome: ``OK`` ... ``UNSENT``.
        status: HTTP status of the answer, 0 without one.
        failures: what went wrong and how often, in words.
        refused_blind: refusals (429 or 503) that did not say when to try again.
        cpu: CPU seconds this process spent while it sent.
        connects: connections opened after the first ones.
    """

    latency: array[float]
    lag: array[float]
    waited: array[float]
    outside: array[float]
    outcome: bytearray
    status: array[int]
    failures: Counter[str] = field(default_factory=Counter)
    refused_blind: int = 0
    cpu: float = 0.0
    connects: int = 0


class _Connection(asyncio.Protocol):
    """One connection; ``number`` is the request on the wire, -1 when there is none."""

    __slots__ = ("_client", "_first", "_headed", "_parser", "_transport", "number")

    def __init__(self, client: Client) -> None:
        self._client = client
        self.number = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._parser = httptools.HttpResponseParser(self)
        self._first = b""
        self._headed = False
        plug: socket.socket | None = transport.get_extra_info("socket")
        if plug is not None:
            with contextlib.suppress(OSError):  # a Unix socket has no such option
                plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.free(self)

    def send(self, number: int, request: bytes) -> None:
        self.number = number
        self._first = b""
        self._headed = False
        self._transport.write(request)

    def abort(self) -> None:
        self.number = -1
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._first:
            whole = _WHOLE.match(data)
            if whole and whole.end() + int(whole[2]) == len(data) and whole[1] >= b"200":
                self._first = data
                self._answered(int(whole[1]))
                self._first = b""
                self._client.free(self)
                return
            self._first = data
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lose(f"not HTTP/1.1: {error}")
            self._transport.abort()

    def on_headers_complete(self) -> None:
        self._headed = True

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            return
        self._answered(status)
        if self._parser.should_keep_alive():
            self._client.free(self)
        else:
            self._transport.close()

    def _answered(self, status: int) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            self._client.answered(self, number, status, self._first)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.number >= 0 and exc is None and self._ends_here():
            self._answered(self._parser.get_status_code())
        self._lose(str(exc) if exc else "the server closed the connection instead of answering")
        self._client.lost(self)

    def _ends_here(self) -> bool:
        """Whether the end of the connection is the end of the answer (RFC 9112, section 6.3)."""
        head = self._first.lower()
        sized = b"\r\ncontent-length:" in head or b"\r\ntransfer-encoding:" in head
        return self._headed and not sized

    def _lose(self, why: str) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            self._client.failed(self, number, why)


class _Alarm:
    """Calls back at a time of ``perf_counter``.

    The timers of event loops round to a millisecond; on Linux a timerfd does not.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._file = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._file = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._file >= 0:
            loop.add_reader(self._file, self._ring)
            self._spec = (ctypes.c_long * 4)()  # interval s, ns; first expiry s, ns

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew since it rang
            os.read(self._file, 8)
        self._callback()

    def set(self, at: float) -> None:
        """Ring at ``at`` (seconds of ``perf_counter``) instead of any time before."""
        if self._file < 0:
            self._loop.call_later(max(0.0, at - time.perf_counter()), self._callback)
            return
        seconds = int(at)
        self._spec[2], self._spec[3] = seconds, max(1, int((at - seconds) * 1e9))
        self._libc.timerfd_settime(self._file, 1, self._spec, None)  # 1: absolute time

    def close(self) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)


class Client:
    """Sends requests at given times and notes what becomes of each.

    Args:
        target: where to and what.
        due: seconds after the start, ascending, one a request.
        first: number of the first request among those of all processes, picks its body.
        stride: how many processes share the requests.
    """

    def __init__(
        self, target: Target, due: Sequence[float], first: int = 0, stride: int = 1
    ) -> None:
        self._target = target
        self._due = list(due)
        self._requests = [
            target.requests[(first + stride * number) % len(target.requests)]
            for number in range(min(len(due), len(target.requests)))
        ]
        count = len(self._due)
        self.record = Record(
            latency=array("d", [float("nan")]) * count,
            lag=array("d", [0.0]) * count,
            waited=array("d", [float("nan")]) * count,
            outside=array("d", [float("nan")]) * count,
            outcome=bytearray(count),
            status=array("H", [0]) * count,
        )
        self._idle: deque[_Connection] = deque()
        self._busy: dict[_Connection, None] = {}
        self._waiting: deque[int] = deque()
        self._next = 0
        self._left = count
        self._running = False

    async def connect(self) -> None:
        """Open the connections.

        Raises:
            OSError: the server takes none.
        """
        self._loop = asyncio.get_running_loop()
        self._done = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        for begin in range(0, self._target.connections, _TOGETHER):
            count = min(_TOGETHER, self._target.connections - begin)
            await asyncio.gather(*(self._open() for _ in range(count)))
        # A connection is open before the server has accepted it: let it take them all in.
        await asyncio.sleep(_ACCEPT * self._target.connections)

    async def run(self) -> Record:
        """Send every request and wait until each is answered or given up."""
        with _quiet():
            cpu = time.process_time()
            start = time.perf_counter() + 0.01
            self._due = [start + seconds for seconds in self._due]
            self._running = True
            self._alarm = _Alarm(self._loop, self._send_due)
            self._send_due()
            self._sweep()
            if self._left:
                await self._done
            self._running = False
            self.record.cpu = time.process_time() - cpu
        self._alarm.close()
        for task in self._tasks:
            task.cancel()
        for connection in (*self._idle, *self._busy):
            connection.abort()
        return self.record

    # -- sending -----------------------------------------------------------------------------
    def _send_due(self) -> None:
        now = time.perf_counter()
        due, number = self._due, self._next
        while number < len(due) and due[number] <= now:
            self.record.lag[number] = now - due[number]
            self._waiting.append(number)
            number += 1
        self._next = number
        self._match()
        if number < len(due):
            self._alarm.set(due[number])

    def _match(self) -> None:
        """Give waiting requests to idle connections, the longest idle first."""
        self._give_up_waiting()
        while self._waiting and self._idle:
            number, connection = self._waiting.popleft(), self._idle.popleft()
            self._busy[connection] = None
            seen = self._due[number] + self.record.lag[number]
            self.record.waited[number] = max(0.0, time.perf_counter() - seen)
            connection.send(number, self._request(number))

    def _request(self, number: int) -> bytes:
        request, at = self._requests[number % len(self._requests)], self._target.id_at
        if at is None:
            return request
        return b"%b%016x%b" % (request[:at], number * _SPREAD % (1 << 64), request[at + 16 :])

    def _give_up_waiting(self) -> None:
        """Give up what has waited for a connection for too long."""
        over = time.perf_counter() - min(self._target.timeout, self._target.pool_seconds)
        while self._waiting and self._due[self._waiting[0]] < over:
            self._settle(self._waiting.popleft(), UNSENT)

    def _sweep(self) -> None:
        """Give up what has waited or been on its way for too long."""
        if not self._running:
            return
        self._give_up_waiting()
        over = time.perf_counter() - self._target.timeout
        for connection in [c for c in self._busy if self._due[c.number] < over]:
            del self._busy[connection]
            self._settle(connection.number, TIMEOUT)
            connection.abort()
        self._loop.call_later(_SWEEP, self._sweep)

    # -- what connections tell ---------------------------------------------------------------
    def free(self, connection: _Connection) -> None:
        """The connection can carry a request."""
        self._idle.append(connection)
        if self._waiting:
            self._match()

    def answered(self, connection: _Connection, number: int, status: int, first: bytes) -> None:
        """The whole answer is here; ``first`` begins with its head."""
        record = self.record
        record.latency[number] = time.perf_counter() - self._due[number]
        record.status[number] = status
        self._busy.pop(connection, None)
        if 200 <= status < 300:
            outcome = OK
            if told := ENGINE.search(first):
                engine = (float(told[1]) + float(told[2])) / 1e3
                record.outside[number] = record.latency[number] - engine
        elif status in (429, 503):
            outcome = REFUSED
            record.refused_blind += b"\r\nretry-after:" not in first.lower()
        else:
            outcome = ERROR
            record.failures[f"HTTP {status}"] += 1
        self._settle(number, outcome)

    def failed(self, connection: _Connection, number: int, why: str) -> None:
        """The connection broke before the answer."""
        self._busy.pop(connection, None)
        self.record.failures[why] += 1
        self._settle(number, ERROR)

    def lost(self, connection: _Connection) -> None:
        """The connection is gone; open another."""
        self._busy.pop(connection, None)
        with contextlib.suppress(ValueError):  # it was not idle
            self._idle.remove(connection)
        if self._running:
            self.record.connects += 1
            task = self._loop.create_task(self._reopen())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _settle(self, number: int, outcome: int) -> None:
        self.record.outcome[number] = outcome
        self._left -= 1
        if not self._left and not self._done.done():
            self._done.set_result(None)

    async def _open(self) -> None:
        target = self._target
        context = ssl.create_default_context() if target.tls else None
        await self._loop.create_connection(
            lambda: _Connection(self), target.host, target.port, ssl=context
        )

    async def _reopen(self) -> None:
        while self._running:
            try:
                await self._open()
                return
            except OSError as error:
                self.record.failures[f"cannot connect: {error}"] += 1
                await asyncio.sleep(_AGAIN)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection: its pauses would be taken for the server's."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
