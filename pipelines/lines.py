"""Files of records, one a line, plain or packed by gzip."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from plinth.engine import ConfigError

MAX_LINE = 1_000_000
"""Bytes of one record."""


def opened(path: Path) -> BinaryIO:
    """A file of records.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def lines_of(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Records of a file, which may be packed by gzip; of a line that is too long, its beginning."""
    text = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
    try:
        while line := text.readline(MAX_LINE + 2):
            end = line
            while end[-1:] != b"\n" and (end := text.readline(MAX_LINE)):
                pass
            if line.strip():
                yield line.rstrip(b"\r\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path} is damaged: {error}",
            hint="or not yet copied in full: copy to another name, then rename",
        ) from None
