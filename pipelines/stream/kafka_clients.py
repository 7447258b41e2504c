"""Kafka clients that end when their owner says so, the topics they need, and hopeless errors.

kafka-python by itself leaves a thread behind when connecting fails, waits without bound for the
coordinator of a transaction, and closes nothing when what was sent does not arrive in time.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    InvalidTransactionTimeoutError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)
from kafka.net.compat import KafkaNetClient
from kafka.structs import OffsetAndMetadata, TopicPartition

from plinth.engine import ConfigError
from plinth.pipelines.stream.chunks import Layout, Partition, StreamError
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_MS = 100


# -- clients -------------------------------------------------------------------------------
def connect(kind: Callable[..., T], *args: Any, **options: Any) -> T:
    """Make a client of ``kind``; nothing of it is left if that fails."""
    made: list[Any] = []

    def network(**settings: Any) -> Any:
        made.append(KafkaNetClient(**settings))
        return made[-1]

    try:
        return kind(*args, kafka_client=network, **options)
    except BaseException:
        for client in made:
            client.close()
        raise


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

    def nodes(self) -> frozenset[Any]:
        """Brokers it is connected to; one that is missing later was lost, or long idle."""
        return frozenset(self._sender._client._manager._conns.copy())

    def append(
        self, place: TopicPartition, value: bytes, key: bytes | None, headers: list[Any]
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


class Pending(Generic[T]):
    """One call on an :class:`AbandonableThread`."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None
        self._late: Callable[[T], object] | None = None
        self._lock = threading.Lock()

    def run(self) -> None:
        """Do the work and keep what came of it."""
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again by wait() in the caller
            self._error = error
        with self._lock:
            self._done.set()
        self._dispose()

    def abandon(self, late: Callable[[T], object]) -> None:
        """Nobody waits any more: hand the result to ``late`` if there will be one."""
        with self._lock:
            self._late = late
        self._dispose()

    def _dispose(self) -> None:
        with self._lock:
            late, self._late = (self._late, None) if self._done.is_set() else (None, self._late)
        if late is not None and self._error is None:
            late(self._value)  # type: ignore[arg-type]

    def done(self, seconds: float) -> bool:
        """Wait so long at most; whether it has ended."""
        return self._done.wait(seconds)

    def wait(self, seconds: float) -> T:
        """The result.

        Raises:
            TimeoutError: it is not there in time.
        """
        if not self._done.wait(seconds):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


class AbandonableThread:
    """One daemon thread that makes calls in order and may be left behind."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Pending[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def start(self, work: Callable[[], T]) -> Pending[T]:
        """Queue a call."""
        pending = Pending(work)
        self._calls.put(pending)
        return pending

    def close(self) -> None:
        """End the thread after what is queued."""
        self._calls.put(None)

    def _loop(self) -> None:
        while (pending := self._calls.get()) is not None:
            pending.run()


def as_offsets(
    ends: Mapping[Partition, int], layout: Layout, notes: Mapping[Partition, str]
) -> dict[Any, Any]:
    """Positions by :class:`Partition` in kafka-python's words, with the layout and their notes."""
    note = layout.note()
    return {
        TopicPartition(*p): OffsetAndMetadata(at, f"{note} {notes[p]}" if p in notes else note, -1)
        for p, at in ends.items()
    }


# -- topics --------------------------------------------------------------------------------
def prepare(config: StreamConfig) -> dict[str, int]:
    """Reach the broker and see that the topics are there; number of partitions by topic.

    Raises:
        ConfigError: no broker answers, it refuses us, or topics are missing; says what to do.
    """
    options = config.client()
    with quiet_client() as heard:
        try:
            admin = connect(
                KafkaAdminClient,
                **options,
                request_timeout_ms=int(config.connect_timeout_s * 1e3),
            )
        except (KafkaError, OSError, ValueError) as error:
            raise unreachable(config, error, heard) from None
    try:
        return _topics(admin, config)
    except KafkaError as error:
        raise unreachable(config, error) from None
    finally:
        admin.close()


class Heard(logging.Handler):
    """What a client logs while it connects, which its error does not say.

    Attributes:
        connected: something listens there.
        untrusted: its certificate was not accepted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.connected = self.untrusted = False

    def emit(self, record: logging.LogRecord) -> None:
        """See what a line tells."""
        text = record.getMessage()
        self.connected |= ": connected to " in text
        self.untrusted |= "CERTIFICATE_VERIFY_FAILED" in text


@contextlib.contextmanager
def quiet_client() -> Iterator[Heard]:
    """No log of each attempt to connect: the error that follows says it once."""
    logger, heard = logging.getLogger("kafka"), Heard()
    level, passed_on = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(heard)
    try:
        yield heard
    finally:
        logger.removeHandler(heard)
        logger.propagate = passed_on
        logger.setLevel(level)


def _topics(admin: Any, config: StreamConfig) -> dict[str, int]:
    wanted = config.topics
    found = _counts(admin, wanted)
    missing = [name for name in wanted if name not in found]
    if missing and not config.create_topics:
        raise ConfigError(
            f"missing on {config.bootstrap_servers}: topic " + ", ".join(missing),
            hint="create them (kafka-topics.sh --create --topic NAME --partitions N) or set "
            "stream.create_topics = true",
        )
    for name in missing:
        count = found.get(config.input_topic, config.partitions)
        try:
            admin.create_topics(
                {name: {"num_partitions": count, "replication_factor": config.replication_factor}},
                wait_for_metadata=True,
            )
        except TopicAlreadyExistsError:
            log.debug("topic %s was created by another worker meanwhile", name)
    return _counts(admin, wanted) if missing else found


def _counts(admin: Any, names: tuple[str, ...]) -> dict[str, int]:
    return {
        topic["name"]: len(topic["partitions"])
        for topic in admin.describe_topics(list(names))
        if not topic["error_code"] and topic["partitions"]
    }


def missing_topics(config: StreamConfig) -> set[str] | None:
    """Topics of the stream that the cluster does not have; ``None`` if it does not say."""
    try:
        with quiet_client():
            admin = connect(KafkaAdminClient, **config.client())
            try:
                found = admin.describe_topics(list(config.topics))
            finally:
                admin.close()
    except (KafkaError, OSError, ValueError) as error:
        log.debug("asking for the topics failed: %r", error)
        return None
    return {t["name"] for t in found if t["error_code"] == UnknownTopicOrPartitionError.errno}


# -- errors --------------------------------------------------------------------------------
def unreachable(config: StreamConfig, error: Exception, heard: Heard | None = None) -> ConfigError:
    """What to end with when no client can be made."""
    if heard is not None and heard.untrusted:
        return ConfigError(
            f"the certificate of {config.bootstrap_servers} is not trusted",
            hint="stream.ssl_cafile is the PEM file of who signed it; the name in it must be the "
            "one in stream.bootstrap_servers",
        )
    if heard is not None and heard.connected:
        login = (
            f", the user {config.sasl_username} and its password" if config.sasl_username else ""
        )
        return ConfigError(
            f"something listens at {config.bootstrap_servers}, and closes the connection of a "
            f"{config.security_protocol} client",
            hint=f"check stream.security_protocol, the certificates{login}",
        )
    if isinstance(error, AuthorizationError):
        return ConfigError(
            f"{config.bootstrap_servers} refuses this client: {type(error).__name__}",
            hint="it needs Describe on the input, output and dead-letter topics",
        )
    return ConfigError(
        f"no Kafka broker answers at {config.bootstrap_servers} within "
        f"{config.connect_timeout_s:g} s ({type(error).__name__})",
        hint="check stream.bootstrap_servers, that the broker runs and advertises an address "
        "reachable from here, and stream.security_protocol",
    )


def hopeless(error: KafkaError, config: StreamConfig) -> StreamError | None:
    """What to end with, if trying again has no point."""
    words = repr(error)  # the client wraps what came first
    if isinstance(error, FencedInstanceIdError):
        return StreamError(
            f"another worker of group {config.group} has the instance id {config.instance_id!r}",
            hint="give every worker a stream.instance_id of its own",
        )
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
    if isinstance(error, UnsupportedCodecError):
        return StreamError(
            f"{config.input_topic} holds records that cannot be decompressed here: {error}",
            hint="pip install 'plinth-engine[kafka]' brings zstandard, python-snappy and lz4",
        )
    if isinstance(error, AuthorizationError):
        return StreamError(
            f"Kafka refuses this client: {error!r}",
            hint="it needs Read on the input topic and the group, Write on the output and "
            "dead-letter topics, and Write on the transactional ids <group>-*",
        )
    return None
