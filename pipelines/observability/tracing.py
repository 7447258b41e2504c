"""OpenTelemetry spans of requests and records, told when they are over.

A door knows where the time went once an answer is ready (:class:`plinth.engine.Timing`), so spans
are made then, with the times they had: nothing waits for them, and without tracing nothing is done.
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
Kind = Literal["server", "consumer"]
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
        self._inside = set_span_in_context
        self._kinds = {"server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER}
        self._failed = Status(StatusCode.ERROR)

    def span(
        self,
        name: str,
        parent: bytes | str | None,
        begun: float,
        *,
        kind: Kind,
        about: Mapping[str, str | int],
        timing: Mapping[str, float] | None = None,
        failed: bool = False,
    ) -> str:
        """Tell of a request that is over.

        Args:
            name: method and route, or the like; nothing that a client chose.
            parent: the client's ``traceparent``, if it sent one.
            begun: when it arrived (``perf_counter``); it ends now.
            kind: answered to a client, or read from a log.
            about: attributes.
            timing: milliseconds, as :meth:`plinth.engine.Timing.as_dict` has them. The parts are
                drawn one after the other: how long each took is measured, where it lies is not.
            failed: it is the server's fault that there is no answer.

        Returns:
            The ``traceparent`` under which others may go on.
        """
        clock, now = time.time_ns(), time.perf_counter()
        first = clock - round((now - begun) * 1e9)
        told = parent.decode("latin-1") if isinstance(parent, bytes) else parent
        context = self._extract({HEADER: told}) if told else None
        span = self._tracer.start_span(
            name, context, self._kinds[kind], dict(about), start_time=first
        )
        of = span.get_span_context()
        if span.is_recording():
            if timing is not None:
                span.set_attribute("plinth.batch_rows", int(timing["batch_rows"]))
                self._parts(self._inside(span), timing, first, clock)
            if failed:
                span.set_status(self._failed)
            span.end(clock)
        return f"00-{of.trace_id:032x}-{of.span_id:016x}-{int(of.trace_flags):02x}"

    def _parts(self, context: Any, timing: Mapping[str, float], first: int, last: int) -> None:
        took = {part: round(timing[f"{part}_ms"] * 1e6) for part in PARTS}
        at = first
        for part, nanoseconds in took.items():
            begun = max(first, last - nanoseconds) if part == "encode" else at
            span = self._tracer.start_span(part, context, start_time=begun)
            at = min(begun + nanoseconds, last)
            span.end(at)

    def http(
        self,
        method: bytes,
        route: str,
        fields: Mapping[bytes, bytes],
        begun: float,
        status: int,
        timing: Mapping[str, float] | None = None,
        models: str = "",
    ) -> None:
        """Tell of an HTTP request; a status of 0: its client had gone."""
        said = method.decode("latin-1")
        about: dict[str, str | int] = {"http.request.method": said, "http.route": route}
        about |= {"http.response.status_code": status} if status else {}
        about |= {"plinth.models": models} if models else {}
        self.span(
            f"{said} {route}",
            fields.get(FIELD),
            begun,
            kind="server",
            about=about,
            timing=timing,
            failed=status >= 500,
        )

    def close(self) -> None:
        """Hand over what is left, for at most :data:`FLUSH_SECONDS`, and end."""
        if not self._provider.force_flush(round(FLUSH_SECONDS * 1e3)):
            log.warning("not all spans were taken within %g s", FLUSH_SECONDS)
        self._provider.shutdown()


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
