"""A collector that takes spans as OpenTelemetry's protocol has them (OTLP over HTTP)."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Collector:
    """Listens at ``url``; ``spans`` are those that came, ``raw`` the bytes."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                told = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                for resource in told.resource_spans:
                    names = {a.key: a.value.string_value for a in resource.resource.attributes}
                    collector.services.add(names["service.name"])
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                collector.raw += body
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def named(self, name: str) -> list[Any]:
        """The spans of this name, in the order in which they came."""
        return [span for span in self.spans if span.name == name]

    def inside(self, span: Any) -> dict[str, Any]:
        """The spans inside one, by name."""
        return {one.name: one for one in self.spans if one.parent_span_id == span.span_id}

    def end(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """A collector for as long as a block lasts."""
    found = Collector()
    try:
        yield found
    finally:
        found.end()


def about(span: Any) -> dict[str, str | int]:
    """The attributes of a span."""
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
