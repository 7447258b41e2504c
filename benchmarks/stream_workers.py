"""What more workers of one consumer group bring, and what it costs when one comes or goes.

    python benchmarks/stream_workers.py [--workers 1 2 4] [--events 40000] [--rate 1000] [--json]

``plinth stream finance`` runs so many times, exactly once, on topics of four partitions of a real
Kafka (KAFKA_HOME, else ../shared/kafka); Kafka, the workers and this script share the machine.

- Throughput: all workers are in the group and have answered something before ``--events`` payments
  are written at once; from the first of them to the last answer a reader of committed records has.
- Changes: payments come at ``--rate`` a second to two workers. Then a third one joins, one is told
  to stop (SIGTERM), and one is killed (SIGKILL; it has a lasting name, and nobody takes its place).
  For each: the longest time from a payment's timestamp to its committed answer in the seconds
  after it, how long it took until answers came as soon as before, and how many payments came late.
  With ``--leave`` a worker that is told to stop leaves the group (``leave_on_stop``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402
from kafka.admin import KafkaAdminClient  # noqa: E402
from kafka.errors import KafkaError  # noqa: E402
from kafka_node import KafkaNode, find_home  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from stream_throughput import Payments, payments  # noqa: E402

from plinth.pipelines.stream.kafka_clients import prepare  # noqa: E402
from plinth.pipelines.stream.settings import StreamConfig  # noqa: E402

SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
JOIN_SECONDS, ANSWER_SECONDS = 120.0, 240.0
SOON = 1.0
"""Seconds after which an answer is late: several times what it takes while nothing changes."""


class Group:
    """Workers of one group, each with a folder and a name of its own.

    Args:
        node: the Kafka.
        folder: for their state and logs.
        client: of Kafka.
        leave: whoever is told to stop leaves the group.
        disk: the state lies on disk by parts.
    """

    def __init__(
        self, node: KafkaNode, folder: Path, client: str, *, leave: bool, disk: bool
    ) -> None:
        self.config: StreamConfig = node.config(
            client=client, idle_exit_s=None, partitions=4, state_dir=None, leave_on_stop=leave
        )
        self._disk = disk
        self.node = node
        self.workers: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._started = 0
        prepare(self.config)

    def add(self) -> None:
        """Start one more worker."""
        number, self._started = self._started, self._started + 1
        own = {"state_dir": self._folder / f"w{number}", "instance_id": f"w{number}"}
        own |= {"state_store": "disk"} if self._disk else {}
        told = self.config.model_dump(mode="json", exclude_unset=True) | own
        settings = {f"PLINTH_STREAM__{k.upper()}": str(v) for k, v in told.items() if v is not None}
        with (self._folder / f"w{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "plinth", "stream", "finance", "--json"],
                env={**os.environ, **SINGLE, **settings, "PYTHONPATH": str(ROOT / "src")},
                stdout=log,
                stderr=log,
            )
        self.workers.append(process)

    def await_members(self, count: int) -> None:
        """Wait until so many workers share all partitions."""
        until, pause = time.monotonic() + JOIN_SECONDS, threading.Event()
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.node.servers)) as admin:
            while time.monotonic() < until:
                with contextlib.suppress(KafkaError):  # a new Kafka has no coordinator yet
                    group = admin.describe_groups([self.config.group])[self.config.group]
                    if group["group_state"] == "Stable" and len(group["members"]) == count:
                        return
                pause.wait(0.2)
        raise SystemExit(f"{count} workers did not join: {self._said()}")

    def _said(self) -> str:
        return "\n".join(path.read_text()[-500:] for path in self._folder.glob("*.log"))

    def cpu_seconds(self) -> float:
        """CPU time of all workers that run."""
        times = [psutil.Process(each.pid).cpu_times() for each in self.workers]
        return sum(each.user + each.system for each in times)

    def end(self) -> None:
        """Tell all to stop, and wait for them."""
        for each in self.workers:
            each.terminate()
        for each in self.workers:
            try:
                each.wait(60)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()


class Answers:
    """Reads committed answers in a thread: when the one to each payment came, seconds."""

    def __init__(self, group: Group) -> None:
        self.came: dict[str, float] = {}
        self.twice = 0
        self._consumer = KafkaConsumer(
            bootstrap_servers=group.node.servers,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        topic = group.config.output_topic
        places = self._consumer.partitions_for_topic(topic)
        self._consumer.assign([TopicPartition(topic, place) for place in places])
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.is_set():
            polled = self._consumer.poll(100)
            now = time.time()
            for record in (each for records in polled.values() for each in records):
                number = json.loads(record.value)["transaction_id"]
                self.twice += number in self.came
                self.came.setdefault(number, now)
            with self._changed:
                self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until so many payments were answered."""
        until = time.monotonic() + ANSWER_SECONDS
        with self._changed:
            while len(self.came) < count:
                if time.monotonic() > until:
                    raise SystemExit(f"{len(self.came)} of {count} answers came")
                self._changed.wait(1.0)

    def close(self) -> None:
        """Stop reading."""
        self._over.set()
        self._thread.join()
        self._consumer.close()


def throughput(group: Group, events: Payments, workers: int) -> dict[str, float]:
    """Payments a second of so many workers, and what each payment took of their CPU."""
    for _ in range(workers):
        group.add()
    group.await_members(workers)
    first, rest = events[:400], events[400:]
    answers = Answers(group)
    group.node.fill(group.config, first)
    answers.wait_for(len(first))
    cpu, begun = group.cpu_seconds(), time.time()
    group.node.fill(group.config, rest)
    answers.wait_for(len(events))
    seconds, cpu = time.time() - begun, group.cpu_seconds() - cpu
    answers.close()
    return {
        "workers": workers,
        "payments_per_second": len(rest) / seconds,
        "cpu_us_each": cpu / len(rest) * 1e6,
        "cores_used": cpu / seconds,
        "answered_twice": answers.twice,
    }


def feed(group: Group, events: Payments, rate: float, sent: dict[str, float]) -> None:
    """Send each payment when it is due, stamped with that moment."""
    with contextlib.closing(KafkaProducer(bootstrap_servers=group.node.servers, linger_ms=5)) as to:
        begun = time.time()
        for number, (key, raw) in enumerate(events):
            time.sleep(max(0.0, begun + number / rate - time.time()))
            sent[json.loads(raw)["transaction_id"]] = now = time.time()
            to.send(group.config.input_topic, raw, key, timestamp_ms=int(now * 1e3))
        to.flush(30)


def changes(group: Group, events: Payments, rate: float, apart: float) -> list[dict[str, Any]]:
    """What a worker that joins, one that stops and one that is killed cost those who wait."""
    for _ in range(2):
        group.add()
    group.await_members(2)
    answers, sent = Answers(group), dict[str, float]()
    feeder = threading.Thread(target=feed, args=(group, events, rate, sent), daemon=True)

    def leave(end: Callable[[subprocess.Popen[bytes]], None]) -> None:
        worker = group.workers.pop(0)
        end(worker)
        worker.wait(60)

    acts: dict[str, Callable[[], None]] = {
        "nothing": lambda: None,
        "one joins": group.add,
        "one stops": lambda: leave(subprocess.Popen.terminate),
        "one is killed": lambda: leave(subprocess.Popen.kill),
    }
    begun: list[tuple[str, float]] = []
    feeder.start()
    pause = threading.Event()
    pause.wait(apart)
    for name, act in acts.items():
        begun.append((name, time.time()))
        act()
        pause.wait(apart)
    begun.append(("end", time.time()))
    feeder.join()
    answers.wait_for(len(events))
    answers.close()
    found = []
    for (name, at), (_, until) in itertools.pairwise(begun):
        # what was sent just before an act waits for that one
        waits = {
            n: answers.came[n] - put for n, put in sent.items() if at - SOON <= put < until - SOON
        }
        late = [n for n, wait in waits.items() if wait > SOON]
        settled = max((answers.came[n] - at for n in late), default=0.0)
        found.append(
            {
                "change": name,
                "p50_ms": 1e3 * statistics.median(waits.values()),
                "longest_s": max(waits.values()),
                "late": len(late),
                "settled_after_s": settled,
                "answered_twice": answers.twice,
            }
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--events", type=int, default=40_000, help="payments of a throughput run")
    parser.add_argument("--rate", type=float, default=1_000, help="payments/s beside changes")
    parser.add_argument("--apart", type=float, default=15.0, help="seconds from change to change")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--leave", action="store_true", help="set leave_on_stop")
    parser.add_argument("--disk", action="store_true", help="the state lies on disk by parts")
    parser.add_argument("--client", choices=("kafka-python", "confluent"), default="kafka-python")
    given = parser.parse_args()
    steady = round(given.rate * given.apart * 5)
    events = list(payments(max(given.events, steady)))
    report: dict[str, list[dict[str, Any]]] = {"throughput": [], "changes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        node = KafkaNode(find_home(), folder)

        def run(part: str, measure: Callable[[Group], Any]) -> None:
            group = Group(node, folder, given.client, leave=given.leave, disk=given.disk)
            try:
                found = measure(group)
            finally:
                group.end()
            report[part] += found if isinstance(found, list) else [found]

        try:
            some = events[: given.events]
            for count in given.workers * given.repeats:
                run("throughput", partial(throughput, events=some, workers=count))
            if given.rate:
                steady_events = events[:steady]
                run(
                    "changes",
                    partial(changes, events=steady_events, rate=given.rate, apart=given.apart),
                )
        finally:
            node.kill()
    if given.json:
        print_json(report)
        return
    for part, rows in report.items():
        table = Table(*(rows[0] if rows else ()), title=part)
        for row in rows:
            table.add_row(
                *(
                    f"{v:,.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
                    for v in row.values()
                )
            )
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
