"""What the FastAPI app of Plinth has: health, metrics, an index, errors as JSON."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from plinth.engine import Engine, PlinthError
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.http.errors import HttpError, error_response, is_flat
from plinth.pipelines.http.health import Health
from plinth.verticals import Vertical


def routes(app: FastAPI) -> Iterator[str]:
    """``"POST /v1/finance/score"`` and so on, as the user may call them."""
    for route in app.routes:
        path, methods = getattr(route, "path", ""), getattr(route, "methods", None) or ()
        for method in sorted(set(methods) - {"HEAD"}):
            if not path.startswith(("/docs/", "/ui/")):
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
        f"{'<p><a href=/ui>Pages</a></p>' if any(r.endswith(' /ui') for r in listed) else ''}"
        '<p><a href="/docs">API docs</a> · <a href="/health/ready">ready?</a> · '
        '<a href="/metrics">metrics</a></p></html>'
    )


def add_error_handlers(app: FastAPI) -> None:
    """Every error that leaves a route becomes ``{"error": {...}}``."""

    async def plinth(request: Request, error: Exception) -> Response:
        assert isinstance(error, PlinthError)
        return error_response(error, flat=_flat(request))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code not in (404, 405):
            return error_response(HttpError(str(error.detail), reason="malformed_upload", extra={}))
        return error_response(_lost(app, request, error), flat=_flat(request))

    app.add_exception_handler(PlinthError, plinth)
    app.add_exception_handler(HTTPException, http)


def _flat(request: Request) -> bool:
    return is_flat(request.url.path.encode())


def _lost(app: FastAPI, request: Request, error: HTTPException) -> HttpError:
    listed = list(routes(app))
    wanted = f"{request.method} {request.url.path}"
    near = difflib.get_close_matches(wanted, listed, n=1)
    known = error.status_code == 405
    return HttpError(
        f"{request.method} is not allowed here" if known else "there is no such route",
        reason="not_allowed" if known else "not_found",
        hint=f"did you mean {near[0]}?" if near else "see the routes below",
        headers=dict(error.headers or {}),
        extra={"routes": listed},
    )
