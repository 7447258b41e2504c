"""The member of the consumer group: gives chunks, and knows offsets, lag and what was lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    OffsetOutOfRangeError,
)

from plinth.pipelines.stream.chunks import Chunk, Layout, Partition, Record, Rewind
from plinth.pipelines.stream.kafka_clients import (
    Client,
    Member,
    Noted,
    give_place_up,
    hopeless,
    missing_topics,
    noted,
    unreachable,
)
from plinth.pipelines.stream.kafka_replay import STEP_RECORDS, Elsewhere, Past, Plan
from plinth.pipelines.stream.metrics import CUT, GROWN, LAG, LOST, OPEN_TRANSACTION, PARTITIONS
from plinth.pipelines.stream.settings import StreamConfig

log = logging.getLogger(__name__)

REPLAY_FAILED = "replay_failed"
"""Cause to go back for: the past could not be read."""
IDLE_S = 0.2
JOIN_S = 0.1
"""Shortest poll outside of the group: the client takes its place in a poll, and beside much other
work never in one of a millisecond."""
KEEP_ALIVE_S = 1.0
OFTEN = 3
"""Times that one error is met before reading is called broken."""
FORGET_S = 60.0
"""After so long without it an error is a new one: what lasts comes back within seconds."""


class Unreadable(NamedTuple):
    """What cannot be read, however often: records of other partitions may well be.

    Args:
        why: the error.
        since: when it came first, ``monotonic``.
        times: how often it came, with no other between.
        last: when it came last.
    """

    why: str = ""
    since: float = 0.0
    times: int = 0
    last: float = 0.0

    def again(self, why: str) -> Unreadable:
        """With an error that came now."""
        now = time.monotonic()
        if why != self.why or now - self.last > FORGET_S:
            return Unreadable(why, now, 1, now)
        return self._replace(times=self.times + 1, last=now)

    def lasting(self, seconds: float) -> bool:
        """Whether it came back, for longer than so long."""
        return self.times >= OFTEN and self.last - self.since > seconds


class GroupConsumer:
    """A member of the consumer group that gives chunks of records.

    Whenever the membership changes, :meth:`poll` discards what it has and raises Rewind; the
    run loop then calls :meth:`committed` and :meth:`begin`, which seek every partition anew. So
    no record of an older membership is ever used, and none is skipped.

    While the past of some partitions is read, others may be served: then :meth:`poll` gives records
    of both, in steps, and each side gets half of the time.

    Args:
        config: which Kafka and how.
        identity: of the worker.
        client: brings the membership.
        held: partitions that it asks for, since the state of these is there.

    Attributes:
        limit: records of a chunk at most.
        step: the same of records that are read again.
        unreadable: what could not be read though Kafka is there.
    """

    def __init__(
        self,
        config: StreamConfig,
        identity: str,
        client: Client,
        held: Set[Partition] = frozenset(),
    ) -> None:
        self.config = config
        self.limit = min(config.max_records, config.max_events or config.max_records)
        try:
            self.member: Member = client.member(config, identity, self._doubt, held)
        except (KafkaError, TimeoutError) as error:
            raise unreachable(config, error) from None
        self._seconds = config.commit_timeout_ms / 1e3
        self._claim: Hashable = None
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._past = Past(config, {})
        self.step = STEP_RECORDS
        self._cut: dict[Partition, int] = {}
        self._polled = time.monotonic()
        self._held_back: dict[Partition, int] = {}
        self._read_to: dict[Partition, int] = {}
        self._width = self.width
        self._layout = Layout()
        self.notes: dict[Partition, str] = {}
        self._asked: Callable[[float], bool] | None = None
        self._elsewhere = Elsewhere(config)
        self._closed = False
        self.unreadable = Unreadable()

    # -- reading ---------------------------------------------------------------------------
    def poll(self) -> Chunk | None:
        """Up to ``limit`` records, or what came within the linger time of the first one.

        ``None`` when none came in time.

        Raises:
            Rewind: the membership changed, or what was to be read is gone.
            StreamError: Kafka refuses, or sends what cannot be read here.
        """
        return self._in_turns() if self._past.waiting else self._read(IDLE_S)

    def _read(self, idle: float) -> Chunk | None:
        """Records that are due, or ``None`` when none came within the time."""
        parts: dict[Partition, list[Record]] = {}
        count, until, owner = 0, 0.0, None
        while count < self.limit:
            wait = until - time.monotonic() if count else idle
            if count and wait <= 0:
                break
            if not count:
                self._see_growth()
            polled = self._poll(wait, self.limit - count)
            owner = self._owner()
            if owner is None:
                return None
            if not polled:
                break
            if not count:
                until = time.monotonic() + self.config.linger_ms / 1e3
            for place, records in polled.items():
                parts.setdefault(place, []).extend(records)
                count += len(records)
        return self._chunk(parts, owner) if parts else None

    def keep_alive(self, every: float = KEEP_ALIVE_S) -> None:
        """Stay in the group without reading on, while work waits.

        Args:
            every: seconds between two looks at the group.
        """
        if time.monotonic() - self._polled > every and self._poll(0.001, 1):
            self._claim = None  # a record was taken: seek back to it

    def _in_turns(self) -> Chunk | None:
        """Records that are due, or those that are read again next; looks at the group each time."""
        waiting = self._past.waiting
        try:
            chunk = self._past.in_turns(partial(self._read, 0.0), self.step)
        except KafkaError as error:
            log.warning("reading again for the state failed and is started anew: %r", error)
            self._note_failure(error)
            self._claim = None
            raise Rewind(REPLAY_FAILED) from None
        if self._past.waiting != waiting and not self._go_on():
            self._claim = None
        return chunk

    def _go_on(self) -> bool:
        """Read on where it stands; false where the assignment has changed meanwhile."""
        return self.member.begin(self._positions, self._past.waiting)

    def _poll(self, seconds: float, limit: int) -> Mapping[Partition, list[Record]]:
        if self.member.owner() is None:
            seconds = max(seconds, JOIN_S)
        self._polled = time.monotonic()
        try:
            return self.member.poll(seconds, limit)
        except OffsetOutOfRangeError:
            self._claim = None
            raise Rewind("deleted_unread") from None
        except LogTruncationError as error:
            self._claim = None
            for place, known in error.divergent_offsets.items():
                if known is not None:
                    self._cut[Partition(*place)] = known.offset
            raise Rewind("log_cut") from None
        except KafkaError as error:
            if final := hopeless(error, self.config):
                raise final from None
            log.warning("reading failed and is tried again: %r", error)
            self._note_failure(error)
            self._claim = None
            return {}

    def _note_failure(self, error: KafkaError) -> None:
        """Remember since when reading fails for another cause than Kafka's absence."""
        if not error.retriable:
            self.unreadable = self.unreadable.again(repr(error))

    def _doubt(self) -> None:
        self._claim = None

    def _see_growth(self) -> None:
        """Join again once the topic has more partitions.

        The client leaves that to the group's leader, and a static member that comes back under
        its name is the leader without being told so (before KIP-814): nobody would notice.
        """
        if (width := self.width) > self._width:
            log.info("%s has %d partitions now", self.config.input_topic, width)
            self._width = width
            self.member.rejoin()

    def _owner(self) -> Any:
        owner = self.member.owner()
        if owner is None:
            self._claim = None
            return None
        if self._claim_of(owner, self.member.places()) != self._claim:
            raise Rewind("assigned")
        return owner

    def _claim_of(self, owner: Any, places: Iterable[Partition]) -> Hashable:
        # some brokers count generations anew, so the partitions are compared too
        return self.member.claim(owner), frozenset(places)

    def _chunk(self, parts: dict[Partition, list[Record]], owner: Any) -> Chunk:
        starts, ends, every = {}, {}, []
        for place, records in parts.items():
            starts[place] = self._positions[place]
            ends[place] = self._positions[place] = records[-1].offset + 1
            every.extend(records)
        return Chunk(every, starts, ends, owner, layout=self.layout)

    # -- positions -------------------------------------------------------------------------
    def committed(self) -> tuple[Any, dict[Partition, int], dict[Partition, int]] | None:
        """Our claim, the group's offset and the oldest offset of every partition we have.

        ``None`` while we are not in the group. A partition without an offset gets one, at the
        start or the end as configured.

        Raises:
            KafkaError: the broker did not answer in time.
        """
        owner = self.member.owner()
        if owner is None:
            return None
        places = self.member.places()
        if not places:
            return owner, {}, {}
        known = self._committed()
        first = self.member.first(places, self._seconds)
        last = self.member.last(places, self._seconds)
        self._ends = last
        found: dict[Partition, int] = {}
        fresh: dict[Partition, int] = {}
        for place in places:
            at = known.get(place)
            if at is None:
                at = first[place] if self.config.start_at == "earliest" else last[place]
                fresh[place] = at
            found[place] = self._retained(place, at, first[place], last[place])
            if found[place] < at:
                fresh[place] = found[place]
        if fresh:
            self.commit(fresh)
        return owner, found, first

    def _committed(self) -> dict[Partition, int]:
        """The group's offset of every partition that has one; also tells the layout."""
        places = [Partition(self.config.input_topic, p) for p in range(self.width)]
        try:
            found: Noted = self.member.committed(places, self._seconds)
        except KafkaTimeoutError:
            raise KafkaTimeoutError(
                "the group's offsets were not told: the coordinator is away, or a transaction that "
                "nobody ends keeps them unstable (kafka-transactions.sh find-hanging)"
            ) from None
        self.notes = {place: note for place, (_, note) in found.items()}
        for note in self.notes.values():
            self.learn(Layout.read(note))
        self._see_moved_keys(len(places))
        return {place: at for place, (at, _) in found.items()}

    def learn(self, layout: Layout) -> None:
        """Take in what somebody knew of the topic's layout."""
        self._layout = self._layout.joined(layout)
        GROWN.labels(self.config.input_topic).set(self._layout.grown / 1e3)

    def _see_moved_keys(self, width: int) -> None:
        """Note when the topic has more partitions than the group had answered with."""
        before = self._layout.width
        if 0 < before < width:
            self.learn(Layout(width, int(time.time() * 1e3)))
            log.warning(
                "%s has grown from %d to %d partitions: a key may lie in another one than before, "
                "and where several workers share them, with one that does not know its past; "
                "answers that this may concern say so until the longest window has passed",
                self.config.input_topic, before, width,
            )  # fmt: skip
        self.learn(Layout(width))

    def _retained(self, place: Partition, at: int, first: int, last: int) -> int:
        cut = min(self._cut.pop(place, last), last)
        if at > cut:
            CUT.labels(place.topic, str(place.partition)).inc(at - cut)
            log.error(
                "%s[%d]: the log was cut: offsets %d to %d were answered and are not there any "
                "more, or are of other records. Going on at %d; what came there since it was cut "
                "is not read where that was not seen at once: kafka-consumer-groups.sh "
                "--reset-offsets reads it",
                *place, cut, at - 1, cut,
            )  # fmt: skip
            return cut
        if first <= at:
            return at
        LOST.labels(place.topic, str(place.partition)).inc(first - at)
        log.error(
            "%s[%d]: offsets %d to %d were deleted by retention before they were read; "
            "raise the topic's retention.ms or add workers",
            *place, at, first - 1,
        )  # fmt: skip
        return first

    def begin(self, plan: Plan, owner: Any, unknown: Set[Partition] = frozenset()) -> None:
        """Go on at the second number of each partition, once [first, second) was replayed.

        Args:
            plan: by partition.
            owner: who asked for it.
            unknown: partitions with a long past, while which is read the others are served.
        """
        self._past.close()
        self._positions = {place: end for place, (_, end) in plan.items()}
        PARTITIONS.set(len(plan))
        LAG.clear()
        self._past = Past(self.config, plan, unknown)
        going_on = self._go_on()
        self._claim = self._claim_of(owner, plan) if going_on else None

    def commit(self, ends: Mapping[Partition, int]) -> None:
        """Commit offsets outside of a transaction.

        Raises:
            KafkaError: they were not committed.
        """
        self.member.commit(noted(ends, self.layout, {}), self._seconds)

    @property
    def joined(self) -> bool:
        """This worker is in the group and reads what it was given."""
        return self._claim is not None

    @property
    def partitions(self) -> int:
        """Partitions this worker reads."""
        return len(self._positions) if self.joined else 0

    @property
    def width(self) -> int:
        """Partitions of the input topic, as far as is known."""
        return self.member.width

    def elsewhere(self) -> list[Record]:
        """A few of the latest records of partitions that others read, now and then; never waits."""
        mine = {place.partition for place in self._positions}
        others = [p for p in range(self.width) if p not in mine]
        return self._elsewhere.take(others) if self.joined and others else []

    @property
    def layout(self) -> Layout:
        """Partitions of the input topic, and when it has grown, as of the last assignment."""
        return self._layout

    def ask_layout(self) -> None:
        """Ask how many partitions the topic has, if others share it; :meth:`see_layout` waits."""
        if len(self._positions) >= self.width:
            return
        self._asked = self.member.ask_width()

    def see_layout(self) -> None:
        """See that the topic has not grown before :meth:`ask_layout`: then keys may have moved.

        Raises:
            Rewind: it has, or nobody says.
        """
        if self._asked is None:
            return
        answered, self._asked = self._asked, None
        if not answered(self._seconds):
            raise Rewind("layout_unknown")
        if self.width > self._layout.width:
            raise Rewind("grown")

    @property
    def replaying(self) -> int:
        """Partitions whose state is still being rebuilt."""
        return self._past.partitions

    @property
    def waiting(self) -> Set[Partition]:
        """Partitions that are not served, since their past is not in the state yet."""
        return self._past.waiting

    def lag(self) -> int:
        """Records waiting in the partitions we have; also set as metric."""
        total = 0
        for place in self.member.places():
            at = self._positions.get(place)
            if at is not None:
                # the client knows the end of a partition from its first fetch on
                end = max(self.member.seen_end(place), self._ends.get(place, 0))
                behind = max(0, end - at)
                LAG.labels(place.topic, str(place.partition)).set(behind)
                total += behind
        return total

    def backlog(self) -> tuple[int, bool]:
        """Offsets of committed records not read yet, and whether we got on since the last call.

        Also says which partitions wait for somebody's open transaction: nobody who reads
        committed records can pass it.

        Raises:
            KafkaError: the broker did not answer in time.
        """
        places = [p for p in self.member.places() if p in self._positions]
        if not places:
            return 0, True
        stable = self.member.last(places, self._seconds)
        at = {p: self.member.position(p, self._seconds) for p in places}
        for place in places:
            self._say_held_back(place, self.member.seen_end(place) - stable[place])
        moved, self._read_to = at != self._read_to, at
        return sum(max(0, stable[place] - at[place]) for place in places), moved

    def _say_held_back(self, place: Partition, count: int) -> None:
        count = max(0, count)
        OPEN_TRANSACTION.labels(place.topic, str(place.partition)).set(count)
        if count and place not in self._held_back:
            log.warning(
                "%s[%d]: a transaction of somebody who writes there is open since %d offsets; "
                "nothing behind it can be read before it ends "
                "(kafka-transactions.sh find-hanging names one that never will)",
                *place, count,
            )  # fmt: skip
            self._held_back[place] = count
        elif not count and self._held_back.pop(place, 0):
            log.warning("%s[%d]: the open transaction has ended", *place)

    def missing_topics(self) -> set[str] | None:
        """Topics of the stream that the cluster does not have; ``None`` if it does not say."""
        return missing_topics(self.config)

    def leave(self) -> None:
        """Give the partitions away, where others are to have them at once; :meth:`close` follows.

        All that was read is committed.
        """
        if self.config.stays:
            return
        member = self.member.identity() if self.config.instance_id is not None else ""
        self.close()
        if member:
            give_place_up(self.config, member)

    def close(self) -> None:
        """Leave the group, if that was not done yet."""
        self._past.close()
        if not self._closed:
            self._closed = True
            self.member.close()
