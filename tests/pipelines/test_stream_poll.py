"""How long a chunk waits for more records: not at all, unless one is being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any

import pytest

from plinth.pipelines.stream.chunks import Partition, Record
from plinth.pipelines.stream.confluent import Fetched
from plinth.pipelines.stream.kafka_clients import Client
from plinth.pipelines.stream.kafka_consumer import GroupConsumer
from plinth.pipelines.stream.settings import StreamConfig

pytestmark = pytest.mark.needs("confluent_kafka")
P = Partition("in", 0)


class Source:
    """A member that is given records poll by poll; what it is not asked about it does not have."""

    width = 1

    def __init__(self, *polls: int) -> None:
        self._sizes = deque(polls)
        self._at = 0

    def poll(self, seconds: float, limit: int) -> Mapping[Partition, list[Record]]:
        size = min(limit, self._sizes.popleft() if self._sizes else 0)
        self._at += size
        numbers = range(self._at - size, self._at)
        return {P: [Fetched("in", 0, n, 0, None, b"", ()) for n in numbers]} if size else {}

    def owner(self) -> object:
        return self

    def claim(self, owner: object) -> Hashable:
        return 1

    def places(self) -> list[Partition]:
        return [P]

    def begin(self, positions: Mapping[Partition, int]) -> bool:
        return True


def polled(source: Source, written: list[bool], **settings: Any) -> list[int]:
    """Offsets of the chunk, while the one before is or is not being written, look by look."""
    config = StreamConfig(input_topic="in", output_topic="out", linger_ms=5_000, **settings)
    made: Any = lambda *_: source  # noqa: E731
    client = Client("source", made, made)
    consumer = GroupConsumer(config, "me", client)
    consumer.begin({P: (0, 0)}, source)
    chunk = consumer.poll(lambda seconds: written.pop(0))
    return [] if chunk is None else [record.offset for record in chunk.records]


def test_a_lone_record_is_not_kept_waiting() -> None:
    assert polled(Source(1, 1), [True]) == [0]


def test_what_comes_while_the_chunk_before_is_written_goes_with_it() -> None:
    looks = [False, False, False, True]
    assert polled(Source(1, 0, 2, 1, 7), looks) == [0, 1, 2, 3]
    assert not looks


def test_a_full_chunk_waits_for_nothing_and_no_record_makes_none() -> None:
    assert polled(Source(4, 4), [False], max_records=4) == [0, 1, 2, 3]
    assert polled(Source(2, 9), [False, False], max_records=4) == [0, 1, 2, 3]
    assert polled(Source(0, 3), []) == []
