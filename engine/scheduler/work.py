"""What the batcher handles: work that waits, the batch made of it, and what was given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plinth.engine.errors import Refused
from plinth.engine.flow import Sla


@dataclass(slots=True, eq=False)
class Work:
    """Rows of one work class that wait for the device.

    Args:
        key: the work class: model, shape bucket, precision.
        rows: number of rows.
        arrival: when it came, seconds.
        sla: the promise it came with.
        payload: whatever the runtime wants back.
    """

    key: str
    rows: int
    arrival: float
    sla: Sla
    payload: Any = None
    deadline: float = field(init=False)
    taken: int = field(init=False, default=0)
    used: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        allowed = self.sla.deadline_ms
        self.deadline = float("inf") if allowed is None else self.arrival + allowed / 1e3

    @property
    def left(self) -> int:
        """Rows not yet given to the device."""
        return self.rows - self.taken


class BatchSlice(NamedTuple):
    """Rows ``first`` to ``first + rows`` (exclusive) of one piece of work."""

    work: Work
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What the device does next: parts of one work class and their predicted seconds."""

    key: str
    parts: tuple[BatchSlice, ...]
    rows: int
    predicted: float
    urgent: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """Work that leaves the queue unanswered, and why."""

    work: Work
    error: Refused


@dataclass(slots=True)
class WorkClass:
    """Settings of one work class.

    Args:
        most: largest batch in rows.
        cheaper: the work class that degraded work goes to.
    """

    most: int = 128
    cheaper: str | None = None
