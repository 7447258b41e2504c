"""Jobs of the upload door: bounded in number, age and disk, with ids nobody can guess."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from plinth.engine import (
    Closed,
    ComputeError,
    ConfigError,
    Engine,
    InputError,
    PlinthError,
    Refused,
    Sla,
)
from plinth.engine.files import replace_file
from plinth.pipelines.config.settings import UploadConfig
from plinth.pipelines.folders.items import (
    STEPS,
    Finished,
    SoftwareFault,
    Steps,
    analyse,
    printable,
    software_fault,
    survey,
)
from plinth.pipelines.folders.storage import StorageError, StorageFull, storing
from plinth.pipelines.observability.tracing import Begun
from plinth.pipelines.records import explained
from plinth.verticals import Item, LeftOut, Vertical

JobState = Literal["receiving", "queued", "running", "done", "failed"]
OWN = (InputError, Refused, StorageError, SoftwareFault, ComputeError)
"""Errors whose text is about the job alone; a model's may be about others that ran beside it."""
MAX_SOURCES = 100
"""File names of one item that its listing tells."""


class TooManyJobs(Refused):
    """All places for jobs, or their disk allowance, are taken by work that is not finished."""

    reason = "too_many_jobs"


@dataclass(slots=True)
class ItemReport:
    """How one item of a job stands.

    Args:
        id: names its files' URLs.
        facts: what the vertical says of it.
        sources: names of its files as the client called them, the first of them.
        source_count: how many files it is made of.
        renamed: name as the client called it, by path as it is stored, where these differ.
        state: where it stands.
        stage: the last stage that began.
        result: a file with the vertical's answer as JSON.
        failure: why it failed.
        error: the same as JSON-ready data, with the step.
        details: timing and models.
        files: path by served name.
        verdicts: what a person said of it or of a part, JSON-ready, by the part; its own is "".
    """

    id: str
    facts: dict[str, Any]
    sources: list[str] = field(default_factory=list)
    source_count: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    stage: str = ""
    result: Path | None = None
    failure: PlinthError | None = None
    error: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Job:
    """One upload and what becomes of it.

    Args:
        id: unguessable.
        vertical: who reads it.
        folder: its own folder: ``in`` for what came, ``out`` for what is written.
        created: clock time of the upload.
        left_out: the first files that are no item, and why.
        span: of its work, where the request that brought it is traced; ``queued``: while it waits.
    """

    id: str
    vertical: str
    folder: Path
    created: float
    state: JobState = "receiving"
    items: list[ItemReport] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failure: PlinthError | None = None
    error: dict[str, Any] | None = None
    finished: float | None = None
    bytes: int = 0
    deleted: bool = False
    ended: Future[None] = field(default_factory=Future)
    span: Begun | None = None
    queued: Begun | None = None

    @property
    def received(self) -> Path:
        """The folder that holds what came."""
        return self.folder / "in"

    @property
    def has_failed(self) -> bool:
        """Whether some of it failed, or all."""
        return self.failure is not None or any(item.failure for item in self.items)

    @property
    def retryable(self) -> bool:
        """Whether it is over, some of it failed, and what came is still there."""
        return self.finished is not None and self.has_failed and self.received.is_dir()

    @property
    def names(self) -> Path:
        """The file that maps stored names to the client's."""
        return self.folder / "names.jsonl"

    @property
    def files(self) -> dict[str, Path]:
        """Path by served name: ``<item>/<file>``, and plain ``<file>`` when there is one item."""
        named = {f"{item.id}/{name}": p for item in self.items for name, p in item.files.items()}
        return named | (self.items[0].files if len(self.items) == 1 else {})

    def as_dict(self, now: float) -> dict[str, Any]:
        """The job for JSON: state, progress, and per item its result or error and its files."""
        url = f"/v1/{self.vertical}/jobs/{self.id}"
        over = sum(item.state in ("done", "failed") for item in self.items)
        stage = next((item.stage for item in self.items if item.state == "running"), "")
        return {
            "id": self.id,
            "vertical": self.vertical,
            "state": self.state,
            "url": url,
            "seconds": round((self.finished or now) - self.created, 3),
            "progress": {"items": len(self.items), "finished": over, "stage": stage},
            "error": self.error,
            "retryable": self.retryable,
            "items": [_item_dict(item, url) for item in self.items],
            "left_out": self.left_out,
        }


def _item_dict(item: ItemReport, url: str) -> dict[str, Any]:
    result = None
    if item.result is not None:
        with contextlib.suppress(FileNotFoundError):  # the job was just deleted
            result = orjson.Fragment(item.result.read_bytes())
    return {
        "id": item.id,
        "state": item.state,
        "facts": item.facts,
        "sources": item.sources,
        "source_count": item.source_count,
        "result": result,
        "error": item.error,
        **item.details,
        "verdicts": item.verdicts,
        "files": {name: f"{url}/files/{item.id}/{name}" for name in item.files},
    }


class Jobs:
    """The jobs of a server and the threads that run them.

    Args:
        verticals: folder verticals by name.
        engine: the engine that has their models.
        slas: the promise by vertical.
        limits: the bounds.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the folder for jobs cannot be used.
    """

    def __init__(
        self,
        verticals: Mapping[str, Vertical[Any, Any]],
        engine: Engine,
        slas: Mapping[str, Sla],
        limits: UploadConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.receivers = ThreadPoolExecutor(2, thread_name_prefix="plinth-upload")
        """Threads that write and unpack what comes, two uploads at a time."""
        self._verticals = verticals
        self._engine = engine
        self._slas = slas
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._root = JobsFolder(limits.folder)
        self._threads = [
            threading.Thread(target=self._serve, name=f"plinth-job-{n}", daemon=True)
            for n in range(limits.workers)
        ]
        for thread in self._threads:
            thread.start()

    # -- the table -----------------------------------------------------------------------------
    def create(self, vertical: str) -> Job:
        """A place for a new upload; the oldest finished job makes room if need be.

        Raises:
            TooManyJobs: every job kept is unfinished, or they fill the disk allowance.
            Closed: the server is shutting down.
            StorageError: there is no room for its folder.
        """
        self.purge()
        job_id = secrets.token_urlsafe(18)
        job = Job(job_id, vertical, self._root.path / job_id, self.clock())
        with self._changed:
            self._check_open()
            evicted = self._evict(lambda: len(self._jobs) >= self.limits.max_jobs)
            self._jobs[job_id] = job
        _remove_folders(evicted)
        try:
            with storing():
                job.received.mkdir(parents=True)
        except StorageError:
            self.delete(job)
            raise
        return job

    def spend(self, job: Job, size: int) -> None:
        """Account for ``size`` more bytes of a job on disk; finished jobs make room if need be.

        Raises:
            TooManyJobs: unfinished jobs fill the disk allowance.
            StorageFull: this job would fill it alone.
        """
        with self._changed:
            job.bytes += size
            limit = self.limits.max_job_bytes
            if job.bytes > limit:
                raise StorageFull(
                    "this upload takes more disk than all uploads may take",
                    hint="send less at once, or raise serve.upload.max_job_bytes",
                )
            evicted = self._evict(lambda: self._bytes() > limit)
        _remove_folders(evicted)

    def _bytes(self) -> int:
        return sum(job.bytes for job in self._jobs.values())

    def _evict(self, crowded: Callable[[], bool]) -> list[Job]:
        """Take the oldest finished jobs out of the table until it is not crowded any more."""
        evicted = []
        while crowded():
            finished = [job for job in self._jobs.values() if job.finished is not None]
            if not finished:
                raise TooManyJobs(
                    f"{len(self._jobs)} uploads are in work, there is no room for more",
                    hint="try again when one has finished",
                    retry_after=10.0,
                )
            oldest = min(finished, key=lambda job: job.finished or 0.0)
            self._forget(oldest)
            evicted.append(oldest)
        return evicted

    def submit(self, job: Job, within: Begun | None = None) -> None:
        """Queue a job whose files are in its folder ``in``; ``within``: the request's span."""
        with self._changed:
            self._check_open()
            if not job.deleted:
                self._queue(job, within)

    def _queue(self, job: Job, within: Begun | None) -> None:
        now = time.perf_counter()
        job.span = within and within.begin(f"job {job.vertical}", now)
        job.queued = job.span and job.span.begin("queue", now)
        job.state = "queued"
        self._waiting.append(job)
        self._changed.notify()

    def retry(self, job: Job, within: Begun | None = None) -> None:
        """Queue a job again for those of its items that failed; the others stay as they are.

        Args:
            job: some of which failed.
            within: the request's span.

        Raises:
            InputError: nothing of it failed, or it is in work.
            Closed: the server is shutting down.
        """
        with self._changed:
            self._check_open()
            if job.deleted or not job.retryable:
                raise InputError(
                    "there is nothing to try again: the job is in work, or all of it is done",
                    reason="not_failed",
                    hint="see the job's state",
                )
            job.failure = job.error = job.finished = None
            job.left_out, job.ended, job.created = [], Future(), self.clock()
            self._queue(job, within)

    def judge(self, job: Job, item: str, part: str, accepted: bool, by: str) -> dict[str, Any]:
        """Keep what a person says of an item, beside its files as ``verdicts.json``.

        Args:
            job: that is over.
            item: its id.
            part: of the item, such as ``found 1``; empty: all of it.
            accepted: or rejected.
            by: who says so.

        Returns:
            The verdict, JSON-ready.

        Raises:
            InputError: the job has no such item, or it is not done.
            StorageError: there is no room.
        """
        report = next((one for one in job.items if one.id == item and one.state == "done"), None)
        if report is None:
            raise InputError("there is no such result to judge", reason="not_found")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        verdict = {"accepted": accepted, "by": by, "time": at}
        path = job.folder / f"verdicts-{report.id}.json"
        with self._changed:
            verdicts = report.verdicts | {part: verdict}
            with storing():
                replace_file(path, orjson.dumps(verdicts, option=orjson.OPT_INDENT_2))
            report.verdicts = verdicts
            report.files = report.files | {"verdicts.json": path}
        return verdict

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the server is shutting down", retry_after=5.0)

    def get(self, vertical: str, job_id: str) -> Job | None:
        """The job, unless it never was, is too old, or belongs to another vertical."""
        job = self._jobs.get(job_id)
        known = job is not None and job.vertical == vertical and not self._expired(job)
        return job if known else None

    def all(self, vertical: str) -> list[Job]:
        """The jobs of a vertical that are kept, the newest first."""
        with self._changed:
            found = [job for job in self._jobs.values() if job.vertical == vertical]
        return sorted(
            (job for job in found if not self._expired(job)),
            key=lambda job: job.created,
            reverse=True,
        )

    def _expired(self, job: Job) -> bool:
        oldest = self.clock() - self.limits.keep_seconds
        return job.finished is not None and job.finished <= oldest

    def delete(self, job: Job) -> None:
        """Forget a job and its files; one in work ends after its current item."""
        with self._changed:
            self._forget(job)
        if job.state != "running":
            _remove_folders([job])

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        job.deleted = True
        if job in self._waiting:
            self._waiting.remove(job)
            _tell_end(job)

    def purge(self) -> None:
        """Delete finished jobs that are too old."""
        with self._changed:
            old = [job for job in self._jobs.values() if self._expired(job)]
            for job in old:
                self._forget(job)
        _remove_folders(old)

    def close(self, seconds: float) -> bool:
        """Take no more, give running jobs ``seconds`` to end, remove all files.

        Returns:
            Whether every job ended in time.
        """
        with self._changed:
            self._closed = True
            open_jobs = [job for job in self._jobs.values() if job.finished is None]
        waiting = [job.ended for job in open_jobs if job.state != "receiving"]
        left = wait(waiting, timeout=seconds).not_done
        if left:  # what they wait for would keep the process
            self._engine.end_steps(Closed("the server is shutting down", retry_after=5.0))
        with self._changed:
            self._changed.notify_all()
        self.receivers.shutdown(wait=False, cancel_futures=True)
        self._root.close()
        return not left

    # -- the work ------------------------------------------------------------------------------
    def _serve(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(job)
            except PlinthError as error:
                job.failure = error
            finally:
                self._end(job)

    def _next(self) -> Job | None:
        """The next job that waits; none once the server has closed and none waits any more."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            job.state = "running"
        if job.queued is not None:
            job.queued.end({})
        return job

    def _work(self, job: Job) -> None:
        """Run a job; whatever goes wrong ends the job, never the thread."""
        try:
            self._run(job)
        except PlinthError:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            raise software_fault(job.vertical, STEPS["find"], error) from error

    def _run(self, job: Job) -> None:
        vertical = self._verticals[job.vertical]
        found: list[Item] = []
        for one in survey(vertical, job.received, self._engine):
            if isinstance(one, LeftOut):
                self._leave_out(job, one)
            else:
                found = [other for other in found if other.id not in one.replaces] + [one]
        if not found:
            raise InputError(
                f"{vertical.name} found nothing in the upload",
                hint="check that it holds the files themselves, not links or another archive",
                reason="nothing_found",
            )
        done = {report.id: report for report in job.items if report.state == "done"}
        job.items = [done.get(report.id, report) for report in _reports(job, found)]
        for one, report in zip(found, job.items, strict=True):
            if job.deleted or self._closed:
                raise Closed("the job was stopped before its end", retry_after=5.0)
            if report.state != "done":
                self._one(vertical, job, one, report)
        failures = [report for report in job.items if report.failure]
        if len(failures) == len(found):
            job.failure, job.error = failures[0].failure, failures[0].error

    def _leave_out(self, job: Job, one: LeftOut) -> None:
        if len(job.left_out) < MAX_SOURCES:
            told = {"reason": one.reason, "message": one.message, "files": one.files}
            report = _reports(job, [Item("", (one.path,))])[0]
            job.left_out.append({"sources": report.sources, **_for_client(told, job, report)})

    def _one(self, vertical: Vertical[Any, Any], job: Job, one: Item, report: ItemReport) -> None:
        report.state = "running"
        steps = Steps(on_stage=lambda stage: setattr(report, "stage", stage), within=job.span)
        out = job.folder / "out" / report.id
        try:
            done = analyse(
                vertical, self._engine, one, out, sla=self._slas[vertical.name], steps=steps
            )
            self._keep(job, done, report)
        except Closed:
            raise
        except PlinthError as error:
            shutil.rmtree(out, ignore_errors=True)
            report.failure = error if isinstance(error, OWN) else explained(error)
            report.error = _for_client(steps.failure(report.failure), job, report)
            report.state = "failed"
        else:
            report.state = "done"

    def _keep(self, job: Job, done: Finished, report: ItemReport) -> None:
        result = job.folder / f"result-{report.id}.json"
        files = {name: done.folder / name for name in done.files}
        with storing():
            self.spend(job, sum(path.stat().st_size for path in files.values()))
            self.spend(job, len(done.encoded))
            result.write_bytes(done.encoded)
        report.details = _details(done)
        report.files, report.result = files, result

    def _end(self, job: Job) -> None:
        if not job.has_failed:
            shutil.rmtree(job.received, ignore_errors=True)  # what failed may be tried again
        if job.failure is not None and job.error is None:
            job.error = {"field": None, "step": STEPS["find"], **job.failure.as_dict()}
            job.error = _for_client(job.error, job, ItemReport("", {}))
        kept = _size(job.folder)
        with self._changed:
            job.bytes = kept
            job.state = "failed" if job.failure else "done"
            job.finished = self.clock()
        if job.deleted:
            _remove_folders([job])
        _tell_end(job)
        job.ended.set_result(None)


class JobsFolder:
    """The folder of one server's jobs; what servers that were killed left there is removed.

    Args:
        parent: where it is made; ``None`` means the system's folder for temporary files.

    Raises:
        ConfigError: it cannot be made there.
    """

    def __init__(self, parent: Path | None) -> None:
        try:
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix="plinth-jobs-", dir=parent))
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"uploads cannot be kept in {parent or tempfile.gettempdir()}: {error.strerror}",
                hint="set serve.upload.folder to a folder this user may write",
            ) from None
        self._sweep()

    def _sweep(self) -> None:
        for other in self.path.parent.glob("plinth-jobs-*"):
            try:
                with (other / "lock").open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
            except OSError:  # a server that runs holds it, or it is another user's
                continue

    def close(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _tell_end(job: Job) -> None:
    """End the span of a job that is done, or that was deleted before its turn."""
    if job.span is None:
        return
    if job.queued is not None:
        job.queued.end({})
    failed = sum(item.state == "failed" for item in job.items)
    about: dict[str, str | int] = {"plinth.vertical": job.vertical, "plinth.items": len(job.items)}
    about |= {"plinth.failed": failed} if failed else {}
    about |= {"error.type": "deleted"} if job.deleted else {}
    about |= {} if job.failure is None else {"error.type": job.failure.reason}
    job.span.end(about, failed=job.failure is not None and not isinstance(job.failure, InputError))


def _remove_folders(jobs: Iterable[Job]) -> None:
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder that may be deleted meanwhile."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(here, name).stat().st_size
    return total


def _reports(job: Job, found: list[Item]) -> list[ItemReport]:
    """A report for each item, with the client's names of its files."""
    reports = []
    for one in found:
        stored = [_below(path, job.received) for path in one.paths]
        report = ItemReport(one.id, {}, stored[:MAX_SOURCES], len(stored))
        reports.append(report)
    wanted = {name for report in reports for name in report.sources}
    names = {}
    if job.names.exists():
        with job.names.open("rb") as lines:
            for line in map(orjson.loads, lines):
                if line["stored"] in wanted:
                    names[line["stored"]] = line["name"]
    for one, report in zip(found, reports, strict=True):
        report.renamed = {name: names[name] for name in report.sources if name in names}
        report.sources = [names.get(name, name) for name in report.sources]
        report.facts = _for_client(one.facts, job, report)
    return reports


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _for_client(value: dict[str, Any], job: Job, report: ItemReport) -> dict[str, Any]:
    """JSON-ready data without paths of this machine, and with the client's own file names."""
    told = {f"{job.received}/": "", str(job.received): "the upload", f"{job.folder}/": ""}
    for stored, name in report.renamed.items():
        told[stored] = name
        told[stored.rpartition("/")[2]] = name.replace("\\", "/").rpartition("/")[2]
    told = {before: after for before, after in told.items() if before}

    def tidy(one: Any) -> Any:
        if isinstance(one, str):
            for before, after in told.items():
                one = one.replace(before, after)
            return one
        if isinstance(one, dict):
            return {tidy(key): tidy(inner) for key, inner in one.items()}
        if isinstance(one, list | tuple):
            return [tidy(inner) for inner in one]
        return one

    tidied: dict[str, Any] = printable(tidy(value))
    return tidied


def _details(done: Finished) -> dict[str, Any]:
    return {
        "timing": done.answer.timing.as_dict(),
        "models": done.answer.models,
        "precision": done.answer.precision,
        "degraded": done.answer.degraded,
        "seconds": round(done.seconds, 3),
    }
