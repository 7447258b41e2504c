"""Files that people bring: TOML, JSON, and records, one a line, plain or packed by gzip."""

from __future__ import annotations

import gzip
import json
import os
import stat
import tomllib
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from plinth.engine import ConfigError, InputError

MAX_LINE = 1_000_000
"""Bytes of one record."""
MAX_FILE = 16 << 20
"""Bytes of a file of settings or figures."""


def toml(text: str) -> dict[str, Any]:
    """The content of a TOML file, whatever is in it.

    Raises:
        TOMLDecodeError: it is none, or has numbers or lists in lists beyond all measure.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise tomllib.TOMLDecodeError("too many lists and tables in each other") from None
    except ValueError as error:
        raise tomllib.TOMLDecodeError(str(error)) from None


def json_of(raw: bytes) -> Any:
    """The value of a JSON text, whatever is in it.

    Raises:
        ValueError: it is none, is no UTF-8, or has lists in lists beyond all measure.
    """
    try:
        return json.loads(raw.decode())
    except RecursionError:
        raise ValueError("too many lists and objects in each other") from None


def whole(path: Path, limit: int = MAX_FILE) -> bytes:
    """A file of settings; what is no file, such as a pipe without a writer, is not waited for.

    Args:
        path: of the file.
        limit: bytes it may have.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is no file, or is larger.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ConfigError(f"{path} is not a file")
    with os.fdopen(number, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ConfigError(f"{path} is larger than {limit:,} bytes")
    return raw


def opened(path: Path) -> BinaryIO:
    """A file of records.

    Raises:
        ConfigError: it cannot be read, or is a device, such as one that gives zeros without end.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        file.close()
        raise ConfigError(f"{path} is a device, not a file")
    return file


def numbered(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Records of a file, which may be packed by gzip, each with its place: ``history.jsonl:12``.

    Of a line that is too long, its beginning.
    """
    text = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    number = 0
    try:
        while line := text.readline(MAX_LINE + 2):
            number += 1
            end = line
            while end[-1:] != b"\n" and (end := text.readline(MAX_LINE)):
                pass
            if line.strip():
                yield f"{path}:{number}", line.rstrip(b"\r\n").removeprefix(BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path} is damaged: {error}",
            hint="or not yet copied in full: copy to another name, then rename",
        ) from None


class Refusals:
    """What of a history was not taken, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def note(self, where: str, error: InputError) -> None:
        """Count a record that was refused.

        Args:
            where: its place.
            error: why; it repeats nothing of the record.
        """
        self.counts[error.reason] += 1
        self._first.setdefault(error.reason, f"{where}: {error.message}")

    def told(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        return [
            f"{count:,} records were refused as {reason}, the first at {self._first[reason]}"
            for reason, count in self.counts.most_common(10)
        ]
