"""What a server still answers in time when it is offered more than it can do.

    python benchmarks/serving/overload.py --out build/serving/overload.json

Plinth, MOSEC and plain FastAPI on one core each in turn. Own capacity of each, then 0.5, 1, 1.5,
2 and 4 times of it, and right after each overload half of the capacity again, to see how long the
server takes to recover. Under six minutes after the servers are installed; the method is in
docs/serving-comparison.md. ``--json`` prints the figures.

- Each request carries an id of its own, so that no two heads are the same.
- A client waits 20 ms for a free connection, then gives the request up (a pool timeout; Envoy and
  httpx have one): with a queue at the client that lasts as long as its patience, what reaches an
  overloaded server is late before it is sent, and no server can answer it in time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import fraud_mlp
import numpy as np
import servers
from run import (
    GIVE_UP_SECONDS,
    REST_SECONDS,
    Bench,
    Broken,
    facts,
    installed,
)
from servers import HOST

from plinth.engine import PlinthError
from plinth.pipelines.bench.load import Load, LoadResult

MULTIPLES = (0.5, 1.0, 1.5, 2.0, 4.0)
SERVERS = ("plinth", "mosec", "fastapi")
CONNECTIONS = 900
POOL_SECONDS = 0.02
WINDOW = 0.1  # seconds; a server has recovered when all later windows are nearly all in time
NEARLY_ALL = 0.95
TAIL_SECONDS = 1.5


def overload(bench: Bench, rate: float, capacity: float, seconds: float, seed: int) -> LoadResult:
    """Offer a rate, then at once half of the capacity."""
    return Load(
        f"http://{HOST}:{bench.place.port}{bench.server.path}",
        bench.bodies,
        headers={"content-type": "application/json"},
        rate=rate,
        seconds=seconds,
        seed=seed,
        connections=CONNECTIONS,
        timeout=GIVE_UP_SECONDS,
        id_field="x-request-id",
        pool_seconds=POOL_SECONDS,
        tail=(capacity / 2, TAIL_SECONDS),
    ).run()


def recovery(result: LoadResult, sla: float) -> float:
    """Seconds from the end of the overload to the last window that was not nearly all in time."""
    tail = result.due >= result.load.seconds
    due = result.due[tail] - result.load.seconds
    good = in_time(result, sla)[tail]
    last = 0.0
    for begin in np.arange(0.0, TAIL_SECONDS, WINDOW):
        window = (due >= begin) & (due < begin + WINDOW)
        if window.any() and good[window].mean() < NEARLY_ALL:
            last = float(begin + WINDOW)
    return last


def in_time(result: LoadResult, sla: float) -> Any:
    """Which requests were answered with 2xx within the promise."""
    good = (result.statuses >= 200) & (result.statuses < 300)
    return good & (np.nan_to_num(result.latencies, nan=np.inf) <= sla)


def measure(bench: Bench, multiple: float, capacity: float, seconds: float, seed: int) -> Any:
    """One run at a multiple of the capacity, as JSON."""
    before = bench.running.usage().cpu_seconds
    result = overload(bench, multiple * capacity, capacity, seconds, seed)
    spent = bench.running.usage().cpu_seconds - before
    counted = result.due < seconds
    good = in_time(result, bench.sla) & counted
    latencies = result.latencies[good]
    answered = int(np.count_nonzero(result.statuses))
    return {
        "multiple": multiple,
        "offered": int(np.count_nonzero(counted)) / seconds,
        "in_time": int(np.count_nonzero(good)) / seconds,
        "refused": int(np.count_nonzero(np.isin(result.statuses[counted], (429, 503)))) / seconds,
        "p50_ms": float(np.median(latencies)) * 1e3 if len(latencies) else None,
        "p99_ms": float(np.quantile(latencies, 0.99)) * 1e3 if len(latencies) else None,
        "recovery_seconds": recovery(result, bench.sla),
        "cpu_us_per_answer": 1e6 * spent / max(answered, 1),
        "client_lag_p99_ms": float(np.quantile(result.lags, 0.99)) * 1e3,
    }


def visit(entry: dict[str, Any], bench: Bench, round_: int, given: argparse.Namespace) -> None:
    """Start a server, measure it at each multiple, and stop it; adds to its entry."""
    with bench:
        bench.load(200.0, 1.0, seed=0)
        if "capacity" not in entry:
            entry["capacity"] = bench.capacity()
        for multiple in given.multiples:
            time.sleep(REST_SECONDS)
            run = measure(bench, multiple, entry["capacity"], given.seconds, given.seed + round_)
            entry["runs"].append({"round": round_, "load_average": os.getloadavg()[0], **run})
            print(
                f"{bench.server.name} {multiple:g}x: {run['in_time']:.0f} in time/s of "
                f"{run['offered']:.0f}/s, recovered after {run['recovery_seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(GIVE_UP_SECONDS)
        bench.check()


def table(results: dict[str, Any]) -> str:
    """Markdown: answers in time per second, and as a share of the capacity; seconds to recover."""
    multiples = results["settings"]["multiples"]
    lines = [
        "| server | capacity /s | " + " | ".join(f"in time /s at {m:g}×" for m in multiples) + " |",
        "| --- " + "| ---: " * (1 + len(multiples)) + "|",
    ]
    for name, entry in results["servers"].items():
        if not entry["runs"]:
            continue
        cells = []
        for multiple in multiples:
            runs = [run for run in entry["runs"] if run["multiple"] == multiple]
            good = median(run["in_time"] for run in runs)
            slow = max(run["recovery_seconds"] for run in runs)
            share = good / entry["capacity"]
            cells.append(f"{good:.0f} ({share:.0%}, {slow:.1f} s)")
        lines.append(f"| {name} | {entry['capacity']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Install, measure in rounds, write the results, print the table."""
    cores = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each run")
    parser.add_argument("--out", type=Path, default=servers.BUILD / "overload.json")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--multiples", nargs="+", type=float, default=list(MULTIPLES))
    parser.add_argument("--sla-ms", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-cores", type=cores, default=[0], metavar="0")
    parser.add_argument("--client-cores", type=cores, default=[1], metavar="1")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chosen = [server for server in servers.SERVERS if server.name in given.servers]
    fraud_mlp.make(servers.WEIGHTS)
    entries = installed(chosen)
    results = {**facts(given), "servers": entries}
    if given.client_cores:
        os.sched_setaffinity(0, given.client_cores)
    for round_ in range(given.rounds):
        order = [server for server in chosen if "version" in entries[server.name]]
        random.Random(given.seed + round_).shuffle(order)
        for server in order:
            entry = entries[server.name]
            try:
                visit(entry, Bench(server, given, chosen.index(server)), round_, given)
            except (Broken, PlinthError) as error:
                entry["failures"].append(f"round {round_ + 1}: {error}")
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results) if given.json else table(results))
    for name, entry in entries.items():
        for failure in entry["failures"]:
            print(f"{name}: {failure}")


if __name__ == "__main__":
    main()
