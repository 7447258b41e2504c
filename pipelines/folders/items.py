"""One item of a folder door: load, infer, write. The batch door and the upload door share it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plinth.engine import Answer, Engine, InputError, PlinthError, Sla
from plinth.verticals import Item, Settings, Vertical

log = logging.getLogger("plinth.items")

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of an item that went well.

    Args:
        folder: where its files are.
        files: the files, relative to ``folder``.
        answer: the engine's answer: result, timing, model versions.
        seconds: wall time from load to the files' final place.
    """

    folder: Path
    files: tuple[str, ...]
    answer: Answer[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Hooks of the one who drives items.

    Args:
        device: held while the engine works, bounds how many items infer at a time.
        on_stage: told ``"load"``, ``"infer"``, ``"write"`` as they begin.
    """

    device: AbstractContextManager[Any] = field(default_factory=nullcontext)
    on_stage: Callable[[str], None] = lambda stage: None


class Broken(PlinthError):
    """An item met a fault of the software, not of its data; the log has the frames."""

    reason = "internal"


def discover(vertical: Vertical[Any, Any], folder: Path) -> Iterator[Item]:
    """The vertical's items below a folder, with ids checked.

    Raises:
        InputError: the vertical found the folder unreadable.
        Broken: an id is unsafe as a folder name, or appears twice (the vertical's fault).
    """
    seen: set[str] = set()
    try:
        for item in vertical.discover(folder):
            if not _ID.fullmatch(item.id) or item.id in seen:
                raise Broken(f"{vertical.name} gave an item an id that is unsafe or not unique")
            seen.add(item.id)
            yield item
    except OSError as error:
        raise InputError(
            f"cannot read {folder}: {error.strerror}", hint="check the permissions", reason="io"
        ) from error


def fingerprint(item: Item, settings: Settings) -> str:
    """A short digest of what an item's result depends on besides the models.

    It covers the vertical's settings, and name, size and time of change of each file.
    """
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for path in sorted(item.paths):
        try:
            stat = path.stat()
        except OSError:  # load() will say what is wrong with it
            digest.update(f"{path.name}\0gone\0".encode())
        else:
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def versions(vertical: Vertical[Any, Any]) -> dict[str, str]:
    """Version by name of the models a vertical brings."""
    return {model.spec.name: model.spec.version for model in vertical.models()}


def analyse(
    vertical: Vertical[Any, Any],
    engine: Engine,
    item: Item,
    folder: Path,
    *,
    sla: Sla,
    steps: Steps | None = None,
) -> Finished:
    """Carry one item from its files to its outputs.

    Args:
        vertical: the domain.
        engine: a started engine that has the vertical's models.
        item: what :meth:`plinth.verticals.Vertical.discover` found.
        folder: final place of the outputs; appears whole or not at all.
        sla: the promise, usually background.
        steps: hooks.

    Raises:
        PlinthError: the item's own failure (InputError), the engine's, or :class:`Broken`.
    """
    steps = steps or Steps()
    started = time.perf_counter()
    try:
        steps.on_stage("load")
        request = vertical.load(item)
        with steps.device:
            steps.on_stage("infer")
            answer = engine.run(vertical.infer([request]), sla)
        result = answer.value[0]
        if isinstance(result, InputError):
            raise result
        steps.on_stage("write")
        files = write_whole(folder, lambda into: vertical.write(result, into))
    except PlinthError:
        raise
    except OSError as error:
        raise InputError(
            f"{item.id}: {error.strerror or type(error).__name__}",
            hint="check that the files are readable and the disk has room",
            reason="io",
        ) from error
    except Exception as error:
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s failed with %s\n%s", item.id, type(error).__name__, frames)
        raise Broken(
            f"{item.id}: {vertical.name} failed with {type(error).__name__}",
            hint="this is a fault in the software; the log has the place",
        ) from error
    return Finished(folder, files, answer, time.perf_counter() - started)


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
        shutil.rmtree(left, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(path)
