"""Any decision again, from the log alone: the state as it was, the features, the answer.

Every answer of a vertical with state carries a header that says which records were in the state
and which were answered with it. The state is a function of these, so it can be had again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from kafka.errors import KafkaError
from kafka.structs import TopicPartition
from torch import Tensor

from plinth.engine import ConfigError, Engine, Sla
from plinth.engine.flow import Tensors
from plinth.pipelines.formats.mapping import load_mapping
from plinth.pipelines.stream.chunks import Chunk, Message, Partition, Record, StreamError
from plinth.pipelines.stream.kafka_clients import prepare, quiet_client, unreachable
from plinth.pipelines.stream.kafka_replay import Log, Replay, reader
from plinth.pipelines.stream.kafka_sink import POSITION
from plinth.pipelines.stream.processor import Processor
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals.contract import Vertical

Spans = dict[Partition, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Position:
    """What a chunk of records was answered with.

    Args:
        share: partitions that its worker read, those the input had, when keys had moved, and
            before which time the state lacked records (milliseconds since 1970; 0: neither).
        before: the records in the state, [from, to) by partition.
        chunk: the records answered together, [from, to) by partition, in their order.
    """

    share: tuple[int, int, int, int]
    before: Spans
    chunk: Spans

    @classmethod
    def read(cls, header: str, topic: str) -> Position:
        """From the header that the worker wrote.

        Raises:
            ValueError: it is not one.
        """
        share, *parts = header.split(" ")
        mine, total, grown, start = map(int, [*share.split("/"), "0", "0"][:4])
        before, chunk = {}, {}
        for part in parts:
            number, _, span = part.partition(":")
            place = Partition(topic, int(number))
            since, at, *end = map(int, span.split("-"))
            before[place] = since, at
            if end:
                chunk[place] = at, end[0]
        return cls((mine, total, grown, start), before, chunk)


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer or dead letter in the log.

    Args:
        place: partition of the record that it answers.
        offset: of that record.
        value: the answer as it was written; ``None`` for a dead letter.
        position: what it was answered with.
    """

    place: Partition
    offset: int
    value: bytes | None
    position: Position


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A decision, and what came of making it again.

    Args:
        answered: as it stands in the log.
        value: the answer now; ``None`` for a dead letter.
        rows: what the model was asked for this record alone, as lists; its features.
        why: sentences on what makes the answer another one; empty where it is the same.
    """

    answered: Answered
    value: bytes | None
    rows: Any = None
    why: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Both answers are the same, bit for bit."""
        return self.value == self.answered.value

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, the answers as they are."""
        given = self.answered
        return {
            "record": [*given.place, given.offset],
            "equal": self.equal,
            "answered": None if given.value is None else orjson.loads(given.value),
            "rebuilt": None if self.value is None else orjson.loads(self.value),
            "features": self.rows,
            "why": list(self.why),
        }


def has_value(name: str) -> Callable[[bytes | None], bool]:
    """Whether a field of an answer is ``name``, such as its id; ``*`` wants every answer."""

    def wanted(value: bytes | None) -> bool:
        if value is None or name == "*":
            return name == "*"
        fields = orjson.loads(value) if name.encode() in value else {}
        return isinstance(fields, dict) and name in map(str, fields.values())

    return wanted


def rebuild(
    vertical: Vertical[Any, Any],
    engine: Engine,
    config: StreamConfig,
    wanted: Callable[[bytes | None], bool],
    *,
    sla: Sla | None = None,
    features: bool = True,
) -> Iterator[Rebuilt]:
    """Make decisions again, as they were, from the records that were in the state.

    The log is read once as long as the decisions follow one another in it; a decision of another
    worker's state begins from the first record.

    Args:
        vertical: of the same settings and models; its state is replaced.
        engine: started, with its models.
        config: of the stream.
        wanted: told the value of every answer, ``None`` for a dead letter.
        sla: as it was asked of the engine.
        features: also ask the model for each record alone, to tell the rows.

    Raises:
        ConfigError: no broker, no topics, or no answer is wanted that says its position.
        StreamError: records that were in the state are not retained any more.
    """
    empty = vertical.snapshot()
    if empty is None:
        raise ConfigError(f"{vertical.name} has no state to rebuild: send its records again")
    prepare(config)
    chunks: dict[int, list[Answered]] = {}
    for one in _answers(config, wanted):
        chunks.setdefault(id(one.position), []).append(one)
    if not chunks:
        raise ConfigError(
            f"no such answer in {config.output_topic} says which records it was made from",
            hint="give a value of one of its fields; only answers with the header "
            f"{POSITION} can be rebuilt",
        )
    state = _State(config, vertical, engine, sla or vertical.sla, empty)
    with contextlib.closing(state):
        for group in sorted(chunks.values(), key=lambda group: _course(group[0].position)):
            yield from state.again(group, features=features)


class _State:
    """The state at a position, carried on from one to the next."""

    def __init__(
        self,
        config: StreamConfig,
        vertical: Vertical[Any, Any],
        engine: Engine,
        sla: Sla,
        empty: bytes,
    ) -> None:
        self._config = config
        self._vertical = vertical
        self._asked = _Asked(engine)
        mapping = load_mapping(config.mapping, vertical) if config.mapping else None
        self._processor = Processor(
            vertical,
            self._asked,  # type: ignore[arg-type]
            config.max_record_bytes,
            True,
            sla,
            mapping,
        )
        self._empty = empty
        self._log = Log(config)
        self._spans: dict[Partition, tuple[int, int]] = {}

    def close(self) -> None:
        """Close the reader."""
        self._log.close()

    def again(self, group: list[Answered], *, features: bool) -> Iterator[Rebuilt]:
        """Every wanted decision of one chunk."""
        position = group[0].position
        *share, start = position.share
        self._processor.see_partitions(*share)
        self._processor.see_start(start)
        self._go_to(position.before)
        records = [r for p, (at, to) in position.chunk.items() for r in self._log.take(p, at, to)]
        chunk = Chunk(
            records,
            {p: at for p, (at, _) in position.chunk.items()},
            {p: to for p, (_, to) in position.chunk.items()},
        )
        before = (self._vertical.snapshot() or b"") if features else b""
        steps = self._processor.process(chunk)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            made = {(m.record.partition, m.record.offset): m for m in end.value.messages}
        after = (self._vertical.snapshot() or b"") if features else b""
        for one in group:
            message = made.get((one.place.partition, one.offset))
            if message is None:
                raise StreamError(
                    f"not retained any more: {one.place} at {one.offset}",
                    hint="raise the input topic's retention.ms above the vertical's windows",
                )
            value = None if message.error else message.value
            rows = self._features(before, records, one) if features and value else None
            yield Rebuilt(one, value, rows, self._why(one, message))
        if features:
            self._vertical.restore(after)
        self._spans |= {p: (self._spans[p][0], to) for p, (_, to) in position.chunk.items()}

    def _why(self, given: Answered, made: Message) -> tuple[str, ...]:
        if made.error is not None:
            return () if given.value is None else (f"it is refused now: {made.error.reason}",)
        if given.value is None:
            return ("it was refused then, and is a dead letter",)
        if given.value == made.value:
            return ()
        why = self._vertical.why_other(given.value, made.value)
        grown = given.position.share[2]
        if grown:
            at = datetime.fromtimestamp(grown / 1e3, UTC).isoformat(timespec="seconds")
            why.append(f"keys of the input had moved at {at}: labels of moved payments may differ")
        return tuple(why)

    def _features(self, before: bytes, records: list[Record], one: Answered) -> Any:
        """Rows of the first call for this record alone, behind those before it."""
        self._vertical.restore(before)
        place = [(r.partition, r.offset) for r in records].index((one.place.partition, one.offset))
        self._processor.observe(Chunk(records[:place], {}, {}))
        self._asked.first = None
        for _ in self._processor.process(Chunk([records[place]], {}, {})):
            pass
        rows: Any = self._asked.first
        return rows.tolist() if isinstance(rows, Tensor) else rows

    def _go_to(self, spans: Spans) -> None:
        known = self._spans
        behind = all(
            p in spans and spans[p][0] == since and spans[p][1] >= at
            for p, (since, at) in known.items()
        )
        if not behind:
            self._vertical.restore(self._empty)
            known = {}
        ahead = {p: (known.get(p, span)[1] if p in known else span[0], span[1])
                 for p, span in spans.items()}  # fmt: skip
        for chunk in self._chunks(ahead):
            self._processor.observe(chunk)
        self._spans = dict(spans)

    def _chunks(self, spans: Spans) -> Iterator[Chunk]:
        spans = {p: span for p, span in spans.items() if span[0] < span[1]}
        if not spans:
            return
        with contextlib.closing(Replay(self._config, spans)) as replay:
            if lost := replay.lost():
                raise StreamError(
                    f"not retained any more: {lost}",
                    hint="raise the input topic's retention.ms above the vertical's windows",
                )
            while True:
                chunk = replay.take()
                if chunk is not None:
                    yield chunk
                elif not replay.partitions:
                    return


class _Asked:
    """The engine, and the rows of the first call since ``first`` was reset."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.first: Tensors | None = None

    def submit(self, call: Any, sla: Sla) -> Any:
        """As the engine does."""
        if self.first is None:
            self.first = call.rows
        return self._engine.submit(call, sla)


def _course(position: Position) -> tuple[list[tuple[Partition, int]], int]:
    """Orders positions so that those of one worker's state follow one another."""
    begins = {p: since for p, (since, _) in (position.chunk | position.before).items()}
    return sorted(begins.items()), sum(to - since for since, to in position.before.values())


def _answers(config: StreamConfig, wanted: Callable[[bytes | None], bool]) -> Iterator[Answered]:
    """Committed answers that are wanted and say their position; a chunk's share one."""
    known: dict[str, Position] = {}
    for topic in (config.output_topic, config.dead_letters):
        dead = topic == config.dead_letters
        for record in committed_records(config, topic):
            value = None if dead else record.value
            told = dict(record.headers).get(POSITION)
            if told is None or not wanted(value):
                continue
            with contextlib.suppress(ValueError, IndexError):  # somebody else's header
                where, _, position = told.decode().partition(";")
                partition, offset = map(int, where.split("@"))
                if position not in known:
                    known[position] = Position.read(position, config.input_topic)
                place = Partition(config.input_topic, partition)
                yield Answered(place, offset, value, known[position])


def newest(config: StreamConfig, count: int) -> Iterator[Record]:
    """About so many of the newest records of the input, in no group; nothing is committed.

    Raises:
        ConfigError: no broker, or no such topic.
    """
    yield from _read_topic(config, config.input_topic, count)


def committed_records(config: StreamConfig, topic: str) -> Iterator[Any]:
    """All committed records that a topic holds, partition by partition in order.

    Raises:
        ConfigError: no broker, or no such topic.
    """
    yield from _read_topic(config, topic)


def _read_topic(config: StreamConfig, topic: str, count: int | None = None) -> Iterator[Any]:
    with quiet_client() as heard:
        try:
            consumer = reader(config)
        except (KafkaError, OSError, ValueError) as error:
            raise unreachable(config, error, heard) from None
    with contextlib.closing(consumer):
        places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        if not places:
            raise ConfigError(f"there is no topic {topic} on {config.bootstrap_servers}")
        most = None if count is None else -(-count // len(places))
        yield from _to_the_end(consumer, config, places, most)


def _to_the_end(
    consumer: Any, config: StreamConfig, places: list[Any], most: int | None = None
) -> Iterator[Any]:
    """What partitions hold, or the newest offsets of each."""
    consumer.assign(places)
    timeout_ms = config.commit_timeout_ms
    ends = consumer.end_offsets(places, timeout_ms=timeout_ms)
    consumer.seek_to_beginning(*places)
    for p in places if most is not None else ():
        first = consumer.position(p, timeout_ms=timeout_ms) or 0
        consumer.seek(p, max(first, ends[p] - (most or 0)))
    while any((consumer.position(p, timeout_ms=timeout_ms) or 0) < ends[p] for p in places):
        for records in consumer.poll(500).values():
            yield from records
