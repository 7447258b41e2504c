"""What arrives: answers, dead letters, and clear words when Kafka is not as expected."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from kafka.errors import IllegalStateError, ProducerFencedError
from kafka.structs import TopicPartition
from kafka_fixtures import CLIENTS_OF_KAFKA, KafkaNode, eventually
from tally import TallyVertical, expect_each_once, spends, started_engine

from plinth.engine import ConfigError, Engine, QueueFull
from plinth.pipelines.stream.chunks import Partition
from plinth.pipelines.stream.history.redeliver import redeliver
from plinth.pipelines.stream.kafka_clients import connect, prepare
from plinth.pipelines.stream.kafka_python import Producer
from plinth.pipelines.stream.worker import (
    StreamConfig,
    StreamError,
    StreamProgress,
    StreamSummary,
    chosen_client,
    run,
)

pytestmark = pytest.mark.slow
real_kafka = pytest.mark.kafka


def stream(
    config: StreamConfig,
    engine: Engine | None = None,
    on_progress: Callable[[StreamProgress], None] | None = None,
) -> StreamSummary:
    vertical = TallyVertical()
    with engine or started_engine(vertical) as running:
        return run(vertical, running, config, threading.Event(), on_progress)


def by_offset(record: Any) -> int:
    """The original offset of a dead letter."""
    return int(dict(record.headers)["kafka_dlt-original-offset"])


each_client = pytest.mark.parametrize("client", CLIENTS_OF_KAFKA)


@real_kafka
@each_client
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_every_record_is_answered_once_in_the_order_of_its_card(
    kafka_node: KafkaNode, guarantee: str, client: str
) -> None:
    config = kafka_node.config(guarantee=guarantee, max_events=2_000, client=client)
    kafka_node.fill(config, spends(2_000))
    summary = stream(config)
    assert (summary.records, summary.scored, summary.dead_letters) == (2_000, 2_000, {})
    records = kafka_node.read(config.output_topic)
    answers = [json.loads(r.value) for r in records]
    expect_each_once(answers, 2_000)
    assert all(r.key.decode() == a["card"] for r, a in zip(records, answers, strict=True))
    assert summary.transactions >= 2_000 / config.max_records


@real_kafka
def test_what_is_appended_keeps_its_order_over_batches_and_transactions(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(partitions=2)
    prepare(config)
    places = [TopicPartition(config.output_topic, number) for number in (0, 1)]
    options = {**config.client_options(), "transactional_id": config.group, "batch_size": 4_096}
    with contextlib.closing(connect(Producer, **options)) as producer:
        producer.init_transactions()
        for first in (0, 300):
            producer.begin_transaction()
            futures = [
                producer.append(
                    places[number % 2], b"%d " % number + b"x" * (number % 90) ** 2, b"k", []
                )
                for number in range(first, first + 300)
            ]
            for future in futures:
                future.get(30)
            producer.commit_transaction()
    found: list[list[int]] = [[], []]
    for record in kafka_node.read(config.output_topic):
        found[record.partition].append(int(record.value.split()[0]))
    assert found == [list(range(start, 600, 2)) for start in (0, 1)]


@real_kafka
@pytest.mark.needs("confluent_kafka")
def test_a_producer_that_was_fenced_says_so_and_not_what_its_library_does(
    kafka_node: KafkaNode,
) -> None:
    """The worker ended with an error of the library where another one took its transactions."""
    from confluent_kafka import Consumer

    from plinth.pipelines.stream.confluent import CLIENT, Owner

    config = kafka_node.config(partitions=1, client="confluent")
    prepare(config)
    one, other = (CLIENT.writer(config, "w", "one-name") for _ in range(2))
    member = Consumer({"bootstrap.servers": kafka_node.servers, "group.id": config.group})
    try:
        one.open()
        one.begin()
        one.send(config.output_topic, b"{}", None, [], 0)
        one.written(30.0)
        other.open()
        owner = Owner(member.consumer_group_metadata(), 0)
        with pytest.raises(ProducerFencedError):
            one.commit({Partition(config.input_topic, 0): (0, "")}, owner, 30.0)
    finally:
        member.close()
        for writer in (one, other):
            writer.give_up()


@real_kafka
def test_a_partition_that_waited_is_read_on_whatever_came_of_it_before(
    kafka_node: KafkaNode,
) -> None:
    """kafka-python puts away what came of a paused partition, and may look at it never again."""
    config = kafka_node.config(partitions=2, client="kafka-python")
    kafka_node.fill(config, spends(200))
    member = chosen_client(config).member(config, "one", lambda: None, frozenset())
    places = {Partition(config.input_topic, 0), Partition(config.input_topic, 1)}
    at = dict.fromkeys(places, 0)
    count: Counter[Partition] = Counter()

    def read(limit: int) -> None:
        for place, records in member.poll(0.1, limit).items():
            assert [one.offset for one in records] == [at[place] + n for n in range(len(records))]
            at[place] += len(records)
            count[place] += len(records)

    def given() -> bool:
        member.poll(0.1, 1)
        return member.owner() is not None and set(member.places()) == places

    def some() -> bool:
        read(1)
        return bool(count)

    def all_of(wanted: set[Partition]) -> bool:
        read(500)
        return sum(count[place] for place in wanted) == sum(sizes[place] for place in wanted)

    try:
        eventually(given, 60, "both partitions are given to it")
        sizes = member.last(places, 10.0)
        assert member.begin(at, set())
        eventually(some, 60, "a first record")
        (waits,) = count
        assert member.begin(at, {waits})
        eventually(lambda: all_of(places - {waits}), 60, "the other partition is read")
        assert count[waits] == 1
        assert member.begin(at, set())
        eventually(lambda: all_of(places), 60, "the one that waited is read")
    finally:
        member.close()


@real_kafka
def test_a_compacted_input_is_refused_where_a_state_is_made_of_it(kafka_node: KafkaNode) -> None:
    """A restart would build the state from the last record of each card alone."""
    config = kafka_node.config()
    kafka_node.create(config.input_topic, 1, **{"cleanup.policy": "compact,delete"})
    with pytest.raises(ConfigError, match=r"cleanup\.policy=compact,delete: all but the last"):
        stream(config)
    prepare(config)  # for who has no state


@real_kafka
def test_an_append_outside_a_transaction_is_refused(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=1)
    prepare(config)
    place = TopicPartition(config.output_topic, 0)
    options = {**config.client_options(), "transactional_id": config.group}
    with contextlib.closing(connect(Producer, **options)) as producer:
        producer.init_transactions()
        with pytest.raises(IllegalStateError):
            producer.append(place, b"value", b"key", [])
        producer.begin_transaction()
        producer.append(place, b"value", b"key", []).get(30)
        producer.commit_transaction()
        with pytest.raises(IllegalStateError):
            producer.append(place, b"value", b"key", [])
    assert len(kafka_node.read(config.output_topic)) == 1


@real_kafka
@each_client
def test_bad_records_become_dead_letters_that_say_why_and_the_rest_goes_on(
    kafka_node: KafkaNode, client: str
) -> None:
    config = kafka_node.config(partitions=1, max_record_bytes=1_000, max_events=104, client=client)
    good = spends(100, at_3=-1.0)
    bad = [
        (b"k1", b"{not json"),
        (b"k2", b'{"id": 1, "card": "c1"}'),
        (b"k3", b'{"id": "1", "pad": "' + b"x" * 2_000 + b'"}'),
        (None, b"\xff\xfe"),
    ]
    kafka_node.fill(config, good[:50] + bad + good[50:])
    summary = stream(config)
    assert summary.scored == 99
    assert summary.dead_letters == {
        "negative": 1, "malformed_json": 2, "missing": 1, "too_large": 1,
    }  # fmt: skip
    letters = sorted(kafka_node.read(config.dead_letters), key=by_offset)
    negative, malformed, missing, large, _ = letters
    head = {name: value.decode() for name, value in missing.headers}
    assert missing.value == bad[1][1]
    assert missing.key == b"k2"
    assert head["kafka_dlt-original-topic"] == config.input_topic
    assert head["kafka_dlt-original-partition"] == "0"
    assert head["kafka_dlt-original-offset"] == "51"
    assert abs(int(head["kafka_dlt-original-timestamp"]) / 1e3 - time.time()) < 600
    assert head["kafka_dlt-original-consumer-group"] == config.group
    assert head["kafka_dlt-exception-fqcn"] == "plinth.engine.errors.InputError"
    assert "amount" in head["kafka_dlt-exception-message"]
    assert (head["plinth_error-reason"], head["plinth_error-field"]) == ("missing", "amount")
    assert (head["plinth_vertical"], bool(head["plinth_version"])) == ("tally", True)
    assert malformed.value == b"{not json"
    assert dict(negative.headers)["plinth_error-reason"] == b"negative"
    assert len(large.value) == 1_000
    assert dict(large.headers)["plinth_truncated-from-bytes"] == str(len(bad[2][1])).encode()


@real_kafka
def test_hostile_payments_become_dead_letters_and_honest_ones_decisions(
    kafka_node: KafkaNode,
) -> None:
    finance = pytest.importorskip("plinth.verticals.finance")
    vertical = finance.FraudScoring(finance.FraudSettings(unknown_fields="refuse"))
    honest = json.loads(vertical.example().model_dump_json())
    wrong: dict[str, dict[str, Any]] = {
        "float_type": {"amount": "12"},
        "finite_number": {"amount": float("nan")},
        "less_than_equal": {"amount": 1e300},
        "greater_than_equal": {"amount": -5},
        "string_type": {"customer_id": 7},
        "extra_forbidden": {"colour": "red"},
        "raw_card_number": {"card": "4111111111111111"},
        "datetime_parsing": {"event_time": "yesterday"},
        "future_event": {"event_time": "2099-01-01T00:00:00Z"},
        "unknown_currency": {"currency": "XTS"},
    }
    records = [(b"k", json.dumps(honest | change).encode()) for change in wrong.values()]
    records += [(b"k", b"{oops"), (b"k", b"[" * 10_000), (b"k", b"")]
    payments = [honest | {"transaction_id": f"t{n}"} for n in range(len(records))]
    mixed = [(b"k", json.dumps(payment).encode()) for payment in payments]
    config = kafka_node.config(partitions=1, max_events=2 * len(records))
    kafka_node.fill(
        config, [record for pair in zip(records, mixed, strict=True) for record in pair]
    )
    with started_engine(vertical) as engine:
        summary = run(vertical, engine, config, threading.Event())
    assert summary.dead_letters == dict.fromkeys(wrong, 1) | {"malformed_json": 3}
    decisions = kafka_node.answers(config)
    assert [d["transaction_id"] for d in decisions] == [p["transaction_id"] for p in payments]
    letters = sorted(kafka_node.read(config.dead_letters), key=by_offset)
    assert [letter.value for letter in letters] == [value for _, value in records]
    for letter, change in zip(letters, wrong.values(), strict=False):
        head = {name: value.decode() for name, value in letter.headers}
        assert head["plinth_error-field"] == next(iter(change))
        assert "4111111111111111" not in str(head)


@real_kafka
@each_client
def test_answers_that_kafka_refuses_stop_the_stream_and_come_once_it_takes_them(
    kafka_node: KafkaNode, client: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = kafka_node.config(max_events=200, client=client)
    kafka_node.fill(config, spends(200))
    kafka_node.delete(config.output_topic)
    kafka_node.create(config.output_topic, **{"max.message.bytes": "100"})
    with pytest.raises(StreamError, match=r"max\.message\.bytes"):
        stream(config)
    assert f"{config.output_topic} has max.message.bytes=100: a larger answer" in caplog.text
    assert kafka_node.read(config.output_topic) == []
    kafka_node.delete(config.output_topic)
    stream(config)
    expect_each_once(kafka_node.answers(config), 200)


@real_kafka
@pytest.mark.parametrize(
    "guarantee", ["exactly_once", pytest.param("at_least_once", marks=pytest.mark.soak)]
)
def test_an_output_topic_that_is_deleted_ends_the_stream_and_is_named(
    kafka_node: KafkaNode, guarantee: str
) -> None:
    config = kafka_node.config(guarantee=guarantee, idle_exit_s=None, commit_timeout_ms=2_000)
    kafka_node.fill(config, spends(200))
    gone = threading.Event()

    def delete(progress: StreamProgress) -> None:
        if progress.records >= 200 and not gone.is_set():
            gone.set()
            kafka_node.delete(config.output_topic)
            kafka_node.fill(config.model_copy(update={"output_topic": "other"}), spends(50))

    with pytest.raises(StreamError, match=f"deleted .* topic {config.output_topic}") as caught:
        stream(config, on_progress=delete)
    assert "create it again" in str(caught.value.hint)
    again = config.model_copy(update={"max_events": 50})
    assert stream(again).records == 50  # none of them was lost


@real_kafka
def test_an_input_topic_that_is_deleted_ends_the_stream_and_is_named(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.IDLE_LOOK_S", 1.0)
    config = kafka_node.config(idle_exit_s=None)
    kafka_node.fill(config, spends(50))
    gone = threading.Event()

    def delete(progress: StreamProgress) -> None:
        if progress.records == 50 and not gone.is_set():
            gone.set()
            kafka_node.delete(config.input_topic)

    with pytest.raises(StreamError, match=f"deleted .* topic {config.input_topic}"):
        stream(config, on_progress=delete)


@real_kafka
def test_a_record_on_which_the_vertical_fails_is_set_aside_and_counts_nothing_twice(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(max_events=1_001)
    records = spends(1_000)
    records[600:600] = [(b"c7", b'{"id": 5000, "card": "bad", "amount": -2}')]
    kafka_node.fill(config, records)
    summary = stream(config)
    assert summary.dead_letters == {"infer_failed": 1}
    assert summary.recoveries["poison"] == 1
    expect_each_once(kafka_node.answers(config), 1_000)


class Busy(Engine):
    """An engine that refuses every third piece of work."""

    asked = 0

    def submit(self, *args: Any, **rest: Any) -> Any:
        self.asked += 1
        if self.asked % 3 == 0:
            raise QueueFull("the queue is full", retry_after=0.01)
        return super().submit(*args, **rest)


@real_kafka
def test_work_that_the_engine_refuses_is_offered_again_and_not_lost(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(max_events=2_000)
    kafka_node.fill(config, spends(2_000))
    engine = Busy()
    engine.add(TallyVertical().models()[0])
    assert stream(config, engine).scored == 2_000
    assert engine.asked > 2_000 / config.max_records
    expect_each_once(kafka_node.answers(config), 2_000)


@real_kafka
def test_max_events_ends_after_exactly_so_many_and_the_next_run_goes_on(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(max_events=300)
    kafka_node.fill(config, spends(500))
    told: list[StreamProgress] = []
    assert stream(config, on_progress=told.append).records == 300
    assert (told[-1].records, told[-1].lag, told[-1].partitions) == (300, 200, 4)
    assert len(kafka_node.answers(config)) == 300
    second = stream(config.model_copy(update={"max_events": 200}))
    assert (second.records, second.replayed) == (200, 300)
    expect_each_once(kafka_node.answers(config), 500)


@real_kafka
def test_a_group_that_starts_at_the_end_warms_its_state_with_what_is_retained(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(start_at="latest")
    kafka_node.fill(config, spends(100))
    first = stream(config)
    assert (first.records, first.replayed) == (0, 100)
    kafka_node.fill(config, spends(100, start=100))
    stream(config.model_copy(update={"max_events": 100}))
    answers = kafka_node.answers(config)
    assert sorted(a["id"] for a in answers) == list(range(100, 200))
    assert {a["count"] for a in answers} == {3, 4}


@real_kafka
def test_missing_topics_are_named_with_what_to_do(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(create_topics=False)
    with pytest.raises(ConfigError) as caught:
        stream(config)
    for word in (config.input_topic, config.output_topic, config.dead_letters, "create_topics"):
        assert word in str(caught.value)


@real_kafka
@each_client
def test_a_transaction_timeout_that_the_brokers_forbid_is_said_at_once(
    kafka_node: KafkaNode, client: str
) -> None:
    with pytest.raises(StreamError, match=r"transaction\.max\.timeout\.ms"):
        stream(kafka_node.config(transaction_timeout_ms=3_600_000, client=client))


@real_kafka
def test_created_topics_have_the_partitions_of_the_input(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=3)
    assert set(prepare(config).values()) == {3}


def test_a_broker_that_is_not_there_is_said_within_the_time_allowed() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        server = f"127.0.0.1:{taken.getsockname()[1]}"
        config = StreamConfig(
            bootstrap_servers=server, input_topic="a", output_topic="b", connect_timeout_s=1
        )
        vertical = TallyVertical()
        with started_engine(vertical) as engine:
            started = time.monotonic()
            with pytest.raises(ConfigError) as caught:
                run(vertical, engine, config, threading.Event())
    assert time.monotonic() - started < 5
    assert server in str(caught.value)
    assert "bootstrap_servers" in str(caught.value)


@real_kafka
def test_dead_letters_go_back_once_and_not_for_ever(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=1)
    kafka_node.fill(config, [(b"a", b"{bad"), (b"c0", b'{"id": 0, "card": "c0", "amount": -1}')])
    assert stream(config).dead_letters == {"malformed_json": 1, "negative": 1}
    waits = config.model_copy(update={"idle_exit_s": 600.0})
    began = time.monotonic()
    assert redeliver(waits, reasons=["negative"]).scored == 1
    assert time.monotonic() - began < 60, "it knows the end, and waits for no more"
    assert redeliver(config, reasons=["negative"]).scored == 0
    assert stream(config).dead_letters == {"negative": 1}
    again = kafka_node.read(config.input_topic)[-1]
    assert (again.key, json.loads(again.value)["amount"]) == (b"c0", -1)
    assert [name for name, _ in again.headers] == ["plinth_attempt"]
    assert redeliver(config, max_attempts=2).scored == 0  # it failed twice by now
