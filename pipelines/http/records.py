"""The record routes: ``POST /v1/<vertical>/<action>``, one JSON object or a list of them.

Raw bytes go to ``vertical.parse``, one flow through the engine, ``vertical.encode`` to the
socket. FastAPI shows schema and docs of these routes; it does not stand in their way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from plinth.engine import Answer, ConfigError, Engine, Flow, InputError, PlinthError, Sla, Timing
from plinth.engine.metrics import SLA_MISSES
from plinth.engine.runtime.flow_driver import FlowDriver
from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.http.body import headers_of, media_type, whole
from plinth.pipelines.http.disconnect import Watched
from plinth.pipelines.http.errors import body_of, error_response
from plinth.verticals import Vertical

DEADLINE_HEADER = "x-slo-deadline-ms"
JSON = ("application/json",)
_DEADLINE = DEADLINE_HEADER.encode()
_TIMING = (
    b'{"decode_ms":%.3f,"queue_ms":%.3f,"device_ms":%.3f,"co_batched_ms":%.3f,'
    b'"encode_ms":%.3f,"total_ms":%.3f,"batch_rows":%d}'
)


class RecordDoor:
    """One record vertical behind its route: an ASGI app.

    Args:
        vertical: has a ``request`` type.
        engine: started, with the vertical's models.
        sla: the promise unless the request brings its own.
        config: bounds.
        pool: threads for heavy verticals.
    """

    def __init__(
        self,
        vertical: Vertical[Any, Any],
        engine: Engine,
        sla: Sla,
        config: ServeConfig,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.vertical = vertical
        self.engine = engine
        self.sla = sla
        self.config = config
        self.pool = pool
        self.path = f"/v1/{vertical.name}/{vertical.action}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        try:
            response = await self.answer(scope, receive)
        except PlinthError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive) -> Response:
        """The answer to one HTTP request.

        Raises:
            PlinthError: to be turned into an error response.
        """
        arrived = time.perf_counter()
        config, headers = self.config, headers_of(scope)
        media_type(headers, JSON)
        sla = self.promise(headers.get(_DEADLINE))
        body = await whole(receive, headers, config.max_body_bytes, config.request_timeout_seconds)
        return await self.respond(receive, body, sla, arrived)

    async def respond(self, receive: Receive, body: bytes, sla: Sla, arrived: float) -> Response:
        """The answer to a whole body that arrived at a time (``perf_counter``).

        Raises:
            PlinthError: to be turned into an error response.
        """
        start = body[:1]
        if start != b"{":
            start = body.lstrip()[:1]
        if start == b"[":
            return await self._many(receive, body, sla, arrived)
        if not start:
            raise InputError(
                "the body is empty", hint="send one JSON object", reason="malformed_json"
            )
        record = self.vertical.parse(body)
        decoded = time.perf_counter()
        answer = await self._infer(receive, [record], sla)
        result = answer.value[0]
        if isinstance(result, InputError):
            raise result
        encoding = time.perf_counter()
        content = self.vertical.encode(result)
        _clock(answer, sla, arrived, decoded, encoding)
        return Ready(content, answer_headers(answer))

    async def _many(self, receive: Receive, body: bytes, sla: Sla, arrived: float) -> Response:
        records: list[Any] = []
        outcomes: list[Any] = []
        for raw in _elements(body, self.config.max_items):
            try:
                records.append(self.vertical.parse(raw))
                outcomes.append(None)
            except InputError as error:
                outcomes.append(error)
        decoded = time.perf_counter()
        answer: Answer[list[Any]] | None = None
        if records:
            answer = await self._infer(receive, records, sla)
            values = iter(answer.value)
            outcomes = [next(values) if slot is None else slot for slot in outcomes]
        encoding = time.perf_counter()
        document: dict[str, Any] = {"results": [self._encode(outcome) for outcome in outcomes]}
        if answer is None:
            return Ready(orjson.dumps(document), [])
        _clock(answer, sla, arrived, decoded, encoding)
        document |= {
            "timing": answer.timing.as_dict(),
            "models": answer.models,
            "degraded": answer.degraded,
            "late": answer.late,
        }
        return Ready(orjson.dumps(document), answer_headers(answer))

    def _encode(self, outcome: Any) -> dict[str, Any]:
        if isinstance(outcome, InputError):
            return {"error": body_of(outcome)}
        return {"result": orjson.Fragment(self.vertical.encode(outcome))}

    def promise(self, given: bytes | None) -> Sla:
        """The promise for a request with this value of ``x-slo-deadline-ms``.

        Raises:
            InputError: no number of milliseconds.
        """
        if given is None:
            return self.sla
        try:
            return dataclasses.replace(self.sla, deadline_ms=float(given))
        except (ValueError, ConfigError):
            raise InputError(
                f"{DEADLINE_HEADER}: expected milliseconds, above 0 and below a day",
                field=DEADLINE_HEADER,
                hint="send a number such as 25",
                reason="bad_header",
            ) from None

    async def _infer(self, receive: Receive, records: Sequence[Any], sla: Sla) -> Answer[list[Any]]:
        flow = self.vertical.infer(records)
        with Watched(receive, self.config.request_timeout_seconds):
            if self.vertical.heavy:
                return await self._stepped(flow, sla)
            return await self.engine.run_async(flow, sla)

    async def _stepped(self, flow: Flow[list[Any]], sla: Sla) -> Answer[list[Any]]:
        """Drive a heavy flow: its own steps on threads, its calls waited for here."""
        loop = asyncio.get_running_loop()

        async def aside(step: Callable[..., Any], *given: Any) -> Any:
            return await loop.run_in_executor(self.pool, step, *given)

        driver: FlowDriver[list[Any]] = await aside(FlowDriver, flow, time.monotonic)
        while (call := driver.call) is not None:
            try:
                result = await asyncio.wrap_future(self.engine.submit(call, sla))
            except PlinthError as error:
                await aside(driver.throw, error)
            else:
                await aside(driver.send, result)
        return driver.answer()


class Ready(Response):
    """A 200 with JSON in it, made without a detour.

    Args:
        body: JSON.
        headers: more headers, names in lower case.
    """

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        length = b"%d" % len(body)
        self.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", length),
            *headers,
        ]


def _elements(body: bytes, most: int) -> list[bytes]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"the body is not JSON: {error.msg} at byte {error.pos}",
            hint="send one JSON object or a list of them",
            reason="malformed_json",
        ) from None
    if not parsed:
        raise InputError("the list is empty", hint="send at least one record", reason="empty")
    if len(parsed) > most:
        raise InputError(
            f"the list has {len(parsed):,} records, at most {most:,} are taken at once",
            hint="send several requests, or raise serve.max_items",
            reason="too_many_items",
        )
    return [orjson.dumps(element) for element in parsed]


def _clock(answer: Answer[Any], sla: Sla, arrived: float, decoded: float, encoding: float) -> None:
    now = time.perf_counter()
    timing = answer.timing
    timing.decode = decoded - arrived
    timing.encode = now - encoding
    timing.total = now - arrived
    answer.late = answer.late or late_at_door(answer, sla)


def late_at_door(answer: Answer[Any], sla: Sla, waited: float = 0.0) -> bool:
    """Whether an answer missed its promise, and if only at the door, count that.

    Args:
        answer: with its time so far.
        sla: the promise.
        waited: seconds the request may have waited before that time began.
    """
    if sla.deadline_ms is None or (answer.timing.total + waited) * 1e3 <= sla.deadline_ms:
        return False
    for model in answer.models:
        SLA_MISSES.labels(model, "door").inc()
    return True


def answer_headers(answer: Answer[Any]) -> list[tuple[bytes, bytes]]:
    """What is told of every answer: where its time went, and which models ran."""
    headers = [(b"x-plinth-timing", timing_json(answer.timing)), *about_models(answer)]
    if answer.late:
        headers.append((b"x-plinth-late", b"true"))
    return headers


def about_models(answer: Answer[Any]) -> list[tuple[bytes, bytes]]:
    """Which models ran, and which ran in the place of another."""
    headers = [(b"x-plinth-models", _pairs(answer.models))]
    if answer.degraded:
        headers.append((b"x-plinth-degraded", _pairs(answer.degraded)))
    return headers


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


def _pairs(words: dict[str, str]) -> bytes:
    return ", ".join(f"{name}={value}" for name, value in words.items()).encode("latin-1")
