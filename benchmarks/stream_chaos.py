"""Whether a stream loses, repeats or stops anything while workers and brokers are killed.

    python benchmarks/stream_chaos.py [--records 1000000] [--worker-kills 50] [--broker-kills 5]
        [--alerts 0.2] [--workers 2] [--growths 2] [--brokers 3] [--silence 5] [--json]

Payments are written to a real Kafka (KAFKA_HOME, else ../shared/kafka) in every codec in turn,
each batch by its own producer; a share of them are alerts with reasons. Meanwhile workers
(``plinth stream finance``, exactly once, each with a name and a state folder) are killed with
SIGKILL and started again, brokers likewise, one at a time, and the input gets more partitions. A
reader of committed records counts every answer. Exit code 1 if one payment was not answered
exactly once, or if no answer came for longer than ``--silence`` seconds while some were due
(longer where a broker was just killed: its partitions need a new leader first).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
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
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def payment(number: int, alert: bool) -> tuple[bytes, bytes]:
    """Key and JSON of one payment; an alert is far above the hard limit."""
    card = f"tok_{number % CARDS}"
    moment = time.gmtime(1_767_225_600 + number)
    record = {
        "transaction_id": f"x{number}",
        "event_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        "amount": 9_000.0 if alert else 20.0,
        "currency": "EUR",
        "card": card,
        "customer_id": f"c{number % CARDS}",
        "terminal_id": f"t{number % 997}",
    }
    return card.encode(), json.dumps(record).encode()


class Workers:
    """``plinth stream finance``, several times; whoever ends is started again.

    Args:
        config: of the stream.
        count: how many.
        folder: for their state and their logs.
    """

    def __init__(self, config: StreamConfig, count: int, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.log = (folder / "workers.log").open("ab")
        self.ended: list[int] = []
        self.running = {number: self._start(number) for number in range(count)}

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = {"instance_id": f"w{number}", "state_dir": self.folder / f"w{number}"}
        told = self.config.model_dump(mode="json", exclude_unset=True) | own
        settings = {f"PLINTH_STREAM__{k.upper()}": str(v) for k, v in told.items() if v is not None}
        return subprocess.Popen(
            [sys.executable, "-m", "plinth", "stream", "finance", "--json"],
            env={**os.environ, **SINGLE, **settings, "PYTHONPATH": str(ROOT / "src")},
            stdout=self.log,
            stderr=self.log,
        )

    def kill_one(self) -> None:
        """kill -9 of one of them."""
        number = random.choice(list(self.running))
        self.running[number].kill()
        self.running[number].wait()
        self.running[number] = self._start(number)

    def revive(self) -> None:
        """Start again whatever ended by itself, and remember how."""
        for number, process in self.running.items():
            if process.poll() is not None:
                self.ended.append(process.returncode)
                self.running[number] = self._start(number)

    def stop(self) -> None:
        """SIGTERM to all; their exit codes are remembered."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                self.ended.append(process.wait(60))
            except subprocess.TimeoutExpired:
                process.kill()
                self.ended.append(process.wait())
        self.log.close()


def feed(config: StreamConfig, given: argparse.Namespace, written: list[int]) -> None:
    """Write the payments, batch by batch, each in the next codec."""
    grow_at = [given.records * n // (given.growths + 1) for n in range(1, given.growths + 1)]
    dice = random.Random(1)
    for first in range(0, given.records, BATCH):
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
            compression_type=CODECS[first // BATCH % len(CODECS)],
        )
        with contextlib.closing(producer):
            last = min(first + BATCH, given.records)
            pairs = [payment(n, dice.random() < given.alerts) for n in range(first, last)]
            for sent in [producer.send(config.input_topic, value, key) for key, value in pairs]:
                sent.get(120)
        written[0] = last


def grow(config: StreamConfig) -> None:
    """Double the partitions of the input."""
    servers = config.bootstrap_servers.split(",")
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
        count = len(admin.describe_topics([config.input_topic])[0]["partitions"])
        admin.create_partitions({config.input_topic: 2 * count})


class Reader:
    """Reads committed answers and dead letters, and how long none came while some were due."""

    def __init__(self, kafka: Kafka, config: StreamConfig) -> None:
        self.seen: Counter[str] = Counter()
        self.dead = 0
        self.decisions: Counter[str] = Counter()
        self.silences: list[tuple[float, str]] = []
        self._dead_topic = config.dead_letters
        self._came = time.monotonic()
        self._consumer = KafkaConsumer(
            bootstrap_servers=kafka.servers.split(","),
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        topics = (config.output_topic, config.dead_letters)
        self._consumer.assign(
            [TopicPartition(t, p) for t in topics for p in self._consumer.partitions_for_topic(t)]
        )

    def read(self, due: int, lately: str) -> int:
        """Take what is there; how many different payments are answered by now.

        Args:
            due: payments written by now.
            lately: what was done last, to be told of a silence.
        """
        polled = self._consumer.poll(200)
        now = time.monotonic()
        if polled or len(self.seen) >= due:
            self.silences.append((now - self._came, lately))
            self._came = now
        for place, records in polled.items():
            for record in records:
                made = json.loads(record.value)
                self.seen[made["transaction_id"]] += 1
                if place.topic == self._dead_topic:
                    self.dead += 1
                else:
                    self.decisions[made["decision"]] += 1
        return len(self.seen)

    def close(self) -> None:
        """Close the client."""
        self._consumer.close()


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; the report."""
    home = find_home()
    kafka: KafkaCluster | KafkaNode = (
        KafkaCluster(home, folder) if given.brokers == 3 else KafkaNode(home, folder)
    )
    nodes = kafka.nodes if isinstance(kafka, KafkaCluster) else []
    config = kafka.config(partitions=4, idle_exit_s=None, metadata_max_age_ms=2_000)
    prepare(config)
    workers = Workers(config, given.workers, folder)
    reader = Reader(kafka, config)
    written = [0]
    feeder = threading.Thread(target=feed, args=(config, given, written), daemon=True)
    feeder.start()
    acts = ["worker"] * given.worker_kills + ["broker"] * (given.broker_kills if nodes else 0)
    random.shuffle(acts)
    done, lately, began = 0, "start", time.monotonic()
    down: KafkaNode | None = None
    try:
        while (answered := reader.read(written[0], lately)) < given.records:
            workers.revive()
            if len(workers.ended) > given.records // 1_000 + 10:
                break  # they cannot even start
            if done < len(acts) and answered >= given.records * (done + 1) // (len(acts) + 1):
                lately = acts[done]
                done += 1
                if lately == "worker":
                    workers.kill_one()
                else:
                    if down is not None:
                        down.start()
                    down = random.choice(nodes)
                    down.kill()
            if time.monotonic() - began > given.timeout:
                break
        for _ in range(10):  # whatever came twice comes now
            reader.read(0, "end")
    finally:
        workers.stop()
        reader.close()
        kafka.kill()
    seconds = time.monotonic() - began
    return {
        "records": given.records,
        "answered": len(reader.seen),
        "lost": given.records - len(reader.seen),
        "twice": sum(count - 1 for count in reader.seen.values()),
        "dead_letters": reader.dead,
        "decisions": dict(reader.decisions),
        "kills": dict(Counter(acts[:done])),
        "ended_by_themselves": [code for code in workers.ended if code],
        "seconds": round(seconds, 1),
        "records_per_second": round(len(reader.seen) / seconds, 1),
        "longest_silences_s": [
            (round(length, 2), after) for length, after in sorted(reader.silences)[:-6:-1]
        ],
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
    parser.add_argument("--silence", type=float, default=5.0, help="seconds; longer is a failure")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds of the whole run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(given, Path(folder))
        if report["ended_by_themselves"]:
            print((Path(folder) / "workers.log").read_text()[-4_000:], file=sys.stderr)
    silent = [length for length, after in report["longest_silences_s"] if after == "worker"]
    report["ok"] = (
        not (report["lost"] or report["twice"]) and max(silent, default=0) < given.silence
    )
    if given.json:
        print_json(report)
    else:
        print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
