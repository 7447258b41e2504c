"""What the batcher handles: work that waits, the batch made of it, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plinth.engine.errors import Refused
from plinth.engine.flow import Sla

BatchKey = str
"""What may share a batch: model, version, digest, device, backend, precision and input shapes."""


@dataclass(slots=True, eq=False)
class Search:
    """The search for the rows that make a batch fail, by halves.

    Args:
        tries: batches that may still fail before the rest is given up.
    """

    tries: int


@dataclass(slots=True, eq=False)
class Suspects:
    """One part of a batch that failed: its works share batches with each other alone."""

    search: Search


@dataclass(slots=True, eq=False)
class Shares:
    """The shares of one request, which is answered when all of them are done.

    Attributes:
        begun: a lane was given one.
    """

    begun: bool = False


@dataclass(slots=True, eq=False)
class Work:
    """Rows of one batch key that wait for the device.

    Args:
        key: what it may share a batch with.
        rows: number of rows.
        arrival: when it came, seconds.
        sla: the promise it came with.
        owner: the request it is part of; works of one owner stand and fall together.
        first: its first row within the owner.
        since: when what it belongs to came, from where its promise counts; ``None``: with it.

    Attributes:
        taken: rows already given to the device.
        again: (first, rows) of what was given to a lane in vain and waits once more.
        deaths: lanes that ended while they ran it.
        service: seconds of the device received, divided by the weight (background work).
        suspects: whom it may share batches with, after a batch of it failed.
        shares: those of its owner, each of which may run on a lane of its own; it is one of them.
        gone: nobody waits for it any more.
        tried: it was too late by what was learned, and runs to see whether that still holds.
    """

    key: BatchKey
    rows: int
    arrival: float
    sla: Sla
    owner: Any = None
    first: int = 0
    since: float | None = None
    deadline: float = field(init=False)
    taken: int = field(init=False, default=0)
    again: tuple[tuple[int, int], ...] = field(init=False, default=())
    deaths: int = field(init=False, default=0)
    service: float = field(init=False, default=0.0)
    suspects: Suspects | None = field(init=False, default=None)
    shares: Shares | None = field(init=False, default=None)
    gone: bool = field(init=False, default=False)
    tried: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        allowed = self.sla.deadline_ms
        self.deadline = float("inf") if allowed is None else self.begun + allowed / 1e3

    @property
    def begun(self) -> float:
        """When its promise began, seconds."""
        return self.arrival if self.since is None else self.since

    @property
    def left(self) -> int:
        """Rows not yet given to the device, or given in vain."""
        if not self.again:
            return self.rows - self.taken
        return self.rows - self.taken + sum(rows for _, rows in self.again)

    def take(self, most: int) -> BatchSlice:
        """The next rows, up to so many: those given in vain first."""
        if self.again:
            first, rows = self.again[0]
            rest = ((first + most, rows - most),) if rows > most else ()
            self.again = rest + self.again[1:]
            return BatchSlice(self, first, min(rows, most))
        first, rows = self.taken, min(most, self.rows - self.taken)
        self.taken += rows
        return BatchSlice(self, first, rows)

    def put_back(self, first: int, rows: int) -> None:
        """Rows of it were given to a lane in vain."""
        self.again = tuple(sorted((*self.again, (first, rows))))


class BatchSlice(NamedTuple):
    """Rows ``first`` to ``first + rows`` (exclusive) of one piece of work."""

    work: Work
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What a lane does next: slices of one batch key and their predicted seconds."""

    key: BatchKey
    parts: tuple[BatchSlice, ...]
    rows: int
    predicted: float
    urgent: bool
    lane: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Work that leaves the queue unanswered, and why."""

    work: Work
    error: Refused


@dataclass(slots=True)
class KeySettings:
    """Settings of one batch key.

    Args:
        max_rows: largest batch in rows.
        cheaper: the batch key that degraded work goes to.
        pinned: kept until it is forgotten on purpose, however many other keys come.
        failures: batches that failed since one was answered.
        try_at: when work that seems hopeless is next tried, seconds.
    """

    max_rows: int = 128
    cheaper: BatchKey | None = None
    pinned: bool = False
    failures: int = 0
    try_at: float = 0.0
