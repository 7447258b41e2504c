"""What every HTTP app of Plinth has: the gate, health, metrics, an index, errors as JSON."""

from __future__ import annotations

import asyncio
import difflib
import hmac
import html
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plinth.engine import Closed, Engine, PlinthError, QueueFull, Refused
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.http.errors import Stop, error_response, internal_error
from plinth.pipelines.http.metrics import HTTP
from plinth.pipelines.http.records import RecordDoor
from plinth.verticals import Vertical

OPEN_PATHS = ("/health/live", "/health/ready")
UNAUTHORISED = Stop(
    "this server needs an API key",
    reason="unauthorised",
    hint="send it as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'",
    headers={"www-authenticate": "Bearer"},
)

BUSY = QueueFull("too many requests are in work", retry_after=1.0)
DRAINED = Closed("the server has shut down before this was finished", retry_after=5.0)


class Health:
    """What the server can say of itself: ``reasons`` it is not ready, and that it drains."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {"warm_up": "models are warming up"}
        self.drain_until: float | None = None

    def drain(self, seconds: float) -> None:
        """Not ready from now on; accepted work has ``seconds`` left."""
        self.reasons["draining"] = "the server is shutting down"
        self.drain_until = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds left to drain; 0 when it was never told to."""
        return max(0.0, (self.drain_until or 0.0) - time.monotonic())


class Gate:
    """Pure ASGI around every request: the API key, the last resort for errors, the metrics.

    Args:
        app: everything but ``doors``.
        doors: record routes by path, which take their POST requests without ``app``.
        key: the API key, or ``None``.
        settings: ``config.serve``.
        health: told apart: a request cut off by the end of draining, and a fault.
    """

    def __init__(
        self,
        app: ASGIApp,
        doors: Mapping[str, RecordDoor],
        key: str | None,
        settings: ServeConfig,
        health: Health,
    ) -> None:
        self.app = app
        self.doors = doors
        self.key = None if key is None else key.encode()
        self.most = settings.max_requests
        self.health = health
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        path = scope["path"]

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_work += 1
        door = self.doors.get(path) if scope["method"] == "POST" else None
        try:
            refusal = self.refusal(path, scope["headers"])
            if refusal is None:
                await (door or self.app)(scope, receive, noted)
            else:
                await error_response(refusal)(scope, receive, noted)
        except asyncio.CancelledError:
            if self.health.drain_until is None or status:
                raise
            await error_response(DRAINED)(scope, receive, noted)
        except Exception as error:
            answer = internal_error(error)
            if status:  # too late for another answer: break the connection
                raise
            await answer(scope, receive, noted)
        finally:
            self.in_work -= 1
            route = path if door else getattr(scope.get("route"), "path", "other")
            HTTP.note(route, status, time.perf_counter() - started)

    def refusal(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> PlinthError | None:
        """Why a request is turned away before anybody looks at it, or ``None``."""
        if path in OPEN_PATHS:
            return None
        if self.key is not None and not self._has_key(headers, self.key):
            return UNAUTHORISED
        if "warm_up" in self.health.reasons and path.startswith("/v1/"):
            return Refused(self.health.reasons["warm_up"], retry_after=1.0)
        return BUSY if self.in_work > self.most else None

    @staticmethod
    def _has_key(pairs: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
        headers = dict(pairs)
        bearer = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        given: bytes = headers.get(b"x-api-key", bearer)
        return hmac.compare_digest(given.strip(), key)


def routes(app: FastAPI) -> Iterator[str]:
    """``"POST /v1/finance/score"`` and so on, as the user may call them."""
    for route in app.routes:
        path, methods = getattr(route, "path", ""), getattr(route, "methods", None) or ()
        for method in sorted(set(methods) - {"HEAD"}):
            if not path.startswith("/docs/"):
                yield f"{method} {path}"


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response by orjson."""
    return Response(
        orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def add_common_routes(
    app: FastAPI, engine: Engine, health: Health, verticals: Mapping[str, Vertical[Any, Any]]
) -> None:
    """``/``, ``/health/live``, ``/health/ready``, ``/metrics`` and ``/v1/status``."""

    @app.get("/health/live", response_model=None, summary="The process answers")
    async def live() -> Response:
        return json({"live": True})

    @app.get("/health/ready", response_model=None, summary="Send traffic here, or why not")
    async def ready() -> Response:
        body = {"ready": not health.reasons, "reasons": health.reasons}
        return json(body, 503, {"retry-after": "1"}) if health.reasons else json(body)

    @app.get("/metrics", response_model=None, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/status", response_model=None, summary="What the engine does now")
    async def status() -> Response:
        return json(engine.status())

    @app.get("/", response_model=None, summary="What is here")
    async def index(request: Request) -> Response:
        listed = list(routes(app))
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_page(verticals, listed))
        about = {name: vertical.summary for name, vertical in verticals.items()}
        return json({"verticals": about, "routes": listed})


def _page(verticals: Mapping[str, Vertical[Any, Any]], listed: list[str]) -> str:
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(vertical.summary)}</dd>"
        for name, vertical in verticals.items()
    )
    lines = "".join(f"<li><code>{html.escape(line)}</code></li>" for line in listed)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Plinth</title>"
        "<style>body{font:16px system-ui;max-width:42rem;margin:3rem auto;padding:0 1rem}</style>"
        f"<h1>Plinth</h1><dl>{rows}</dl><h2>Routes</h2><ul>{lines}</ul>"
        '<p><a href="/docs">API docs</a> · <a href="/health/ready">ready?</a> · '
        '<a href="/metrics">metrics</a></p></html>'
    )


def add_error_handlers(app: FastAPI) -> None:
    """Every error that leaves a route becomes ``{"error": {...}}``."""

    async def plinth(request: Request, error: Exception) -> Response:
        assert isinstance(error, PlinthError)
        return error_response(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code not in (404, 405):
            return error_response(Stop(str(error.detail), reason="malformed_upload", extra={}))
        return error_response(_lost(app, request, error))

    app.add_exception_handler(PlinthError, plinth)
    app.add_exception_handler(HTTPException, http)


def _lost(app: FastAPI, request: Request, error: HTTPException) -> Stop:
    listed = list(routes(app))
    wanted = f"{request.method} {request.url.path}"
    near = difflib.get_close_matches(wanted, listed, n=1)
    known = error.status_code == 405
    return Stop(
        f"{request.method} is not allowed here" if known else "there is no such route",
        reason="not_allowed" if known else "not_found",
        hint=f"did you mean {near[0]}?" if near else "see the routes below",
        headers=dict(error.headers or {}),
        extra={"routes": listed},
    )


def publish(app: FastAPI, schemas: Mapping[str, Any]) -> None:
    """Add the verticals' schemas to the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
