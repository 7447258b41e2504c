"""The HTTP door: the app and a server that drains.

:func:`create_app` makes the ASGI app; :class:`Server` runs it with uvicorn. On SIGTERM or Ctrl-C
the server is not ready at once, still serves for ``announce_seconds``, then takes no new
connection, answers every accepted request within ``drain_seconds`` and ends with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from plinth.engine import ConfigError, Engine, InputError, PlinthError
from plinth.pipelines.assembly import is_folder_vertical, sla_of
from plinth.pipelines.config.settings import Config, ServeConfig
from plinth.pipelines.folders.jobs import Jobs
from plinth.pipelines.http import openapi as http_openapi
from plinth.pipelines.http.app import Gate, Health, add_common_routes, add_error_handlers, publish
from plinth.pipelines.http.fast_path import Express
from plinth.pipelines.http.head_cache import Heads
from plinth.pipelines.http.protocol import Protocol
from plinth.pipelines.http.records import RecordDoor
from plinth.pipelines.http.upload_routes import UploadDoor
from plinth.pipelines.interpreter import set_for_serving
from plinth.verticals import Vertical

log = logging.getLogger("plinth.serve")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def create_app(verticals: Mapping[str, Vertical[Any, Any]], engine: Engine, config: Config) -> Gate:
    """The ASGI app.

    Args:
        verticals: loaded verticals by name; their models are known to ``engine``.
        engine: started and closed by the caller.
        config: ``config.serve`` and the verticals' promises.

    Raises:
        ConfigError: the API key's variable is not set, or a promise makes no sense.
    """
    health = Health()
    slas = {name: sla_of(vertical, config) for name, vertical in verticals.items()}
    pool = ThreadPoolExecutor(8, thread_name_prefix="plinth-http")
    folders = {name: v for name, v in verticals.items() if is_folder_vertical(v)}
    jobs = Jobs(folders, engine, slas, config.serve.upload) if folders else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with contextlib.ExitStack() as stack:
            tasks = [asyncio.create_task(warm_up(verticals, engine, health, stack))]
            if jobs is not None:
                tasks.append(asyncio.create_task(_purge(jobs)))
            yield
            for task in tasks:
                task.cancel()
            if jobs is not None:
                await asyncio.to_thread(jobs.close, health.seconds_left)
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Plinth",
        version="1",
        summary="One inference engine under pluggable verticals.",
        lifespan=lifespan,
        redoc_url=None,
    )
    schemas: dict[str, Any] = {"Error": http_openapi.ERROR_SCHEMA}
    doors: dict[str, RecordDoor] = {}
    for name, vertical in verticals.items():
        if vertical.request is not None:
            door = RecordDoor(vertical, engine, slas[name], config.serve, pool)
            doors[door.path] = door
            schemas |= http_openapi.schemas(vertical)
            _record_route(app, door)
        elif jobs is not None and name in folders:
            _upload_routes(app, UploadDoor(vertical, jobs, config.serve))
    add_common_routes(app, engine, health, verticals)
    add_error_handlers(app)
    publish(app, schemas)
    return Gate(app, doors, config.api_key(), config.serve, health)


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


async def _purge(jobs: Jobs) -> None:
    while True:
        await asyncio.sleep(min(60.0, jobs.limits.keep_seconds))
        await asyncio.to_thread(jobs.purge)


def _record_route(app: FastAPI, door: RecordDoor) -> None:
    """Put the door into the API docs; the gate takes its requests there by a shorter way."""
    vertical = door.vertical

    async def infer(request: Request) -> Response:
        return await door.answer(request.scope, request.receive)

    app.add_api_route(
        door.path,
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
    for path, method, handler, summary in (
        (f"/v1/{vertical.name}/{vertical.action}", "POST", submit, vertical.summary),
        (one, "GET", status, "How a job stands"),
        (one, "DELETE", delete, "Forget a job and its files"),
        (f"{one}/files/{{name:path}}", "GET", file, "One file a job wrote"),
    ):
        app.add_api_route(
            path,
            handler,
            methods=[method],
            summary=summary,
            tags=[vertical.name],
            response_model=None,
            openapi_extra=http_openapi.uploads() if handler is submit else None,
        )


class Server:
    """Runs an app until it is told to drain.

    Args:
        app: from :func:`create_app`.
        config: ``config.serve``.
        bound: from :func:`bind`.
    """

    def __init__(self, app: Gate, config: Config, bound: socket.socket) -> None:
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._settings = config.serve
        self._bound = bound
        self._health = app.health
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server = _Uvicorn(_uvicorn_config(app, config.serve), self._drain)

    def run(self) -> None:
        """Serve in this thread until drained; in the main thread signals drain it."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[self._bound]))

    def drain(self) -> None:
        """Begin to end, from any thread; called again, end now."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nothing is left to drain
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._health.drain_until is not None:
            self._server.should_exit = self._server.force_exit = True
            return
        announce = self._settings.announce_seconds
        self._health.drain(announce + self._settings.drain_seconds)
        log.info("draining: not ready any more, serving for %g s, then closing", announce)
        assert self._loop is not None
        self._loop.call_later(announce, setattr, self._server, "should_exit", True)


class _Uvicorn(uvicorn.Server):
    """uvicorn with our own answer to signals, so that a drained server exits with 0."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)


def _uvicorn_config(app: Gate, settings: ServeConfig) -> uvicorn.Config:
    lanes = {door.path.encode(): Express(app, door) for door in app.doors.values()}
    protocol: Any = functools.partial(Protocol, settings, lanes, Heads())
    return uvicorn.Config(
        app,
        loop="none",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )


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


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
