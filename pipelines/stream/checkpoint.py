"""A vertical's state and the offsets it belongs to.

The rule: a snapshot is taken only when everything in the state has been committed, so its
offsets never lead the group's. What lies between is read again and observed without answers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from plinth.engine import InputError
from plinth.pipelines.state.snapshots import read_header, read_snapshot, write_snapshot
from plinth.pipelines.state.store import DiskStore, FollowedStore, KeptState
from plinth.pipelines.stream.chunks import UNKNOWN, Chunk, Layout, Partition
from plinth.verticals.contract import Vertical

log = logging.getLogger(__name__)

Offsets = dict[Partition, int]
MAX_BEHIND = 20
"""Checkpoints that a standby may be behind: while it reads an old one, the file grows."""


@dataclass(slots=True)
class Checkpoint:
    """A vertical's state, which records are in it, and its snapshot on disk.

    Args:
        vertical: whose state it is.
        path: the snapshot file, or ``None`` to keep nothing.
        origin: what must match for a snapshot to be ours: vertical, topic, group.
        replay_max_records: bound of one partition's replay when nothing of it is known.
        store: keeps the state by parts, in place of the snapshot; one that is empty begins with
            what the snapshot has.
        followed: folder of the store of a worker that this stands by for.

    Attributes:
        applied: position of each partition up to which records are in the state.
        since: position of each of these from which on they are.
        lacks: milliseconds since 1970, for each partition with records that should be in the state
            and could not be read: what came to it before may be missing.
        stale: partitions of which others have had records since they were given to this worker, or
            of which nothing was known, until all of these are in the state.
        layout: of the input topic, as the group or the snapshot last knew it.
        dirty: a flow failed halfway; the state must be built again before it is used.
    """

    vertical: Vertical[Any, Any]
    path: Path | None
    origin: dict[str, str]
    replay_max_records: int
    store: DiskStore | None = None
    followed: Path | None = None
    applied: Offsets = field(default_factory=dict, init=False)
    since: Offsets = field(default_factory=dict, init=False)
    lacks: dict[Partition, int] = field(default_factory=dict, init=False)
    stale: set[Partition] = field(default_factory=set, init=False)
    layout: Layout = field(default=UNKNOWN, init=False)
    dirty: bool = field(default=False, init=False)
    _empty: bytes | None = field(default=None, init=False)
    _read: int = field(default=0, init=False)
    _kept: KeptState | None = field(default=None, init=False)
    _following: FollowedStore | None = field(default=None, init=False)
    _marked: Offsets = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._empty = self.vertical.snapshot()
        if self.store is not None and self.stateful:
            self._kept = KeptState(self.vertical, self.store)
        if self.stateful and self.followed is None:
            self._load()

    @property
    def stateful(self) -> bool:
        """The vertical has state to keep."""
        return self._empty is not None

    @property
    def held(self) -> Set[Partition]:
        """Partitions whose records are in the state, but for the last ones perhaps."""
        return self.applied.keys() - self.stale if self.stateful else frozenset()

    @property
    def start(self) -> int:
        """Milliseconds since 1970: the state may lack what came before; 0: it has all."""
        return max(self.lacks.values(), default=0)

    def observed(self, chunk: Chunk) -> None:
        """The records of a replayed chunk are in the state now."""
        for p, at in chunk.starts.items():
            if p in self.lacks and at == self.since.get(p):  # the oldest that there is
                first = next(r.timestamp for r in chunk.records if r.partition == p.partition)
                if first > 0:
                    self.lacks[p] = min(self.lacks[p], first)
        self.advance(chunk.ends)

    def advance(self, ends: Mapping[Partition, int]) -> None:
        """Records up to ``ends`` are in the state now."""
        self.applied.update(ends)

    def position(self, chunk: Chunk, mine: int) -> str:
        """What a chunk is answered with: ``mine/width``, then each partition of the state.

        Behind ``mine/width`` stands ``/grown`` where keys have moved, then ``/start`` where the
        state lacks what came before (milliseconds; 0: neither).
        A partition of the chunk stands first, as ``number:since-start-end``, others as
        ``number:since-applied``. Empty without state.

        Args:
            chunk: not in the state yet.
            mine: partitions this worker reads.
        """
        if not self.stateful:
            return ""
        parts = [
            f"{p.partition}:{self.since.get(p, at)}-{at}-{chunk.ends[p]}"
            for p, at in chunk.starts.items()
        ]
        parts += [
            f"{p.partition}:{self.since.get(p, at)}-{at}"
            for p, at in self.applied.items()
            if p not in chunk.starts
        ]
        layout = chunk.layout
        times = (layout.grown, self.start) if self.start else (layout.grown,) * bool(layout.grown)
        return " ".join(["/".join(map(str, (mine, layout.width, *times))), *parts])

    def plan(self, committed: Offsets, first: Offsets) -> dict[Partition, tuple[int, int]]:
        """Where to read again, per partition: [from, to) is observed before ``to`` is scored.

        Args:
            committed: the group's offset of every partition this worker has.
            first: the oldest offset still in each partition.

        Brings the state back behind ``committed`` first, should it be ahead.
        """
        if not self.stateful:
            return {p: (to, to) for p, to in committed.items()}
        if self.dirty or self._ahead(committed):
            self._load()
            if ahead := self._ahead(committed):
                log.warning(
                    "the snapshot is ahead of the committed offsets of %s (were they reset?); "
                    "the state is built again from the retained input",
                    ahead,
                )
                self._clear()
        spans = {p: (self._from(p, to, first[p]), to) for p, to in committed.items()}
        behind = {p for p, (start, to) in spans.items() if start < to}
        gone, new = self.applied.keys() - spans.keys(), behind - self.applied.keys()
        self.stale = (self.stale | gone | new) - (spans.keys() - behind)
        self.since |= {p: start for p, (start, _) in spans.items() if p not in self.applied}
        return spans

    @property
    def busy(self) -> bool:
        """What :meth:`save` began is not at its end."""
        return self._kept is not None and self._kept.busy

    @property
    def pressed(self) -> float:
        """How much of its memory the state fills with what no checkpoint has yet."""
        return 0.0 if self._kept is None else self.vertical.unsaved()

    def save(self) -> None:
        """Write the state and its offsets, or begin to where it goes by parts to a store.

        Call only when all of the state is committed.
        """
        if not self.stateful or self.dirty or not self.applied:
            return
        if self._kept is not None:
            if not self._kept.busy:
                self._kept.begin(self._header())
        elif self.path is not None:
            started = time.perf_counter()
            body = self.vertical.snapshot() or b""
            write_snapshot(self.path, self.origin, body, self._header())
            log.info("snapshot: %d bytes in %.2f s", len(body), time.perf_counter() - started)

    def write(self) -> None:
        """Go on for a moment with what :meth:`save` began.

        Raises:
            StateError: the disk does not take it.
        """
        if self._kept is not None and not self.dirty:
            self._kept.step()

    def finish(self) -> None:
        """Bring to its end what :meth:`save` began.

        Raises:
            StateError: the disk does not take it.
        """
        if self._kept is not None and not self.dirty:
            self._kept.finish()

    def _header(self) -> dict[str, Any]:
        def told(offsets: Mapping[Partition, int]) -> list[list[Any]]:
            return [[p.topic, p.partition, at] for p, at in sorted(offsets.items())]

        return {
            "offsets": told(self.applied),
            "since": told(self.since),
            "layout": list(self.layout),
            "lacks": told(self.lacks),
            "stale": [list(p) for p in sorted(self.stale)],
        }

    def follow(self) -> bool:
        """Take over the snapshot on disk where it knows other partitions; whether there is a state.

        For a standby, whose state comes from the log and not from each snapshot of the worker.
        """
        if self.followed is not None:
            return self.stateful and self._follow_store(self.followed)
        if self.path is None or not self.stateful:
            return False
        with contextlib.suppress(FileNotFoundError):
            written = self.path.stat().st_mtime_ns
            if written != self._read:
                self._read = written
                try:
                    header = read_header(self.path, self.origin)
                except InputError:  # load() says so
                    header = {"offsets": []}
                if {Partition(topic, p) for topic, p, _ in header["offsets"]} != set(self.applied):
                    self._load()
                else:
                    self.stale = _stale(header)
        return bool(self.applied)

    def _follow_store(self, folder: Path) -> bool:
        """The same where the state is on disk: what the worker has there is read, not written.

        What has changed here stays in memory, as it does before a checkpoint of one's own. Once the
        worker's next checkpoint has all of it up to a mark, and nothing from behind what was
        observed here, that is read from now on, and what is older than the mark may leave memory.
        """
        try:
            store = self._following = self._following or FollowedStore(folder, self.origin)
            header = store.newest()
            offsets = _offsets(header, "offsets")
            if offsets.keys() != self.applied.keys() or store.behind > MAX_BEHIND:
                store.renew()
                self._begin_behind(store, header)
            elif self._between(self._marked, offsets) and self._between(offsets, self.applied):
                store.renew()
                self.stale = _stale(header)
                self.vertical.end_checkpoint(durable=True)
                self._mark()
        except (InputError, OSError, lmdb.Error) as error:
            log.debug("the worker cannot be followed yet: %r", error)
            self._let_go()
        return bool(self.applied)

    def _begin_behind(self, store: FollowedStore, header: Mapping[str, Any]) -> None:
        self._take({})
        if header:
            self.vertical.keep_state_in(store)
            self._take(header)
            self._mark()

    def _mark(self) -> None:
        """What has changed up to now may leave memory once the worker's checkpoint has it."""
        self._marked = dict(self.applied)
        self.vertical.begin_checkpoint()
        while not self.vertical.write_checkpoint(1.0):
            pass

    def _let_go(self) -> None:
        store, self._following = self._following, None
        if store is not None:
            store.close()
        self._take({})

    @staticmethod
    def _between(low: Offsets, high: Offsets) -> bool:
        return all(at <= high[p] for p, at in low.items())

    def take_over(self, store: DiskStore) -> None:
        """Go on with the store of the worker that has ended, from where this stands.

        Args:
            store: opened after :meth:`release`.
        """
        self.store, self.followed = store, None
        if not self.stateful:
            return
        self._kept = KeptState(self.vertical, store)
        followed, self._following = self._following, None
        try:
            offsets = _offsets(store.reopen(), "offsets")
        except InputError:  # _load() says so
            offsets = {}
        fits = bool(offsets) and offsets.keys() == self.applied.keys()
        if followed is not None and fits and self._between(offsets, self.applied):
            followed.take_over(store)
            self.vertical.end_checkpoint(durable=False)
            log.info("going on %d records past its last checkpoint", self._since(offsets))
        else:
            self._load()

    def release(self) -> None:
        """Let go of the worker's files, which has ended."""
        if self._following is not None:
            self._following.close()

    def _since(self, offsets: Offsets) -> int:
        return sum(at - offsets[p] for p, at in self.applied.items())

    def _ahead(self, committed: Offsets) -> list[Partition]:
        return [p for p, to in committed.items() if self.applied.get(p, -1) > to]

    def _from(self, p: Partition, to: int, first: int) -> int:
        known = self.applied.get(p, 0)
        at = max(first, known)
        if p not in self.applied:
            at = max(at, to - self.replay_max_records)
        at = min(at, to)
        if known < at:
            self.missed(p, at)
        return at

    def missed(self, p: Partition, to: int) -> None:
        """Note that records up to this offset cannot be brought into the state."""
        log.warning(
            "%s[%d]: records %d to %d are not retained any more, or more than replay_max_records, "
            "and are missing in the state; answers that this may concern say so until the longest "
            "window has passed",
            *p, self.applied.get(p, 0), to,
        )  # fmt: skip
        self.lacks[p] = int(time.time() * 1e3)

    def _clear(self) -> None:
        assert self._empty is not None
        self.vertical.restore(self._empty)
        if self._kept is not None:
            self._kept.wipe()
        self._take({})

    def _load(self) -> None:
        where: Path | None = self.path
        try:
            if self._kept is None:
                self._take(self._from_file())
            else:
                where = self._kept.store.folder
                self._take(self._from_store(self._kept))
        except (InputError, OSError) as error:
            log.warning(
                "the state in %s cannot be used (%s); it is built again from the retained input",
                where, error,
            )  # fmt: skip
            self._clear()

    def _from_file(self) -> Mapping[str, Any]:
        """Restore what the snapshot has; its header, empty if there is none."""
        assert self._empty is not None
        self.vertical.restore(self._empty)
        if self.path is None or not self.path.exists():
            return {}
        header, body = read_snapshot(self.path, self.origin)
        self.vertical.restore(body)
        return header

    def _from_store(self, kept: KeptState) -> Mapping[str, Any]:
        """The same of the store; one that is empty begins with the snapshot."""
        header: Mapping[str, Any] = kept.load()
        if not header and self.path is not None and self.path.exists():
            header = self._from_file()
            kept.load()
        return header

    def _take(self, header: Mapping[str, Any]) -> None:
        names = "offsets", "since", "lacks"
        self.applied, self.since, self.lacks = (_offsets(header, name) for name in names)
        self.stale = _stale(header)
        self.layout = self.layout.joined(Layout(*header.get("layout", ())))
        self.dirty = False


def _offsets(header: Mapping[str, Any], name: str) -> Offsets:
    return {Partition(topic, p): at for topic, p, at in header.get(name, ())}


def _stale(header: Mapping[str, Any]) -> set[Partition]:
    return {Partition(topic, p) for topic, p in header.get("stale", ())}
