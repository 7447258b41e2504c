"""Where an image lies: a file, or a member of a zip archive that is never unpacked."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from pydicom import Dataset, dcmread
from pydicom.errors import BytesLengthException, InvalidDicomError

from plinth.engine.errors import InputError

# What these libraries warn and log quotes values of headers: names, dates, numbers of patients.
warnings.filterwarnings("ignore", module=r"(pydicom|highdicom)(\.|$)")
for _library in ("pydicom", "highdicom"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)

MALFORMED = (
    InvalidDicomError,
    BytesLengthException,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    NotImplementedError,
    RecursionError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading damaged or hostile bytes as DICOM is known to raise."""


class Unreadable(ValueError):
    """Bytes that cannot be an image; the message is ours and holds no value of the file."""


DEFLATED = "1.2.840.10008.1.2.1.99"

HEADER_BYTES = 64 << 20
"""Most bytes that are read of a file before its pixels."""

HEADER_ITEMS = 300_000
"""Most items of sequences in them: an item of 8 bytes takes a hundred times that in memory."""

ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
"""Tag of an item (PS3.5 7.5), little and big endian."""

DENSE = 256 << 20
"""Unpacked bytes below which packing of any ratio is taken for honest."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what is walked and unpacked.

    Args:
        files: files of a folder, or members of an archive.
        total_bytes: sum of the unpacked sizes of an archive's members.
        member_bytes: one unpacked member or deflated data set.
        ratio: unpacked over packed size, of what unpacks to more than 256 MiB.
    """

    files: int = 200_000
    total_bytes: int = 32 << 30
    member_bytes: int = 4 << 30
    ratio: float = 100.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Source:
    """One readable file.

    Args:
        path: the file, or the archive it is a member of.
        member: its name inside the archive.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """How messages name it: the path, or ``archive.zip:member``."""
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    @property
    def folder(self) -> str:
        """The folder it lies in; the archive's name for a member."""
        return str(self.path if self.member is not None else self.path.parent)

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], int]]:
        """A seekable stream of its bytes, and its size in bytes.

        Raises:
            InputError: when it cannot be opened or is not a regular file.
        """
        try:
            if self.member is not None:
                archive = _opened(self.path, self.path.stat().st_mtime_ns)
                info = archive.getinfo(self.member)
                with archive.open(info) as stream:
                    yield stream, info.file_size
                return
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise InputError(f"{self.name} is not a regular file", field=self.name)
                yield file, facts.st_size
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, KeyError) as error:
            raise InputError(
                f"{self.name} cannot be read: {error}",
                field=self.name,
                hint="check that the file is whole and readable",
                reason="unreadable",
            ) from None

    def dataset(self, *, pixels: bool = True, only: Sequence[str] = ()) -> Dataset:
        """The data set, with or without pixel data.

        Args:
            pixels: read the pixel data too.
            only: keywords of the attributes that are read; all of them by default.

        Raises:
            InputError: when it is not DICOM, is damaged, or its header is too long.
        """
        with self.open() as (stream, _):
            try:
                if is_deflated(stream):
                    inflate(stream)  # within the limits, which pydicom has not
                    stream.seek(0)
                if pixels:
                    return dcmread(stream, force=True)
                return dcmread(
                    Capped(stream),
                    stop_before_pixels=True,
                    force=True,
                    specific_tags=list(only) or None,
                )
            except MALFORMED as error:
                raise damaged(self, error) from None


def damaged(source: Source, error: Exception) -> InputError:
    """The error for bytes that start as DICOM and do not go on as such."""
    why = str(error) if isinstance(error, Unreadable) else type(error).__name__
    if isinstance(error, zlib.error):
        why = "its deflated data set is damaged, or not deflated as PS3.5 A.5 wants it"
    return InputError(
        f"{source.name} cannot be read as DICOM: {why}",
        field=source.name,
        hint="send the file again from where it came from",
        reason="damaged",
    )


@lru_cache(maxsize=32)
def _opened(path: Path, changed: int) -> zipfile.ZipFile:
    """An archive that is open while others are read; a cohort may hold more than can be open.

    Args:
        path: of the archive.
        changed: its time of change, so that a new archive of the same name is opened anew.
    """
    return zipfile.ZipFile(path)


def open_archive(path: Path, limits: Limits = DEFAULT_LIMITS) -> list[Source]:
    """The members of a zip archive, after its directory was checked against ``limits``.

    Nothing is written to disk, so names such as ``../x`` could do no harm; an archive with
    one is refused all the same, as no honest sender makes it.

    Raises:
        InputError: not a zip, encrypted, too many members, too large, too dense, bad names.
    """
    try:
        archive = _opened(path, path.stat().st_mtime_ns)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a zip archive: {error}",
            field=str(path),
            hint="zip the study's folder again",
            reason="bad_archive",
        ) from None
    members = [info for info in archive.infolist() if not info.is_dir()]
    problem = _archive_problem(members, limits)
    if problem is not None:
        raise InputError(
            f"{path} is refused: {problem}",
            field=str(path),
            hint="unpack it yourself and give the folder",
            reason="archive_refused",
        )
    return [Source(path, info.filename) for info in members]


def _archive_problem(members: list[zipfile.ZipInfo], limits: Limits) -> str | None:
    if len(members) > limits.files:
        return f"{len(members)} members, at most {limits.files} are read"
    unpacked = sum(info.file_size for info in members)
    packed = max(1, sum(info.compress_size for info in members))
    if unpacked > limits.total_bytes:
        return f"{unpacked} bytes unpacked, at most {limits.total_bytes} are read"
    if unpacked > DENSE and unpacked / packed > limits.ratio:
        return f"it unpacks to {unpacked / packed:.0f} times its size"
    for info in members:
        parts = PurePosixPath(info.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in info.filename.split("/")[0]:
            return "a member's name points outside the archive"
        if info.flag_bits & 0x1:
            return "it is encrypted"
        if info.file_size > limits.member_bytes:
            return f"a member of {info.file_size} bytes, at most {limits.member_bytes} are read"
    return None


class Capped:
    """A stream that gives out at most HEADER_BYTES and HEADER_ITEMS; seeking is free."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left, self._items = HEADER_BYTES, HEADER_ITEMS
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        """As the stream's; raises Unreadable when the header is longer than that."""
        data = self._stream.read(size if 0 <= size <= self._left else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise Unreadable(f"a header of more than {HEADER_BYTES} bytes")
        self._items -= sum(map(data.count, ITEMS))
        if self._items < 0:
            raise Unreadable(f"a header of more than {HEADER_ITEMS} items")
        return data


def is_deflated(stream: IO[bytes]) -> bool:
    """The file is in Deflated Explicit VR; the stream is left at its start."""
    start = stream.read(1024)
    stream.seek(0)
    return DEFLATED.encode() in start


def inflate(stream: IO[bytes], limits: Limits = DEFAULT_LIMITS) -> tuple[io.BytesIO, bytes]:
    """The data set of a file in Deflated Explicit VR (PS3.5 A.5), and its meta group.

    Raises:
        Unreadable: when there is no meta group length or the data set is beyond ``limits``.
    """
    start = stream.read(144)
    if len(start) < 144 or start[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise Unreadable("a deflated file without File Meta Information Group Length")
    meta = stream.read(min(int.from_bytes(start[140:144], "little"), 1 << 20))
    packed = stream.read()
    limit = min(limits.member_bytes, max(DENSE, int(limits.ratio * len(packed))))
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    unpacked = engine.decompress(packed, limit)
    if engine.unconsumed_tail:
        raise Unreadable(f"a deflated data set of more than {limit} bytes")
    return io.BytesIO(unpacked), meta
