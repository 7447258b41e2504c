"""One process that runs ``worker.py``: how it is started, ended, and how one learns of its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from plinth.engine.lanes import worker as child
from plinth.engine.lanes.fork_server import ONE_THREAD, Forked, ForkServer

KILL_SECONDS = 10.0
"""In which a process that was killed is gone."""
_log = logging.getLogger("plinth.engine.lanes")


class WorkerProcess:
    """One process, and our end of the socket to it; killed by any thread.

    On Linux it ends with the thread that makes it, or with the server that forked it.

    Args:
        niceness: how far others go first where the machine is short of CPU.
        script: what it runs.
        server: forks it; ``None``, or where it does not: the process is started anew.

    Attributes:
        socket: our end.
        descriptor: of the other end, in the process.
    """

    def __init__(
        self,
        niceness: int,
        script: Path = Path(child.__file__),
        server: ForkServer | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        level = logging.getLogger().getEffectiveLevel()
        try:
            forked = None
            if server is not None:
                forked = _forked(server, {"level": level, "niceness": niceness}, theirs)
            self._process = forked or _started(script, theirs, level, niceness)
            self.descriptor = theirs.fileno() if forked is None else forked.descriptor
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def end(self) -> None:
        """End it, and wait until it has ended."""
        self.kill()
        self.socket.close()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            _log.error("worker process %d does not end", self.pid)
        if isinstance(self._process, Forked):
            self._process.close()

    def how_it_ended(self) -> str:
        """The signal or exit code, in words."""
        try:
            code = self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"


def _forked(server: ForkServer, given: Mapping[str, int], theirs: socket.socket) -> Forked | None:
    try:
        return server.fork(given, theirs.fileno())
    except (OSError, ValueError) as error:
        _log.warning("a worker process is started anew, not forked: %s", error)
        return None


def _started(
    script: Path, theirs: socket.socket, level: int, niceness: int
) -> subprocess.Popen[bytes]:
    given = map(str, (theirs.fileno(), os.getpid(), level, niceness))
    command = [sys.executable, "-P", "-X", "faulthandler", str(script), *given]
    return subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )
