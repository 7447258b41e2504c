"""The process that writes the parts of a state into LMDB, for ``state_store``.

A thread would give the interpreter's lock up and take it back for every part, each time for as long
as whoever scores holds it. Run by its path, it needs the standard library and LMDB alone.

A message on the socket pair is its kind and what belongs to it; all but parts have a reply, empty
where it succeeded, else what went wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb

OPEN, PARTS, COMMIT, DROP, WIPE = b"o", b"p", b"c", b"d", b"w"
"""Kinds of messages: open a file; parts; make them durable; drop them; forget all."""
ROOM = 1 << 40
"""Address space of a state, beyond which it cannot grow; it takes neither memory nor disk."""
DATABASES = b"about", b"parts"
ABOUT = b"about"
BEFORE_S = 30.0
"""In which the writer of a process that was killed has ended: it may have to finish a commit."""
LOOK_S = 1.0
"""How often it looks whether the process that it writes for lives."""
MAX_ABOUT = 1 << 24
"""Bytes of a message that is not of parts."""

Parts = Sequence[tuple[bytes, bytes]]


def packed(parts: Parts) -> bytes:
    """Parts as the body of a message."""
    sizes = array("I", (len(one) for pair in parts for one in pair))
    return b"".join((len(parts).to_bytes(4, "little"), sizes.tobytes(), *chain(*parts)))


def unpacked(body: memoryview) -> Iterator[tuple[bytes, bytes]]:
    """And back."""
    count = int.from_bytes(body[:4], "little")
    at = 4 + 8 * count
    sizes = array("I", bytes(body[4:at]))
    for key, value in zip(sizes[::2], sizes[1::2], strict=True):
        yield bytes(body[at : at + key]), bytes(body[at + key : at + key + value])
        at += key + value


def mapped(path: Path, *, writes: bool) -> lmdb.Environment:
    """A file of parts; one that was cut off is refused: reading behind its end kills a process.

    Raises:
        OSError: it is cut off.
        lmdb.Error: it is damaged, or there is no room.
    """
    try:
        found = lmdb.open(
            str(path), map_size=ROOM, max_dbs=len(DATABASES), subdir=False, readahead=False,
            readonly=not writes,
        )  # fmt: skip
    except lmdb.MemoryError as error:
        raise OSError(
            f"{error}: {ROOM >> 40} TiB of address space is needed, and no memory for it; "
            "ulimit -v must not be set"
        ) from error
    whole = (found.info()["last_pgno"] + 1) * found.stat()["psize"]
    if (there := path.stat().st_size) < whole:
        found.close()
        raise OSError(f"{path.name} has {there} bytes, expected {whole}")
    return found


class Writer:
    """One file, and the transaction that becomes the next checkpoint."""

    def __init__(self) -> None:
        self._lock: int | None = None
        self._file: lmdb.Environment | None = None
        self._databases: list[Any] = []
        self._open: lmdb.Transaction | None = None
        self._failure: Exception | None = None

    def open(self, body: bytes) -> None:
        """Open a file that no other process writes, and make it if it is not there."""
        path = Path(json.loads(body))
        self._lock = _alone(path.with_suffix(".writer"))
        self._file = mapped(path, writes=True)
        self._file.reader_check()
        self._databases = [self._file.open_db(name) for name in DATABASES]

    def put(self, body: memoryview) -> None:
        """Add parts; what fails is told by the commit."""
        if self._failure is not None:
            return
        try:
            with self._transaction().cursor(self._databases[1]) as cursor:
                cursor.putmulti(unpacked(body))
        except (lmdb.Error, ValueError) as error:
            self._failure = error

    def commit(self, about: bytes) -> None:
        """Make all that was put durable, with what it belongs to, or none of it."""
        try:
            if self._failure is not None:
                raise self._failure
            self._transaction().put(ABOUT, about, db=self._databases[0])
            self._end()
            assert self._file is not None
            self._file.reader_check()  # a killed reader would keep pages from being used again
        except Exception:
            self.drop(b"")
            raise

    def drop(self, body: bytes) -> None:
        """Forget what is not durable."""
        self._failure = None
        ending, self._open = self._open, None
        if ending is not None:
            ending.abort()

    def wipe(self, body: bytes) -> None:
        """Forget all."""
        self.drop(b"")
        try:
            for one in self._databases:
                self._transaction().drop(one, delete=False)
            self._end()
        except Exception:
            self.drop(b"")
            raise

    def _transaction(self) -> lmdb.Transaction:
        if self._open is None:
            assert self._file is not None
            self._open = self._file.begin(write=True)
        return self._open

    def _end(self) -> None:
        """Commit; whether it succeeds or not, the transaction is over."""
        ending, self._open = self._transaction(), None
        ending.commit()


def _alone(path: Path) -> int:
    """Hold a file's lock, for as long as this process lives."""
    found = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    until = time.monotonic() + BEFORE_S
    while True:
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise OSError(f"another process writes here, for {BEFORE_S:g} s by now") from None
            time.sleep(0.005)
        else:
            return found


def serve(link: Connection, parent: int) -> None:
    """Do what is asked until the other end is gone."""
    writer = Writer()
    asked: dict[bytes, Callable[[bytes], None]] = {
        OPEN: writer.open,
        COMMIT: writer.commit,
        DROP: writer.drop,
        WIPE: writer.wipe,
    }
    while True:
        while not link.poll(LOOK_S):
            if os.getppid() != parent:  # and somebody else holds the other end
                return
        message = memoryview(link.recv_bytes())
        kind = bytes(message[:1])
        if kind == PARTS:
            writer.put(message[1:])
            continue
        told = ""
        try:
            asked[kind](bytes(message[1 : 1 + MAX_ABOUT]))
        except (lmdb.Error, OSError, ValueError) as error:
            told = str(error)
        link.send_bytes(told.encode())


def main(descriptor: int, parent: int) -> None:
    """Run until the process that started it is gone; what it has not committed is forgotten."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # they are for that process, which ends this one
    with Connection(descriptor) as link, contextlib.suppress(EOFError, ConnectionError):
        serve(link, parent)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
