"""One process that runs ``worker.py``: how it is started, ended, and how one learns of its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from plinth.engine.lanes import worker as child

KILL_SECONDS = 10.0
"""In which a process that was killed is gone."""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_log = logging.getLogger("plinth.engine.lanes")


class WorkerProcess:
    """One process, and our end of the socket to it; killed by any thread.

    On Linux it ends with the thread that makes it.

    Args:
        niceness: how far others go first where the machine is short of CPU.
        script: what it runs.
    """

    def __init__(self, niceness: int, script: Path = Path(child.__file__)) -> None:
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.descriptor = theirs.fileno()
        level = logging.getLogger().getEffectiveLevel()
        given = map(str, (self.descriptor, os.getpid(), level, niceness))
        command = [sys.executable, "-P", "-X", "faulthandler", str(script), *given]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[self.descriptor],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
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
