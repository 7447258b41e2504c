"""What comes from upstream as it is: codecs, floods of alerts, growth, retention, open work."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.structs import OffsetAndMetadata
from kafka_fixtures import KafkaNode, eventually
from tally import TallyVertical, expect_each_once, spends, started_engine

from plinth.engine.metrics import REGISTRY
from plinth.pipelines.stream.chunks import Layout
from plinth.pipelines.stream.history.rebuild import has_value, rebuild
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.worker import (
    StreamConfig,
    StreamError,
    StreamProgress,
    StreamSummary,
    run,
)
from plinth.verticals.finance import FraudScoring, FraudSettings

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
CODECS = ("gzip", "snappy", "lz4", "zstd")
Pairs = Iterable[tuple[bytes | None, bytes]]


def stream(config: StreamConfig, vertical: Any = None, **more: Any) -> StreamSummary:
    vertical = vertical or TallyVertical()
    with started_engine(vertical) as engine:
        return run(vertical, engine, config, threading.Event(), **more)


def send(config: StreamConfig, records: Pairs, **options: Any) -> None:
    """Append records with a producer of these options."""
    producer = KafkaProducer(bootstrap_servers=config.bootstrap_servers, **options)
    with contextlib.closing(producer):
        sent = [producer.send(config.input_topic, value, key) for key, value in records]
        producer.flush(60)
    assert all(future.succeeded() for future in sent)


def payments(count: int, **changes: Any) -> list[tuple[bytes, bytes]]:
    """Payments of so many cards, each at a terminal of its own."""
    base = json.loads(FraudScoring().example().model_dump_json())
    made = []
    for n in range(count):
        own = {"transaction_id": f"x{n}", "card": f"tok_{n}", "customer_id": f"c{n}"}
        own["terminal_id"] = f"t{n}"
        made.append((own["card"].encode(), json.dumps(base | own | changes).encode()))
    return made


def sample(name: str, config: StreamConfig, partition: int = 0) -> float:
    """A metric of the input topic."""
    labels = {"topic": config.input_topic, "partition": str(partition)}
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_every_codec_is_read_and_written(kafka_node: KafkaNode) -> None:
    for turn, codec in enumerate(CODECS):
        config = kafka_node.config(compression=codec, max_events=400)
        prepare(config)
        for number, other in enumerate(CODECS[turn:] + CODECS[:turn]):
            send(config, spends(100, start=100 * number), compression_type=other)
        stream(config)
        expect_each_once(kafka_node.answers(config), 400)


def test_a_codec_that_is_missing_ends_the_stream_with_what_to_install(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kafka_node.config(idle_exit_s=None)
    prepare(config)
    send(config, spends(100), compression_type="zstd")
    monkeypatch.setattr("kafka.codec.zstd", None)
    with pytest.raises(StreamError, match="zstd") as caught:
        stream(config)
    assert "pip install" in str(caught.value.hint)


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.soak), 1.0])
def test_any_share_of_alerts_is_answered_with_reasons(kafka_node: KafkaNode, share: float) -> None:
    config = kafka_node.config(partitions=1, max_events=600)
    alerts = payments(600, amount=4000.0)[: int(600 * share)]
    kafka_node.fill(config, alerts + payments(600)[len(alerts) :])
    stream(config, FraudScoring())
    decisions = kafka_node.answers(config)
    found = Counter(decision["decision"] for decision in decisions)
    assert (len(decisions), found["decline"]) == (600, len(alerts))
    for decision in decisions:
        codes = [reason["code"] for reason in decision["reason_codes"]]
        assert bool(codes) == (decision["decision"] == "decline")
        assert "X01" not in codes


def test_partitions_added_while_running_are_read(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(
        partitions=2, max_records=32, max_events=800, idle_exit_s=None, metadata_max_age_ms=500
    )
    kafka_node.fill(config, spends(400))
    grown = threading.Event()

    def grow(progress: StreamProgress) -> None:
        if progress.records >= 400 and not grown.is_set():
            grown.set()
            kafka_node.grow(config.input_topic, 6)
            send(config, spends(400, start=400), metadata_max_age_ms=100)

    vertical = TallyVertical()
    summary = stream(config, vertical, on_progress=grow)
    assert summary.records == 800
    assert sorted(a["id"] for a in kafka_node.answers(config)) == list(range(800))
    assert vertical.shares[-1] == (6, 6)


class Member:
    """A worker of finance on a thread of this process, on input that is said to be colocated."""

    def __init__(self, config: StreamConfig) -> None:
        self.stop = threading.Event()
        self.progress = StreamProgress()
        self._config = config
        self._vertical = FraudScoring(FraudSettings(colocated=True))
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with started_engine(self._vertical) as engine:
                run(self._vertical, engine, self._config, self.stop, self._note)
        except BaseException as error:  # noqa: BLE001 - raised by end() on the test's thread
            self._failure = error

    def _note(self, progress: StreamProgress) -> None:
        self.progress = progress

    def end(self) -> None:
        self.stop.set()
        self._thread.join(60)
        if self._failure is not None:
            raise self._failure


def two_members(config: StreamConfig, *, sharing: int) -> list[Member]:
    members = [Member(config), Member(config)]

    def both() -> bool:
        parts = [one.progress.partitions for one in members]
        return min(parts) > 0 and sum(parts) == sharing

    eventually(both, 60, "both share the topic")
    return members


def answered(members: list[Member], count: int) -> None:
    eventually(
        lambda: sum(one.progress.records for one in members) == count, 60, f"{count} answers"
    )


def add_partitions(config: StreamConfig, count: int) -> None:
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=config.bootstrap_servers)) as admin:
        admin.create_partitions({config.input_topic: count})
        eventually(
            lambda: len(admin.describe_topics([config.input_topic])[0]["partitions"]) == count,
            30,
            f"{count} partitions",
        )


def rounds(first: int, last: int, **changes: Any) -> list[tuple[bytes, bytes]]:
    """Payments of thirty cards, each once in every round."""
    return [
        (key, value.replace(b'"x', f'"r{number}x'.encode()))
        for number in range(first, last)
        for key, value in payments(30, **changes)
    ]


def test_a_card_whose_past_another_worker_has_is_flagged_once_partitions_were_added(
    kafka_node: KafkaNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.PROGRESS_S", 0.0)
    config = kafka_node.config(partitions=2, max_records=32, idle_exit_s=None)
    prepare(config)
    members = two_members(config, sharing=2)
    send(config, rounds(0, 11))
    answered(members, 330)
    add_partitions(config, 5)  # so that not every card stays, however they are shared
    send(config, rounds(11, 14))  # long before the consumers look at the topic by themselves
    answered(members, 420)
    for one in members:
        one.end()
    members = two_members(config, sharing=5)  # what the group noted outlives its workers
    send(config, rounds(14, 15))
    answered(members, 30)
    for one in members:
        one.end()

    decisions = {d["transaction_id"]: d for d in kafka_node.answers(config)}
    assert len(decisions) == 450
    fast = {
        name
        for name, decision in decisions.items()
        if "R02" in [reason["code"] for reason in decision["reason_codes"]]
    }
    flagged = {name for name, decision in decisions.items() if decision["features_partial"]}
    numbers = {name: int(name[1 : name.index("x")]) for name in decisions}
    late = {name for name, number in numbers.items() if number >= 11}
    assert late - fast  # cards have moved away from their past
    assert late - fast <= flagged
    assert flagged == late
    assert "has grown from 2 to 5 partitions" in caplog.text
    grown = "plinth_kafka_partitions_grown_timestamp_seconds"
    assert (REGISTRY.get_sample_value(grown, {"topic": config.input_topic}) or 0) > 1e9


def test_a_declaration_that_is_false_is_found_out_where_each_worker_reads_one_partition(
    kafka_node: KafkaNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.PROGRESS_S", 0.0)
    monkeypatch.setattr("plinth.pipelines.stream.kafka_replay.LOOK_S", 0.1)
    config = kafka_node.config(partitions=2, max_records=32, idle_exit_s=None)
    prepare(config)
    members = two_members(config, sharing=2)
    send(config, rounds(0, 1, terminal_id="t1"))  # thirty cards
    answered(members, 30)
    both = "not keyed as the settings of finance declare"
    eventually(lambda: caplog.text.count(both) == 2, 60, "both workers found it out")
    send(config, rounds(1, 3, terminal_id="t1"))
    answered(members, 90)
    for one in members:
        one.end()
    decisions = {d["transaction_id"]: d for d in kafka_node.answers(config)}
    assert all(d["features_partial"] for name, d in decisions.items() if name[1] != "0")
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=kafka_node.servers)) as admin:
        noted = admin.list_group_offsets(config.group)[config.group].values()
    assert all(Layout.read(told.metadata).grown for told in noted)


def test_a_state_that_retention_cut_short_is_said_on_every_decision(
    kafka_node: KafkaNode, tmp_path: Path
) -> None:
    config = kafka_node.config(partitions=1, max_events=50, state_dir=tmp_path)
    kafka_node.fill(config, payments(100))
    stream(config, FraudScoring())
    options = {"bootstrap_servers": kafka_node.servers}
    with contextlib.closing(KafkaAdminClient(**options)) as admin:
        admin.delete_records({TopicPartition(config.input_topic, 0): 30})
    (tmp_path / "state.snapshot").unlink()
    stream(config.model_copy(update={"max_events": 25}), FraudScoring())
    stream(config.model_copy(update={"max_events": 25}), FraudScoring())  # from the snapshot
    decisions = kafka_node.answers(config)
    assert [d["features_partial"] for d in decisions] == [False] * 50 + [True] * 50
    vertical = FraudScoring()
    with started_engine(vertical) as engine:
        [again] = rebuild(vertical, engine, config, has_value("x80"))
    assert again.equal


def test_an_open_transaction_upstream_is_said_and_waited_for(
    kafka_node: KafkaNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.BACKLOG_LOOK_S", 0.2)
    config = kafka_node.config(partitions=1, max_events=20, idle_exit_s=None, stall_timeout_s=2.0)
    name = "plinth_kafka_open_transaction_records"
    prepare(config)
    upstream = KafkaProducer(
        bootstrap_servers=config.bootstrap_servers, transactional_id=f"{config.group}-upstream"
    )
    seen: list[float] = []

    def release() -> None:
        eventually(lambda: sample(name, config) >= 20, 60, "the open transaction is a metric")
        since = time.monotonic()
        eventually(lambda: time.monotonic() - since > 2.5, 60, "longer than a stall may last")
        seen.append(sample(name, config))
        upstream.abort_transaction()

    with contextlib.closing(upstream), caplog.at_level(logging.WARNING):
        upstream.init_transactions()
        upstream.begin_transaction()
        upstream.send(config.input_topic, b"{", b"k").get(30)
        send(config, spends(20))
        helper = threading.Thread(target=release, daemon=True)
        helper.start()
        summary = stream(config)
        helper.join(60)
    assert (summary.scored, summary.dead_letters) == (20, {})
    assert seen
    assert seen[0] >= 20
    assert "a transaction of somebody who writes there is open" in caplog.text


def test_records_deleted_before_they_were_read_are_an_alarm(
    kafka_node: KafkaNode, caplog: pytest.LogCaptureFixture
) -> None:
    config = kafka_node.config(partitions=1, max_events=10)
    kafka_node.fill(config, spends(100))
    stream(config)
    options = {"bootstrap_servers": kafka_node.servers}
    with contextlib.closing(KafkaAdminClient(**options)) as admin:
        admin.delete_records({TopicPartition(config.input_topic, 0): 70})
    summary = stream(config.model_copy(update={"max_events": 30}))
    assert summary.records == 30
    assert sample("plinth_kafka_lost_records_total", config) == 60
    assert "offsets 10 to 69 were deleted by retention before they were read" in caplog.text
    assert sorted(a["id"] for a in kafka_node.answers(config))[10:] == list(range(70, 100))


def cut(node: KafkaNode, config: StreamConfig, offset: int) -> None:
    """Have the log of a node that is down end before the batch at this offset, as after a fall."""
    folder = node.folder / "data" / f"{config.input_topic}-0"
    (log,) = folder.glob("*.log")
    raw, at = log.read_bytes(), 0
    while int.from_bytes(raw[at : at + 8], "big") < offset:
        at += 12 + int.from_bytes(raw[at + 8 : at + 12], "big")
    assert int.from_bytes(raw[at : at + 8], "big") == offset
    log.write_bytes(raw[:at])
    for index in [*folder.glob("*index"), *folder.glob("*.snapshot")]:
        index.unlink()


def test_what_came_since_a_log_was_cut_is_read_and_the_cut_is_an_alarm(
    own_node: KafkaNode, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker went on behind all that had come meanwhile, and only the log said so."""
    config = own_node.config(partitions=1, max_events=700, idle_exit_s=None)
    for first in range(0, 400, 100):
        own_node.fill(config, spends(100, start=first))
    down = threading.Event()

    def fall(progress: StreamProgress) -> None:
        if progress.records == 400 and not progress.lag and not down.is_set():
            down.set()
            own_node.kill()
            cut(own_node, config, 200)
            own_node.start()
            own_node.fill(config, spends(300, start=400))

    vertical = TallyVertical()
    stream(config, vertical, on_progress=fall)
    assert sample("plinth_kafka_cut_records_total", config) == 200
    assert "offsets 200 to 399 were answered and are not there any more" in caplog.text
    assert sorted(a["id"] for a in own_node.answers(config)) == list(range(700))
    assert vertical.seen == 500  # what the log has now


def test_an_offset_beyond_the_end_of_the_log_is_an_alarm(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=1, max_events=10)
    kafka_node.fill(config, spends(100))
    options = {"bootstrap_servers": kafka_node.servers, "group_id": config.group}
    place = TopicPartition(config.input_topic, 0)
    with contextlib.closing(KafkaConsumer(**options)) as consumer:
        consumer.assign([place])
        consumer.commit({place: OffsetAndMetadata(130, "", -1)})
    helper = threading.Thread(target=after_growth, args=(kafka_node, config, place))
    helper.start()
    summary = stream(config)
    helper.join(60)
    assert summary.records == 10
    assert sample("plinth_kafka_cut_records_total", config) == 30
    assert sorted(a["id"] for a in kafka_node.answers(config)) == list(range(100, 110))


def after_growth(node: KafkaNode, config: StreamConfig, place: TopicPartition) -> None:
    """Append ten records once the group's offset is that of the end."""
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=node.servers)) as admin:

        def moved() -> bool:
            return bool(admin.list_group_offsets(config.group)[config.group][place].offset == 100)

        eventually(moved, 60, "the group's offset is that of the end")
    send(config, spends(10, start=100))


def test_a_rebuilt_state_is_that_of_the_uninterrupted_run_whatever_the_clock_says(
    kafka_node: KafkaNode,
) -> None:
    config = kafka_node.config(partitions=1, max_events=24)
    now = time.time()
    ahead = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + 7_200))
    early = [(b"k", v) for _, v in payments(12, card="tok", event_time=ahead)]
    honest = [(b"k", v.replace(b'"x', b'"y')) for _, v in payments(12, card="tok")]
    kafka_node.fill(config, early + honest)
    first = FraudScoring()
    assert stream(config, first).dead_letters == {"future_event": 12}
    later = FraudScoring(FraudSettings(), clock=lambda: now + 86_400)
    again = stream(config.model_copy(update={"max_events": None}), later)
    assert (again.records, again.replayed) == (0, 24)
    assert later.snapshot() == first.snapshot()


@pytest.mark.soak
@pytest.mark.needs("confluent_kafka")
def test_both_clients_read_an_odd_log_alike(kafka_node: KafkaNode) -> None:
    """Aborted and committed transactions, times of all kinds, no key, no value, headers."""
    base = kafka_node.config(partitions=2)
    hours = {f"message.timestamp.{way}.max.ms": str(2**62) for way in ("before", "after")}
    kafka_node.create(base.input_topic, 2, **hours)
    prepare(base)
    times = (0, 1, int(time.time() * 1e3), 4_102_444_800_000, 253_402_300_799_000)
    producer = KafkaProducer(
        bootstrap_servers=base.bootstrap_servers,
        transactional_id=base.group,
        compression_type="lz4",
    )
    with contextlib.closing(producer):
        producer.init_transactions()
        for turn in range(8):
            producer.begin_transaction()
            for n, (key, value) in enumerate(spends(50, start=50 * turn)):
                producer.send(base.input_topic, value, key, timestamp_ms=times[n % len(times)])
            if turn == 5:
                odd = [("a", b"1"), ("a", b"\xff"), ("", b"")]
                producer.send(base.input_topic, None, b"x", odd, partition=0)
                producer.send(base.input_topic, b"", b"", partition=0)
                producer.send(base.input_topic, b"{", None, odd, partition=1)
            if turn % 2:
                producer.commit_transaction()
            else:
                producer.abort_transaction()
    told = []
    for client in ("kafka-python", "confluent"):
        own = {"client": client, "group": f"g-{client}-{base.group}"[:30]}
        own |= {"output_topic": f"{base.output_topic}-{len(told)}"}
        own |= {"dead_letter_topic": f"{base.input_topic}.dead-{len(told)}"}
        config = base.model_copy(update=own)
        summary = stream(config)
        letters = [
            (one.key, one.value, [pair for pair in one.headers if pair[0] in ("a", "")])
            for one in kafka_node.read(config.dead_letters)
        ]
        answers = {one["id"]: one for one in kafka_node.answers(config)}
        told.append((summary.scored, summary.dead_letters, answers, letters))
    assert told[0][:2] == (200, {"empty_record": 1, "malformed_json": 2})
    assert told[0] == told[1]
