"""OpenTelemetry spans of requests and records, told when they are over.

A door knows where the time went once an answer is ready (:class:`plinth.engine.Timing`), so the
spans inside a request's are made then, with the times they had: nothing waits for them, and without
tracing nothing is done. What goes on in spans of its own, such as an upload's items, begins its
span first (:class:`Begun`).

Whether there is tracing, where spans go and how many are kept is said by OpenTelemetry's own
variables (``OTEL_*``).

A span has names of routes, methods, models and reasons; never an id, a key or a value that a client
chose. Of a client's context the ids are taken over (W3C ``traceparent``), ``tracestate`` and
``baggage``, which may hold anything, are not.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from plinth.engine import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger("plinth.traces")

HEADER = "traceparent"
FIELD = HEADER.encode()
PARTS = ("decode", "queue", "device", "encode")
"""Spans inside the one of a request, in the order in which they are drawn."""
FLUSH_SECONDS = 5.0
"""What is left may take so long at the end."""
Kind = Literal["server", "consumer", "internal"]
About = Mapping[str, str | int]
_ON = (
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)
_PROTOCOLS = {"http/protobuf": "http", "grpc": "grpc"}


class Tracing:
    """Makes spans, and hands them to an exporter.

    Args:
        processor: takes spans that have ended.
        environ: OpenTelemetry's variables, for the name of the service.
    """

    def __init__(self, processor: SpanProcessor, environ: Mapping[str, str] = os.environ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        resource = Resource.create({} if named else {"service.name": "plinth"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("plinth")
        self._extract = TraceContextTextMapPropagator().extract
        self.inside = set_span_in_context
        self._kinds = {
            "server": SpanKind.SERVER,
            "consumer": SpanKind.CONSUMER,
            "internal": SpanKind.INTERNAL,
        }
        self.failed = Status(StatusCode.ERROR)

    def begin(self, name: str, parent: bytes | str | None, begun: float, kind: Kind) -> Begun:
        """Begin a span.

        Args:
            name: method and route, or the like; nothing that a client chose.
            parent: the client's ``traceparent``, if it sent one.
            begun: when it arrived (``perf_counter``).
            kind: answered to a client, read from a log, or neither.
        """
        told = parent.decode("latin-1") if isinstance(parent, bytes) else parent
        context = self._extract({HEADER: told}) if told else None
        epoch = time.time_ns() - round(time.perf_counter() * 1e9)
        return Begun(self, self.begin_in(context, name, epoch + round(begun * 1e9), kind), epoch)

    def begin_in(self, context: Any, name: str, first: int, kind: Kind = "internal") -> Any:
        """A span of OpenTelemetry's, in a context or ``None``; nanoseconds since 1970."""
        return self._tracer.start_span(name, context, self._kinds[kind], start_time=first)

    def span(
        self,
        name: str,
        parent: bytes | str | None,
        begun: float,
        *,
        kind: Kind,
        about: About,
        timing: Mapping[str, float] | None = None,
        failed: bool = False,
    ) -> str:
        """Tell of a request that is over: :meth:`begin` and :meth:`Begun.end` at once.

        Returns:
            The ``traceparent`` under which others may go on.
        """
        told = self.begin(name, parent, begun, kind)
        told.end(about, timing, failed=failed)
        return told.traceparent

    def http(
        self,
        method: bytes,
        route: str,
        fields: Mapping[bytes, bytes],
        begun: float,
        status: int,
        timing: Mapping[str, float] | None = None,
        models: str = "",
        begun_as: Begun | None = None,
    ) -> None:
        """Tell of an HTTP request; a status of 0: its client had gone.

        Args:
            method: of the request.
            route: that answered, as it is declared.
            fields: of its head.
            begun: when it arrived (``perf_counter``).
            status: of the answer.
            timing: as :meth:`Begun.end` takes it.
            models: that ran, with their versions.
            begun_as: its span, where that has begun.
        """
        said = method.decode("latin-1")
        name = f"{said} {route}"
        told = begun_as or self.begin(name, fields.get(FIELD), begun, "server")
        about: dict[str, str | int] = {"http.request.method": said, "http.route": route}
        about |= {"http.response.status_code": status} if status else {}
        about |= {"plinth.models": models} if models else {}
        told.end(about, timing, failed=status >= 500, name="" if begun_as is None else name)

    def close(self) -> None:
        """Hand over what is left, for at most :data:`FLUSH_SECONDS`, and end."""
        if not self._provider.force_flush(round(FLUSH_SECONDS * 1e3)):
            log.warning("not all spans were taken within %g s", FLUSH_SECONDS)
        self._provider.shutdown()


class Begun:
    """A span that has begun; others may go on from it, and it ends once.

    Args:
        tracing: who makes the spans.
        span: OpenTelemetry's.
        epoch: when ``perf_counter`` was 0, nanoseconds since 1970: one for all spans in each
            other, so that they stay so, whatever is done to the clock.
    """

    def __init__(self, tracing: Tracing, span: Any, epoch: int) -> None:
        self._tracing, self._span, self._epoch = tracing, span, epoch

    @property
    def traceparent(self) -> str:
        """The context under which others may go on."""
        of = self._span.get_span_context()
        return f"00-{of.trace_id:032x}-{of.span_id:016x}-{int(of.trace_flags):02x}"

    def begin(self, name: str, begun: float) -> Begun:
        """Begin a span inside this one, at a time of ``perf_counter``."""
        first = self._epoch + round(begun * 1e9)
        context = self._tracing.inside(self._span)
        return Begun(self._tracing, self._tracing.begin_in(context, name, first), self._epoch)

    def end(
        self,
        about: About,
        timing: Mapping[str, float] | None = None,
        *,
        failed: bool = False,
        name: str = "",
    ) -> None:
        """It is over.

        Args:
            about: attributes.
            timing: milliseconds, as :meth:`plinth.engine.Timing.as_dict` has them. The parts are
                drawn one after the other: how long each took is measured, where it lies is not.
            failed: it is the server's fault that there is no answer.
            name: by which it is known now, if it was not before.
        """
        if not self._span.is_recording():
            return
        last = self._epoch + round(time.perf_counter() * 1e9)
        if name:
            self._span.update_name(name)
        self._span.set_attributes(dict(about))
        if timing is not None:
            self._span.set_attribute("plinth.batch_rows", int(timing["batch_rows"]))
            self._parts(timing, last)
        if failed:
            self._span.set_status(self._tracing.failed)
        self._span.end(last)

    def _parts(self, timing: Mapping[str, float], last: int) -> None:
        context, first = self._tracing.inside(self._span), self._span.start_time
        at = first
        for part in PARTS:
            nanoseconds = round(timing[f"{part}_ms"] * 1e6)
            begun = max(first, last - nanoseconds) if part == "encode" else at
            at = min(begun + nanoseconds, last)
            self._tracing.begin_in(context, part, begun).end(at)


def is_asked_for(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables ask for traces."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none"
    return not off and any(environ.get(name, "").strip() for name in _ON)


def tracing_from(environ: Mapping[str, str]) -> Tracing | None:
    """Tracing as OpenTelemetry's variables say; ``None`` where they say nothing.

    Raises:
        ConfigError: the extra is not installed, or they name what there is not.
    """
    if not is_asked_for(environ):
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "OTEL_* variables ask for traces, and OpenTelemetry is not installed",
            hint="pip install 'plinth-engine[otel]', or set OTEL_SDK_DISABLED=true",
        ) from None
    return Tracing(BatchSpanProcessor(_exporter(exporter or "otlp", environ)), environ)


@contextmanager
def tracing_while(environ: Mapping[str, str]) -> Iterator[Tracing | None]:
    """As :func:`tracing_from`; closed at the end of the block."""
    tracing = tracing_from(environ)
    try:
        yield tracing
    finally:
        if tracing is not None:
            tracing.close()


@contextmanager
def batch_span(
    tracing: Tracing | None, vertical: str, environ: Mapping[str, str]
) -> Iterator[Begun | None]:
    """The span of a batch, as long as the block lasts; goes on from ``TRACEPARENT``, if set."""
    if tracing is None:
        yield None
        return
    parent = environ.get("TRACEPARENT")
    told = tracing.begin(f"batch {vertical}", parent, time.perf_counter(), "internal")
    failed = True
    try:
        yield told
        failed = False
    finally:
        told.end({"plinth.vertical": vertical}, failed=failed)


def _exporter(name: str, environ: Mapping[str, str]) -> Any:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {name!r}", hint="use otlp, console or none")
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    asked = next((environ[one] for one in variables if environ.get(one)), "http/protobuf")
    if (protocol := _PROTOCOLS.get(asked.strip().lower())) is None:
        raise ConfigError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {asked!r}", hint="use http/protobuf or grpc"
        )
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_exporter

            return grpc_exporter.OTLPSpanExporter()
        from opentelemetry.exporter.otlp.proto.http import trace_exporter

        return trace_exporter.OTLPSpanExporter()
    except ImportError:
        package = f"opentelemetry-exporter-otlp-proto-{protocol}"
        raise ConfigError(
            f"traces by {asked} need {package}", hint=f"pip install {package}"
        ) from None
