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
from collections.abc import Coroutine
from typing import Any, Protocol

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from engine import Answer, Cancelled, DeadlineRefused, InputError, PlinthError, Sla
from pipelines.http_body import media_type
from pipelines.http_common import DRAINED, Gate
from pipelines.http_errors import error_response, internal_error
from pipelines.http_records import DEADLINE_HEADER, JSON, RecordDoor, answer_headers, late_at_door
from pipelines.http_watch import timed_out

MAX_BODY = 32 << 10
"""Bytes; larger bodies go through the app, which reads them piece by piece."""

_GROUP = 32  # requests inferred together: more would wait for each other's parsing
_TURN_SHARE = 0.25  # of the promise that one turn of the loop may take
_STALE = 0.005  # seconds of age that are worth a shorter promise
_REST = 0.0002  # seconds without anything to do after which a loop counts as idle
_DEADLINE = DEADLINE_HEADER.encode()


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
        lane: where it goes.
        headers: of the request.
        keep_alive: whether the connection stays open.
    """

    __slots__ = (
        *("age", "body", "connection", "disconnected", "gone", "group", "headers", "keep_alive"),
        *("lane", "message_event", "more_body", "read", "response_complete", "taken"),
    )

    def __init__(
        self, connection: Connection, lane: Express, headers: dict[bytes, bytes], keep_alive: bool
    ) -> None:
        self.connection = connection
        self.lane = lane
        self.headers = headers
        self.keep_alive = keep_alive
        self.body = b""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self.message_event = self
        self.taken = False
        self.read = self.age = 0.0
        self.group: Group | None = None
        self.gone: asyncio.Event | None = None

    def set(self) -> None:
        """uvicorn says: the body grew, is complete, or the client has left."""
        if self.disconnected:
            if self.group is not None:
                self.group.leave()
            if self.gone is not None:
                self.gone.set()
        elif not self.more_body and not self.taken:
            self.taken = True
            self.lane.take(self)

    async def receive(self) -> dict[str, Any]:
        """As an ASGI app would be told: that the client has left."""
        self.gone = asyncio.Event()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Write the whole answer at once."""
        parts = [STATUS_LINE[status]]
        for name, value in (*self.connection.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        transport = self.connection.transport
        transport.write(b"".join(parts))
        if not self.keep_alive:
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
        self._turn = _Turn()

    def fits(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request may take the lane: a short body whose length is known."""
        length = headers.get(b"content-length", b"")
        return (
            length.isdigit()
            and int(length) <= min(MAX_BODY, self._door.config.max_body_bytes)
            and b"expect" not in headers
            and not self._door.vertical.heavy
        )

    def take(self, exchange: Exchange) -> None:
        """Parse a whole request and let it wait for the end of this turn of the loop."""
        exchange.read = time.perf_counter()
        self._gate.in_work += 1
        turn = self._turn
        exchange.age = turn.age(exchange.read)
        try:
            refusal = self._gate.refusal(self._door.path, exchange.headers.items())
            if refusal is not None:
                raise refusal
            media_type(exchange.headers, JSON)
            sla = self._door.promise(exchange.headers.get(_DEADLINE))
            self._shed(exchange, sla)
            body = bytes(exchange.body)
            if body[:1] != b"{" and body.lstrip()[:1] != b"{":
                _start(self._alone(exchange, body, sla), exchange)
                return
            record = self._door.vertical.parse(body)
        except PlinthError as error:
            self._fail(exchange, error)
            return
        except Exception as error:  # noqa: BLE001 - answered with 500, and logged
            self._answer(exchange, internal_error(error))
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

    def _shed(self, exchange: Exchange, sla: Sla) -> None:
        """Refuse what this process has no time to serve, before work is put into it."""
        if sla.deadline_ms is None:
            return
        turn, allowed = self._turn, sla.deadline_ms / 1e3
        ahead = turn.taken * turn.cost
        if exchange.age + ahead > allowed or ahead > _TURN_SHARE * allowed:
            raise DeadlineRefused(
                f"{turn.taken} requests are ahead in this process, and {exchange.age * 1e3:.0f} ms "
                f"of the {sla.deadline_ms:g} ms have passed",
                predicted=exchange.age + ahead,
                deadline=allowed,
                rows_ahead=turn.taken,
                retry_after=ahead,
            )

    def _flush(self) -> None:
        groups, self._groups = self._groups, {}
        for group in groups.values():
            self._launch(group)

    def _launch(self, group: Group) -> None:
        group.task = _start(self._infer(group), group.waiting[0][0])

    async def _infer(self, group: Group) -> None:
        door, sla = self._door, group.sla
        age = max(exchange.age for exchange, _, _ in group.waiting)
        if sla.deadline_ms is not None and age > _STALE:
            left = max(sla.deadline_ms - age * 1e3, 0.001)
            sla = dataclasses.replace(sla, deadline_ms=left)
        try:
            flow = door.vertical.infer([record for _, record, _ in group.waiting])
            async with asyncio.timeout(door.config.request_timeout_seconds):
                answer = await door.engine.run_async(flow, sla)
        except PlinthError as error:
            self._fail_all(group, error)
        except TimeoutError:
            self._fail_all(group, timed_out(door.config.request_timeout_seconds))
        except asyncio.CancelledError:
            drained = self._gate.health.drain_until is not None and group.left < len(group.waiting)
            self._fail_all(group, DRAINED if drained else Cancelled("the client went away"))
        except Exception as error:  # noqa: BLE001 - answered with 500, and logged
            for exchange, _, _ in group.waiting:
                self._answer(exchange, internal_error(error))
        else:
            self._deliver(group, answer)

    def _deliver(self, group: Group, answer: Answer[list[Any]]) -> None:
        door, timing = self._door, answer.timing
        begun = time.perf_counter()
        for (exchange, _, parsed), result in zip(group.waiting, answer.value, strict=True):
            if isinstance(result, InputError):
                self._fail(exchange, result)
                continue
            encoding = time.perf_counter()
            content = door.vertical.encode(result)
            now = time.perf_counter()
            timing.decode, timing.encode = parsed - exchange.read, now - encoding
            timing.total = now - exchange.read + exchange.age
            answer.late = answer.late or late_at_door(answer, group.sla)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(content)),
                *answer_headers(answer),
            ]
            self._finish(exchange, 200, headers, content)
        first, _, parsed = group.waiting[0]
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
        self._answer(exchange, response)

    def _fail_all(self, group: Group, error: PlinthError) -> None:
        for exchange, _, _ in group.waiting:
            self._fail(exchange, error)

    def _fail(self, exchange: Exchange, error: PlinthError) -> None:
        self._answer(exchange, error_response(error))

    def _answer(self, exchange: Exchange, response: Response) -> None:
        self._finish(exchange, response.status_code, response.raw_headers, bytes(response.body))

    def _finish(
        self, exchange: Exchange, status: int, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        if exchange.disconnected:
            status = 0
        else:
            exchange.respond(status, headers, body)
        exchange.response_complete = True
        exchange.connection.on_response_complete()
        self._gate.in_work -= 1
        self._gate.note(self._door.path, status, time.perf_counter() - exchange.read)


def _start(work: Coroutine[Any, Any, None], exchange: Exchange) -> asyncio.Task[None]:
    """Run a task that a draining server waits for."""
    tasks = exchange.connection.tasks
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


class _Turn:
    """The turns of the event loop, as the requests that are read in them see them.

    Sockets are asked once a turn. A loop that was idle read a request as it came; in a loop
    that never rested, it may have waited since the sockets were asked the time before.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.cost = 50e-6
        self._begun = self._active = 0.0
        self._waited = 0.0
        self._open = False

    def age(self, now: float) -> float:
        """Seconds that a request read now may have waited in its socket, at most."""
        if not self._open:
            self._open = True
            self._waited = now - self._begun if now - self._active < _REST else 0.0
            self._begun, self.taken = now, 0
            asyncio.get_running_loop().call_soon(self._close)
        self._active = now
        return self._waited + now - self._begun

    def served(self, count: int, reading: float, writing: float) -> None:
        """Answers were written: what reading one and writing all took the loop (seconds)."""
        self.cost += 0.05 * (reading + writing / count - self.cost)
        self._active = time.perf_counter()

    def _close(self) -> None:
        self._open = False
