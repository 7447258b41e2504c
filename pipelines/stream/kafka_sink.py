"""Sinks that make outputs and offsets durable together, each call under a deadline of ours.

On expiry the producer is dropped and a new one with the same transactional id takes its place,
which fences the old one.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from kafka.errors import InvalidProducerEpochError, KafkaError, ProducerFencedError

from plinth import __version__
from plinth.pipelines.stream.chunks import (
    Committed,
    Message,
    Outputs,
    Partition,
    Rewind,
    StreamError,
)
from plinth.pipelines.stream.dead_letters import MAX_KEY, headers, payload, size_of
from plinth.pipelines.stream.kafka_clients import (
    AbandonableThread,
    Client,
    Pending,
    Writer,
    hopeless,
    noted,
)
from plinth.pipelines.stream.metrics import COMMIT_SECONDS
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

REFUSED = "commit_refused"
"""Cause to go back for: Kafka or its client refuses, and not since somebody is away."""
POSITION = "plinth_position"
"""Header of answers and dead letters: ``partition@offset;`` of the record, then the position."""
LEAVE_S = 5.0
LOOK_S = 0.05
"""How often what goes on beside an opening is called."""
USUAL_TIMES = 5.0
"""So many times as long as the longest of the latest commits one may take, lest one that never
returns is waited for longer than need be. To give one up is safe, and costs a second or more."""
LEAST_S = 5.0
"""One may always take so long: a coordinator that was lost moves in that time."""
LATEST = 50
MAX_LEFT = 16
"""Commits that never came back, each with a thread and a producer, beyond which the worker ends."""
FENCES, FENCED_S = 6, 60.0
"""So often within so long a worker is put out of its own transactions by another of its name alone:
where a broker was lost, or a transaction took too long, each of its producers is once."""


def _nothing() -> None:
    """There is nothing else to do."""


class KafkaSink(ABC):
    """Writes outputs in order; one chunk is being written while the next is processed.

    Args:
        config: topics, bounds and client options.
        client: writes the messages.
        vertical: name for dead-letter headers.
        identity: this worker's lasting name; part of the transactional ids.

    Attributes:
        commits_offsets: offsets are committed with the outputs; else the consumer must commit
            them once the outputs are written.
        trouble: why the last that was begun did not become durable.
    """

    producers = 1
    commits_offsets = False

    def __init__(
        self, config: StreamConfig, client: Client, *, vertical: str, identity: str
    ) -> None:
        self.config = config
        self._client = client
        self._vertical = vertical
        self._identity = identity
        self._app = __version__
        self._thread = AbandonableThread("plinth-commit")
        self._slots: list[Writer | None] = [None] * self.producers
        self._turn = 0
        self._writing: tuple[Outputs, Pending[float]] | None = None
        self._deadline = config.commit_timeout_ms / 1e3
        self._latest: deque[float] = deque(maxlen=LATEST)
        self._given_up = 0
        self.trouble = ""
        self._left: list[Pending[float]] = []
        self._fenced: deque[float] = deque(maxlen=FENCES)

    # -- writing ---------------------------------------------------------------------------
    def start(self, outputs: Outputs) -> None:
        """Begin to write; :meth:`finish` has been called for what was begun before."""
        slot = self._turn
        self._turn = (slot + 1) % self.producers
        producer = self._slots[slot]
        assert producer is not None, "ready() comes first"
        self._writing = outputs, self._thread.start(partial(self._timed, producer, outputs))

    def finish(self) -> Committed | None:
        """Wait until what was begun is durable; ``None`` if nothing was begun.

        Raises:
            Rewind: it is not known to be durable.
            StreamError: and it never will be.
        """
        if self._writing is None:
            return None
        (outputs, pending), self._writing = self._writing, None
        allowed = self._allowed
        try:
            seconds = pending.wait(allowed)
        except TimeoutError:
            self._leave_behind(pending)
            why, cause = f"no answer in {allowed:.1f} s", "commit_timeout"
            self._given_up += 1
        except KafkaError as error:
            if final := hopeless(error, self.config) or self._another(error):
                raise final from None
            why, cause = repr(error), "commit_failed" if error.retriable else REFUSED
        else:
            COMMIT_SECONDS.labels(self.config.guarantee).observe(seconds)
            self._latest.append(seconds)
            self._given_up = 0
            return Committed(outputs, seconds)
        log.warning("%d records were not committed: %s", len(outputs.chunk.records), why)
        self.trouble = why
        self._give_up_producers()
        raise Rewind(cause)

    # -- life ------------------------------------------------------------------------------
    def ready(self, meanwhile: Callable[[], None] = _nothing) -> None:
        """Have a working producer in every slot; fences and completes what an old one left.

        Args:
            meanwhile: called again and again while that is waited for; soon comes back.

        Raises:
            TimeoutError: the broker did not answer in time.
            KafkaError: it refused.
            StreamError: and it always will.
        """
        opening: dict[int, Pending[Writer]] = {}
        for slot, producer in enumerate(self._slots):
            if producer is None:  # all at once: each asks several brokers, one after the other
                thread = AbandonableThread("plinth-open")
                opening[slot] = thread.start(partial(self._connect, slot))
                thread.close()
        until = time.monotonic() + self._deadline + 1
        failed: Exception | None = None
        for slot, pending in opening.items():
            while not pending.done(LOOK_S) and time.monotonic() < until:
                meanwhile()
            try:
                self._slots[slot] = pending.wait(0.0)
            except TimeoutError as error:
                pending.abandon(_give_up)
                failed = failed or error
            except KafkaError as error:
                failed = hopeless(error, self.config) or failed or error
        if failed is not None:
            raise failed from None

    def close(self) -> None:
        """Close every producer, in bounded time."""
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                try:
                    self._thread.start(producer.leave).wait(LEAVE_S)
                except (TimeoutError, KafkaError) as error:
                    log.debug("a producer did not close in time: %r", error)
                producer.give_up()  # nothing to do where it closed
        self._thread.close()

    # -- what differs ----------------------------------------------------------------------
    @abstractmethod
    def _connect(self, slot: int) -> Writer:
        """A producer ready for its first chunk."""

    @abstractmethod
    def _commit(self, producer: Writer, outputs: Outputs) -> None:
        """Send the messages and make them durable; runs on the sink's own thread."""

    # -- shared ----------------------------------------------------------------------------
    def _another(self, error: KafkaError) -> StreamError | None:
        """What to end with where another worker takes this one's transactions, again and again."""
        if not isinstance(error, ProducerFencedError | InvalidProducerEpochError):
            return None
        now = time.monotonic()
        self._fenced.append(now)
        if len(self._fenced) < FENCES or now - self._fenced[0] > FENCED_S:
            return None
        return StreamError(
            f"another worker of group {self.config.group} writes under this one's name, "
            f"{self._identity!r}, and each ends the other's transactions",
            hint="give every worker a stream.instance_id, or a state_dir, of its own: a copy of a "
            "state_dir has the name of the first; what was committed is complete",
        )

    def _timed(self, producer: Writer, outputs: Outputs) -> float:
        started = time.perf_counter()
        self._commit(producer, outputs)
        return time.perf_counter() - started

    def _give_up_producers(self) -> None:
        for slot, producer in enumerate(self._slots):
            if producer is not None:
                self._slots[slot] = None
                producer.give_up()

    def _leave_behind(self, pending: Pending[float]) -> None:
        """Wait no more for a commit.

        Raises:
            StreamError: too many never came back. Kafka-python ends such a wait with its producer;
                librdkafka does not where the group's coordinator was lost (its issue 5456).
        """
        self._abandon_thread()
        self._left = [one for one in (*self._left, pending) if not one.done(0.0)]
        if len(self._left) > MAX_LEFT:
            raise StreamError(
                f"{len(self._left)} commits of the Kafka client never came back",
                hint="what was committed is complete; start again to go on",
            )

    def _abandon_thread(self) -> None:
        self._thread.close()
        self._thread = AbandonableThread("plinth-commit")

    @property
    def _allowed(self) -> float:
        """Seconds that a commit may take now; twice as many after each that was given up."""
        if not self._latest:
            return self._deadline
        usual = max(LEAST_S, USUAL_TIMES * max(self._latest))
        return min(self._deadline, usual * 2.0**self._given_up)

    @property
    def _patience(self) -> float:
        """Seconds of a call; beyond our own deadline, which is the one that decides."""
        return self._deadline * 2

    def _send_all(self, producer: Writer, outputs: Outputs) -> None:
        """Queue every message."""
        send, topic = producer.send, self.config.output_topic
        width = outputs.chunk.layout.width
        alike, position = producer.width(topic) == width, outputs.position.encode()
        for message in outputs.messages:
            record, head = message.record, list(message.headers)
            if position:
                told = b"%d@%d;%b" % (record.partition, record.offset, position)
                head.append((POSITION, told))
            if message.error is not None:
                self._send_dead(producer, message, head, width)
            else:
                key = message.key
                place = record.partition if alike and key == record.key else None
                send(topic, message.value, key, head, place)
        if outputs.audit:
            self._send_audit(producer, outputs.audit)

    def _send_audit(self, producer: Writer, audit: list[tuple[Partition, bytes]]) -> None:
        topic = self.config.audit_topic
        assert topic is not None
        width = producer.width(topic)
        if (most := max(place.partition for place, _ in audit)) >= width:
            raise StreamError(
                f"the audit topic {topic} has {width} partitions, and the input has a partition "
                f"{most}",
                hint="give the audit topic at least as many partitions as the input, and start "
                "again: nothing of the chunk was committed",
            )
        for place, raw in audit:
            producer.send(topic, raw, None, [], place.partition)

    def _send_dead(self, producer: Writer, message: Message, more: Any, width: int) -> None:
        record, error = message.record, message.error
        assert error is not None
        topic = self.config.dead_letters
        head = headers(
            record, error, group=self.config.group, vertical=self._vertical, app=self._app
        )
        key = record.key if record.key is None or len(record.key) <= MAX_KEY else None
        beside = len(key or b"") + size_of(head) + size_of(more)
        value, cut = payload(record, self.config.max_record_bytes, beside)
        if value is None and key is None:
            value = b""
        place = record.partition if producer.width(topic) == width else None
        producer.send(topic, value, key, head + cut + more, place)


def _give_up(producer: Writer) -> None:
    producer.give_up()


class ExactlyOnceSink(KafkaSink):
    """Answers, dead letters and offsets in one transaction; two producers take turns.

    Guarantee: a reader with ``isolation.level=read_committed`` sees every record answered once.
    The second producer hides the wait for the first one's transaction markers.
    """

    producers = 2
    commits_offsets = True

    def _connect(self, slot: int) -> Writer:
        name = f"{self.config.group}-{self._identity}-{slot}"
        producer = self._client.writer(self.config, self._identity, name)
        try:
            producer.open()
        except KafkaError:
            producer.give_up()
            raise
        return producer

    def _commit(self, producer: Writer, outputs: Outputs) -> None:
        producer.begin()
        self._send_all(producer, outputs)
        chunk = outputs.chunk
        offsets = noted(chunk.ends, chunk.layout, outputs.notes)
        producer.commit(offsets, chunk.owner, self._patience)


class AtLeastOnceSink(KafkaSink):
    """Answers alone, offsets after them; a crash between them writes some answers twice.

    Guarantee: every record is answered at least once, in order per partition.
    """

    def _connect(self, slot: int) -> Writer:
        return self._client.writer(self.config, self._identity, None)

    def _commit(self, producer: Writer, outputs: Outputs) -> None:
        self._send_all(producer, outputs)
        producer.written(self._patience)
