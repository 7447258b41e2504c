"""A server's processes: started together, measured together, ended together.

All processes a server makes carry a mark in their environment, so that those count too that have
left its process group or outlived their parent (Ray does both).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "SERVING_COMPARISON"
PATIENCE = 10.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Usage:
    """What the processes of a server use.

    Args:
        cpu_seconds: user and system time so far, ended children included.
        pss_bytes: proportional set size, pages shared by several processes counted once.
        rss_bytes: resident set sizes added up.
        processes: how many there are.
    """

    cpu_seconds: float
    pss_bytes: int
    rss_bytes: int
    processes: int


class Running:
    """A started server.

    Args:
        command: program and arguments.
        variables: its whole environment.
        folder: its working directory.
        log: gets what it prints.
        cores: CPU cores it may use; none: all.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        folder: Path,
        log: Path,
        cores: Sequence[int] = (),
    ) -> None:
        self._mark = uuid.uuid4().hex
        self.log = log
        pinned = ["taskset", "-c", ",".join(map(str, cores)), *command] if cores else command
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                pinned,
                env={**variables, MARK: self._mark},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the first process is gone."""
        return self._process.poll() is not None

    def said(self, lines: int = 5) -> str:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace").strip()
        return " | ".join(text.splitlines()[-lines:])[-800:]

    def processes(self) -> list[psutil.Process]:
        """All processes with the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def usage(self) -> Usage:
        """What they use now."""
        cpu, pss, rss, count = 0.0, 0, 0, 0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                memory = process.memory_full_info()
                cpu += times.user + times.system + times.children_user + times.children_system
                pss += memory.pss
                rss += memory.rss
                count += 1
        return Usage(cpu, pss, rss, count)

    def stop(self) -> None:
        """End all of them: ask the group, wait, then kill whoever is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        while self.processes() and time.monotonic() < end:
            self._process.poll()
            time.sleep(0.1)
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=PATIENCE)
        self._process.wait()
