"""Records in, messages out: the one loop and the words it is told in.

A :class:`Source` gives chunks of records, an :class:`Answerer` turns them into messages, a
:class:`Sink` makes messages and positions durable together. Any of them may raise
:class:`Rewind`: what was handed over and not yet durable is then settled by ``recover``, and
the loop goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from plinth.engine import InputError


class Partition(NamedTuple):
    """One ordered log of a topic; offsets belong to it."""

    topic: str
    partition: int


class Record(Protocol):
    """One input record as the scorer sees it; kafka-python's ``ConsumerRecord`` is one."""

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


@dataclass(frozen=True, slots=True)
class Message:
    """One message to be written: the answer to ``record``, or the record itself with its error.

    Args:
        record: the input it answers.
        key: key of the answer.
        value: the encoded answer; empty for a dead letter.
        error: why the record has no answer; ``None`` for an answer.
        headers: headers of the answer.
    """

    record: Record
    key: bytes | None = None
    value: bytes = b""
    error: InputError | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(slots=True)
class Chunk:
    """Consecutive records of one or more partitions, scored and committed together.

    Args:
        records: in reading order.
        starts: position of each partition before the chunk.
        ends: position of each partition after it: what is committed with it.
        owner: the reader's claim on the partitions while it read them, checked at the commit.
        replay: the records were answered before and only rebuild the state.
    """

    records: list[Record]
    starts: dict[Partition, int]
    ends: dict[Partition, int]
    owner: Any = None
    replay: bool = False


@dataclass(slots=True)
class Scored:
    """A chunk with its messages, ready to be written."""

    chunk: Chunk
    messages: list[Message]

    def only(self, partitions: Mapping[Partition, Any], owner: Any) -> Scored:
        """The part that belongs to ``partitions``, claimed by ``owner``."""
        chunk = self.chunk
        kept = {p for p in chunk.ends if p in partitions}
        return Scored(
            Chunk(
                [r for r in chunk.records if (r.topic, r.partition) in kept],
                {p: chunk.starts[p] for p in kept},
                {p: chunk.ends[p] for p in kept},
                owner,
            ),
            [m for m in self.messages if (m.record.topic, m.record.partition) in kept],
        )


class Rewind(Exception):
    """Go back to what is durable. ``cause`` is a short word for the metrics."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Poisoned(Rewind):
    """The vertical failed on a chunk and its state can no longer be trusted."""

    def __init__(self, chunk: Chunk) -> None:
        super().__init__("poison")
        self.chunk = chunk


class Source(Protocol):
    """Where chunks come from."""

    def take(self) -> Chunk | None:
        """The next chunk, or ``None`` when none came in time.

        Raises:
            Rewind: the claim on the partitions changed.
        """


class Answerer(Protocol):
    """What turns chunks into messages."""

    def score(self, chunk: Chunk) -> Scored:
        """Answer every record of a chunk.

        Raises:
            Rewind: the chunk must come again.
        """

    def observe(self, chunk: Chunk) -> None:
        """Take a replayed chunk into the state, without answers."""


class Sink(Protocol):
    """Where messages go, together with the positions they answer."""

    def write(self, scored: Scored) -> None:
        """Take a scored chunk; may return before it is durable.

        Raises:
            Rewind: an earlier chunk or this one did not become durable.
        """

    def settle(self) -> None:
        """Return when everything written is durable.

        Raises:
            Rewind: something did not become durable.
        """


def pump(
    source: Source,
    scorer: Answerer,
    sink: Sink,
    stop: threading.Event,
    *,
    recover: Callable[[Rewind], None],
    after: Callable[[Chunk | None], bool],
) -> None:
    """The one loop: take, score, write, until ``stop`` is set or ``after`` says so.

    Args:
        source: gives chunks.
        scorer: answers them.
        sink: makes answers durable.
        stop: set from outside to finish the chunk in hand and return.
        recover: settles what is in doubt and moves the source back, after a Rewind.
        after: called after every turn with the chunk or ``None``; true ends the loop. May
            itself raise Rewind.
    """
    done = False
    while True:
        try:
            if done:
                sink.settle()
                return
            chunk = source.take()
            if chunk is not None and chunk.replay:
                scorer.observe(chunk)
            elif chunk is not None:
                sink.write(scorer.score(chunk))
            done = after(chunk) or stop.is_set()
        except Rewind as why:
            recover(why)
            done = stop.is_set()
