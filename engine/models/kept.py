"""Graphs as ONNX Runtime has optimised them: a model that left memory is then read, not compiled.

The constants lie in a file of their own, from which kernels lay out what they read. The library
checks none of it, so that files are held against a digest before they are used, and against their
size and times whenever they are read again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from plinth.distribution import version
from plinth.engine.cache import cache_folder
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.onnx import session

_GRAPH, _DIGEST = "model.onnx", "sha256"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """An optimised graph.

    Args:
        path: its file, to be read with ``session(..., optimised=True)``.
        stamps: of its files when they were as they should be.
    """

    path: Path
    stamps: tuple[tuple[str, int, int, int], ...]

    def is_same(self) -> bool:
        """Whether nobody has written to its files since."""
        return _stamps(self.path.parent) == self.stamps


def kept_graph(path: Path, threads: int, device: Device) -> Kept | None:
    """An ONNX file's optimised graph, made (once per content, version and kind of CPU).

    Args:
        path: the ONNX file.
        threads: of one run.
        device: the CPU; graphs are laid out for it.

    Returns:
        ``None`` where it cannot be written, which the log says.
    """
    library = version("onnxruntime")
    facts = "\n".join((_sha256(path), str(library), device.name, ",".join(device.dtypes)))
    folder = cache_folder("onnxruntime") / hashlib.sha256(facts.encode()).hexdigest()
    for _ in range(2):
        try:
            if not folder.exists():
                _make(path, threads, folder)
            stamps = _stamps(folder)
            if (folder / _DIGEST).read_text() == _digest(folder):
                return Kept(folder / _GRAPH, stamps)
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ModelError) as error:
            _log.warning("%s: its optimised graph was not kept: %s", path, error)
    return None


def _make(path: Path, threads: int, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as part:
        made = Path(part) / "made"
        made.mkdir()
        session(path, threads, write=made / _GRAPH)
        (made / _DIGEST).write_text(_digest(made))
        made.rename(folder)


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
