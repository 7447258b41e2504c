"""``inference.GRPCInferenceService`` and ``grpc.health.v1.Health`` in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import orjson
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Histogram
from torch import Tensor

from plinth.engine import (
    Answer,
    Cancelled,
    Closed,
    ConfigError,
    DeadlineRefused,
    InputError,
    PlinthError,
    QueueFull,
    Refused,
)
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.config.settings import GrpcConfig
from plinth.pipelines.grpc import messages
from plinth.pipelines.grpc.arrivals import Arrivals, Places
from plinth.pipelines.grpc.messages import HEALTH, INFERENCE, message
from plinth.pipelines.identity.callers import EVERYTHING, Caller, Identity, Need, Role
from plinth.pipelines.identity.request_log import RequestLog
from plinth.pipelines.live.tables import Marks
from plinth.pipelines.observability.tracing import HEADER as TRACE
from plinth.pipelines.observability.tracing import Tracing
from plinth.pipelines.oip.service import ModelService, check_parameters, less, within
from plinth.pipelines.oip.tensors import NAMES, TensorHeader, from_bytes, from_json, header_of
from plinth.pipelines.oip.tensors import to_bytes as raw_of
from plinth.pipelines.records import FAULTS, InternalError, explained, late_at_door, pairs

log = logging.getLogger("plinth.grpc")

STREAMED = 16
"""Requests of one stream that are in work together; the next is not read before one is answered."""
WATCHES = 16
"""Clients that watch the server's health together, or ask for it; it asks for no key."""
OPEN_CALLS = 4 * WATCHES
"""Places of calls that ask for no key, and of those on their way to a refusal; beside
``max_streams``, so that neither takes the other's."""
_SLACK = 64 << 10  # bytes of a message beside its tensors
_ASIDE = 1 << 20  # bytes from which tensors are read on another thread
_ASK_SECONDS = 1.0  # for the message of a call that asks for no key
_IDLE_MS = 300_000
_PING_MS = 60_000

_OPEN = ("ServerLive", "ServerReady")
_ADMINISTRATIVE = ("RepositoryModelLoad", "RepositoryModelUnload")
"""Not here where the server has ``serve.admin``."""
_ROLES: dict[str, Role] = {
    "ModelInfer": "score",
    "ModelStreamInfer": "score",
    "RepositoryModelLoad": "admin",
    "RepositoryModelUnload": "admin",
    "ModelReady": "read",
    "ServerMetadata": "read",
    "ModelMetadata": "read",
    "ModelConfig": "read",
    "ModelStatistics": "read",
    "RepositoryIndex": "read",
}
"""The least role for each method that asks for a key."""
_CODES: dict[type[PlinthError], grpc.StatusCode] = {
    InputError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineRefused: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Closed: grpc.StatusCode.UNAVAILABLE,
    Refused: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}
_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
"""Those that are the server's doing, as OpenTelemetry's conventions have it."""
_REASONS = {
    "model_not_found": grpc.StatusCode.NOT_FOUND,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "model_in_use": grpc.StatusCode.FAILED_PRECONDITION,
    "cannot_load": grpc.StatusCode.FAILED_PRECONDITION,
    "unauthorised": grpc.StatusCode.UNAUTHENTICATED,
    "rate_limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "served_elsewhere": grpc.StatusCode.UNIMPLEMENTED,
    "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_REQUESTS = Counter(
    "plinth_grpc_requests", "gRPC calls by method and code.", ("method", "code"), registry=REGISTRY
)
_SECONDS = Histogram(
    "plinth_grpc_request_seconds",
    "Time from a gRPC call's message to the end of its answer.",
    ("method",),
    registry=REGISTRY,
)

Context = Any
"""``grpc.aio.ServicerContext``, which takes bytes here: messages are read within a bound."""


class GrpcDoor:
    """The gRPC server; started and stopped in the event loop of the HTTP server.

    Args:
        service: the models.
        config: ``[serve.grpc]``.
        tls: files of the certificate, the key and the client CA; empty: no TLS.
        host: to listen on.
        identity: who has a key; false: nobody needs one.
        requests: the log of requests, if there is one.
        reasons: why the server is not ready; a live view.
        seconds: longest wait for an answer.
        administrative: whether models are loaded and unloaded here.
        tracing: told of each call, if there is any.

    Attributes:
        address: where it listens, once started.

    Raises:
        ConfigError: a file of the certificate cannot be read.
    """

    def __init__(
        self,
        service: ModelService,
        config: GrpcConfig,
        *,
        tls: tuple[Path, ...],
        host: str,
        identity: Identity,
        requests: RequestLog | None,
        reasons: Mapping[str, str],
        seconds: float,
        administrative: bool = True,
        tracing: Tracing | None = None,
    ) -> None:
        self.address = ""
        self._models = service
        self._config = config
        self._host = f"[{host}]" if ":" in host else host
        self._identity = identity if identity else None
        self._log, self._tracing = requests, tracing
        self._reasons = reasons
        self._seconds = seconds
        self._tls = _TlsFiles(tls) if tls else None
        self._server: Any = None
        self._hidden = () if administrative else _ADMINISTRATIVE
        self._calls = Places(config.max_streams, "calls in work (serve.grpc.max_streams)")
        self._watches = Places(WATCHES, "whoever watches this server")
        self._stopping = False
        self._arrivals = Arrivals(config.max_arriving, seconds)
        self._unknown = Arrivals(0, seconds, grace=_ASK_SECONDS, calls=WATCHES)

    # -- life --------------------------------------------------------------------------------
    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the port is in use or not allowed.
        """
        most = self._models.config.max_body_bytes
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=self._config.max_streams + OPEN_CALLS,
            interceptors=(_AccessFirst(self._admit, self._note_refusal),),
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", most + _SLACK),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.keepalive_time_ms", _PING_MS),
            ),
        )
        self._server.add_generic_rpc_handlers(tuple(self._handlers()))
        wanted = f"{self._host}:{self._config.port}"
        try:
            port = (
                self._server.add_insecure_port(wanted)
                if self._tls is None
                else self._server.add_secure_port(wanted, self._tls.credentials())
            )
        except RuntimeError:
            raise ConfigError(
                f"gRPC cannot listen on {wanted}: in use, not allowed, or no address of this "
                "machine",
                hint="choose another serve.grpc.port",
            ) from None
        await self._server.start()
        self.address = f"{self._host}:{port}"

    async def stop(self, seconds: float) -> None:
        """Take no new calls, and give those in work so long."""
        self._stopping = True
        if self._server is not None:
            await self._server.stop(seconds)

    def _handlers(self) -> list[Any]:
        unary = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "ModelInfer": self._infer,
        }
        methods = {name: self._unary(name, f) for name, f in unary.items()}
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        health = {
            "Check": grpc.stream_stream_rpc_method_handler(self._check_health),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch_health),
        }
        return [
            grpc.method_handlers_generic_handler(f"{INFERENCE}.GRPCInferenceService", methods),
            grpc.method_handlers_generic_handler(f"{HEALTH}.Health", health),
        ]

    def _unary(self, name: str, answer: Callable[[bytes, Context], Awaitable[Any]]) -> Any:
        """A handler that turns errors into codes, and counts.

        To gRPC it is one of a stream: of that alone a message is read when it is asked for.
        """

        async def handle(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            begun = time.perf_counter()
            code, told = grpc.StatusCode.CANCELLED, None
            try:
                if name in _OPEN:
                    told = bytes((await answer(b"", context)).SerializeToString())
                else:
                    with self._calls.hold():
                        raw = await self._arrivals.only(requests, _who())
                        told = bytes((await answer(raw, context)).SerializeToString())
                code = grpc.StatusCode.OK
            except FAULTS as error:
                code = _fail(context, explained(error))
            finally:
                self._note(name, code, begun, _CALL.get())
            if told is not None:
                yield told

        return grpc.stream_stream_rpc_method_handler(handle)

    def _admit(self, method: str, metadata: Any) -> None:
        """See whether a call may be made; its task then knows who makes it.

        Raises:
            AccessDenied: no key, or one that may not do this.
            RateLimited: not so often.
        """
        service, _, name = method.lstrip("/").partition("/")
        call = _Call(next((v for k, v in metadata or () if k == TRACE), None))
        _CALL.set(call)
        if service == f"{HEALTH}.Health":
            return
        if self._identity is not None and name not in _OPEN:
            self._know(call, name, metadata)
        if name in self._hidden:
            raise InputError(
                f"{name} is not served by gRPC here",
                hint="load and unload models over REST at serve.admin",
                reason="served_elsewhere",
            )

    def _know(self, call: _Call, name: str, metadata: Any) -> None:
        """See who makes a call, and whether they may."""
        assert self._identity is not None
        fields = {
            key.encode(): value if isinstance(value, bytes) else value.encode()
            for key, value in metadata or ()
        }
        call.fields = fields
        call.caller = self._identity.caller(fields)
        call.caller.admit(Need(_ROLES.get(name, "read")))

    def _note_refusal(self, method: str, code: grpc.StatusCode) -> None:
        """Count and log a call that was refused before its message was read."""
        name = method.rpartition("/")[2]
        known = name if name in _ROLES or name in _OPEN else "other"
        self._note(known, code, time.perf_counter(), _CALL.get())

    def _note(self, method: str, code: grpc.StatusCode, begun: float, call: _Call) -> None:
        seconds = time.perf_counter() - begun
        _REQUESTS.labels(method, code.name).inc()
        _SECONDS.labels(method).observe(seconds)
        if method in _OPEN:
            return
        models = "" if call.answer is None else pairs(call.answer.models)
        if self._log is not None:
            self._log.note(_who() or "", f"gRPC {method}", code.name, seconds, models)
        if self._tracing is not None:
            about: dict[str, str | int] = {"rpc.system": "grpc", "rpc.method": method}
            about |= {"rpc.grpc.status_code": code.value[0]}
            about |= {"plinth.models": models} if models else {}
            self._tracing.span(
                f"{INFERENCE}.GRPCInferenceService/{method}",
                call.trace,
                begun,
                kind="server",
                about=about,
                timing=None if call.answer is None else call.answer.timing.as_dict(),
                failed=code in _FAULTS,
            )

    # -- what there is ---------------------------------------------------------------------------
    async def _live(self, raw: bytes, context: Context) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _ready(self, raw: bytes, context: Context) -> Any:
        return message("ServerReadyResponse")(ready=not self._reasons)

    async def _model_ready(self, raw: bytes, context: Context) -> Any:
        asked = _read("ModelReadyRequest", raw)
        _check_reach(asked.name)
        try:
            fine = self._models.is_ready(asked.name, asked.version)
        except InputError:  # asked of a model that is not there, the protocol answers no
            fine = False
        return message("ModelReadyResponse")(ready=fine)

    async def _server_metadata(self, raw: bytes, context: Context) -> Any:
        return message("ServerMetadataResponse")(**self._models.server_metadata())

    async def _metadata(self, raw: bytes, context: Context) -> Any:
        asked = _read("ModelMetadataRequest", raw)
        _check_reach(asked.name)
        return message("ModelMetadataResponse")(**self._models.metadata(asked.name, asked.version))

    async def _model_config(self, raw: bytes, context: Context) -> Any:
        asked = _read("ModelConfigRequest", raw)
        _check_reach(asked.name)
        told = self._models.model_config(asked.name, asked.version)
        for tensor in (*told["input"], *told["output"]):
            tensor["data_type"] = messages.DATA_TYPES[tensor["data_type"].removeprefix("TYPE_")]
        return message("ModelConfigResponse")(config=told)

    async def _statistics(self, raw: bytes, context: Context) -> Any:
        asked = _read("ModelStatisticsRequest", raw)
        _check_reach(asked.name)
        told = self._models.statistics(asked.name, asked.version)
        return message("ModelStatisticsResponse")(**told)

    async def _index(self, raw: bytes, context: Context) -> Any:
        asked = _read("RepositoryIndexRequest", raw)
        _check_reach("")
        found = self._models.index(ready_only=asked.ready)
        return message("RepositoryIndexResponse")(models=found)

    async def _load(self, raw: bytes, context: Context) -> Any:
        asked = _read("RepositoryModelLoadRequest", raw)
        _check_reach(asked.model_name)
        if asked.parameters:
            raise InputError(
                "a model is loaded as it is in the store, without parameters",
                field="parameters",
                hint="leave config and files out",
            )
        await self._models.load(asked.model_name)
        return message("RepositoryModelLoadResponse")()

    async def _unload(self, raw: bytes, context: Context) -> Any:
        asked = _read("RepositoryModelUnloadRequest", raw)
        _check_reach(asked.model_name)
        await self._models.unload(asked.model_name)
        return message("RepositoryModelUnloadResponse")()

    # -- inference -------------------------------------------------------------------------------
    async def _infer(self, raw: bytes, context: Context) -> Any:
        answer, told = await self._answer(raw, context.time_remaining())
        context.set_trailing_metadata(_about(answer))
        _CALL.get().answer = answer
        return told

    async def _answer(
        self, raw: bytes, remaining: float | None
    ) -> tuple[Answer[dict[str, Tensor]], Any]:
        """Run a model on the rows of a message; cancelling the task frees their place."""
        if "warm_up" in self._reasons:
            raise Refused(self._reasons["warm_up"], retry_after=1.0)
        begun = time.perf_counter()
        with self._models.budget.reserve(len(raw)):
            large = len(raw) > _ASIDE
            name = "ModelInferRequest"
            asked = await asyncio.to_thread(_read, name, raw) if large else _read(name, raw)
            _check_reach(asked.model_name)
            spec = self._models.spec(asked.model_name, asked.model_version)
            self._models.check_counts(spec, len(asked.inputs), len(asked.outputs))
            for output in asked.outputs:
                check_parameters(_parameters(output.parameters))
            wanted = self._models.wanted(spec, [output.name for output in asked.outputs])
            promise = self._models.promise(spec.name, _parameters(asked.parameters))
            promise = within(promise, remaining)
            most = self._models.config.max_body_bytes
            rows = await asyncio.to_thread(_rows, asked, most) if large else _rows(asked, most)
            decoded = time.perf_counter()
            try:
                async with asyncio.timeout(self._seconds):
                    sla = less(promise, decoded - begun)
                    answer = await self._models.infer(spec, rows, sla)
            except TimeoutError:
                raise InputError(
                    f"no answer within {self._seconds:g} s",
                    hint="send fewer rows at once, or raise serve.request_timeout_seconds",
                    reason="timeout",
                ) from None
            encoding = time.perf_counter()
            told = message("ModelInferResponse")(
                model_name=spec.name, model_version=spec.version, id=asked.id
            )
            for name in wanted:
                tensor = answer.value[name]
                told.outputs.add(name=name, datatype=NAMES[tensor.dtype], shape=list(tensor.shape))
                told.raw_output_contents.append(bytes(raw_of(tensor)))
        now, timing = time.perf_counter(), answer.timing
        timing.decode, timing.encode = decoded - begun, now - encoding
        timing.total = now - begun
        answer.late = answer.late or late_at_door(answer, promise, timing.total)
        return answer, told

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> Any:
        """Answers in the order of the requests, some of which are in work together.

        A stream's next message may always be on its way, so each holds a place of arrivals.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._calls.hold())
                stack.enter_context(self._arrivals.places.hold(_who()))
            except QueueFull as error:
                self._note("ModelStreamInfer", code_of(error), time.perf_counter(), _CALL.get())
                await context.abort(code_of(error), str(error), tuple(_trailing(error)))
            async for told in self._answers(requests, context):
                yield told

    async def _answers(self, requests: AsyncIterator[bytes], context: Context) -> Any:
        waiting: deque[asyncio.Task[Any]] = deque()
        arriving: asyncio.Task[bytes | None] | None = None
        incoming: AsyncIterator[bytes] | None = aiter(requests)
        counted = False
        try:
            while True:
                if arriving is None and incoming is not None and len(waiting) < STREAMED:
                    arriving = asyncio.ensure_future(_next(incoming))
                watched = [task for task in (arriving, *list(waiting)[:1]) if task is not None]
                if not watched:
                    return
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                if arriving is not None and arriving.done():
                    raw, arriving = arriving.result(), None
                    if raw is None:
                        incoming = None
                    else:
                        answering = self._streamed(raw, context.time_remaining(), counted)
                        waiting.append(asyncio.ensure_future(answering))
                        counted = True
                while waiting and waiting[0].done():
                    yield waiting.popleft().result()
        finally:
            for task in (arriving, *waiting):
                if task is not None:
                    task.cancel()

    async def _streamed(self, raw: bytes, remaining: float | None, count: bool) -> bytes:
        """The answer to a request of a stream; the first was counted with the call."""
        told = message("ModelStreamInferResponse")()
        begun, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        call = _CALL.get()
        own = _Call(call.trace)
        try:
            if count and self._identity is not None and call.fields is not None:
                call.caller = self._identity.caller(call.fields)  # it may be revoked by now
                call.caller.admit(Need("score"))
            own.answer, answer = await self._answer(raw, remaining)
            told.infer_response.CopyFrom(answer)
            code = grpc.StatusCode.OK
        except FAULTS as error:
            known = explained(error)
            code, told.error_message = code_of(known), str(known)
        finally:
            self._note("ModelStreamInfer", code, begun, own)
        return bytes(told.SerializeToString())

    # -- gRPC's own health protocol ----------------------------------------------------------------
    async def _check_health(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        try:
            raw = await self._unknown.only(requests)
            asked = _read("HealthCheckRequest", raw, HEALTH).service
        except PlinthError as error:
            await context.abort(code_of(error), str(error))
        if asked not in ("", f"{INFERENCE}.GRPCInferenceService"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        yield self._health()

    def _health(self) -> bytes:
        status = messages.NOT_SERVING if self._reasons else messages.SERVING
        return bytes(message("HealthCheckResponse", HEALTH)(status=status).SerializeToString())

    async def _watch_health(self, requests: Any, context: Context) -> AsyncIterator[bytes]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._watches.hold())
            except QueueFull as error:
                await context.abort(code_of(error), str(error))
            told = b""
            while True:
                if (now := self._health()) != told:
                    told = now
                    yield now
                if self._stopping:
                    return
                await asyncio.sleep(1.0)


class _Call:
    """What is known of the call that a task answers.

    Args:
        trace: the client's ``traceparent``, if it sent one.
    """

    caller: Caller | None = None
    fields: Mapping[bytes, bytes] | None = None
    answer: Answer[dict[str, Tensor]] | None = None

    def __init__(self, trace: bytes | str | None) -> None:
        self.trace = trace


_CALL: ContextVar[_Call] = ContextVar("call")


def _who() -> str | None:
    """The name of who makes this call, ``None`` where nobody needs a key."""
    caller = _CALL.get().caller
    return None if caller is None else caller.name


def _check_reach(model: str) -> None:
    """Raises AccessDenied where the caller does not reach a model; "": all of them."""
    caller = _CALL.get().caller
    if caller is not None:
        caller.check(Need("read", model or EVERYTHING))


class _AccessFirst(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses a call that may not be made before its message is read.

    Args:
        admit: raises PlinthError where a method may not be called with this metadata.
        note: told of each call that is refused, or whose method is not known.
    """

    def __init__(
        self,
        admit: Callable[[str, Any], None],
        note: Callable[[str, grpc.StatusCode], None],
    ) -> None:
        self._admit = admit
        self._note = note

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """See grpc.aio: what handles a call."""
        details = handler_call_details
        try:
            self._admit(details.method, details.invocation_metadata)
        except PlinthError as error:
            self._note(details.method, code_of(error))
            # Messages of a stream are read when they are asked for: here, never.
            return grpc.stream_stream_rpc_method_handler(partial(_refuse, error))
        handler = await continuation(details)
        if handler is None:
            self._note(details.method, grpc.StatusCode.UNIMPLEMENTED)
        return handler


async def _refuse(error: PlinthError, requests: AsyncIterator[bytes], context: Context) -> None:
    await context.abort(code_of(error), str(error), tuple(_trailing(error)))


async def _next(requests: AsyncIterator[bytes]) -> bytes | None:
    return await anext(requests, None)


def _fail(context: Context, error: PlinthError) -> grpc.StatusCode:
    """Let a call end with the code and sentence of an error; what it returns is not sent."""
    context.set_trailing_metadata(_trailing(error))
    code = code_of(error)
    context.set_code(code)
    context.set_details(str(error))
    return code


def _trailing(error: PlinthError) -> list[tuple[str, str]]:
    told = [("plinth-reason", error.reason)]
    if (wait := getattr(error, "retry_after", None)) is not None:
        told.append(("retry-after-ms", str(math.ceil(wait * 1e3))))
    return told


def code_of(error: PlinthError) -> grpc.StatusCode:
    """The gRPC code that means what an error means."""
    if error.reason in _REASONS:
        return _REASONS[error.reason]
    found = (_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    return next(found, grpc.StatusCode.UNAVAILABLE)


def _about(answer: Answer[Any]) -> list[tuple[str, str]]:
    """Where the time went and which models ran, as the headers of the HTTP door tell it."""
    told = [
        ("x-plinth-timing", orjson.dumps(answer.timing.as_dict()).decode()),
        ("x-plinth-models", pairs(answer.models)),
        ("x-plinth-precision", pairs(answer.precision)),
    ]
    if answer.degraded:
        told.append(("x-plinth-degraded", pairs(answer.degraded)))
    return [*told, ("x-plinth-late", "true")] if answer.late else told


def _read(name: str, raw: bytes, package: str = INFERENCE) -> Any:
    try:
        return message(name, package).FromString(raw)
    except DecodeError:
        raise InputError(f"this is no {package}.{name}", reason="malformed_request") from None


def _parameters(given: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in given.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(value, choice)
    return found


def _rows(asked: Any, most: int) -> dict[str, Tensor]:
    """The inputs by name, from raw bytes or from typed contents.

    Raises:
        InputError: both or neither came, or not what the headers say.
    """
    raws = asked.raw_input_contents
    if raws and len(raws) != len(asked.inputs):
        raise InputError(
            f"there are {len(asked.inputs)} inputs and {len(raws)} raw contents",
            field="raw_input_contents",
            hint="send one for each input, in the same order, or typed contents for all",
        )
    rows: dict[str, Tensor] = {}
    for number, given in enumerate(asked.inputs):
        header = header_of(given.name, given.datatype, list(given.shape), most)
        check_parameters(_parameters(given.parameters))
        if header.name in rows:
            raise InputError("an input stands more than once", field=header.name)
        if raws and given.HasField("contents"):
            raise InputError(f"input {header.name} has raw and typed contents", field=header.name)
        rows[header.name] = (
            from_bytes(header, raws[number]) if raws else _typed(header, given.datatype, given)
        )
    return rows


def _typed(header: TensorHeader, datatype: str, given: Any) -> Tensor:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InputError(
            f"input {header.name}: {datatype} has no typed contents",
            field=header.name,
            hint="send raw_input_contents",
            reason="bad_datatype",
        )
    values = getattr(given.contents, field)
    if datatype in ("FP32", "FP64", "BOOL"):
        array = np.array(values, {"FP32": "f4", "FP64": "f8", "BOOL": "?"}[datatype])
        return from_bytes(header, array.tobytes())
    return from_json(header, list(values))


class _TlsFiles:
    """The certificate of the config; gRPC asks for it at each handshake.

    Args:
        files: certificate and key; and who signs the certificates that clients must show.

    Raises:
        ConfigError: one cannot be read.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._files = files
        self._marks = Marks(*files)
        self._known = self._read()

    def _read(self) -> Any:
        try:
            certificate, key, *ca = [path.read_bytes() for path in self._files]
        except OSError as error:
            raise ConfigError(
                f"serve.grpc: cannot read {error.filename}: {error.strerror}"
            ) from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], *ca)

    def credentials(self) -> Any:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._known, self._changed, require_client_authentication=len(self._files) > 2
        )

    def _changed(self) -> Any:
        """The files as they are now, ``None`` while they have not changed."""
        if not self._marks.changed():
            return None
        try:
            return self._read()
        except ConfigError as error:
            log.error("the certificate in force stays: %s", error)
            return None
