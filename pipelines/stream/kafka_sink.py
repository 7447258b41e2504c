"""Sinks that make answers and offsets durable together, each call under a deadline of ours.

On expiry the producer is dropped and a new one with the same transactional id takes its place,
which fences the old one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    InvalidTransactionTimeoutError,
    KafkaError,
    MessageSizeTooLargeError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from plinth import __version__
from plinth.engine import PlinthError
from plinth.pipelines.stream.abandonable import Job, Lane
from plinth.pipelines.stream.dead_letters import headers, payload
from plinth.pipelines.stream.kafka_producer import Producer, connect
from plinth.pipelines.stream.loop import Message, Partition, Rewind, Scored
from plinth.pipelines.stream.metrics import COMMIT_SECONDS
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

RETRY_BACKOFF_MS = 5
"""A transaction that begins before the last one's markers are written waits so long."""
MAX_KEY = 32_768
HEADROOM = 128 * 1024
LEAVE_S = 5.0


class StreamError(PlinthError):
    """The stream cannot go on; what was committed is complete, the rest will be read again."""

    reason = "stream"


class KafkaSink(ABC):
    """Writes scored chunks in order, one in flight while the next is scored.

    Args:
        config: topics, bounds and client options.
        vertical: name for dead-letter headers.
        identity: this worker's lasting name; part of the transactional ids.
        partitions: number of partitions of each topic.
        on_durable: called with each chunk once it is durable, and its seconds.
    """

    producers = 1

    def __init__(
        self,
        config: StreamConfig,
        *,
        vertical: str,
        identity: str,
        partitions: Mapping[str, int],
        on_durable: Callable[[Scored, float], None],
    ) -> None:
        self.config = config
        self._vertical = vertical
        self._identity = identity
        self._partitions = partitions
        self._on_durable = on_durable
        self._app = __version__
        self._lane = Lane("plinth-commit")
        self._slots: list[Any] = [None] * self.producers
        self._turn = 0
        self._flight: tuple[Scored, Job[float]] | None = None
        self._undone: list[Scored] = []
        self._deadline = config.commit_timeout_ms / 1e3

    # -- Sink ------------------------------------------------------------------------------
    def write(self, scored: Scored) -> None:
        """Start the commit of a chunk, after the one before is durable."""
        try:
            self.settle()
        except Rewind:
            self._undone.append(scored)
            raise
        slot = self._turn
        self._turn = (slot + 1) % self.producers
        producer = self._slots[slot]
        self._flight = scored, self._lane.start(partial(self._timed, producer, scored))

    @property
    def in_flight(self) -> int:
        """Records written and not yet known to be durable."""
        return len(self._flight[0].chunk.records) if self._flight else 0

    def settle(self) -> None:
        """Wait until the chunk in flight is durable."""
        if self._flight is None:
            return
        (scored, job), self._flight = self._flight, None
        try:
            seconds = job.wait(self._deadline)
            self._finish(scored)
        except TimeoutError:
            self._abandon_lane()
            self._failed(scored, "commit_timeout", f"no answer in {self._deadline:.0f} s")
        except KafkaError as error:
            if hopeless := _hopeless(error, self.config):
                raise hopeless from None
            self._failed(scored, "commit_failed", repr(error))
        else:
            COMMIT_SECONDS.labels(self.config.guarantee).observe(seconds)
            self._on_durable(scored, seconds)

    # -- recovery --------------------------------------------------------------------------
    def take_back(self) -> list[Scored]:
        """Chunks that were written and are not known to be durable, in order."""
        try:
            self.settle()
        except Rewind:
            log.debug("the chunk in flight did not become durable")
        undone, self._undone = self._undone, []
        return undone

    def ready(self) -> None:
        """Have a working producer in every slot; fences and completes what an old one left.

        Raises:
            TimeoutError: the broker did not answer in time.
            KafkaError: it refused.
        """
        for slot, producer in enumerate(self._slots):
            if producer is None:
                job = self._lane.start(partial(self._connect, slot))
                try:
                    self._slots[slot] = job.wait(self._deadline + 1)
                except TimeoutError:
                    job.abandon(Producer.give_up)
                    self._abandon_lane()
                    raise
                except KafkaError as error:
                    raise _hopeless(error, self.config) or error from None

    def close(self) -> None:
        """Close every producer, in bounded time."""
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                try:
                    self._lane.start(partial(self._leave, producer)).wait(LEAVE_S)
                except (TimeoutError, KafkaError) as error:
                    log.debug("a producer did not close in time: %r", error)
                producer.give_up()  # nothing to do where it closed
        self._lane.close()

    # -- what differs ----------------------------------------------------------------------
    @abstractmethod
    def _connect(self, slot: int) -> Any:
        """A producer ready for its first chunk."""

    @abstractmethod
    def _commit(self, producer: Any, scored: Scored) -> None:
        """Send the chunk's messages and make them durable; runs on the lane."""

    def _finish(self, scored: Scored) -> None:
        """What is left to do on the reader's own thread."""
        return

    def _leave(self, producer: Any) -> None:
        """Close a producer for good; runs on the lane."""
        producer.close(timeout=2)

    # -- shared ----------------------------------------------------------------------------
    def _timed(self, producer: Any, scored: Scored) -> float:
        started = time.perf_counter()
        self._commit(producer, scored)
        return time.perf_counter() - started

    def _failed(self, scored: Scored, cause: str, why: str) -> None:
        log.warning("%d records were not committed: %s", len(scored.chunk.records), why)
        self._undone.append(scored)
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                producer.give_up()
        raise Rewind(cause)

    def _abandon_lane(self) -> None:
        self._lane.close()
        self._lane = Lane("plinth-commit")

    def _options(self) -> dict[str, Any]:
        config = self.config
        compression = None if config.compression == "none" else config.compression
        return {
            **config.client(),
            "client_id": f"plinth-{self._identity}",
            "acks": "all",
            "compression_type": compression,
            "retry_backoff_ms": RETRY_BACKOFF_MS,
            # together: reaching a broker, then opening for transactions
            "bootstrap_timeout_ms": config.commit_timeout_ms // 2,
            "max_block_ms": config.commit_timeout_ms // 2,
            # beyond our own deadline, which is the one that decides
            "request_timeout_ms": config.commit_timeout_ms * 2,
            "delivery_timeout_ms": config.commit_timeout_ms * 2 + 1_000,
            "max_request_size": config.max_record_bytes + HEADROOM,
            "batch_size": 131_072,
            "metrics_enabled": False,
            "allow_auto_create_topics": False,
        }

    def _send_all(self, producer: Any, scored: Scored) -> list[Any]:
        """Queue every message; its futures, to be handed to :meth:`_all_written`."""
        send = producer.send
        topic = self.config.output_topic
        same = self._alike(topic)
        futures = []
        for message in scored.messages:
            record = message.record
            if message.error is not None:
                futures.append(self._send_dead(producer, message))
            else:
                key = message.key
                place = record.partition if same and key == record.key else None
                futures.append(send(topic, message.value, key, list(message.headers), place))
        return futures

    def _all_written(self, futures: list[Any]) -> None:
        """Wait for what was sent, and see that all of it was.

        The client itself forgets a batch that it could not deliver in time, and would go on to
        commit a transaction without it. Its flush() fails when a batch is split meanwhile.
        """
        until = time.monotonic() + self._deadline * 2  # whoever waits for this job gives up before
        for future in futures:
            if not future.succeeded():
                future.get(max(0.0, until - time.monotonic()))

    def _send_dead(self, producer: Any, message: Message) -> Any:
        record, error = message.record, message.error
        assert error is not None
        topic = self.config.dead_letters
        value, cut = payload(record, self.config.max_record_bytes)
        head = headers(
            record, error, group=self.config.group, vertical=self._vertical, app=self._app
        )
        key = record.key if record.key is None or len(record.key) <= MAX_KEY else None
        if value is None and key is None:
            value = b""
        place = record.partition if self._alike(topic) else None
        return producer.send(topic, value, key, head + cut, place)

    def _alike(self, topic: str) -> bool:
        return self._partitions[topic] == self._partitions[self.config.input_topic]


class ExactlyOnceSink(KafkaSink):
    """Answers, dead letters and offsets in one transaction; two producers take turns.

    Guarantee: a reader with ``isolation.level=read_committed`` sees every record answered once.
    The second producer hides the wait for the first one's transaction markers.
    """

    producers = 2

    def _connect(self, slot: int) -> Any:
        name = f"{self.config.group}-{self._identity}-{slot}"
        producer = connect(
            Producer,
            **self._options(),
            transactional_id=name,
            transaction_timeout_ms=self.config.transaction_timeout_ms,
        )
        try:
            producer.init_transactions()
        except KafkaError:
            producer.give_up()
            raise
        return producer

    def _commit(self, producer: Any, scored: Scored) -> None:
        producer.begin_transaction()
        futures = self._send_all(producer, scored)
        producer.send_offsets_to_transaction(as_offsets(scored.chunk.ends), scored.chunk.owner)
        self._all_written(futures)
        producer.commit_transaction()

    def _leave(self, producer: Any) -> None:
        with contextlib.suppress(KafkaError):  # mostly none is open
            producer.abort_transaction()
        super()._leave(producer)


class AtLeastOnceSink(KafkaSink):
    """Answers first, offsets after; a crash between them writes some answers twice.

    Guarantee: every record is answered at least once, in order per partition.
    """

    def __init__(self, *args: Any, commit: Callable[[Mapping[Partition, int]], None], **rest: Any):
        super().__init__(*args, **rest)
        self._commit_offsets = commit

    def _connect(self, slot: int) -> Any:
        return connect(Producer, **self._options())

    def _commit(self, producer: Any, scored: Scored) -> None:
        self._all_written(self._send_all(producer, scored))

    def _finish(self, scored: Scored) -> None:
        self._commit_offsets(scored.chunk.ends)


def as_offsets(ends: Mapping[Partition, int]) -> dict[Any, Any]:
    """Positions in kafka-python's words."""
    return {TopicPartition(*p): OffsetAndMetadata(at, "", -1) for p, at in ends.items()}


def _hopeless(error: KafkaError, config: StreamConfig) -> StreamError | None:
    """What to end with, if trying again has no point."""
    words = repr(error)  # the client wraps what came first
    if isinstance(error, FencedInstanceIdError):
        return namesake(config)
    if MessageSizeTooLargeError.__name__ in words:
        return StreamError(
            f"Kafka refuses an answer or dead letter as too large: {error}",
            hint="raise the topics' max.message.bytes or lower stream.max_record_bytes",
        )
    if InvalidTransactionTimeoutError.__name__ in words:
        return StreamError(
            f"the brokers do not allow transactions of {config.transaction_timeout_ms} ms",
            hint="lower stream.transaction_timeout_ms or raise transaction.max.timeout.ms there",
        )
    if isinstance(error, AuthorizationError):
        return StreamError(
            f"Kafka refuses this client: {error!r}",
            hint="it needs Read on the input topic and the group, Write on the output and "
            "dead-letter topics, and Write on the transactional ids <group>-*",
        )
    return None


def namesake(config: StreamConfig) -> StreamError:
    """The end of a worker whose lasting name another one took over."""
    return StreamError(
        f"another worker of group {config.group} has the instance id {config.instance_id!r}",
        hint="give every worker a stream.instance_id of its own",
    )
