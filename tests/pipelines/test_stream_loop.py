"""The run loop, the processor and the checkpoint over a log in memory: every failure, no Kafka."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kafka.structs import TopicPartition
from kafka_fixtures import eventually
from tally import TallyVertical, expect_each_once, started_engine

from plinth.engine import Call, ConfigError, Engine, InputError, ModelError, QueueFull
from plinth.pipelines.formats.registry import RegistryAway
from plinth.pipelines.state.snapshots import claim
from plinth.pipelines.stream import kafka_replay
from plinth.pipelines.stream.checkpoint import Checkpoint
from plinth.pipelines.stream.chunks import (
    Chunk,
    Committed,
    Layout,
    Outputs,
    Partition,
    Rewind,
    StreamError,
)
from plinth.pipelines.stream.kafka_consumer import REPLAY_FAILED, Unreadable
from plinth.pipelines.stream.kafka_sink import REFUSED
from plinth.pipelines.stream.processor import MAX_FAILURES, KeyPlaces, Processor
from plinth.pipelines.stream.settings import StreamConfig
from plinth.pipelines.stream.worker import TRIES, StreamSummary, Worker

P = Partition("in", 0)
ONE = Layout(1)
ENGINE = started_engine(TallyVertical())


@pytest.fixture(scope="module", autouse=True)
def nothing_to_wait_for() -> Iterator[None]:
    """What is in doubt can be settled at once: no broker is away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plinth.pipelines.stream.worker.RECOVER_S", 0.001)
        yield


@dataclass(frozen=True)
class Line:
    """A record in memory."""

    offset: int
    value: bytes | None
    topic: str = "in"
    partition: int = 0
    timestamp: int = 0
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


def lines(count: int, **amounts: float) -> list[Line]:
    return [
        Line(i, json.dumps({"id": i, "card": f"c{i % 5}", "amount": amounts.get(f"at_{i}", 1.0)})
             .encode())
        for i in range(count)
    ]  # fmt: skip


@dataclass
class MemoryLog:
    """One partition in memory, consumer and sink at once.

    ``fates`` says what becomes of each commit: "ok", "lost" or refused (nothing was written, and we
    are told so) or "doubt" (it was written, and we are told it was not).
    """

    records: list[Line]
    fates: list[str] = field(default_factory=list)
    size: int = 4
    at: int = 0
    mark: int = 0
    durable: int = 0
    written: list[Any] = field(default_factory=list)
    limit: int = 4
    joined: bool = False
    partitions: int = 1
    width: int = 1
    layout: Layout = ONE
    waiting: frozenset[Partition] = frozenset()
    step: int = 4
    replaying: int = 0
    commits_offsets: bool = True
    trouble: str = "too large"
    writing: Outputs | None = None
    kept_alive: int = 0
    unreadable: Unreadable = field(default_factory=Unreadable)
    notes: dict[Partition, str] = field(default_factory=dict)

    # -- as a consumer -----------------------------------------------------------------------
    def poll(self) -> Chunk | None:
        if not self.joined:
            raise Rewind("assigned")
        replay = self.at < self.mark
        size = self.size if replay else min(self.size, self.limit)
        end = min(self.at + size, self.mark if replay else len(self.records))
        if end == self.at:
            return None
        chunk = Chunk(list(self.records[self.at : end]), {P: self.at}, {P: end}, None, replay)
        self.at = end
        return chunk

    def committed(self) -> tuple[None, dict[Partition, int], dict[Partition, int]]:
        return None, {P: self.durable}, {P: 0}

    def learn(self, layout: Layout) -> None:
        assert layout.width <= 1

    def ask_layout(self) -> None:
        """It never grows."""

    def see_layout(self) -> None:
        """It never grows."""

    def begin(
        self, plan: dict[Partition, tuple[int, int]], owner: None, unknown: frozenset[Partition]
    ) -> None:
        self.at, self.mark = plan[P]
        self.joined = True

    def keep_alive(self, every: float = 1.0) -> None:
        self.kept_alive += 1

    def lag(self) -> int:
        return len(self.records) - self.at

    def backlog(self) -> tuple[int, bool]:
        return self.lag(), False

    def missing_topics(self) -> set[str]:
        return set()

    def leave(self) -> None:
        assert self.writing is None  # whoever goes on begins behind all that was written

    # -- as a sink ---------------------------------------------------------------------------
    def ready(self, meanwhile: Callable[[], None]) -> None:
        meanwhile()

    def start(self, outputs: Outputs) -> None:
        assert self.writing is None
        self.writing = outputs

    def finish(self) -> Committed | None:
        outputs, self.writing = self.writing, None
        if outputs is None:
            return None
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate not in ("lost", REFUSED):
            self.durable = outputs.chunk.ends[P]
            self.written += outputs.messages
        if fate != "ok":
            raise Rewind(fate)
        return Committed(outputs, 0.001)

    def close(self) -> None:
        return None

    # -- what is done with it ----------------------------------------------------------------
    def run(
        self,
        vertical: TallyVertical,
        engine: Engine = ENGINE,
        checkpoint: Checkpoint | None = None,
        **settings: Any,
    ) -> StreamSummary:
        kept = checkpoint or check(vertical)
        settings = {"max_events": len(self.records), **settings}
        config = StreamConfig(input_topic="in", output_topic="out", **settings)
        processor = Processor(vertical, engine, stateful=True)
        log: Any = self
        return Worker(config, log, log, processor, kept, threading.Event()).run_supervised()

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(m.value) for m in self.written if m.error is None]


def check(vertical: TallyVertical, path: Path | None = None, **more: Any) -> Checkpoint:
    return Checkpoint(vertical, path, {"vertical": "tally"}, more.get("replay_max_records", 1_000))


def process(processor: Processor, chunk: Chunk) -> tuple[Outputs, list[float]]:
    """The outputs of a chunk, and the waits it asked for."""
    steps: Generator[float, None, Outputs] = processor.process(chunk)
    waits: list[float] = []
    while True:
        try:
            waits.append(next(steps))
        except StopIteration as end:
            return end.value, waits


class Strict(Engine):
    """A running engine whose queue takes so many rows of a call at most."""

    def __init__(self, rows: int, times: int = 1_000_000) -> None:
        super().__init__()
        self.rows, self.times = rows, times
        self.asked: list[int] = []
        for model in TallyVertical().models():
            self.add(model)
        self.start()

    def submit(self, call: Call, sla: Any = None) -> Future[Any]:
        assert isinstance(call.rows, torch.Tensor)
        self.asked.append(len(call.rows))
        if len(call.rows) > self.rows and self.times > 0:
            self.times -= 1
            refused: Future[Any] = Future()
            refused.set_exception(QueueFull("the queue is full", retry_after=0.001))
            return refused
        return super().submit(call, sla)


@given(
    fates=st.lists(st.sampled_from(["ok", "lost", "doubt"]), max_size=12),
    size=st.integers(1, 9),
    bad=st.sets(st.integers(0, 29), max_size=3),
)
def test_whatever_becomes_of_commits_nothing_is_lost_or_counted_twice(
    fates: list[str], size: int, bad: set[int]
) -> None:
    vertical = TallyVertical()
    records = lines(30)
    for number in bad:
        records[number] = Line(number, b"{")
    log = MemoryLog(records, fates, size)
    log.run(vertical)
    answers = log.answers()
    assert sorted(a["id"] for a in answers) == sorted(set(range(30)) - bad)
    assert len(log.written) == 30
    seen: dict[str, int] = {}
    for answer in answers:
        seen[answer["card"]] = seen.get(answer["card"], 0) + 1
        assert answer["count"] == seen[answer["card"]]


def test_a_poison_record_of_a_stateful_vertical_is_found_by_scoring_alone() -> None:
    vertical = TallyVertical()
    log = MemoryLog(lines(20, at_6=-2.0), size=5)
    log.run(vertical)
    errors = [(m.record.offset, m.error.reason) for m in log.written if m.error]
    assert errors == [(6, "infer_failed")]
    assert len(log.answers()) == 19


class Panic(BaseException):
    """As the Rust libraries of Python raise it when they meet a fault of their own."""


@pytest.mark.parametrize("step", ["parse", "infer", "encode", "evidence"])
def test_a_record_on_which_a_library_panics_is_a_dead_letter(step: str) -> None:
    class Panicking(TallyVertical):
        def parse(self, raw: bytes) -> Any:
            return met("parse", super().parse(raw))

        def infer(self, requests: Any) -> Any:
            for request in requests:
                met("infer", request)
            return (yield from super().infer(requests))

        def encode(self, result: Any) -> bytes:
            return super().encode(met("encode", result))

        def evidence(self, request: Any, result: Any) -> dict[str, Any]:
            return {"id": met("evidence", request).id}

    def met(where: str, record: Any) -> Any:
        if where == step and record.id == 6:
            raise Panic
        return record

    log = MemoryLog(lines(20), size=5)
    vertical = Panicking()
    vertical.audited = True
    log.run(vertical)
    errors = [(m.record.offset, m.error.reason) for m in log.written if m.error]
    assert errors == [(6, f"{step.replace('evidence', 'encode')}_failed")]
    assert len(log.answers()) == 19


def test_a_vertical_that_fails_on_everything_stops_the_stream_instead_of_draining_it() -> None:
    vertical = TallyVertical()
    amounts = {f"at_{i}": -2.0 for i in range(200)}
    log = MemoryLog(lines(200, **amounts), size=MAX_FAILURES * 2)
    with pytest.raises(ModelError, match="in a row"):
        log.run(vertical)
    assert log.written == []


def test_refused_work_runs_the_verticals_own_steps_once() -> None:
    with Strict(0, times=2) as engine:
        chunk = Chunk(list(lines(1)), {P: 0}, {P: 1})
        outputs, waits = process(Processor(TallyVertical(), engine), chunk)
    assert engine.asked == [1, 1, 1]
    assert len(waits) >= 2
    expect_each_once([json.loads(m.value) for m in outputs.messages], 1)


def test_an_answer_that_comes_as_the_wait_for_it_ends_is_taken() -> None:
    class AtTheEnd(Future[Any]):
        """Is done when its caller has just given up waiting."""

        def __init__(self, made: Future[Any]) -> None:
            super().__init__()
            self.made = made

        def result(self, timeout: float | None = None) -> Any:
            if self.done():
                return super().result(timeout)
            self.set_result(self.made.result(60))
            raise TimeoutError

    class Late(Strict):
        def submit(self, call: Call, sla: Any = None) -> Future[Any]:
            return AtTheEnd(super().submit(call, sla))

    log = MemoryLog(lines(20))
    with Late(100) as engine:
        assert log.run(TallyVertical(), engine).recoveries == {"assigned": 1}
    expect_each_once(log.answers(), 20)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_work_larger_than_the_queue_goes_in_parts(rows: int) -> None:
    log = MemoryLog(lines(240), size=240)
    with Strict(rows) as engine:
        log.run(TallyVertical(), engine)
    assert max(engine.asked) == 128, "a first chunk"
    assert len([count for count in engine.asked if count <= rows]) >= 240 / rows
    expect_each_once(log.answers(), 240)


def test_an_engine_that_takes_nothing_ends_the_stream_with_a_named_error() -> None:
    log = MemoryLog(lines(8), size=4)
    with Strict(0) as engine, pytest.raises(StreamError, match=r"no commit for 0\.2 s") as caught:
        log.run(TallyVertical(), engine, stall_timeout_s=0.2)
    assert "refused" in str(caught.value)
    assert log.kept_alive
    assert log.written == []


def test_a_vertical_that_never_comes_back_ends_the_stream_with_a_named_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.GRACE_S", 0.0)
    freed = threading.Event()

    class Stuck(TallyVertical):
        def infer(self, requests: Any) -> Any:
            freed.wait(30)
            return super().infer(requests)

    log = MemoryLog(lines(8))
    with pytest.raises(StreamError, match="hangs in the step 'process'"):
        log.run(Stuck(), stall_timeout_s=0.2)
    freed.set()
    assert log.written == []


def test_records_that_cannot_be_read_end_the_stream_with_a_named_error() -> None:
    log = MemoryLog(lines(8))
    log.limit = log.size = 0  # whatever the cause: nothing comes, and 8 records wait
    with pytest.raises(StreamError, match="8 records wait and none of them can be read"):
        log.run(TallyVertical(), stall_timeout_s=0.2, max_events=None)


def test_what_can_never_be_read_ends_the_stream_with_a_named_error() -> None:
    now = time.monotonic()
    log = MemoryLog(lines(8), unreadable=Unreadable("damaged at 3", now - 60, 3, now))
    with pytest.raises(StreamError, match=r"cannot be read, tried for 30 s: damaged at 3"):
        log.run(TallyVertical(), stall_timeout_s=30.0)


def test_commits_that_are_refused_without_end_end_the_stream_by_name() -> None:
    log = MemoryLog(lines(8), [REFUSED] * 100_000)
    with pytest.raises(StreamError, match=r"no commit for .* though Kafka answers: too large"):
        log.run(TallyVertical(), stall_timeout_s=0.02)
    assert log.written == []
    log = MemoryLog(lines(8), ([REFUSED] * TRIES + ["ok"]) * 10)
    log.run(TallyVertical(), stall_timeout_s=1e-6)
    expect_each_once(log.answers(), 8)


def test_a_past_that_never_comes_ends_the_stream_by_name() -> None:
    class Silent(MemoryLog):
        def poll(self) -> Chunk | None:
            self.replaying = 1
            self.kept_alive += 1
            if not self.joined or self.kept_alive % 3 == 0:
                raise Rewind(REPLAY_FAILED if self.joined else "assigned")
            return None

    with pytest.raises(StreamError, match=r"none of the records that the state is to be rebuilt"):
        Silent(lines(8)).run(TallyVertical(), outage_timeout_s=0.1, max_events=None)


def test_joining_a_group_however_long_is_not_idling() -> None:
    class Slow(MemoryLog):
        def ready(self, meanwhile: Callable[[], None]) -> None:
            until = time.monotonic() + 0.3
            eventually(lambda: time.monotonic() > until, 30, "longer than the stream may idle")

    log = Slow(lines(8))
    log.run(TallyVertical(), max_events=None, idle_exit_s=0.2)
    expect_each_once(log.answers(), 8)


def test_too_many_dead_letters_stop_the_stream_before_the_topic_is_empty(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = [*lines(100), *(Line(i, b"{") for i in range(100, 1_000))]
    log = MemoryLog(records, size=20, limit=20)
    window = {"dead_letter_window": 100, "dead_letter_alarm_share": 0.1}
    with pytest.raises(StreamError, match=r"dead_letter_stop_share = 0\.5"):
        log.run(TallyVertical(), **window, dead_letter_stop_share=0.5)
    assert "of in are dead letters" in caplog.text
    assert 100 < len(log.written) <= 160


def test_a_snapshot_is_picked_up_with_its_offsets_and_only_the_rest_is_read_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = check(first, path)
    MemoryLog(lines(30)).run(first, checkpoint=kept)
    kept.save()
    second = TallyVertical()
    again = check(second, path)
    assert second.counts == first.counts
    assert again.plan({P: 34}, {P: 0}) == {P: (30, 34)}


class Logs:
    """What a reader of the past asks of a client, over partitions in memory."""

    def __init__(self, times: dict[int, list[int]]) -> None:
        self.logs = {TopicPartition("in", number): found for number, found in times.items()}
        self.at = dict.fromkeys(self.logs, 0)

    def assign(self, places: list[TopicPartition]) -> None:
        assert set(places) == set(self.logs)

    def seek(self, place: TopicPartition, offset: int) -> None:
        self.at[place] = offset

    def poll(self, wait_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        found = {}
        for place, times in self.logs.items():
            at = self.at[place]
            part = [Line(at + n, None, partition=place.partition, timestamp=time)
                    for n, time in enumerate(times[at : at + 2])]  # fmt: skip
            self.at[place] += len(part)
            found |= {place: part} if part else {}
        return found

    def close(self, **_: Any) -> None:
        """Nothing is open."""


@given(
    st.dictionaries(
        st.integers(0, 3), st.lists(st.integers(0, 50), min_size=1, max_size=12), min_size=1
    ),
    st.integers(1, 20),
)
def test_the_past_is_read_to_its_end_and_in_the_logs_order_whatever_its_timestamps(
    times: dict[int, list[int]], limit: int
) -> None:
    """Where each partition held a record older than all heads, nothing more was ever read."""
    spans = {Partition("in", number): (0, len(found)) for number, found in times.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafka_replay, "reader", lambda config: Logs(times))
        replay = kafka_replay.Replay(StreamConfig(input_topic="in", output_topic="out"), spans)
        read: list[Any] = []
        at = dict.fromkeys(spans, 0)
        for _ in range(6 * sum(map(len, times.values())) + 6):
            chunk = replay.take(limit)
            if chunk is not None:
                assert len(chunk.records) <= limit
                assert chunk.starts == {place: at[place] for place in chunk.ends}
                at |= chunk.ends
                read += chunk.records
    for number, found in times.items():
        mine = [record.offset for record in read if record.partition == number]
        assert mine == list(range(len(found)))
    if all(found == sorted(found) for found in times.values()):
        assert [one.timestamp for one in read] == sorted(one.timestamp for one in read)


def test_a_registry_that_is_away_while_state_is_rebuilt_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ended the worker, whose next start would have met the same."""
    away, waits = ["no", "no"], []

    def observe(self: Processor, chunk: Chunk) -> None:
        if away:
            raise RegistryAway(away.pop())
        seen(self, chunk)

    seen = Processor.observe
    monkeypatch.setattr(Processor, "observe", observe)
    monkeypatch.setattr(Worker, "_wait_for_engine", lambda self, seconds: waits.append(seconds))
    vertical = TallyVertical()
    MemoryLog(lines(30), durable=20).run(vertical, max_events=10)
    whole = TallyVertical()
    MemoryLog(lines(30)).run(whole)
    assert vertical.counts == whole.counts
    assert len(waits) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_snapshot_that_cannot_be_trusted_is_rebuilt_from_the_input(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = check(first, path)
    MemoryLog(lines(30)).run(first, checkpoint=kept)
    kept.save()
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        Checkpoint(first, path, {"vertical": "another"}, 1).advance({P: 30})
        other = Checkpoint(first, path, {"vertical": "another"}, 1)
        other.advance({P: 30})
        other.save()
    second = TallyVertical()
    again = check(second, path)
    assert second.counts == {}
    assert again.plan({P: 30}, {P: 0}) == {P: (0, 30)}
    assert "built again" in caplog.text


def test_a_snapshot_ahead_of_reset_offsets_is_said_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = check(first, path)
    MemoryLog(lines(30)).run(first, checkpoint=kept)
    kept.save()
    second = TallyVertical()
    assert check(second, path).plan({P: 10}, {P: 0}) == {P: (0, 10)}
    assert second.counts == {}
    assert "ahead of the committed offsets" in caplog.text


def test_replay_is_bounded_and_says_what_retention_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = check(TallyVertical(), replay_max_records=100)
    assert kept.plan({P: 1_000}, {P: 0}) == {P: (900, 1_000)}
    assert kept.plan({P: 1_000}, {P: 950}) == {P: (950, 1_000)}
    kept.advance({P: 500})
    assert kept.plan({P: 1_000}, {P: 700}) == {P: (700, 1_000)}
    assert "500 to 700 are not retained" in caplog.text


def test_a_state_says_since_when_it_has_all(tmp_path: Path) -> None:
    path = tmp_path / "state.snapshot"
    kept = check(TallyVertical(), path, replay_max_records=100)
    kept.plan({P: 50}, {P: 0})
    assert kept.start == 0
    kept.plan({P: 1_000}, {P: 0})
    assert kept.start > 1.7e12  # nothing is known of the log's beginning: now
    late = [Line(n, b"{}", timestamp=5_000 + n) for n in range(900, 1_000)]
    kept.observed(Chunk(late[:50], {P: 900}, {P: 950}, None, True))
    kept.observed(Chunk(late[50:], {P: 950}, {P: 1_000}, None, True))
    assert kept.start == 5_900
    assert kept.position(Chunk([], {P: 1_000}, {P: 1_001}), 1).startswith("1/0/0/5900 0:900-")
    kept.save()
    again = check(TallyVertical(), path)
    assert again.start == 5_900
    again.plan({P: 2_000}, {P: 1_500})  # a hole, whenever it was
    assert again.start > 1.7e12


def test_records_apart_that_must_meet_are_found_out() -> None:
    class Together(TallyVertical):
        moved: float | None = None

        def together(self, request: Any) -> tuple[str | None, ...]:
            return request.card, None

        def see_growth(self, at: float | None) -> None:
            self.moved = at

    def answered(processor: Processor, *records: Line, known: int = 0) -> Layout:
        chunk = Chunk(list(records), {}, {}, layout=Layout(2, known))
        process(processor, chunk)
        return chunk.layout

    vertical = Together()
    processor = Processor(vertical, ENGINE, places=KeyPlaces())
    processor.see_partitions(1, 2, 0)
    a, b = (json.dumps({"id": 1, "card": card, "amount": 1}).encode() for card in "ab")
    first, second = Line(0, a, timestamp=9), Line(1, a, timestamp=9)
    apart, other = Line(0, a, "in", 1, 9), Line(1, b, "in", 1, 9)
    assert answered(processor, first, second, other) == Layout(2)
    assert vertical.moved is None
    found = answered(processor, apart)
    assert found.grown > 1.7e12
    assert vertical.moved == found.grown / 1e3
    assert answered(processor, first, apart, known=found.grown) == found  # said already

    by_looking = Processor(Together(), ENGINE, places=KeyPlaces())
    by_looking.see_partitions(1, 2, 0)
    by_looking.look([apart])
    assert answered(by_looking, first).grown > 1.7e12

    grown = Processor(Together(), ENGINE, places=KeyPlaces())
    grown.see_partitions(1, 2, 8)  # partitions were added: keys may move for a while
    assert answered(grown, first, apart) == Layout(2)
    alone = Together()
    reads_all = Processor(alone, ENGINE, places=KeyPlaces())
    reads_all.see_partitions(2, 2, 0)
    assert answered(reads_all, first, apart).grown > 1.7e12  # for those who come later
    assert alone.moved is None


def test_a_vertical_that_cannot_say_what_lies_together_is_not_watched() -> None:
    class Wrong(TallyVertical):
        def together(self, request: Any) -> tuple[str | None, ...]:
            raise Panic

    processor = Processor(Wrong(), ENGINE, places=KeyPlaces())
    processor.see_partitions(1, 2, 0)
    record = Line(0, b'{"id":1,"card":"a","amount":1}')
    (message,) = process(processor, Chunk([record], {P: 0}, {P: 1}))[0].messages
    assert message.error is None
    processor.look([record])


def test_a_state_folder_belongs_to_one_worker(tmp_path: Path) -> None:
    with (
        claim(tmp_path) as name,
        pytest.raises(ConfigError, match="in use by another worker"),
        claim(tmp_path),
    ):
        pass
    with claim(tmp_path) as again:
        assert again == name  # and the name lasts


def test_an_answer_too_large_for_kafka_is_a_dead_letter() -> None:
    processor = Processor(TallyVertical(), ENGINE, max_record_bytes=52)
    record = Line(0, b'{"id":1,"card":"' + b"x" * 20 + b'","amount":1}')
    (message,) = process(processor, Chunk([record], {P: 0}, {P: 1}))[0].messages
    assert isinstance(message.error, InputError)
    assert message.error.reason == "too_large"
