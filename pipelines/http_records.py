"""The record routes: ``POST /v1/<vertical>/<action>``, one JSON object or a list of them.

A lone request takes the short way: raw bytes to ``vertical.parse``, one flow through the engine,
``vertical.encode`` to the socket. Validation, schema and docs stay FastAPI's to show, not to run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from engine import Answer, ConfigError, Engine, InputError, Sla
from engine.errors import Cancelled
from pipelines.config import ServeConfig
from pipelines.http_errors import Stop, body_of, media_type, read_body
from verticals import Vertical

T = TypeVar("T")

DEADLINE_HEADER = "x-slo-deadline-ms"
WATCH_AFTER = 0.02
"""Seconds an answer may take before the door begins to watch for a vanished client."""


class RecordDoor:
    """One record vertical behind its route.

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

    async def answer(self, request: Request) -> Response:
        """Answer one HTTP request.

        Raises:
            PlinthError: turned into an error response by the app.
        """
        arrived = time.perf_counter()
        media_type(request, ("application/json",))
        sla = self._sla(request)
        config = self.config
        body = await read_body(request, config.max_body_bytes, config.request_timeout_seconds)
        start = body.lstrip()[:1]
        if start == b"[":
            return await self._many(request, body, sla, arrived)
        if not start:
            raise InputError(
                "the body is empty", hint="send one JSON object", reason="malformed_json"
            )
        record = self.vertical.parse(body)
        decoded = time.perf_counter()
        answer = await self._infer(request, [record], sla)
        result = answer.value[0]
        if isinstance(result, InputError):
            raise result
        encoding = time.perf_counter()
        content = self.vertical.encode(result)
        _clock(answer, arrived, decoded, encoding)
        return Response(content, headers=_headers(answer), media_type="application/json")

    async def _many(self, request: Request, body: bytes, sla: Sla, arrived: float) -> Response:
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
            answer = await self._infer(request, records, sla)
            values = iter(answer.value)
            outcomes = [next(values) if slot is None else slot for slot in outcomes]
        encoding = time.perf_counter()
        results = [self._encode(outcome) for outcome in outcomes]
        document: dict[str, Any] = {"results": results}
        headers = {}
        if answer is not None:
            _clock(answer, arrived, decoded, encoding)
            headers = _headers(answer)
            document |= {
                "timing": answer.timing.as_dict(),
                "models": answer.models,
                "degraded": answer.degraded,
                "late": answer.late,
            }
        return Response(orjson.dumps(document), headers=headers, media_type="application/json")

    def _encode(self, outcome: Any) -> dict[str, Any]:
        if isinstance(outcome, InputError):
            return {"error": body_of(outcome)}
        return {"result": orjson.Fragment(self.vertical.encode(outcome))}

    def _sla(self, request: Request) -> Sla:
        given = request.headers.get(DEADLINE_HEADER)
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

    async def _infer(self, request: Request, records: Sequence[Any], sla: Sla) -> Answer[list[Any]]:
        return await patient(request, self._drive(records, sla), self.config)

    def _drive(self, records: Sequence[Any], sla: Sla) -> Awaitable[Answer[list[Any]]]:
        flow = self.vertical.infer(records)
        if self.vertical.heavy:
            loop = asyncio.get_running_loop()
            return loop.run_in_executor(self.pool, self.engine.run, flow, sla)
        return self.engine.run_async(flow, sla)


async def patient(request: Request, work: Awaitable[T], config: ServeConfig) -> T:
    """Wait for an answer; give up when it takes too long or nobody waits for it any more.

    Raises:
        Stop: ``timeout``.
        Cancelled: the client is gone; the queued work was cancelled.
    """
    task = asyncio.ensure_future(work)
    done: set[asyncio.Future[Any]]
    try:
        done, _ = await asyncio.wait({task}, timeout=WATCH_AFTER)
        if not done:
            gone = asyncio.create_task(_disconnected(request.receive))
            try:
                both: set[asyncio.Future[Any]] = {task, gone}
                done, _ = await asyncio.wait(
                    both,
                    timeout=config.request_timeout_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                gone.cancel()
            if task not in done:
                if done:
                    raise Cancelled("the client went away")
                raise _timed_out(config)
        return task.result()
    finally:
        task.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _timed_out(config: ServeConfig) -> Stop:
    return Stop(
        f"no answer within {config.request_timeout_seconds:g} s",
        reason="timeout",
        hint="send fewer records at once, or raise serve.request_timeout_seconds",
    )


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


def _clock(answer: Answer[Any], arrived: float, decoded: float, encoding: float) -> None:
    now = time.perf_counter()
    answer.timing.decode = decoded - arrived
    answer.timing.encode = now - encoding
    answer.timing.total = now - arrived


def _headers(answer: Answer[Any]) -> dict[str, str]:
    headers = {
        "x-plinth-timing": orjson.dumps(answer.timing.as_dict()).decode(),
        "x-plinth-models": _pairs(answer.models),
    }
    if answer.degraded:
        headers["x-plinth-degraded"] = _pairs(answer.degraded)
    if answer.late:
        headers["x-plinth-late"] = "true"
    return headers


def _pairs(words: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in words.items())


def openapi(vertical: Vertical[Any, Any]) -> dict[str, Any]:
    """What the route looks like in the API docs: schemas and the vertical's own example."""
    assert vertical.request is not None
    template = "#/components/schemas/{model}"
    asked = vertical.request.model_json_schema(ref_template=template)
    given = vertical.response.model_json_schema(ref_template=template, mode="serialization")
    schemas = {**asked.pop("$defs", {}), **given.pop("$defs", {})}
    name, answer = asked["title"], given["title"]
    schemas |= {name: asked, answer: given, "Error": ERROR_SCHEMA}
    one, many = template.format(model=name), template.format(model=answer)
    example = vertical.example()
    results = {
        "type": "object",
        "properties": {
            "results": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"result": {"$ref": many}, "error": {"type": "object"}},
                },
            },
            **{key: {"type": "object"} for key in ("timing", "models", "degraded")},
            "late": {"type": "boolean"},
        },
    }
    content: dict[str, Any] = {
        "schema": {"oneOf": [{"$ref": one}, {"type": "array", "items": {"$ref": one}}]},
    }
    if hasattr(example, "model_dump_json"):
        content["example"] = orjson.loads(example.model_dump_json())
    return {
        "schemas": schemas,
        "operation": {
            "requestBody": {"required": True, "content": {"application/json": content}},
            "parameters": [DEADLINE_PARAMETER],
            "responses": {
                "200": {
                    "description": "one answer, or one result or error per record of the list",
                    "headers": {"x-plinth-timing": {"schema": {"type": "string"}}},
                    "content": {
                        "application/json": {"schema": {"oneOf": [{"$ref": many}, results]}}
                    },
                },
                **error_responses(400, 413, 415, 422, 429, 503, 504),
            },
        },
    }


DEADLINE_PARAMETER = {
    "name": DEADLINE_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "milliseconds this request may take; work that cannot make it is refused",
}
ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["reason", "message"],
            "properties": {
                key: {"type": ["string", "null"]} for key in ("reason", "message", "field", "hint")
            },
        }
    },
}
MEANINGS = {
    400: "malformed",
    404: "no such thing",
    413: "too large",
    415: "wrong media type",
    422: "a field is wrong",
    429: "the queue is full; see Retry-After",
    503: "cannot be done in time, or shutting down; see Retry-After",
    504: "took too long",
}


def error_responses(*codes: int) -> dict[str, Any]:
    """Error answers for the API docs."""
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        str(code): {
            "description": MEANINGS[code],
            "content": {"application/json": {"schema": schema}},
        }
        for code in codes
    }
