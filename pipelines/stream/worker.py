"""The Kafka door: consume, score, produce, commit.

``run()`` drives one vertical over one input topic until it is told to stop. Exactly once by
default: answers, dead letters and offsets in one transaction. See ``docs/streaming.md``.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from kafka.errors import KafkaError

from plinth.engine import Engine, Refused, Sla
from plinth.pipelines.stream.checkpoint import Keeper, claim
from plinth.pipelines.stream.kafka_consumer import KafkaReader, prepare, vanished
from plinth.pipelines.stream.kafka_sink import (
    AtLeastOnceSink,
    ExactlyOnceSink,
    KafkaSink,
    StreamError,
)
from plinth.pipelines.stream.loop import Answerer, Chunk, Poisoned, Rewind, Scored, pump
from plinth.pipelines.stream.metrics import DEAD_LETTERS, RECORDS, RECOVERIES, REFUSED
from plinth.pipelines.stream.scorer import Scorer
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals.contract import Vertical

__all__ = ["StreamConfig", "StreamError", "StreamProgress", "StreamSummary", "run"]

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
GONE_S = 3.0
"""A topic that is missing for so long was deleted; brokers may differ for a moment."""
IDLE_LOOK_S = 15.0
"""After so long without records, and as often, we look whether the topics are still there."""
KEPT_TIMES = 100_000


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


def run(
    vertical: Vertical[Any, Any],
    engine: Engine,
    config: StreamConfig,
    stop: threading.Event,
    on_progress: Callable[[StreamProgress], None] | None = None,
    *,
    sla: Sla | None = None,
) -> StreamSummary:
    """Stream until ``stop`` is set, or until ``idle_exit_s`` or ``max_events`` says so.

    Args:
        vertical: reads and answers the records.
        engine: started, with the vertical's models.
        config: which Kafka and how.
        stop: finishes the chunk in hand, commits, takes a snapshot and leaves the group.
        on_progress: called about once a second.
        sla: the promise asked of the engine; by default the vertical's own. What would be
            rejected or degraded is late instead: a stream waits rather than scores worse.

    Raises:
        ConfigError: no broker, missing topics or an unusable state folder; nothing has started.
        StreamError: Kafka stayed away or refuses; what was committed is complete.
        PlinthError: the engine failed for good; nothing of the chunk in hand was committed.
    """
    with claim(config.state_dir) as name:
        partitions = prepare(config)
        identity = config.instance_id or name or uuid.uuid4().hex
        stream = Stream(vertical, config, identity, partitions, stop, on_progress)
        scorer = Scorer(
            vertical,
            engine,
            wait=stream.refused,
            applied=stream.keeper.note,
            max_record_bytes=config.max_record_bytes,
            stateful=stream.keeper.stateful,
            sla=sla or vertical.sla,
        )
        try:
            return stream.run(scorer)
        finally:
            stream.close()


class Stream:
    """One run: the loop's parts, and how they recover together. :func:`run` is the door."""

    def __init__(
        self,
        vertical: Vertical[Any, Any],
        config: StreamConfig,
        identity: str,
        partitions: dict[str, int],
        stop: threading.Event,
        on_progress: Callable[[StreamProgress], None] | None = None,
    ) -> None:
        self.config = config
        self.stop = stop
        self.on_progress = on_progress
        self.summary = StreamSummary()
        self.keeper = Keeper(
            vertical,
            config.state_dir / "state.snapshot" if config.state_dir else None,
            {"vertical": vertical.name, "topic": config.input_topic, "group": config.group},
            config.replay_max_records,
        )
        self.reader = KafkaReader(config, identity)
        common: dict[str, Any] = {
            "vertical": vertical.name,
            "identity": identity,
            "partitions": partitions,
            "on_durable": self._durable,
        }
        self.sink: KafkaSink = (
            ExactlyOnceSink(config, **common)
            if config.guarantee == "exactly_once"
            else AtLeastOnceSink(config, commit=self.reader.commit, **common)
        )
        self._undone: list[Scored] = []
        self._times: deque[float] = deque(maxlen=KEPT_TIMES)
        self._began: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)
        self._alive = self._reported = self._saved = self._busy = time.monotonic()
        self._stopping: float | None = None
        self._trouble = ""
        self._gone: dict[str, float] = {}
        self._looked = 0.0
        self._breath = threading.Event()

    # -- the run ---------------------------------------------------------------------------
    def run(self, answerer: Answerer) -> StreamSummary:
        """Pump until the end, then keep the state."""
        pump(
            self.reader,
            answerer,
            self.sink,
            self.stop,
            recover=self._recover,
            after=self._after,
        )
        if not self._undone:
            self.keeper.save()
        self._report()
        return self._summarise()

    def close(self) -> None:
        """Give back partitions and producers."""
        try:
            self.reader.close()
        finally:
            self.sink.close()

    # -- after every turn ------------------------------------------------------------------
    def _after(self, chunk: Chunk | None) -> bool:
        now = time.monotonic()
        if self.reader.joined:
            self._alive = now
        else:
            self._patience(now)
        if chunk is not None:
            self._busy = now
            if chunk.replay:
                self._replayed(chunk)
            elif self._began is None:
                self._began = time.perf_counter(), time.process_time()
        else:
            self.sink.settle()
            if now - self._busy >= IDLE_LOOK_S:
                self._look(IDLE_LOOK_S)
        if now - self._saved >= self.config.snapshot_interval_s:
            self.sink.settle()
            self.keeper.save()
            self._saved = time.monotonic()
        if now - self._reported >= PROGRESS_S:
            self._reported = now
            self._report()
        return self._finished(now)

    def _finished(self, now: float) -> bool:
        config = self.config
        if config.max_events is not None:
            left = config.max_events - self.summary.records - self.sink.in_flight
            if left <= 0:
                return True
            self.reader.limit = min(config.max_records, left)
        return config.idle_exit_s is not None and self._idle(now, config.idle_exit_s)

    def _idle(self, now: float, limit: float) -> bool:
        if not self.reader.joined or self.reader.replaying:
            self._busy = now
        elif not self.reader.partitions:  # the group may still be forming
            limit += self.config.session_timeout_ms / 1e3
        return now - self._busy >= limit

    def _replayed(self, chunk: Chunk) -> None:
        count = len(chunk.records)
        self.summary.replayed += count
        RECORDS.labels(self.config.input_topic, "replayed").inc(count)

    def _durable(self, scored: Scored, seconds: float) -> None:
        dead = Counter(m.error.reason for m in scored.messages if m.error is not None)
        lost = dead.total()
        topic, summary = self.config.input_topic, self.summary
        RECORDS.labels(topic, "scored").inc(len(scored.messages) - lost)
        if dead:
            RECORDS.labels(topic, "dead_letter").inc(lost)
            for reason, count in dead.items():
                DEAD_LETTERS.labels(topic, reason).inc(count)
                summary.dead_letters[reason] = summary.dead_letters.get(reason, 0) + count
        summary.records += len(scored.messages)
        summary.scored += len(scored.messages) - lost
        summary.transactions += 1
        self._times.append(seconds)
        self._ended = time.perf_counter(), time.process_time()
        self._alive = time.monotonic()

    # -- when something is in doubt --------------------------------------------------------
    def _recover(self, why: Rewind) -> None:
        """Settle what was written, write again what was not, and seek to what is committed."""
        RECOVERIES.labels(why.cause).inc()
        causes = self.summary.recoveries
        causes[why.cause] = causes.get(why.cause, 0) + 1
        if isinstance(why, Poisoned):
            self.keeper.torn = True
        self._undone += self.sink.take_back()
        while True:
            try:
                self.sink.ready()
                if self._undone:
                    self._look()
                if self._resume():
                    return
            except Rewind:
                self._undone = self.sink.take_back() + self._undone
            except (TimeoutError, KafkaError) as error:
                log.warning("recovering from %s is tried again: %r", why.cause, error)
                self._trouble = f"; last: {error!r}"
            self._patience(time.monotonic())
            self._breath.wait(0.2)
            self.reader.keep_alive()

    def _look(self, every: float = GONE_S / 2) -> None:
        """Raise when commits fail, or nothing comes, because a topic was deleted."""
        now = time.monotonic()
        if now - self._looked < every:
            return
        self._looked = now
        missing = vanished(self.config)
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

    def _resume(self) -> bool:
        found = self.reader.committed()
        if found is None:
            self.reader.keep_alive()
            return True  # not in the group now: the next assignment comes back here
        owner, committed, first = found
        while self._undone:
            scored = self._undone.pop(0)
            there = {p: at for p, at in scored.chunk.ends.items() if committed.get(p) == at}
            if there:  # it was committed after all; only the answer got lost
                self._durable(scored.only(there, owner), self.config.commit_timeout_ms / 1e3)
            fits = {p: at for p, at in scored.chunk.starts.items() if committed.get(p) == at}
            if fits:
                part = scored.only(fits, owner)
                self.sink.write(part)
                self.sink.settle()
                committed |= part.chunk.ends
        self.reader.begin(self.keeper.plan(committed, first), owner)
        return True

    def _patience(self, now: float) -> None:
        """Raise when there was no sign of life from Kafka for too long."""
        if self.stop.is_set():
            self._stopping = self._stopping or now
            if now - self._stopping > self.config.drain_timeout_s:
                raise StreamError(
                    f"stopped, but the last chunk could not be committed within "
                    f"{self.config.drain_timeout_s:g} s",
                    hint="nothing is lost: it will be read again",
                )
        if now - self._alive > self.config.outage_timeout_s:
            raise StreamError(
                f"no commit and no group membership for {self.config.outage_timeout_s:g} s "
                f"at {self.config.bootstrap_servers}{self._trouble}",
                hint="check the brokers; what was committed is complete, start again to go on",
            )

    def refused(self, refused: Refused) -> None:
        """The engine has too much work: wait in the group, without reading on."""
        REFUSED.inc()
        self._alive = time.monotonic()
        self._patience(self._alive)
        self._breath.wait(min(max(refused.retry_after or 0.05, 0.005), 1.0))
        self.reader.keep_alive()

    # -- telling ---------------------------------------------------------------------------
    def _report(self) -> None:
        lag = self.reader.lag()
        if self.on_progress is None:
            return
        summary = self.summary
        began = self._began[0] if self._began else time.perf_counter()
        self.on_progress(
            StreamProgress(
                summary.records,
                summary.scored,
                summary.records - summary.scored,
                summary.replayed,
                lag,
                self.reader.partitions,
                self.reader.replaying,
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
