"""State on disk by parts, in checkpoints that are whole or not there, by LMDB.

What is put belongs to the checkpoint in progress, an open transaction of a process that writes;
whoever scores reads what the last one committed. Where nothing else remembers what came (HTTP), it
is logged as well, by SQLite, since that syncs once where LMDB does twice, before it is answered.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
from typing import Any

import lmdb
from prometheus_client import Gauge, Histogram

from plinth.engine import ConfigError, InputError
from plinth.engine.lanes.worker_process import WorkerProcess
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.state import writer as state_writer
from plinth.pipelines.state.writer import (
    ABOUT,
    COMMIT,
    DATABASES,
    DROP,
    OPEN,
    PARTS,
    WIPE,
    Parts,
    mapped,
    packed,
)
from plinth.verticals import Vertical
from plinth.verticals.contract import StateError

log = logging.getLogger(__name__)

FORMAT = 1
PART_BATCH = 256
"""Parts, or entries of the log, written by one call."""
MAX_KEY = 511
"""Bytes of a key; of a longer one, a digest stands for the end."""
READERS = 16
"""Parts that the disk is asked for at a time."""
COLD_SHARE = 0.1
"""Waits for the disk, as a share of parts, beyond which the next are read that way."""
MAX_WAITING = 16
"""Of these batches, beyond which a checkpoint is held up."""
REPLY_S = 300.0
"""In which the process that writes has done what is asked; one that hangs is ended."""
MAX_UNLOGGED = 100_000
"""Entries that could not be logged, beyond which nothing more is taken in."""
STEP_S = 0.002
"""Time that a checkpoint takes at once from whoever scores."""
PRESSED_S = 0.012
"""The same where memory is half full of what no checkpoint has: more is written than changes."""
PRESSED_SHARE = 0.25
"""And as a share of the CPU time since the last step, where more was taken in at once."""
LONGEST_S = 0.016
"""The most of it while what no checkpoint has fits into memory; beyond, it is more and more."""
STEEP = 8.0
"""How many times more where that is twice as much as fits."""
BEGIN_AT = 0.25
"""Share of memory filled with what is in no checkpoint: one begins, whenever the last was."""
PRESSED_AT = 0.5
FULL_AT = 1.5
"""Where the disk keeps that share from falling, whoever scores waits for it."""
YOUNG_READS = 250
"""Parts that were asked for, after which garbage is looked for among the objects made of them;
every fourth time among four times as many, about a microsecond for each object."""
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

    Attributes:
        reads: parts that were asked for, ever.

    Raises:
        ConfigError: the folder cannot be used.
    """

    def __init__(self, folder: Path, origin: Mapping[str, str], *, logs: bool = False) -> None:
        self.folder = folder
        self.logs = logs
        self._origin = dict(origin)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plinth-state")
        self._writer = _Writer(folder / "parts.lmdb")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "parts.db").exists():
                raise OSError("parts.db there was written by an earlier version")
            self._writer.start()
            self._file = mapped(folder / "parts.lmdb", writes=False)
            self._about, self._held = (self._file.open_db(one, create=False) for one in DATABASES)
            self._log = _Log(folder / "log.db") if logs else None
        except (OSError, lmdb.Error, sqlite3.Error) as error:
            self._writer.end()
            raise ConfigError(
                f"the state in {folder} cannot be opened: {error}",
                hint="check the folder's rights and the room on its disk; a damaged one may be "
                "removed: the state is then built again from the retained input, or begins anew",
            ) from error
        self.reads = 0
        self._cold = True
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="plinth-state-read")
        self._parts: list[tuple[bytes, bytes]] = []
        self._waiting: deque[Future[None]] = deque()
        self._logged = 0

    # -- for the vertical ------------------------------------------------------------------
    def get(self, key: bytes) -> bytes | None:
        """A part as of the last checkpoint that is durable.

        Raises:
            StateError: the disk does not give it.
        """
        self.reads += 1
        try:
            with self._file.begin(db=self._held) as reading:
                found: bytes | None = reading.get(_fitting(key))
        except lmdb.Error as error:
            raise _unreadable(self.folder, error) from error
        return found

    def fetch(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """Parts as of the last checkpoint that is durable, those that there are.

        In order of their keys, so that neighbours share pages. Where the last ones had to be read
        from the disk, many at a time, for it serves them together about as fast as one.

        Raises:
            StateError: the disk does not give it.
        """
        self.reads += len(keys)
        fitting = {_fitting(key): key for key in keys}
        order = sorted(fitting)
        try:
            if self._cold and len(order) >= READERS:
                size = -(-len(order) // READERS)
                pieces = [order[at : at + size] for at in range(0, len(order), size)]
                read = [*self._readers.map(self._read, pieces)]
            else:
                read = [self._read(order)]
        except lmdb.Error as error:
            raise _unreadable(self.folder, error) from error
        faults = sum(faulted for _, faulted in read)
        if order:
            self._cold = faults >= COLD_SHARE * len(order)
        return {fitting[key]: part for parts, _ in read for key, part in parts}

    def _read(self, keys: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], int]:
        """Parts in order of their keys, and how often the disk had to be waited for."""
        before = getrusage(RUSAGE_THREAD).ru_majflt
        with self._file.begin(db=self._held) as reading, reading.cursor() as cursor:
            found: list[tuple[bytes, bytes]] = cursor.getmulti(keys)
        return found, getrusage(RUSAGE_THREAD).ru_majflt - before

    def put(self, key: bytes, part: bytes) -> None:
        """Make a part belong to the checkpoint in progress."""
        self._parts.append((_fitting(key), part))
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
    def has_room(self, seconds: float = 0.0) -> bool:
        """Whether more may be put, if need be after so long; else too much waits to be written."""
        waiting = self._waiting
        if len(waiting) >= MAX_WAITING and seconds:
            wait((waiting[-MAX_WAITING],), seconds)
        while waiting and waiting[0].done():
            waiting.popleft()
        return len(waiting) < MAX_WAITING

    @property
    def writer_pid(self) -> int:
        """The process that writes the parts; another after that one was killed."""
        return self._writer.pid

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
        return self._thread.submit(
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
        self._thread.submit(self._ask, WIPE).result()
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
        self._parts.clear()
        self._thread.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        self._file.close()
        self._writer.end()
        if self._log is not None:
            self._log.close()

    # -- the thread that talks to the process that writes ------------------------------------
    def _hand_over(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._waiting.append(self._thread.submit(self._writer.put, parts))

    def _ask(self, kind: bytes) -> None:
        try:
            self._writer.ask(kind)
        except OSError as error:
            raise _unreadable(self.folder, error) from error

    def _commit(self, about: Mapping[str, Any]) -> None:
        try:
            self._writer.ask(COMMIT, json.dumps(about).encode())
        except OSError as error:
            raise StateError(
                f"the state could not be kept in {self.folder}: {error}",
                hint="make room there; the checkpoint before is whole",
            ) from error
        if self._log is not None:
            self._logged = int(about["logged"])
            self._log.trim(self._logged)

    def _drop(self) -> None:
        """Wait for what was handed over, and forget what is not committed."""
        self._parts.clear()
        self._thread.submit(self._ask, DROP).result()


class FollowedStore:
    """The parts of somebody else's checkpoint, to be read alone: what is put is dropped.

    It is one checkpoint, whole, until :meth:`renew` takes the one that :meth:`newest` found. After
    :meth:`take_over` it is a store of one's own.

    Args:
        folder: of a store that another process has.
        origin: whose state it is.

    Raises:
        OSError: there is none yet.
        lmdb.Error: the same, or it is damaged.
    """

    logs = False

    def __init__(self, folder: Path, origin: Mapping[str, str]) -> None:
        self._origin = dict(origin)
        self._folder = folder
        self._file = mapped(folder / "parts.lmdb", writes=False)
        self._about, self._held = (self._file.open_db(one, create=False) for one in DATABASES)
        self._reading: Any = self._file.begin()
        self._next: Any = None
        self._closed = False
        self._own: DiskStore | None = None

    def get(self, key: bytes) -> bytes | None:
        """A part as of the checkpoint.

        Raises:
            StateError: the disk does not give it.
        """
        if self._own is not None:
            return self._own.get(key)
        try:
            found: bytes | None = self._reading.get(_fitting(key), db=self._held)
        except lmdb.Error as error:
            raise _unreadable(self._folder, error) from error
        return found

    def fetch(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """The same of many, those that there are.

        Raises:
            StateError: the disk does not give it.
        """
        if self._own is not None:
            return self._own.fetch(keys)
        fitting = {_fitting(key): key for key in keys}
        try:
            with self._reading.cursor(self._held) as cursor:
                return {fitting[key]: part for key, part in cursor.getmulti(sorted(fitting))}
        except lmdb.Error as error:
            raise _unreadable(self._folder, error) from error

    def put(self, key: bytes, part: bytes) -> None:
        """Nothing, until it is one's own."""
        if self._own is not None:
            self._own.put(key, part)

    def append(self, entry: bytes) -> None:
        """Nothing: it keeps no log."""

    def entries(self) -> Iterator[bytes]:
        """Nothing."""
        return iter(())

    def durable(self) -> Future[None]:
        """See :meth:`DiskStore.durable`."""
        raise RuntimeError("this store keeps no log")

    def newest(self) -> dict[str, Any]:
        """What the newest checkpoint belongs to; empty where there is none, or it is another's.

        Raises:
            lmdb.Error: it cannot be read.
        """
        self._forget()
        self._next = self._file.begin()
        found = self._next.get(ABOUT, db=self._about)
        about: dict[str, Any] = json.loads(found) if found else {}
        ours = about.get("origin") == self._origin and about.get("format") == FORMAT
        return about if ours else {}

    @property
    def behind(self) -> int:
        """Checkpoints that came since this one."""
        return int(self._file.info()["last_txnid"]) - int(self._reading.id())

    def renew(self) -> None:
        """Be the checkpoint that :meth:`newest` found last."""
        if self._next is not None:
            self._reading.abort()
            self._reading, self._next = self._next, None

    def take_over(self, store: DiskStore) -> None:
        """Be that store from now on; :meth:`close` has been called."""
        self._own = store

    def close(self) -> None:
        """Let go of the file; more than once does no harm."""
        if not self._closed:
            self._closed = True
            self._forget()
            self._reading.abort()
            self._file.close()

    def _forget(self) -> None:
        if self._next is not None:
            self._next.abort()
            self._next = None


class _Writer:
    """The process that writes a file of parts, started again where it has ended.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: WorkerProcess | None = None
        self._link: Connection | None = None
        self._failure: OSError | None = None

    def start(self) -> None:
        """Start it, and have it open the file.

        Raises:
            OSError: it could not.
        """
        self._process = WorkerProcess(0, Path(state_writer.__file__))
        self._link = Connection(self._process.socket.detach())
        self.ask(OPEN, json.dumps(str(self._path)).encode())

    @property
    def pid(self) -> int:
        """Its number; 0 where none runs."""
        return 0 if self._process is None else self._process.pid

    def put(self, parts: Parts) -> None:
        """Send parts; what fails is told by the commit."""
        if self._failure is None:
            try:
                self._send(PARTS + packed(parts))
            except OSError as error:
                self._failure = error

    def ask(self, kind: bytes, body: bytes = b"") -> None:
        """Have something done.

        Raises:
            OSError: it, or what was put before, was not done; nothing of that is there.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            self._exchange(DROP)
            if kind == COMMIT:
                raise failure
        self._exchange(kind + body)

    def end(self) -> None:
        """End it; what is not durable is dropped."""
        process, self._process = self._process, None
        link, self._link = self._link, None
        if link is not None:
            link.close()
        if process is not None:
            process.end()

    def _exchange(self, message: bytes) -> None:
        link = self._send(message)
        try:
            if not link.poll(REPLY_S):
                raise EOFError
            told = link.recv_bytes().decode()
        except (OSError, EOFError):
            raise self._ended() from None
        if told:
            raise OSError(told)

    def _send(self, message: bytes) -> Connection:
        if self._link is None:
            self.start()
        link = self._link
        assert link is not None
        try:
            link.send_bytes(message)
        except OSError:
            raise self._ended() from None
        return link

    def _ended(self) -> OSError:
        """It is gone, or hangs; the next message starts another."""
        process = self._process
        self._process = None
        self.end()
        if process is None:
            return OSError("the process that writes it was ended")
        process.kill()
        how = process.how_it_ended()
        process.end()
        return OSError(f"the process that writes it ended: {how}")


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
        self._last, self._stepped = time.monotonic(), time.thread_time()
        self._looked = self._looks = 0

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

    def step(self) -> bool:
        """Go on with a checkpoint for a moment; false where none is in progress.

        A moment is the shorter, the more room there is in memory.

        Raises:
            StateError: the disk did not take it; its parts belong to the next one.
        """
        began = time.thread_time()
        self._look_for_garbage()
        looked = time.thread_time() - began
        unsaved = self.vertical.unsaved()
        if unsaved >= FULL_AT:
            self.finish()
        moment = max(STEP_S, self._moment(unsaved) - looked)
        return self._go_on(moment, patient=unsaved >= PRESSED_AT)

    def _look_for_garbage(self) -> None:
        """Among the objects that came lately, so that there are never many to be looked through.

        The interpreter looks when enough more have come than gone. Here as many go as come, so that
        it would not before they were a million, and then stop for half a second.
        """
        if self.store.reads - self._looked >= YOUNG_READS:
            self._looked = self.store.reads
            self._looks += 1
            gc.collect(0 if self._looks % 4 else 1)

    def _moment(self, unsaved: float) -> float:
        now, before = time.thread_time(), self._stepped
        self._stepped = now
        pressed = min(max(unsaved - BEGIN_AT, 0.0) / (PRESSED_AT - BEGIN_AT), 1.0)
        most = max(PRESSED_S, PRESSED_SHARE * (now - before))
        if unsaved < 1.0:
            most = min(most, LONGEST_S)
        else:
            most = min(most * (1.0 + STEEP * (unsaved - 1.0)), 1.0)
        return STEP_S + pressed * (most - STEP_S)

    def _go_on(self, seconds: float, *, patient: bool) -> bool:
        """Put parts for so long, or wait for the disk."""
        if self._about is None:
            return False
        began, patience = time.perf_counter(), seconds if patient else 0.0
        try:
            if self._ending is not None:
                if patient:
                    wait((self._ending,), patience)
                if self._ending.done():
                    self._end(self._ending)
            elif self.store.has_room(patience):
                left = max(STEP_S, seconds - (time.perf_counter() - began))
                if self.vertical.write_checkpoint(left):
                    self._ending = self.store.commit(self._about)
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
        return self.step()

    def finish(self) -> None:
        """Bring a checkpoint that is in progress to its end.

        Raises:
            StateError: as :meth:`step` does.
        """
        while self._go_on(1.0, patient=True):
            pass

    def _end(self, ended: Future[None]) -> None:
        self._about = self._ending = None
        failure = ended.exception()
        self.vertical.end_checkpoint(durable=failure is None)
        CHECKPOINT_SECONDS.observe(time.perf_counter() - self._began)
        STATE_BYTES.labels(self.vertical.name).set(self.store.bytes_on_disk)
        UNSAVED.labels(self.vertical.name).set(self.vertical.unsaved())
        if failure is not None:
            raise failure


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


def _fitting(key: bytes) -> bytes:
    """A key, as one that is not too long."""
    if len(key) <= MAX_KEY:
        return key
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
