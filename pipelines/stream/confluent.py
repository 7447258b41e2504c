"""The client confluent-kafka, on librdkafka in C: the extra ``[kafka-fast]``.

Its errors become those of kafka-python. It has deadlines of its own for every call, and its
transactions fail when a message in them was not written.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from functools import partial
from operator import methodcaller
from threading import Thread
from typing import Any, NamedTuple

from confluent_kafka import (
    Consumer,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka import KafkaError as Failure
from kafka import KafkaConsumer
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    OffsetOutOfRangeError,
    ProducerFencedError,
    for_code,
)
from kafka.structs import TopicPartition as KnownPartition

from plinth.pipelines.stream.chunks import Partition, Record
from plinth.pipelines.stream.kafka_clients import (
    HEADROOM,
    RETRY_BACKOFF_MS,
    AbandonableThread,
    Client,
    Noted,
    Pending,
    connect,
)
from plinth.pipelines.stream.kafka_python import Asks, asking
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

GONE = {
    Failure._AUTO_OFFSET_RESET,
    Failure.OFFSET_OUT_OF_RANGE,
}
PASSING = {
    *(Failure._ALL_BROKERS_DOWN, Failure._TRANSPORT, Failure._RESOLVE, Failure._TIMED_OUT),
    *(Failure._MAX_POLL_EXCEEDED, Failure.UNKNOWN_TOPIC_OR_PART, Failure._UNKNOWN_PARTITION),
    *(Failure._NO_OFFSET, Failure._WAIT_COORD, Failure.COORDINATOR_LOAD_IN_PROGRESS),
}
"""Faults of reading that end by themselves, or that the run loop finds out by asking."""
WIDTH_S = 5.0
"""Longest wait for the number of partitions of a topic."""
CLOSE_S = 3.0
PURGED = {Failure._PURGE_QUEUE, Failure._PURGE_INFLIGHT}
"""What is told of messages of a transaction that failed for another cause."""
TOLD_S = 0.1
"""Longest wait for what is told of a message that failed."""
LOOK_S = 0.5
"""How long a commit is waited for before it is seen whether its producer was given up."""


class Fetched(NamedTuple):
    """A record as it came: a :class:`Record`."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Any


class Owner(NamedTuple):
    """A membership: what commits need, and how often the partitions were given or taken."""

    metadata: Any
    turns: int


@contextlib.contextmanager
def _as_kafka_errors() -> Iterator[None]:
    """Its errors as kafka-python's."""
    try:
        yield
    except KafkaException as error:
        raise _translated(error.args[0]) from None


def _translated(error: Any) -> KafkaError:
    code, text = error.code(), f"{error.name()}: {error.str()}"
    if code in GONE:
        return OffsetOutOfRangeError(text)
    if code == Failure._FENCED:
        return ProducerFencedError(text)
    if code in (Failure._TIMED_OUT, Failure._MSG_TIMED_OUT):
        return KafkaTimeoutError(text)
    found: KafkaError = for_code(code)(text) if code > 0 else KafkaError(text)
    return found


def _said(error: Any) -> None:
    log.debug("librdkafka: %s", error)


def has_kerberos() -> bool:
    """Whether this librdkafka was built with GSSAPI."""
    try:
        Producer({"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "GSSAPI"})
    except KafkaException:
        return False
    return True


def _options(config: StreamConfig, identity: str) -> dict[str, Any]:
    """What every client is told, in librdkafka's words."""
    given = config.client_options()
    options: dict[str, Any] = {
        "bootstrap.servers": ",".join(given["bootstrap_servers"]),
        "client.id": f"plinth-{identity}",
        "security.protocol": given["security_protocol"],
        "reconnect.backoff.max.ms": given["reconnect_backoff_max_ms"],
        "retry.backoff.ms": RETRY_BACKOFF_MS,
        "retry.backoff.max.ms": 10 * RETRY_BACKOFF_MS,
        "topic.metadata.refresh.interval.ms": config.metadata_max_age_ms,
        "allow.auto.create.topics": False,
        "error_cb": _said,
        "logger": log,
    }
    names = {
        "sasl_mechanism": "sasl.mechanism",
        "sasl_kerberos_service_name": "sasl.kerberos.service.name",
        "sasl_plain_username": "sasl.username",
        "sasl_plain_password": "sasl.password",
        "ssl_cafile": "ssl.ca.location",
        "ssl_certfile": "ssl.certificate.location",
        "ssl_keyfile": "ssl.key.location",
        "ssl_password": "ssl.key.password",
    }
    options |= {word: given[name] for name, word in names.items() if given.get(name) is not None}
    if (tokens := given.get("sasl_oauth_token_provider")) is not None:
        options["oauth_cb"] = tokens.with_end
    if "ssl_check_hostname" in given:
        checked = "https" if given["ssl_check_hostname"] else "none"
        options["ssl.endpoint.identification.algorithm"] = checked
    return options


class _Widths:
    """How many partitions topics have; asked again from time to time, on a thread."""

    def __init__(self, handle: Any, max_age: float) -> None:
        self._handle = handle
        self._max_age = max_age
        self._known: dict[str, int] = {}
        self._asked: dict[str, float] = {}

    def of(self, topic: str) -> int:
        """As it is known; waits only for the first answer."""
        if topic not in self._known:
            with _as_kafka_errors():
                return self.ask(topic)
        if time.monotonic() - self._asked[topic] > self._max_age:
            self.start(topic)
        return self._known[topic]

    def start(self, topic: str) -> Pending[int]:
        """Ask on a thread."""
        self._asked[topic] = time.monotonic()
        thread = AbandonableThread("plinth-metadata")
        pending = thread.start(partial(self.ask, topic))
        thread.close()
        return pending

    def ask(self, topic: str) -> int:
        """As the brokers say now; 0 where the topic is not there."""
        self._asked[topic] = time.monotonic()
        found = len(self._handle.list_topics(topic, timeout=WIDTH_S).topics[topic].partitions)
        if found:
            self._known[topic] = found
        return found


class ConfluentMember(Asks):
    """A member of the group by librdkafka's consumer; questions go through kafka-python's.

    They need a connection of their own, or each waits for the fetch before it; and confluent-kafka
    2.16 reads the note beside an offset beyond its end, with whatever stands there in memory.

    Librdkafka asks the program before it gives partitions away or takes new ones, and only in a
    poll; so what :meth:`owner` says after a poll is the membership under which records were read.
    """

    def __init__(
        self,
        config: StreamConfig,
        identity: str,
        joined: Callable[[], None],
        held: Set[Partition],
    ) -> None:
        # held is not asked for: by range, workers of the same names have the same partitions again
        consumer = connect(KafkaConsumer, **asking(config, identity))
        consumer.assign([KnownPartition(config.input_topic, 0)])  # so that its topic is kept known
        super().__init__(consumer, config.input_topic)
        self.await_topic(config.connect_timeout_s)
        self._joined = joined
        self._turns = 0
        self._given: frozenset[Partition] | None = None
        self._at: dict[Partition, int] = {}
        options = _options(config, identity) | {
            "group.id": config.group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",  # records that were deleted unread are counted
            "isolation.level": "read_committed",
            "session.timeout.ms": config.session_timeout_ms,
            "heartbeat.interval.ms": config.heartbeat_ms,
            # a vertical may work as long on a chunk as the run loop lets it
            "max.poll.interval.ms": max(300_000, int(config.stall_timeout_s * 2_000)),
            "partition.assignment.strategy": "range",
            "enable.partition.eof": True,
            "queued.min.messages": 20_000,
            "fetch.queue.backoff.ms": 10,
            "check.crcs": True,
        }
        if config.instance_id is not None:
            options["group.instance.id"] = config.instance_id
        with _as_kafka_errors():
            self._member = Consumer(options)
            self._member.subscribe(
                [self._topic],
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_revoke,
            )

    def _on_assign(self, consumer: Any, given: list[Any]) -> None:
        self._turns += 1
        self._given = frozenset(Partition(p.topic, p.partition) for p in given)
        self._at = {}
        self._joined()

    def _on_revoke(self, consumer: Any, taken: list[Any]) -> None:
        self._turns += 1
        self._given = None
        self._joined()

    def poll(self, seconds: float, limit: int) -> Mapping[Partition, list[Record]]:
        """See :class:`Member`."""
        with _as_kafka_errors():
            first = self._member.poll(seconds)
            if first is None:
                return {}
            rest = self._member.consume(limit - 1, 0.0) if limit > 1 else []
        found: dict[Partition, list[Record]] = {}
        topic = self._topic
        self._take(first, found, topic)
        for message in rest:
            self._take(message, found, topic)
        for place, records in found.items():
            self._at[place] = max(records[-1].offset + 1, self._at.get(place, 0))
        return found

    def _take(self, message: Any, found: dict[Partition, list[Record]], topic: str) -> None:
        error = message.error()
        number = message.partition()
        if error is not None:
            self._see(error, Partition(topic, number), message.offset())
            return
        made = Fetched(
            topic,
            number,
            message.offset(),
            message.timestamp()[1],
            message.key(),
            message.value(),
            _headers(message),
        )
        place = (topic, number)
        records = found.get(place)  # type: ignore[call-overload]
        if records is None:
            records = found[Partition(topic, number)] = []
        records.append(made)

    def _see(self, error: Any, place: Partition, offset: int) -> None:
        code = error.code()
        if code == Failure._PARTITION_EOF:
            self._at[place] = offset
        elif code in PASSING or (code in GONE and place not in self._at):
            # the second: begin() will say where to read
            log.debug("reading: %s", error)
        else:
            raise _translated(error)

    def owner(self) -> Any:
        """See :class:`Member`."""
        if self._given is None:
            return None
        return Owner(self._member.consumer_group_metadata(), self._turns)

    def claim(self, owner: Any) -> Hashable:
        """See :class:`Member`."""
        turns: int = owner.turns
        return turns

    def places(self) -> list[Partition]:
        """See :class:`Member`."""
        return sorted(self._given or ())

    def begin(self, positions: Mapping[Partition, int], waiting: Set[Partition]) -> bool:
        """See :class:`Member`."""
        if self._given != frozenset(positions):
            return False
        self._at = dict(positions)
        read = {p: at for p, at in positions.items() if p not in waiting}
        with _as_kafka_errors():
            # anew, not seek(): that needs a partition which is being read already
            self._member.assign([TopicPartition(*p, at) for p, at in read.items()])
        return True

    def commit(self, offsets: Noted, seconds: float) -> None:
        """See :class:`Member`."""
        # this call has no deadline of its own
        thread = AbandonableThread("plinth-commit")
        told = thread.start(
            partial(self._member.commit, offsets=_as_offsets(offsets), asynchronous=False)
        )
        thread.close()
        try:
            with _as_kafka_errors():
                told.wait(seconds)
        except TimeoutError:
            raise KafkaTimeoutError(f"offsets were not committed in {seconds:g} s") from None

    def position(self, place: Partition, seconds: float) -> int:
        """See :class:`Member`."""
        return self._at.get(place, 0)

    def seen_end(self, place: Partition) -> int:
        """See :class:`Member`."""
        ends = self._member.get_watermark_offsets(TopicPartition(*place), cached=True)
        return max(0, ends[1]) if ends else 0

    def rejoin(self) -> None:
        """See :class:`Member`; librdkafka sees by itself that a topic has grown."""

    def identity(self) -> str:
        """See :class:`Member`."""
        return str(self._member.memberid() or "")

    def close(self) -> None:
        """See :class:`Member`."""
        thread = AbandonableThread("plinth-leave")
        leaving = thread.start(self._member.close)
        thread.close()
        self._consumer.close(autocommit=False, timeout_ms=1_000)
        if not leaving.done(CLOSE_S):
            log.warning("the consumer did not leave within %g s", CLOSE_S)


_HEADERS = methodcaller("headers")


def _headers(message: Any) -> Any:
    """Headers of a message; none where the client cannot give them: a name is not UTF-8.

    The client returns a list with a hole in it then, and an error that only who calls through C
    sees; whoever looked into the list would end the process.
    """
    try:
        return _HEADERS(message) or ()
    except (SystemError, UnicodeError):
        log.warning("a record of %s has header names that cannot be read", message.topic())
        return ()


def _as_offsets(offsets: Noted) -> list[Any]:
    return [TopicPartition(*place, at, note) for place, (at, note) in offsets.items()]


class ConfluentWriter:
    """A writer of messages by librdkafka's producer."""

    def __init__(self, config: StreamConfig, identity: str, transactional_id: str | None) -> None:
        self._seconds = config.commit_timeout_ms / 1e3
        self._transactional = transactional_id is not None
        self._failed: list[Any] = []
        options = _options(config, identity) | {
            "acks": "all",
            "enable.idempotence": True,
            "compression.type": config.compression,
            "message.max.bytes": config.max_record_bytes + HEADROOM,
            "batch.size": min(1_000_000, config.max_record_bytes),
            "linger.ms": 5,  # a commit does not wait for it
            "partitioner": "murmur2_random",  # as every other client chooses by key
            "on_delivery": self._delivered,
            "delivery.report.only.error": True,
        }
        if transactional_id is not None:
            options |= {
                "transactional.id": transactional_id,
                "transaction.timeout.ms": config.transaction_timeout_ms,
            }
        else:
            options["message.timeout.ms"] = config.commit_timeout_ms * 2 + 1_000
        with _as_kafka_errors():
            self._producer: Any = Producer(options)
        self._widths = _Widths(self._producer, config.metadata_max_age_ms / 1e3)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failed.append(error)

    def open(self) -> None:
        """See :class:`Writer`."""
        with _as_kafka_errors():
            self._producer.init_transactions(self._seconds)

    def begin(self) -> None:
        """See :class:`Writer`."""
        self._failed.clear()
        with _as_kafka_errors():
            self._producer.begin_transaction()

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        partition: int | None = None,
    ) -> None:
        """See :class:`Writer`."""
        number = -1 if partition is None else partition
        try:
            self._producer.produce(topic, value, key, number, headers=headers or None)
        except KafkaException as error:
            raise self._why(error) from None
        except BufferError as error:
            raise KafkaTimeoutError(f"the queue of the client is full: {error}") from None

    def width(self, topic: str) -> int:
        """See :class:`Writer`."""
        return self._widths.of(topic)

    def written(self, seconds: float) -> None:
        """See :class:`Writer`."""
        with _as_kafka_errors():
            left = self._producer.flush(seconds)
        self._see_failed()
        if left:
            raise KafkaTimeoutError(f"{left} messages were not written in {seconds:g} s")

    def _see_failed(self) -> None:
        if self._failed:
            raise _translated(self._failed[0])

    def _why(self, error: KafkaException) -> KafkaError:
        """What went wrong: where messages failed, that says more than that the transaction did.

        A transaction ends with the first of its messages that fails, and every call says so from
        then on; what is told of the message itself comes with the next poll.
        """
        producer = self._producer  # none, once it was given up
        if producer is not None and not self._failed:
            with contextlib.suppress(KafkaException):  # of a fenced one, every call says so
                producer.poll(TOLD_S)
        told = [one for one in self._failed if one.code() not in PURGED]
        return _translated(told[0] if told else error.args[0])

    def commit(self, offsets: Noted, owner: Any, seconds: float) -> None:
        """See :class:`Writer`."""
        producer, until = self._producer, time.monotonic() + seconds
        try:
            producer.send_offsets_to_transaction(_as_offsets(offsets), owner.metadata, seconds)
            while not self._committed(producer, until):
                pass
        except KafkaException as error:
            raise self._why(error) from None

    def _committed(self, producer: Any, until: float) -> bool:
        """Wait a little for a commit, which goes on at the next call; none once it is given up."""
        left = until - time.monotonic()
        try:
            producer.commit_transaction(max(0.0, min(LOOK_S, left)))
        except KafkaException as error:
            found = error.args[0]
            late = found.code() == Failure._TIMED_OUT and found.retriable()
            if late and left > LOOK_S and self._producer is not None:
                return False
            raise
        return True

    def leave(self) -> None:
        """See :class:`Writer`."""
        with contextlib.suppress(KafkaException):  # mostly none is open, or it was fenced
            if self._transactional:
                self._producer.abort_transaction(2.0)
            self._producer.flush(2.0)

    def give_up(self) -> None:
        """See :class:`Writer`."""
        # whoever drops the last reference waits for librdkafka's threads: not the caller
        producer, self._producer = self._producer, None
        Thread(target=_drop, args=([producer],), name="plinth-drop", daemon=True).start()


def _drop(held: list[Any]) -> None:
    """Let go of a producer, without what it has not written."""
    producer = held.pop()
    if producer is not None:
        producer.purge()


CLIENT = Client("confluent", ConfluentMember, ConfluentWriter)
