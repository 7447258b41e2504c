"""What is written fits into the topics that take it, whatever the record was."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.errors import (
    FencedInstanceIdError,
    InvalidProducerEpochError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    ProducerFencedError,
)
from tally import TallyVertical
from test_stream_loop import ENGINE, ONE, Line, P, process

from plinth.engine import InputError
from plinth.pipelines.stream.audit import AuditTrail
from plinth.pipelines.stream.chunks import Chunk, Message, Outputs, Rewind, StreamError
from plinth.pipelines.stream.dead_letters import MAX_KEY, TRUNCATED
from plinth.pipelines.stream.kafka_clients import Client, Noted
from plinth.pipelines.stream.kafka_sink import FENCED_S, FENCES, ExactlyOnceSink
from plinth.pipelines.stream.processor import Processor
from plinth.pipelines.stream.settings import StreamConfig

CONFIG = StreamConfig(input_topic="in", output_topic="out")
BROKER_TAKES = 1_048_588
"""max.message.bytes of a topic, where nobody says another."""
BATCH_FRAME = 61 + 40
"""Of a batch, and of the record in it but its headers' own."""


class Kept:
    """A writer that keeps what is sent, and fails each commit as it is told."""

    def __init__(self, error: KafkaError | None = None) -> None:
        self.error = error
        self.sent: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]] = []

    def open(self) -> None:
        """It is open."""

    def begin(self) -> None:
        """It has."""

    def leave(self) -> None:
        """Nothing is open."""

    def give_up(self) -> None:
        """Nothing waits."""

    def width(self, topic: str) -> int:
        return 1

    def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        partition: int | None = None,
    ) -> None:
        self.sent.append((value, key, headers))

    def commit(self, offsets: Noted, owner: Any, seconds: float) -> None:
        if self.error is not None:
            raise self.error


def sink(writer: Any) -> ExactlyOnceSink:
    client = Client("kept", lambda *_: writer, lambda *_: writer)
    made = ExactlyOnceSink(CONFIG, client, vertical="tests", identity="w1")
    made.ready()
    return made


def outputs(record: Any, error: InputError | None = None) -> Outputs:
    message = Message(record, record.key, record.value or b"", error)
    return Outputs(Chunk([record], {P: 0}, {P: 1}, layout=ONE), [message])


def varint(size: int) -> int:
    return max(1, -(-(size * 2).bit_length() // 7))


@given(
    value=st.integers(0, BROKER_TAKES),
    key=st.none() | st.integers(0, 100_000),
    headers=st.lists(st.tuples(st.sampled_from(["", "h", "\u00fc" * 50]), st.integers(0, 9_000)),
                     max_size=4),
    many=st.sampled_from([0, 100, 3_000, 50_000]),
)  # fmt: skip
def test_every_dead_letter_fits_where_the_record_did(
    value: int, key: int | None, headers: list[tuple[str, int]], many: int
) -> None:
    own = [(name, b"x" * size) for name, size in headers] + [("", b"")] * many
    record = Line(0, b"v" * value, key=None if key is None else b"k" * key, headers=tuple(own))
    kept, error = Kept(), InputError("wrong " + "\u4e16" * 600, reason="tests", field="f" * 40)
    made = sink(kept)
    made.start(outputs(record, error))
    made.finish()
    made.close()
    ((sent, named, told),) = kept.sent
    assert sent is not None
    size = BATCH_FRAME + len(sent) + len(named or b"")
    for name, one in told:
        size += len(name.encode()) + len(one) + varint(len(name.encode())) + varint(len(one))
    assert size <= BROKER_TAKES
    whole = value <= CONFIG.max_record_bytes and (key or 0) < 10_000
    if whole:
        assert sent == record.value
        assert TRUNCATED not in dict(told)
    elif TRUNCATED in dict(told):
        assert dict(told)[TRUNCATED] == b"%d" % value


def test_an_answer_with_the_key_of_its_record_fits_too() -> None:
    class Plain(TallyVertical):
        def key(self, request: Any) -> Any:
            return None

    value = b'{"id":1,"card":"a","amount":1}'
    for size, reason in ((MAX_KEY, None), (MAX_KEY + 1, "too_large")):
        record = Line(0, value, key=b"k" * size)
        (message,) = process(Processor(Plain(), ENGINE), Chunk([record], {P: 0}, {P: 1}))[
            0
        ].messages
        assert (message.error and message.error.reason) == reason


def test_an_answer_whose_audit_record_is_too_large_is_a_dead_letter_and_the_chain_goes_on() -> None:
    made = outputs(Line(0, b'{"note":"' + b"x" * 2_000 + b'"}'))
    trail = AuditTrail("tests", None, 1_000)
    trail.add(made)
    (message,) = made.messages
    assert message.error is not None
    assert (message.error.reason, message.value) == ("too_large", b"")
    ((_, raw),) = made.audit
    assert len(raw) < 1_000
    assert b'"refused":{"reason":"too_large"' in raw


@pytest.mark.parametrize("error", [ProducerFencedError(), InvalidProducerEpochError()])
def test_who_is_fenced_again_and_again_says_that_another_has_its_name(
    error: KafkaError, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    monkeypatch.setattr("plinth.pipelines.stream.kafka_sink.time", clock)
    record = Line(0, b"{}")
    with contextlib.closing(sink(Kept(error))) as made:
        for seconds in (*[FENCED_S / 2] * FENCES, *[0.1] * (FENCES - 3)):
            now += seconds
            made.start(outputs(record))
            with pytest.raises(Rewind, match="commit_refused"):
                made.finish()
            made.ready()
        now += 0.1
        made.start(outputs(record))
        with pytest.raises(StreamError, match=r"another worker of group plinth writes.*'w1'"):
            made.finish()


def test_both_producers_open_at_once_and_one_that_fails_is_opened_again() -> None:
    both, opened = threading.Barrier(2, timeout=10), []

    class Slow(Kept):
        def __init__(self, name: str | None) -> None:
            super().__init__()
            self.name = name

        def open(self) -> None:
            if len(opened) < 2:
                both.wait()  # one after the other they would wait for ever
            opened.append(self.name)
            if self.name == "plinth-w1-1" and opened.count(self.name) == 1:
                raise KafkaTimeoutError("its coordinator moves")

    client = Client("slow", None, lambda config, identity, name: Slow(name))  # type: ignore[arg-type, return-value]
    made = ExactlyOnceSink(CONFIG, client, vertical="tally", identity="w1")
    with contextlib.closing(made):
        with pytest.raises(KafkaTimeoutError):
            made.ready()
        made.ready()
    assert sorted(opened) == ["plinth-w1-0", "plinth-w1-1", "plinth-w1-1"]


def test_commits_that_never_come_back_are_counted_and_end_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.kafka_sink.MAX_LEFT", 2)
    monkeypatch.setattr("plinth.pipelines.stream.kafka_sink.LEAST_S", 0.01)
    freed = threading.Event()

    class Stuck(Kept):
        def commit(self, offsets: Noted, owner: Any, seconds: float) -> None:
            freed.wait(30)

    with contextlib.closing(sink(Stuck())) as made:
        made._latest.append(0.0)  # so that a commit may take LEAST_S alone
        for _ in range(2):
            made.start(outputs(Line(0, b"{}")))
            with pytest.raises(Rewind, match="commit_timeout"):
                made.finish()
            made._given_up = 0
            made.ready()
        made.start(outputs(Line(0, b"{}")))
        with pytest.raises(StreamError, match="3 commits of the Kafka client never came back"):
            made.finish()
        freed.set()


@pytest.mark.needs("confluent_kafka")
def test_what_is_told_of_a_message_says_more_than_that_its_transaction_failed() -> None:
    from confluent_kafka import KafkaError as Failure
    from confluent_kafka import KafkaException

    from plinth.pipelines.stream.confluent import ConfluentWriter

    purged, large = Failure(Failure._PURGE_QUEUE), Failure(Failure.MSG_SIZE_TOO_LARGE)
    writer = ConfluentWriter.__new__(ConfluentWriter)
    writer._producer = None
    for failed, code, expected in (
        ([purged, large], Failure._STATE, MessageSizeTooLargeError),
        ([purged], Failure.FENCED_INSTANCE_ID, FencedInstanceIdError),
        ([], Failure._FENCED, ProducerFencedError),
    ):
        writer._failed = failed
        assert type(writer._why(KafkaException(Failure(code)))) is expected
