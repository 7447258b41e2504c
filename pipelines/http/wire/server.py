"""The sockets' server: one epoll set for all connections, inside the asyncio event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from plinth.pipelines.http.wire.admission import TURN, WHILE_BLOCKED, Limit, ReadyQueue
from plinth.pipelines.http.wire.connection import CLOSED, HEAD, LINGERING, Connection, Exchange
from plinth.pipelines.http.wire.head import BadRequest
from plinth.pipelines.http.wire.tls import TlsFiles

log = logging.getLogger("plinth.serve")

SURPLUS = 32
"""Connections beyond the bound that are kept for a second, to answer whether the server lives."""
DRAIN_LINGER = 0.5
"""Seconds an idle connection stays open while the server drains: its client may just be sending."""
_BACKLOG = 4096
_EVENTS = 4096
_ACCEPTS = 64  # connections accepted in one turn
_SWEEP = 0.25  # seconds between two looks for connections whose time is up
_AGAIN = 0.5  # seconds until accepting is tried again without file descriptors
_TICK = 0.002  # seconds between two turns while nothing can be begun
_LEFT = select.EPOLLHUP | select.EPOLLERR
_WATCHED = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Application(Protocol):
    """What answers the requests."""

    def request(self, exchange: Exchange) -> None:
        """A head is whole: refuse the request, collect its body, or stream it."""
        ...

    def end_of_turn(self) -> None:
        """All that could be read in this turn of the loop was read."""
        ...

    def stale(self, path: bytes, arrived: float) -> bytes | None:
        """The refusal of a POST to this path which has waited, or ``None``: it must be read."""
        ...

    def error(self, error: BadRequest) -> bytes:
        """The whole answer to what is no request."""
        ...

    def cancel(self) -> None:
        """The time to drain is over: answer what is left with a refusal."""
        ...


@dataclass(frozen=True)
class Bounds:
    """What a client may take.

    Args:
        connections: open at once.
        request_seconds: for a head, for a body, and for a client to take its answer.
        keep_alive_seconds: idle before a connection closes.
        promise: seconds; the tightest of what is served, ``None`` without one.
    """

    connections: int
    request_seconds: float
    keep_alive_seconds: float
    promise: float | None = None


class SocketServer:
    """Accepts, reads and closes; what a request means is the application's.

    Args:
        listener: bound.
        application: answers.
        limit: how many requests may be in work.
        bounds: on clients.
        tls: the certificate, if connections have one.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        listener: socket.socket,
        application: Application,
        limit: Limit,
        bounds: Bounds,
        tls: TlsFiles | None = None,
    ) -> None:
        self._tls = tls
        self.request_seconds = bounds.request_seconds
        self.keep_alive_seconds = bounds.keep_alive_seconds
        self.draining = False
        self.request = application.request
        self.error = application.error
        self.stale = application.stale
        self._application = application
        self._listener = listener
        self._limit = limit
        self._most = bounds.connections
        self._connections: dict[int, Connection] = {}
        self._surplus: deque[Connection] = deque()
        self._busy: deque[Connection] = deque()
        self._ready = ReadyQueue(bounds.promise)
        self._turn_due = False
        self._emptied: asyncio.Event | None = None

    # -- life --------------------------------------------------------------------------------
    def start(self) -> None:
        """Listen, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._emptied = asyncio.Event()
        self._epoll = select.epoll()
        self._limit.freed = self.room_again
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._loop.add_reader(self._epoll.fileno(), self._turn)
        self._sweeper = self._loop.call_later(self._sweep_seconds(), self._sweep)

    async def drain(self, seconds: float) -> None:
        """Take no new connection, answer what was accepted, close.

        Args:
            seconds: until what is not answered is refused.
        """
        assert self._emptied is not None
        with contextlib.suppress(ValueError, OSError):  # it was taken off for lack of files
            self._epoll.unregister(self._listener.fileno())
        while self._accept() == _ACCEPTS:
            pass
        self._listener.close()
        self.draining = True
        linger = self.clock() + DRAIN_LINGER
        for connection in self._connections.values():
            if connection.idle:
                connection.expires = min(connection.expires, linger)
        self._sweeper.cancel()
        self._sweep()
        for patience in (seconds, 1.0):
            if not self._connections:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), patience)
                break
            self._application.cancel()
        self.stop()

    def stop(self) -> None:
        """Close everything at once."""
        self._sweeper.cancel()
        for connection in list(self._connections.values()):
            connection.close()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._listener.close()

    # -- what connections ask ----------------------------------------------------------------
    def wake(self, connection: Connection) -> None:
        """Read the connection soon, if there is something to read."""
        if not connection.queued and connection.wants_read:
            self._enqueue(connection, self.clock())
            self._turn_soon()

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.pop(connection.fd, None)
        if not self._connections and self._emptied is not None and self.draining:
            self._emptied.set()

    def room_again(self) -> None:
        """Requests were answered: others may be begun."""
        if self._ready:
            self._turn_soon()

    # -- turns -------------------------------------------------------------------------------
    def _turn_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._due_turn)

    def _due_turn(self) -> None:
        self._turn_due = False
        if not self._epoll.closed:
            self._turn()

    def _turn(self) -> None:
        """Note who has bytes, then read those whose turn it is."""
        now = self.clock()
        self._poll(now)
        for _ in range(min(len(self._busy), TURN)):
            connection = self._busy.popleft()
            connection.queued = False
            if connection.wants_read:
                connection.read()
        ready = self._ready
        count = 0
        while count < TURN and self._limit.room > 0:
            found = ready.next(now)
            if found is None:
                break
            found.read()
            count += 1
        rest = 0.0
        if ready:
            ready.begun(count)
            rest = self._read_stale(now)
        self._application.end_of_turn()
        if self._busy or (ready and self._limit.room > 0):
            self._turn_soon()
        elif ready and not self._turn_due:
            self._turn_due = True
            self._loop.call_later(rest, self._due_turn)

    def _read_stale(self, now: float) -> float:
        """Read those who have waited for too long; seconds until there is time for more."""
        blocked = self._limit.room < 1
        for _ in range(TURN):
            found = self._ready.next_stale(now, blocked)
            if found is None:
                break
            found.read_stale()
        spent = self.clock() - now
        return max(_TICK, spent * (1 / WHILE_BLOCKED - 1))

    def _poll(self, now: float) -> None:
        connections = self._connections
        for fd, event in self._epoll.poll(0, _EVENTS):
            connection = connections.get(fd)
            if connection is None:
                if fd == self._listener.fileno():
                    self._accept()
                continue
            if event & select.EPOLLOUT and connection.unsent:
                connection.flush()
            if event & _LEFT and connection.state != LINGERING:
                connection.close()
                continue
            if event & select.EPOLLRDHUP:
                connection.parted(now)
            if event & select.EPOLLIN:
                connection.readable = True
                if not connection.queued and connection.wants_read:
                    self._enqueue(connection, now)

    def _enqueue(self, connection: Connection, now: float) -> None:
        if connection.state == HEAD:
            self._ready.add(connection, now)
        else:
            connection.queued = True
            self._busy.append(connection)

    def _accept(self) -> int:
        for count in range(_ACCEPTS):
            try:
                plug, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return count
            except OSError as error:
                log.error("cannot accept connections: %s", error.strerror)
                self._epoll.unregister(self._listener.fileno())
                self._loop.call_later(_AGAIN, self._accept_again)
                return count
            self._take(plug)
        return _ACCEPTS

    def _accept_again(self) -> None:
        if not self.draining:
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)

    def _take(self, plug: socket.socket) -> None:
        plug.setblocking(False)
        with contextlib.suppress(OSError):  # the client has left already
            plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        surplus = len(self._connections) >= self._most
        wrapped = plug if self._tls is None else self._tls.wrap(plug)
        connection = Connection(wrapped, self, surplus)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, _WATCHED)
        if surplus:
            self._surplus.append(connection)
            while len(self._surplus) > SURPLUS:
                self._surplus.popleft().close()

    # -- time --------------------------------------------------------------------------------
    def _sweep_seconds(self) -> float:
        return min(_SWEEP, self.request_seconds / 4)

    def _sweep(self) -> None:
        """Look for connections whose time is up."""
        now = self.clock()
        for connection in list(self._connections.values()):
            if connection.expires <= now:
                connection.expire(self._too_slow)
        while self._surplus and self._surplus[0].state == CLOSED:
            self._surplus.popleft()
        self._sweeper = self._loop.call_later(self._sweep_seconds(), self._sweep)

    def _too_slow(self) -> bytes:
        return self.error(
            BadRequest(f"the body did not come within {self.request_seconds:g} s", "body_too_slow")
        )
