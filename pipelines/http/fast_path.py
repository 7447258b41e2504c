"""The express lane of a record route: from the socket to ``vertical.infer`` without ASGI between.

A POST of one JSON object to a record route takes this lane; everything else goes through the
app. Requests that arrive in the same turn of the event loop are inferred together. The lane
knows how long the loop's turns take, so a request's deadline counts from when it may have
arrived, not from when Python got round to reading it; what cannot be in time is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Protocol

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from plinth.engine import Answer, Cancelled, DeadlineRefused, InputError, PlinthError, Sla
from plinth.pipelines.http.admission import Turn
from plinth.pipelines.http.app import DRAINED, Gate
from plinth.pipelines.http.body import media_type
from plinth.pipelines.http.disconnect import timed_out
from plinth.pipelines.http.errors import error_response, internal_error
from plinth.pipelines.http.head_cache import Head
from plinth.pipelines.http.metrics import HTTP
from plinth.pipelines.http.records import (
    DEADLINE_HEADER,
    JSON,
    RecordDoor,
    about_models,
    late_at_door,
    timing_json,
)

MAX_BODY = 32 << 10
"""Bytes; larger bodies go through the app, which reads them piece by piece."""

_GROUP = 32  # requests inferred together: more would wait for each other's parsing
_TURN_SHARE = 0.25  # of the promise that one turn of the loop may take
_STALE = 0.005  # seconds of age that are worth a shorter promise
_DEADLINE = DEADLINE_HEADER.encode()
_OK = b"%b%bx-plinth-timing: %b\r\ncontent-length: %d\r\n\r\n%b"
_JSON_TYPE = (b"content-type", b"application/json")
_LATE = b"x-plinth-late: true\r\n"


class Connection(Protocol):
    """What the lane needs of the connection a request came on."""

    transport: asyncio.Transport
    default_headers: list[tuple[bytes, bytes]]
    tasks: set[asyncio.Task[None]]

    def on_response_complete(self) -> None:
        """The answer has been written; the next request may come."""
        ...


class Exchange:
    """One request and its answer, in the place of uvicorn's request-response cycle.

    Args:
        connection: where it came from.
        head: what its head means.
        body: of the request, as far as it came.
    """

    __slots__ = (
        *("age", "body", "connection", "disconnected", "gone", "group", "head", "keep_alive"),
        *("more_body", "read", "response_complete", "taken"),
    )

    def __init__(self, connection: Connection, head: Head, body: bytes = b"") -> None:
        self.connection = connection
        self.head = head
        self.keep_alive = head.keep_alive
        self.body = body
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self.taken = False
        self.read = self.age = 0.0
        self.group: Group | None = None
        self.gone: asyncio.Event | None = None

    @property
    def message_event(self) -> Exchange:
        """What uvicorn sets when something happened."""
        return self

    def set(self) -> None:
        """uvicorn says: the body grew, is complete, or the client has left."""
        if self.disconnected:
            if self.group is not None:
                self.group.leave()
            if self.gone is not None:
                self.gone.set()
        elif not self.more_body and not self.taken:
            self.head.lane.take(self)

    async def receive(self) -> dict[str, Any]:
        """As an ASGI app would be told: that the client has left."""
        self.gone = asyncio.Event()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def write(self, answer: bytes) -> None:
        """Write the whole answer at once."""
        transport = self.connection.transport
        if self.keep_alive:
            transport.write(answer)
            return
        status, _, rest = answer.partition(b"\r\n")
        transport.write(status + b"\r\nconnection: close\r\n" + rest)
        transport.close()


class Group:
    """Requests inferred together, for as long as one of their clients is there."""

    __slots__ = ("left", "sla", "task", "waiting")

    def __init__(self, sla: Sla) -> None:
        self.sla = sla
        self.waiting: list[tuple[Exchange, Any, float]] = []
        self.left = 0
        self.task: asyncio.Task[None] | None = None

    def leave(self) -> None:
        """A client has gone."""
        self.left += 1
        if self.left == len(self.waiting) and self.task is not None:
            self.task.cancel()


class Express:
    """The express lane of one record route.

    Args:
        gate: keeps the key, the bounds and the metrics.
        door: the route.
    """

    def __init__(self, gate: Gate, door: RecordDoor) -> None:
        self._gate = gate
        self._door = door
        self._groups: dict[float | None, Group] = {}
        self._turn = Turn()
        self._refused: tuple[float, int, int, float] | None = None
        self._refusal = b""

    def head(self, headers: dict[bytes, bytes], keep_alive: bool) -> Head | None:
        """What a head means, or ``None`` if its request may not take the lane.

        It may with a short body whose length is known.
        """
        door, length = self._door, headers.get(b"content-length", b"")
        if (
            not length.isdigit()
            or int(length) > min(MAX_BODY, door.config.max_body_bytes)
            or b"expect" in headers
            or b"upgrade" in headers
            or door.vertical.heavy
        ):
            return None
        sla, error = door.sla, None
        try:
            media_type(headers, JSON)
            sla = door.promise(headers.get(_DEADLINE))
        except PlinthError as wrong:
            error = wrong
        return Head(self, headers, int(length), keep_alive, sla, error)

    def take(self, exchange: Exchange) -> None:
        """Parse a whole request and let it wait for the end of this turn of the loop."""
        exchange.taken = True
        exchange.read = time.perf_counter()
        gate, door, turn, head = self._gate, self._door, self._turn, exchange.head
        gate.in_work += 1
        exchange.age = turn.age(exchange.read)
        sla = head.sla
        refusal = gate.refusal(door.path, head.headers.items()) or head.error
        if refusal is not None:
            self._fail((exchange,), refusal)
            return
        too_late = self._too_late(exchange, sla)
        if too_late is not None:
            self._finish(exchange, 503, too_late)
            return
        body = bytes(exchange.body)
        if body[:1] != b"{" and body.lstrip()[:1] != b"{":
            _start(self._alone(exchange, body, sla), exchange)
            return
        try:
            record = door.vertical.parse(body)
        except PlinthError as error:
            self._fail((exchange,), error)
            return
        except Exception as error:  # noqa: BLE001 - answered with 500, and logged
            self._answer((exchange,), internal_error(error))
            return
        turn.taken += 1
        group = self._groups.get(sla.deadline_ms)
        if group is None:
            if not self._groups:
                asyncio.get_running_loop().call_soon(self._flush)
            group = self._groups[sla.deadline_ms] = Group(sla)
        exchange.group = group
        group.waiting.append((exchange, record, time.perf_counter()))
        if len(group.waiting) >= _GROUP:
            self._launch(self._groups.pop(sla.deadline_ms))

    def _too_late(self, exchange: Exchange, sla: Sla) -> bytes | None:
        """The answer to what this process has no time to serve, before work is put into it.

        It is the same for all of one millisecond: under overload it must cost next to nothing.
        """
        if sla.deadline_ms is None:
            return None
        turn, allowed, age = self._turn, sla.deadline_ms / 1e3, exchange.age
        ahead = turn.taken * turn.cost
        if age + ahead <= allowed and ahead <= _TURN_SHARE * allowed:
            return None
        key = turn.begun, turn.taken, int(age * 1e3), sla.deadline_ms
        if key != self._refused:
            error = DeadlineRefused(
                f"{turn.taken} requests are ahead in this process, and {age * 1e3:.0f} ms "
                f"of the {sla.deadline_ms:g} ms have passed",
                predicted=age + ahead,
                deadline=allowed,
                rows_ahead=turn.taken,
                retry_after=ahead,
            )
            self._refused, self._refusal = key, _whole(exchange, error_response(error))
        return self._refusal

    def _flush(self) -> None:
        groups, self._groups = self._groups, {}
        for group in groups.values():
            self._launch(group)

    def _launch(self, group: Group) -> None:
        group.task = _start(self._infer(group), group.waiting[0][0])

    async def _infer(self, group: Group) -> None:
        door, sla = self._door, group.sla
        exchanges = [exchange for exchange, _, _ in group.waiting]
        age = max(exchange.age for exchange in exchanges)
        if sla.deadline_ms is not None and age > _STALE:
            left = max(sla.deadline_ms - age * 1e3, 0.001)
            sla = dataclasses.replace(sla, deadline_ms=left)
        try:
            flow = door.vertical.infer([record for _, record, _ in group.waiting])
            async with asyncio.timeout(door.config.request_timeout_seconds):
                answer = await door.engine.run_async(flow, sla)
        except PlinthError as error:
            self._fail(exchanges, error)
        except TimeoutError:
            self._fail(exchanges, timed_out(door.config.request_timeout_seconds))
        except asyncio.CancelledError:
            drained = self._gate.health.drain_until is not None and group.left < len(group.waiting)
            self._fail(exchanges, DRAINED if drained else Cancelled("the client went away"))
        except Exception as error:  # noqa: BLE001 - answered with 500, and logged
            self._answer(exchanges, internal_error(error))
        else:
            self._deliver(group, answer)

    def _deliver(self, group: Group, answer: Answer[list[Any]]) -> None:
        encode, timing, late = self._door.vertical.encode, answer.timing, answer.late
        begun = time.perf_counter()
        first, _, parsed = group.waiting[0]
        timing.co_batched = timing.device - (timing.device - timing.co_batched) / len(group.waiting)
        common = _head(first.connection, 200, (_JSON_TYPE, *about_models(answer)))
        for (exchange, _, read), result in zip(group.waiting, answer.value, strict=True):
            if isinstance(result, InputError):
                self._fail((exchange,), result)
                continue
            encoding = time.perf_counter()
            content = encode(result)
            now = time.perf_counter()
            timing.decode, timing.encode = read - exchange.read, now - encoding
            timing.total = now - exchange.read
            told = _LATE if late or late_at_door(answer, group.sla, exchange.age) else b""
            self._finish(
                exchange,
                200,
                _OK % (common, told, timing_json(timing), len(content), content),
            )
        writing = time.perf_counter() - begun
        self._turn.served(len(group.waiting), parsed - first.read, writing)

    async def _alone(self, exchange: Exchange, body: bytes, sla: Sla) -> None:
        """What is no single object: a list of records, or a mistake."""
        try:
            response = await self._door.respond(exchange.receive, body, sla, exchange.read)
        except PlinthError as error:
            response = error_response(error)
        except asyncio.CancelledError:
            response = error_response(DRAINED)
        except Exception as error:  # noqa: BLE001 - answered with 500, and logged
            response = internal_error(error)
        self._answer((exchange,), response)

    def _fail(self, exchanges: Iterable[Exchange], error: PlinthError) -> None:
        self._answer(exchanges, error_response(error))

    def _answer(self, exchanges: Iterable[Exchange], response: Response) -> None:
        """Give the same answer to all."""
        whole = b""
        for exchange in exchanges:
            whole = whole or _whole(exchange, response)
            self._finish(exchange, response.status_code, whole)

    def _finish(self, exchange: Exchange, status: int, answer: bytes) -> None:
        if exchange.disconnected:
            status = 0
        else:
            exchange.write(answer)
        exchange.response_complete = True
        exchange.group = None  # a cycle would be left to the garbage collector
        exchange.connection.on_response_complete()
        self._gate.in_work -= 1
        HTTP.note(self._door.path, status, time.perf_counter() - exchange.read)


def _head(connection: Connection, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Status line and headers, without the empty line at their end."""
    parts = [STATUS_LINE[status]]
    for name, value in (*connection.default_headers, *headers):
        parts += (name, b": ", value, b"\r\n")
    return b"".join(parts)


def _whole(exchange: Exchange, response: Response) -> bytes:
    """A response as it goes to the socket."""
    head = _head(exchange.connection, response.status_code, response.raw_headers)
    return head + b"\r\n" + bytes(response.body)


def _start(work: Coroutine[Any, Any, None], exchange: Exchange) -> asyncio.Task[None]:
    """Run a task that a draining server waits for."""
    tasks = exchange.connection.tasks
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
