"""Jobs of the upload door: bounded in number, age and disk, with ids nobody can guess."""

from __future__ import annotations

import logging
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from plinth.engine import Closed, ConfigError, Engine, InputError, PlinthError, Refused, Sla
from plinth.pipelines.config.settings import UploadConfig
from plinth.pipelines.folders.items import Finished, Steps, analyse, discover
from plinth.verticals import Item, Vertical

log = logging.getLogger("plinth.jobs")

JobState = Literal["receiving", "queued", "running", "done", "failed"]


class TooManyJobs(Refused):
    """All places for jobs, or their disk allowance, are taken by work that is not finished."""

    reason = "too_many_jobs"


@dataclass(slots=True)
class ItemReport:
    """How one item of a job stands; ``files`` maps a served name to its path."""

    id: str
    facts: dict[str, Any]
    state: Literal["waiting", "running", "done", "failed"] = "waiting"
    stage: str = ""
    result: bytes = b""
    error: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


@dataclass(slots=True)
class Job:
    """One upload and what becomes of it.

    Args:
        id: unguessable.
        vertical: who reads it.
        folder: its own folder: ``in`` for what came, ``out`` for what is written.
        created: clock time of the upload.
    """

    id: str
    vertical: str
    folder: Path
    created: float
    state: JobState = "receiving"
    items: list[ItemReport] = field(default_factory=list)
    error: PlinthError | None = None
    finished: float | None = None
    bytes: int = 0
    deleted: bool = False
    ended: Future[None] = field(default_factory=Future)

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
            "error": {"field": None, **self.error.as_dict()} if self.error else None,
            "items": [_item_dict(item, url) for item in self.items],
        }


def _item_dict(item: ItemReport, url: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "state": item.state,
        "facts": item.facts,
        "result": orjson.Fragment(item.result) if item.result else None,
        "error": item.error,
        **item.details,
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
        self._verticals = verticals
        self._engine = engine
        self._slas = slas
        self._jobs: dict[str, Job] = {}
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        if limits.folder is not None:
            limits.folder.mkdir(parents=True, exist_ok=True)
        self._root = Path(tempfile.mkdtemp(prefix="plinth-jobs-", dir=limits.folder))
        self._threads = [
            threading.Thread(target=self._serve, name=f"plinth-job-{n}", daemon=True)
            for n in range(limits.workers)
        ]
        for thread in self._threads:
            thread.start()

    def create(self, vertical: str) -> Job:
        """A place for a new upload; the oldest finished job makes room if need be.

        Raises:
            TooManyJobs: every job kept is unfinished, or they fill the disk allowance.
            Closed: the server is shutting down.
        """
        self.purge()
        with self._lock:
            if self._closed:
                raise Closed("the server is shutting down", retry_after=5.0)
            while self._over():
                self._make_room()
            job_id = secrets.token_urlsafe(18)
            job = Job(job_id, vertical, self._root / job_id, self.clock())
            self._jobs[job_id] = job
        (job.folder / "in").mkdir(parents=True)
        return job

    def _over(self) -> bool:
        used = sum(job.bytes for job in self._jobs.values())
        return len(self._jobs) >= self.limits.max_jobs or used >= self.limits.max_job_bytes

    def _make_room(self) -> None:
        finished = [job for job in self._jobs.values() if job.finished is not None]
        if not finished:
            raise TooManyJobs(
                f"{len(self._jobs)} uploads are in work, no more are taken",
                hint="try again when one has finished",
                retry_after=10.0,
            )
        self._remove(min(finished, key=lambda job: job.finished or 0.0))

    def submit(self, job: Job, received: int) -> None:
        """Queue a job whose ``received`` bytes are in ``<folder>/in``."""
        job.bytes = received
        with self._lock:
            if self._closed:
                raise Closed("the server is shutting down", retry_after=5.0)
            job.state = "queued"
        self._queue.put(job)

    def get(self, vertical: str, job_id: str) -> Job | None:
        """The job, unless it never was, is too old, or belongs to another vertical."""
        job = self._jobs.get(job_id)
        known = job is not None and job.vertical == vertical and not self._expired(job)
        return job if known else None

    def _expired(self, job: Job) -> bool:
        oldest = self.clock() - self.limits.keep_seconds
        return job.finished is not None and job.finished <= oldest

    def delete(self, job: Job) -> None:
        """Forget a job and its files; one in work ends after its current item."""
        with self._lock:
            self._remove(job)

    def purge(self) -> None:
        """Delete finished jobs that are too old."""
        with self._lock:
            for job in list(self._jobs.values()):
                if self._expired(job):
                    self._remove(job)

    def close(self, seconds: float) -> bool:
        """Take no more, give running jobs ``seconds`` to end, remove all files.

        Returns:
            Whether every job ended in time.
        """
        with self._lock:
            self._closed = True
            open_jobs = [job for job in self._jobs.values() if job.finished is None]
        waiting = [job.ended for job in open_jobs if job.state != "receiving"]
        left = wait(waiting, timeout=seconds).not_done
        for _ in self._threads:
            self._queue.put(None)
        shutil.rmtree(self._root, ignore_errors=True)
        return not left

    def _remove(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        job.deleted = True
        if job.state != "running":
            shutil.rmtree(job.folder, ignore_errors=True)

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._lock:
                if not job.deleted:
                    job.state = "running"
            try:
                if not job.deleted:
                    self._run(job)
            except PlinthError as error:
                job.error = error
            except Exception as error:
                log.exception("a job failed with %s", type(error).__name__)
                job.error = ConfigError("the job met a fault; the log has the place")
            finally:
                self._end(job)

    def _run(self, job: Job) -> None:
        vertical = self._verticals[job.vertical]
        items = list(discover(vertical, job.folder / "in"))
        if not items:
            raise InputError(
                f"{vertical.name} found nothing in the upload",
                hint="check that it holds the files themselves, not links or another archive",
                reason="nothing_found",
            )
        job.items = [ItemReport(item.id, item.facts) for item in items]
        for item, report in zip(items, job.items, strict=True):
            if job.deleted or self._closed:
                raise Closed("the job was stopped before its end")
            self._one(vertical, item, report, job.folder / "out" / item.id)
        errors = [report.error for report in job.items if report.error]
        if len(errors) == len(items):
            first = errors[0]
            raise InputError(
                first["message"],
                field=first.get("field"),
                hint=first.get("hint"),
                reason=first["reason"],
            )

    def _one(self, vertical: Vertical[Any, Any], item: Item, report: ItemReport, out: Path) -> None:
        report.state = "running"
        steps = Steps(on_stage=lambda stage: setattr(report, "stage", stage))
        try:
            done = analyse(
                vertical, self._engine, item, out, sla=self._slas[vertical.name], steps=steps
            )
        except Closed:
            raise
        except PlinthError as error:
            report.error = {"field": None, **error.as_dict()}
            report.state = "failed"
            return
        report.result = vertical.encode(done.answer.value[0])
        report.details = _details(done)
        report.files = {name: out / name for name in done.files}
        report.state = "done"

    def _end(self, job: Job) -> None:
        shutil.rmtree(job.folder / "in", ignore_errors=True)
        written = [path for report in job.items for path in report.files.values()]
        job.bytes = sum(path.stat().st_size for path in written if path.exists())
        with self._lock:
            job.state = "failed" if job.error else "done"
            job.finished = self.clock()
            if job.deleted:
                shutil.rmtree(job.folder, ignore_errors=True)
        job.ended.set_result(None)


def _details(done: Finished) -> dict[str, Any]:
    return {
        "timing": done.answer.timing.as_dict(),
        "models": done.answer.models,
        "degraded": done.answer.degraded,
        "seconds": round(done.seconds, 3),
    }
