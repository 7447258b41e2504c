"""Reading retained input again, to rebuild state without answering it a second time."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from kafka import KafkaConsumer
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.structs import TopicPartition

from plinth.pipelines.formats.registry import RegistryAway
from plinth.pipelines.stream.checkpoint import Checkpoint
from plinth.pipelines.stream.chunks import Chunk, Partition, Record, StreamError
from plinth.pipelines.stream.kafka_clients import (
    AbandonableThread,
    Pending,
    connect,
    quiet_client,
)
from plinth.pipelines.stream.metrics import REBUILD
from plinth.pipelines.stream.processor import Processor
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

POLL_MS = 50
POLL_RECORDS = 2_000
MAX_HELD = 50_000
STEP_RECORDS = 2_000
"""Of those that are given at once: a state is made in steps, between which others are served."""
TOLD_S = 5.0
"""How often the log tells how much of a past was read."""
SILENCE_S = 5.0
ANSWER_MS = 10_000
GIVE_UP_S = 30.0
MAX_AHEAD = 20_000
"""Records of a partition that are held while those of another are taken."""
FOLLOW_S = 1.0
"""How often a standby asks what the group has committed."""
LOOK_S = 30.0
"""How often a worker looks at a partition that another one reads."""
LOOK_RECORDS = 200
LOOK_SECONDS = 2.0
AGAIN_S = 0.05
"""How often it looks whether the worker has ended."""
Plan = dict[Partition, tuple[int, int]]
"""What is to be read again, [from, to), of each partition that is served then."""


class Replay:
    """Reads [from, to) of some partitions, merged by record timestamp.

    The order between partitions is that of the timestamps; within one it is the log's own, and
    where timestamps go back there, the latest before counts.

    Args:
        config: which Kafka.
        ranges: [from, to) by partition, none of them empty.
    """

    def __init__(self, config: StreamConfig, ranges: Mapping[Partition, tuple[int, int]]) -> None:
        self._ends = {place: to for place, (_, to) in ranges.items()}
        self._at = {place: start for place, (start, _) in ranges.items()}
        self._held: dict[Partition, deque[_Held]] = {place: deque() for place in ranges}
        self._merged: deque[Record] = deque()
        self._latest = dict.fromkeys(ranges, -1)
        self._heard = time.monotonic()
        self._consumer = reader(config)
        self._consumer.assign([TopicPartition(*place) for place in ranges])
        for place, start in self._at.items():
            self._consumer.seek(TopicPartition(*place), start)

    def lost(self) -> list[tuple[Partition, int]]:
        """Partitions whose first records are not retained any more, and where they begin now.

        Raises:
            KafkaError: the broker did not answer in time.
        """
        places = [TopicPartition(*place) for place in self._at]
        first = self._consumer.beginning_offsets(places, timeout_ms=ANSWER_MS)
        return [
            (p, first[TopicPartition(*p)])
            for p, at in self._at.items()
            if first[TopicPartition(*p)] > at
        ]

    def fits(self, spans: Mapping[Partition, tuple[int, int]]) -> bool:
        """Whether :meth:`further` can go on with these: all was taken up to where they begin."""
        return not self._ends and all(self._at.get(p) == start for p, (start, _) in spans.items())

    def further(self, ends: Mapping[Partition, int]) -> None:
        """Read on to new ends, once all was taken; some or all of the same partitions."""
        self._heard = time.monotonic()
        for place, to in ends.items():
            if to > self._at[place]:
                self._ends[place] = to
                self._consumer.seek(TopicPartition(*place), self._at[place])

    @property
    def partitions(self) -> int:
        """Partitions not read to their end yet; 1 where they are, and something is to be taken."""
        return len(self._ends) or int(bool(self._merged))

    def take(self, limit: int = STEP_RECORDS) -> Chunk | None:
        """The next records in order, or ``None`` when none came in time.

        Args:
            limit: so many at most.

        Raises:
            KafkaError: reading failed, or nothing came for long though there is more.
        """
        if not self._merged:
            if any(not self._held[place] for place in self._ends):
                self._poll()
            full = sum(map(len, self._held.values())) >= MAX_HELD
            if not full and any(not self._held[place] for place in self._ends):
                return None
            self._merge(everything=full)
        return self._step(limit) if self._merged else None

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
                self._hold(place, (r for r in records if r.offset < end))
                if records[-1].offset + 1 >= end:
                    self._end(place)
        if now - self._heard > SILENCE_S / 10:
            self._look(now - self._heard > SILENCE_S)

    def _hold(self, place: Partition, records: Iterable[Record]) -> None:
        latest, held = self._latest[place], self._held[place]
        for record in records:
            latest = max(latest, record.timestamp)
            held.append(_Held(latest, record))
        self._latest[place] = latest

    def _look(self, long: bool) -> None:
        """End the partitions whose last records are transaction markers or were deleted."""
        for place, end in list(self._ends.items()):
            known = TopicPartition(*place)
            at = self._consumer.position(known, timeout_ms=200)
            if at is not None and at >= end:
                self._end(place)
            elif long:
                there = self._consumer.end_offsets([known], timeout_ms=ANSWER_MS)[known]
                if there >= end:  # a state without these records would be a wrong one
                    raise KafkaTimeoutError(
                        f"{place.topic}[{place.partition}]: nothing came for {SILENCE_S:g} s "
                        f"before offset {end}, and the log goes on to {there}"
                    )
                log.error(
                    "%s[%d]: the log ends at offset %d, and was read up to %d before: its last "
                    "records are lost", *place, there, end,
                )  # fmt: skip
                self._end(place)

    def _end(self, place: Partition) -> None:
        del self._ends[place]

    def _merge(self, *, everything: bool) -> None:
        waiting = [self._latest[place] for place in self._ends if self._held[place]]
        until = None if everything or not waiting else min(waiting)
        records: list[_Held] = []
        for held in self._held.values():
            while held and (until is None or held[0].time <= until):
                records.append(held.popleft())
        records.sort(key=_time)  # stable, and within a partition these never go back
        self._merged.extend(one.record for one in records)

    def _step(self, limit: int) -> Chunk:
        records = [self._merged.popleft() for _ in range(min(limit, len(self._merged)))]
        starts: dict[Partition, int] = {}
        ends: dict[Partition, int] = {}
        for record in records:
            place = Partition(record.topic, record.partition)
            starts.setdefault(place, self._at[place])
            ends[place] = record.offset + 1
        self._at |= ends
        return Chunk(records, starts, ends, None, True)


class Past:
    """What a worker reads again for its state before it serves its partitions.

    First what is missing of partitions that it knows; these are then served while it reads those
    that it does not know.

    Args:
        config: which Kafka.
        plan: [from, to) by partition, which may be empty.
        unknown: partitions with a long past.

    Attributes:
        count: offsets that are read again, of all partitions.
    """

    def __init__(
        self, config: StreamConfig, plan: Plan, unknown: Set[Partition] = frozenset()
    ) -> None:
        again = {place: span for place, span in plan.items() if span[0] < span[1]}
        near = {place: span for place, span in again.items() if place not in unknown}
        far = {place: span for place, span in again.items() if place in unknown}
        stages = (near, frozenset(plan)), (far, frozenset(far))
        self._config = config
        self._stages = deque(stage for stage in stages if stage[0])
        self._replay: Replay | None = None
        self._taken = 0
        self.count = sum(to - start for start, to in again.values())
        self._began = self._told = self._turned = time.monotonic()
        self._ahead = 0.0
        self._last: Chunk | None = None
        self._tell(self._began)

    @property
    def waiting(self) -> Set[Partition]:
        """Partitions that are not served yet."""
        return self._stages[0][1] if self._stages else frozenset()

    @property
    def partitions(self) -> int:
        """Partitions not read to their end yet."""
        if self._replay is None:
            return sum(len(plan) for plan, _ in self._stages)
        return self._replay.partitions + sum(len(plan) for plan, _ in list(self._stages)[1:])

    def in_turns(self, due: Callable[[], Chunk | None], limit: int) -> Chunk | None:
        """What is due, or what is read again next: where there is both, half of the time each.

        Args:
            due: gives records that are due, at once, or ``None``.
            limit: records that are read again at most.

        Raises:
            KafkaError: as :meth:`Replay.take`.
        """
        spent = time.monotonic() - self._turned
        if self._last is not None:
            self._ahead += -spent if self._last.replay else spent
        self._last = None
        if self._ahead <= 0 and (found := due()) is not None:
            self._last = found
        else:
            self._ahead = max(self._ahead, 0.0)
            self._last = self._take(limit)
        self._turned = time.monotonic()
        return self._last

    def _take(self, limit: int) -> Chunk | None:
        if self._replay is None:
            self._replay = Replay(self._config, self._stages[0][0])
        chunk = self._replay.take(limit)
        if chunk is not None:
            self._taken += len(chunk.records)
        elif not self._replay.partitions:
            self.close()
            self._stages.popleft()
        now = time.monotonic()
        if now - self._told >= TOLD_S or not self._stages:
            self._tell(now)
        return chunk

    def _tell(self, now: float) -> None:
        """Say how far it is."""
        self._told = now
        left = max(0, self.count - self._taken) if self._stages else 0
        REBUILD.labels(self._config.input_topic).set(left)
        if self.count:
            log.info(
                "%d of %d records were read again for the state, in %.1f s%s", self._taken,
                self.count, now - self._began, "" if self._stages else ": all that there are",
            )  # fmt: skip

    def close(self) -> None:
        """Read no further."""
        if self._replay is not None:
            self._replay.close()
            self._replay = None


class _Held(NamedTuple):
    """A record, and the latest timestamp of its partition up to it."""

    time: int
    record: Record


_time = attrgetter("time")


class Log:
    """Reads spans of partitions, mostly one behind the other."""

    def __init__(self, config: StreamConfig) -> None:
        self._consumer = reader(config)
        self._held: dict[Partition, deque[Record]] = {}
        self._at: dict[Partition, int] = {}
        self._next: dict[Partition, int] = {}
        self._read_now: set[Partition] = set()

    def take(self, place: Partition, start: int, to: int) -> list[Record]:
        """The records in [start, to) of a partition that are still there.

        Raises:
            KafkaError: the broker did not answer in time.
            StreamError: nothing came, though there must be more.
        """
        if self._at.get(place) != start:
            self._begin(place, start)
        known, held, found = TopicPartition(*place), self._held[place], []
        heard = time.monotonic()
        while True:
            while held and held[0].offset < to:
                found.append(held.popleft())
            if held:
                break
            self._assign(self._read_now | {place})
            if (self._consumer.position(known, timeout_ms=ANSWER_MS) or 0) >= to:
                break
            if self._read(place):
                heard = time.monotonic()
            elif time.monotonic() - heard > GIVE_UP_S:
                raise StreamError(
                    f"{place.topic}[{place.partition}]: nothing came for {GIVE_UP_S:g} s before "
                    f"offset {to}",
                    hint="check the brokers, and begin again",
                )
        self._at[place] = to
        return found

    def _begin(self, place: Partition, start: int) -> None:
        self._held[place] = deque()
        self._at[place] = self._next[place] = start
        self._assign(self._read_now - {place})

    def _assign(self, places: set[Partition]) -> None:
        """Read these from behind what is held of them.

        Not by ``pause`` and ``resume``: kafka-python keeps what it has read of a paused partition,
        and gives it out only while it has read nothing of another one (3.0.12).
        """
        if places == self._read_now:
            return
        self._consumer.assign([TopicPartition(*place) for place in places])
        for place in places - self._read_now:
            self._consumer.seek(TopicPartition(*place), self._next[place])
        self._read_now = places

    def _read(self, place: Partition) -> bool:
        """Take what has come, of whichever partition; whether some is of this one."""
        most = {p: MAX_AHEAD if p in self._read_now else MAX_AHEAD // 2 for p in self._held}
        self._assign({p for p, held in self._held.items() if len(held) < most[p]} | {place})
        polled = self._consumer.poll(POLL_MS, max_records=POLL_RECORDS)
        for p, records in polled.items():
            self._held[Partition(*p)].extend(records)
            self._next[Partition(*p)] = records[-1].offset + 1
        return bool(polled.get(TopicPartition(*place)))

    def close(self) -> None:
        """Close the reader."""
        self._consumer.close(autocommit=False, timeout_ms=1_000)


class Elsewhere:
    """Takes a look at partitions that other workers read, one after the other, on a thread."""

    def __init__(self, config: StreamConfig) -> None:
        self._config = config
        self._looking: Pending[list[Record]] | None = None
        self._turn = 0
        self._at = -LOOK_S

    def take(self, others: Sequence[int]) -> list[Record]:
        """What was found since the last call; begins to look again where it is time.

        Args:
            others: numbers of the partitions, at least one.
        """
        found: list[Record] = []
        if self._looking is not None and self._looking.done(0.0):
            looked, self._looking = self._looking, None
            try:
                found = looked.wait(0.0)
            except (KafkaError, OSError, ValueError, KeyError) as error:
                log.debug("a look at other partitions failed and is tried again: %r", error)
        now = time.monotonic()
        if self._looking is None and now - self._at >= LOOK_S:
            self._at, self._turn = now, self._turn + 1
            place = TopicPartition(self._config.input_topic, others[self._turn % len(others)])
            thread = AbandonableThread("plinth-elsewhere")
            self._looking = thread.start(partial(_latest, self._config, place))
            thread.close()
        return found


def _latest(config: StreamConfig, place: TopicPartition) -> list[Record]:
    """The last committed records of a partition, a few at most, or what came of them in time."""
    with contextlib.closing(reader(config)) as consumer:
        consumer.assign([place])
        (end,) = consumer.end_offsets([place], timeout_ms=ANSWER_MS).values()
        (first,) = consumer.beginning_offsets([place], timeout_ms=ANSWER_MS).values()
        consumer.seek(place, max(first, end - LOOK_RECORDS))
        records: list[Record] = []
        until = time.monotonic() + LOOK_SECONDS
        while (consumer.position(place, timeout_ms=1_000) or 0) < end and time.monotonic() < until:
            for part in consumer.poll(POLL_MS).values():
                records.extend(part)
    return records


def reader(config: StreamConfig) -> Any:
    """A consumer outside of any group."""
    return connect(
        KafkaConsumer,
        **config.client_options(),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        metrics_enabled=False,
        allow_auto_create_topics=False,
    )


class Standby:
    """Keeps the state of a worker close behind it, from its snapshot and the log.

    Called again and again while the worker lives; then whoever called it has the worker's state
    and goes on behind a few records.

    Args:
        config: of the worker.
        checkpoint: of the same vertical and folder.
        processor: observes what the worker has committed.
        stop: nobody is needed any more.
    """

    def __init__(
        self,
        config: StreamConfig,
        checkpoint: Checkpoint,
        processor: Processor,
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._processor = processor
        self._stop = stop
        self._replay: Replay | None = None
        self._asked = 0.0

    def __call__(self) -> None:
        """Follow for a moment.

        Raises:
            NotNeeded: the standby was told to stop.
        """
        if self._stop.wait(0.0 if self._behind else AGAIN_S):
            raise NotNeeded
        try:
            self._follow()
        except (KafkaError, OSError, ValueError, RegistryAway) as error:
            log.debug("following the worker failed and is tried again: %r", error)
            self.close()
            self._asked = time.monotonic()

    @property
    def _behind(self) -> bool:
        return self._replay is not None and self._replay.partitions > 0

    def close(self) -> None:
        """Close the reader."""
        if self._replay is not None:
            self._replay.close()
            self._replay = None

    def _follow(self) -> None:
        if self._replay is not None and (chunk := self._replay.take()) is not None:
            self._processor.observe(chunk)
            self._checkpoint.observed(chunk)
        elif not self._behind and time.monotonic() - self._asked > FOLLOW_S:
            self._asked = time.monotonic()
            self._look_further()

    def _look_further(self) -> None:
        checkpoint = self._checkpoint
        if not checkpoint.follow():
            return
        applied, committed = checkpoint.applied, self._committed()
        # others have the rest, or the worker has not come to their ends yet
        near = {p: at for p, at in applied.items() if p not in checkpoint.stale}
        spans = {p: (at, committed.get(p, at)) for p, at in near.items()}
        spans = {p: span for p, span in spans.items() if span[0] < span[1]}
        if not spans:
            return
        if self._replay is None or not self._replay.fits(spans):
            self.close()
            self._replay = Replay(self._config, spans)
            for place, first in self._replay.lost():
                checkpoint.missed(place, first)
        else:
            self._replay.further({p: to for p, (_, to) in spans.items()})

    def _committed(self) -> dict[Partition, int]:
        group = self._config.group
        with (
            quiet_client(),
            contextlib.closing(connect(KafkaAdminClient, **self._config.client_options())) as admin,
        ):
            found = admin.list_group_offsets(group)[group]
        return {Partition(*place): known.offset for place, known in found.items()}


class NotNeeded(Exception):
    """A standby was told to stop before the worker ended."""
