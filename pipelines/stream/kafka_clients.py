"""What a stream asks of a Kafka client, the topics it needs, and errors without hope.

A :class:`Client` brings a member of the group and a writer of transactions. Whichever it is, topics
are looked at, and the past is read, with kafka-python; and errors are kafka-python's.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, MemberToRemove
from kafka.errors import (
    AuthorizationError,
    FencedInstanceIdError,
    InvalidTransactionTimeoutError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    UnsupportedCodecError,
)
from kafka.net.compat import KafkaNetClient

from plinth.engine import ConfigError
from plinth.pipelines.stream.chunks import Layout, Partition, Record, StreamError
from plinth.pipelines.stream.dead_letters import BESIDE
from plinth.pipelines.stream.settings import StreamConfig
from plinth.pipelines.stream.wire.batches import read_bounded

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_BACKOFF_MS = 5
"""A transaction that begins before the last one's markers are written waits so long."""
LEAVE_MS = 3_000
"""Longest wait for a broker, and for its answer, when a place in the group is given up."""
AGAIN_S = 0.3
"""Between attempts to reach a broker at the start."""
POLICY = "cleanup.policy"
MOST = "max.message.bytes"
HEADROOM = 128 * 1024
"""Bytes of a message beside a record: key and headers."""
Noted = dict[Partition, tuple[int, str]]
"""Offsets of a group, each with the note that stands beside it."""


# -- the seam ------------------------------------------------------------------------------
class Member(Protocol):
    """A member of the consumer group, from its first :meth:`poll` on. Errors are KafkaErrors."""

    def poll(self, seconds: float, limit: int) -> Mapping[Partition, list[Record]]:
        """What there is, at most ``limit`` records; waits so long for the first at most.

        Raises:
            OffsetOutOfRangeError: what is to be read next is not there any more.
            UnsupportedCodecError: records are compressed in a way unknown here.
        """

    def owner(self) -> Any:
        """Who commits what was polled; ``None`` while not in the group.

        Offsets committed with it are refused, once the group has given the partitions away.
        """

    def claim(self, owner: Any) -> Hashable:
        """The same as long as the membership is."""

    def places(self) -> list[Partition]:
        """Partitions that were given to it."""

    def begin(self, positions: Mapping[Partition, int], waiting: Set[Partition]) -> bool:
        """Go on at these positions; false where they are not what it was given.

        Args:
            positions: of every partition.
            waiting: of them, those that are not to be read for now.
        """

    def committed(self, places: Iterable[Partition], seconds: float) -> Noted:
        """The group's offsets, where it has one."""

    def commit(self, offsets: Noted, seconds: float) -> None:
        """Commit offsets outside of a transaction."""

    def first(self, places: Iterable[Partition], seconds: float) -> dict[Partition, int]:
        """The oldest offset in each partition."""

    def last(self, places: Iterable[Partition], seconds: float) -> dict[Partition, int]:
        """The end of what a reader of committed records may see of each partition."""

    def position(self, place: Partition, seconds: float) -> int:
        """The offset to be read next, behind the marks of transactions."""

    def seen_end(self, place: Partition) -> int:
        """The end of a partition as far as it was told, open transactions included; 0: not yet."""

    @property
    def width(self) -> int:
        """Partitions of the topic, as far as is known."""

    def ask_width(self) -> Callable[[float], bool]:
        """Ask anew for :attr:`width`; returns what waits so long at most for the answer."""

    def rejoin(self) -> None:
        """Have the group share out the partitions again."""

    def identity(self) -> str:
        """What the group's coordinator calls it; empty while not in the group."""

    def close(self) -> None:
        """Leave the group, in bounded time; under a lasting name its place is kept."""


class Writer(Protocol):
    """A producer, with or without transactions. Errors are KafkaErrors.

    All but :meth:`give_up` is called on one thread.
    """

    def open(self) -> None:
        """Be ready for transactions: fences and completes what an earlier one of its name left."""

    def begin(self) -> None:
        """Begin a transaction."""

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        partition: int | None = None,
    ) -> None:
        """Queue a message; without a partition its key chooses."""

    def width(self, topic: str) -> int:
        """Partitions of a topic, as far as is known."""

    def written(self, seconds: float) -> None:
        """Wait until all that was sent is written; raises if some of it is not."""

    def commit(self, offsets: Noted, owner: Any, seconds: float) -> None:
        """Commit what was sent together with a group's offsets; raises if some was not written."""

    def leave(self) -> None:
        """Abort what is open and close, in bounded time."""

    def give_up(self) -> None:
        """End every wait, without what was not written. Returns at once."""


@dataclass(frozen=True, slots=True)
class Client:
    """One of the Kafka clients.

    Args:
        name: as in the settings.
        member: makes a member of the group, told of settings, identity, whom to call whenever the
            membership may have changed, and of partitions to ask for, where the client can.
        writer: makes a writer, told of settings, identity and transactional id, if any.
    """

    name: str
    member: Callable[[StreamConfig, str, Callable[[], None], Set[Partition]], Member]
    writer: Callable[[StreamConfig, str, str | None], Writer]


# -- clients -------------------------------------------------------------------------------
def connect(
    kind: Callable[..., T],
    *args: Any,
    network: Callable[..., Any] = KafkaNetClient,
    **options: Any,
) -> T:
    """Make a client of ``kind``; nothing of it is left if that fails.

    Args:
        kind: of kafka-python.
        args: its own.
        network: what makes its connections.
        options: its own.
    """
    read_bounded()
    made: list[Any] = []

    def remembered(**settings: Any) -> Any:
        made.append(network(**settings))
        return made[-1]

    try:
        return kind(*args, kafka_client=remembered, **options)
    except BaseException:
        for client in made:
            client.close()
        raise


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


def noted(ends: Mapping[Partition, int], layout: Layout, notes: Mapping[Partition, str]) -> Noted:
    """Positions to commit, each with the layout and the note of its partition."""
    note = layout.note()
    return {p: (at, f"{note} {notes[p]}" if p in notes else note) for p, at in ends.items()}


# -- topics --------------------------------------------------------------------------------
def prepare(config: StreamConfig, *, whole: bool = False) -> dict[str, int]:
    """Reach the broker and see that the topics are there; number of partitions by topic.

    Args:
        config: of the stream.
        whole: the input must keep its records, since a state is made of them.

    Raises:
        ConfigError: no broker answers, it refuses us, topics are missing, or the input does not
            keep its records; says what to do.
    """
    until = time.monotonic() + config.connect_timeout_s
    while True:
        try:
            return _prepared(config, whole)
        except _Away as away:
            if time.monotonic() + AGAIN_S > until:
                raise away.final from None
            log.info("%s; trying again", away.final)
        time.sleep(AGAIN_S)


class _Away(Exception):
    """A broker did not answer, which it or another may in a moment."""

    def __init__(self, final: ConfigError) -> None:
        super().__init__(str(final))
        self.final = final


def _prepared(config: StreamConfig, whole: bool) -> dict[str, int]:
    """As :func:`prepare`, tried once.

    Raises:
        _Away: no broker answers, or the one asked was lost; until the others have given it up they
            still name it.
    """
    options = config.client_options()
    with quiet_client() as heard:
        try:
            admin = connect(
                KafkaAdminClient,
                **options,
                request_timeout_ms=int(config.connect_timeout_s * 1e3),
            )
        except (KafkaError, OSError, ValueError) as error:
            raise _away(config, error, heard) from None
    try:
        found = _topics(admin, config)
        if whole:
            _refuse_compacted(admin, config.input_topic)
        _warn_of_small(admin, config)
        return found
    except KafkaError as error:
        raise _away(config, error) from None
    finally:
        admin.close()


def _away(config: StreamConfig, error: Exception, heard: Heard | None = None) -> Exception:
    final = unreachable(config, error, heard)
    return _Away(final) if isinstance(error, KafkaConnectionError | NodeNotReadyError) else final


def _settings_of(admin: Any, topics: Sequence[str], name: str) -> dict[str, str]:
    """A setting of topics, of those that the brokers tell it of."""
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, {name: None}) for topic in topics]
    try:
        told = admin.describe_configs(asked, config_filter="all").get("topic", {})
    except KafkaError as error:  # not every broker knows that question
        log.debug("%s of %s is not told: %r", name, ", ".join(topics), error)
        return {}
    return {t: str(told[t][name]["value"]) for t in topics if name in told.get(t, {})}


def _refuse_compacted(admin: Any, topic: str) -> None:
    """See that Kafka does not remove all but the last record of each key."""
    policy = _settings_of(admin, [topic], POLICY).get(topic, "")
    if "compact" in policy:
        raise ConfigError(
            f"topic {topic} has {POLICY}={policy}: all but the last record of each key "
            "vanish, and a state made of what is left would be another one",
            hint=f"kafka-configs.sh --alter --topic {topic} --add-config {POLICY}=delete",
        )


def _warn_of_small(admin: Any, config: StreamConfig) -> None:
    """Say which topics do not take the largest message that may be written to them."""
    most = config.max_record_bytes + BESIDE
    for topic, told in _settings_of(admin, config.topics[1:], MOST).items():
        if told.isdecimal() and int(told) < most:
            log.warning(
                "topic %s has %s=%s: a larger answer or dead letter will end the stream; raise it "
                "to %d, or lower stream.max_record_bytes",
                topic, MOST, told, most,
            )  # fmt: skip


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


def give_place_up(config: StreamConfig, member: str) -> None:
    """End what a lasting name keeps in the group, so that others have its partitions at once.

    Clients never do that by themselves. Where it fails, others wait for ``session_timeout_ms``.

    Args:
        config: whose group and name.
        member: as the coordinator calls it; a newer one of the same name is left alone.
    """
    options = config.client_options() | {"bootstrap_timeout_ms": LEAVE_MS}
    try:
        with quiet_client():
            admin = connect(KafkaAdminClient, **options, request_timeout_ms=LEAVE_MS)
            try:
                gone = MemberToRemove(member, config.instance_id, "it was told to stop")
                found = admin.remove_group_members(config.group, [gone])
            finally:
                admin.close()
    except (KafkaError, OSError, ValueError) as error:
        log.warning("the place of %s in the group was not given up: %r", config.instance_id, error)
        return
    log.info("%s has left the group: %s", config.instance_id, found)


def missing_topics(config: StreamConfig) -> set[str] | None:
    """Topics of the stream that the cluster does not have; ``None`` if it does not say."""
    try:
        with quiet_client():
            admin = connect(KafkaAdminClient, **config.client_options())
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
