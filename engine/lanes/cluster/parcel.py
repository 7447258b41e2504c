"""The files of a model, and their way to a machine that does not have them.

A machine keeps what it was sent by the digest of all of it, so that each model is sent once to
each machine, however many lanes it has there, also after a restart. What is kept is held against
its digests when it is put there, and again by the store when it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from plinth.engine.errors import ModelError

PIECE_BYTES = 8 << 20
"""Of a file, sent at once."""
MAX_FILES = 4096
MAX_BYTES = 1 << 40


class Listed(NamedTuple):
    """One file of a model.

    Args:
        name: its path below the folder that it is sent with, with ``/``.
        size: bytes.
        digest: SHA-256.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a model's recipe names on disk.

    Args:
        path: what the recipe names: a version's folder, or a file.
        inner: where that lies below the folder that it is kept in.
        files: all of it.
        digest: of names, sizes and digests of the files.
    """

    path: Path
    inner: str
    files: tuple[Listed, ...]
    digest: str

    @classmethod
    def of(cls, path: Path) -> Parcel:
        """Of a version's folder in a store, or of one file and what lies beside it under its name.

        Raises:
            ModelError: it is not there, or too much.
        """
        if path.is_dir():
            inner = f"{path.parent.name}/{path.name}"
            found = sorted(each for each in path.rglob("*") if each.is_file())
            names = [f"{inner}/{each.relative_to(path).as_posix()}" for each in found]
        else:
            inner = path.name
            found = sorted(
                each
                for each in path.parent.iterdir()
                if each.name.startswith(path.name) and each.is_file()
            )
            names = [each.name for each in found]
        if not found or len(found) > MAX_FILES:
            raise ModelError(f"{path}: {len(found)} files, expected 1 to {MAX_FILES}")
        files = tuple(
            Listed(name, each.stat().st_size, digest_of(each))
            for name, each in zip(names, found, strict=True)
        )
        return cls(path, inner, files, digest_of_all(files))

    def pieces(self, wanted: Sequence[str]) -> Iterator[tuple[str, int, bytes]]:
        """Name, offset and bytes of each piece of files, in order.

        Raises:
            ModelError: a file is another than it was.
        """
        root = self.path.parents[1] if self.path.is_dir() else self.path.parent
        for file in self.files:
            if file.name not in wanted:
                continue
            with (root / file.name).open("rb") as opened:
                for offset in range(0, max(file.size, 1), PIECE_BYTES):
                    yield file.name, offset, opened.read(PIECE_BYTES)


class Shelf:
    """What a machine keeps of models that it was sent.

    Args:
        root: the folder; ``None``: ``PLINTH_CLUSTER_CACHE``, else ``~/.cache/plinth/cluster``.
    """

    def __init__(self, root: Path | None = None) -> None:
        named = root or os.environ.get("PLINTH_CLUSTER_CACHE") or "~/.cache/plinth/cluster"
        self.root = Path(named).expanduser()

    def find(self, parcel: Parcel) -> Path | None:
        """Where the model lies: where the recipe says, or where it was put; ``None``: nowhere."""
        if is_same(parcel):
            return parcel.path
        kept = self.root / check_digest(parcel.digest)
        return kept / parcel.inner if kept.is_dir() else None

    def begin(self, parcel: Parcel) -> Path:
        """A folder to put the files into; nobody looks into it before :meth:`keep`.

        Raises:
            ModelError: the list is none of a model.
        """
        if parcel.digest != digest_of_all(parcel.files):
            raise ModelError("a list of files does not have the digest that it came with")
        if sum(file.size for file in parcel.files) > MAX_BYTES or len(parcel.files) > MAX_FILES:
            raise ModelError(f"a model of more than {MAX_FILES} files or {MAX_BYTES} bytes")
        for file in parcel.files:
            place = PurePosixPath(file.name)
            if place.is_absolute() or ".." in place.parts or "\\" in file.name:
                raise ModelError(f"a file of a model is called {file.name!r}")
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="coming-", dir=self.root))
        for file in parcel.files:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, parcel: Parcel, folder: Path, name: str, offset: int, piece: bytes) -> None:
        """Put a piece of a file where it belongs.

        Raises:
            ModelError: there is no such piece, or no room on the disk.
        """
        listed = next((file for file in parcel.files if file.name == name), None)
        if listed is None or not 0 <= offset <= listed.size - len(piece):
            raise ModelError(f"a piece of a file that was not listed: {name!r} from {offset}")
        try:
            with (folder / name).open("r+b" if offset else "wb") as opened:
                opened.seek(offset)
                opened.write(piece)
        except OSError as error:
            raise ModelError(
                f"a model cannot be kept in {self.root}: {error.strerror}",
                hint="make room there, or name another folder: PLINTH_CLUSTER_CACHE",
            ) from error

    def keep(self, parcel: Parcel, folder: Path) -> Path:
        """Let a model that is all there be found; where it lies.

        Raises:
            ModelError: a file is not what was listed.
        """
        for file in parcel.files:
            found = folder / file.name
            if not found.is_file() or digest_of(found) != file.digest:
                shutil.rmtree(folder, ignore_errors=True)
                raise ModelError(
                    f"{file.name} did not arrive whole: expected SHA-256 {file.digest}",
                    hint="was the model changed while it was sent?",
                )
        kept = self.root / check_digest(parcel.digest)
        try:
            folder.rename(kept)
        except OSError:  # another lane of this machine was faster
            shutil.rmtree(folder, ignore_errors=True)
        return kept / parcel.inner


def is_same(parcel: Parcel) -> bool:
    """Whether what the list says lies on this machine where its sender has it."""
    try:
        return Parcel.of(parcel.path).digest == parcel.digest
    except (ModelError, OSError):
        return False


def check_digest(digest: str) -> str:
    """The digest, if it is one and can name a folder.

    Raises:
        ModelError: it is none.
    """
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ModelError(f"{digest!r} is no SHA-256")
    return digest


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest_of_all(files: Sequence[Listed]) -> str:
    """SHA-256 of a list of files."""
    lines = "".join(f"{file.digest} {file.size} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
