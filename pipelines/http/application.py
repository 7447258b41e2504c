"""What answers the requests of the server: record routes, and FastAPI for all the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.requests import ClientDisconnect

from plinth.engine import PlinthError
from plinth.pipelines.http.access import OPEN_PATHS, Access
from plinth.pipelines.http.errors import HttpError, error_bytes, is_flat
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.metrics import HTTP
from plinth.pipelines.http.record_routes import BUSY, DRAINED, RecordRoute
from plinth.pipelines.http.wire.admission import Limit
from plinth.pipelines.http.wire.asgi import Asgi, AsgiExchange
from plinth.pipelines.http.wire.connection import Exchange
from plinth.pipelines.http.wire.head import BadRequest
from plinth.pipelines.identity.request_log import RequestLog
from plinth.pipelines.observability.tracing import FIELD, Begun, Tracing
from plinth.pipelines.records import FAULTS, explained

FULL = HttpError(
    "too many connections are open",
    reason="too_many_connections",
    hint="keep connections alive and use fewer, or raise serve.max_connections",
    headers={"retry-after": "1"},
)
_HINTS = {
    "head_too_large": "send large things in the body",
    "body_too_large": "send less at once, or raise the limit in the [serve] table",
    "body_too_slow": "send it faster, or raise serve.request_timeout_seconds",
}


class HttpApplication:
    """Gives each request to its route, or turns it away.

    Args:
        app: an ASGI application for all but the record routes.
        routes: record routes by path.
        access: who may ask.
        limit: of requests in work.
        max_body: bytes of a request to ``app``.
        health: of the server.
        requests: the log of requests, if there is one.
        tracing: told of each request, if there is any.
    """

    def __init__(
        self,
        app: Asgi,
        routes: Mapping[str, RecordRoute],
        access: Access,
        limit: Limit,
        max_body: int,
        health: Health,
        requests: RequestLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._log = requests
        self._tracing = tracing
        self.health = health
        self.limit = limit
        self._app = app
        self._routes = {path.encode(): route for path, route in routes.items()}
        self._access = access
        self._max_body = max_body
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the server asks ------------------------------------------------------------------
    def request(self, exchange: Exchange) -> None:
        """A head is whole: see who may answer the request."""
        head = exchange.head
        if exchange.surplus and head.path not in OPEN_PATHS:
            self._refuse(exchange, FULL)
            return
        refusal = self._access.refusal(exchange)
        if refusal is not None:
            self._refuse(exchange, refusal)
            return
        route = None
        if head.method == b"POST" and not self._access.is_cors(head.fields):
            route = self._routes.get(head.path) or self._routes.get(head.decoded_path)
        if route is not None:
            route.begin(exchange)
        elif len(self._tasks) >= self.limit.most and head.path not in OPEN_PATHS:
            self._refuse(exchange, BUSY)
        else:
            task = asyncio.get_running_loop().create_task(self._run(exchange))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def stale(self, path: bytes, arrived: float) -> bytes | None:
        """The refusal of a POST to this path which has waited, or ``None``: it must be read."""
        route = self._routes.get(path)
        return None if route is None else route.stale(arrived)

    def end_of_turn(self) -> None:
        """Run the records that were read in this turn."""
        for route in self._routes.values():
            route.end_of_turn()

    def error(self, error: BadRequest) -> bytes:
        """The whole answer to what is no request."""
        told = HttpError(
            error.message,
            reason=error.reason,
            hint=_HINTS.get(error.reason, "check the client"),
        )
        status, whole = error_bytes(told)
        HTTP.note("other", status, 0.0)
        return whole

    def cancel(self) -> None:
        """The time to drain is over: what is left is answered with a refusal."""
        for route in self._routes.values():
            route.cancel()
        for task in list(self._tasks):
            task.cancel()

    # -- requests for the ASGI application -----------------------------------------------------
    async def _run(self, exchange: Exchange) -> None:
        asgi = AsgiExchange(exchange, self._max_body)
        scope: dict[str, Any] = asgi.scope()
        span = scope["state"]["span"] = self._begun(exchange)
        failure: PlinthError | None = None
        try:
            await self._app(scope, asgi.receive, asgi.send)
        except asyncio.CancelledError:
            failure = DRAINED
        except (OSError, ClientDisconnect) as error:  # the second is starlette's word for it
            failure = None if exchange.connection is None else explained(error)
        except FAULTS as error:
            failure = explained(error)
        status = asgi.status
        if not asgi.ended and exchange.connection is not None:
            if status:
                asgi.abandon()
            else:
                told = failure or explained(RuntimeError("no answer"))
                status, whole = error_bytes(told, flat=is_flat(exchange.head.path))
                exchange.respond(whole)
        route = getattr(scope.get("route"), "path", "other")
        self._note(route, status, exchange, asgi, span)

    def _begun(self, exchange: Exchange) -> Begun | None:
        """The span of a request that may go on in others; none of those that only look."""
        head = exchange.head
        if self._tracing is None or head.path in OPEN_PATHS:
            return None
        method = head.method.decode("latin-1")
        return self._tracing.begin(method, head.fields.get(FIELD), exchange.arrived, "server")

    def _note(
        self,
        route: str,
        status: int,
        exchange: Exchange,
        asgi: AsgiExchange | None = None,
        span: Begun | None = None,
    ) -> None:
        models, timing = ("", b"") if asgi is None else (asgi.models, asgi.timing)
        head, seconds = exchange.head, time.perf_counter() - exchange.arrived
        HTTP.note(route, status, seconds)
        if head.path in OPEN_PATHS:
            return
        if self._log is not None:
            what = f"{head.method.decode()} {route}"
            self._log.note(exchange.who, what, status, seconds, models)
        if self._tracing is not None:
            took = orjson.loads(timing) if timing else None
            self._tracing.http(
                head.method, route, head.fields, exchange.arrived, status, took, models, span
            )

    def _refuse(self, exchange: Exchange, error: PlinthError) -> None:
        status, whole = error_bytes(error, flat=is_flat(exchange.head.path))
        exchange.refuse(whole)
        self._note("other", status, exchange)
