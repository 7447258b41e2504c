"""The HTTP door: what answers, and a server that drains.

:func:`create_app` makes what answers; :class:`Server` runs it. On SIGTERM or Ctrl-C the server is
not ready at once, still serves for ``announce_seconds``, then takes no new connection, answers
every accepted request within ``drain_seconds`` and ends with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from plinth.engine import ConfigError, Engine, EngineFailed, InputError, ModelStore, PlinthError
from plinth.pipelines.assembly import is_folder_vertical, sla_of, store_path
from plinth.pipelines.config.settings import Config, ServeConfig
from plinth.pipelines.folders.jobs import Jobs
from plinth.pipelines.http import openapi as http_openapi
from plinth.pipelines.http.access import Access
from plinth.pipelines.http.app import add_common_routes, add_error_handlers
from plinth.pipelines.http.application import HttpApplication
from plinth.pipelines.http.body import headers_of, whole
from plinth.pipelines.http.disconnect import cancel_on_disconnect
from plinth.pipelines.http.health import Health
from plinth.pipelines.http.record_routes import RecordRoute
from plinth.pipelines.http.tensor_routes import TensorRoutes
from plinth.pipelines.http.upload_routes import UploadDoor
from plinth.pipelines.http.wire.admission import Limit
from plinth.pipelines.http.wire.server import Bounds, SocketServer
from plinth.pipelines.interpreter import set_for_serving
from plinth.pipelines.live_tables import LiveTables
from plinth.pipelines.oip.service import ModelService, load_at_start
from plinth.pipelines.records import RecordService
from plinth.verticals import Vertical

if TYPE_CHECKING:
    from plinth.pipelines.grpc.server import GrpcDoor

log = logging.getLogger("plinth.serve")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENGINE_LOOK = 0.25
"""Seconds between two looks at whether the engine is well."""
LOOK = 1.0
"""Seconds between two looks at whether the verticals' files of settings have changed."""


def create_app(
    verticals: Mapping[str, Vertical[Any, Any]], engine: Engine, config: Config
) -> Application:
    """What answers requests, and what lives as long as the server.

    Args:
        verticals: loaded verticals by name; their models are known to ``engine``.
        engine: started and closed by the caller.
        config: ``config.serve`` and the verticals' promises.

    Raises:
        ConfigError: the API key's variable is not set, or a promise makes no sense.
    """
    health, serve = Health(), config.serve
    slas = {name: sla_of(vertical, config) for name, vertical in verticals.items()}
    pool = ThreadPoolExecutor(8, thread_name_prefix="plinth-http")
    folders = {name: v for name, v in verticals.items() if is_folder_vertical(v)}
    live = LiveTables(config, verticals)
    jobs = Jobs(folders, engine, slas, serve.upload) if folders else None

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        with contextlib.ExitStack() as stack:
            if tensors is not None:
                await tensors.start()
            tasks = [asyncio.create_task(warm_up(verticals, engine, health, stack))]
            tasks.append(asyncio.create_task(_look_after(live)))
            if jobs is not None:
                tasks.append(asyncio.create_task(_purge(jobs)))
            yield
            for task in tasks:
                task.cancel()
            if tensors is not None:
                await tensors.stop(health.seconds_left)
            if jobs is not None:
                await asyncio.to_thread(jobs.close, health.seconds_left)
            pool.shutdown(wait=False, cancel_futures=True)

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
                pool=pool,
            )
            route = RecordRoute(service, serve, limit, health)
            routes[route.path] = route
            _record_route(app, route, serve)
        elif jobs is not None and name in folders:
            _upload_routes(app, UploadDoor(vertical, jobs, serve))
    store = ModelStore(store_path(config))
    models = ModelService(engine, store, serve.oip) if serve.oip.enabled else None
    if models is not None:
        seconds = serve.request_timeout_seconds
        TensorRoutes(models, health, serve.max_body_bytes, seconds).add_to(app)
        load_at_start(engine, store, serve.oip.models)
    add_common_routes(app, engine, health, verticals)
    add_error_handlers(app)
    key = config.api_key()
    tensors = None if models is None else _grpc_door(models, config, key, health)
    http_openapi.publish(app, verticals.values(), locked=key is not None)
    access = Access(key, serve.host, serve.allowed_hosts, health)
    uploads = serve.upload.max_bytes if folders else 0
    most = max(serve.max_body_bytes, uploads, serve.oip.max_body_bytes)
    application = HttpApplication(app, routes, access, limit, most, health)
    promises = [slas[route.service.vertical.name].deadline_ms for route in routes.values()]
    tightest = min((ms / 1e3 for ms in promises if ms is not None), default=None)
    return Application(application, lifespan, tightest, lambda: engine.failure, tensors)


def _grpc_door(
    service: ModelService, config: Config, key: str | None, health: Health
) -> GrpcDoor | None:
    """The gRPC server of the config, which is imported if there is to be one."""
    serve = config.serve
    if serve.grpc.port is None:
        return None
    from plinth.pipelines.grpc.server import GrpcDoor

    return GrpcDoor(
        service,
        serve.grpc,
        host=serve.host,
        key=key,
        reasons=health.reasons,
        seconds=serve.request_timeout_seconds,
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
    """

    http: HttpApplication
    lifespan: Callable[[], contextlib.AbstractAsyncContextManager[None]]
    promise: float | None
    failure: Callable[[], str | None]
    grpc: GrpcDoor | None = None


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
    state = vertical.snapshot()
    try:
        result = engine.run(vertical.infer([vertical.example()])).value[0]
        if is_folder_vertical(vertical) and not isinstance(result, InputError):
            with tempfile.TemporaryDirectory(prefix="plinth-warm-up-") as folder:
                vertical.write(result, Path(folder))
    finally:
        if state is not None:
            vertical.restore(state)


async def _look_after(live: LiveTables) -> None:
    while True:
        await asyncio.sleep(LOOK)
        live.look()


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
    """

    def __init__(self, app: Application, config: Config, bound: socket.socket) -> None:
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
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
        self._sockets = SocketServer(bound, app.http, app.http.limit, bounds)

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
                self._sockets.start()
                if serving is not None:
                    serving()
                watching = asyncio.ensure_future(self._watch())
                await self._ending.wait()
                watching.cancel()
                draining = asyncio.ensure_future(self._sockets.drain(self._settings.drain_seconds))
                forced = asyncio.ensure_future(self._forced.wait())
                await asyncio.wait((draining, forced), return_when=asyncio.FIRST_COMPLETED)
                forced.cancel()
                if not draining.done():
                    self._health.drain_until = time.monotonic()
                    draining.cancel()
                    self._sockets.stop()

    def drain(self) -> None:
        """Begin to end, from any thread; called again, end now."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nothing is left to drain
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)

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
