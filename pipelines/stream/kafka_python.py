"""The client kafka-python: all of it is Python.

By itself it leaves a thread behind when connecting fails, waits without bound for the coordinator
of a transaction, and closes nothing when what was sent does not arrive in time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from functools import partial
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from kafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NoOffsetForPartitionError,
)
from kafka.net.compat import KafkaNetClient
from kafka.structs import MemberState, OffsetAndMetadata, TopicPartition

from plinth.pipelines.stream.chunks import Partition, Record
from plinth.pipelines.stream.kafka_clients import (
    HEADROOM,
    RETRY_BACKOFF_MS,
    AbandonableThread,
    Client,
    Noted,
    connect,
)
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

LOOK_MS = 100
AWAY_MS = 50
"""Before a node that could not be reached is asked for anew."""
LOOKUP_S = 0.1
"""Between two questions who the group's coordinator is."""


class Network(KafkaNetClient):  # type: ignore[misc]
    """Connections of a producer."""

    def await_ready(self, node_id: Any, timeout_ms: float = 30_000) -> bool:
        """Whether a node can be asked within the time.

        As the producer's thread expects it. The client's own raises instead, upon which that
        thread looks for the coordinator, but forgets the request it was to send: a commit that met
        a lost broker then never returned.
        """
        try:
            return bool(super().await_ready(node_id, timeout_ms))
        except KafkaConnectionError:
            self.poll(timeout_ms=AWAY_MS)
            return False


def _pace_lookups(coordinator: Any) -> None:
    """Have a consumer ask for its group's coordinator at most every LOOKUP_S.

    Until the cluster gives a lost broker up, it is still named; the client asks again at once, a
    thousand times a second.
    """
    ask, asked = coordinator._send_group_coordinator_request, [-LOOKUP_S]

    async def paced() -> Any:
        wait = asked[0] + LOOKUP_S - time.monotonic()
        if wait > 0:
            await coordinator._net.sleep(wait)
        asked[0] = time.monotonic()
        return await ask()

    coordinator._send_group_coordinator_request = paced


class _Joins(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells of every time the group was joined, also where nothing in it has changed."""

    def __init__(self, joined: Callable[[], None]) -> None:
        self._joined = joined

    def on_partitions_revoked(self, revoked: Any) -> None:
        """Positions are about to be forgotten."""
        self._joined()

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Positions are those of the committed offsets."""
        self._joined()


class Asks:
    """What a consumer can be asked of a topic and of a group's offsets; it need not be a member.

    Args:
        consumer: of the group; its errors are as they are.
        topic: the input.
    """

    def __init__(self, consumer: Any, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic

    def await_topic(self, seconds: float) -> None:
        """Have the topic known, or close the consumer and raise."""
        thread = AbandonableThread("plinth-metadata")
        asked = thread.start(partial(self._consumer.partitions_for_topic, self._topic))
        thread.close()
        try:
            asked.wait(seconds)
        except BaseException:
            self._consumer.close(autocommit=False, timeout_ms=1_000)
            raise

    def committed(self, places: Iterable[Partition], seconds: float) -> Noted:
        """See :class:`Member`."""
        found = self._consumer._coordinator.fetch_committed_offsets(
            [TopicPartition(*place) for place in places], timeout_ms=seconds * 1e3
        )
        # confluent-kafka writes the zero byte behind a note, too
        return {Partition(*p): (to.offset, to.metadata.rstrip("\0")) for p, to in found.items()}

    def first(self, places: Iterable[Partition], seconds: float) -> dict[Partition, int]:
        """See :class:`Member`."""
        return _offsets(self._consumer.beginning_offsets, places, seconds)

    def last(self, places: Iterable[Partition], seconds: float) -> dict[Partition, int]:
        """See :class:`Member`."""
        return _offsets(self._consumer.end_offsets, places, seconds)

    @property
    def width(self) -> int:
        """See :class:`Member`."""
        return len(self._consumer.partitions_for_topic(self._topic))

    def ask_width(self) -> Callable[[float], bool]:
        """See :class:`Member`."""
        answered = threading.Event()
        future = self._consumer._cluster.request_update()
        future.add_both(lambda *_: answered.set())
        return lambda seconds: bool(answered.wait(seconds) and future.succeeded())


def asking(config: StreamConfig, identity: str) -> dict[str, Any]:
    """Options of a consumer that is asked about the group and the topic."""
    return {
        **config.client_options(),
        "client_id": f"plinth-{identity}",
        "group_id": config.group,
        "enable_auto_commit": False,
        "isolation_level": "read_committed",
        "metadata_max_age_ms": config.metadata_max_age_ms,
        "metrics_enabled": False,
        "allow_auto_create_topics": False,
    }


class PythonMember(Asks):
    """A member of the group that knows the topic by its first poll."""

    def __init__(
        self,
        config: StreamConfig,
        identity: str,
        joined: Callable[[], None],
        held: Set[Partition],
    ) -> None:
        sticky = StickyPartitionAssignor()
        if held:  # asked for as if assigned before any that is assigned now
            sticky.member_assignment = [TopicPartition(*place) for place in sorted(held)]
            sticky.generation = 0
        consumer: Any = connect(
            KafkaConsumer,
            **asking(config, identity),
            group_instance_id=config.instance_id,
            auto_offset_reset="none",  # records that were deleted unread are counted, not skipped
            session_timeout_ms=config.session_timeout_ms,
            heartbeat_interval_ms=config.heartbeat_ms,
            # the second is what workers of both clients have in common
            partition_assignment_strategy=[sticky, RangePartitionAssignor],
        )
        _pace_lookups(consumer._coordinator)
        consumer.subscribe([config.input_topic], listener=_Joins(joined))
        super().__init__(consumer, config.input_topic)
        # a group leader that does not know the topic yet would assign nothing at first
        self.await_topic(config.connect_timeout_s)

    def poll(self, seconds: float, limit: int) -> Mapping[Partition, list[Record]]:
        """See :class:`Member`."""
        try:
            polled = self._consumer.poll(max(1, seconds * 1e3), max_records=limit)
        except NoOffsetForPartitionError:
            return {}  # begin() seeks, once the assignment has been seen
        return {Partition(*place): records for place, records in polled.items()}

    def owner(self) -> Any:
        """See :class:`Member`."""
        owner = self._consumer.group_metadata()
        # while it joins, the broker answers nothing else on this connection, and heartbeats wait
        # for the next poll: whoever asked for offsets then would be put out of the group again
        joined = owner.state is MemberState.STABLE
        # without a generation the broker would take our offsets unchecked
        return owner if joined and owner.generation_id >= 0 and owner.member_id else None

    def claim(self, owner: Any) -> Hashable:
        """See :class:`Member`."""
        return owner.generation_id, owner.member_id

    def places(self) -> list[Partition]:
        """See :class:`Member`."""
        return sorted(Partition(*place) for place in self._consumer.assignment())

    def begin(self, positions: Mapping[Partition, int], waiting: Set[Partition]) -> bool:
        """See :class:`Member`."""
        try:
            for place, at in positions.items():
                self._consumer.seek(TopicPartition(*place), at)
            self._consumer.pause(*(TopicPartition(*place) for place in waiting))
            self._consumer.resume(*(TopicPartition(*p) for p in positions.keys() - waiting))
        except (ValueError, AssertionError, KeyError):
            return False
        # what had come of a partition before it was paused: the client may never look at it again,
        # nor then fetch more of that partition; it is fetched anew from its position
        fetcher = self._consumer._fetcher
        fetcher._paused_partition_records.clear()
        fetcher._paused_completed_fetches.clear()
        return True

    def commit(self, offsets: Noted, seconds: float) -> None:
        """See :class:`Member`."""
        self._consumer.commit(_as_offsets(offsets), timeout_ms=seconds * 1e3)

    def position(self, place: Partition, seconds: float) -> int:
        """See :class:`Member`."""
        return self._consumer.position(TopicPartition(*place), timeout_ms=seconds * 1e3) or 0

    def seen_end(self, place: Partition) -> int:
        """See :class:`Member`."""
        return self._consumer.highwater(TopicPartition(*place)) or 0

    def rejoin(self) -> None:
        """See :class:`Member`."""
        self._consumer._coordinator.request_rejoin()

    def identity(self) -> str:
        """See :class:`Member`."""
        return str(self._consumer.group_metadata().member_id or "")

    def close(self) -> None:
        """See :class:`Member`."""
        try:
            self._consumer.close(autocommit=False, timeout_ms=3_000)
        except KafkaError as error:
            log.warning("the consumer did not leave cleanly: %r", error)


def _offsets(ask: Any, places: Iterable[Partition], seconds: float) -> dict[Partition, int]:
    try:
        found = ask([TopicPartition(*place) for place in places], timeout_ms=seconds * 1e3)
    except KeyError as error:
        raise KafkaTimeoutError(f"partition {error} is not known to the brokers yet") from None
    return {Partition(*place): at for place, at in found.items()}


def _as_offsets(offsets: Noted) -> dict[Any, Any]:
    return {TopicPartition(*p): OffsetAndMetadata(*noted, -1) for p, noted in offsets.items()}


class Producer(KafkaProducer):  # type: ignore[misc]
    """A producer that can be given up, and with it every wait for its transactions."""

    _given_up = False

    def give_up(self) -> None:
        """End its thread, connections and waits, without what was not sent. Returns at once."""
        self._given_up = self._closed = True
        self._unregister_cleanup()
        self._sender.force_close()
        network = self._sender._client
        with contextlib.suppress(RuntimeError):  # its thread has ended already
            # so that its thread does not wait for a broker that hangs
            network._net.call_soon_threadsafe(network._manager.close)

    def append(
        self, place: TopicPartition, value: bytes | None, key: bytes | None, headers: list[Any]
    ) -> Any:
        """As :meth:`send` to a partition, in half of its time where its batch has room for more.

        The batch is of the transaction that is open now: :meth:`send`, which began it, made the
        partition part of that, and every batch of an earlier one was waited for.
        """
        accumulator = self._accumulator
        with accumulator._tp_lock(place):
            batches = accumulator._batches[place]
            future = batches[-1].try_append(None, key, value, headers) if batches else None
        if future is None:
            future = self.send(place.topic, value, key, headers, place.partition)
        return future

    def send_offsets_to_transaction(self, offsets: Any, group_metadata: Any) -> None:
        """Make offsets part of the transaction."""
        self._settle(self._transaction_manager.send_offsets_to_transaction(offsets, group_metadata))

    def commit_transaction(self) -> None:
        """Commit."""
        self._settle(self._transaction_manager.begin_commit())

    def abort_transaction(self) -> None:
        """Abort."""
        self._settle(self._transaction_manager.begin_abort())

    def _settle(self, result: Any) -> None:
        self._sender.wakeup()
        while not result.wait(timeout_ms=LOOK_MS):
            if self._given_up:
                raise KafkaTimeoutError("the producer was given up")


class PythonWriter:
    """A writer of messages by :class:`Producer`; what was sent is waited for one by one.

    The client itself forgets a batch that it could not deliver in time, and would go on to commit a
    transaction without it. Its flush() fails when a batch is split meanwhile.
    """

    def __init__(self, config: StreamConfig, identity: str, transactional_id: str | None) -> None:
        options = _options(config, identity)
        if transactional_id is not None:
            options |= {
                "transactional_id": transactional_id,
                "transaction_timeout_ms": config.transaction_timeout_ms,
            }
        self._producer = connect(Producer, network=Network, **options)
        self._sent: list[Any] = []
        self._places: dict[tuple[str, int], TopicPartition] = {}

    def open(self) -> None:
        """See :class:`Writer`."""
        self._producer.init_transactions()

    def begin(self) -> None:
        """See :class:`Writer`."""
        self._sent = []
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
        if partition is None:
            self._sent.append(self._producer.send(topic, value, key, headers))
            return
        place = self._places.get((topic, partition))
        if place is None:
            place = self._places[topic, partition] = TopicPartition(topic, partition)
        self._sent.append(self._producer.append(place, value, key, headers))

    def width(self, topic: str) -> int:
        """See :class:`Writer`."""
        return len(self._producer.partitions_for(topic))

    def written(self, seconds: float) -> None:
        """See :class:`Writer`."""
        until = time.monotonic() + seconds
        sent, self._sent = self._sent, []
        for future in sent:
            if not future.succeeded():
                future.get(max(0.0, until - time.monotonic()))

    def commit(self, offsets: Noted, owner: Any, seconds: float) -> None:
        """See :class:`Writer`."""
        self._producer.send_offsets_to_transaction(_as_offsets(offsets), owner)
        self.written(seconds)
        self._producer.commit_transaction()

    def leave(self) -> None:
        """See :class:`Writer`."""
        if self._producer.config["transactional_id"] is not None:
            with contextlib.suppress(KafkaError):  # mostly none is open
                self._producer.abort_transaction()
        self._producer.close(timeout=2)

    def give_up(self) -> None:
        """See :class:`Writer`."""
        self._producer.give_up()


def _options(config: StreamConfig, identity: str) -> dict[str, Any]:
    compression = None if config.compression == "none" else config.compression
    return {
        **config.client_options(),
        "client_id": f"plinth-{identity}",
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
        "batch_size": min(131_072, config.max_record_bytes),
        "metrics_enabled": False,
        "allow_auto_create_topics": False,
    }


CLIENT = Client("kafka-python", PythonMember, PythonWriter)
