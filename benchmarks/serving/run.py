"""One small fraud model behind Plinth and behind the servers it could be served by instead.

    python benchmarks/serving/run.py --rounds 3 --seconds 8 --out build/serving/results.json
    python benchmarks/serving/report.py build/serving/results.json

The first run installs each server into an environment of its own under ``build/serving/envs``
(about 10 GB); one that cannot be installed or started is reported and the others go on. The
method is in docs/serving-comparison.md. Linux only: it reads /proc and pins CPU cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fraud_mlp
import numpy as np
import servers
from processes import Running
from servers import HOST, ROOT, Place, Server

from plinth.engine import PlinthError
from plinth.pipelines.bench import environment
from plinth.pipelines.bench.load import Load, LoadResult
from plinth.pipelines.bench.search import Goal, Search, Trial

MULTIPLES = (0.5, 1.0, 1.5, 2.0)
RATES = [500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 32000.0]
BROKEN_DOWN = 0.2  # share of requests in time below which no higher rate is tried
PROBE_SECONDS = 1.5
FIRST_RATE = 200.0  # requests per second the search for the capacity begins with
MOST_CONNECTIONS = 4000
GIVE_UP_SECONDS = 1.0  # a client waits this long for an answer
READY_SECONDS = 120.0
REST_SECONDS = 0.5
PORT = 18_100
BODIES = 256
REFUSALS = (408, 429, 503, 504)  # the ways servers say: too much to do, or too late


class Broken(Exception):
    """A server that cannot be measured, and why."""


class Bench:
    """One server that runs, and the client's side of it.

    Args:
        server: which.
        given: the command line.
        number: gives its port.
    """

    def __init__(self, server: Server, given: argparse.Namespace, number: int) -> None:
        self.server = server
        self.place = Place(PORT + 10 * number, given.sla_ms)
        self.sla = given.sla_ms / 1000
        self._goal = Goal(self.sla, quantile=0.99, confidence=0.5)  # the share as it was seen
        self.cores = given.server_cores
        dice = random.Random(fraud_mlp.SEED)
        self.rows = [
            [round(dice.gauss(0, 1), 4) for _ in range(fraud_mlp.FEATURES)] for _ in range(BODIES)
        ]
        self.bodies = [json.dumps(server.body(row)).encode() for row in self.rows]
        self.expected = fraud_mlp.score(fraud_mlp.load(servers.WEIGHTS), self.rows)

    def __enter__(self) -> Bench:
        _refuse_if_taken(self.place.port)
        try:
            self.server.prepare(self.place)
        except subprocess.CalledProcessError as error:
            raise Broken(f"could not be prepared: {error.stderr.strip()[-400:]}") from None
        variables = servers.environment(self.server, self.place)
        program, *arguments = self.server.command(self.place)
        self.running = Running(
            [str(self.server.home / "bin" / program), *arguments],
            variables,
            ROOT,
            servers.BUILD / "logs" / f"{self.server.name}.log",
            self.cores,
        )
        try:
            self.start_seconds = self._wait()
            self.check()
        except BaseException:
            self.running.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.running.stop()

    def _wait(self) -> float:
        """Seconds until the first right answer."""
        begun = time.monotonic()
        while time.monotonic() < begun + READY_SECONDS:
            if self.running.ended:
                raise Broken(f"ended while it started: {self.running.said()}")
            try:
                self._ask(0)
            except (OSError, http.client.HTTPException, Broken):
                time.sleep(0.2)
            else:
                return time.monotonic() - begun
        raise Broken(f"not ready after {READY_SECONDS:g} s: {self.running.said()}")

    def _ask(self, number: int) -> float:
        connection = http.client.HTTPConnection(HOST, self.place.port, timeout=10)
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", self.server.path, self.bodies[number], headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status != 200:
                raise Broken(f"answered {response.status}: {answer[:200]!r}")
            return self.server.read(json.loads(answer))
        finally:
            connection.close()

    def check(self, count: int = 16) -> None:
        """Compare answers with torch in this process.

        Raises:
            Broken: it does not answer, or with another score.
        """
        for number in range(count):
            score = self._ask_again(number)
            if abs(score - self.expected[number]) > 1e-4:
                raise Broken(f"answered {score}, torch says {self.expected[number]}")

    def _ask_again(self, number: int, times: int = 3) -> float:
        for left in reversed(range(times)):
            try:
                return self._ask(number)
            except (OSError, http.client.HTTPException, LookupError, Broken) as error:
                if not left:
                    raise Broken(f"did not answer: {type(error).__name__}: {error}") from None
                time.sleep(REST_SECONDS)
        raise AssertionError("times is below 1")

    def load(self, rate: float, seconds: float, seed: int) -> LoadResult:
        """Offer it so many requests per second."""
        return Load(
            f"http://{HOST}:{self.place.port}{self.server.path}",
            self.bodies,
            headers={"content-type": "application/json"},
            rate=rate,
            seconds=seconds,
            seed=seed,
            connections=max(64, min(MOST_CONNECTIONS, int(2 * rate * self.sla))),
            timeout=GIVE_UP_SECONDS,
        ).run()

    def capacity(self) -> float:
        """The highest rate at which 99 % of the requests are answered in time.

        Raises:
            Broken: there is none.
        """
        answer = Search(
            self._probe,
            self._goal,
            start=FIRST_RATE,
            least=FIRST_RATE / 8,
            tolerance=0.1,
            repeats=1,
            confirm=1,
        ).run()
        if answer.rate is None:
            steps = [f"{step.rate:.0f}/s: {step.share:.1%}" for step in answer.steps]
            raise Broken(f"keeps its promise at no rate; in time were {', '.join(steps)}")
        return answer.rate

    def _probe(self, rate: float, seed: int) -> Trial:
        """The better of two tries, the second only after a miss: a stall of the machine passes."""
        trials = []
        for again in (0, 1000):
            result = self.load(rate, PROBE_SECONDS, seed + again)
            time.sleep(REST_SECONDS)
            problems = tuple(result.problems(self.sla))
            trials.append(Trial(result.offered, result.in_time(self.sla), problems))
            if result.share_in_time(self.sla) >= self._goal.quantile:
                break
        return max(trials, key=lambda trial: trial.in_time / max(trial.offered, 1))

    def measure(self, multiple: float, capacity: float, seconds: float, seed: int) -> Any:
        """One run at a multiple of the capacity, as JSON."""
        before = self.running.usage()
        result = self.load(multiple * capacity, seconds, seed)
        after = self.running.usage()
        cpu = after.cpu_seconds - before.cpu_seconds
        answered = result.ok
        refused = int(np.isin(result.statuses, REFUSALS).sum())
        return {
            "multiple": multiple,
            "goodput": result.in_time(self.sla) / seconds,
            "answers": result.throughput,
            "share_in_time": result.share_in_time(self.sla),
            "rejections": refused,
            "errors": result.refused + result.errors - refused,
            "timeouts": result.timeouts + result.unsent,
            "cpu_seconds": cpu,
            "cpu_ms_per_request": 1e3 * cpu / max(result.offered, 1),
            "cpu_ms_per_answer": 1e3 * cpu / answered if answered else None,
            "pss_mb": after.pss_bytes / 1e6,
            "rss_mb": after.rss_bytes / 1e6,
            "processes": after.processes,
            "load": result.as_dict(self.sla),
        }


def _refuse_if_taken(port: int) -> None:
    for number in range(port, port + 3):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, number)) == 0:
                raise Broken(f"port {number} is in use")


def visit(entry: dict[str, Any], bench: Bench, round_: int, given: argparse.Namespace) -> None:
    """Start a server, measure it at each multiple, and stop it; adds to its entry."""
    with bench:
        bench.load(FIRST_RATE, 1.0, seed=0)
        if "capacity" not in entry:
            entry["capacity"] = bench.capacity()
        runs = []
        for multiple in given.multiples:
            time.sleep(REST_SECONDS)
            run = bench.measure(multiple, entry["capacity"], given.seconds, given.seed + round_)
            about = {"round": round_, "start_seconds": bench.start_seconds}
            runs.append({**about, "load_average": os.getloadavg()[0], **run})
            print(
                f"  {multiple:g}x: {run['goodput']:.0f} in time/s of {run['load']['rate']:.0f}/s, "
                f"p99 {run['load']['latency_of_ok_ms']['p99']} ms, {run['rejections']} rejected, "
                f"{run['errors']} errors, {run['timeouts']} timeouts",
                flush=True,
            )
        entry["runs"] += runs
        time.sleep(GIVE_UP_SECONDS)
        bench.check()


def visit_rates(
    entry: dict[str, Any], bench: Bench, round_: int, given: argparse.Namespace
) -> None:
    """Start a server anew and offer it rising rates until it has broken down."""
    with bench:
        bench.load(FIRST_RATE, 1.0, seed=0)
        for rate in given.rates:
            time.sleep(REST_SECONDS)
            run = bench.measure(rate / entry["capacity"], entry["capacity"], given.rate_seconds, 0)
            entry["same_rates"].append({"round": round_, "rate": rate, **run})
            if run["share_in_time"] < BROKEN_DOWN:
                break


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    return {**environment.describe(), "settings": settings, "give_up_seconds": GIVE_UP_SECONDS}


def arguments() -> argparse.Namespace:
    """The command line."""
    cores = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--out", type=Path, default=servers.BUILD / "results.json")
    parser.add_argument("--servers", nargs="+", choices=[s.name for s in servers.SERVERS])
    parser.add_argument("--multiples", nargs="+", type=float, default=list(MULTIPLES))
    parser.add_argument(
        "--rates", nargs="*", type=float, default=RATES, help="offered to every server alike, /s"
    )
    parser.add_argument("--rate-seconds", type=float, default=4.0, help="of each of these runs")
    parser.add_argument("--sla-ms", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--server-cores", type=cores, default=[0], metavar="0", help="'' does not pin"
    )
    parser.add_argument(
        "--client-cores", type=cores, default=[1], metavar="1", help="'' does not pin"
    )
    return parser.parse_args()


def installed(chosen: Sequence[Server]) -> dict[str, dict[str, Any]]:
    """An entry per server, with the reason if it cannot be installed."""
    entries: dict[str, dict[str, Any]] = {}
    for server in chosen:
        print(f"installing {server.name}", flush=True)
        entry: dict[str, Any] = {"settings": server.settings, "failures": []}
        entry |= {"runs": [], "same_rates": []}
        reason = servers.install(server)
        if reason is None:
            entry["version"] = servers.version(server)
        else:
            entry["failures"].append(f"cannot be installed: {reason}")
            print(f"  {reason}")
        entries[server.name] = entry
    return entries


def main() -> None:
    """Install, measure in rounds, write the results after each visit."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    chosen = [s for s in servers.SERVERS if not given.servers or s.name in given.servers]
    fraud_mlp.make(servers.WEIGHTS)
    entries = installed(chosen)
    results = {**facts(given), "servers": entries}
    if given.client_cores:
        os.sched_setaffinity(0, given.client_cores)
    begun = time.monotonic()
    for round_ in range(given.rounds):
        order = [server for server in chosen if "version" in entries[server.name]]
        random.Random(given.seed + round_).shuffle(order)
        for server in order:
            print(f"round {round_ + 1}: {server.name}", flush=True)
            entry = entries[server.name]
            try:
                for do in (visit, visit_rates):
                    do(entry, Bench(server, given, chosen.index(server)), round_, given)
            except (Broken, PlinthError) as error:
                entry["failures"].append(f"round {round_ + 1}: {error}")
                print(f"  {error}", flush=True)
            results["measured_seconds"] = round(time.monotonic() - begun)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
