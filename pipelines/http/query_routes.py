"""``/v1/<vertical>/<query>``: what a vertical answers about its own state, as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from plinth.engine import InputError
from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.http import openapi as http_openapi
from plinth.pipelines.http.body import media_type, whole
from plinth.pipelines.records import ask
from plinth.verticals import Query, Vertical
from plinth.verticals.double_keys import refuse_double_keys

MAX_BODY = 64 << 10
_JSON = ("application/json",)


def add_queries(app: FastAPI, vertical: Vertical[Any, Any], config: ServeConfig) -> None:
    """Routes of a vertical's queries; they run in the event loop, as its flows do."""
    for query in vertical.queries():
        app.add_api_route(
            f"/v1/{vertical.name}/{query.path}",
            _handler(query, config),
            methods=[query.method],
            response_model=None,
            summary=query.summary,
            openapi_extra=http_openapi.query(vertical, query),
        )


def _handler(query: Query, config: ServeConfig) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        reading = query.method == "GET"
        given = _once(request) if reading else await _body(request, config)
        found = await ask(query, given | request.path_params, as_text=reading)
        return Response(found.model_dump_json(), media_type="application/json")

    return answer


def _once(request: Request) -> dict[str, str]:
    """The query string; a field that is there twice is refused."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in found or name in request.path_params:
            raise InputError("a field is there twice", field=name, reason="duplicate_key")
        found[name] = value
    return found


async def _body(request: Request, config: ServeConfig) -> dict[str, Any]:
    headers = dict(request.scope["headers"])
    media_type(headers, _JSON)
    seconds = config.request_timeout_seconds
    raw = await whole(request.receive, headers, min(MAX_BODY, config.max_body_bytes), seconds)
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(
            f"the body is not JSON: {error.msg} at byte {error.pos}",
            hint="send one JSON object",
            reason="malformed_json",
        ) from None
    if not isinstance(found, dict):
        raise InputError("expected one JSON object", reason="malformed_json")
    refuse_double_keys(raw, found)
    if both := sorted(found.keys() & request.path_params.keys()):
        raise InputError(
            f"{both[0]}: stands in the path already", field=both[0], reason="duplicate_key"
        )
    return found
