"""What one payment costs in the fraud vertical, stage by stage, on one core.

    python benchmarks/fraud_features.py [--events 20000] [--history 200000] [--json]

Simulated payments. The history is observed first, so that windows are full; then the next events
go through what a door calls: parse, the flow's own steps, encode, key. The model runs on one
thread between the steps. Times are CPU microseconds per event; the best of ``--runs`` passes over
different events. The lone request is the wall time of all stages but the model.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from head import parser_of, print_json

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from rich.console import Console
from rich.table import Table

from plinth.engine import Call
from plinth.verticals.finance import FraudScoring
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json

CHUNKS = (1, 16, 128)
STAGES = ("parse", "features", "model", "decide", "encode", "key")
OWN = tuple(stage for stage in STAGES if stage != "model")
CUSTOMERS = 5_000


@dataclass(slots=True)
class Spent:
    """CPU nanoseconds by stage, and wall nanoseconds of the vertical's own part per chunk."""

    stages: Counter[str] = field(default_factory=Counter)
    walls: list[int] = field(default_factory=list)


def payments(count: int) -> list[bytes]:
    """Transactions of the simulator as JSON, in order of event time."""
    days = 2 + count // (2 * CUSTOMERS * 9 // 10)
    people = Population(customers=CUSTOMERS, terminals=2 * CUSTOMERS, days=days)
    table = simulate(people, seed=1)
    if len(table) < count:
        raise SystemExit(f"{len(table)} events were simulated, {count} are needed")
    return list(transactions_json(table[:count]))


def score(vertical: FraudScoring, models: dict[str, torch.nn.Module], raws: Sequence[bytes]) -> Any:
    """One chunk through every stage; returns nanoseconds by stage and the wall of its own part."""
    spent = Counter[str]()
    cpu, wall = time.process_time_ns, time.perf_counter_ns
    begun, mark, away = wall(), cpu(), 0

    def lap(stage: str) -> None:
        nonlocal mark
        now = cpu()
        spent[stage] += now - mark
        mark = now

    requests = [vertical.parse(raw) for raw in raws]
    lap("parse")
    flow = vertical.infer(requests)
    call = next(flow)
    lap("features")
    results: Any = None
    while results is None:
        assert isinstance(call, Call)
        left = wall()
        with torch.inference_mode():
            output = models[call.model](call.rows)
        away += wall() - left
        lap("model")
        try:
            call = flow.send(output)
        except StopIteration as end:
            results = end.value
        lap("decide")
    for result in results:
        vertical.encode(result)
    lap("encode")
    for request in requests:
        vertical.key(request)
    lap("key")
    return spent, wall() - begun - away


def measure(vertical: FraudScoring, raws: Sequence[bytes], chunk: int) -> Spent:
    """All events in chunks."""
    models = {model.spec.name: model.module for model in vertical.models()}
    spent = Spent()
    gc.collect()
    for start in range(0, len(raws), chunk):
        stages, own = score(vertical, models, raws[start : start + chunk])
        spent.stages.update(stages)
        spent.walls.append(own)
    return spent


def report(raws: list[bytes], history: int, runs: int) -> dict[str, Any]:
    """Microseconds per event by chunk size and stage."""
    vertical = FraudScoring()
    state = remember(vertical, raws[:history])
    each = (len(raws) - history) // (runs * len(CHUNKS))
    found: dict[str, Any] = {}
    at = history
    for chunk in CHUNKS:
        passes = []
        for _ in range(runs):
            passes.append(measure(vertical, raws[at : at + each], chunk))
            at += each
        best = min(passes, key=lambda spent: sum(spent.stages[stage] for stage in OWN))
        us = {stage: round(best.stages[stage] / each / 1e3, 2) for stage in STAGES}
        us["vertical"] = round(sum(best.stages[stage] for stage in OWN) / each / 1e3, 2)
        us["total"] = round(sum(best.stages.values()) / each / 1e3, 2)
        found[str(chunk)] = us
        if chunk == 1:
            cuts = statistics.quantiles(best.walls, n=100)
            found["lone_request_us"] = {
                "p50": round(cuts[49] / 1e3, 1),
                "p99": round(cuts[98] / 1e3, 1),
            }
    return {
        "history": history,
        "state": state,
        "events_per_pass": each,
        "runs": runs,
        "us_per_event": found,
    }


def remember(vertical: FraudScoring, raws: list[bytes]) -> dict[str, float]:
    """Observe the history; what its state costs in memory, as a snapshot, and in seconds."""
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    for start in range(0, len(raws), 4096):
        vertical.observe([vertical.parse(raw) for raw in raws[start : start + 4096]])
    gc.collect()
    grown = process.memory_info().rss - before
    entries = vertical.state.cards.entries
    begun = time.process_time()
    kept = vertical.snapshot()
    saved = time.process_time()
    FraudScoring().restore(kept)
    return {
        "card_events": entries,
        "memory_bytes_per_event": round(grown / entries, 1),
        "snapshot_bytes_per_event": round(len(kept) / entries, 1),
        "snapshot_bytes": len(kept),
        "snapshot_s": round(saved - begun, 3),
        "restore_s": round(time.process_time() - saved, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, default=20_000, help="per chunk size")
    parser.add_argument("--history", type=int, default=200_000, help="observed before")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    raws = payments(given.history + given.events * len(CHUNKS))
    found = report(raws, given.history, given.runs)
    if given.json:
        print_json(found)
        return
    lone = found["us_per_event"].pop("lone_request_us")
    table = Table(title="CPU microseconds per event")
    for head in ("stage", *(f"chunks of {chunk}" for chunk in CHUNKS)):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for stage in (*STAGES, "vertical", "total"):
        table.add_row(
            stage, *(f"{found['us_per_event'][str(chunk)][stage]:.1f}" for chunk in CHUNKS)
        )
    console = Console()
    console.print(table)
    console.print(f"lone request without the model: p50 {lone['p50']} us, p99 {lone['p99']} us")
    console.print(", ".join(f"{name} {value:,}" for name, value in found["state"].items()))


if __name__ == "__main__":
    main()
