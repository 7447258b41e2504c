"""One device, two kinds of work: fraud scores due in 150 ms while CT studies fill the rest.

    python benchmarks/mixed_device.py [--rate 200] [--seconds 60] [--repeats 1] [--plan] [--json]

Arms, each a server process of its own with the packaged models of finance and medical:

- ``plinth``: ``plinth serve finance medical`` as it is.
- ``threads``: the same with ``engine.compute_workers = 0``: the steps of the CT analysis run in
  threads of the process that answers payments.
- ``alone``: as ``plinth``, without CT studies.
- ``plain``: the same server as a plain queue: first come, first served, no deadlines, and slices
  bounded by nothing but the largest batch.

``--studies`` uploads of one CT series (a zip of sample_data/ct_phantom) are kept in work
through the HTTP door, and payments (sample_data/transactions) come at a steady Poisson rate, open
loop. Latency runs from when a payment was due to its whole answer. Device figures are differences
of ``/metrics`` over the same seconds.

With ``--plan`` each run ends with what ``plinth plan`` foretells for it: its rate, and so many
studies at a time where there are some, on one lane, by the costs that its own engine learned, by
what payments took outside of the engine, which their answers tell, by how many asked a second time
(alerts: for their reasons), and by what studies did. With ``--also 300 600`` the plan that the run
at ``--rate`` gives is held against runs at other rates, of which it has seen nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from plinth.pipelines.bench.load import Load  # noqa: E402
from plinth.pipelines.plan.demand import Patient, read_costs  # noqa: E402
from plinth.pipelines.plan.planner import Point, Question, point  # noqa: E402

ARMS = ("plinth", "threads", "alone", "plain")
UNBOUNDED = 3600.0  # seconds of a slice: no bound but the largest batch
SERIES = re.compile(r"^(plinth_\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
ADDRESS = re.compile(r"serving .* on (http://\S+)")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
CONFIG = """
[engine]
threads = {threads}
latency_file = "{costs}"
compute_workers = {workers_of_steps}
[serve]
port = 0
[serve.upload]
workers = {workers}
[verticals.finance]
[verticals.medical]
nodules = true
overlap = {overlap}
"""
FIGURES = {
    "payments_per_second": "payments answered /s",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "max_ms": "max, ms",
    "in_time": "within SLA",
    "refused": "refused",
    "errors": "errors",
    "device_busy": "device busy",
    "windows_per_minute": "CT windows /min",
    "studies_per_minute": "CT studies /min",
    "window_batch_ms": "CT batch, ms",
    "payment_batch_ms": "payment batch, ms",
    "server_cores": "server CPU, cores",
}

PLANNED = {
    "planned_p99_ms": "planned p99, ms",
    "engine_p99_ms": "p99 in the engine, ms",
    "planned_engine_p99_ms": "planned p99 in the engine, ms",
    "planned_per_second": "planned in time /s",
    "planned_windows_per_minute": "planned CT windows /min",
}


# -- the servers -----------------------------------------------------------------------------
def serve_plain(file: Path) -> None:
    """The server without slices and without deadlines."""
    from plinth.engine import Batcher, Engine, LatencyModel, Sla
    from plinth.pipelines.assembly import load_verticals
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.http.server import Server, bind, create_app

    config = load(file)
    bound = bind(config.serve.host, config.serve.port)
    verticals = load_verticals(config)
    batcher = Batcher(LatencyModel(), slice_share=UNBOUNDED, idle_slice=UNBOUNDED)
    engine = Engine(batcher, **config.engine.model_dump())
    queued = Sla(weight=math.inf)  # nobody is served less than the others: order of arrival
    for vertical in verticals.values():
        vertical.__dict__["sla"] = queued
        for model in vertical.models():
            engine.add(model, sla=queued)
    with engine:
        server = Server(create_app(verticals, engine, config), config, bound)
        print(f"serving {', '.join(verticals)} on {server.url}", file=sys.stderr, flush=True)
        server.run()


@contextlib.contextmanager
def serving(arm: str, given: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of a server that is ready; it is told to end afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "plinth.toml", Path(folder) / "log"
        file.write_text(
            CONFIG.format(
                threads=given.threads,
                workers_of_steps=0 if arm == "threads" else given.processes,
                workers=given.studies,
                overlap=given.overlap,
                costs=given.costs,
            )
        )
        if arm != "plain":
            command = [sys.executable, "-m", "plinth", "serve", "--config", str(file)]
        else:
            command = [sys.executable, __file__, "--serve-plain", str(file)]
        environment = os.environ | (ONE_THREAD if given.threads == 1 else {})
        with log.open("wb") as told:
            process = subprocess.Popen(command, stderr=told, cwd=ROOT, env=environment)
        try:
            yield await_ready(process, log), psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def await_ready(process: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> str:
    """The URL, once the server has warmed up."""
    pause, until, url = threading.Event(), time.monotonic() + seconds, ""
    while time.monotonic() < until and process.poll() is None:
        if found := ADDRESS.search(" ".join(log.read_text().split())):
            url = found[1]
            with contextlib.suppress(OSError), ask(f"{url}/health/ready"):
                return url
        pause.wait(0.1)
    raise SystemExit(f"the server did not get ready:\n{log.read_text()}")


def ask(url: str, data: bytes | None = None) -> Any:
    """The answer to a GET, or to a POST of a zip; to be read and closed."""
    headers = {} if data is None else {"content-type": "application/zip"}
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - our own server
    return urllib.request.urlopen(request, timeout=60)  # noqa: S310


def metrics(url: str) -> dict[str, float]:
    """Value by series of the server's ``/metrics``."""
    with ask(f"{url}/metrics") as answer:
        return {name: float(value) for name, value in SERIES.findall(answer.read().decode())}


# -- the CT studies --------------------------------------------------------------------------
def study_zip() -> bytes:
    """The sample CT series as one archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted((ROOT / "sample_data" / "ct_phantom").glob("*.dcm")):
            archive.write(path, path.name)
    return packed.getvalue()


@dataclass
class Studies:
    """Keeps uploads in work until it is closed.

    Args:
        url: of the server.
        count: how many at a time.
        apart: seconds between their beginnings, so that not all are read while none is inferred.
    """

    url: str
    count: int
    apart: float
    finished: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __enter__(self) -> Studies:
        self._over = threading.Event()
        self._body = study_zip()
        self._threads = [
            threading.Thread(target=self._feed, args=(self.apart * n,)) for n in range(self.count)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _feed(self, after: float) -> None:
        self._over.wait(after)
        while not self._over.is_set() and len(self.failed) < 5:
            try:
                self._one()
            except OSError as error:
                self.failed.append(str(error))
                self._over.wait(1.0)

    def _one(self) -> None:
        with ask(f"{self.url}/v1/medical/analyse", self._body) as answer:
            job = json.load(answer)
        while job["state"] not in ("done", "failed") and not self._over.wait(0.25):
            with ask(f"{self.url}{job['url']}") as answer:
                job = json.load(answer)
        if job["state"] == "failed":
            self.failed.append(job["error"]["message"])
        elif job["state"] == "done":
            self.finished.append(time.perf_counter())


# -- one run ---------------------------------------------------------------------------------
def payments() -> list[bytes]:
    """The sample payments, one request body each."""
    packed = ROOT / "sample_data" / "transactions" / "transactions.jsonl.gz"
    return [line for line in gzip.decompress(packed.read_bytes()).splitlines() if line]


def measure(arm: str, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One arm: start, warm up under the whole load, measure."""
    bodies = payments()

    def load(url: str, seconds: float, seed: int) -> Load:
        return Load(
            f"{url}/v1/finance/score",
            bodies,
            {"content-type": "application/json"},
            rate=given.rate,
            seconds=seconds,
            seed=seed,
            connections=max(64, round(given.rate)),
            timeout=30.0,
        )

    with (
        serving(arm, given) as (url, server),
        Studies(url, 0 if arm == "alone" else given.studies, given.warm_up / 4) as studies,
    ):
        load(url, given.warm_up, seed + 1000).run()
        before, cpu, begun = metrics(url), cpu_seconds(server), time.perf_counter()
        result = load(url, given.seconds, seed).run()
        seconds = time.perf_counter() - begun
        after, cpu = metrics(url), cpu_seconds(server) - cpu
        done = sum(at > begun for at in studies.finished)
    if studies.failed:
        raise SystemExit(f"{arm}: a study failed: {studies.failed[0]}")

    def grown(name: str) -> float:
        return sum(value - before.get(key, 0.0) for key, value in after.items() if name in key)

    def batch_ms(model: str) -> float:
        of = f'{{model="{model}"}}'
        count = grown(f"plinth_batch_seconds_count{of}")
        return 1e3 * grown(f"plinth_batch_seconds_sum{of}") / max(count, 1.0)

    told = result.as_dict(given.sla_ms / 1e3)
    planned: dict[str, float] = {}
    seen = None
    if given.plan:
        series = {key: value - before.get(key, 0.0) for key, value in after.items()}
        seen = Seen.of(told, series, given.studies, 0.0 if arm == "alone" else seconds)
        engine = float(np.nanquantile(result.latencies - result.outsides, 0.99))
        planned = {"engine_p99_ms": 1e3 * engine} | seen.foretold(given, given.rate)
    return {
        "arm": arm,
        "seen": seen,
        "payments_per_second": told["throughput"],
        "p50_ms": told["latency_of_ok_ms"]["p50"],
        "p99_ms": told["latency_of_ok_ms"]["p99"],
        "max_ms": told["latency_of_ok_ms"]["max"],
        "in_time": told["share_in_time"],
        "refused": told["refused"],
        "errors": told["errors"] + told["timeouts"] + told["unsent"],
        "degraded": grown("plinth_degraded_total"),
        "device_busy": grown("plinth_device_busy_seconds_total") / seconds,
        "windows_per_minute": 60 * grown('plinth_batch_rows_sum{model="nodules"}') / seconds,
        "studies_per_minute": 60 * done / seconds,
        "window_batch_ms": batch_ms("nodules"),
        "payment_batch_ms": batch_ms("fraud"),
        "server_cores": cpu / seconds,
        **planned,
        "rate": given.rate,
        "sla_misses": {key: after[key] - before.get(key, 0.0) for key in misses(after)},
        "load": told,
    }


@dataclass(frozen=True)
class Seen:
    """What a run tells a plan, beside the costs that its engine learned.

    Args:
        outside: what payments took beside their batches, seconds, in the order of their time there.
        again: share of them that asked a second time, and ``again_rows``: for how much.
        studies: rows of one, how many at once, and seconds between two; empty: there were none.
    """

    outside: tuple[float, ...]
    again: float
    again_rows: int
    studies: dict[str, float]

    @classmethod
    def of(cls, told: dict[str, Any], grown: dict[str, float], count: int, seconds: float) -> Seen:
        """What can be seen of a run.

        Args:
            told: of the payments.
            grown: how much the server's series have grown.
            count: studies in work.
            seconds: in which they were done; 0: there were none.
        """
        calls = grown['plinth_call_seconds_count{model="fraud"}']
        rows = grown['plinth_batch_rows_sum{model="fraud"}']
        second = max(0.0, calls - told["ok"])
        outside = tuple(each / 1e3 for each in told["outside_by_engine_ms"])
        again_rows = max(1, round((rows - told["ok"]) / second)) if second else 1
        studies = cls._studies(grown, count, seconds) if seconds else {}
        return cls(outside, second / told["ok"], again_rows, studies)

    @staticmethod
    def _studies(grown: dict[str, float], count: int, seconds: float) -> dict[str, float]:
        calls = grown.get('plinth_call_seconds_count{model="nodules"}', 0.0)
        if not calls:
            raise SystemExit("no study had its windows done, use more --seconds")
        inside = grown['plinth_call_seconds_sum{model="nodules"}']
        return {
            "rows": round(grown['plinth_batch_rows_sum{model="nodules"}'] / calls),
            "at_once": count,
            "between": max(0.0, count * seconds - inside) / calls,
        }

    def foretold(self, given: argparse.Namespace, rate: float) -> dict[str, float]:
        """What a plan on the costs that the server learned says of a rate of payments."""
        rows = int(self.studies["rows"]) if self.studies else None
        costs = read_costs(given.costs, "fraud", "nodules" if self.studies else None, rows)
        again = {"again": self.again, "again_rows": self.again_rows}
        urgent = costs.urgent.model_copy(update=again)
        patient = None
        if costs.background is not None:
            patient = costs.background.model_copy(update=self.studies)

        def planned(outside: tuple[float, ...]) -> Point:
            own = urgent.model_copy(update={"outside": outside})
            of = costs.model_copy(update={"urgent": own, "background": patient})
            asked = Patient(1.0, 1.0, "studies") if self.studies else None
            made = Question(of, given.sla_ms / 1e3, rate, patient=asked, seconds=60.0)
            return point(made, 1)

        found, inside = planned(self.outside), planned((0.0,))
        return {
            "planned_p99_ms": found.p99,
            "planned_per_second": rate * found.in_time,
            "planned_windows_per_minute": 60 * (found.jobs_possible or 0.0) * (rows or 0),
            "planned_engine_p99_ms": inside.p99,
        }


def held_against(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs at other rates, each with what the plan of the run at ``--rate`` foretold for it."""
    base = measure("plinth", given, 0)
    foretold = {rate: base["seen"].foretold(given, rate) for rate in given.also}
    runs = [base]
    for number, rate in enumerate(given.also):
        own = argparse.Namespace(**{**vars(given), "rate": rate})
        runs.append(measure("plinth", own, number + 1) | foretold[rate])
    return runs


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of a server and of its worker processes."""
    return sum(sum(each.cpu_times()[:2]) for each in (server, *server.children()))


def misses(after: dict[str, float]) -> list[str]:
    """The series that count broken promises of payments."""
    return [key for key in after if key.startswith("plinth_sla_misses_total{") and "fraud" in key]


# -- the report ------------------------------------------------------------------------------
def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians by arm over its runs."""
    return {
        arm: {
            name: statistics.median(run[name] for run in runs if run["arm"] == arm)
            for name in (*FIGURES, *PLANNED)
            if name in runs[0]
        }
        for arm in dict.fromkeys(run["arm"] for run in runs)
    }


def show(medians: dict[str, dict[str, float]], runs: list[dict[str, Any]]) -> None:
    """Print a column for each arm: median, and the range over the repeats."""
    table = Table("", *medians, title=f"{runs[0]['rate']:g} payments/s due, with CT studies")
    for name, title in (FIGURES | (PLANNED if "planned_p99_ms" in runs[0] else {})).items():
        cells = []
        for arm in medians:
            values = [run[name] for run in runs if run["arm"] == arm]
            span = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.4g}{span}")
        table.add_row(title, *cells)
    console = Console(width=120)
    console.print(table)
    for run in runs:
        for problem in run["load"]["problems"]:
            console.print(f"{run['arm']}: {problem}")


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="payments per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured, for each arm")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds of load before")
    parser.add_argument("--studies", type=int, default=2, help="CT studies in work at a time")
    parser.add_argument("--processes", type=int, default=1, help="engine.compute_workers")
    parser.add_argument("--overlap", type=float, default=0.5, help="of the CT windows")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one forward")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each arm, interleaved")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plinth", "plain"])
    parser.add_argument("--sla-ms", type=float, default=150.0)
    parser.add_argument("--plan", action="store_true", help="what plinth plan foretells, too")
    parser.add_argument("--also", type=float, nargs="+", help="rates for which the plan is held")
    parser.add_argument("--serve-plain", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve_plain is not None:
        serve_plain(given.serve_plain)
        return
    if given.also:
        given.plan, given.arms = True, ["plinth"]
    if given.plan and "plain" in given.arms:
        parser.error("--plan: the arm plain learns no costs, leave it out with --arms")
    with tempfile.TemporaryDirectory() as folder:
        given.costs = Path(folder) / "costs.json"
        if given.also:
            runs = held_against(given)
            for run in runs:
                run["arm"] = f"{run['rate']:g}/s"
        else:
            turns = range(given.repeats)
            runs = [measure(arm, given, seed) for seed in turns for arm in given.arms]
    for run in runs:
        run.pop("seen")
    medians = summary(runs)
    if given.json:
        print_json({"medians": medians, "runs": runs})
        return
    show(medians, runs)


if __name__ == "__main__":
    main()
