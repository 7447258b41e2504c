"""Writing to disk: whole or not at all, and what it means when it cannot be done."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from plinth.engine import ConfigError, PlinthError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(PlinthError):
    """Something could not be written, through no fault of what was to be written."""

    reason = "storage"
    retry_after = 30.0


class StorageFull(StorageError):
    """There is no room left."""

    reason = "storage_full"


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """A block that writes: an OSError in it becomes a :class:`StorageError` without a path."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull("the disk is full", hint="make room, then try again") from error
        raise StorageError(
            f"the disk cannot be written to: {error.strerror or type(error).__name__}",
            hint="check that it is there, writable and healthy, then try again",
        ) from error


def write_whole(folder: Path, write: Callable[[Path], list[Path]]) -> tuple[str, ...]:
    """Let ``write`` fill a fresh folder, then move it into place in one step.

    A folder already there is replaced. A crash leaves the old folder, the new one or, between
    the two, none; never a part of one. What lies beside it as ``.partial-*`` is for
    :func:`sweep` to remove.

    Returns:
        The written files, relative to ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        files = write(partial)
        names = tuple(sorted(path.relative_to(partial).as_posix() for path in files))
        for path in files:
            with path.open("rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            old = partial.with_name(f"{partial.name}-old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return names


def sweep(parent: Path) -> None:
    """Remove what a killed run left half-written in ``parent``."""
    for left in parent.glob(".partial-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def check_folders(folder: Path, out: Path) -> None:
    """Refuse an absent input folder and an output folder that lies inside it."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", hint="name an existing folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"the output {out} lies inside the input {folder}",
            hint="choose an --out beside the input, so that results are never read as input",
        )
