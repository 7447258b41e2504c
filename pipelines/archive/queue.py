"""What came in, what is to be analysed and what is to be sent: on disk, in one folder.

Images lie in ``images/<study>/<image>.dcm`` and results in ``results/<study>/...``; both names are
digests of UIDs. ``queue.db`` (SQLite, synced at each step) holds digests, states and counts, and no
name or number of a patient. Whatever is killed in between is done again, and what was sent is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plinth.engine import ConfigError
from plinth.engine.files import replace_file
from plinth.pipelines.folders.storage import StorageFull, storing

MAX_ATTEMPTS = 3
"""Times that an analysis is begun and ends the process, before it counts as failed."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS studies (
    study TEXT PRIMARY KEY, last REAL NOT NULL, arrived INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'open', message TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS images (
    study TEXT NOT NULL, image TEXT NOT NULL, content TEXT NOT NULL, bytes INTEGER NOT NULL,
    here INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (study, image)
);
CREATE TABLE IF NOT EXISTS jobs (
    study TEXT NOT NULL, analysis TEXT NOT NULL, item TEXT NOT NULL, inputs TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, reason TEXT NOT NULL DEFAULT '',
    message TEXT NOT NULL DEFAULT '', at REAL NOT NULL, PRIMARY KEY (study, analysis, item)
);
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY, study TEXT NOT NULL, analysis TEXT NOT NULL, item TEXT NOT NULL,
    path TEXT NOT NULL UNIQUE, state TEXT NOT NULL DEFAULT 'waiting', attempts INTEGER NOT NULL
    DEFAULT 0, not_before REAL NOT NULL DEFAULT 0, message TEXT NOT NULL DEFAULT '', at REAL
    NOT NULL
);
CREATE INDEX IF NOT EXISTS due ON outbox (state, not_before);
CREATE TABLE IF NOT EXISTS series (
    series TEXT PRIMARY KEY, images INTEGER NOT NULL, since REAL NOT NULL,
    fetched INTEGER NOT NULL, study TEXT NOT NULL DEFAULT '', fetching INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS transfers (
    study TEXT NOT NULL, series TEXT NOT NULL, at REAL NOT NULL, broken INTEGER NOT NULL,
    PRIMARY KEY (study, series)
);
UPDATE transfers SET broken = 1;
"""
"""``outbox.state``: waiting, sent or refused; ``jobs.state``: begun, done or failed;
``studies.state``: open, done, failed or incomplete; ``transfers``: what callers have begun to send,
and have not said that it is all. What was on its way when the process ended was broken off."""

Arrived = Literal["new", "same", "changed"]


def digest(*parts: str) -> str:
    """What stands for identifiers in names of files and in the queue."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Letter:
    """A DICOM file that is to be sent.

    Args:
        number: in the order they were written.
        path: the file.
        attempts: times that it may have been sent before.
    """

    number: int
    path: Path
    attempts: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A study that is complete.

    Args:
        study: its digest.
        folder: where its images lie.
        arrived: how many images had come when it was looked at.
    """

    study: str
    folder: Path
    arrived: int


class Queue:
    """The folder of one ``plinth archive``; safe to use from several threads.

    Args:
        folder: made if it is not there.
        max_bytes: disk that images may take.
        clock: seconds since 1970; another one in tests.

    Raises:
        ConfigError: another process has it.
        StorageError: it cannot be written to.
    """

    def __init__(self, folder: Path, max_bytes: int = 100 << 30, clock: Any = time.time) -> None:
        self.folder, self._max_bytes, self._now = folder, max_bytes, clock
        with storing():
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "results").mkdir(exist_ok=True)
            self._held = (folder / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._held.close()
            raise ConfigError(
                f"another process works in {folder}", hint="stop it, or choose another folder"
            ) from None
        self._lock = threading.RLock()
        self._db = connected(folder)
        self._db.executescript(SCHEMA)
        self._bytes = self._one("SELECT COALESCE(SUM(bytes), 0) FROM images WHERE here")[0]

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._db.close()
            self._held.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Steps that happen all or not at all; on disk when the block ends."""
        with self._lock, storing():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise OSError(str(error)) from error
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _all(self, question: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(question, tuple(values)).fetchall()

    def _one(self, question: str, values: Iterable[Any] = ()) -> tuple[Any, ...]:
        return next(iter(self._all(question, values)), ())

    # -- what comes in -------------------------------------------------------------------------
    def put(self, study_uid: str, image_uid: str, content: bytes) -> Arrived:
        """Keep an image; when this returns, it is on disk.

        Args:
            study_uid: Study Instance UID.
            image_uid: SOP Instance UID.
            content: the file, PS3.10.

        Returns:
            Whether it is new, was here with the same content, or takes the place of another one.

        Raises:
            StorageFull: images take as much disk as they may.
            StorageError: it cannot be written.
        """
        study, image = digest(study_uid), digest(image_uid)
        found = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = self.images(study) / f"{image}.dcm"
        with self._lock:
            known = self._one(
                "SELECT content, bytes, here FROM images WHERE study = ? AND image = ?",
                (study, image),
            )
            if known and known[0] == found and known[2] and path.exists():
                return "same"
            before = known[1] if known and known[2] else 0
            if self._bytes - before + len(content) > self._max_bytes:
                raise StorageFull(
                    f"images take {self._bytes} bytes, at most {self._max_bytes} are kept",
                    hint="raise max_bytes, or lower keep_days",
                )
            with storing():
                path.parent.mkdir(exist_ok=True)
                replace_file(path, content, mode=0o600)
            with self._change() as db:
                db.execute(
                    "INSERT OR REPLACE INTO images (study, image, content, bytes) VALUES (?,?,?,?)",
                    (study, image, found, len(content)),
                )
                db.execute(
                    "INSERT INTO studies (study, last, arrived) VALUES (?, ?, 1) "
                    "ON CONFLICT (study) DO UPDATE SET last = excluded.last, state = 'open', "
                    "arrived = arrived + 1",
                    (study, self._now()),
                )
            self._bytes += len(content) - before
        return "changed" if known and known[0] != found else "new"

    def images(self, study: str) -> Path:
        """The folder of a study's images."""
        return self.folder / "images" / study

    def kept(self, study_uid: str, image_uid: str) -> bytes | None:
        """The file of an image, ``None`` if it is not here."""
        if not self.has(study_uid, image_uid):
            return None
        try:
            path = self.images(digest(study_uid)) / f"{digest(image_uid)}.dcm"
            return path.read_bytes()
        except FileNotFoundError:  # deleted meanwhile
            return None

    def has(self, study_uid: str, image_uid: str) -> bool:
        """Whether an image is here."""
        values = (digest(study_uid), digest(image_uid))
        return bool(self._one("SELECT 1 FROM images WHERE study=? AND image=? AND here", values))

    def contents(self, study: str) -> dict[str, str]:
        """Digest of the content by file name, of a study's images."""
        rows = self._all("SELECT image, content FROM images WHERE study = ? AND here", (study,))
        return {f"{image}.dcm": content for image, content in rows}

    def sending(self, study_uid: str, series_uid: str) -> float:
        """A caller begins to send images of a series; returns when, for :meth:`ended`."""
        now = float(self._now())
        with self._change() as db:
            db.execute(
                "INSERT OR IGNORE INTO transfers (study, series, at, broken) VALUES (?, ?, ?, 0)",
                (digest(study_uid), digest(series_uid), now),
            )
        return now

    def ended(self, study_uid: str, series_uid: str, since: float, *, whole: bool) -> None:
        """A caller sends no more of a series.

        Args:
            study_uid: Study Instance UID.
            series_uid: Series Instance UID.
            since: when it began.
            whole: it said so itself; otherwise it was broken off, and the study is not whole before
                a caller that begins later has sent of that series again and said so.
        """
        key = (digest(study_uid), digest(series_uid))
        with self._change() as db:
            if not whole:
                db.execute(
                    "INSERT OR REPLACE INTO transfers (study, series, at, broken) "
                    "VALUES (?, ?, ?, 1)",
                    (*key, self._now()),
                )
                return
            db.execute(
                "DELETE FROM transfers WHERE study = ? AND series = ? AND at <= ?", (*key, since)
            )
            db.execute(
                "UPDATE studies SET state = 'open', message = '', last = ? WHERE study = ? AND "
                "state = 'incomplete' AND study NOT IN (SELECT study FROM transfers WHERE broken)",
                (self._now(), key[0]),
            )

    # -- what an archive has -------------------------------------------------------------------
    def stable(self, series_uid: str, images: int, quiet: float) -> bool:
        """Whether a series of an archive stayed the same for ``quiet`` seconds, and is not here.

        Args:
            series_uid: Series Instance UID.
            images: how many the archive says it has.
            quiet: seconds.
        """
        series, now = digest(series_uid), self._now()
        known = self._one("SELECT images, since, fetched FROM series WHERE series = ?", (series,))
        if known and known[0] == images:
            return bool(known[2] != images and now - known[1] >= quiet)
        with self._change() as db:
            db.execute(
                "INSERT INTO series (series, images, since, fetched) VALUES (?, ?, ?, -1) "
                "ON CONFLICT (series) DO UPDATE SET images = excluded.images, "
                "since = excluded.since",
                (series, images, now),
            )
        return quiet == 0

    def fetching(self, series_uid: str, study_uid: str) -> None:
        """A series begins to come: until all of it is here its study is not complete."""
        with self._change() as db:
            values = (digest(study_uid), digest(series_uid))
            db.execute("UPDATE series SET study = ?, fetching = 1 WHERE series = ?", values)

    def fetched(self, series_uid: str, images: int) -> None:
        """All images that an archive has of a series are here."""
        with self._change() as db:
            values = (images, digest(series_uid))
            db.execute("UPDATE series SET fetched = ?, fetching = 0 WHERE series = ?", values)

    # -- what is analysed ----------------------------------------------------------------------
    def ready(self, quiet: float) -> Ready | None:
        """The study that has been complete for longest: nothing came for ``quiet`` seconds."""
        now = self._now()
        found = self._one(
            "SELECT study, arrived FROM studies WHERE state = 'open' AND (last <= ? OR last > ?) "
            "AND study NOT IN (SELECT study FROM series WHERE fetching) ORDER BY last",
            (now - quiet, now + quiet),  # a clock that was set back holds up no study
        )
        return Ready(found[0], self.images(found[0]), found[1]) if found else None

    def missing(self, study: str) -> int:
        """Images of a study that were here once and were deleted since."""
        question = "SELECT COUNT(*) FROM images WHERE study = ? AND NOT here"
        return int(self._one(question, (study,))[0])

    def broken_off(self, study: str) -> int:
        """Series of a study that a caller began to send and did not say that it was all."""
        question = "SELECT COUNT(*) FROM transfers WHERE study = ? AND broken"
        return int(self._one(question, (study,))[0])

    def finish(self, ready: Ready, message: str = "", state: str = "done") -> None:
        """A study was worked through; it stays open if more of it came meanwhile."""
        with self._change() as db:
            db.execute(
                "UPDATE studies SET state = ?, message = ? WHERE study = ? AND arrived = ?",
                (state, message, ready.study, ready.arrived),
            )

    def begin(self, study: str, analysis: str, item: str, inputs: str) -> bool:
        """Whether an analysis is to be made now: not made before of the same images.

        Args:
            study: its digest.
            analysis: name in the file.
            item: id of the series.
            inputs: digest of all that the result depends on.
        """
        key = (study, analysis, item)
        where = "WHERE study = ? AND analysis = ? AND item = ?"
        known = self._one(f"SELECT inputs, state, attempts FROM jobs {where}", key)  # noqa: S608
        same = bool(known) and known[0] == inputs
        if same and known[1] != "begun":
            return False
        attempts = known[2] + 1 if same else 1
        if attempts > MAX_ATTEMPTS:
            times = f"the process ended {MAX_ATTEMPTS} times in this analysis"
            self.failed(study, analysis, item, "ended", times)
            return False
        with self._change() as db:
            db.execute(
                "INSERT OR REPLACE INTO jobs (study, analysis, item, inputs, state, attempts, at) "
                "VALUES (?, ?, ?, ?, 'begun', ?, ?)",
                (*key, inputs, attempts, self._now()),
            )
        return True

    def forget(self, study: str, analysis: str, item: str) -> None:
        """An analysis could not be made, through no fault of its images: begin it anew."""
        with self._change() as db:
            where = "WHERE study = ? AND analysis = ? AND item = ?"
            db.execute(f"DELETE FROM jobs {where}", (study, analysis, item))  # noqa: S608

    def failed(self, study: str, analysis: str, item: str, reason: str, message: str) -> None:
        """An analysis failed, through the fault of its images."""
        self._end_job((study, analysis, item), "failed", reason, message, ())

    def done(self, study: str, analysis: str, item: str, letters: Iterable[Path]) -> None:
        """An analysis is made: its files are to be sent, in this order; older ones are not."""
        self._end_job((study, analysis, item), "done", "", "", letters)

    def _end_job(
        self,
        key: tuple[str, str, str],
        state: str,
        reason: str,
        message: str,
        letters: Iterable[Path],
    ) -> None:
        where = "WHERE study = ? AND analysis = ? AND item = ?"
        with self._change() as db:
            db.execute(
                f"UPDATE jobs SET state = ?, reason = ?, message = ?, at = ? {where}",  # noqa: S608
                (state, reason, message, self._now(), *key),
            )
            db.execute(f"DELETE FROM outbox {where} AND state = 'waiting'", key)  # noqa: S608
            db.executemany(
                "INSERT INTO outbox (study, analysis, item, path, at) VALUES (?, ?, ?, ?, ?)",
                [(*key, str(path.relative_to(self.folder)), self._now()) for path in letters],
            )

    # -- what is sent --------------------------------------------------------------------------
    def next_letter(self) -> Letter | None:
        """The oldest file that may be sent now."""
        found = self._one(
            "SELECT number, path, attempts FROM outbox WHERE state = 'waiting' "
            "AND not_before <= ? ORDER BY number",
            (self._now(),),
        )
        return Letter(found[0], self.folder / found[1], found[2]) if found else None

    def attempt(self, letter: Letter) -> None:
        """A file is about to be sent: from now on it may have been."""
        with self._change() as db:
            question = "UPDATE outbox SET attempts = attempts + 1 WHERE number = ?"
            db.execute(question, (letter.number,))

    def sent(self, letter: Letter) -> None:
        """The archive has the file."""
        self._settle(letter, "sent", "", 0)

    def refused(self, letter: Letter, message: str) -> None:
        """The archive does not want the file, and would not want it later."""
        self._settle(letter, "refused", message, 0)

    def later(self, letter: Letter, message: str, seconds: float) -> None:
        """The archive cannot take the file now."""
        self._settle(letter, "waiting", message, self._now() + seconds)

    def _settle(self, letter: Letter, state: str, message: str, not_before: float) -> None:
        with self._change() as db:
            db.execute(
                "UPDATE outbox SET state = ?, message = ?, not_before = ?, at = ? WHERE number = ?",
                (state, message, not_before, self._now(), letter.number),
            )

    def retry(self) -> int:
        """Let refused files, failed analyses and failed studies be tried again; how many.

        A study that was broken off is then analysed as it is here.
        """
        with self._change() as db:
            count = db.execute(
                "UPDATE outbox SET state = 'waiting', not_before = 0 WHERE state = 'refused'"
            ).rowcount
            failed = db.execute("SELECT DISTINCT study FROM jobs WHERE state = 'failed'").fetchall()
            count += db.execute("DELETE FROM jobs WHERE state = 'failed'").rowcount
            db.executemany("UPDATE studies SET state = 'open' WHERE study = ?", failed)
            broken = "SELECT study FROM transfers WHERE broken"
            count += db.execute(
                "UPDATE studies SET state = 'open', message = '' WHERE state = 'failed' OR "  # noqa: S608
                f"(state = 'incomplete' AND study IN ({broken}))"
            ).rowcount
            db.execute("DELETE FROM transfers WHERE broken")
        return count

    # -- keeping house -------------------------------------------------------------------------
    def clean(self, keep_seconds: float) -> int:
        """Delete images and results of studies that are done and sent for so long; how many.

        Their digests stay: the same images sent again are not analysed again, and a study of
        which only some come again is not taken for the whole one.
        """
        old = self._all(
            "SELECT study FROM studies WHERE state != 'open' AND last < ? AND study NOT IN "
            "(SELECT study FROM outbox WHERE state = 'waiting') AND study IN "
            "(SELECT study FROM images WHERE here)",
            (self._now() - keep_seconds,),
        )
        for (study,) in old:
            with self._lock:
                with self._change() as db:
                    db.execute("UPDATE images SET here = 0 WHERE study = ?", (study,))
                    db.execute("DELETE FROM transfers WHERE study = ?", (study,))
                shutil.rmtree(self.images(study), ignore_errors=True)
                shutil.rmtree(self.folder / "results" / study, ignore_errors=True)
                self._bytes = self._one("SELECT COALESCE(SUM(bytes), 0) FROM images WHERE here")[0]
        return len(old)

    def status(self) -> dict[str, Any]:
        """Counts of everything, and why what failed did."""
        with self._lock:
            return status_of(self._db)


def connected(folder: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """The queue's data base.

    Args:
        folder: of the queue.
        read_only: for looking while another process works in it.

    Raises:
        ConfigError: there is none to look at.
    """
    path = folder / "queue.db"
    if read_only and not path.exists():
        raise ConfigError(f"there is no queue in {folder}", hint="plinth archive run makes one")
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db


def status_of(db: sqlite3.Connection) -> dict[str, Any]:
    """As :meth:`Queue.status`."""

    def counts(table: str) -> Mapping[str, int]:
        question = f"SELECT state, COUNT(*) FROM {table} GROUP BY state"  # noqa: S608
        return dict(db.execute(question).fetchall())

    images = db.execute("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM images WHERE here")
    count, size = images.fetchone()
    wrong = [
        {"study": study, "analysis": analysis, "item": item, "reason": reason, "message": message}
        for study, analysis, item, reason, message in db.execute(
            "SELECT study, analysis, item, reason, message FROM jobs WHERE state = 'failed' "
            "UNION ALL SELECT study, analysis, item, 'not sent', message FROM outbox "
            "WHERE message != '' AND state != 'sent' "
            "UNION ALL SELECT study, '', '', state, message FROM studies WHERE message != '' "
            "LIMIT 100"
        )
    ]
    return {
        "images": count,
        "bytes": size,
        "studies": counts("studies"),
        "analyses": counts("jobs"),
        "files": counts("outbox"),
        "told": wrong,
    }
