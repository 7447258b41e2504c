"""Whether a stream's decisions are the same bits for any number of workers, and again from the log.

    python benchmarks/stream_equality.py [--payments 100000] [--workers 1 2 4 8] [--grown 20000]
        [--max-records 512] [--disk] [--seed 1] [--backend eager] [--json]

Payments, a part of them late or repeated, and labels are written to a real Kafka (KAFKA_HOME, else
../shared/kafka), keyed so that whatever shares a card, customer, terminal or device meets in one of
eight partitions. Each number of workers (``plinth stream finance``, ``colocated = true``) answers
the same log as a group of its own, while its workers join one after the other; every answer is
compared, as bytes, with that of the first group. ``plinth stream finance --replay '*'`` makes those
of the last group again. Then the input gets four partitions more, ``--grown`` payments more, and
the groups go on. With ``--disk`` all but the first group keep their state on disk and next to
nothing of it in memory. Exit code 1 if an answer without ``features_partial`` differs, if any
before the growth has that flag, or if one made again differs.
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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from kafka import KafkaProducer  # noqa: E402
from kafka.admin import KafkaAdminClient  # noqa: E402
from kafka_node import KafkaNode, find_home  # noqa: E402

from plinth.pipelines.stream.kafka_clients import prepare  # noqa: E402
from plinth.pipelines.stream.settings import StreamConfig  # noqa: E402

REGIONS = 64
IN_MEMORY = 200
"""Cards, terminals, customers and devices in memory, of a worker whose state is on disk."""
DAY = 86_400
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def moment(seconds: float) -> str:
    """RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def records(count: int, name: str, seed: int, first: float, last: float) -> Iterator[Any]:
    """Key and JSON of payments and of labels on a fiftieth of them, a week later."""
    dice = random.Random(seed)
    made: list[tuple[bytes, bytes]] = []
    due: list[tuple[float, bytes, bytes]] = []
    for n in range(count):
        at = first + (last - first) * n / count
        while due and due[0][0] <= at:
            yield due.pop(0)[1:]
        region = dice.randrange(REGIONS)
        card = dice.randrange(40)
        late = dice.randrange(5 * DAY) if dice.random() < 0.05 else 0
        record = {
            "transaction_id": f"{name}{n}",
            "event_time": moment(at - late),
            "amount": round(dice.uniform(1, 200) * (60 if dice.random() < 0.02 else 1), 2),
            "currency": "EUR",
            "card": f"tok_{region}_{card}",
            "customer_id": f"c{region}_{card // 2}",
            "terminal_id": f"t{region}_{dice.randrange(20)}",
            "device_id": f"d{region}_{dice.randrange(30)}",
        }
        made.append((f"r{region}".encode(), json.dumps(record).encode()))
        yield made[-1]
        if dice.random() < 0.01:
            yield made[-1 - dice.randrange(min(len(made), 500))]
        if dice.random() < 0.02:
            names = ("transaction_id", "terminal_id", "event_time", "card")
            told = {field: record[field] for field in names}
            told |= {"fraud": True, "label_time": moment(at + 7 * DAY)}
            due.append((at + 7 * DAY, made[-1][0], json.dumps(told).encode()))


def write(config: StreamConfig, pairs: Iterator[Any]) -> int:
    """Append records; how many."""
    servers = config.bootstrap_servers.split(",")
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=20, batch_size=200_000)
    with contextlib.closing(producer):
        sent = [producer.send(config.input_topic, value, key) for key, value in pairs]
        for future in sent:
            future.get(120)
    return len(sent)


def command(config: StreamConfig, backend: str, *more: str) -> subprocess.Popen[str]:
    """``plinth stream finance`` on input that is said to be colocated."""
    told = config.model_dump(mode="json", exclude_unset=True)
    settings = {f"PLINTH_STREAM__{k.upper()}": str(v) for k, v in told.items() if v is not None}
    settings["PLINTH_VERTICALS__FINANCE__COLOCATED"] = "true"
    if config.state_store == "disk":
        for table in ("CARDS", "TERMINALS", "CUSTOMERS", "DEVICES"):
            settings[f"PLINTH_VERTICALS__FINANCE__MAX_{table}"] = str(IN_MEMORY)
    settings["PLINTH_ENGINE__BACKEND"] = backend  # the fastest may be another in each process
    return subprocess.Popen(
        [sys.executable, "-m", "plinth", "stream", "finance", *more],
        env={**os.environ, **SINGLE, **settings, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def answer(config: StreamConfig, workers: int, disk: Path | None, backend: str) -> float:
    """Let so many workers answer what is there, until nothing comes; seconds."""
    began = time.monotonic()
    configs = [config] * workers
    if disk is not None:
        kept = {"state_store": "disk", "snapshot_interval_s": 1.0}
        configs = [
            config.model_copy(update=kept | {"state_dir": disk / f"{config.group}-{number}"})
            for number in range(workers)
        ]
    running = [command(one, backend, "--json") for one in configs]
    try:
        for one in running:
            out, _ = one.communicate(timeout=1_800)
            if one.returncode:
                raise RuntimeError(f"a worker ended with {one.returncode}:\n{out[-2_000:]}")
    finally:
        for one in running:
            one.kill()
    return time.monotonic() - began


def answers(node: KafkaNode, config: StreamConfig) -> dict[str, bytes]:
    """The committed answers by the record that they answer."""
    found: dict[str, bytes] = {}
    for record in node.read(config.output_topic, 600):
        where = dict(record.headers)["plinth_position"].decode().partition(";")[0]
        if where in found:
            raise RuntimeError(f"{where} was answered twice")
        found[where] = record.value
    return found


def compare(groups: dict[int, dict[str, bytes]], already: int) -> dict[str, Any]:
    """How the answers of each group differ from those of the first."""
    first = next(iter(groups.values()))
    report: dict[str, Any] = {"answers": len(first) - already}
    for workers, found in groups.items():
        partial = {name for name, value in found.items() if b'"features_partial":true' in value}
        other = {name for name in first.keys() | found.keys() if first.get(name) != found.get(name)}
        for name in sorted(other - partial)[:1]:
            print(first.get(name), found.get(name), sep="\n", file=sys.stderr)
        report[f"{workers} workers"] = {
            "flagged": len(partial),
            "differ": len(other),
            "differ_without_flag": len(other - partial),
        }
    return report


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; the report."""
    node = KafkaNode(find_home(), folder)
    try:
        base = node.config(partitions=8, max_records=given.max_records, idle_exit_s=6.0)
        prepare(base)
        now = time.time()
        written = write(
            base, records(given.payments, "x", given.seed, now - 60 * DAY, now - 2 * DAY)
        )
        configs = {
            n: base.model_copy(
                update={"group": f"g{n}", "output_topic": f"{base.output_topic}-{n}"}
            )
            for n in given.workers
        }
        report: dict[str, Any] = {"records": written}
        seconds = {}
        for n, config in configs.items():
            disk = folder if given.disk and n != given.workers[0] else None
            seconds[n] = round(answer(config, n, disk, given.backend), 1)
            print(f"{n} workers: {seconds[n]} s", file=sys.stderr, flush=True)
        before = {n: answers(node, config) for n, config in configs.items()}
        report["seconds"] = seconds
        report["before growth"] = compare(before, 0)
        began = time.monotonic()
        replay = command(configs[given.workers[-1]], given.backend, "--replay", "*")
        told, _ = replay.communicate(timeout=3_600)
        report["replay"] = {
            "said": told.strip().splitlines()[-1 if replay.returncode == 0 else -3 :],
            "exit_code": replay.returncode,
            "seconds": round(time.monotonic() - began, 1),
        }
        if given.grown:
            servers = base.bootstrap_servers.split(",")
            with contextlib.closing(KafkaAdminClient(bootstrap_servers=servers)) as admin:
                admin.create_partitions({base.input_topic: 12})
            write(base, records(given.grown, "y", given.seed + 1, now - 2 * DAY, now))
            for n, config in configs.items():
                disk = folder if given.disk and n != given.workers[0] else None
                answer(config, n, disk, given.backend)
            after = {n: answers(node, config) for n, config in configs.items()}
            report["with growth"] = compare(after, len(next(iter(before.values()))))
        return report
    finally:
        node.kill()


def main() -> None:
    """Run and judge."""
    parser = parser_of(__doc__)
    parser.add_argument("--payments", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--grown", type=int, default=20_000, help="payments after the growth")
    parser.add_argument("--backend", default="eager", help="of the engine, in every process")
    parser.add_argument("--seed", type=int, default=1, help="of the payments")
    parser.add_argument("--max-records", type=int, default=512, help="in one transaction")
    parser.add_argument(
        "--disk", action="store_true", help="all but the first keep their state on disk"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(given, Path(folder))
    groups = [
        group
        for part in ("before growth", "with growth")
        for name, group in report.get(part, {}).items()
        if name != "answers"
    ]
    flagged = sum(group["flagged"] for group in groups[: len(given.workers)])
    wrong = sum(group["differ_without_flag"] for group in groups)
    report["ok"] = not flagged and not wrong and report["replay"]["exit_code"] == 0
    if given.json:
        print_json(report)
    else:
        print(json.dumps(report, indent=2))
    raise SystemExit(0 if report["ok"] else 1)


if __name__ == "__main__":
    main()
