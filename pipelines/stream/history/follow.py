"""Decisions of stream workers as they are committed: a desk reads them from the audit topic.

It reads what is committed, in no group, and holds nothing: what a vertical's queries remember of
it, they bound themselves. A broker that is away is waited for; the server it belongs to serves on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from plinth.engine import InputError, PlinthError, Refused
from plinth.pipelines.records import FAULTS
from plinth.pipelines.stream.kafka_clients import connect, quiet_client
from plinth.pipelines.stream.kafka_replay import reader
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals import Vertical

log = logging.getLogger("plinth.desk")

MOST = 5_000
"""Records behind which it does not fall: older ones are passed over, at a start as well."""
PIECE = 50
"""Records that are handed over at once: a few milliseconds of the thread that takes them."""
POLL_MS = 200
LOOK_SECONDS = 5.0
"""How often it looks how far behind it is, and whether there are new partitions."""
AGAIN_SECONDS = (1.0, 30.0)
"""The first pause before a broker is asked again, and the longest."""
WRITE_SECONDS = 10.0
"""For one record to be taken by the broker."""


@dataclass(frozen=True, slots=True)
class Following:
    """How far it has come.

    Args:
        topic: that is read.
        heard: decisions taken in.
        passed_over: that were too far behind.
        unusable: records that no vertical here could take in.
        away: why nothing is read now, if so.
    """

    topic: str
    heard: int = 0
    passed_over: int = 0
    unusable: int = 0
    away: str | None = "not read yet"


class StreamAway(Refused):
    """The broker did not take a record in time; nothing is known to be written."""

    reason = "stream_away"


class Follower:
    """Reads the audit topic on a thread, and hands what is in it to the verticals.

    Args:
        config: has an audit topic.
        verticals: that hear what others decided, by name.

    Attributes:
        told: how far it has come.
    """

    def __init__(
        self,
        config: StreamConfig,
        verticals: Mapping[str, Vertical[Any, Any]],
    ) -> None:
        assert config.audit_topic is not None
        self.told = Following(config.audit_topic)
        self._config, self._verticals = config, verticals
        self._deliver: Callable[[Callable[[], None]], object] = lambda work: work()
        self._at: dict[TopicPartition, int] = {}
        self._pause = AGAIN_SECONDS[0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plinth-desk", daemon=True)

    def start(self, deliver: Callable[[Callable[[], None]], object]) -> None:
        """Begin to read; ``deliver`` runs a function where the verticals' queries run."""
        self._deliver = deliver
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Read no more; waits so long for the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with quiet_client(), closing(reader(self._config)) as consumer:
                    self._follow(consumer)
            except (KafkaError, OSError, PlinthError) as error:
                if self.told.away != _named(error):
                    log.warning("%s is not read: %s", self.told.topic, _named(error))
                self.told = replace(self.told, away=_named(error))
                self._stop.wait(self._pause)
                self._pause = min(2 * self._pause, AGAIN_SECONDS[1])

    def _follow(self, consumer: Any) -> None:
        """Read until told to stop, or until there are other partitions."""
        topic = self.told.topic
        known = consumer.partitions_for_topic(topic)
        if not known:
            raise InputError(f"there is no topic {topic}, or it may not be read")
        places = [TopicPartition(topic, number) for number in sorted(known)]
        consumer.assign(places)
        self._take_places(consumer, places)
        for place in places:
            consumer.seek(place, self._at[place])
        self.told, self._pause = replace(self.told, away=None), AGAIN_SECONDS[0]
        looked = time.monotonic()
        while not self._stop.is_set():
            for records in consumer.poll(POLL_MS, max_records=PIECE).values():
                self._hand_over(records)
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                if consumer.partitions_for_topic(topic) != known:
                    return
                self._take_places(consumer, places)

    def _take_places(self, consumer: Any, places: list[TopicPartition]) -> None:
        """Go on where it was, but not too far behind the end."""
        ends = consumer.end_offsets(places, timeout_ms=10_000)
        begins = consumer.beginning_offsets(places, timeout_ms=10_000)
        for place in places:
            new = place not in self._at
            at = max(self._at.get(place, begins[place]), begins[place])
            nearest = ends[place] - MOST // len(places)
            if at < nearest:
                passed = self.told.passed_over + (0 if new else nearest - at)
                self.told = replace(self.told, passed_over=passed)
                at = nearest
            if self._at.get(place) != at:
                self._at[place] = at
                consumer.seek(place, at)

    def _hand_over(self, records: list[Any]) -> None:
        place = TopicPartition(records[0].topic, records[0].partition)
        read = [told for record in records if (told := self._read(record.value)) is not None]
        taken = Future[int]()

        def take() -> None:
            taken.set_result(sum(self._heard(vertical, told) for vertical, told in read))

        self._deliver(take)
        while not self._stop.is_set():
            try:
                heard = taken.result(POLL_MS / 1e3)
            except NotInTime:
                continue
            now = self.told
            wrong = now.unusable + len(records) - heard
            self.told = replace(now, heard=now.heard + heard, unusable=wrong)
            self._at[place] = records[-1].offset + 1
            return

    def _read(self, raw: bytes | None) -> tuple[Vertical[Any, Any], dict[str, Any]] | None:
        """An audit record, and the vertical it is of."""
        if raw is None or len(raw) > self._config.max_record_bytes:
            return None
        try:
            told = orjson.loads(raw)
            name = told["software"].partition(" ")[0]
            return self._verticals[name], told
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _heard(self, vertical: Vertical[Any, Any], told: dict[str, Any]) -> bool:
        try:
            vertical.heard(told, self._writer(str(told.get("chain"))))
        except InputError:
            return False
        except FAULTS as error:
            log.error("%s could not hear a decision: %s", vertical.name, type(error).__name__)
            return False
        return True

    def _writer(self, chain: str) -> Callable[[bytes], None] | None:
        """Writes a record to where the one of this chain came from; none: it would not be read.

        A stream with a mapping reads messages of somebody else's form.
        """
        topic, _, number = chain.rstrip("]").rpartition("[")
        if self._config.mapping is not None or not topic or not number.isdecimal():
            return None
        return lambda raw: write(self._config, TopicPartition(topic, int(number)), raw)


def write(config: StreamConfig, place: TopicPartition, raw: bytes) -> None:
    """Write a record to a partition, and wait until the broker has it.

    Raises:
        StreamAway: it is not known to be written.
    """
    options = config.client_options()
    seconds = round(WRITE_SECONDS * 1e3)
    try:
        with quiet_client():
            producer = connect(
                KafkaProducer, **options, acks="all", max_block_ms=seconds, metrics_enabled=False
            )
            with closing(producer):
                producer.send(place.topic, raw, partition=place.partition).get(WRITE_SECONDS)
    except (KafkaError, OSError, AssertionError) as error:
        raise StreamAway(
            f"{place.topic} did not take the record: {_named(error)}",
            hint="nothing was noted; try again",
            retry_after=5.0,
        ) from None


def _named(error: BaseException) -> str:
    return error.message if isinstance(error, PlinthError) else type(error).__name__
