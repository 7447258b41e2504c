"""Whether a stream loses, repeats or stops anything while workers and brokers are killed.

    python benchmarks/stream_chaos.py [--records 1000000] [--worker-kills 50] [--broker-kills 5]
        [--alerts 0.2] [--workers 2] [--growths 2] [--brokers 3] [--rate 0] [--silence 5] [--disk]
        [--json]

Payments are written to a real Kafka (KAFKA_HOME, else ../shared/kafka) in every codec in turn,
each batch by its own producer; a share of them are alerts with reasons. Meanwhile workers
(``plinth stream finance``, exactly once, each with a name, a state folder and a standby) are killed
with SIGKILL and started again, brokers likewise, one at a time, and the input gets more partitions.
So much is written that every kill has work in hand. A reader of committed records counts every
answer. Exit code 1 if one payment was not answered exactly once, or if one waited longer than
``--silence`` seconds for its answer although it had been written before, while others were killed.
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
from dataclasses import dataclass
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
        path = self.folder / f"worker-{number}-{len(self.log)}.log"
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
        self._down.kill()
        return True

    def mend(self) -> bool:
        """Start again what was killed before; whether all nodes are up."""
        if self._down is not None:
            node, self._down = self._down, None
            self._back = threading.Thread(target=node.start, daemon=True)
            self._back.start()
        return self._back is None or not self._back.is_alive()


@dataclass
class Written:
    """How many payments were written, and how many may be until the next act has been done."""

    count: int = 0
    most: int = 0


def feed(config: StreamConfig, given: argparse.Namespace, written: Written) -> None:
    """Write the payments, batch by batch, each in the next codec."""
    grow_at = [given.records * n // (given.growths + 1) for n in range(1, given.growths + 1)]
    dice = random.Random(1)
    began = time.monotonic()
    size = min(BATCH, int(2 * given.rate) or BATCH)
    for number, first in enumerate(range(0, given.records, size)):
        if given.rate:
            time.sleep(max(0.0, began + first / given.rate - time.monotonic()))
        while first > written.most:
            time.sleep(0.01)
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
    config = kafka.config(
        partitions=4,
        idle_exit_s=None,
        metadata_max_age_ms=2_000,
        snapshot_interval_s=given.interval,
        **({"state_store": "disk", "state_dir": folder} if given.disk else {}),
        commit_timeout_ms=given.commit_timeout_ms,
    )
    prepare(config)
    workers = Workers(config, given.workers, folder)
    reader = Reader(kafka, config)
    written = Written()
    feeder = threading.Thread(target=feed, args=(config, given, written), daemon=True)
    feeder.start()
    acts = ["worker"] * given.worker_kills + ["broker"] * (given.broker_kills if nodes else 0)
    random.shuffle(acts)
    done, lately, began = 0, "start", time.monotonic()
    brokers = Brokers(nodes)
    try:
        while (answered := reader.read(written.count, lately)) < given.records:
            workers.revive()
            # a little further than where the next act is due: it has work in hand, and takes place
            due = given.records * (done + 1) // (len(acts) + 1)
            written.most = due + BATCH
            if len(workers.ended) > given.records // 1_000 + 10:
                break  # they cannot even start
            if (
                done < len(acts)
                and answered >= due
                and (workers if acts[done] == "worker" else brokers).kill_one()
            ):
                lately = acts[done]
                done += 1
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
    parser.add_argument("--rate", type=float, default=0, help="payments a second; 0: all at once")
    parser.add_argument("--commit-timeout-ms", type=int, default=10_000, help="of the workers")
    parser.add_argument("--disk", action="store_true", help="the workers' state is on disk")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between checkpoints")
    parser.add_argument("--logs", action="store_true", help="show what the workers logged")
    parser.add_argument("--silence", type=float, default=5.0, help="seconds; longer is a failure")
    parser.add_argument("--timeout", type=float, default=7_200, help="seconds of the whole run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(given, Path(folder))
        if report["ended_by_themselves"] or given.logs:
            for path in sorted(Path(folder).glob("worker-*.log")):
                print(path.name, path.read_text()[-2_000:], sep="\n", file=sys.stderr)
    silent = [length for length, after in report["longest_silences_s"] if after != "start"]
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
