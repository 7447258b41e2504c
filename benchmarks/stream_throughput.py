"""How many payments a second one core streams from a real Kafka, and how soon they are answered.

    python benchmarks/stream_throughput.py [--events 60000] [--rate 2000] [--runs 3] [--json]
        [--client kafka-python confluent] [--guarantee exactly_once] [--set linger_ms=5] [--bare]
        [--heat 90]

``plinth stream finance`` runs on core 1 with one thread per library; the Kafka node (KAFKA_HOME,
else ../shared/kafka) and this script run on core 0. Every run uses new topics of four partitions
and simulated payments; exactly once, every decision leaves an audit record (``--plain``: none).
Clients and guarantees take turns within each of the ``--runs``.

- Throughput: the topic is filled before, so the worker sets the pace; from the first record to
  the last commit.
- Latency: payments come at ``--rate`` a second; from a record's timestamp to the moment a reader
  of committed records has its answer. The first ``--warm-up`` seconds are left out.
- ``--heat``: seconds of a copy before all else, which nobody counts: a broker that has just started
  compiles itself for a minute or two, and takes three times as long for a transaction meanwhile.
- ``--bare``: beside them the same with ``bare_stream.py``, which only copies: what is left is the
  client's, the broker's and the machine's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from kafka import KafkaConsumer, KafkaProducer, TopicPartition  # noqa: E402
from kafka_node import KafkaNode, find_home  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from plinth.pipelines.stream.kafka_clients import prepare  # noqa: E402
from plinth.pipelines.stream.settings import StreamConfig  # noqa: E402
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json  # noqa: E402

CUSTOMERS = 5_000
GUARANTEES = ("exactly_once", "at_least_once")
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OF_WORKER = ("cpu_us", "commit_ms_p50", "commit_ms_p99")
THROUGHPUT = ("records_per_second", *OF_WORKER)
LATENCY = ("rate", "p50_ms", "p90_ms", "p99_ms", "max_ms", *OF_WORKER)
BARE = "bare copy"
Payments = list[tuple[bytes, bytes]]
Settings = dict[str, Any]


def payments(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Transactions of the finance simulator as (key, JSON), in event-time order."""
    people = Population(customers=CUSTOMERS, terminals=2 * CUSTOMERS, days=2 + count // CUSTOMERS)
    for made, raw in enumerate(transactions_json(simulate(people, seed=1))):
        if made == count:
            return
        yield json.loads(raw)["card"].encode(), raw
    raise SystemExit(f"fewer than {count} payments were simulated")


class Worker:
    """``plinth stream finance``, or a bare copy, on core 1 until its ``max_events``."""

    def __init__(self, config: StreamConfig, bare: bool = False) -> None:
        told = config.model_dump(mode="json", exclude_unset=True).items()
        settings = {
            f"PLINTH_STREAM__{name.upper()}": str(value)
            for name, value in told
            if value is not None
        }
        way = ["-m", "plinth", "stream", "finance", "--json"]
        if bare:
            way = [str(ROOT / "benchmarks" / "bare_stream.py"), config.model_dump_json()]
        self.process = subprocess.Popen(
            ["taskset", "-c", "1", sys.executable, *way],
            env={**os.environ, **SINGLE, **settings, "PYTHONPATH": _path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """Its own account, once it has ended."""
        out, err = self.process.communicate(timeout=600)
        if self.process.returncode:
            raise SystemExit(f"the worker failed:\n{err}")
        found: dict[str, Any] = json.loads(out)
        found["cpu_us"] = found["cpu_seconds"] / max(1, found["records"]) * 1e6
        return found

    def abandon(self) -> str:
        """End it at once; what it said."""
        self.process.kill()
        return self.process.communicate()[1]


def _path() -> str:
    """Where the worker finds this checkout, and what this process finds beside it."""
    return os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))


def throughput(
    node: KafkaNode, events: Payments, settings: Settings, bare: bool
) -> dict[str, float]:
    """One run over topics that were filled before."""
    config = _config(node, settings, len(events))
    node.fill(config, events)
    found = Worker(config, bare).summary()
    return {name: float(found[name]) for name in THROUGHPUT}


def latency(
    node: KafkaNode,
    events: Payments,
    settings: Settings,
    bare: bool,
    rate: float,
    warm_up: float,
) -> dict[str, float]:
    """One run at a steady rate; milliseconds from record timestamp to committed answer.

    The first payment is sent alone and its answer awaited, so that the worker has started.
    """
    config = _config(node, settings, len(events))
    prepare(config)
    reader = _reader(node, config.output_topic)
    worker = Worker(config, bare)
    sent: dict[str, float] = {}
    came: list[tuple[float, bytes]] = []
    for part, pace in ((events[:1], 1.0), (events[1:], rate)):
        threading.Thread(target=_feed, args=(node, config, part, pace, sent), daemon=True).start()
        until = time.monotonic() + len(part) / pace + 120
        wanted = len(came) + len(part)
        while len(came) < wanted:
            if time.monotonic() > until:
                raise SystemExit(f"{len(came)} of {wanted} answers came\n{worker.abandon()}")
            polled = reader.poll(200)
            now = time.time()
            came += [(now, record.value) for records in polled.values() for record in records]
    found = worker.summary()
    reader.close()
    first, last = min(list(sent.values())[1:]), max(sent.values())
    answers = [(at, sent[json.loads(raw)["transaction_id"]]) for at, raw in came]
    times = sorted((at - put) * 1e3 for at, put in answers if put >= first + warm_up)
    cuts = statistics.quantiles(times, n=100)
    return {
        "rate": (len(events) - 2) / (last - first),
        "p50_ms": cuts[49],
        "p90_ms": cuts[89],
        "p99_ms": cuts[98],
        "max_ms": times[-1],
        **{name: float(found[name]) for name in OF_WORKER},
    }


def _config(node: KafkaNode, settings: Settings, events: int) -> StreamConfig:
    fixed = {"idle_exit_s": 300, "max_events": events, "session_timeout_ms": 30_000}
    config = node.config(**fixed, **settings)
    if config.guarantee == "exactly_once" and "audit_topic" not in settings:
        config = config.model_copy(update={"audit_topic": f"{config.input_topic}-audit"})
    return config


def _reader(node: KafkaNode, topic: str) -> Any:
    reader = KafkaConsumer(
        bootstrap_servers=node.servers,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    reader.assign([TopicPartition(topic, p) for p in reader.partitions_for_topic(topic)])
    return reader


def _feed(
    node: KafkaNode, config: StreamConfig, events: Payments, rate: float, sent: dict[str, float]
) -> None:
    """Send each payment when it is due, stamped with that moment."""
    ids = [json.loads(raw)["transaction_id"] for _, raw in events]
    producer = KafkaProducer(bootstrap_servers=node.servers, linger_ms=2)
    begun = time.time()
    for number, (key, raw) in enumerate(events):
        due = begun + number / rate
        if (ahead := due - time.time()) > 0.001:
            time.sleep(ahead)
        stamp = int(time.time() * 1e3)
        sent[ids[number]] = stamp / 1e3
        producer.send(config.input_topic, raw, key, timestamp_ms=stamp)
    producer.flush(30)
    producer.close(5)


def spread(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most of each figure."""
    return {
        name: {
            "median": round(statistics.median(run[name] for run in runs), 1),
            "min": round(min(run[name] for run in runs), 1),
            "max": round(max(run[name] for run in runs), 1),
        }
        for name in runs[0]
    }


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    console = Console()
    for part, names in (("throughput", THROUGHPUT), ("latency", LATENCY)):
        if not report[part]:
            continue
        table = Table(title=f"{part}: median of {report['runs']} runs, min-max below")
        table.add_column("client, guarantee")
        for name in names:
            table.add_column(name, justify="right")
        for way, found in report[part].items():
            cells = (f"{found[n]['median']:,}\n{found[n]['min']:,}-{found[n]['max']:,}"
                     for n in names)  # fmt: skip
            table.add_row(way, *cells)
        console.print(table)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, default=60_000, help="payments of a throughput run")
    parser.add_argument("--rate", type=float, default=2_000, help="payments/s of a latency run")
    parser.add_argument("--seconds", type=float, default=20, help="length of a latency run")
    parser.add_argument("--warm-up", type=float, default=5, help="seconds left out of it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("throughput", "latency"))
    there = ["kafka-python", *(["confluent"] if find_spec("confluent_kafka") else [])]
    parser.add_argument("--client", nargs="+", default=there, choices=there)
    parser.add_argument("--guarantee", nargs="+", default=GUARANTEES, choices=GUARANTEES)
    parser.add_argument("--plain", action="store_true", help="no audit records")
    parser.add_argument("--bare", action="store_true", help="a bare copy beside it")
    parser.add_argument("--heat", type=float, default=0, help="seconds that the broker warms up")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of [stream]")
    given = parser.parse_args()
    more: Settings = {"audit_topic": None} if given.plain else {}
    more |= dict(pair.split("=", 1) for pair in given.set)
    ways = {
        f"{client}, {guarantee.replace('_', ' ')}": {
            "client": client, "guarantee": guarantee, **more,
        }
        for client in given.client
        for guarantee in given.guarantee
    }  # fmt: skip

    if given.bare:
        ways[BARE] = {"client": "confluent", "guarantee": "exactly_once", **more}
    os.sched_setaffinity(0, {0})
    steady = int(given.rate * given.seconds)
    heat = int(given.heat * given.rate)
    events = list(payments(max(given.events, steady, heat)))
    fast: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    soon: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        node = KafkaNode(find_home(), Path(folder))
        try:
            if heat:
                copied = {"client": "confluent", **more}
                latency(node, events[:heat], copied, bare=True, rate=given.rate, warm_up=0)
            for _ in range(given.runs):
                for name, settings in ways.items():
                    if given.only != "latency":
                        some = events[: given.events]
                        fast[name].append(throughput(node, some, settings, name == BARE))
                    if given.only != "throughput":
                        some, pace = events[:steady], (given.rate, given.warm_up)
                        soon[name].append(latency(node, some, settings, name == BARE, *pace))
        finally:
            node.kill()
    report = {
        "events": given.events,
        "runs": given.runs,
        "throughput": {name: spread(runs) for name, runs in fast.items() if runs},
        "latency": {name: spread(runs) for name, runs in soon.items() if runs},
    }
    if given.json:
        print_json(report)
    else:
        show(report)


if __name__ == "__main__":
    main()
