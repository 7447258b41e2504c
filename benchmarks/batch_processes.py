"""CT studies per hour of ``plinth batch medical`` by worker processes, and what each takes.

    python benchmarks/batch_processes.py [--studies 16] [--processes 0 1 2] [--repeats 1]
        [--one-core] [--ceiling] [--json]

Studies are chest phantoms as DICOM CT, each of its own. Every run is a ``plinth batch`` of its own;
its seconds are those of its summary, the start of the processes included. CPU is that of the whole
tree; memory is the largest proportional set size (PSS) seen of the command, and of a worker.
``whole`` is the time of the whole command, imports and the end of all processes included.
``steady`` counts from the end of the first study of each process to the end of the last: what a
night of many studies runs at, without the start.
With ``--one-core`` there is a run without worker processes on one core (Linux), first in each turn:
what the others are to be so many times as fast as. With ``--ceiling`` there is also what the
machine itself gives: a run of that kind on each core at once, which share nothing (steady: from
the last of their first studies to the first of their last), and loops of arithmetic that stay in
the cache of their core, one alone and one on each core at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from plinth.engine.lanes.fork_server import NAME as WORKER  # noqa: E402
from plinth.verticals.medical.phantom.chest import Phantom  # noqa: E402
from plinth.verticals.medical.phantom.dicom import write_series  # noqa: E402

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


ONE_CORE = -1
"""In the place of a number of processes: none, on one core."""
LOOP = """
import time, numpy
rows = numpy.random.default_rng(0).random((96, 96), numpy.float32)
def run(until, turns=0):
    while time.time() < until:
        for _ in range(20):
            rows @ rows
        turns += 1
    return turns
run(float({begin}))
print(run(float({begin}) + {seconds}))
"""
"""Products of matrices of 37 kB, for so many seconds from a time on; prints how many, by twenty."""
LOOP_SECONDS = 4.0


def measure(folder: Path, processes: int) -> dict[str, Any]:
    """One batch over all studies, watched."""
    cores = sorted(os.sched_getaffinity(0))
    taskset = ["taskset", "--cpu-list", str(cores[0])] if processes == ONE_CORE else []
    with tempfile.TemporaryDirectory() as out:
        command = [
            *taskset,
            sys.executable,
            "-m",
            "plinth",
            "batch",
            "medical",
            str(folder),
            "--out",
            out,
        ]
        command += ["--processes", str(max(0, processes)), "--json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | ONE_THREAD
        )
        begun = time.perf_counter()
        seen = Watch(psutil.Process(process.pid))
        with seen:
            told, errors = process.communicate()
        whole = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(errors.decode())
        summary = json.loads(told)
        ends = sorted(each.stat().st_mtime for each in Path(out).glob("*/report.json"))
    first = max(1, processes) - 1
    steady = (len(ends) - 1 - first) / (ends[-1] - ends[first])
    return {
        "processes": processes,
        "studies_per_hour": 3600 * summary["done"] / summary["seconds"],
        "studies_per_hour_whole": 3600 * summary["done"] / whole,
        "studies_per_hour_steady": 3600 * steady,
        "cpu_seconds_per_study": sum(seen.cpu.values()) / summary["done"],
        "command_mb": seen.command / 1e6,
        "worker_mb": seen.worker / 1e6,
    }


def side_by_side(folder: Path) -> dict[str, float]:
    """Two runs on a core of their own each, of half the studies: per hour of both, and CPU seconds.

    Counted between the last of their first studies and the first of their last, while both work.
    """
    studies = sorted(folder.iterdir())
    cores = sorted(os.sched_getaffinity(0))[:2]
    spent = _children_cpu()
    with tempfile.TemporaryDirectory() as place:
        running = []
        for number, core in enumerate(cores):
            own, out = Path(place) / f"in-{number}", Path(place) / f"out-{number}"
            own.mkdir()
            for study in studies[number::2]:
                (own / study.name).symlink_to(study)
            command = ["taskset", "--cpu-list", str(core), sys.executable, "-m", "plinth", "batch"]
            command += ["medical", str(own), "--out", str(out), "--processes", "0"]
            running.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=os.environ | ONE_THREAD,
                )
            )
        for process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(errors.decode())
        ends = [
            sorted(each.stat().st_mtime for each in Path(place).glob(f"out-{number}/*/report.json"))
            for number in range(len(cores))
        ]
    first, last = max(own[0] for own in ends), min(own[-1] for own in ends)
    if first >= last:
        raise SystemExit("the two runs were not at work together: use more --studies")
    done = sum(_done(own, first, last) for own in ends)
    return {
        "studies_per_hour_steady": 3600 * done / (last - first),
        "cpu_seconds_per_study": (_children_cpu() - spent) / len(studies),
    }


def _children_cpu() -> float:
    """CPU seconds of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _done(ends: list[float], first: float, last: float) -> float:
    """Studies of a run that were done between two times, the begun ones in part."""
    return float(np.interp(last, ends, range(len(ends))) - np.interp(first, ends, range(len(ends))))


def loops(cores: list[int]) -> float:
    """Turns of the loop per second, of one on each core at once."""
    begin = time.time() + 2.0
    code = LOOP.format(begin=begin, seconds=LOOP_SECONDS)
    running = [
        subprocess.Popen(
            ["taskset", "--cpu-list", str(core), sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
        )
        for core in cores
    ]
    return sum(int(each.communicate()[0]) for each in running) / LOOP_SECONDS


def ceiling(folder: Path) -> dict[str, float]:
    """What the machine gives to two runs that share nothing."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    alone = loops(cores[:1])
    return side_by_side(folder) | {"loops_alone": alone, "loops_together": loops(cores)}


class Watch:
    """CPU seconds by process, and the largest PSS of the command and of a worker, bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.cpu: dict[int, float] = {}
        self.command = self.worker = 0
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(psutil.Error):
                self.command = max(self.command, self._look(self._process))
                for child in self._process.children(recursive=True):
                    size = self._look(child)
                    if child.name() == WORKER:
                        self.worker = max(self.worker, size)

    def _look(self, process: psutil.Process) -> int:
        self.cpu[process.pid] = sum(process.cpu_times()[:2])
        return int(process.memory_full_info().pss)


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--studies", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=1, help="of each, in turns")
    parser.add_argument("--one-core", action="store_true", help="also without processes, on one")
    parser.add_argument("--ceiling", action="store_true", help="also what the machine gives")
    given = parser.parse_args()
    given.one_core |= given.ceiling
    arms = [ONE_CORE] * given.one_core + given.processes
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.studies):
            write_series(Phantom(seed=seed), Path(folder) / f"study-{seed}")
        runs, ceilings = list[dict[str, Any]](), list[dict[str, float]]()
        for _ in range(given.repeats):
            runs += [measure(Path(folder), n) for n in arms]
            ceilings += [ceiling(Path(folder))] if given.ceiling else []
    if given.json:
        print_json({"runs": runs, "ceilings": ceilings})
        return
    table = Table(
        *("processes", "studies/h", "of the first", "whole", "steady", "of the first"),
        *("CPU s a study", "command, MB", "worker, MB"),
    )

    def share(own: list[dict[str, Any]], name: str) -> str:
        base = [run[name] for run in runs if run["processes"] == arms[0]]
        return f"{statistics.median(run[name] for run in own) / statistics.median(base):.2f}"

    for number in arms:
        own = [run for run in runs if run["processes"] == number]
        names = (
            "studies_per_hour",
            "studies_per_hour_whole",
            "studies_per_hour_steady",
            "cpu_seconds_per_study",
            "command_mb",
            "worker_mb",
        )
        cells = [f"{statistics.median(run[name] for run in own):,.1f}" for name in names]
        name = "0, one core" if number == ONE_CORE else str(number)
        whole, steady, *others = cells[1:]
        shares = share(own, "studies_per_hour"), share(own, "studies_per_hour_steady")
        table.add_row(name, cells[0], shares[0], whole, steady, shares[1], *others)
    console = Console(width=100)
    console.print(table)
    for found in ceilings:
        base = statistics.median(
            run["studies_per_hour_steady"] for run in runs if run["processes"] == ONE_CORE
        )
        apart, both = found["studies_per_hour_steady"], found["loops_together"]
        console.print(
            f"two runs that share nothing: {apart:,.0f} steady, {apart / base:.2f} of one core, "
            f"{found['cpu_seconds_per_study']:.1f} CPU s a study; "
            f"two loops: {both / found['loops_alone']:.2f} of one"
        )


if __name__ == "__main__":
    main()
