"""The record routes, ``POST /v1/<vertical>/<action>``: from a connection to the engine and back.

Requests that are read in the same turn of the event loop run together. A request's deadline
counts from when its bytes were there, not from when they were read; what cannot be in time is
refused before its body is looked at.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Coroutine, Iterable
from typing import Any

import orjson

from plinth.engine import (
    Answer,
    Cancelled,
    Closed,
    DeadlineRefused,
    InputError,
    PlinthError,
    QueueFull,
    Sla,
    Timing,
)
from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.http.body import media_type, refuse_packed
from plinth.pipelines.http.disconnect import timed_out
from plinth.pipelines.http.errors import answer_of, body_of, error_bytes
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.metrics import HTTP
from plinth.pipelines.http.wire import answer as wire_answer
from plinth.pipelines.http.wire.admission import FLOOR, Limit
from plinth.pipelines.http.wire.connection import Exchange
from plinth.pipelines.http.wire.head import Fields
from plinth.pipelines.identity.request_log import RequestLog
from plinth.pipelines.observability.tracing import Tracing
from plinth.pipelines.records import (
    FAULTS,
    Part,
    RecordService,
    Reply,
    explained,
    late_at_door,
    pairs,
)

DEADLINE_HEADER = "x-slo-deadline-ms"
TIMING_FIELD = b"x-plinth-timing"
BUSY = QueueFull("too many requests are in work", retry_after=1.0)
DRAINED = Closed("the server has shut down before this was finished", retry_after=5.0)

_JSON = ("application/json",)
_DEADLINE = DEADLINE_HEADER.encode()
_GROUP = 32  # records run together: more would wait for each other's parsing
_STALE = 0.005  # seconds of waiting that are worth a shorter promise
_LONG = 2 / 3  # share of the promise after which an answer took long
_SLOW = 1 / 8  # share of the promise after which a batch is slow
_TAKES = 0.4  # share of the promise that serving is thought to take at most
_TYPE = (b"content-type", b"application/json")
_OK = b"%b%bx-plinth-timing: %b\r\ncontent-length: %d\r\n\r\n%b"
_LATE = b"x-plinth-late: true\r\n"
_TIMING = (
    b'{"decode_ms":%.3f,"queue_ms":%.3f,"device_ms":%.3f,"co_batched_ms":%.3f,'
    b'"encode_ms":%.3f,"total_ms":%.3f,"batch_rows":%d}'
)


class Group:
    """Requests that run together, for as long as one of their clients is there."""

    __slots__ = ("left", "sla", "task", "waiting")

    def __init__(self, sla: Sla) -> None:
        self.sla = sla
        self.waiting: list[tuple[Exchange, Any, float]] = []
        self.left = 0
        self.task: asyncio.Task[None] | None = None

    def leave(self) -> None:
        """A client has gone; when all have, nobody waits for the work."""
        self.left += 1
        if self.left == len(self.waiting) and self.task is not None:
            self.task.cancel()


class RecordRoute:
    """One record vertical behind its path.

    Args:
        service: parses, runs, encodes.
        config: bounds.
        limit: of requests in work.
        health: tells what is cut off by the end of draining.
        requests: the log of requests, if there is one.
        tracing: told of each request, if there is any.
    """

    def __init__(
        self,
        service: RecordService,
        config: ServeConfig,
        limit: Limit,
        health: Health,
        requests: RequestLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._log = requests
        self._tracing = tracing
        self.service = service
        self.path = f"/v1/{service.vertical.name}/{service.vertical.action}"
        self._max_body = config.max_body_bytes
        self._limit = limit
        self._health = health
        self._groups: dict[float | None, Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        due = service.sla.deadline_ms
        HTTP.promise(self.path, None if due is None else due / 1e3)
        self._seconds = 0.0
        self._refused: tuple[int, float] | None = None
        self._refusal = self._busy_bytes = b""
        self._busy_at = 0

    # -- taking requests -----------------------------------------------------------------------
    def begin(self, exchange: Exchange) -> None:
        """Read a request, or refuse it by its head."""
        try:
            sla = self.promise(exchange.head.fields)
        except PlinthError as error:
            self._refuse(exchange, *error_bytes(error))
            return
        waited = exchange.began - exchange.arrived
        if self._limit.room < 1:
            self._refuse(exchange, 429, self._busy())
        elif waited > _STALE and self._misses(sla, waited):
            self._refuse(exchange, 503, self._too_late(waited, sla.deadline_ms or 0.0))
        else:
            exchange.sla = sla
            exchange.collect(self._max_body, self._take)

    def stale(self, arrived: float) -> bytes | None:
        """The refusal of a request that has waited, if it is hopeless or cannot be begun."""
        sla, now = self.service.sla, time.perf_counter()
        if self._limit.room < 1:
            status, whole = 429, self._busy()
        elif self._misses(sla, now - arrived):
            status, whole = 503, self._too_late(now - arrived, sla.deadline_ms or 0.0)
        else:
            return None
        HTTP.note(self.path, status, now - arrived)
        return whole

    def _misses(self, sla: Sla, waited: float) -> bool:
        """Whether a request would be late if it took as long as others did from here on.

        What others took counts for less than half of the promise, so that fresh requests are
        always served and the estimate can fall again.
        """
        if sla.deadline_ms is None:
            return False
        allowed = sla.deadline_ms / 1e3
        return waited + min(self._seconds, _TAKES * allowed) > allowed

    def promise(self, fields: Fields) -> Sla:
        """The promise of a request with these fields.

        Raises:
            HttpError: ``unsupported_media_type``.
            InputError: the deadline is no number of milliseconds.
        """
        if fields.get(b"content-type") != b"application/json":
            media_type(fields, _JSON)
        if b"content-encoding" in fields:
            refuse_packed(fields)
        given = fields.get(_DEADLINE)
        if given is None:
            return self.service.sla
        try:
            return self.service.promise(given)
        except InputError:
            raise InputError(
                f"{DEADLINE_HEADER}: expected milliseconds, above 0 and below a day",
                field=DEADLINE_HEADER,
                hint="send a number such as 25",
                reason="bad_header",
            ) from None

    def _take(self, exchange: Exchange, body: bytes) -> None:
        """Parse a whole request and let it wait for the end of this turn of the loop."""
        sla: Sla = exchange.sla
        self._limit.begin()
        if self.service.vertical.heavy or (body[:1] != b"{" and body.lstrip()[:1] != b"{"):
            self._alone(exchange, body, sla)
            return
        try:
            record = self.service.parse(body)
        except PlinthError as error:
            self._fail((exchange,), error)
            return
        group = self._groups.get(sla.deadline_ms)
        if group is None:
            group = self._groups[sla.deadline_ms] = Group(sla)
        exchange.gone = group.leave
        group.waiting.append((exchange, record, time.perf_counter()))
        if len(group.waiting) >= _GROUP:
            self._launch(self._groups.pop(sla.deadline_ms))

    def end_of_turn(self) -> None:
        """Run what was taken in this turn."""
        if self._groups:
            groups, self._groups = self._groups, {}
            for group in groups.values():
                self._launch(group)

    def cancel(self) -> None:
        """Answer what is left with a refusal: the time to drain is over."""
        for task in list(self._tasks):
            task.cancel()

    # -- records that run together ---------------------------------------------------------------
    def _launch(self, group: Group) -> None:
        group.task = self._start(self._infer(group))
        if group.left == len(group.waiting):
            group.task.cancel()

    async def _infer(self, group: Group) -> None:
        exchanges = [exchange for exchange, _, _ in group.waiting]
        sla = _less(group.sla, max(one.began - one.arrived for one in exchanges))
        try:
            async with asyncio.timeout(self.service.seconds):
                parts = await self.service.infer([record for _, record, _ in group.waiting], sla)
        except TimeoutError:
            self._fail(exchanges, timed_out(self.service.seconds))
        except asyncio.CancelledError:
            drained = self._health.drain_until is not None and group.left < len(exchanges)
            self._fail(exchanges, DRAINED if drained else Cancelled("the client went away"))
        except PlinthError as error:
            self._fail(exchanges, error)
        else:
            try:
                self._deliver(group, parts)
            except FAULTS as error:
                left = [exchange for exchange in exchanges if not exchange.ended]
                self._fail(left, explained(error))

    def _deliver(self, group: Group, parts: list[Part]) -> None:
        first = 0
        for part in parts:
            waiting = group.waiting[first : first + part.count]
            first += part.count
            if part.answer is not None:
                self._succeed(waiting, part.answer, group.sla)
            elif part.error is not None:
                self._fail([exchange for exchange, _, _ in waiting], part.error)

    def _succeed(
        self, waiting: list[tuple[Exchange, Any, float]], answer: Answer[list[Any]], sla: Sla
    ) -> None:
        encode, timing = self.service.encode, answer.timing
        promise = math.inf if sla.deadline_ms is None else sla.deadline_ms / 1e3
        slow = timing.device > _SLOW * promise
        self._limit.floor = max(FLOOR, 2 * timing.batch_rows) if slow else FLOOR
        timing.co_batched = timing.device - (timing.device - timing.co_batched) / len(waiting)
        about = about_models(answer)
        common, models = wire_answer.head(200, (_TYPE, *about)), about[0][1]
        for (exchange, _, parsed), result in zip(waiting, answer.value, strict=True):
            encoding = time.perf_counter()
            content = encode(result)
            if isinstance(content, PlinthError):
                self._fail((exchange,), content)
                continue
            now = time.perf_counter()
            timing.decode, timing.encode = parsed - exchange.began, now - encoding
            timing.total = now - exchange.arrived
            late = answer.late or late_at_door(answer, sla, timing.total)
            told = timing_json(timing)
            whole = _OK % (common, _LATE if late else b"", told, len(content), content)
            long = now - exchange.began > _LONG * promise
            self._finish(exchange, 200, whole, long, models, told)
        self._seconds += 0.1 * (time.perf_counter() - waiting[0][0].began - self._seconds)

    # -- requests that run alone -----------------------------------------------------------------
    def _alone(self, exchange: Exchange, body: bytes, sla: Sla) -> None:
        task = self._start(self._answer(exchange, body, sla))
        exchange.gone = task.cancel  # type: ignore[assignment]

    async def _answer(self, exchange: Exchange, body: bytes, sla: Sla) -> None:
        """A list of records, a heavy vertical's, or a mistake."""
        try:
            async with asyncio.timeout(self.service.seconds):
                status, fields, content = await self.respond(body, sla, exchange.arrived)
        except TimeoutError:
            status, fields, content = answer_of(timed_out(self.service.seconds))
        except asyncio.CancelledError:
            status, fields, content = answer_of(DRAINED)
        except FAULTS as error:
            status, fields, content = answer_of(explained(error))
        length = (b"content-length", b"%d" % len(content))
        whole = wire_answer.whole(status, [*fields, length], content)
        about = dict(fields)
        models = about.get(b"x-plinth-models", b"")
        self._finish(exchange, status, whole, False, models, about.get(TIMING_FIELD, b""))

    async def respond(
        self, body: bytes, sla: Sla, arrived: float
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, fields and body of the answer to one object or a list of them.

        Raises:
            PlinthError: the request as a whole is wrong or refused.
        """
        start = body.lstrip()[:1]
        if not start:
            raise InputError(
                "the body is empty", hint="send one JSON object", reason="malformed_json"
            )
        if start == b"[":
            reply = await self.service.answer(self.service.split(body), sla, arrived)
            return 200, answer_fields(reply.answer), _document(reply)
        reply = await self.service.answer([body], sla, arrived)
        outcome = reply.outcomes[0]
        if isinstance(outcome, PlinthError):
            return answer_of(outcome)
        return 200, answer_fields(reply.answer), outcome

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- answers -----------------------------------------------------------------------------------
    def _too_late(self, waited: float, deadline_ms: float) -> bytes:
        """A refusal, which is the same for all of one millisecond: it must cost next to nothing."""
        key = int(waited * 1e3), deadline_ms
        if key != self._refused:
            error = DeadlineRefused(
                f"{self._limit.in_work} requests are ahead in this process, and "
                f"{waited * 1e3:.0f} ms of the {deadline_ms:g} ms have passed",
                predicted=waited + self._seconds,
                deadline=deadline_ms / 1e3,
                rows_ahead=self._limit.in_work,
                retry_after=self._seconds,
            )
            self._refused, self._refusal = key, error_bytes(error)[1]
        return self._refusal

    def _busy(self) -> bytes:
        second = int(time.time())
        if second != self._busy_at:
            self._busy_at, self._busy_bytes = second, error_bytes(BUSY)[1]
        return self._busy_bytes

    def _refuse(self, exchange: Exchange, status: int, whole: bytes) -> None:
        """Answer what was never begun."""
        exchange.refuse(whole)
        self._note(exchange, status, time.perf_counter() - exchange.arrived)

    def _fail(self, exchanges: Iterable[Exchange], error: PlinthError) -> None:
        status, whole = error_bytes(error)
        refused = isinstance(error, DeadlineRefused | QueueFull)
        for exchange in exchanges:
            self._finish(exchange, status, whole, refused)

    def _finish(
        self,
        exchange: Exchange,
        status: int,
        whole: bytes,
        congested: bool = False,
        models: bytes = b"",
        timing: bytes = b"",
    ) -> None:
        """Send an answer. ``congested``: the engine had no time for it, or it took long."""
        if exchange.connection is None:
            status = 0
        exchange.respond(whole)
        now = time.perf_counter()
        self._limit.end(now, congested)
        self._note(exchange, status, now - exchange.arrived, models, timing)

    def _note(
        self,
        exchange: Exchange,
        status: int,
        seconds: float,
        models: bytes = b"",
        timing: bytes = b"",
    ) -> None:
        HTTP.note(self.path, status, seconds)
        if self._log is not None:
            what, ran = f"POST {self.path}", models.decode("latin-1")
            self._log.note(exchange.who, what, status, seconds, ran)
        if self._tracing is not None:
            head, took = exchange.head, orjson.loads(timing) if timing else None
            ran = models.decode("latin-1")
            self._tracing.http(b"POST", self.path, head.fields, exchange.arrived, status, took, ran)


def _less(sla: Sla, waited: float) -> Sla:
    """The promise, less what a request has waited."""
    if sla.deadline_ms is None or waited <= _STALE:
        return sla
    left = max(sla.deadline_ms - waited * 1e3, 0.001)
    return dataclasses.replace(sla, deadline_ms=left)


def _document(reply: Reply) -> bytes:
    document: dict[str, Any] = {"results": [_entry(outcome) for outcome in reply.outcomes]}
    answer = reply.answer
    if answer is not None:
        document |= {
            "timing": answer.timing.as_dict(),
            "models": answer.models,
            "precision": answer.precision,
            "degraded": answer.degraded,
            "late": answer.late,
        }
    return orjson.dumps(document)


def _entry(outcome: bytes | PlinthError) -> dict[str, Any]:
    if isinstance(outcome, PlinthError):
        return {"error": body_of(outcome)}
    return {"result": orjson.Fragment(outcome)}


def answer_fields(answer: Answer[Any] | None) -> list[tuple[bytes, bytes]]:
    """What is told of every answer: its type, where its time went, and which models ran."""
    if answer is None:
        return [_TYPE]
    fields = [_TYPE, (TIMING_FIELD, timing_json(answer.timing)), *about_models(answer)]
    if answer.late:
        fields.append((b"x-plinth-late", b"true"))
    return fields


def about_models(answer: Answer[Any]) -> list[tuple[bytes, bytes]]:
    """Which models ran, and which ran in the place of another."""
    fields = [
        (b"x-plinth-models", _field(answer.models)),
        (b"x-plinth-precision", _field(answer.precision)),
    ]
    if answer.degraded:
        fields.append((b"x-plinth-degraded", _field(answer.degraded)))
    return fields


def timing_json(timing: Timing) -> bytes:
    """``Timing.as_dict()`` as JSON, in a seventh of the time."""
    return _TIMING % (
        timing.decode * 1e3,
        timing.queue * 1e3,
        timing.device * 1e3,
        timing.co_batched * 1e3,
        timing.encode * 1e3,
        timing.total * 1e3,
        timing.batch_rows,
    )


def _field(words: dict[str, str]) -> bytes:
    return pairs(words).encode("latin-1")
