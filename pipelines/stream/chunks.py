"""The data that flows through the stream: records in chunks, messages, and what stops them.

poll -> :class:`Chunk` -> parse, infer, encode -> :class:`Outputs` -> commit -> :class:`Committed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from plinth.engine import InputError, PlinthError
from plinth.verticals.contract import Evidence


class Partition(NamedTuple):
    """One ordered log of a topic; offsets belong to it."""

    topic: str
    partition: int


class Layout(NamedTuple):
    """How many partitions a topic has, and when its keys were last seen to move.

    Args:
        width: partitions; 0 when unknown.
        grown: milliseconds since 1970 at which a worker saw more partitions than before, or
            records apart that must meet: not earlier than it happened. 0: never.
    """

    width: int = 0
    grown: int = 0

    def note(self) -> str:
        """As it is kept beside an offset of the group."""
        return f"plinth {self.width} {self.grown}"

    @classmethod
    def read(cls, note: str) -> Layout:
        """From :meth:`note`, whatever follows it; unknown where it is somebody else's."""
        word, *numbers = note.rstrip("\0").split(" ")[:3]
        if word != "plinth" or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
            return cls()
        return cls(int(numbers[0]), int(numbers[1]))

    def joined(self, other: Layout) -> Layout:
        """What both tell together."""
        return Layout(max(self.width, other.width), max(self.grown, other.grown))


UNKNOWN = Layout()


class ChunkSize:
    """How many records a chunk may have: about half a second of work, or as much as a commit takes.

    Nobody sees the answers of a chunk before all of them are made, and what a change of the group
    interrupts is done again. Chunks are made while others are committed, so shorter ones than a
    commit would only be more of them. It begins with a quarter, since a process that just started
    is slow.

    Args:
        most: never more.

    Attributes:
        count: records that the next chunk may have.
    """

    WORK_S = 0.5
    LEAST = 64

    def __init__(self, most: int) -> None:
        self._most = most
        self._least = min(most, self.LEAST)
        self.count = max(self._least, most // 4)

    def took(self, records: int, seconds: float, commit: float) -> None:
        """So many records took so long, and the latest commit: half as many next time, or twice."""
        bearable = max(self.WORK_S, commit)
        if seconds <= bearable:
            self.count = min(self._most, 2 * self.count)
        elif records:
            self.count = max(self._least, min(self.count, records) // 2)


class Record(Protocol):
    """One input record as the processor sees it; kafka-python's ``ConsumerRecord`` is one."""

    @property
    def topic(self) -> str:
        """The topic it was read from."""

    @property
    def partition(self) -> int:
        """The partition it was read from."""

    @property
    def offset(self) -> int:
        """Its place in the partition."""

    @property
    def timestamp(self) -> int:
        """Milliseconds since 1970, set by the producer or the broker; -1 when unknown."""

    @property
    def key(self) -> bytes | None:
        """The key as it came."""

    @property
    def value(self) -> bytes | None:
        """The payload as it came."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Headers as they came."""


@dataclass(slots=True)
class Message:
    """One message to be written: the answer to ``record``, or the record itself with its error.

    Nobody changes one, but frozen it takes twice as long to make.

    Args:
        record: the input it answers.
        key: key of the answer.
        value: the encoded answer; empty for a dead letter.
        error: why the record has no answer; ``None`` for an answer.
        headers: headers of the answer.
        evidence: what the answer was made from, where the stream is audited.
    """

    record: Record
    key: bytes | None = None
    value: bytes = b""
    error: InputError | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    evidence: Mapping[str, Any] | Evidence | None = None


@dataclass(slots=True)
class Chunk:
    """Consecutive records of one or more partitions, processed and committed together.

    Args:
        records: in reading order.
        starts: position of each partition before the chunk.
        ends: position of each partition after it: what is committed with it.
        owner: the consumer's group membership while it read them, checked at the commit.
        replay: the records were answered before and only rebuild the state.
        layout: of the input topic, when the records were read.
    """

    records: list[Record]
    starts: dict[Partition, int]
    ends: dict[Partition, int]
    owner: Any = None
    replay: bool = False
    layout: Layout = UNKNOWN


@dataclass(slots=True, eq=False)
class Outputs:
    """A chunk with its messages, ready to be written.

    Args:
        chunk: the records.
        messages: one for each of them.
        position: which records were in the state, for whoever wants to make a decision again;
            empty without state.
        audit: audit records with the partitions of their input, in order.
        notes: to be kept beside the offset of each partition.
    """

    chunk: Chunk
    messages: list[Message]
    position: str = ""
    audit: list[tuple[Partition, bytes]] = field(default_factory=list)
    notes: Mapping[Partition, str] = field(default_factory=dict)

    def only(self, partitions: Mapping[Partition, Any], owner: Any) -> Outputs:
        """The part that belongs to ``partitions``, claimed by ``owner``."""
        chunk = self.chunk
        kept = {p for p in chunk.ends if p in partitions}
        return Outputs(
            Chunk(
                [r for r in chunk.records if (r.topic, r.partition) in kept],
                {p: chunk.starts[p] for p in kept},
                {p: chunk.ends[p] for p in kept},
                owner,
                layout=chunk.layout,
            ),
            [m for m in self.messages if (m.record.topic, m.record.partition) in kept],
            self.position,
            [(place, raw) for place, raw in self.audit if place in kept],
            {place: note for place, note in self.notes.items() if place in kept},
        )


class Committed(NamedTuple):
    """Outputs that are durable, and the seconds from first send to commit."""

    outputs: Outputs
    seconds: float


class Rewind(Exception):
    """Go back to what is committed. ``cause`` is a short word for the metrics."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Poisoned(Rewind):
    """The vertical failed on a chunk and its state can no longer be trusted."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__("poison")
        self.chunk = chunk


class StreamError(PlinthError):
    """The stream cannot go on; what was committed is complete, the rest will be read again."""

    reason = "stream"
