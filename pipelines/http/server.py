"""The HTTP door: what answers, and a server that drains.

:func:`create_app` makes what answers; :class:`Server` runs it. On SIGTERM or Ctrl-C the server is
not ready at once, still serves for ``announce_seconds``, then takes no new connection, answers
every accepted request within ``drain_seconds`` and ends with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from plinth.engine import ConfigError, Engine, EngineFailed, InputError, ModelStore, PlinthError
from plinth.pipelines.assembly import is_folder_vertical, sla_of, store_path
from plinth.pipelines.config.settings import Config, ServeConfig
from plinth.pipelines.folders.jobs import Jobs
from plinth.pipelines.http import openapi as http_openapi
from plinth.pipelines.http.access import Access, Part
from plinth.pipelines.http.app import add_common_routes, add_error_handlers
from plinth.pipelines.http.application import HttpApplication
from plinth.pipelines.http.body import headers_of, whole
from plinth.pipelines.http.disconnect import cancel_on_disconnect
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.metrics import HTTP
from plinth.pipelines.http.query_routes import add_queries
from plinth.pipelines.http.record_routes import RecordRoute
from plinth.pipelines.http.tensor_routes import TensorRoutes
from plinth.pipelines.http.upload_routes import UploadDoor
from plinth.pipelines.http.wire.admission import Limit
from plinth.pipelines.http.wire.server import Bounds, SocketServer
from plinth.pipelines.http.wire.tls import TlsFiles, tls_files
from plinth.pipelines.identity.callers import Identity
from plinth.pipelines.identity.known import identity_of
from plinth.pipelines.identity.request_log import RequestLog
from plinth.pipelines.interpreter import set_for_serving
from plinth.pipelines.live.tables import LiveTables
from plinth.pipelines.observability.tracing import Tracing, tracing_from
from plinth.pipelines.oip.service import ModelService, load_at_start
from plinth.pipelines.records import RecordService
from plinth.pipelines.state.store import STEP_S, KeptState
from plinth.verticals import Vertical
from plinth.verticals.contract import StateError

if TYPE_CHECKING:
    from plinth.pipelines.grpc.server import GrpcDoor
    from plinth.pipelines.stream.history.follow import Follower

log = logging.getLogger("plinth.serve")
ADMIN_REQUESTS = 16
"""Requests in work at ``serve.admin``."""
ADMIN_CONNECTIONS = 64
"""Open connections at ``serve.admin``."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENGINE_LOOK = 0.25
"""Seconds between two looks at whether the engine is well."""
LOOK = 1.0
"""Seconds between two looks at whether files of settings, keys or certificates have changed."""


def create_app(
    verticals: Mapping[str, Vertical[Any, Any]],
    engine: Engine,
    config: Config,
    states: Sequence[KeptState] = (),
) -> Application:
    """What answers requests, and what lives as long as the server.

    Args:
        verticals: loaded verticals by name; their models are known to ``engine``.
        engine: started and closed by the caller.
        config: ``config.serve`` and the verticals' promises.
        states: to look after, on the event loop, where flows run.

    Raises:
        ConfigError: keys, a certificate or a promise is wrong, or a variable is not set.
    """
    health, serve = Health(), config.serve
    slas = {name: sla_of(vertical, config) for name, vertical in verticals.items()}
    folders = {name: v for name, v in verticals.items() if is_folder_vertical(v)}
    identity, tls = identity_of(config), tls_files(config.files_of(serve.tls))
    life = _Life(verticals, engine, health)
    life.watched += [LiveTables(config, verticals), identity, *([] if tls is None else [tls])]
    life.states = states
    life.jobs = jobs = Jobs(folders, engine, slas, serve.upload) if folders else None
    life.requests = requests = _request_log(config)
    life.tracing = tracing = tracing_from(os.environ)
    app = FastAPI(
        title="Plinth",
        version="1",
        summary="One inference engine under pluggable verticals.",
        docs_url=None,
        redoc_url=None,
    )
    limit = Limit(serve.max_requests)
    routes: dict[str, RecordRoute] = {}
    for name, vertical in verticals.items():
        if vertical.request is not None:
            service = RecordService(
                vertical,
                engine,
                slas[name],
                max_items=serve.max_items,
                seconds=serve.request_timeout_seconds,
                pool=life.pool,
            )
            route = RecordRoute(service, serve, limit, health, requests, tracing)
            routes[route.path] = route
            _record_route(app, route, serve)
            add_queries(app, vertical, serve)
        elif jobs is not None and name in folders:
            _upload_routes(app, UploadDoor(vertical, jobs, serve))
    if serve.oip.enabled:
        store = ModelStore(store_path(config))
        models = ModelService(engine, store, serve.oip)
        seconds = serve.request_timeout_seconds
        TensorRoutes(models, health, serve.max_body_bytes, seconds).add_to(app)
        load_at_start(engine, store, serve.oip.models)
        life.models = models
        life.tensors = _grpc_door(models, config, health, identity, (requests, tracing))
    on_drain: list[Callable[[], None]] = []
    if serve.web:
        life.follower = _follower(config, verticals)
        _add_pages(app, engine, verticals, life, on_drain)
    add_common_routes(app, engine, health, verticals)
    add_error_handlers(app)
    http_openapi.publish(app, verticals.values(), locked=bool(identity))
    if serve.cors_origins:
        _allow_origins(app, serve.cors_origins)
    uploads = serve.upload.max_bytes if folders else 0
    most = max(serve.max_body_bytes, uploads, serve.oip.max_body_bytes)

    def application(
        host: str, records: Mapping[str, RecordRoute], limit: Limit, part: Part
    ) -> HttpApplication:
        names, origins = serve.allowed_hosts, serve.cors_origins
        access = Access(identity, host, names, origins, health, part)
        return HttpApplication(app, records, access, limit, most, health, requests, tracing)

    admin = None
    if serve.admin.port is not None:
        admin = application(serve.admin.host, {}, Limit(ADMIN_REQUESTS), "admin")
    http = application(serve.host, routes, limit, "all" if admin is None else "work")
    promises = [slas[route.service.vertical.name].deadline_ms for route in routes.values()]
    tightest = min((ms / 1e3 for ms in promises if ms is not None), default=None)
    failure = lambda: engine.failure  # noqa: E731 - asked again and again
    return Application(http, life.run, tightest, failure, life.tensors, admin, tls, on_drain)


class _Life:
    """What lives as long as the server.

    Args:
        verticals: by name.
        engine: has their models.
        health: of the server.
    """

    def __init__(
        self, verticals: Mapping[str, Vertical[Any, Any]], engine: Engine, health: Health
    ) -> None:
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="plinth-http")
        self.watched: list[_Watched] = []
        self.states: Sequence[KeptState] = ()
        self.jobs: Jobs | None = None
        self.tensors: GrpcDoor | None = None
        self.requests: RequestLog | None = None
        self.models: ModelService | None = None
        self.tracing: Tracing | None = None
        self.follower: Follower | None = None
        self._warming = partial(warm_up, verticals, engine, health)
        self.health = health

    async def _begin(self, stack: contextlib.ExitStack) -> None:
        """Warm up; then others' decisions are heard, which a warm-up's end would forget."""
        await self._warming(stack)
        if self.follower is not None:
            self.follower.start(asyncio.get_running_loop().call_soon_threadsafe)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Entered before the first request and left after the last."""
        with contextlib.ExitStack() as stack:
            if self.tensors is not None:
                await self.tensors.start()
            warming = asyncio.create_task(self._begin(stack))
            tasks = [warming, asyncio.create_task(_checkpoints(self.states, warming))]
            tasks.append(asyncio.create_task(_look_after(self.watched)))
            if self.jobs is not None:
                tasks.append(asyncio.create_task(_purge(self.jobs)))
            yield
            for task in tasks:
                task.cancel()
            if self.follower is not None:
                await asyncio.to_thread(self.follower.close, self.health.seconds_left)
            if self.tensors is not None:
                await self.tensors.stop(self.health.seconds_left)
            if self.jobs is not None:
                await asyncio.to_thread(self.jobs.close, self.health.seconds_left)
            if self.requests is not None:
                await asyncio.to_thread(self.requests.close)
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)
            self.pool.shutdown(wait=False, cancel_futures=True)


def _add_pages(
    app: FastAPI,
    engine: Engine,
    verticals: Mapping[str, Vertical[Any, Any]],
    life: _Life,
    on_drain: list[Callable[[], None]],
) -> None:
    """Pages for people, which are imported if there are to be any.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from plinth.pipelines.web.pages import Pages, Site
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise ConfigError(
            "pages need the extra [web]", hint="pip install 'plinth-engine[web]'"
        ) from None

    def drain() -> None:
        for begin in on_drain:
            begin()

    reasons, jobs, models = life.health.reasons, life.jobs, life.models
    Pages(Site(engine, verticals, reasons, jobs, models, drain, HTTP, life.follower)).add_to(app)


def _follower(config: Config, verticals: Mapping[str, Vertical[Any, Any]]) -> Follower | None:
    """What reads the decisions of stream workers, where their audit is told of."""
    hearing = {n: v for n, v in verticals.items() if type(v).heard is not Vertical.heard}
    if config.stream is None or config.stream.audit_topic is None or not hearing:
        return None
    try:
        from plinth.pipelines.stream.history.follow import Follower
    except ModuleNotFoundError as error:
        if error.name != "kafka":
            raise
        log.warning("decisions of stream workers are not shown: install plinth-engine[kafka]")
        return None
    return Follower(config.stream, hearing)


def _request_log(config: Config) -> RequestLog | None:
    serve = config.serve
    if serve.request_log is None:
        return None
    path = config.beside(serve.request_log)
    return RequestLog(path, serve.request_log_bytes, serve.request_log_files)


def _allow_origins(app: FastAPI, origins: Collection[str]) -> None:
    """Tell browsers that pages of other sites may read answers (CORS)."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "x-api-key", "x-slo-deadline-ms"],
        expose_headers=["x-plinth-timing", "x-plinth-models", "x-plinth-late", "retry-after"],
    )


def _grpc_door(
    service: ModelService,
    config: Config,
    health: Health,
    identity: Identity,
    told: tuple[RequestLog | None, Tracing | None],
) -> GrpcDoor | None:
    """The gRPC server of the config, which is imported if there is to be one."""
    serve = config.serve
    if serve.grpc.port is None:
        return None
    from plinth.pipelines.grpc.server import GrpcDoor

    return GrpcDoor(
        service,
        serve.grpc,
        tls=config.files_of(serve.grpc),
        host=serve.host,
        identity=identity,
        requests=told[0],
        tracing=told[1],
        reasons=health.reasons,
        seconds=serve.request_timeout_seconds,
        administrative=serve.admin.port is None,
    )


@dataclass(frozen=True)
class Application:
    """What a server serves.

    Args:
        http: answers requests.
        lifespan: entered before the first request and left after the last.
        promise: seconds; the tightest promise of a record route, if any.
        failure: why the engine ended, None while it is well.
        grpc: the gRPC server, if there is one.
        admin: answers requests at ``serve.admin``, if there is such an address.
        tls: of ``http`` and ``admin``, if they have it.
        on_drain: the server puts in what a page calls to have it end.
    """

    http: HttpApplication
    lifespan: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    promise: float | None
    failure: Callable[[], str | None]
    grpc: GrpcDoor | None = None
    admin: HttpApplication | None = None
    tls: TlsFiles | None = None
    on_drain: list[Callable[[], None]] = field(default_factory=list)


async def warm_up(
    verticals: Mapping[str, Vertical[Any, Any]],
    engine: Engine,
    health: Health,
    stack: contextlib.ExitStack,
) -> None:
    """Run each vertical's example once, its state left as it was; then the server is ready.

    Args:
        verticals: by name.
        engine: has their models.
        health: told when it is over, or why it failed.
        stack: ends with the server.
    """
    for name, vertical in verticals.items():
        try:
            await asyncio.to_thread(_warm_one, vertical, engine)
        except PlinthError as error:
            log.error("warm-up of %s: %s", name, error)
            health.reasons["warm_up"] = f"{name} failed to warm up: {error.message}"
            return
    stack.enter_context(set_for_serving())
    health.reasons.pop("warm_up", None)


def _warm_one(vertical: Vertical[Any, Any], engine: Engine) -> None:
    """Run the example to its end: a library that loads its tables late would stop the others."""
    with vertical.aside():
        result = engine.run(vertical.infer([vertical.example()])).value[0]
        if is_folder_vertical(vertical) and not isinstance(result, InputError):
            with tempfile.TemporaryDirectory(prefix="plinth-warm-up-") as folder:
                engine.run(vertical.writing(result, Path(folder)))


class _Watched(Protocol):
    def look(self) -> None:
        """Take over what has changed."""


async def _look_after(watched: Collection[_Watched]) -> None:
    while True:
        await asyncio.sleep(LOOK)
        for one in watched:
            try:
                one.look()
            except Exception:  # the others go on, and this one with its next change
                log.exception("what changed could not be taken over")


async def _checkpoints(states: Sequence[KeptState], warming: asyncio.Task[None]) -> None:
    """Bring states to disk, little by little; what was answered is in their logs."""
    await asyncio.wait([warming])  # it sets them aside
    while states:
        busy = False
        for state in states:
            try:
                busy |= state.look_after(time.monotonic())
            except StateError as error:
                log.error("a checkpoint of %s: %s", state.vertical.name, error)
        await asyncio.sleep(STEP_S if busy else LOOK)


async def _purge(jobs: Jobs) -> None:
    while True:
        await asyncio.sleep(min(60.0, jobs.limits.keep_seconds))
        await asyncio.to_thread(jobs.purge)


def _record_route(app: FastAPI, route: RecordRoute, config: ServeConfig) -> None:
    """Put a record route into the API docs. The server takes its requests by a shorter way.

    What reaches the app all the same is answered by the same steps.
    """
    vertical = route.service.vertical

    async def infer(request: Request) -> Response:
        arrived, headers = time.perf_counter(), headers_of(request.scope)
        sla = route.promise(headers)
        seconds = config.request_timeout_seconds
        body = await whole(request.receive, headers, config.max_body_bytes, seconds)
        with cancel_on_disconnect(request.receive, seconds):
            status, fields, content = await route.respond(body, sla, arrived)
        response = Response(content, status_code=status)
        response.raw_headers = [*response.raw_headers, *fields]
        return response

    app.add_api_route(
        route.path,
        infer,
        methods=["POST"],
        summary=vertical.summary,
        operation_id=f"{vertical.name}_{vertical.action}",
        tags=[vertical.name],
        openapi_extra=http_openapi.records(vertical),
        response_model=None,
    )


def _upload_routes(app: FastAPI, door: UploadDoor) -> None:
    async def submit(request: Request) -> Response:
        return await door.submit(request)

    async def status(request: Request, job: str) -> Response:
        return await door.status(request)

    async def file(request: Request, job: str, name: str) -> Response:
        return await door.file(request)

    async def delete(request: Request, job: str) -> Response:
        return await door.delete(request)

    async def retry(request: Request, job: str) -> Response:
        return await door.retry(request)

    vertical = door.vertical
    one = f"/v1/{vertical.name}/jobs/{{job}}"
    for path, method, handler, summary, told in (
        (
            f"/v1/{vertical.name}/{vertical.action}",
            "POST",
            submit,
            vertical.summary,
            http_openapi.upload(vertical),
        ),
        (one, "GET", status, "How a job stands", http_openapi.job_status(vertical)),
        (one, "DELETE", delete, "Forget a job and its files", http_openapi.job_deletion(vertical)),
        (f"{one}/retry", "POST", retry, "Try again what failed", http_openapi.job_retry(vertical)),
        (
            f"{one}/files/{{name:path}}",
            "GET",
            file,
            "One file a job wrote",
            http_openapi.job_file(vertical),
        ),
    ):
        app.add_api_route(
            path,
            handler,
            methods=[method],
            summary=summary,
            tags=[vertical.name],
            status_code=204 if method == "DELETE" else 202 if method == "POST" else 200,
            response_model=None,
            openapi_extra=told,
        )


class Server:
    """Runs an application until it is told to drain.

    Args:
        app: from :func:`create_app`.
        config: ``config.serve``.
        bound: from :func:`bind`.

    Raises:
        ConfigError: the address of ``serve.admin`` cannot be had.
    """

    def __init__(self, app: Application, config: Config, bound: socket.socket) -> None:
        self.url = _url(bound, app.tls)
        self._settings = config.serve
        self._app = app
        self._health = app.http.health
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._forced: asyncio.Event | None = None
        bounds = Bounds(
            connections=config.serve.max_connections,
            request_seconds=config.serve.request_timeout_seconds,
            keep_alive_seconds=config.serve.keep_alive_seconds,
            promise=app.promise,
        )
        app.on_drain.append(self._drain_once)
        self._sockets = [SocketServer(bound, app.http, app.http.limit, bounds, app.tls)]
        self.admin_url = ""
        if app.admin is not None:
            aside = bind(config.serve.admin.host, config.serve.admin.port or 0)
            self.admin_url = _url(aside, app.tls)
            bounds = dataclasses.replace(bounds, connections=ADMIN_CONNECTIONS, promise=None)
            self._sockets.append(SocketServer(aside, app.admin, app.admin.limit, bounds, app.tls))

    @property
    def pages_url(self) -> str:
        """Where the pages are, "" where there are none."""
        return f"{self.url}/ui" if self._settings.web else ""

    @property
    def grpc_address(self) -> str:
        """Where gRPC is served, "" while or if it is not."""
        return "" if self._app.grpc is None else self._app.grpc.address

    def run(self, serving: Callable[[], None] | None = None) -> None:
        """Serve in this thread until drained; in the main thread signals drain it.

        Args:
            serving: called once connections are taken and signals are heard.

        Raises:
            EngineFailed: the engine ended; the server told so, and drained.
        """
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._serve(serving))
        if (failure := self._app.failure()) is not None:
            raise EngineFailed(
                f"the device thread of the engine ended: {failure}",
                hint="the log says where; start the server again",
            )

    async def _watch(self) -> None:
        """Not ready as soon as the engine has ended, and then drain."""
        while (failure := self._app.failure()) is None:
            await asyncio.sleep(ENGINE_LOOK)
        self._health.reasons["engine"] = f"the device thread of the engine ended: {failure}"
        log.critical("the engine ended (%s): draining", failure)
        if self._health.drain_until is None:
            self._drain()

    async def _serve(self, serving: Callable[[], None] | None) -> None:
        self._ending, self._forced = asyncio.Event(), asyncio.Event()
        with self._signals():
            async with self._app.lifespan():
                for sockets in self._sockets:
                    sockets.start()
                if serving is not None:
                    serving()
                watching = asyncio.ensure_future(self._watch())
                await self._ending.wait()
                watching.cancel()
                seconds = self._settings.drain_seconds
                draining = asyncio.gather(*(one.drain(seconds) for one in self._sockets))
                forced = asyncio.ensure_future(self._forced.wait())
                await asyncio.wait((draining, forced), return_when=asyncio.FIRST_COMPLETED)
                forced.cancel()
                if not draining.done():
                    self._health.drain_until = time.monotonic()
                    draining.cancel()
                    for sockets in self._sockets:
                        sockets.stop()

    def drain(self) -> None:
        """Begin to end, from any thread; called again, end now."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nothing is left to drain
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)

    def _drain_once(self) -> None:
        """Begin to end; asked again, nothing more: who presses a button twice is not in a hurry."""
        if self._health.drain_until is None:
            self.drain()

    def _drain(self) -> None:
        assert self._loop is not None
        assert self._ending is not None
        assert self._forced is not None
        if self._health.drain_until is not None:
            self._ending.set()
            self._forced.set()
            return
        announce = self._settings.announce_seconds
        self._health.drain(announce + self._settings.drain_seconds)
        log.info("draining: not ready any more, serving for %g s, then closing", announce)
        self._loop.call_later(announce, self._ending.set)

    @contextlib.contextmanager
    def _signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._drain)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)


def _url(bound: socket.socket, tls: TlsFiles | None) -> str:
    host, port = bound.getsockname()[:2]
    scheme = "http" if tls is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything expensive starts.

    Raises:
        ConfigError: the port is in use or not allowed, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror:
        raise ConfigError(
            f"serve.host {host!r} is not an address", hint="use 127.0.0.1 or 0.0.0.0"
        ) from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {_why(error)}", hint=HINT) from None
    return bound


HINT = "stop the other program, or choose another with --port (0 takes a free one)"


def _why(error: OSError) -> str:
    said = {
        errno.EADDRINUSE: "the port is in use",
        errno.EACCES: "ports below 1024 need privileges",
        errno.EADDRNOTAVAIL: "this machine does not have that address",
    }
    return said.get(error.errno or 0, error.strerror or "unknown")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
