"""Graphs as backends read them fastest: a model that left memory is then read, not compiled.

The constants lie in a file of their own, from which kernels lay out what they read. The libraries
check none of it, so that files are held against a digest before they are used, and against their
size and times whenever they are read again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plinth.distribution import version
from plinth.engine.cache import cache_folder, keep_bound, used
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.onnx import session

_DIGEST = "sha256"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A graph.

    Args:
        path: its file.
        stamps: of its files when they were as they should be.
    """

    path: Path
    stamps: tuple[tuple[str, int, int, int], ...]

    def is_same(self) -> bool:
        """Whether nobody has written to its files since."""
        return _stamps(self.path.parent) == self.stamps


def kept_graph(path: Path, threads: int, device: Device) -> Kept | None:
    """An ONNX file's graph as ONNX Runtime optimised it, once per content, version and kind of CPU.

    It is read with ``session(..., optimised=True)``.

    Args:
        path: the ONNX file.
        threads: of one run.
        device: the CPU; graphs are laid out for it.

    Returns:
        ``None`` where it cannot be written, which the log says.
    """
    facts = (_sha256(path), str(version("onnxruntime")), device.name, ",".join(device.dtypes))
    return kept_files(
        "onnxruntime", facts, "model.onnx", lambda new: session(path, threads, write=new), path
    )


def graph_facts(*paths: Path) -> tuple[str, ...]:
    """What tells the contents of files."""
    return tuple(map(_sha256, paths))


def kept_files(
    kind: str, facts: Sequence[str], name: str, write: Callable[[Path], object], of: Path
) -> Kept | None:
    """A graph's files in the cache, held against their digest, made where they are not there.

    Args:
        kind: one of those of :mod:`plinth.engine.cache`.
        facts: what the files depend on.
        name: of the graph's file.
        write: makes it, and files beside it, in a new folder.
        of: the file that it is made of, which the log names.

    Returns:
        ``None`` where it cannot be written, which the log says.
    """
    folder = cache_folder(kind) / hashlib.sha256("\n".join(facts).encode()).hexdigest()
    for _ in range(2):
        try:
            if not folder.exists():
                _make(folder, name, write)
            stamps = _stamps(folder)
            if (folder / _DIGEST).read_text() == _digest(folder):
                used(folder)
                return Kept(folder / name, stamps)
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, RuntimeError, ModelError) as error:
            _log.warning("%s: its graph was not kept: %s", of, error)
    return None


def _make(folder: Path, name: str, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as part:
        made = Path(part) / "made"
        made.mkdir()
        write(made / name)
        (made / _DIGEST).write_text(_digest(made))
        made.rename(folder)
    keep_bound()


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.name != _DIGEST)


def _digest(folder: Path) -> str:
    return "".join(f"{each.name} {_sha256(each)}\n" for each in _files(folder))


def _stamps(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    if not folder.is_dir():
        return ()
    found = ((each.name, each.stat()) for each in _files(folder))
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
