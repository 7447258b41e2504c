"""The log of requests: who asked what, when, of which model, with what end. No contents.

Requests only append to a bounded list; a thread of its own writes it, so that no disk makes a
request wait. What finds no room is counted, and the log says so itself.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections import deque
from pathlib import Path

import orjson
from prometheus_client import Counter

from plinth.engine import ConfigError
from plinth.engine.metrics import REGISTRY

log = logging.getLogger("plinth.requests")

WAITING = 100_000
"""Lines that wait for the disk at most."""
EVERY = 0.25
"""Seconds between two writes; what a power cut takes along."""
LOST = Counter(
    "plinth_request_log_lost_total",
    "Requests that are missing in the log of requests, since the disk did not keep up.",
    registry=REGISTRY,
)
Line = tuple[float, str, str, str, float, str]


class RequestLog:
    """A file of JSON lines that rotates.

    Args:
        path: of the file; older ones have ``.1``, ``.2`` and so on after it.
        max_bytes: of one file.
        files: kept, the current one included.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._lines: deque[Line] = deque()
        self._missing = 0
        self._failed = False
        self._end = threading.Event()
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(
                f"the log of requests {path} cannot be written: {error.strerror}",
                hint="choose another serve.request_log",
            ) from None
        path.chmod(0o600)
        self._thread = threading.Thread(target=self._run, name="plinth-request-log", daemon=True)
        self._thread.start()

    def note(
        self, who: str, what: str, status: str | int, seconds: float, models: str = ""
    ) -> None:
        """Keep one request.

        Args:
            who: name of the caller, "" for nobody who is known.
            what: method and route, or method and model; no part that a client chose freely.
            status: how it ended.
            seconds: it took.
            models: versions of those that ran.
        """
        if len(self._lines) >= WAITING:
            self._missing += 1
            LOST.inc()
            return
        self._lines.append((time.time(), who, what, str(status), seconds, models))

    def close(self) -> None:
        """Write what waits, for at most five seconds, and end."""
        self._end.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._end.wait(EVERY):
            self._write()
        self._write()
        self._file.close()

    def _write(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        missing, self._missing = self._missing, 0
        if not lines and not missing:
            return
        told = [_told(line) for line in lines]
        if missing:
            told.append(orjson.dumps({"time": _when(time.time()), "missing": missing}) + b"\n")
        try:
            if self._file.closed:  # a rotation failed
                self._file = self._path.open("ab")
            if self._file.tell() >= self._max_bytes:
                self._rotate()
            self._file.write(b"".join(told))
            self._file.flush()
        except OSError as error:
            self._missing += missing
            self._lines.extendleft(reversed(lines))
            if not self._failed:
                log.error("the log of requests cannot be written: %s", error.strerror)
            self._failed = True
            return
        self._failed = False

    def _rotate(self) -> None:
        self._file.close()
        for number in range(self._files - 1, 0, -1):
            older = self._numbered(number - 1)
            if older.exists():
                older.replace(self._numbered(number))
        self._file = self._path.open("wb")
        self._path.chmod(0o600)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _told(line: Line) -> bytes:
    when, who, what, status, seconds, models = line
    told = {"time": _when(when), "who": who, "what": what, "status": status}
    told |= {"models": models} if models else {}
    return orjson.dumps({**told, "ms": round(seconds * 1e3, 3)}) + b"\n"
