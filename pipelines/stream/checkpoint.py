"""A vertical's state and the offsets it belongs to.

The rule: a snapshot is taken only when everything in the state has been committed, so its
offsets never lead the group's. What lies between is read again and observed without answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plinth.engine import ConfigError, InputError
from plinth.pipelines.stream.loop import Partition
from plinth.verticals.contract import Vertical

log = logging.getLogger(__name__)

FORMAT = 1
MAX_HEADER = 1 << 20
Offsets = dict[Partition, int]


@contextlib.contextmanager
def claim(folder: Path | None, key: str = "stream.state_dir") -> Iterator[str | None]:
    """Hold a state folder for this process alone; gives the worker's lasting name kept there.

    Args:
        folder: made if it is not there; ``None`` holds nothing.
        key: what it is called in the config file.

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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"the state folder {folder} is in use by another worker",
                hint=f"give each worker a {key} of its own",
            ) from None
        name = folder / "worker"
        if not name.exists():
            _replace(name, uuid.uuid4().hex.encode())
        yield name.read_text().strip()


@dataclass(slots=True)
class Keeper:
    """Keeps a vertical's state, and which records are in it.

    Args:
        vertical: whose state it is.
        path: the snapshot file, or ``None`` to keep nothing.
        origin: what must match for a snapshot to be ours: vertical, topic, group.
        replay_max_records: bound of one partition's replay when nothing of it is known.
    """

    vertical: Vertical[Any, Any]
    path: Path | None
    origin: dict[str, str]
    replay_max_records: int
    applied: Offsets = field(default_factory=dict, init=False)
    torn: bool = field(default=False, init=False)
    _empty: bytes | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._empty = self.vertical.snapshot()
        if self.stateful:
            self._load()

    @property
    def stateful(self) -> bool:
        """The vertical has state to keep."""
        return self._empty is not None

    def note(self, ends: Mapping[Partition, int]) -> None:
        """Records up to ``ends`` are in the state now."""
        self.applied.update(ends)

    def plan(self, committed: Offsets, first: Offsets) -> dict[Partition, tuple[int, int]]:
        """Where to read again, per partition: [from, to) is observed before ``to`` is scored.

        Args:
            committed: the group's offset of every partition this worker has.
            first: the oldest offset still in each partition.

        Brings the state back behind ``committed`` first, should it be ahead.
        """
        if not self.stateful:
            return {p: (to, to) for p, to in committed.items()}
        if self.torn or self._ahead(committed):
            self._load()
            if ahead := self._ahead(committed):
                log.warning(
                    "the snapshot is ahead of the committed offsets of %s (were they reset?); "
                    "the state is built again from the retained input",
                    ahead,
                )
                self._clear()
        return {p: (self._from(p, to, first[p]), to) for p, to in committed.items()}

    def save(self) -> None:
        """Write the state and its offsets; call only when all of it is committed."""
        if self.path is None or not self.stateful or self.torn or not self.applied:
            return
        started = time.perf_counter()
        body = self.vertical.snapshot() or b""
        offsets = [[p.topic, p.partition, at] for p, at in sorted(self.applied.items())]
        write_snapshot(self.path, self.origin, body, {"offsets": offsets})
        log.info("snapshot: %d bytes in %.2f s", len(body), time.perf_counter() - started)

    def _ahead(self, committed: Offsets) -> list[Partition]:
        return [p for p, to in committed.items() if self.applied.get(p, -1) > to]

    def _from(self, p: Partition, to: int, first: int) -> int:
        known = self.applied.get(p)
        at = max(first, to - self.replay_max_records) if known is None else known
        if known is not None and known < first and known < to:
            log.warning(
                "%s[%d]: records %d to %d are not retained any more and are missing in the state",
                *p, known, min(first, to),
            )  # fmt: skip
        return min(max(at, first), to)

    def _clear(self) -> None:
        assert self._empty is not None
        self.vertical.restore(self._empty)
        self.applied = {}
        self.torn = False

    def _load(self) -> None:
        self._clear()
        if self.path is None or not self.path.exists():
            return
        try:
            header, body = read_snapshot(self.path, self.origin)
            self.vertical.restore(body)
            self.applied = {Partition(topic, p): at for topic, p, at in header["offsets"]}
        except (InputError, OSError) as error:
            log.warning(
                "the snapshot %s cannot be used (%s); "
                "the state is built again from the retained input",
                self.path, error,
            )  # fmt: skip
            self._clear()


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
    header: dict[str, Any] = json.loads(head[:MAX_HEADER])
    if header["format"] != FORMAT or header["origin"] != origin:
        raise InputError(f"it belongs to another format or origin than {dict(origin)}")
    return header, body


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
