"""The upload routes: ``POST /v1/<vertical>/<action>`` with files, and the jobs they become."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import mimetypes
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from plinth.pipelines.config.settings import ServeConfig, UploadConfig
from plinth.pipelines.folders.archives import (
    ALLOWED,
    FORM_TYPE,
    ZIP_TYPES,
    Form,
    Sink,
    bad_upload,
    unzip,
)
from plinth.pipelines.folders.jobs import Job, Jobs
from plinth.pipelines.folders.storage import storing
from plinth.pipelines.http.body import chunks, headers_of, media_type
from plinth.pipelines.http.disconnect import cancel_on_disconnect
from plinth.pipelines.http.errors import HttpError, status_of
from plinth.verticals import Vertical

T = TypeVar("T")
PIECE = 256 << 10
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
            await self._receive(request, kind, job)
            await asyncio.to_thread(self.jobs.submit, job, request.state.span)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self.jobs.delete, job))
            raise
        if request.query_params.get("wait", "").lower() in ("true", "1", "yes"):
            return await self._wait(request, job)
        return await self._document(job, 202)

    async def _receive(self, request: Request, kind: str, job: Job) -> None:
        """Bring the body to the job's folder, unpacked."""
        limits, headers = self.config.upload, headers_of(request.scope)
        patience = self.config.request_timeout_seconds
        spend = functools.partial(self.jobs.spend, job)
        sink = Sink(job.received, limits, job.names, spend)
        body = chunks(request.receive, headers, limits.max_bytes, patience)
        pieces = gathered(paced(body, limits, patience))
        if kind == FORM_TYPE:
            with contextlib.closing(Form(request.headers["content-type"], sink)) as form:
                async for piece in pieces:
                    await self._aside(form.feed, piece)
                await self._aside(form.end)
            archive = await self._aside(_lone_archive, sink, job)
        else:
            archive = job.folder / "body"
            await self._save(pieces, archive, spend)
            if kind not in ZIP_TYPES and not await self._aside(_is_zip, archive):
                archive.rename(job.received / "upload")
                return
        if archive is not None:
            sink = Sink(job.received, limits, job.names, spend)
            await self._aside(unzip, archive, sink)
            await self._aside(_drop, archive, spend)
        if not sink.files:
            raise bad_upload("the upload holds no file", "send a zip, or a form with file parts")

    async def _save(
        self, pieces: AsyncIterator[bytes], path: Path, spend: Callable[[int], None]
    ) -> None:
        def write(out: BinaryIO, piece: bytes) -> None:
            spend(len(piece))
            with storing():
                out.write(piece)

        with path.open("xb", buffering=0) as out:
            async for piece in pieces:
                await self._aside(write, out, piece)

    async def _aside(self, step: Callable[..., T], *given: Any) -> T:
        """Run a step that writes or unpacks on a thread of its own kind.

        A client that leaves ends its upload only between steps: a thread cannot be stopped.
        """
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self.jobs.receivers, step, *given)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    async def _wait(self, request: Request, job: Job) -> Response:
        ended = asyncio.shield(asyncio.wrap_future(job.ended))
        try:
            with cancel_on_disconnect(request.receive, self.config.request_timeout_seconds):
                await ended
        except HttpError:
            return await self._document(job, 202)
        if job.failure is not None:
            content = orjson.dumps({"error": job.error})
            return Response(content, status_of(job.failure), media_type="application/json")
        return await self._document(job, 200)

    async def status(self, request: Request) -> Response:
        """The job as JSON; 404 for an unknown id."""
        return await self._document(self._job(request), 200)

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

    async def retry(self, request: Request) -> Response:
        """Try again what failed of a job: 202 with the job."""
        job = self._job(request)
        await asyncio.to_thread(self.jobs.retry, job, request.state.span)
        return await self._document(job, 202)

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

    async def _document(self, job: Job, status: int) -> Response:
        def written() -> bytes:
            return orjson.dumps(job.as_dict(self.jobs.clock()))

        location = {"location": f"/v1/{job.vertical}/jobs/{job.id}"}
        return Response(
            await asyncio.to_thread(written),
            status_code=status,
            headers=location if status == 202 else None,
            media_type="application/json",
        )


async def paced(
    body: AsyncIterator[bytes],
    limits: UploadConfig,
    patience: float,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[bytes]:
    """A body whose client keeps a pace, so that it does not hold its place for ever.

    Only the time the client takes counts, not what is done with a chunk. With
    ``r = min_bytes_per_second``, each ``r * patience`` bytes may take ``patience`` seconds, and
    the whole ``receive_seconds``.

    Args:
        body: the chunks.
        limits: of uploads.
        patience: seconds.
        clock: seconds, monotonic.

    Raises:
        HttpError: ``body_too_slow``.
    """
    whole = limits.receive_seconds
    left, missing = patience, limits.min_bytes_per_second * patience
    while True:
        began = clock()
        try:
            async with asyncio.timeout(min(left, whole)):
                chunk = await anext(body, None)
        except TimeoutError:
            raise _out_of_pace(limits) from None
        if chunk is None:
            return
        taken = clock() - began
        left, whole, missing = left - taken, whole - taken, missing - len(chunk)
        if min(left, whole) < 0:
            raise _out_of_pace(limits)
        if missing <= 0:
            left, missing = patience, limits.min_bytes_per_second * patience
        yield chunk


def _out_of_pace(limits: UploadConfig) -> HttpError:
    return HttpError(
        "the upload comes too slowly",
        reason="body_too_slow",
        hint=f"send at least {limits.min_bytes_per_second:,} bytes per second, "
        f"within {limits.receive_seconds:g} s",
        headers={"connection": "close"},
    )


async def gathered(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A body in pieces of at least 256 KiB, the last one excepted."""
    piece = bytearray()
    async for chunk in body:
        piece += chunk
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == ZIP_MAGIC


def _lone_archive(sink: Sink, job: Job) -> Path | None:
    """A form with one zip in it means the zip's content."""
    if sink.files != 1:
        return None
    [file] = [path for path in sink.folder.rglob("*") if path.is_file()]
    if not _is_zip(file):
        return None
    with storing():
        archive = file.rename(job.folder / "body")
        shutil.rmtree(sink.folder)
        sink.folder.mkdir()
        job.names.unlink(missing_ok=True)
    return archive


def _drop(archive: Path, spend: Callable[[int], None]) -> None:
    size = archive.stat().st_size
    archive.unlink()
    spend(-size)
