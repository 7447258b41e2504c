"""A long command as a process: its signals, and its metrics for Prometheus."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from prometheus_client import start_http_server

from plinth.engine import ConfigError
from plinth.engine.metrics import REGISTRY


class Signals:
    """SIGINT and SIGTERM while a block runs: the first stops, the second ends at once.

    Args:
        on_first: called on a thread of its own; the block does not end before it.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=on_first, name="plinth-stop", daemon=True)
        self.got: int | None = None

    @property
    def exit_code(self) -> int | None:
        """128 plus the signal's number, or ``None`` without a signal."""
        return None if self.got is None else 128 + self.got

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.got is not None:
            os._exit(128 + number)
        self.got = number
        self._thread.start()

    @contextlib.contextmanager
    def handled(self) -> Iterator[Signals]:
        """Handle them inside the block."""
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            if self.got is not None:
                self._thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def metrics_at(address: str | None) -> Iterator[str | None]:
    """Serve ``/metrics`` while a block runs; its URL.

    Args:
        address: ``host:port``, port 0 takes a free one; ``None`` serves nothing.

    Raises:
        ConfigError: not an address, or it cannot be listened on.
    """
    if address is None:
        yield None
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"--metrics {address!r} is not host:port", hint="such as 127.0.0.1:9100")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=REGISTRY)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {address}: {error.strerror}", hint="choose another port"
        ) from None
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
