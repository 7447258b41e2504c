"""State on disk by parts, in checkpoints that are whole or not there, by LMDB.

What is put belongs to the checkpoint in progress, an open transaction of a thread that writes; the
thread that scores reads what the last one committed. Where nothing else remembers what came (HTTP),
it is logged as well, by SQLite, since that syncs once where LMDB does twice, before it is answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import lmdb
from prometheus_client import Gauge, Histogram

from plinth.engine import ConfigError, InputError
from plinth.engine.metrics import REGISTRY
from plinth.verticals import Vertical
from plinth.verticals.contract import StateError

log = logging.getLogger(__name__)

FORMAT = 1
PART_BATCH = 256
"""Parts, or entries of the log, written by one call."""
ROOM = 1 << 40
"""Address space of a state, beyond which it cannot grow; it takes neither memory nor disk."""
MAX_KEY = 511
"""Bytes of a key; of a longer one, a digest stands for the end."""
ABOUT = b"about"
MAX_WAITING = 16
"""Of these batches, beyond which a checkpoint is held up."""
MAX_UNLOGGED = 100_000
"""Entries that could not be logged, beyond which nothing more is taken in."""
STEP_S = 0.002
"""Time that a checkpoint takes at once from whoever scores."""
PRESSED_S = 0.012
"""The same where memory fills with what no checkpoint has: more is written than changes."""
BEGIN_AT = 0.25
"""Share of memory filled with what is in no checkpoint: one begins, whenever the last was."""
EVERY_S = 15.0
"""Time between checkpoints of a state that has a log."""
LOG_PAGES = 4096
"""Pages of the log's write-ahead log, beyond which they go into the file."""

_PAIR = "(?, ?)"
_APPEND = "INSERT INTO log VALUES (?, ?)"

STATE_BYTES = Gauge(
    "plinth_state_disk_bytes",
    "What the state takes on disk.",
    ("vertical",),
    registry=REGISTRY,
)
UNSAVED = Gauge(
    "plinth_state_unsaved_share",
    "What no durable checkpoint has yet, as a share of what may be in memory.",
    ("vertical",),
    registry=REGISTRY,
)
CHECKPOINT_SECONDS = Histogram(
    "plinth_state_checkpoint_seconds",
    "Time from the beginning of a checkpoint until it was durable.",
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
    registry=REGISTRY,
)
CHECKPOINT_PAUSE = Histogram(
    "plinth_state_pause_seconds",
    "What a step of a checkpoint took from whoever scores.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
    registry=REGISTRY,
)


class DiskStore:
    """Parts of a state, and a log, in a folder of this process alone.

    Args:
        folder: made if it is not there.
        origin: whose state it is.
        logs: keep a log of what is taken in, beside the parts.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str], *, logs: bool = False) -> None:
        self.folder = folder
        self.logs = logs
        self._origin = dict(origin)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="plinth-state")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "parts.db").exists():
                raise OSError("parts.db there was written by an earlier version")
            self._file = _mapped(folder / "parts.lmdb")
            self._about = self._file.open_db(b"about")
            self._held = self._file.open_db(b"parts")
            self._log = _Log(folder / "log.db") if logs else None
        except (OSError, lmdb.Error, sqlite3.Error) as error:
            raise ConfigError(
                f"the state in {folder} cannot be opened: {error}",
                hint="check the folder's rights and the room on its disk; a damaged one may be "
                "removed: the state is then built again from the retained input, or begins anew",
            ) from error
        self._open: lmdb.Transaction | None = None
        self._parts: list[tuple[bytes, bytes]] = []
        self._waiting: list[Future[None]] = []
        self._failure: Exception | None = None
        self._logged = 0

    # -- for the vertical ------------------------------------------------------------------
    def get(self, key: bytes) -> bytes | None:
        """A part as of the last checkpoint that is durable.

        Raises:
            StateError: the disk does not give it.
        """
        try:
            with self._file.begin(db=self._held) as reading:
                found: bytes | None = reading.get(key if len(key) <= MAX_KEY else _short(key))
        except lmdb.Error as error:
            raise _unreadable(self.folder, error) from error
        return found

    def put(self, key: bytes, part: bytes) -> None:
        """Make a part belong to the checkpoint in progress."""
        self._parts.append((key if len(key) <= MAX_KEY else _short(key), part))
        if len(self._parts) >= PART_BATCH:
            self._hand_over()

    def append(self, entry: bytes) -> None:
        """Log what was taken in.

        Raises:
            StateError: too much waits for a disk that does not take it.
        """
        if self._log is not None:
            self._log.append(entry)

    def entries(self) -> Iterator[bytes]:
        """What was logged behind the last checkpoint that is durable, in order.

        Raises:
            StateError: the disk does not give it.
        """
        if self._log is not None:
            try:
                yield from self._log.since(self._logged)
            except sqlite3.Error as error:
                raise _unreadable(self.folder, error) from error

    def durable(self) -> Future[None]:
        """Done once all that was appended up to now is durable; StateError where it is not."""
        if self._log is None:
            raise RuntimeError("this store keeps no log")
        return self._log.durable()

    # -- for the door ----------------------------------------------------------------------
    @property
    def full(self) -> bool:
        """So much waits to be written that nothing more should be put yet."""
        self._waiting = [one for one in self._waiting if not one.done()]
        return len(self._waiting) >= MAX_WAITING

    def mark(self) -> dict[str, Any]:
        """What a checkpoint that begins now must say of the log."""
        return {} if self._log is None else {"logged": self._log.last}

    def commit(self, about: Mapping[str, Any]) -> Future[None]:
        """Make what was put durable, together with what it belongs to.

        Args:
            about: JSON-ready, with what :meth:`mark` gave.

        Returns:
            Ends with a StateError if the disk did not take all of it; then none of it is there.
        """
        self._hand_over()
        return self._writer.submit(
            self._commit, {"format": FORMAT, "origin": self._origin, **about}
        )

    def reopen(self) -> dict[str, Any]:
        """Drop what is not durable; what the last checkpoint belongs to, empty if there is none.

        Raises:
            InputError: it is of another format or origin.
            StateError: the disk does not give it.
        """
        self._drop()
        try:
            with self._file.begin(db=self._about) as reading:
                found = reading.get(ABOUT)
        except lmdb.Error as error:
            raise _unreadable(self.folder, error) from error
        about: dict[str, Any] = json.loads(found) if found else {}
        if found and not self._ours(about):
            raise InputError(f"it belongs to another format or origin than {self._origin}")
        self._logged = int(about.get("logged", 0))
        if self._log is not None:
            self._log.last = max(self._log.last, self._logged)
        return about

    def _ours(self, about: Mapping[str, Any]) -> bool:
        """A store that logs may begin with what a stream left: it needs no offsets to go on."""
        told, ours = about.get("origin", {}), self._origin
        same = told.get("vertical") == ours.get("vertical") if self.logs else told == ours
        return same and about.get("format") == FORMAT

    def wipe(self) -> None:
        """Forget all."""
        self._drop()
        self._writer.submit(self._wipe).result()
        if self._log is not None:
            self._log.trim(self._log.last)
            self._logged = self._log.last

    @property
    def bytes_on_disk(self) -> int:
        """What it takes."""
        files = [path for path in self.folder.iterdir() if path.name.startswith(("parts", "log"))]
        return sum(path.stat().st_size for path in files if path.exists())

    def close(self) -> None:
        """Close it; what is not durable is dropped."""
        self._drop()
        self._writer.shutdown(wait=True)
        self._file.close()
        if self._log is not None:
            self._log.close()

    # -- the writing thread ----------------------------------------------------------------
    def _hand_over(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._waiting.append(self._writer.submit(self._add, parts))

    def _add(self, parts: Sequence[tuple[bytes, bytes]]) -> None:
        if self._failure is not None:
            return
        try:
            with self._transaction().cursor(self._held) as cursor:
                cursor.putmulti(parts)
        except lmdb.Error as error:
            self._failure = error

    def _transaction(self) -> lmdb.Transaction:
        """The one that becomes the next checkpoint."""
        if self._open is None:
            self._open = self._file.begin(write=True)
        return self._open

    def _commit(self, about: Mapping[str, Any]) -> None:
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
            self._transaction().put(ABOUT, json.dumps(about).encode(), db=self._about)
            self._end()
        except lmdb.Error as error:
            self._forget()
            raise StateError(
                f"the state could not be kept in {self.folder}: {error}",
                hint="make room there; the checkpoint before is whole",
            ) from error
        if self._log is not None:
            self._logged = int(about["logged"])
            self._log.trim(self._logged)

    def _end(self) -> None:
        """Commit; whether it succeeds or not, the transaction is over."""
        ending, self._open = self._transaction(), None
        ending.commit()

    def _drop(self) -> None:
        """Wait for the writing thread, and forget what it has not committed."""
        self._parts.clear()
        self._writer.submit(self._forget).result()

    def _forget(self) -> None:
        self._failure = None
        ending, self._open = self._open, None
        if ending is not None:
            ending.abort()

    def _wipe(self) -> None:
        try:
            for one in (self._held, self._about):
                self._transaction().drop(one, delete=False)
            self._end()
        except lmdb.Error as error:
            self._forget()
            raise _unreadable(self.folder, error) from error


class _Log:
    """Entries in order, synced by a thread of their own, many at once where many wait.

    Args:
        path: of its file.

    Attributes:
        last: number of the last entry, in the file or not yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS log (number INTEGER PRIMARY KEY, entry BLOB)"
        )
        (last,) = self._file.execute("SELECT max(number) FROM log").fetchone()
        self.last: int = last or 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="plinth-state-log")
        self._lock = threading.Lock()
        self._entries: list[tuple[int, bytes]] = []
        self._next: Future[None] | None = None
        self._now: Future[None] = Future()
        self._now.set_result(None)

    def append(self, entry: bytes) -> None:
        """Add an entry to what the next sync makes durable."""
        if len(self._entries) >= MAX_UNLOGGED:
            raise _unlogged(self._path, "too much waits for the disk")
        self.last += 1
        with self._lock:
            self._entries.append((self.last, entry))

    def durable(self) -> Future[None]:
        """Done once all that was appended up to now is in the file and synced."""
        with self._lock:
            if not self._entries:
                return self._now
            if self._next is None:
                self._next = self._writer.submit(self._sync)
            return self._next

    def since(self, number: int) -> Iterator[bytes]:
        """The entries behind a number, in order."""
        found = self._file.execute(
            "SELECT entry FROM log WHERE number > ? ORDER BY number", (number,)
        )
        for (entry,) in found:
            yield entry

    def trim(self, number: int) -> None:
        """Forget the entries up to a number, which a checkpoint has."""
        self._writer.submit(self._trim, number)

    def close(self) -> None:
        """Write what waits, and close it."""
        with contextlib.suppress(StateError):  # whoever waited for it was told
            self.durable().result()
        self._writer.shutdown(wait=True)
        self._file.close()

    def _sync(self) -> None:
        with self._lock:
            entries, self._entries = self._entries, []
            assert self._next is not None
            self._now, self._next = self._next, None
        try:
            self._file.execute("BEGIN IMMEDIATE")
            for first in range(0, len(entries), PART_BATCH):
                _insert(self._file, _APPEND, entries[first : first + PART_BATCH])
            self._file.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo()
            with self._lock:  # they are tried again with the next
                self._entries[:0] = entries
            raise _unlogged(self._path, str(error)) from error

    def _trim(self, number: int) -> None:
        try:
            self._file.execute("DELETE FROM log WHERE number <= ?", (number,))
        except sqlite3.Error as error:  # the next trims them
            log.warning("entries of %s that nobody needs stay there for now: %s", self._path, error)

    def _undo(self) -> None:
        if self._file.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # the disk is full; closing undoes it too
                self._file.execute("ROLLBACK")


class KeptState:
    """A vertical whose state lies in a store, and the checkpoint in progress.

    Args:
        vertical: whose state it is.
        store: where it lies.
    """

    def __init__(self, vertical: Vertical[Any, Any], store: DiskStore) -> None:
        self.vertical = vertical
        self.store = store
        self._about: dict[str, Any] | None = None
        self._began = 0.0
        self._ending: Future[None] | None = None
        self._last = time.monotonic()

    @property
    def busy(self) -> bool:
        """A checkpoint is in progress."""
        return self._about is not None

    def load(self) -> dict[str, Any]:
        """Go on with the last durable checkpoint; what it belongs to, empty if there is none.

        Raises:
            ConfigError: the vertical keeps its state in memory alone.
            InputError: the state is not one of this vertical.
            StateError: the disk does not give it.
        """
        self._about = self._ending = None
        about = self.store.reopen()
        self.vertical.keep_state_in(self.store)
        return about

    def wipe(self) -> None:
        """Begin anew, with nothing."""
        self._about = self._ending = None
        self.store.wipe()
        self.vertical.keep_state_in(self.store)

    def begin(self, about: Mapping[str, Any]) -> None:
        """Begin a checkpoint of the state as it is now, which belongs to ``about``."""
        self._began = time.perf_counter()
        self._about = {**about, **self.store.mark()}
        UNSAVED.labels(self.vertical.name).set(self.vertical.unsaved())
        self.vertical.begin_checkpoint()

    def step(self, seconds: float | None = None) -> bool:
        """Go on with a checkpoint for about so long; false where none is in progress.

        Args:
            seconds: by default as few as there is room in memory.

        Raises:
            StateError: the disk did not take it; its parts belong to the next one.
        """
        if self._about is None:
            return False
        began = time.perf_counter()
        if seconds is None:
            seconds = STEP_S if self.vertical.unsaved() < 0.5 else PRESSED_S
        try:
            if self._ending is None:
                if not self.store.full and self.vertical.write_checkpoint(seconds):
                    self._ending = self.store.commit(self._about)
            elif self._ending.done():
                self._end(self._ending)
        finally:
            CHECKPOINT_PAUSE.observe(time.perf_counter() - began)
        return self._about is not None

    def look_after(self, now: float) -> bool:
        """Make checkpoints from time to time, for a store that logs; whether one is in progress.

        Args:
            now: ``monotonic``.

        Raises:
            StateError: as :meth:`step` does.
        """
        unsaved = self.vertical.unsaved()
        if not self.busy and (unsaved >= BEGIN_AT or (unsaved and now - self._last >= EVERY_S)):
            self._last = now
            self.begin({})
        if unsaved >= 1.0:
            self.finish()
        return self.step()

    def finish(self) -> None:
        """Bring a checkpoint that is in progress to its end.

        Raises:
            StateError: as :meth:`step` does.
        """
        while self.step(1.0):
            if self._ending is not None:
                wait((self._ending,))
            else:
                time.sleep(0.001)

    def _end(self, ended: Future[None]) -> None:
        self._about = self._ending = None
        failure = ended.exception()
        self.vertical.end_checkpoint(durable=failure is None)
        CHECKPOINT_SECONDS.observe(time.perf_counter() - self._began)
        STATE_BYTES.labels(self.vertical.name).set(self.store.bytes_on_disk)
        UNSAVED.labels(self.vertical.name).set(self.vertical.unsaved())
        if failure is not None:
            raise failure


def _mapped(path: Path) -> lmdb.Environment:
    """The parts; a file that was cut off is refused, for reading beyond its end kills a process."""
    found = lmdb.open(str(path), map_size=ROOM, max_dbs=2, subdir=False, readahead=False)
    whole = (found.info()["last_pgno"] + 1) * found.stat()["psize"]
    if (there := path.stat().st_size) < whole:
        found.close()
        raise OSError(f"{path.name} has {there} bytes, expected {whole}")
    return found


def _open(path: Path) -> sqlite3.Connection:
    found = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        f"wal_autocheckpoint = {LOG_PAGES}",
        f"journal_size_limit = {2 * LOG_PAGES * 4096}",
    ):
        found.execute(f"PRAGMA {pragma}")
    return found


def _insert(file: sqlite3.Connection, statement: str, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Insert pairs by one statement."""
    rows = ",".join([_PAIR] * len(pairs))
    file.execute(statement.replace(_PAIR, rows), [one for pair in pairs for one in pair])


def _short(key: bytes) -> bytes:
    """A key that is too long, as one that is not."""
    return key[: MAX_KEY - 64] + hashlib.sha256(key).hexdigest().encode()


def _unreadable(folder: Path, error: Exception) -> StateError:
    return StateError(
        f"the state in {folder} cannot be read: {error}",
        hint="check the disk; a damaged folder may be removed: the state is then built again from "
        "the retained input, or begins anew",
    )


def _unlogged(path: Path, why: str) -> StateError:
    return StateError(
        f"what was asked could not be logged in {path}: {why}",
        hint="make room there; it is answered again once the log is",
    )
