"""Reading retained input again, to rebuild state without answering it a second time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from plinth.pipelines.stream.chunks import Chunk, Partition, Record
from plinth.pipelines.stream.kafka_clients import connect
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

POLL_MS = 200
POLL_RECORDS = 2_000
MAX_HELD = 50_000
SILENCE_S = 5.0


class Replay:
    """Reads [from, to) of some partitions, merged by record timestamp.

    The order between partitions is that of the timestamps; within one it is the log's own.

    Args:
        config: which Kafka.
        ranges: [from, to) by partition, none of them empty.
    """

    def __init__(self, config: StreamConfig, ranges: Mapping[Partition, tuple[int, int]]) -> None:
        self._ends = {place: to for place, (_, to) in ranges.items()}
        self._at = {place: start for place, (start, _) in ranges.items()}
        self._held: dict[Partition, deque[Record]] = {place: deque() for place in ranges}
        self._heard = time.monotonic()
        self._consumer = connect(
            KafkaConsumer,
            **config.client(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            metrics_enabled=False,
            allow_auto_create_topics=False,
        )
        self._consumer.assign([TopicPartition(*place) for place in ranges])
        for place, start in self._at.items():
            self._consumer.seek(TopicPartition(*place), start)

    @property
    def partitions(self) -> int:
        """Partitions not read to their end yet."""
        return len(self._ends)

    def take(self) -> Chunk | None:
        """The next records in order, or ``None`` when none came in time.

        Raises:
            KafkaError: reading failed.
        """
        if any(not self._held[place] for place in self._ends):
            self._poll()
        full = sum(map(len, self._held.values())) >= MAX_HELD
        if not full and any(not self._held[place] for place in self._ends):
            return None
        return self._merge(everything=full)

    def close(self) -> None:
        """Close the reader."""
        try:
            self._consumer.close(autocommit=False, timeout_ms=1_000)
        except KafkaError as error:
            log.debug("a reader of the past did not close cleanly: %r", error)

    def _poll(self) -> None:
        now = time.monotonic()
        polled = self._consumer.poll(POLL_MS, max_records=POLL_RECORDS)
        for raw, records in polled.items():
            place = Partition(*raw)
            end = self._ends.get(place)
            if end is not None:
                self._heard = now
                self._held[place].extend(r for r in records if r.offset < end)
                if records[-1].offset + 1 >= end:
                    self._end(place)
        if now - self._heard > SILENCE_S / 10:
            self._look(now - self._heard > SILENCE_S)

    def _look(self, give_up: bool) -> None:
        """End the partitions whose last records are transaction markers or were deleted."""
        for place, end in list(self._ends.items()):
            at = self._consumer.position(TopicPartition(*place), timeout_ms=200)
            if at is not None and at >= end:
                self._end(place)
            elif give_up:
                log.warning("%s[%d]: nothing more to read before offset %d", *place, end)
                self._end(place)

    def _end(self, place: Partition) -> None:
        del self._ends[place]

    def _merge(self, *, everything: bool) -> Chunk | None:
        waiting = [self._held[place][-1].timestamp for place in self._ends if self._held[place]]
        until = None if everything or not waiting else min(waiting)
        records: list[Record] = []
        starts: dict[Partition, int] = {}
        ends: dict[Partition, int] = {}
        for place, held in self._held.items():
            before = len(records)
            while held and (until is None or held[0].timestamp <= until):
                records.append(held.popleft())
            if len(records) > before:
                starts[place] = self._at[place]
                ends[place] = self._at[place] = records[-1].offset + 1
        # stable, so each partition keeps its own order where its timestamps go back
        records.sort(key=_timestamp)
        return Chunk(records, starts, ends, None, True) if records else None


def _timestamp(record: Any) -> int:
    return int(record.timestamp)
