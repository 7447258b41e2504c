"""What an idle server costs: CPU as a share of one core, and how often it wakes.

    python benchmarks/idle_cpu.py [--seconds 30] [--json]

Starts a real ``plinth serve finance medical``, waits until it is ready and has settled, and
watches its process do nothing. Then it scores payments and analyses one CT study, settles, and is
watched again. CPU is that of all its threads; a wake-up is a thread that ran after it had waited
(voluntary context switches, Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from head import parser_of, print_json
from http_latency import measure, requests_of, serving
from mixed_device import ask, study_zip
from rich.console import Console
from rich.table import Table

WINDOWS = 3  # stretches of equal length that a watch is cut into, for the spread
CLEAN = 0.05  # seconds of CPU in two seconds, below which a server has settled


def wake_ups(server: psutil.Process) -> int | None:
    """Voluntary context switches of all threads so far; ``None`` where nobody counts them."""
    found = 0
    try:
        for thread in Path(f"/proc/{server.pid}/task").iterdir():
            for line in (thread / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    found += int(line.split()[1])
    except OSError:
        return None
    return found


def seconds_of(server: psutil.Process) -> float:
    """CPU seconds of all its threads so far."""
    return sum(server.cpu_times()[:2])


def settle(server: psutil.Process, patience: float = 60.0) -> None:
    """Wait until it has nothing left to do."""
    pause, until = threading.Event(), time.monotonic() + patience
    before = seconds_of(server)
    while time.monotonic() < until:
        pause.wait(2.0)
        before, now = seconds_of(server), before
        if before - now < CLEAN:
            return
    raise SystemExit(f"the server did not come to rest within {patience:g} s")


def watch(server: psutil.Process, seconds: float) -> dict[str, Any]:
    """Per cent of a core over a while: the whole, the least and the most of its parts."""
    pause, shares = threading.Event(), []
    woken, begun, spent = wake_ups(server), time.perf_counter(), seconds_of(server)
    for _ in range(WINDOWS):
        start, cpu = time.perf_counter(), seconds_of(server)
        pause.wait(seconds / WINDOWS)
        shares.append(100 * (seconds_of(server) - cpu) / (time.perf_counter() - start))
    whole = time.perf_counter() - begun
    after = wake_ups(server)
    return {
        "seconds": round(whole, 2),
        "cpu_seconds": round(seconds_of(server) - spent, 3),
        "core_percent": round(100 * (seconds_of(server) - spent) / whole, 3),
        "core_percent_median": round(statistics.median(shares), 3),
        "core_percent_range": [round(min(shares), 3), round(max(shares), 3)],
        "wake_ups_per_second": None
        if woken is None or after is None
        else round((after - woken) / whole, 1),
        "threads": server.num_threads(),
    }


def load(url: str, payments: int) -> dict[str, Any]:
    """Score payments over eight connections, and analyse one CT study."""
    seen = measure(url, requests_of(url, "finance", None), 8, 0, payments)
    pause = threading.Event()
    with ask(f"{url}/v1/medical/analyse", study_zip()) as answer:
        job = json.load(answer)
    while job["state"] not in ("done", "failed"):
        pause.wait(0.25)
        with ask(f"{url}{job['url']}") as answer:
            job = json.load(answer)
    if job["state"] == "failed":
        raise SystemExit(f"the study failed: {job['error']['message']}")
    return {"payments": seen.statuses, "study": job["state"]}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Start, watch, load, watch; the result as JSON-ready data."""
    with serving("finance medical", None) as (url, server):
        settle(server)
        fresh = watch(server, given.seconds)
        served = load(url, given.payments)
        settle(server)
        used = watch(server, given.seconds)
    return {"fresh": fresh, "served": served, "after_load": used}


def show(result: dict[str, Any]) -> None:
    """Print a line for each watch."""
    table = Table(
        *("idle", "for, s", "CPU, s", "% of a core", "median (range) of 3 parts"),
        *("wake-ups /s", "threads"),
        title="plinth serve finance medical, doing nothing",
    )
    for name, title in (("fresh", "when ready"), ("after_load", "after load")):
        seen = result[name]
        low, high = seen["core_percent_range"]
        table.add_row(
            *(title, f"{seen['seconds']:g}", f"{seen['cpu_seconds']:.2f}"),
            *(
                f"{seen['core_percent']:.2f}",
                f"{seen['core_percent_median']:.2f} ({low} to {high})",
            ),
            *(f"{seen['wake_ups_per_second']}", f"{seen['threads']}"),
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each watch")
    parser.add_argument("--payments", type=int, default=2000, help="scored between them")
    given = parser.parse_args()
    result = run(given)
    if given.json:
        print_json(result)
        return
    show(result)


if __name__ == "__main__":
    main()
