"""The Kafka door: poll, parse, infer, encode, commit.

``run()`` drives one vertical over one input topic until it is told to stop. Exactly once by
default: answers, dead letters and offsets in one transaction. See ``docs/streaming.md``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence, Set
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kafka.errors import KafkaError

from plinth.engine import ConfigError, Engine, Sla
from plinth.pipelines.formats.mapping import load_mapping
from plinth.pipelines.formats.registry import RegistryAway
from plinth.pipelines.observability.tracing import Tracing
from plinth.pipelines.state.snapshots import claim
from plinth.pipelines.state.store import BEGIN_AT, DiskStore
from plinth.pipelines.stream import kafka_python
from plinth.pipelines.stream.audit import AuditTrail, key_of
from plinth.pipelines.stream.checkpoint import Checkpoint
from plinth.pipelines.stream.chunks import (
    Chunk,
    ChunkSize,
    Committed,
    Outputs,
    Partition,
    Poisoned,
    Record,
    Rewind,
    StreamError,
)
from plinth.pipelines.stream.dead_letters import BESIDE, DeadLetterShare
from plinth.pipelines.stream.kafka_clients import (
    AbandonableThread,
    Client,
    hopeless,
    prepare,
)
from plinth.pipelines.stream.kafka_consumer import REPLAY_FAILED, GroupConsumer
from plinth.pipelines.stream.kafka_replay import STEP_RECORDS, NotNeeded, Plan, Standby
from plinth.pipelines.stream.kafka_sink import (
    REFUSED,
    AtLeastOnceSink,
    ExactlyOnceSink,
    KafkaSink,
)
from plinth.pipelines.stream.metrics import DEAD_LETTERS, RECORDS, RECOVERIES, STATE_SINCE
from plinth.pipelines.stream.processor import KeyPlaces, Processor
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals.contract import Vertical

__all__ = ["StreamConfig", "StreamError", "StreamProgress", "StreamSummary", "run"]

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
GONE_S = 3.0
"""A topic that is missing for so long was deleted; brokers may differ for a moment."""
JOIN_S = 0.1
"""How often a group that is to be joined is looked at while something else is waited for."""
RECOVER_S = 0.2
"""Between attempts to settle what was in doubt."""
IDLE_LOOK_S = 15.0
"""After so long without records, and as often, we look whether the topics are still there."""
BACKLOG_LOOK_S = 5.0
"""After so long without a commit, and as often, we ask whether records wait unread."""
TRIES = 5
"""Times that a commit is refused though Kafka answers, before the stream is said to stand still."""
KEPT_TIMES = 100_000
GRACE_S = 5.0


@dataclass(slots=True)
class StreamProgress:
    """Where the stream is, about once a second.

    Args:
        records: input records answered and committed, dead letters included.
        scored: answers committed.
        dead_letters: dead letters committed.
        replayed: records read again for the state alone.
        lag: records waiting in this worker's partitions.
        partitions: partitions this worker reads; 0 while it waits for the group.
        replaying: partitions whose state is still being rebuilt.
        seconds: since the first record.
    """

    records: int = 0
    scored: int = 0
    dead_letters: int = 0
    replayed: int = 0
    lag: int = 0
    partitions: int = 0
    replaying: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class StreamSummary:
    """What a stream did from start to stop.

    Args:
        records: input records answered and committed, dead letters included.
        scored: answers committed.
        skipped: messages that the mapping says are no records.
        dead_letters: dead letters committed, by reason.
        replayed: records read again for the state alone.
        transactions: chunks committed.
        recoveries: returns to the committed offsets, by cause; joining the group is one.
        seconds: from the first record to the last commit.
        cpu_seconds: CPU time of the process in that span.
        commit_ms_p50: median milliseconds of a commit, from first send to commit.
        commit_ms_p99: the same, 99th percentile.
    """

    records: int = 0
    scored: int = 0
    skipped: int = 0
    dead_letters: dict[str, int] = field(default_factory=dict)
    replayed: int = 0
    transactions: int = 0
    recoveries: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    commit_ms_p50: float = 0.0
    commit_ms_p99: float = 0.0

    @property
    def records_per_second(self) -> float:
        """Committed records per second of wall time."""
        return self.records / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data."""
        return asdict(self) | {"records_per_second": round(self.records_per_second, 1)}


class ChunkProcessor(Protocol):
    """What turns chunks into outputs; :class:`Processor` is one."""

    def process(self, chunk: Chunk) -> Generator[float, None, Outputs]:
        """Answer every record; yields seconds to wait while it cannot go on."""

    def observe(self, chunk: Chunk) -> None:
        """Take a replayed chunk into the state, without answers."""

    @property
    def watches(self) -> bool:
        """It wants to be told of records of other workers' partitions by :meth:`look`."""

    def look(self, records: Sequence[Record]) -> None:
        """Told of records of other workers' partitions: they may show that keys lie apart."""

    def see_partitions(self, mine: int, total: int, grown: int) -> None:
        """Told whenever this worker's share of the input changes, and when keys last moved."""

    def see_start(self, at: int) -> None:
        """Told before which time the state lacks records (milliseconds; 0: it has all)."""


def run(
    vertical: Vertical[Any, Any],
    engine: Engine,
    config: StreamConfig,
    stop: threading.Event,
    on_progress: Callable[[StreamProgress], None] | None = None,
    *,
    sla: Sla | None = None,
    tracing: Tracing | None = None,
) -> StreamSummary:
    """Stream until ``stop`` is set, or until ``idle_exit_s`` or ``max_events`` says so.

    Args:
        vertical: reads and answers the records.
        engine: started, with the vertical's models.
        config: which Kafka and how.
        stop: finishes the chunk in hand, commits, takes a snapshot and leaves the group.
        on_progress: called about once a second, on the worker's thread.
        sla: the promise asked of the engine; by default the vertical's own. What would be
            rejected or degraded is late instead: a stream waits rather than scores worse.
        tracing: told of each record, if there is any.

    Raises:
        ConfigError: no broker, missing topics or an unusable state folder; nothing has started.
        StreamError: Kafka stayed away or refuses, or the loop stands still; what was committed
            is complete.
        PlinthError: the engine failed for good; nothing of the chunk in hand was committed.
    """

    origin = {"vertical": vertical.name, "topic": config.input_topic, "group": config.group}

    whole = vertical.snapshot() is not None
    parts = None
    if config.state_store == "disk" and config.state_dir is not None:
        parts = config.state_dir / "parts"

    def state(
        store: DiskStore | None = None, followed: Path | None = None
    ) -> tuple[Checkpoint, Processor]:
        checkpoint = Checkpoint(
            vertical,
            config.state_dir / "state.snapshot" if config.state_dir else None,
            origin,
            config.replay_max_records,
            store,
            followed,
        )
        places = KeyPlaces() if vertical.together(vertical.example()) else None
        promise = sla or vertical.sla
        return checkpoint, Processor(
            vertical,
            engine,
            config.max_record_bytes,
            checkpoint.stateful,
            promise,
            mapping,
            places,
            tracing,
        )

    trail = None
    if config.audit_topic is not None:
        vertical.audited = True
        room = config.max_record_bytes + BESIDE // 2
        trail = AuditTrail(vertical.name, key_of(config.audit_key_env), room)
    mapping = load_mapping(config.mapping, vertical) if config.mapping else None

    standby, ready = None, None
    if config.standby:
        prepare(config, whole=whole)
        ready = state(followed=parts)
        standby = Standby(config, *ready, stop)
        log.info("standing by for the worker that holds %s", config.state_dir)
    try:
        with (
            claim(config.state_dir, while_held=standby) as name,
            contextlib.ExitStack() as held,
        ):
            if standby is None:
                prepare(config, whole=whole)
            else:
                standby.close()
                log.info("taking over %s", config.state_dir)
            identity = config.instance_id or name or uuid.uuid4().hex
            if parts is not None:
                if ready is not None:
                    ready[0].release()
                store = held.enter_context(contextlib.closing(DiskStore(parts, origin)))
                if ready is None:
                    ready = state(store)
                else:
                    ready[0].take_over(store)
            checkpoint, processor = ready or state()
            consumer, sink = join(config, identity, vertical.name, checkpoint.held)
            worker = Worker(
                config, consumer, sink, processor, checkpoint, stop, on_progress, trail=trail
            )
            return worker.run_supervised()
    except NotNeeded:
        return StreamSummary()
    finally:
        if standby is not None and ready is not None:
            standby.close()
            ready[0].release()


def join(
    config: StreamConfig, identity: str, vertical: str, held: Set[Partition] = frozenset()
) -> tuple[GroupConsumer, KafkaSink]:
    """Both ends of a worker: a new member of the group, and what writes its outputs.

    Args:
        config: which Kafka and how.
        identity: lasting name of the worker, or one of its own.
        vertical: name of its vertical.
        held: partitions of which it has the state.
    """
    sink = ExactlyOnceSink if config.guarantee == "exactly_once" else AtLeastOnceSink
    client = chosen_client(config)
    consumer = GroupConsumer(config, identity, client, held)
    return consumer, sink(config, client, vertical=vertical, identity=identity)


def chosen_client(config: StreamConfig) -> Client:
    """The Kafka client of the settings.

    Raises:
        ConfigError: it is not installed, or lacks what is asked of it.
    """
    if config.client == "kafka-python":
        return kafka_python.CLIENT
    if find_spec("confluent_kafka") is None:
        raise ConfigError(
            "stream.client = 'confluent' needs the package confluent-kafka",
            hint="pip install 'plinth-engine[kafka-fast]', or set stream.client = 'kafka-python'",
        )
    from plinth.pipelines.stream.confluent import CLIENT, has_kerberos

    if config.sasl_mechanism == "GSSAPI" and not has_kerberos():
        raise ConfigError(
            "this build of confluent-kafka has no GSSAPI (Kerberos)",
            hint="set stream.client = 'kafka-python', or build confluent-kafka with libsasl2",
        )
    return CLIENT


class Worker:
    """One run of the stream: the loop, its accounts, and how it recovers.

    Args:
        config: which Kafka and how.
        consumer: gives chunks; closed at the end, as is the sink.
        sink: makes outputs durable.
        processor: answers chunks.
        checkpoint: the vertical's state and its offsets.
        stop: ends the loop.
        on_progress: told about once a second.
        trail: makes audit records; ``None``: none are kept.
        to_end: end as soon as all that is committed in its partitions was read.

    Attributes:
        step: what the loop does now, and since when (``monotonic``).
        mine: partitions that the answers are of; of a changing group there may be others by now.
        given: partitions of this worker, as of the last assignment; not all are served at first.
        at_end: all that was committed was read when nothing came last.
        size: how many records a chunk may have.
        built: when records of the past were last taken into the state, or there were none to be
            taken (``monotonic``).
        step_size: the same, of those that are read again.
        refused: when commits were refused, since the last one that was not.
    """

    def __init__(
        self,
        config: StreamConfig,
        consumer: GroupConsumer,
        sink: KafkaSink,
        processor: ChunkProcessor,
        checkpoint: Checkpoint,
        stop: threading.Event,
        on_progress: Callable[[StreamProgress], None] | None = None,
        *,
        trail: AuditTrail | None = None,
        to_end: bool = False,
    ) -> None:
        self.config = config
        self.to_end = to_end
        self.at_end = False
        self.trail = trail
        self.processor = processor
        self.checkpoint = checkpoint
        self.stop = stop
        self.on_progress = on_progress
        self.summary = StreamSummary()
        self.dead_share = DeadLetterShare(config)
        self.consumer = consumer
        self.sink = sink
        self.step = ("start", time.monotonic())
        self.mine = 0
        self.given: Set[Partition] = frozenset()
        self.size = ChunkSize(config.max_records)
        self.step_size = ChunkSize(STEP_RECORDS)
        self.consumer.step = self.step_size.count
        self._unsettled: deque[Outputs] = deque()
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)
        now = time.monotonic()
        self._alive = self._reported = self._saved = self._busy = self._moved = now
        self.built = now
        self._stopping: float | None = None
        self._trouble = ""
        self._gone: dict[str, float] = {}
        self._looked = self._counted = 0.0
        self._pause = threading.Event()
        self._abandoned = False
        self.refused: list[float] = []

    # -- the run ---------------------------------------------------------------------------
    def run_supervised(self) -> StreamSummary:
        """Run the loop on a thread of its own and watch that it moves.

        Raises:
            StreamError: it stands still in one step, whatever the cause; the thread is left
                behind and commits nothing more.
        """
        thread = AbandonableThread("plinth-stream")
        running = thread.start(self.run)
        thread.close()
        try:
            while not running.done(0.5):
                self._check_step()
        except BaseException as error:
            self.stop.set()
            self._abandoned = isinstance(error, StreamError)
            running.done(0.0 if self._abandoned else self.config.drain_timeout_s)
            raise
        return running.wait(0.0)

    def run(self) -> StreamSummary:
        """The run loop: poll, process, commit, until the end; then keep the state."""
        try:
            self._fence()
            over = False
            while not over:
                try:
                    over = self._turn()
                except Rewind as why:
                    self._recover(why)
            self._report()
            if not self._unsettled:
                self._at("close")
                self.consumer.leave()  # whoever goes on need not wait for what is kept of it
                self._snapshot(last=True)
            return self._summarise()
        finally:
            self._at("close")
            try:
                self.consumer.close()
            finally:
                self.sink.close()

    def _fence(self) -> None:
        """End what a dead worker of this name left open: readers wait for it, so do it first."""
        self._at("recover")
        try:
            self.sink.ready(self._join)
            log.info("nothing of an earlier worker of this name is open any more")
        except (TimeoutError, KafkaError) as error:
            log.warning("fencing is tried again, once in the group: %r", error)

    def _join(self) -> None:
        """Take or keep a place in the group, while something else is waited for."""
        with contextlib.suppress(Rewind):  # the next poll says so again
            self.consumer.keep_alive(JOIN_S)

    def _turn(self) -> bool:
        """One round of the loop; true when it was the last."""
        if self.stop.is_set() or self._finished():
            self._settle()
            return True
        self._at("poll")
        chunk = self.consumer.poll()
        if chunk is None:
            self._settle()
            self._when_idle()
        elif chunk.replay:
            self._observe(chunk)
            self._settle()
        else:
            self._commit(self._process(chunk))
        self._look_after()
        return False

    def _observe(self, chunk: Chunk) -> None:
        self._at("process")
        began = time.monotonic()
        while True:
            try:
                self.processor.observe(chunk)
                break
            except RegistryAway as away:
                log.warning("%s; trying again", away)
                self._wait_for_engine(1.0)
        self.checkpoint.observed(chunk)
        count = len(chunk.records)
        self.summary.replayed += count
        RECORDS.labels(self.config.input_topic, "replayed").inc(count)
        self._alive = self._moved = self._busy = self.built = time.monotonic()
        self.step_size.took(count, self.built - began, 0.0)
        self.consumer.step = self.step_size.count

    def _see_share(self) -> None:
        """Tell the vertical which share of the input is in the state, and up to date."""
        served = self.given - self.consumer.waiting
        self.checkpoint.stale -= served
        mine = len(served)
        if mine != self.mine:
            self.mine = mine
            width = max(self.consumer.width, len(self.given))
            self.processor.see_partitions(mine, width, self.consumer.layout.grown)

    def _process(self, chunk: Chunk) -> Outputs:
        """Answers of a chunk; while the engine is not ready, stay in the group and watch."""
        self._at("process")
        if self._began is None:
            self._began = time.perf_counter(), time.process_time()
        self._see_share()
        if self.checkpoint.stateful:
            self.consumer.ask_layout()
            self.processor.see_start(self.checkpoint.start)
        began = time.monotonic()
        steps = self.processor.process(chunk)
        while True:
            try:
                seconds = next(steps)
            except StopIteration as end:
                outputs: Outputs = end.value
                break
            self._wait_for_engine(seconds)
        committing = self._times[-1] if self._times else 0.0
        self.size.took(len(chunk.records), time.monotonic() - began, committing)
        if chunk.layout.grown > self.checkpoint.layout.grown:
            self.consumer.learn(chunk.layout)
            self.checkpoint.layout = self.consumer.layout
        if self.config.positions:
            outputs.position = self.checkpoint.position(chunk, self.mine)
        if self.trail is not None:
            self.trail.add(outputs)
        self.checkpoint.advance(chunk.ends)
        dead = sum(message.error is not None for message in outputs.messages)
        self.dead_share.take(len(outputs.messages), dead)
        self._busy = time.monotonic()
        self.consumer.see_layout()
        return outputs

    def _wait_for_engine(self, seconds: float) -> None:
        now = time.monotonic()
        self._check_patience(now)
        self._check_stall(
            now,
            "the engine has refused or not finished this work, or the schema registry is away",
        )
        self._pause.wait(seconds)
        self.consumer.keep_alive()
        self._at("process")

    # -- committing ------------------------------------------------------------------------
    def _commit(self, outputs: Outputs) -> None:
        """Begin to commit, once what was begun before is durable."""
        self._unsettled.append(outputs)
        self._settle()
        if self._abandoned:
            raise StreamError("this worker was given up")
        self.sink.start(outputs)

    def _settle(self) -> None:
        """Wait until what was begun is durable, and account for it."""
        self._at("commit")
        committed = self.sink.finish()
        if committed is None:
            return
        if not self.sink.commits_offsets:
            try:
                self.consumer.commit(committed.outputs.chunk.ends)
            except KafkaError as error:
                if final := hopeless(error, self.config):
                    raise final from None
                log.warning("the offsets were not committed: %r", error)
                raise Rewind("commit_failed") from None
        self._unsettled.remove(committed.outputs)
        self._account(committed)

    def _account(self, committed: Committed) -> None:
        messages = committed.outputs.messages
        dead = Counter(m.error.reason for m in messages if m.error is not None)
        lost = dead.total()
        topic, summary = self.config.input_topic, self.summary
        RECORDS.labels(topic, "scored").inc(len(messages) - lost)
        if dead:
            RECORDS.labels(topic, "dead_letter").inc(lost)
            for reason, count in dead.items():
                DEAD_LETTERS.labels(topic, reason).inc(count)
                summary.dead_letters[reason] = summary.dead_letters.get(reason, 0) + count
        skipped = len(committed.outputs.chunk.records) - len(messages)
        if skipped:
            RECORDS.labels(topic, "skipped").inc(skipped)
        summary.skipped += skipped
        summary.records += len(messages) + skipped
        summary.scored += len(messages) - lost
        summary.transactions += 1
        self._times.append(committed.seconds)
        self._ended = time.perf_counter(), time.process_time()
        self._alive = self._moved = time.monotonic()
        self.refused.clear()

    def _snapshot(self, *, last: bool = False) -> None:
        self._at("snapshot")
        self.checkpoint.stale -= self.given - self.consumer.waiting
        if not self._abandoned:
            if last:
                self.checkpoint.finish()
            self.checkpoint.save()
            if last:
                self.checkpoint.finish()
        self._saved = time.monotonic()

    # -- between rounds --------------------------------------------------------------------
    def _when_idle(self) -> None:
        now = time.monotonic()
        if now - self._busy >= IDLE_LOOK_S:
            self._look_for_topics(IDLE_LOOK_S)
        quiet = min(BACKLOG_LOOK_S, self.config.stall_timeout_s / 2)
        if self.to_end and self.consumer.partitions:
            quiet = 0.0
        if self.consumer.joined and now - max(self._moved, self._counted) >= quiet:
            self._counted = now
            self._look_for_backlog(now)

    def _look_for_backlog(self, now: float) -> None:
        """Nothing came: is there nothing, or do we fail to read it?"""
        try:
            unread, moved = self.consumer.backlog()
        except (KafkaError, TimeoutError) as error:
            log.debug("asking how much is unread failed: %r", error)
            return
        if moved or not unread:
            self._moved = now
        self.at_end = not unread and self.consumer.partitions > 0
        self._check_stall(now, f"{unread} records wait and none of them can be read")

    def _look_after(self) -> None:
        now = time.monotonic()
        if self.consumer.joined and not self.consumer.replaying:
            self._alive = self.built = now
        else:
            self._moved = now  # a matter of outage_timeout_s
            self._check_patience(now)
        if self.processor.watches:
            self.processor.look(self.consumer.elsewhere())
        self._at("snapshot")
        self.checkpoint.write()
        pressed = self.checkpoint.pressed
        due = now - self._saved >= self.config.snapshot_interval_s or pressed >= BEGIN_AT
        if due and not self.checkpoint.busy:
            self._settle()
            self._snapshot()
        if now - self._reported >= PROGRESS_S:
            self._reported = now
            self._report()

    def _finished(self) -> bool:
        config, now = self.config, time.monotonic()
        self.consumer.limit = self.size.count
        if config.max_events is not None:
            writing = sum(len(outputs.chunk.records) for outputs in self._unsettled)
            left = config.max_events - self.summary.records - writing
            if left <= 0:
                return True
            self.consumer.limit = min(self.size.count, left)
        if self.to_end and self.consumer.partitions:
            return self.at_end
        return config.idle_exit_s is not None and self._idle(now, config.idle_exit_s)

    def _idle(self, now: float, limit: float) -> bool:
        if not self.consumer.joined or self.consumer.replaying:
            self._busy = now
        elif not self.consumer.partitions:  # the group may still be forming
            limit += self.config.session_timeout_ms / 1e3
        return now - self._busy >= limit

    # -- when something is in doubt --------------------------------------------------------
    def _recover(self, why: Rewind) -> None:
        """Settle what was written, write again what was not, and seek to what is committed."""
        RECOVERIES.labels(why.cause).inc()
        causes = self.summary.recoveries
        causes[why.cause] = causes.get(why.cause, 0) + 1
        if isinstance(why, Poisoned):
            self.checkpoint.dirty = True
        self._settle_if_possible()
        self._check_reading()
        self._note_refused(why)
        while True:
            self._at("recover")
            try:
                self.sink.ready(self._join)
                if self._unsettled:
                    self._look_for_topics()
                self._resume()
            except Rewind as again:
                self._settle_if_possible()
                self._note_refused(again)
            except (TimeoutError, KafkaError) as error:
                log.warning("recovering from %s is tried again: %r", why.cause, error)
                self._trouble = f"; last: {error!r}"
            else:
                if why.cause != REPLAY_FAILED:
                    self._alive = self.built = time.monotonic()
                return
            self._check_patience(time.monotonic())
            self._pause.wait(RECOVER_S)
            self.consumer.keep_alive()

    def _note_refused(self, why: Rewind) -> None:
        """Raise when commits are refused again and again, though all that comes before succeeds.

        What does not answer is a matter of ``outage_timeout_s``.
        """
        if why.cause != REFUSED:
            return
        now = time.monotonic()
        self.refused = [*self.refused[:TRIES], now]
        lasted = now - self.refused[0]
        if len(self.refused) > TRIES and lasted > self.config.stall_timeout_s:
            raise StreamError(
                f"no commit for {lasted:.0f} s, though Kafka answers: {self.sink.trouble}",
                hint="what was committed is complete; the brokers' logs say more",
            )

    def _settle_if_possible(self) -> None:
        try:
            self._settle()
        except Rewind:
            log.debug("the chunk in flight did not become durable")

    def _resume(self) -> None:
        """Go on behind what the group has committed, writing again what is not among it."""
        self.consumer.learn(self.checkpoint.layout)
        found = self.consumer.committed()
        if found is None:
            self.consumer.keep_alive()
            return  # not in the group now: the next assignment comes back here
        owner, committed, first = found
        notes = self.consumer.notes
        while self._unsettled:
            outputs = self._unsettled.popleft()
            ends, starts = outputs.chunk.ends, outputs.chunk.starts
            there = {p: at for p, at in ends.items() if committed.get(p) == at}
            if there:  # it was committed after all; only the answer got lost
                seconds = self.config.commit_timeout_ms / 1e3
                self._account(Committed(outputs.only(there, owner), seconds))
            fits = {p: at for p, at in starts.items() if committed.get(p) == at}
            if fits:
                part = outputs.only(fits, owner)
                self._unsettled.appendleft(part)
                self.sink.start(part)
                self._settle()
                committed |= part.chunk.ends
                notes |= part.notes
        self._at("restore")
        layout = self.consumer.layout
        self.checkpoint.layout = layout
        log.info("in the group, with %d partitions", len(committed))
        if self.trail is not None:
            self.trail.resume(notes)
        self._begin(self.checkpoint.plan(committed, first), owner)
        self._moved = self._busy = time.monotonic()  # joining, however long, is not idling

    def _begin(self, plan: Plan, owner: Any) -> None:
        """Make the state of what was given to this worker, and serve that of which it has one."""
        kept = self.checkpoint
        known = (kept.applied.keys() & plan.keys()) - kept.stale
        self.consumer.begin(plan, owner, kept.stale & plan.keys() if known else frozenset())
        self.given = frozenset(plan)
        self.mine = len(plan)
        width = max(self.consumer.width, self.mine)
        self.processor.see_partitions(self.mine, width, self.consumer.layout.grown)

    # -- patience --------------------------------------------------------------------------
    def _look_for_topics(self, every: float = GONE_S / 2) -> None:
        """Raise when commits fail, or nothing comes, because a topic was deleted."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        missing = self.consumer.missing_topics()
        if missing is None:
            return
        self._gone = {name: self._gone.get(name, now) for name in missing}
        if deleted := sorted(name for name, at in self._gone.items() if now - at >= GONE_S):
            raise StreamError(
                f"deleted on {self.config.bootstrap_servers} while the stream ran: topic "
                + ", ".join(deleted),
                hint="create it again with as many partitions as before, then start again: what "
                "was not committed will be read again",
            )

    def _check_patience(self, now: float) -> None:
        """Raise when a stop, or Kafka's absence, has lasted too long."""
        if self.stop.is_set():
            self._stopping = self._stopping or now
            if now - self._stopping > self.config.drain_timeout_s:
                raise self._not_drained()
        if now - min(self._alive, self.built) > self.config.outage_timeout_s:
            raise StreamError(
                f"no commit and no group membership for {self.config.outage_timeout_s:g} s, or "
                "none of the records that the state is to be rebuilt from, "
                f"at {self.config.bootstrap_servers}{self._trouble}",
                hint="check the brokers; what was committed is complete, start again to go on",
            )

    def _not_drained(self) -> StreamError:
        return StreamError(
            f"stopped, but the last chunk could not be committed within "
            f"{self.config.drain_timeout_s:g} s",
            hint="nothing is lost: it will be read again",
        )

    def _check_stall(self, now: float, why: str) -> None:
        if now - self._moved > self.config.stall_timeout_s:
            raise StreamError(
                f"no commit for {self.config.stall_timeout_s:g} s while records wait: {why}",
                hint="what was committed is complete; where a chunk takes so long, lower "
                "stream.max_records or raise stream.stall_timeout_s",
            )

    def _check_reading(self) -> None:
        """Raise when what is to be read next could not be read for too long."""
        found = self.consumer.unreadable
        if found.lasting(self.config.stall_timeout_s):
            raise StreamError(
                f"{self.config.input_topic} cannot be read, tried for "
                f"{self.config.stall_timeout_s:g} s: {found.why}",
                hint="a record there is damaged: kafka-delete-records.sh removes it with those "
                "before it, kafka-consumer-groups.sh --reset-offsets goes past it",
            )

    def _at(self, step: str) -> None:
        self.step = step, time.monotonic()

    def _check_step(self) -> None:
        """Raise when the loop hangs in one step; runs on the supervisor's thread."""
        (step, since), now, config = self.step, time.monotonic(), self.config
        limit = config.stall_timeout_s + GRACE_S
        if step == "poll":
            limit += config.commit_timeout_ms / 1e3
        elif step != "process":  # each of these has a bound of its own
            limit += config.outage_timeout_s + config.drain_timeout_s
        if now - since > limit:
            raise StreamError(
                f"no commit for {now - since:.0f} s: the worker hangs in the step {step!r}",
                hint="what was committed is complete, start again to go on; py-spy dump shows "
                "where a process hangs",
            )
        if self.stop.is_set() and step in ("poll", "process"):
            self._stopping = self._stopping or now
            if now - max(since, self._stopping) > config.drain_timeout_s + GRACE_S:
                raise self._not_drained()

    # -- telling ---------------------------------------------------------------------------
    def _report(self) -> None:
        lag = self.consumer.lag()
        STATE_SINCE.labels(self.config.input_topic).set(self.checkpoint.start / 1e3)
        if self.on_progress is None:
            return
        summary = self.summary
        began = self._began[0] if self._began else time.perf_counter()
        self.on_progress(
            StreamProgress(
                summary.records,
                summary.scored,
                summary.records - summary.scored - summary.skipped,
                summary.replayed,
                lag,
                self.consumer.partitions,
                self.consumer.replaying,
                time.perf_counter() - began,
            )
        )

    def _summarise(self) -> StreamSummary:
        summary = self.summary
        if self._began and summary.transactions:
            summary.seconds = self._ended[0] - self._began[0]
            summary.cpu_seconds = self._ended[1] - self._began[1]
        times = sorted(self._times)
        if times:
            summary.commit_ms_p50 = round(times[len(times) // 2] * 1e3, 3)
            summary.commit_ms_p99 = round(times[int(len(times) * 0.99)] * 1e3, 3)
        return summary
