"""How long one chest CT takes from folder to report, stage by stage, and how much memory.

    python benchmarks/ct_analysis.py [--slices 200] [--runs 3] [--threads 1] [--lanes 1] [--json]
    python benchmarks/ct_analysis.py --no-nodules [--threads 2] [--json]

The chest phantom is written as uncompressed DICOM CT once; each run reads and analyses it in a
process of its own on as many CPUs as threads, with the packaged weights and the engine's backend
and precision ``auto``, and then a second time, when all is loaded. Times are wall
seconds, and CPU seconds of the whole, the median of the runs; the latter are what one free core
would take where other work is on the machine. Memory is the largest resident memory of the process
up to the end of a stage; ``import`` is what it holds before it reads anything, ``engine`` when the
model is loaded. The page cache is warm. ``--no-nodules`` leaves the network out, as the settings do
by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

STAGES = (
    "import",
    "discover",
    "load",
    "rules",
    "resample",
    "network",
    "nodules",
    "measure",
    "outputs",
)
EXTENT = (348.0, 348.0, 208.0)


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def analyse(given: argparse.Namespace) -> dict[str, Any]:
    """Analyse the one series below a folder, twice; seconds and memory by stage of the first."""
    folder, threads = given.study, given.threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from plinth.pipelines.interpreter import frozen, one_heap

    one_heap()
    import torch

    from plinth.engine import Engine, InputError
    from plinth.verticals.medical.vertical import CtAnalysis, CtSettings

    torch.set_num_threads(threads)
    seconds, memory = {"import": 0.0}, {"import": peak_mb()}
    cpu: dict[str, float] = {}

    def mark(stage: str, since: float) -> float:
        now = time.perf_counter()
        seconds[stage], memory[stage] = now - since, peak_mb()
        cpu[stage] = time.process_time() - cpu_begun - sum(cpu.values())
        return now

    vertical = CtAnalysis(CtSettings(nodules=given.nodules))
    with (
        contextlib.ExitStack() as held,
        Engine(
            threads=threads // given.lanes,
            devices=["cpu"] * given.lanes,
            backend=given.backend,
            precision=given.precision,
        ) as engine,
    ):
        for model in vertical.models():
            engine.add(model, batch_range=(1, given.rows))
        memory["engine"] = peak_mb()
        held.enter_context(frozen())
        begun = now = time.perf_counter()
        cpu_begun = time.process_time()
        (item,) = vertical.discover(folder)
        now = mark("discover", now)
        request = vertical.load(item)
        now = mark("load", now)
        answer = engine.run(vertical.infer([request]))
        result = answer.value[0]
        if isinstance(result, InputError):
            raise SystemExit(str(result))
        report = result.response
        now = mark("infer", now)
        with tempfile.TemporaryDirectory() as out:
            files = vertical.write(result, Path(out))
            sizes = {path.name: path.stat().st_size for path in files}
        mark("outputs", now)
        total = time.perf_counter() - begun
        seconds |= result.artefacts.seconds
        begun = time.perf_counter()
        (item,) = vertical.discover(folder)
        again = engine.run(vertical.infer([vertical.load(item)])).value[0]
        assert not isinstance(again, InputError)
        with tempfile.TemporaryDirectory() as out:
            vertical.write(again, Path(out))
        second = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "total": total,
        "second": second,
        "computed": ", ".join(sorted(answer.precision.values())),
        "cpu_seconds": cpu,
        "memory_mb": memory,
        "volume_mb": request.volume.voxels.nbytes / 1e6,
        "nodules": len(report.nodules or []),
        "lungs_ml": report.finding("lungs_volume").value,
        "files": sizes,
    }


def runs(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the phantom, then analyse it in fresh processes."""
    from plinth.verticals.medical.phantom.chest import Phantom
    from plinth.verticals.medical.phantom.dicom import write_series

    size = (given.size, given.size, given.slices)
    spacing = tuple(extent / n for extent, n in zip(EXTENT, size, strict=True))
    phantom = Phantom(shape=size, spacing=(spacing[0], spacing[1], spacing[2]))
    command = [sys.executable, __file__, "--rows", str(given.rows), "--threads", str(given.threads)]
    command += ["--backend", given.backend, "--precision", given.precision]
    command += ["--lanes", str(given.lanes), f"--{'' if given.nodules else 'no-'}nodules"]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    with tempfile.TemporaryDirectory() as folder:
        write_series(phantom, Path(folder))
        made = []
        for _ in range(given.runs):
            done = subprocess.run(
                [*command, "--study", folder],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            made.append(json.loads(done.stdout))
    return made


def summary(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and what does not vary."""
    middle = statistics.median

    def over(part: str, stage: str) -> float:
        return float(middle(run[part][stage] for run in made))

    stages = {
        stage: {"seconds": round(over("seconds", stage), 3)}
        for stage in STAGES
        if stage != "import" and stage in made[0]["seconds"]
    }
    memory = {stage: round(over("memory_mb", stage)) for stage in made[0]["memory_mb"]}
    return {
        "stages": stages,
        "total_seconds": round(middle(run["total"] for run in made), 2),
        "cpu_seconds": {
            stage: round(over("cpu_seconds", stage), 2) for stage in made[0]["cpu_seconds"]
        },
        "total_cpu_seconds": round(middle(sum(run["cpu_seconds"].values()) for run in made), 2),
        "memory_mb": memory,
        "second_study_seconds": round(middle(run["second"] for run in made), 2),
        "computed": made[0]["computed"],
        "volume_mb": round(made[0]["volume_mb"], 1),
        "nodules": made[0]["nodules"],
        "lungs_ml": made[0]["lungs_ml"],
        "files_bytes": made[0]["files"],
    }


def show(told: dict[str, Any], given: argparse.Namespace) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    title = f"{given.slices} slices of {given.size} x {given.size}, {given.threads} thread(s)"
    table = Table("stage", "seconds", "peak memory, MB", title=title)
    infer = ("rules", "resample", "network", "nodules")
    for stage in STAGES:
        spent = told["stages"].get(stage, {}).get("seconds")
        at = told["memory_mb"].get("infer" if stage == infer[-1] else stage)
        table.add_row(stage, "" if spent is None else f"{spent:.2f}", "" if at is None else str(at))
    table.add_row("total", f"{told['total_seconds']:.2f}", "")
    table.add_row("total of a second study", f"{told['second_study_seconds']:.2f}", "")
    table.add_row("total, CPU", f"{told['total_cpu_seconds']:.2f}", "")
    console = Console()
    console.print(table)
    console.print(
        f"voxels {told['volume_mb']} MB; {told['nodules']} nodules, lungs {told['lungs_ml']} mL; "
        f"nodules in {told['computed'] or 'no network'}; "
        f"{platform.machine()}, {os.cpu_count()} CPUs"
    )


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="windows at once, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=1, help="that share the threads")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="auto", help="of the network, as in plinth.toml")
    parser.add_argument("--nodules", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--study", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.study is not None:
        print(json.dumps(analyse(given)))
        return
    told = summary(runs(given))
    if given.json:
        print_json(told)
    else:
        show(told, given)


if __name__ == "__main__":
    main()
