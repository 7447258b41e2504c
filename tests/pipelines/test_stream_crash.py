"""What survives: killed workers, killed and frozen brokers, a moving group, a polite stop."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import stream_chaos
from kafka import KafkaProducer
from kafka_fixtures import CLIENTS_OF_KAFKA, KafkaNode, eventually
from tally import Spend, Tally, TallyVertical, expect_each_once, spends, started_engine

from plinth.engine import Flow, InputError
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.stream.audit import check_trail
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.worker import (
    StreamConfig,
    StreamError,
    StreamProgress,
    StreamSummary,
    run,
)
from plinth.verticals.finance import FraudScoring

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
each_client = pytest.mark.parametrize("client", CLIENTS_OF_KAFKA)
WORKER = Path(__file__).with_name("stream_worker.py")
ROOT = WORKER.parents[2]


class Worker:
    """The stream in a process of its own."""

    def __init__(self, config: StreamConfig, *vertical: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), config.model_dump_json(), *vertical],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def told(self) -> Iterator[dict[str, Any]]:
        """Its lines of progress as they come."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until(self, records: int) -> None:
        """Wait until it has committed so many."""
        for line in self.told():
            if line.get("records", 0) >= records:
                return
        pytest.fail(f"the worker ended with {self.process.wait()} before {records} records")

    def kill_within(self, seconds: float) -> None:
        """kill -9 at a moment that nobody chose."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(random.random() * seconds)
        self.process.kill()
        self.process.wait(60)

    def summary(self) -> dict[str, Any]:
        """Wait for its end."""
        found = [line["summary"] for line in self.told() if "summary" in line]
        assert self.process.wait(60) == 0
        return found[0]


@pytest.fixture
def worker() -> Iterator[Callable[[StreamConfig], Worker]]:
    started: list[Worker] = []

    def start(config: StreamConfig, *vertical: str) -> Worker:
        started.append(Worker(config, *vertical))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate(timeout=60)


class Thread:
    """The stream on a thread of this process."""

    def __init__(self, config: StreamConfig, vertical: TallyVertical | None = None) -> None:
        self.stop = threading.Event()
        self.progress = StreamProgress()
        self.vertical = vertical or TallyVertical()
        self.result: list[StreamSummary | BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self._thread.start()

    def _run(self, config: StreamConfig) -> None:
        try:
            with started_engine(self.vertical) as engine:
                self.result.append(run(self.vertical, engine, config, self.stop, self._note))
        except BaseException as error:  # noqa: BLE001 - shown by summary() on the test's thread
            self.result.append(error)

    def _note(self, progress: StreamProgress) -> None:
        self.progress = progress

    def until(self, records: int) -> None:
        eventually(lambda: self.progress.records >= records, 60, f"{records} records")

    def summary(self) -> StreamSummary:
        self._thread.join(60)
        assert self.result, "the stream did not end"
        if isinstance(self.result[0], BaseException):
            raise self.result[0]
        return self.result[0]


@pytest.fixture(autouse=True)
def prompt_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plinth.pipelines.stream.worker.PROGRESS_S", 0.0)


@each_client
def test_exactly_once_however_often_and_whenever_the_worker_is_killed(
    kafka_node: KafkaNode,
    worker: Callable[[StreamConfig], Worker],
    tmp_path: Path,
    client: str,
) -> None:
    audit = f"audit-of-kills-{client}"
    config = kafka_node.config(
        instance_id="w1", state_dir=tmp_path, snapshot_interval_s=0.2, max_records=64,
        audit_topic=audit, client=client,
    )  # fmt: skip
    count, kills = (8_000, 2) if client == "confluent" else (5_000, 1)
    kafka_node.fill(config, spends(count))
    for _ in range(kills):
        one = worker(config)
        one.until(random.randrange(1, 1_500))
        one.kill_within(0.3)
    last = worker(config).summary()
    expect_each_once(kafka_node.answers(config), count)
    trail = enumerate(record.value for record in kafka_node.read(audit))
    checked = check_trail(((str(place), raw) for place, raw in trail), None)
    assert (checked.records, checked.faults) == (count, [])
    assert 0 < last["records"] < count
    assert last["replayed"] < 4_000  # the snapshot spared the rest


@pytest.mark.soak
def test_a_killed_worker_of_fraud_scoring_loses_nothing_in_a_flood_of_alerts(
    kafka_node: KafkaNode, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    config = kafka_node.config(
        instance_id="w1", state_dir=tmp_path, snapshot_interval_s=0.2, max_records=64
    )
    prepare(config)
    options = {"bootstrap_servers": kafka_node.servers, "compression_type": "zstd"}
    with contextlib.closing(KafkaProducer(**options)) as producer:
        for n in range(3_000):
            key, value = stream_chaos.payment(n, alert=True)
            producer.send(config.input_topic, value, key)
        producer.flush(60)
    one = worker(config, "finance")
    one.until(random.randrange(1, 1_500))
    one.kill_within(0.3)
    last = worker(config, "finance").summary()
    decisions = kafka_node.answers(config)
    assert sorted(d["transaction_id"] for d in decisions) == sorted(f"x{n}" for n in range(3_000))
    assert {d["reason_codes"][0]["code"] for d in decisions} == {"R01"}
    assert {d["features_partial"] for d in decisions} == {False}
    assert 0 < last["records"] < 3_000


def test_a_state_larger_than_memory_survives_kills_bit_for_bit(
    kafka_node: KafkaNode, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """And the next worker goes on from its last checkpoint, offsets included."""
    config = kafka_node.config(
        instance_id="w1", state_dir=tmp_path, state_store="disk", snapshot_interval_s=0.1,
        max_records=64, partitions=1,
    )  # fmt: skip
    kafka_node.fill(config, (stream_chaos.payment(n, n % 50 == 0) for n in range(2_000)))
    tables = ("cards", "terminals", "customers", "devices")
    small = json.dumps({f"max_{table}": 256 for table in tables})
    one = worker(config, "finance", small)
    one.until(random.randrange(500, 1_500))
    one.kill_within(0.1)
    last = worker(config, "finance", small).summary()
    assert 0 < last["records"] < 2_000
    assert last["replayed"] < 2_000 - last["records"], "the checkpoint spared the rest"
    whole = config.model_copy(
        update={"output_topic": f"{config.output_topic}-whole", "group": f"{config.group}-whole",
                "instance_id": None, "state_store": "snapshot", "state_dir": None},
    )  # fmt: skip
    vertical = FraudScoring()
    with started_engine(vertical) as engine:
        run(vertical, engine, whole, threading.Event())
    answers, expected = kafka_node.answers(config), kafka_node.answers(whole)
    assert answers == expected
    assert not any(answer["features_partial"] for answer in answers)


@pytest.mark.soak
def test_at_least_once_when_the_worker_is_killed(
    kafka_node: KafkaNode, worker: Callable[[StreamConfig], Worker], tmp_path: Path
) -> None:
    config = kafka_node.config(
        guarantee="at_least_once", instance_id="w1", state_dir=tmp_path, max_records=64
    )
    kafka_node.fill(config, spends(3_000))
    one = worker(config)
    one.until(random.randrange(1, 1_500))
    one.kill_within(0.3)
    worker(config).summary()
    answered = [answer["id"] for answer in kafka_node.answers(config)]
    assert set(answered) == set(range(3_000))
    assert len(answered) <= 3_000 + 2 * config.max_records


def test_sigterm_finishes_the_chunk_commits_and_leaves_a_snapshot(
    kafka_node: KafkaNode, worker: Callable[[StreamConfig], Worker], tmp_path: Path
) -> None:
    config = kafka_node.config(state_dir=tmp_path, max_records=16)
    kafka_node.fill(config, spends(2_000))
    first = worker(config)
    first.until(400)
    first.process.terminate()
    done = first.summary()
    assert done["records"] < 2_000
    assert len(kafka_node.answers(config)) == done["records"]
    vertical = TallyVertical()
    with started_engine(vertical) as engine:
        rest = run(vertical, engine, config, threading.Event())
    assert rest.records == 2_000 - done["records"]
    assert rest.replayed == vertical.observed == 0
    expect_each_once(kafka_node.answers(config), 2_000)


def test_no_loss_and_no_duplicate_when_the_broker_is_killed_and_comes_back(
    own_node: KafkaNode,
) -> None:
    config = own_node.config(max_records=32, idle_exit_s=None, commit_timeout_ms=3_000)
    own_node.fill(config, spends(300))
    one = Thread(config)
    eventually(lambda: len(own_node.answers(config)) == 300, 60, "all is committed")
    own_node.kill()
    own_node.start()
    own_node.fill(config, spends(1_700, start=300))
    one.until(2_000)
    one.stop.set()
    one.summary()
    expect_each_once(own_node.answers(config), 2_000)


@each_client
def test_a_commit_that_never_returns_is_given_up_and_done_again_once(
    own_node: KafkaNode, client: str
) -> None:
    config = own_node.config(
        max_records=32, idle_exit_s=5.0, commit_timeout_ms=1_000, client=client
    )
    own_node.fill(config, spends(3_000))
    one = Thread(config)
    one.until(500)
    before = given_up()
    own_node.freeze()
    eventually(lambda: given_up() > before, 60, "a commit was given up")
    own_node.thaw()
    one.until(3_000)
    one.stop.set()
    summary = one.summary()
    assert summary.recoveries.get("commit_timeout", 0) >= 1
    expect_each_once(own_node.answers(config), 3_000)


def given_up() -> float:
    """How often this process gave up waiting for a commit."""
    labels = {"cause": "commit_timeout"}
    return REGISTRY.get_sample_value("plinth_kafka_recoveries_total", labels) or 0.0


@each_client
def test_scores_stay_right_while_workers_join_and_leave_the_group(
    kafka_node: KafkaNode, client: str
) -> None:
    """The second worker has another client than the first, where there is one.

    It gets the partitions of the first, which has a lasting name, long before the group would give
    them away.
    """
    other = "kafka-python" if find_spec("confluent_kafka") is None else "confluent"
    other = "kafka-python" if client == other else other
    config = kafka_node.config(max_records=16, idle_exit_s=None, session_timeout_ms=60_000)
    kafka_node.fill(config, spends(1_000))
    named = {"client": client, "instance_id": "w1", "leave_on_stop": True}
    first = Thread(config.model_copy(update=named))
    first.until(500)
    second = Thread(config.model_copy(update={"client": other}))
    eventually(lambda: second.progress.partitions > 0, 60, "the second worker has partitions")
    kafka_node.fill(config, spends(3_000, start=1_000))
    second.until(300)
    shares = first.vertical.shares
    eventually(lambda: any(mine < 4 for mine, _ in shares), 60, "the first shares the topic")
    first.stop.set()
    done = first.summary()
    eventually(lambda: second.progress.partitions == 4, 20, "the second has what the first had")
    second.until(4_000 - done.records)
    second.stop.set()
    assert done.records + second.summary().records == 4_000
    assert second.summary().replayed > 0
    assert (4, 4) in shares
    expect_each_once(kafka_node.answers(config), 4_000)


class Unhurried(TallyVertical):
    """Takes its time over what it is to read again, until it is hurried on.

    Attributes:
        before: records that it had read again when it answered its first one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hurried = threading.Event()
        self.before: int | None = None

    def hurry(self) -> None:
        self.hurried.set()

    def observe(self, requests: Sequence[Spend]) -> None:
        super().observe(requests)
        self.hurried.wait(0.25)

    def infer(self, requests: Sequence[Spend]) -> Flow[list[Tally | InputError]]:
        if self.before is None:
            self.before = self.observed
        return super().infer(requests)


@each_client
def test_who_comes_first_serves_what_it_knows_and_gives_up_what_others_come_for(
    kafka_node: KafkaNode, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the past of all partitions first, and looked at the group once that was done."""
    monkeypatch.setattr("plinth.pipelines.stream.worker.STEP_RECORDS", 50)
    config = kafka_node.config(client=client, idle_exit_s=None, snapshot_interval_s=600.0)
    kafka_node.fill(config, [])
    folders = [{"state_dir": tmp_path / name} for name in "ab"]
    workers = [Thread(config.model_copy(update=one)) for one in folders]

    def shared() -> bool:
        return [one.progress.partitions for one in workers] == [2, 2]

    eventually(shared, 60, "two partitions for each")
    kafka_node.fill(config, spends(8_000))
    eventually(lambda: sum(w.progress.records for w in workers) == 8_000, 60, "all answered")
    for one in workers:
        one.stop.set()
        one.summary()
    of_the_other = workers[1].progress.records

    kafka_node.fill(config, spends(1_000, start=8_000))
    first = Unhurried()
    workers = [Thread(config.model_copy(update=folders[0]), first)]
    eventually(lambda: first.before is not None, 60, "it answers what it knows")
    assert first.before < of_the_other
    assert first.shares[-1] == (2, 4)
    workers.append(Thread(config.model_copy(update=folders[1])))
    eventually(shared, 60, "two partitions for each again")
    assert first.observed < of_the_other
    first.hurry()
    eventually(lambda: len(kafka_node.answers(config)) == 9_000, 60, "all answered")
    for one in workers:
        one.stop.set()
        one.summary()
    assert workers[1].vertical.observed == 0  # it had all of its own
    expect_each_once(kafka_node.answers(config), 9_000)

    alone = Unhurried()  # what the other one had meanwhile is read again, and the rest is served
    kafka_node.fill(config, spends(1_000, start=9_000))
    last = Thread(config.model_copy(update={**folders[0], "max_events": 1_000}), alone)
    alone.hurry()
    assert last.summary().records == 1_000
    assert alone.shares[-1] == (4, 4)
    expect_each_once(kafka_node.answers(config), 10_000)


@each_client
def test_a_second_worker_of_the_same_name_takes_over_and_the_first_says_why_it_ends(
    kafka_node: KafkaNode, client: str
) -> None:
    config = kafka_node.config(instance_id="w1", max_records=16, idle_exit_s=1.0, client=client)
    kafka_node.fill(config, spends(1_000))
    first = Thread(config.model_copy(update={"idle_exit_s": None}))
    first.until(100)
    second = Thread(config)
    with pytest.raises(StreamError, match="instance id 'w1'"):
        first.summary()
    second.summary()
    expect_each_once(kafka_node.answers(config), 1_000)


def test_a_broker_that_stays_away_ends_the_stream_and_the_next_one_goes_on(
    own_node: KafkaNode,
) -> None:
    config = own_node.config(
        instance_id="w1", max_records=8, commit_timeout_ms=1_000, outage_timeout_s=4.0
    )
    own_node.fill(config, spends(1_200))
    one = Thread(config)
    one.until(100)
    own_node.freeze()
    with pytest.raises(StreamError, match="no commit and no group membership for 4 s"):
        one.summary()
    own_node.thaw()
    Thread(config.model_copy(update={"outage_timeout_s": 60.0})).summary()
    expect_each_once(own_node.answers(config), 1_200)


@pytest.mark.soak
def test_a_stop_while_the_broker_is_gone_ends_in_bounded_time(own_node: KafkaNode) -> None:
    config = own_node.config(
        max_records=8, idle_exit_s=None, commit_timeout_ms=1_000, drain_timeout_s=1.5
    )
    own_node.fill(config, spends(3_000))
    one = Thread(config)
    one.until(100)
    own_node.kill()
    one.stop.set()
    with pytest.raises(StreamError, match="nothing is lost"):
        one.summary()


@pytest.mark.soak
def test_a_standby_follows_the_log_and_takes_over_when_the_worker_is_killed(
    kafka_node: KafkaNode, worker: Callable[[StreamConfig], Worker], tmp_path: Path
) -> None:
    config = kafka_node.config(
        instance_id="w1", state_dir=tmp_path, snapshot_interval_s=0.2, max_records=64,
        idle_exit_s=None, session_timeout_ms=30_000, transaction_timeout_ms=60_000,
        partitions=2, metadata_max_age_ms=500,
    )  # fmt: skip
    kafka_node.fill(config, spends(1_000))
    first = worker(config)
    first.until(1_000)
    eventually((tmp_path / "state.snapshot").exists, 30, "the first snapshot")
    second = Thread(config.model_copy(update={"standby": True}))
    eventually(lambda: second.vertical.seen == 1_000, 30, "the standby has the state")
    kafka_node.fill(config, spends(2_000, start=1_000))
    first.until(3_000)
    eventually(lambda: second.vertical.seen == 3_000, 30, "the standby follows the log")
    assert not second.progress.partitions
    kafka_node.fill(config, spends(8_000, start=3_000))
    first.until(3_500)
    first.kill_within(0.0)
    killed = time.monotonic()
    eventually(lambda: second.progress.records > 0, 20, "the standby answers")
    # far below both time-outs: it neither waits for the group nor for the open transaction
    assert time.monotonic() - killed < 10
    # it leads the group now, though the broker does not tell it so
    kafka_node.grow(config.input_topic, 6)
    others = [(b"d" + k, v.replace(b': "c', b': "dc')) for k, v in spends(400, start=11_000)]
    kafka_node.fill(config, others)
    eventually(lambda: second.progress.partitions == 6, 30, "the new partitions are read")
    eventually(lambda: second.vertical.seen == 11_400, 30, "to their ends")
    second.stop.set()
    summary = second.summary()
    assert 0 < summary.records < 8_400
    assert summary.replayed < 8_000
    expect_each_once(kafka_node.answers(config), 11_400)


def test_a_standby_that_is_not_needed_ends_when_told(kafka_node: KafkaNode, tmp_path: Path) -> None:
    config = kafka_node.config(state_dir=tmp_path, idle_exit_s=None)
    kafka_node.fill(config, spends(100))
    first = Thread(config)
    first.until(100)
    second = Thread(config.model_copy(update={"standby": True}))
    second.stop.set()
    assert second.summary() == StreamSummary()
    first.stop.set()
    assert first.summary().records == 100
