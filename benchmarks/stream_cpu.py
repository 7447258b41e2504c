"""CPU of a payment in ``plinth stream finance`` without Kafka, by part.

    python benchmarks/stream_cpu.py [--events 20000] [--chunk 512] [--beside OTHER/src --turns 5]

Simulated payments go in chunks through what the worker does with them: parsing, features, model,
decisions, reasons, answers and audit records; the first half warms up. Nothing is read or written,
so what a worker takes more is the client's. The digest is of all answers and audit records: two
versions that work alike have the same. ``--beside``: another checkout takes turns with this one,
each turn in a process of its own; the ratio is of the medians.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("parse", "features", "written", "audit")
SINGLE = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Record(NamedTuple):
    """A payment as a client gives it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes
    value: bytes
    headers: tuple[()] = ()


def once(events: int, size: int) -> dict[str, Any]:
    """Microseconds of CPU a payment, of the process and of parts of the worker's thread."""
    from plinth.pipelines import assembly
    from plinth.pipelines.config.settings import Config
    from plinth.pipelines.interpreter import STREAM_THRESHOLDS, set_for_serving
    from plinth.pipelines.stream import audit, processor
    from plinth.pipelines.stream.chunks import Chunk, Partition
    from plinth.verticals.finance import FraudScoring, FraudSettings
    from plinth.verticals.finance.features.online import FeatureState
    from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json

    people = Population(customers=5_000, terminals=10_000, days=2 + events // 5_000)
    made = islice(transactions_json(simulate(people, seed=1)), events)
    records = [
        Record("t", n % 4, n // 4, 1_700_000_000_000 + n, json.loads(raw)["card"].encode(), raw)
        for n, raw in enumerate(made)
    ]
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(kind: Any, method: str, part: str) -> None:
        plain = getattr(kind, method)

        def measured(*args: Any, **named: Any) -> Any:
            began = time.thread_time()
            found = plain(*args, **named)
            spent[part] += time.thread_time() - began
            return found

        setattr(kind, method, measured)

    timed(processor.Processor, "_parse", "parse")
    timed(FeatureState, "update", "features")
    if find_spec("plinth.verticals.finance.decided") is not None:  # older checkouts lack it
        timed(import_module("plinth.verticals.finance.decided").Decided, "written", "written")
    timed(audit.AuditTrail, "add", "audit")
    audit.time = type("Fixed", (), {"time": staticmethod(lambda: 1.8e9)})  # type: ignore[assignment, attr-defined]
    rows = getattr(assembly, "STREAM_ROWS", None)  # older checkouts lack it
    given = {} if rows is None else {"rows": rows}
    vertical = FraudScoring(FraudSettings(max_ahead_seconds=None))
    vertical.audited = True
    digest, whole, thread, counted = hashlib.sha256(), 0.0, 0.0, 0
    with (
        assembly.running(Config(), {"finance": vertical}, follow=False, **given) as engine,
        set_for_serving(STREAM_THRESHOLDS),
    ):
        steps = processor.Processor(vertical, engine, stateful=True, sla=vertical.sla)
        trail = audit.AuditTrail("finance", None)
        for first in range(0, len(records), size):
            if first == len(records) // 2 // size * size:
                whole = thread = 0.0
                counted, spent = 0, dict.fromkeys(PARTS, 0.0)
            part = records[first : first + size]
            places = {Partition("t", number): 0 for number in range(4)}
            began = time.process_time(), time.thread_time()
            outputs = drain(steps.process(Chunk(list(part), places, places)))
            trail.add(outputs)
            whole += time.process_time() - began[0]
            thread += time.thread_time() - began[1]
            counted += len(part)
            for message in outputs.messages:
                digest.update(message.value)
            for _, raw in outputs.audit:
                digest.update(raw)
    each = {"process": whole, "thread": thread, **spent}
    told = {name: round(seconds / counted * 1e6, 2) for name, seconds in each.items()}
    return told | {"digest": digest.hexdigest()[:16]}


def drain(steps: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def turn(source: Path, events: int, size: int) -> dict[str, Any]:
    """One measurement of a checkout, in a process of its own."""
    made = subprocess.run(
        [sys.executable, __file__, "--events", str(events), "--chunk", str(size), "--json"],
        env={**os.environ, **SINGLE, "PYTHONPATH": str(source)},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(made.stdout)["results"]
    return found


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--chunk", type=int, default=512, help="payments of a chunk")
    parser.add_argument("--beside", type=Path, help="folder src of another checkout")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    if given.beside is None:
        print_json(once(given.events, given.chunk))
        return
    runs: dict[str, list[dict[str, Any]]] = {"here": [], "beside": []}
    for _ in range(given.turns):
        for name, source in (("here", ROOT / "src"), ("beside", given.beside)):
            runs[name].append(turn(source, given.events, given.chunk))
    report: dict[str, Any] = {
        name: {
            part: statistics.median(run[part] for run in found)
            for part in ("process", "thread", *PARTS)
        } | {"digests": sorted({run["digest"] for run in found})}
        for name, found in runs.items()
    }  # fmt: skip
    for part in ("process", "thread"):
        report[f"{part}_ratio"] = round(report["here"][part] / report["beside"][part], 3)
    print_json(report)


if __name__ == "__main__":
    main()
