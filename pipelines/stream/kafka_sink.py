"""Sinks that make outputs and offsets durable together, each call under a deadline of ours.

On expiry the producer is dropped and a new one with the same transactional id takes its place,
which fences the old one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from plinth import __version__
from plinth.pipelines.stream.chunks import (
    Committed,
    Message,
    Outputs,
    Partition,
    Rewind,
    StreamError,
)
from plinth.pipelines.stream.dead_letters import headers, payload
from plinth.pipelines.stream.kafka_clients import (
    AbandonableThread,
    Pending,
    Producer,
    as_offsets,
    connect,
    hopeless,
)
from plinth.pipelines.stream.metrics import COMMIT_SECONDS
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

RETRY_BACKOFF_MS = 5
"""A transaction that begins before the last one's markers are written waits so long."""
POSITION = "plinth_position"
"""Header of answers and dead letters: ``partition@offset;`` of the record, then the position."""
MAX_KEY = 32_768
HEADROOM = 128 * 1024
LEAVE_S = 5.0
LOST_S = 1.0
"""After so long a commit that lost a broker is begun anew: the client may wait for ever."""


class KafkaSink(ABC):
    """Writes outputs in order; one chunk is being written while the next is processed.

    Args:
        config: topics, bounds and client options.
        vertical: name for dead-letter headers.
        identity: this worker's lasting name; part of the transactional ids.

    Attributes:
        commits_offsets: offsets are committed with the outputs; else the consumer must commit
            them once the outputs are written.
    """

    producers = 1
    commits_offsets = False

    def __init__(self, config: StreamConfig, *, vertical: str, identity: str) -> None:
        self.config = config
        self._vertical = vertical
        self._identity = identity
        self._app = __version__
        self._thread = AbandonableThread("plinth-commit")
        self._slots: list[Any] = [None] * self.producers
        self._turn = 0
        self._writing: tuple[Outputs, Pending[float], Any] | None = None
        self._deadline = config.commit_timeout_ms / 1e3

    # -- writing ---------------------------------------------------------------------------
    def start(self, outputs: Outputs) -> None:
        """Begin to write; :meth:`finish` has been called for what was begun before."""
        slot = self._turn
        self._turn = (slot + 1) % self.producers
        producer = self._slots[slot]
        lost = partial(_lost_a_broker, producer, producer.nodes())
        self._writing = outputs, self._thread.start(partial(self._timed, producer, outputs)), lost

    def finish(self) -> Committed | None:
        """Wait until what was begun is durable; ``None`` if nothing was begun.

        Raises:
            Rewind: it is not known to be durable.
            StreamError: and it never will be.
        """
        if self._writing is None:
            return None
        (outputs, pending, lost), self._writing = self._writing, None
        began = time.monotonic()
        until = began + self._deadline
        while not pending.done(min(LOST_S, max(0.0, until - time.monotonic()))):
            if lost() or time.monotonic() >= until:
                break
        try:
            seconds = pending.wait(0.0)
        except TimeoutError:
            self._abandon_thread()
            why = f"no answer in {time.monotonic() - began:.1f} s"
            cause = "broker_lost" if lost() else "commit_timeout"
        except KafkaError as error:
            if final := hopeless(error, self.config):
                raise final from None
            why, cause = repr(error), "commit_failed"
        else:
            COMMIT_SECONDS.labels(self.config.guarantee).observe(seconds)
            return Committed(outputs, seconds)
        log.warning("%d records were not committed: %s", len(outputs.chunk.records), why)
        self._give_up_producers()
        raise Rewind(cause)

    # -- life ------------------------------------------------------------------------------
    def ready(self) -> None:
        """Have a working producer in every slot; fences and completes what an old one left.

        Raises:
            TimeoutError: the broker did not answer in time.
            KafkaError: it refused.
            StreamError: and it always will.
        """
        for slot, producer in enumerate(self._slots):
            if producer is None:
                pending = self._thread.start(partial(self._connect, slot))
                try:
                    self._slots[slot] = pending.wait(self._deadline + 1)
                except TimeoutError:
                    pending.abandon(Producer.give_up)
                    self._abandon_thread()
                    raise
                except KafkaError as error:
                    raise hopeless(error, self.config) or error from None

    def close(self) -> None:
        """Close every producer, in bounded time."""
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                try:
                    self._thread.start(partial(self._leave, producer)).wait(LEAVE_S)
                except (TimeoutError, KafkaError) as error:
                    log.debug("a producer did not close in time: %r", error)
                producer.give_up()  # nothing to do where it closed
        self._thread.close()

    # -- what differs ----------------------------------------------------------------------
    @abstractmethod
    def _connect(self, slot: int) -> Any:
        """A producer ready for its first chunk."""

    @abstractmethod
    def _commit(self, producer: Any, outputs: Outputs) -> None:
        """Send the messages and make them durable; runs on the sink's own thread."""

    def _leave(self, producer: Any) -> None:
        """Close a producer for good; runs on the sink's own thread."""
        producer.close(timeout=2)

    # -- shared ----------------------------------------------------------------------------
    def _timed(self, producer: Any, outputs: Outputs) -> float:
        started = time.perf_counter()
        self._commit(producer, outputs)
        return time.perf_counter() - started

    def _give_up_producers(self) -> None:
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                producer.give_up()

    def _abandon_thread(self) -> None:
        self._thread.close()
        self._thread = AbandonableThread("plinth-commit")

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

    def _send_all(self, producer: Any, outputs: Outputs) -> list[Any]:
        """Queue every message; its futures, to be handed to :meth:`_all_written`."""
        append, topic = producer.append, self.config.output_topic
        width = outputs.chunk.layout.width
        alike, position = _alike(producer, topic, width), outputs.position.encode()
        places = {p.partition: TopicPartition(topic, p.partition) for p in outputs.chunk.ends}
        futures = []
        for message in outputs.messages:
            record, head = message.record, list(message.headers)
            if position:
                told = b"%d@%d;%b" % (record.partition, record.offset, position)
                head.append((POSITION, told))
            if message.error is not None:
                futures.append(self._send_dead(producer, message, head, width))
            else:
                key, value = message.key, message.value
                if alike and key == record.key:
                    futures.append(append(places[record.partition], value, key, head))
                else:
                    futures.append(producer.send(topic, value, key, head))
        if outputs.audit:
            futures += self._send_audit(producer, outputs.audit)
        return futures

    def _send_audit(self, producer: Any, audit: list[tuple[Partition, bytes]]) -> list[Any]:
        topic = self.config.audit_topic
        width = len(producer.partitions_for(topic))
        if (most := max(place.partition for place, _ in audit)) >= width:
            raise StreamError(
                f"the audit topic {topic} has {width} partitions, and the input has a partition "
                f"{most}",
                hint="give the audit topic at least as many partitions as the input, and start "
                "again: nothing of the chunk was committed",
            )
        return [producer.send(topic, raw, partition=place.partition) for place, raw in audit]

    def _all_written(self, futures: list[Any]) -> None:
        """Wait for what was sent, and see that all of it was.

        The client itself forgets a batch that it could not deliver in time, and would go on to
        commit a transaction without it. Its flush() fails when a batch is split meanwhile.
        """
        until = time.monotonic() + self._deadline * 2  # whoever waits for this gives up before
        for future in futures:
            if not future.succeeded():
                future.get(max(0.0, until - time.monotonic()))

    def _send_dead(self, producer: Any, message: Message, more: Any, width: int) -> Any:
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
        place = record.partition if _alike(producer, topic, width) else None
        return producer.send(topic, value, key, head + cut + more, place)


def _lost_a_broker(producer: Producer, before: frozenset[Any]) -> bool:
    return not before <= producer.nodes()


def _alike(producer: Any, topic: str, width: int) -> bool:
    """Whether the topic has as many partitions as the input, as the producer knows it now."""
    return len(producer.partitions_for(topic)) == width


class ExactlyOnceSink(KafkaSink):
    """Answers, dead letters and offsets in one transaction; two producers take turns.

    Guarantee: a reader with ``isolation.level=read_committed`` sees every record answered once.
    The second producer hides the wait for the first one's transaction markers.
    """

    producers = 2
    commits_offsets = True

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

    def _commit(self, producer: Any, outputs: Outputs) -> None:
        producer.begin_transaction()
        futures = self._send_all(producer, outputs)
        chunk = outputs.chunk
        offsets = as_offsets(chunk.ends, chunk.layout, outputs.notes)
        producer.send_offsets_to_transaction(offsets, chunk.owner)
        self._all_written(futures)
        producer.commit_transaction()

    def _leave(self, producer: Any) -> None:
        with contextlib.suppress(KafkaError):  # mostly none is open
            producer.abort_transaction()
        super()._leave(producer)


class AtLeastOnceSink(KafkaSink):
    """Answers alone, offsets after them; a crash between them writes some answers twice.

    Guarantee: every record is answered at least once, in order per partition.
    """

    def _connect(self, slot: int) -> Any:
        return connect(Producer, **self._options())

    def _commit(self, producer: Any, outputs: Outputs) -> None:
        self._all_written(self._send_all(producer, outputs))
