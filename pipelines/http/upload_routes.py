"""The upload routes: ``POST /v1/<vertical>/<action>`` with files, and the jobs they become."""

from __future__ import annotations

import asyncio
import mimetypes
import shutil
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from plinth.engine import InputError
from plinth.pipelines.config.settings import ServeConfig
from plinth.pipelines.folders.archives import ALLOWED, FORM_TYPE, ZIP_TYPES, Form, Sink, save, unzip
from plinth.pipelines.folders.jobs import Job, Jobs
from plinth.pipelines.http.body import chunks, headers_of, media_type
from plinth.pipelines.http.disconnect import cancel_on_disconnect
from plinth.pipelines.http.errors import HttpError, error_response
from plinth.verticals import Vertical

ZIP_MAGIC = b"PK\x03\x04"
FILE_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": (
        "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
    ),
    "cache-control": "private, no-store",
}


class UploadDoor:
    """One folder vertical behind its routes.

    Args:
        vertical: has ``discover`` and ``load``.
        jobs: where uploads become jobs.
        config: bounds.
    """

    def __init__(self, vertical: Vertical[Any, Any], jobs: Jobs, config: ServeConfig) -> None:
        self.vertical = vertical
        self.jobs = jobs
        self.config = config

    async def submit(self, request: Request) -> Response:
        """Take an upload: 202 with the job, or with ``?wait=true`` the finished job.

        Raises:
            PlinthError: the upload is refused.
        """
        kind = media_type(headers_of(request.scope), ALLOWED)
        job = await asyncio.to_thread(self.jobs.create, self.vertical.name)
        try:
            received = await self._receive(request, kind, job)
            self.jobs.submit(job, received)
        except BaseException:
            await asyncio.to_thread(self.jobs.delete, job)
            raise
        if request.query_params.get("wait", "").lower() in ("true", "1", "yes"):
            return await self._wait(request, job)
        return self._document(job, 202)

    async def _receive(self, request: Request, kind: str, job: Job) -> int:
        limits = self.config.upload
        sink = Sink(job.folder / "in", limits)
        headers, patience = headers_of(request.scope), self.config.request_timeout_seconds
        body = chunks(request.receive, headers, limits.max_bytes, patience)
        if kind == FORM_TYPE:
            await Form(request.headers["content-type"], sink).feed(body)
            archive = await asyncio.to_thread(_lone_archive, sink, job)
        else:
            archive = job.folder / "body"
            await save(body, archive)
            if kind not in ZIP_TYPES and not await asyncio.to_thread(_is_zip, archive):
                archive.rename(sink.folder / "upload")
                return (sink.folder / "upload").stat().st_size
        if archive is not None:
            sink = Sink(sink.folder, limits)
            await asyncio.to_thread(unzip, archive, sink)
            archive.unlink()
        if not sink.files:
            raise InputError(
                "the upload holds no file",
                hint="send a zip, or a form with file parts",
                reason="malformed_upload",
            )
        return sink.bytes

    async def _wait(self, request: Request, job: Job) -> Response:
        ended = asyncio.shield(asyncio.wrap_future(job.ended))
        try:
            with cancel_on_disconnect(request.receive, self.config.request_timeout_seconds):
                await ended
        except HttpError:
            return self._document(job, 202)
        if job.error is not None:
            return error_response(job.error)
        return self._document(job, 200)

    async def status(self, request: Request) -> Response:
        """The job as JSON; 404 for an unknown id."""
        return self._document(self._job(request), 200)

    async def file(self, request: Request) -> Response:
        """One output file of a job; only files that the vertical said it wrote."""
        job, name = self._job(request), request.path_params["name"]
        path = job.files.get(name)
        if path is None or not path.is_file():
            raise HttpError(
                "the job has no such file",
                reason="not_found",
                hint=f"it has: {', '.join(sorted(job.files)) or 'none yet'}",
            )
        media = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        media = "application/dicom" if path.suffix == ".dcm" else media
        shown = media.startswith(("text/", "image/")) or media == "application/json"
        return FileResponse(
            path,
            media_type=media,
            filename=path.name,
            headers=FILE_HEADERS,
            content_disposition_type="inline" if shown else "attachment",
        )

    async def delete(self, request: Request) -> Response:
        """Forget a job and remove its files."""
        await asyncio.to_thread(self.jobs.delete, self._job(request))
        return Response(status_code=204)

    def _job(self, request: Request) -> Job:
        job = self.jobs.get(self.vertical.name, request.path_params["job"])
        if job is None:
            raise HttpError(
                "there is no such job",
                reason="not_found",
                hint=f"jobs are kept for {self.jobs.limits.keep_seconds:g} s after they finish",
            )
        return job

    def _document(self, job: Job, status: int) -> Response:
        document = job.as_dict(self.jobs.clock())
        return Response(
            orjson.dumps(document),
            status_code=status,
            headers={"location": document["url"]} if status == 202 else None,
            media_type="application/json",
        )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == ZIP_MAGIC


def _lone_archive(sink: Sink, job: Job) -> Path | None:
    """A form with one zip in it means the zip's content."""
    files = [path for path in sink.folder.rglob("*") if path.is_file()]
    if len(files) != 1 or not _is_zip(files[0]):
        return None
    archive = job.folder / "body"
    files[0].rename(archive)
    shutil.rmtree(sink.folder)
    sink.folder.mkdir()
    return archive
