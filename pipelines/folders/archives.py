"""Uploads: zip archives and multipart forms into a folder, within bounds.

Nothing a client writes becomes a path by itself: names are cleaned and must stay below the
folder, and every count is of real bytes, not of what a header claims.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from plinth.engine import InputError
from plinth.pipelines.config.settings import UploadConfig

CHUNK = 1 << 20
SMALL = 8 << 20
"""Bytes below which a file may be as compressible as it likes: an empty slice is."""
ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
FORM_TYPE = "multipart/form-data"
FILE_TYPES = ("application/dicom", "application/octet-stream")
ALLOWED = (*ZIP_TYPES, FORM_TYPE, *FILE_TYPES)

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_EOCD = struct.Struct("<4s4H2LH")
_EOCD_SPAN = _EOCD.size + 65_535


def bad_upload(message: str, hint: str, *, field: str | None = None) -> InputError:
    """An upload that cannot be read (400)."""
    return InputError(message, field=field, hint=hint, reason="malformed_upload")


def too_much(what: str, limit: float, setting: str) -> InputError:
    """An upload over a bound (413)."""
    return InputError(
        f"the upload holds more than {limit:,} {what}",
        hint=f"send fewer studies at once, or raise serve.upload.{setting}",
        reason="body_too_large",
    )


def safe_name(name: str, number: int) -> PurePosixPath:
    """A relative path made of harmless parts from whatever a client called its file.

    Args:
        name: the client's name; may hold ``/`` or ``\\``.
        number: used where nothing of the name is left.

    Raises:
        InputError: the name is absolute or climbs out with ``..``.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise bad_upload(
            f"file {number} of the upload has a path that leaves its folder",
            "use relative names without '..'",
        )
    clean = [_UNSAFE.sub("_", part).lstrip(".")[-100:] for part in parts[-8:]]
    kept = [part for part in clean if part]
    return PurePosixPath(*kept) if kept else PurePosixPath(f"file{number}")


class Sink:
    """Writes files below a folder and keeps count of files and bytes.

    Args:
        folder: an existing folder that belongs to this upload alone.
        limits: the bounds.
    """

    def __init__(self, folder: Path, limits: UploadConfig) -> None:
        self.folder = folder
        self.limits = limits
        self.files = 0
        self.bytes = 0

    def open(self, name: str) -> IO[bytes]:
        """A new file for the client's ``name``; never an existing one.

        Raises:
            InputError: too many files, or an unsafe or repeated name.
        """
        self.files += 1
        if self.files > self.limits.max_files:
            raise too_much("files", self.limits.max_files, "max_files")
        path = self.folder / safe_name(name, self.files)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except OSError:
            raise bad_upload(
                f"file {self.files} of the upload has a name that is already taken",
                "give every file a name of its own",
            ) from None

    def count(self, size: int) -> None:
        """Account for ``size`` more bytes on disk; raises InputError over the bound."""
        self.bytes += size
        if self.bytes > self.limits.max_unpacked_bytes:
            raise too_much("bytes", self.limits.max_unpacked_bytes, "max_unpacked_bytes")


def unzip(archive: Path, sink: Sink) -> None:
    """Unpack a zip archive into the sink's folder.

    Raises:
        InputError: not a zip, damaged, encrypted, ZIP64, links, unsafe names, over a bound.
    """
    _check_directory(archive, sink.limits)
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.is_dir():
                    _extract(opened, entry, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError):
        raise bad_upload(
            "the archive is damaged or packed in an unknown way", "zip it again with deflate"
        ) from None


def _check_directory(archive: Path, limits: UploadConfig) -> None:
    """Bound the central directory before it is read into memory."""
    size = archive.stat().st_size
    with archive.open("rb") as stream:
        stream.seek(max(0, size - _EOCD_SPAN))
        tail = stream.read(_EOCD_SPAN)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _EOCD.size > len(tail):
        raise bad_upload("the body is not a zip archive", "send a .zip, or multipart/form-data")
    _, _, _, _, entries, directory, _, _ = _EOCD.unpack_from(tail, at)
    if directory == 0xFFFFFFFF or b"PK\x06\x07" in tail[max(0, at - 20) : at]:
        raise bad_upload("ZIP64 archives are not taken", "send fewer than 65,535 files")
    if entries > limits.max_files or directory > limits.max_files * 1024:
        raise too_much("files", limits.max_files, "max_files")


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, sink: Sink) -> None:
    number = sink.files + 1
    if entry.flag_bits & 1:
        raise bad_upload(f"file {number} of the archive is encrypted", "send it unencrypted")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise bad_upload(f"file {number} of the archive is a link", "send files only")
    allowance = max(sink.limits.max_ratio * entry.compress_size, SMALL)
    written = 0
    with opened.open(entry) as packed, sink.open(entry.filename) as out:
        while chunk := packed.read(CHUNK):
            written += len(chunk)
            if written > allowance:
                raise too_much("bytes per packed byte", sink.limits.max_ratio, "max_ratio")
            sink.count(len(chunk))
            out.write(chunk)


async def save(chunks: AsyncIterator[bytes], path: Path) -> None:
    """Write a body to one file."""
    with path.open("xb") as out:
        async for chunk in chunks:
            out.write(chunk)


class Form:
    """Streams the files of a multipart form straight to disk; other fields are ignored.

    Args:
        content_type: the request's Content-Type header, which holds the boundary.
        sink: where files go.

    Raises:
        InputError: no boundary, or (from :meth:`feed`) a broken form or a bound.
    """

    def __init__(self, content_type: str, sink: Sink) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary:
            raise bad_upload("the multipart form names no boundary", "let your client set it")
        self.sink = sink
        self._file: IO[bytes] | None = None
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._header_bytes = 0
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_end": self._end,
            },
        )

    async def feed(self, chunks: AsyncIterator[bytes]) -> None:
        """Read the whole form."""
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError:
            raise bad_upload("the multipart form is broken", "let your client build it") from None
        finally:
            self._part_end()
        if not self._ended:
            raise bad_upload("the multipart form stops before its end", "send it again")

    def _part_begin(self) -> None:
        self._disposition = b""
        self._header_bytes = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._bound_header(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bound_header(end - start)

    def _bound_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > 8192:
            raise bad_upload("a part of the form has huge headers", "let your client build it")

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" in options:
            self._file = self.sink.open(options[b"filename"].decode("utf-8", "replace"))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self.sink.count(end - start)
            self._file.write(data[start:end])

    def _part_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self._ended = True
