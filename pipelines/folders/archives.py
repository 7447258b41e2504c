"""Uploads: zip archives and multipart forms into a folder, within bounds.

Nothing a client writes becomes a path by itself: a file is stored under a name made from the
client's, and every count is of real bytes, not of what a header claims. Different files stay
different files: the name a part of a path is stored under holds a digest of it wherever anything
of it had to be changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from plinth.engine import InputError, PlinthError
from plinth.pipelines.config.settings import UploadConfig
from plinth.pipelines.folders.storage import storing

CHUNK = 256 << 10
"""Bytes of an archived file that are unpacked at once."""
PART = 32 << 10
"""Bytes of a zip's central directory that are read at once."""
PIECE = 64 << 10
"""Bytes of a form's file that are written at once."""
SMALL = 8 << 20
"""Bytes below which a file may be as compressible as it likes: an empty slice is."""
ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
FORM_TYPE = "multipart/form-data"
FILE_TYPES = ("application/dicom", "application/octet-stream")
ALLOWED = (*ZIP_TYPES, FORM_TYPE, *FILE_TYPES)

MAX_NAME = 1024
"""Characters of a client's name for a file, its folders included."""
MAX_DEPTH = 32
"""Folders in folders."""
MAX_FIELDS = 1000
"""Parts of a form besides its files."""
MAX_PART_HEAD = 8192
"""Bytes of the headers of one part of a form."""
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""How an archive may be packed. LZMA lets a client choose how much memory unpacking takes."""

_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_SUFFIX = re.compile(r"[A-Za-z0-9]{1,10}")
_END = struct.Struct("<4s4H2LH")
_END_SPAN = _END.size + 65_535
_ENTRY = struct.Struct("<4s24x3H12x")


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


def stored_path(name: str, number: int) -> PurePosixPath:
    """The relative path under which a client's file is stored.

    Parts made of ``A-Z a-z 0-9 . _ -`` alone, up to 100 of them and no dot in front, stay as they
    are. Any other gets what is left of it and a digest of it, so that ``IM 1`` and ``IM_1``, or
    one name in two Unicode forms, are stored apart.

    Args:
        name: the client's name; may hold ``/`` or ``\\``.
        number: used where nothing of the name is left.

    Raises:
        InputError: the name is absolute, climbs out with ``..``, or is too long or deep.
    """
    if len(name) > MAX_NAME:
        raise bad_upload(
            f"file {number} of the upload has a name of more than {MAX_NAME:,} characters",
            "shorten the names of its folders",
        )
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise bad_upload(
            f"file {number} of the upload has a path that leaves its folder",
            "use relative names without '..'",
        )
    if len(parts) > MAX_DEPTH:
        raise bad_upload(
            f"file {number} of the upload lies more than {MAX_DEPTH} folders deep",
            "send the inner folders",
        )
    return PurePosixPath(*map(_stored_part, parts or (f"file{number}",)))


def _stored_part(part: str) -> str:
    if _SAFE.fullmatch(part):
        return part
    digest = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()
    stem, _, ending = part.rpartition(".")
    suffix = f".{ending}" if stem and _SUFFIX.fullmatch(ending) else ""
    clean = _UNSAFE.sub("_", part.removesuffix(suffix)).lstrip(".")
    return f"{clean[:60] or '_'}-{digest}{suffix}"


class Sink:
    """Writes files below a folder and keeps count of files, folders and bytes.

    Args:
        folder: an existing folder that belongs to this upload alone.
        limits: the bounds.
        names: a file that gets one JSON object a line, ``{"stored": ..., "name": ...}``, for each
            file that is not stored under the client's own name.
        spend: told how many more bytes are about to be on disk; may raise.
    """

    def __init__(
        self,
        folder: Path,
        limits: UploadConfig,
        names: Path | None = None,
        spend: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.folder = folder
        self.limits = limits
        self.files = 0
        self.bytes = 0
        self._folders = 0
        self._names = names
        self._spend = spend

    def open(self, name: str) -> BinaryIO:
        """A new file for the client's ``name``; never an existing one.

        Raises:
            InputError: too many files or folders, or a name that is refused.
            StorageError: it cannot be made.
        """
        self.files += 1
        if self.files > self.limits.max_files:
            raise too_much("files", self.limits.max_files, "max_files")
        path = stored_path(name, self.files)
        with storing():
            file = self._create(path)
            stored = Path(file.name).relative_to(self.folder).as_posix()
            if stored != name and self._names is not None:
                line = orjson.dumps({"stored": stored, "name": name}) + b"\n"
                self.count(len(line))
                with self._names.open("ab") as listed:
                    listed.write(line)
        return file

    def _create(self, path: PurePosixPath) -> BinaryIO:
        """Open the path, or one beside it if another file of the upload took it."""
        again = f"-{self.files}"
        for suffix in ("", again, f"{again}-{secrets.token_hex(8)}"):
            target = self.folder / path.with_name(f"{path.stem}{suffix}{path.suffix}")
            try:
                self._make(target.parent)
                return target.open("xb")
            except (FileExistsError, NotADirectoryError):
                if target.parent.is_dir():
                    continue
                # A file lies where this one has a folder: the folder gets another name.
                path = PurePosixPath(f"{path.parts[0]}{again}", *path.parts[1:])
        raise bad_upload(
            f"file {self.files} of the upload has a name that is already taken",
            "give every file a name of its own",
        )

    def _make(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._folders += len(folder.relative_to(self.folder).parts)
        if self._folders > self.limits.max_files:
            raise too_much("folders", self.limits.max_files, "max_files")
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, file: BinaryIO, data: bytes | bytearray) -> None:
        """Append to a file from :meth:`open`.

        Raises:
            InputError: the upload is over its bound.
            StorageError: there is no room.
        """
        self.count(len(data))
        with storing():
            file.write(data)

    def count(self, size: int) -> None:
        """Account for ``size`` more bytes on disk; raises over the bound."""
        self.bytes += size
        if self.bytes > self.limits.max_unpacked_bytes:
            raise too_much("bytes", self.limits.max_unpacked_bytes, "max_unpacked_bytes")
        self._spend(size)


def unzip(archive: Path, sink: Sink) -> None:
    """Unpack a zip archive into the sink's folder; memory does not grow with its files.

    Raises:
        InputError: not a zip, damaged, encrypted, ZIP64, another packing than deflate, links or
            devices, refused names, over a bound.
        StorageError: there is no room.
    """
    try:
        with archive.open("rb") as stream:
            directory = _directory(stream, sink.limits)
            for part in _parts(stream, directory):
                with zipfile.ZipFile(cast("IO[bytes]", _Excerpt(stream, directory, part))) as some:
                    for entry in some.infolist():
                        if not entry.is_dir():
                            _extract(some, entry, sink)
    except PlinthError:
        raise
    except Exception as error:  # a damaged archive takes the library into many kinds
        raise bad_upload("the archive is damaged", "make the zip again and send it") from error


@dataclass(frozen=True, slots=True)
class _Directory:
    """An archive's central directory.

    Args:
        begin: where it starts in the file, bytes.
        length: its bytes.
        offset: where the archive says that it starts; less than ``begin`` behind a prefix.
    """

    begin: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Whole entries of a central directory: how many, and their bytes."""

    entries: int
    data: bytes


class _Excerpt:
    """An archive as if a part of its central directory were all of it.

    ``zipfile`` makes half a kilobyte of objects of every entry that it finds; shown a part at a
    time, it holds those of a part.
    """

    def __init__(self, stream: BinaryIO, directory: _Directory, part: _Part) -> None:
        self._stream = stream
        self._begin = directory.begin
        end = (b"PK\x05\x06", 0, 0, part.entries, part.entries, len(part.data), directory.offset, 0)
        self._tail = part.data + _END.pack(*end)
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = self._begin + len(self._tail)
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence, size))
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Bytes from here on; of files or of the directory, never of both."""
        before = self._begin - self._at
        if before > 0:
            self._stream.seek(self._at)
            data = self._stream.read(min(size, before) if size >= 0 else before)
        else:
            data = self._tail[-before : len(self._tail) if size < 0 else size - before]
        self._at += len(data)
        return data


def _directory(stream: BinaryIO, limits: UploadConfig) -> _Directory:
    """Find the central directory and bound it by what is there, before it is read into memory."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _END_SPAN))
    tail = stream.read(_END_SPAN)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise bad_upload("the body is not a zip archive", "send a .zip, or multipart/form-data")
    _, _, _, _, entries, length, offset, _ = _END.unpack_from(tail, at)
    if length == 0xFFFFFFFF or b"PK\x06\x07" in tail[max(0, at - 20) : at]:
        raise bad_upload("ZIP64 archives are not taken", "send fewer than 65,535 files")
    directory = _Directory(size - len(tail) + at - length, length, offset)
    if directory.begin < 0:
        raise bad_upload("the archive is damaged", "make the zip again and send it")
    most = limits.max_files
    counted = sum(1 for _ in itertools.islice(_entries(stream, directory), most + 1))
    if max(entries, counted) > most or length > most * 1024:
        raise too_much("files", most, "max_files")
    return directory


def _entries(stream: BinaryIO, directory: _Directory) -> Iterator[tuple[int, int]]:
    """Where each entry of a central directory begins and ends."""
    at, end = directory.begin, directory.begin + directory.length
    while at < end:
        stream.seek(at)
        head = stream.read(_ENTRY.size)
        if len(head) < _ENTRY.size or head[:4] != b"PK\x01\x02":
            raise bad_upload("the archive is damaged", "make the zip again and send it")
        after = at + _ENTRY.size + sum(_ENTRY.unpack(head)[1:])
        yield at, after
        at = after


def _parts(stream: BinaryIO, directory: _Directory) -> Iterator[_Part]:
    """The entries of a central directory, ``PART`` bytes of them or one at a time."""
    begin, count = directory.begin, 0
    end = directory.begin
    for at, after in _entries(stream, directory):
        if count and after - begin > PART:
            yield _part(stream, begin, at, count)
            begin, count = at, 0
        count, end = count + 1, after
    if count:
        yield _part(stream, begin, end, count)


def _part(stream: BinaryIO, begin: int, end: int, entries: int) -> _Part:
    stream.seek(begin)
    return _Part(entries, stream.read(end - begin))


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, sink: Sink) -> None:
    number = sink.files + 1
    if entry.flag_bits & 1:
        raise bad_upload(f"file {number} of the archive is encrypted", "send it unencrypted")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        raise bad_upload(f"file {number} of the archive is a link or a device", "send files only")
    if entry.compress_type not in METHODS:
        raise bad_upload(
            f"file {number} of the archive is packed by method {entry.compress_type}, "
            "which is not taken",
            "zip it again with deflate",
        )
    allowance = max(sink.limits.max_ratio * entry.compress_size, SMALL)
    written = 0
    with opened.open(entry) as packed, _closing(sink.open(entry.filename)) as out:
        while chunk := packed.read(CHUNK):
            written += len(chunk)
            if written > allowance:
                raise too_much("bytes per packed byte", sink.limits.max_ratio, "max_ratio")
            sink.write(out, chunk)


@contextlib.contextmanager
def _closing(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file that is closed at the end of the block, with what was not yet written."""
    try:
        yield file
    finally:
        with storing():
            file.close()


class Form:
    """Streams the files of a multipart form straight to disk; other fields are ignored.

    Args:
        content_type: the request's Content-Type header, which holds the boundary.
        sink: where files go.

    Raises:
        InputError: no usable boundary.
    """

    def __init__(self, content_type: str, sink: Sink) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary:
            raise bad_upload("the multipart form names no boundary", "let your client set it")
        self.sink = sink
        self._file: BinaryIO | None = None
        self._unwritten = bytearray()
        self._fields = 0
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._header_bytes = 0
        self._ended = False
        with _broken_form():
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

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the form.

        Raises:
            InputError: a broken form, or a bound.
            StorageError: there is no room.
        """
        with _broken_form():
            self._parser.write(data)

    def end(self) -> None:
        """The form has no more bytes.

        Raises:
            InputError: it stops before its end.
        """
        with _broken_form():
            self._parser.finalize()
        if not self._ended:
            raise bad_upload("the multipart form stops before its end", "send it again")

    def close(self) -> None:
        """Close the file of a part that did not come to its end."""
        self._part_end()

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
        if self._header_bytes > MAX_PART_HEAD:
            raise bad_upload("a part of the form has huge headers", "let your client build it")

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" in options:
            self._file = self.sink.open(options[b"filename"].decode("utf-8", "replace"))
            return
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise InputError(
                f"the form holds more than {MAX_FIELDS:,} fields that are no files",
                hint="send file parts, or a zip",
                reason="body_too_large",
            )

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._unwritten += data[start:end]
            if len(self._unwritten) >= PIECE:
                self._write(self._file)

    def _write(self, file: BinaryIO) -> None:
        data, self._unwritten = self._unwritten, bytearray()
        self.sink.write(file, data)

    def _part_end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with _closing(file):
                self._write(file)

    def _end(self) -> None:
        self._ended = True


@contextlib.contextmanager
def _broken_form() -> Iterator[None]:
    """A block that reads a form: what the parser raises becomes an InputError."""
    try:
        yield
    except FormParserError as error:
        raise bad_upload("the multipart form is broken", "let your client build it") from error
