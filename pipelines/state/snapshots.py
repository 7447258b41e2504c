"""State on disk: a folder that one process holds, and snapshot files that are whole or refused."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from plinth.engine import ConfigError, InputError, PlinthError
from plinth.pipelines.state.store import DiskStore, KeptState
from plinth.verticals import Vertical
from plinth.verticals.contract import StateError

log = logging.getLogger(__name__)

FORMAT = 1
MAX_HEADER = 1 << 20


@contextlib.contextmanager
def claim(
    folder: Path | None,
    key: str = "stream.state_dir",
    while_held: Callable[[], object] | None = None,
) -> Iterator[str | None]:
    """Hold a state folder for this process alone; gives the worker's lasting name kept there.

    Args:
        folder: made if it is not there; ``None`` holds nothing.
        key: what it is called in the config file.
        while_held: called again and again, until the process that holds the folder has ended
            (the system lets go of it for a killed one too); what it raises ends the wait.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"the state folder {folder} cannot be used: {error.strerror}",
            hint=f"set {key} to a folder this user may write",
        ) from None
    with lock:
        while not _locked(lock):
            if while_held is None:
                raise ConfigError(
                    f"the state folder {folder} is in use by another worker"
                    f" (process {(folder / 'lock').read_text().strip()})",
                    hint=f"give each worker a {key} of its own",
                )
            while_held()
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        name = folder / "worker"
        if not name.exists():
            _replace(name, uuid.uuid4().hex.encode())
        yield name.read_text().strip()


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_snapshot(
    path: Path, origin: Mapping[str, str], body: bytes, more: Mapping[str, Any] | None = None
) -> None:
    """Replace a snapshot file by a new one, whole or not at all.

    Args:
        path: the file.
        origin: whose state it is; must match when it is read.
        body: the state.
        more: what else stands in its header, JSON-ready.
    """
    header = {"format": FORMAT, "origin": dict(origin), **(more or {}), "bytes": len(body)}
    head = json.dumps(header, separators=(",", ":")).encode()
    digest = hashlib.sha256(head + b"\n" + body).hexdigest().encode()
    _replace(path, digest + b"\n" + head + b"\n" + body)


def read_snapshot(path: Path, origin: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    """Header and state of a snapshot file.

    Raises:
        InputError: it is damaged, or somebody else's.
    """
    digest, _, rest = path.read_bytes().partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise InputError("its checksum does not match", field=str(path))
    head, _, body = rest.partition(b"\n")
    return _header(head[:MAX_HEADER], origin), body


def read_header(path: Path, origin: Mapping[str, str]) -> dict[str, Any]:
    """Header of a snapshot file, its state unread and unchecked.

    Raises:
        InputError: it is damaged, or somebody else's.
    """
    with path.open("rb") as file:
        file.readline(MAX_HEADER)
        return _header(file.readline(MAX_HEADER), origin)


def _header(head: bytes, origin: Mapping[str, str]) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(head)
        ours = header["format"] == FORMAT and header["origin"] == origin
    except (ValueError, KeyError, TypeError):
        raise InputError("its header is damaged") from None
    if not ours:
        raise InputError(f"it belongs to another format or origin than {dict(origin)}")
    return header


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def kept_states(
    folder: Path | None, verticals: Mapping[str, Vertical[Any, Any]]
) -> Iterator[list[KeptState]]:
    """Serve inside the block with the states that the last block left, and leave them to the next.

    A vertical that can keeps its state by parts in a folder of its name, and a log of what it takes
    in, so that a killed process loses nothing that it answered; whoever serves looks after those.
    The state of others is kept when the block ends. A damaged or foreign file is named in the log
    and its vertical begins anew.

    Args:
        folder: holds a file or folder for each vertical that has state; ``None`` keeps nothing.
        verticals: by name; no request is in work when the block begins and ends.

    Raises:
        ConfigError: another process holds the folder, it cannot be written, or a state by parts is
            of another version, vertical or declaration of features.
        StateError: a state by parts is damaged.
        PlinthError: the block ended well, but a state could not be kept.
    """
    if folder is None:
        yield []
        return
    with claim(folder, "serve.state_dir"), contextlib.ExitStack() as held:
        kept: list[KeptState] = []
        files: dict[str, Path] = {}
        for name, vertical in verticals.items():
            if vertical.snapshot() is None:
                continue
            path = folder / f"{name}.snapshot"
            if type(vertical).keep_state_in is Vertical.keep_state_in:
                files[name] = path
                _restore(path, name, vertical)
            else:
                kept.append(held.enter_context(_by_parts(folder / name, path, name, vertical)))
        lost: list[str] = []
        try:
            yield kept
        finally:
            lost += [name for name, path in files.items() if not _save(path, name, verticals[name])]
            lost += [state.vertical.name for state in kept if not _kept(state)]
        if lost:
            raise PlinthError(
                f"the state of {', '.join(lost)} could not be kept in {folder}",
                hint="make room there; the next run goes on with the state kept before",
            )


@contextlib.contextmanager
def _by_parts(
    folder: Path, before: Path, name: str, vertical: Vertical[Any, Any]
) -> Iterator[KeptState]:
    """A state in a store; one that is empty begins with the snapshot of an earlier version."""
    with contextlib.closing(DiskStore(folder, _origin(name), logs=True)) as store:
        kept = KeptState(vertical, store)
        try:
            if not kept.load() and before.exists():
                _restore(before, name, vertical)
                kept.load()
        except InputError as error:
            raise ConfigError(
                f"the state in {folder} cannot be used: {error.message}",
                hint="move the folder away to begin anew; there is no log to build it from again",
            ) from error
        yield kept


def _kept(state: KeptState) -> bool:
    """Whether all of a state is in its parts; if not, its log still has it."""
    try:
        state.finish()
        state.begin({})
        state.finish()
    except StateError as error:
        log.error("the last checkpoint of %s: %s", state.vertical.name, error)
        return False
    return True


def _restore(path: Path, name: str, vertical: Vertical[Any, Any]) -> None:
    if not path.exists():
        return
    try:
        _, body = read_snapshot(path, _origin(name))
        vertical.restore(body)
    except (InputError, OSError) as error:
        log.error("the state in %s cannot be used, %s begins without: %s", path, name, error)
    else:
        log.info("%s goes on with the state in %s (%d bytes)", name, path, len(body))


def _save(path: Path, name: str, vertical: Vertical[Any, Any]) -> bool:
    """Whether the state is on disk; the file of the run before stays whole if it is not."""
    try:
        write_snapshot(path, _origin(name), vertical.snapshot() or b"")
    except OSError as error:
        log.error("the state of %s was not kept: %s", name, error)
        return False
    return True


def _origin(name: str) -> dict[str, str]:
    return {"vertical": name, "door": "http"}
