"""Whether a stream loses, repeats or stops anything while workers and brokers are killed.

    python benchmarks/stream_chaos.py [--records 1000000] [--worker-kills 50] [--broker-kills 5]
        [--alerts 0.2] [--workers 2] [--growths 2] [--brokers 3] [--rate 0] [--silence 5] [--disk]
        [--folder build/chaos] [--part 240] [--json]

Payments are written to a real Kafka (KAFKA_HOME, else ../shared/kafka) in every codec in turn,
each batch by its own producer; a share of them are alerts with reasons. Meanwhile workers
(``plinth stream finance``, exactly once, each with a name, a state folder and a standby) are killed
with SIGKILL and started again, brokers likewise, one at a time, and the input gets more partitions.
So much is written that every kill has work in hand. A reader of committed records counts every
answer. Exit code 1 if one payment was not answered exactly once, or if one waited longer than
``--silence`` seconds for its answer although it had been written before, while others were killed.

With ``--folder`` the run can be taken in parts: after ``--part`` seconds all is stopped in order,
the exit code is 3, and the same command goes on with the same log, state and counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402
from kafka.admin import KafkaAdminClient  # noqa: E402
from kafka_node import Kafka, KafkaCluster, KafkaNode, find_home  # noqa: E402

from plinth.pipelines.stream.kafka_clients import prepare  # noqa: E402
from plinth.pipelines.stream.settings import StreamConfig  # noqa: E402

CODECS = (None, "gzip", "snappy", "lz4", "zstd")
BATCH = 2_000
CARDS = 5_000
KILLS = "worker", "broker"
CAUGHT_UP_S = 60.0
"""After which a broker that came back counts as up, whatever it lacks."""
GOES_ON = 3
"""Exit code of a part that was not the last."""
TOLD_S = 1.5
"""Longer silences are told as they end."""
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def tell(what: str) -> None:
    """One line on stderr with the time of day, to be held beside the workers' logs."""
    now = time.time()
    clock = time.strftime("%H:%M:%S", time.gmtime(now))
    print(f"{clock}.{int(now % 1 * 1e3):03d} {what}", file=sys.stderr, flush=True)


def payment(number: int, alert: bool) -> tuple[bytes, bytes]:
    """Key and JSON of one payment; an alert is far above the hard limit.

    Alerts are of cards of their own, beside whose habit no other payment is odd.
    """
    who = f"{'a' if alert else ''}{number % CARDS}"
    card = f"tok_{who}"
    moment = time.gmtime(1_767_225_600 + number)
    record = {
        "transaction_id": f"x{number}",
        "event_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        "amount": 9_000.0 if alert else 20.0,
        "currency": "EUR",
        "card": card,
        "customer_id": f"c{who}",
        "terminal_id": f"t{number % 997}",
    }
    return card.encode(), json.dumps(record).encode()


class Workers:
    """``plinth stream finance``, several times, each with a standby; whoever ends is started again.

    Args:
        config: of the stream.
        count: how many.
        folder: for their state and their logs.
    """

    def __init__(self, config: StreamConfig, count: int, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.ended: list[int] = []
        self.log: dict[int, Path] = {}
        self.running = {n: [self._start(n), self._start(n)] for n in range(count)}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = {"instance_id": f"w{number}", "state_dir": self.folder / f"w{number}"}
        told = self.config.model_dump(mode="json", exclude_unset=True) | own | {"standby": True}
        settings = {f"PLINTH_STREAM__{k.upper()}": str(v) for k, v in told.items() if v is not None}
        path = self.folder / f"worker-{number}-{time.time():.3f}.log"
        with path.open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "plinth", "stream", "finance", "--json"],
                env={**os.environ, **SINGLE, **settings, "PYTHONPATH": str(ROOT / "src")},
                stdout=log,
                stderr=log,
            )
        self.log[started.pid] = path
        return started

    def kill_one(self) -> bool:
        """kill -9 of one of those that work, unless its standby is not ready; whether it was."""
        number = random.choice(list(self.running))
        pair = self.running[number]
        with contextlib.suppress(OSError, ValueError):  # nobody holds the folder yet
            held = int((self.folder / f"w{number}" / "lock").read_text())
            others = [one for one in pair if one.pid != held]
            if len(others) < len(pair) and all(map(self._stands_by, others)):
                (worker,) = [one for one in pair if one.pid == held]
                tell(f"kill -9 of worker w{number}, {worker.pid}")
                worker.kill()
                worker.wait()
                pair.remove(worker)
                pair.append(self._start(number))
                return True
        return False

    def _stands_by(self, process: subprocess.Popen[bytes]) -> bool:
        return "standing by" in self.log[process.pid].read_text()

    def revive(self) -> None:
        """Start again whatever ended by itself, and remember how."""
        for number, pair in self.running.items():
            for process in [one for one in pair if one.poll() is not None]:
                self.ended.append(process.returncode)
                pair.remove(process)
                pair.append(self._start(number))

    def stop(self) -> None:
        """SIGTERM to all; their exit codes are remembered."""
        every = [process for pair in self.running.values() for process in pair]
        for process in every:
            process.terminate()
        for process in every:
            try:
                code = process.wait(60)
                self.ended.append(0 if code == -signal.SIGTERM else code)  # it had not begun
            except subprocess.TimeoutExpired:
                process.kill()
                self.ended.append(process.wait())


class Brokers:
    """Kills one of three nodes at a time, and starts it again while the reader reads on."""

    def __init__(self, nodes: list[KafkaNode]) -> None:
        self._nodes = nodes
        self._down: KafkaNode | None = None
        self._back: threading.Thread | None = None

    def kill_one(self) -> bool:
        """kill -9 of a node, unless another is down; whether it was."""
        if not self.mend():
            return False
        self._down = random.choice(self._nodes)
        tell(f"kill -9 of broker {self._down.servers}")
        self._down.kill()
        return True

    def mend(self) -> bool:
        """Start again what was killed before; whether all nodes are up."""
        if self._down is not None:
            node, self._down = self._down, None
            self._back = threading.Thread(target=self._return, args=(node,), daemon=True)
            self._back.start()
        return self._back is None or not self._back.is_alive()

    def _return(self, node: KafkaNode) -> None:
        """Start a node, and wait until it has caught up: before, it is as good as lost."""
        node.start()
        until = time.monotonic() + CAUGHT_UP_S
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=[node.servers])) as admin:
            while time.monotonic() < until and not _in_sync(admin.describe_topics()):
                time.sleep(0.2)


def _in_sync(topics: list[dict[str, Any]]) -> bool:
    """Whether every partition of all topics, Kafka's own included, has all its copies in sync."""
    found = [part for topic in topics for part in topic["partitions"]]
    return bool(found) and all(len(p["isr_nodes"]) == len(p["replica_nodes"]) for p in found)


@dataclass
class Written:
    """How many payments were written, and how many may be until the next act has been done."""

    count: int = 0
    most: int = 0
    over: bool = False


def feed(config: StreamConfig, given: argparse.Namespace, written: Written) -> None:
    """Write the payments, batch by batch, each in the next codec."""
    size = min(BATCH, int(given.rate / 2) or BATCH)
    start = written.count
    grow_at = [given.records * n // (given.growths + 1) for n in range(1, given.growths + 1)]
    grow_at = [at for at in grow_at if at > start - size]
    began = time.monotonic()
    for first in range(start, given.records, size):
        number, dice = first // size, random.Random(first)
        if given.rate:
            time.sleep(max(0.0, began + (first - start) / given.rate - time.monotonic()))
        while first > written.most and not written.over:
            time.sleep(0.01)
        if written.over:
            return
        if grow_at and first >= grow_at[0]:
            grow_at.pop(0)
            grow(config)
        producer = KafkaProducer(
            bootstrap_servers=config.bootstrap_servers.split(","),
            acks="all",
            enable_idempotence=True,
            linger_ms=20,
            retry_backoff_ms=20,
            delivery_timeout_ms=120_000,
            compression_type=CODECS[number % len(CODECS)],
        )
        with contextlib.closing(producer):
            last = min(first + size, given.records)
            pairs = [payment(n, dice.random() < given.alerts) for n in range(first, last)]
            for sent in [producer.send(config.input_topic, value, key) for key, value in pairs]:
                sent.get(120)
        written.count = last


def grow(config: StreamConfig) -> None:
    """Double the partitions of the input."""
    servers = config.bootstrap_servers.split(",")
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        count = len(admin.describe_topics([config.input_topic])[0]["partitions"])
        admin.create_partitions({config.input_topic: 2 * count})


@dataclass
class Progress:
    """What is done, and kept from part to part.

    Args:
        topics: settings of the stream that name its topics and its group.
        acts: what is to be killed, in order.
        done: acts that were done.
        written: payments.
        seconds: of all parts.
        ended: exit codes of workers that ended by themselves.
        dead: dead letters.
        decisions: how many of each.
        positions: of the reader, by topic and partition.
        silences: the longest, seconds, and what was done last before.
    """

    topics: dict[str, str] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    done: int = 0
    written: int = 0
    seconds: float = 0.0
    ended: list[int] = field(default_factory=list)
    dead: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    positions: list[tuple[str, int, int]] = field(default_factory=list)
    silences: list[tuple[float, str]] = field(default_factory=list)

    @classmethod
    def begin(cls, given: argparse.Namespace, folder: Path) -> Progress:
        """That of the last part; a new one where there was none."""
        with contextlib.suppress(FileNotFoundError):
            told = json.loads((folder / "progress.json").read_text())
            silences = [(length, after) for length, after in told.pop("silences")]
            return cls(**told, silences=silences)
        acts = ["worker"] * given.worker_kills
        acts += ["broker"] * (given.broker_kills if given.brokers == 3 else 0)
        random.shuffle(acts)
        return cls(acts=acts)

    def save(self, folder: Path, answers: bytearray) -> None:
        """Keep it, and how often each payment was answered."""
        (folder / "answers").write_bytes(answers)
        (folder / "progress.json").write_text(json.dumps(asdict(self)))


class Reader:
    """Reads committed answers and dead letters, and how long none came while some were due.

    Args:
        kafka: where they are.
        config: of the stream.
        progress: goes on where that stood, and is kept up to date.
        answers: how often each payment was answered.
    """

    def __init__(
        self, kafka: Kafka, config: StreamConfig, progress: Progress, answers: bytearray
    ) -> None:
        self.progress, self.answers = progress, answers
        self.different = len(answers) - answers.count(0)
        self._dead_topic = config.dead_letters
        self._came = time.monotonic()
        self._consumer = KafkaConsumer(
            bootstrap_servers=kafka.servers.split(","),
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            reconnect_backoff_max_ms=1_000,  # by default a broker that came back may wait for 30 s
        )
        topics = (config.output_topic, config.dead_letters)
        self._places = [
            TopicPartition(t, p) for t in topics for p in self._consumer.partitions_for_topic(t)
        ]
        self._consumer.assign(self._places)
        for topic, partition, at in progress.positions:
            self._consumer.seek(TopicPartition(topic, partition), at)

    def read(self, due: int, lately: str) -> int:
        """Take what is there; how many different payments are answered by now.

        Args:
            due: payments written by now.
            lately: what was done last, to be told of a silence.
        """
        polled = self._consumer.poll(200)
        now, progress = time.monotonic(), self.progress
        if polled or self.different >= due:
            if now - self._came > TOLD_S:
                tell(f"answers again after {now - self._came:.2f} s, of {self.different}/{due}")
            progress.silences = sorted([*progress.silences, (now - self._came, lately)])[-50:]
            self._came = now
        for place, records in polled.items():
            for record in records:
                made = json.loads(record.value)
                number = int(made["transaction_id"][1:])
                self.different += not self.answers[number]
                self.answers[number] = min(255, self.answers[number] + 1)
                if place.topic == self._dead_topic:
                    progress.dead += 1
                else:
                    decision = made["decision"]
                    progress.decisions[decision] = progress.decisions.get(decision, 0) + 1
        return self.different

    def close(self) -> None:
        """Note how far it read, and close the client."""
        self.progress.positions = [
            (place.topic, place.partition, self._consumer.position(place)) for place in self._places
        ]
        self._consumer.close()


def settings(given: argparse.Namespace, kafka: Kafka, progress: Progress, folder: Path) -> Any:
    """Of the stream: its topics are those of the first part."""
    more = {"state_store": "disk", "state_dir": folder} if given.disk else {}
    config = kafka.config(
        partitions=4,
        idle_exit_s=None,
        metadata_max_age_ms=2_000,
        snapshot_interval_s=given.interval,
        commit_timeout_ms=given.commit_timeout_ms,
        **more,
        **progress.topics,
    )
    names = "input_topic", "output_topic", "group"
    progress.topics = {name: getattr(config, name) for name in names}
    prepare(config)
    return config


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, or a part of it; the report of all that was done."""
    home, began = find_home(), time.monotonic()
    progress, answers = Progress.begin(given, folder), bytearray(given.records)
    with contextlib.suppress(FileNotFoundError):
        answers[:] = (folder / "answers").read_bytes()
    kafka: KafkaCluster | KafkaNode = (
        KafkaCluster(home, folder) if given.brokers == 3 else KafkaNode(home, folder)
    )
    try:
        config = settings(given, kafka, progress, folder)
        reader = Reader(kafka, config, progress, answers)
        workers = Workers(config, given.workers, folder)
        written = Written(progress.written)
        feeder = threading.Thread(target=feed, args=(config, given, written), daemon=True)
        feeder.start()
        try:
            nodes = kafka.nodes if isinstance(kafka, KafkaCluster) else []
            act(given, workers, Brokers(nodes), reader, written)
        finally:
            written.over = True
            workers.stop()
            feeder.join(120)
            progress.written = written.count
            progress.ended += workers.ended
            progress.seconds += time.monotonic() - began
            reader.close()
            progress.save(folder, answers)
    finally:
        kafka.kill()
    return report_of(progress, answers)


def act(
    given: argparse.Namespace,
    workers: Workers,
    brokers: Brokers,
    reader: Reader,
    written: Written,
) -> None:
    """Kill, one after the other, while payments are answered, until all are or the time is over."""
    progress, began, lately = reader.progress, time.monotonic(), "start"
    acts = progress.acts
    while (answered := reader.read(written.count, lately)) < given.records:
        workers.revive()
        # a little further than where the next act is due: it has work in hand, and takes place
        due = given.records * (progress.done + 1) // (len(acts) + 1)
        written.most = due + BATCH
        if len(workers.ended) > given.records // 1_000 + 10:
            break  # they cannot even start
        if (
            progress.done < len(acts)
            and answered >= due
            and (workers if acts[progress.done] == "worker" else brokers).kill_one()
        ):
            lately = acts[progress.done]
            progress.done += 1
        if time.monotonic() - began > given.part:
            break
    for _ in range(10):  # whatever came twice comes now
        reader.read(0, "end")


def report_of(progress: Progress, answers: bytearray) -> dict[str, Any]:
    """What was found so far."""
    answered = len(answers) - answers.count(0)
    return {
        "records": len(answers),
        "written": progress.written,
        "answered": answered,
        "not_answered": len(answers) - answered,
        "twice": sum(answers) - answered,
        "dead_letters": progress.dead,
        "decisions": progress.decisions,
        "kills": dict(Counter(progress.acts[: progress.done])),
        "ended_by_themselves": [code for code in progress.ended if code],
        "seconds": round(progress.seconds, 1),
        "records_per_second": round(answered / progress.seconds, 1),
        "longest_silences_s": [
            (round(length, 2), after) for length, after in progress.silences[:-6:-1]
        ],
        "longest_after_a_kill_s": round(
            max((length for length, after in progress.silences if after in KILLS), default=0.0), 2
        ),
    }


def main() -> None:
    """Run and judge."""
    parser = parser_of(__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--alerts", type=float, default=0.2, help="share of payments, 0 to 1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kills", type=int, default=50)
    parser.add_argument("--broker-kills", type=int, default=5)
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=3)
    parser.add_argument(
        "--growths", type=int, default=2, help="times the input's partitions double"
    )
    parser.add_argument("--rate", type=float, default=0, help="payments a second; 0: all at once")
    parser.add_argument("--commit-timeout-ms", type=int, default=10_000, help="of the workers")
    parser.add_argument("--disk", action="store_true", help="the workers' state is on disk")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between checkpoints")
    parser.add_argument("--logs", action="store_true", help="show what the workers logged")
    parser.add_argument("--silence", type=float, default=5.0, help="seconds; longer is a failure")
    parser.add_argument("--folder", type=Path, help="keeps the run, so that it can go on")
    parser.add_argument("--part", type=float, default=7_200, help="seconds of this part of it")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    with contextlib.ExitStack() as held:
        folder = given.folder or Path(held.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        report = run(given, folder)
        if report["ended_by_themselves"] or given.logs:
            for path in sorted(folder.glob("worker-*.log")):
                print(path.name, path.read_text()[-2_000:], sep="\n", file=sys.stderr)
    report["ok"] = (
        not (report["not_answered"] or report["twice"])
        and report["longest_after_a_kill_s"] < given.silence
    )
    if given.json:
        print_json(report)
    else:
        print(json.dumps(report, indent=2))
    if given.folder is not None and report["not_answered"] and not report["twice"]:
        raise SystemExit(GOES_ON)
    raise SystemExit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
