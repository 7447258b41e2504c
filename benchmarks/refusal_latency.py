"""How long does a refusal take? From the offer of work that cannot be in time to the answer.

    python benchmarks/refusal_latency.py [--requests 1000] [--json]

Four places, each with the packaged models:

- ``engine, idle``: ``engine.run`` in this process, with nothing else to do.
- ``engine, busy``: the same while CT volumes keep the device busy with background windows.
- ``http, busy``: a server process whose device is kept busy in the same way; one keep-alive
  connection, from the first byte sent to the last byte read.
- ``http, CT uploads``: the same through a real ``plinth serve finance medical`` with two CT uploads
  always in work: their reading, rules and pictures share Python's lock with the door.

No request's deadline can be met even by an idle device. (One that could be met if the running
batch ended now is taken: the end of a batch is only predicted.) Requests come one by one, at
Poisson times that know nothing of the batches. Each refusal is checked for its facts: reason,
predicted finish, deadline, queue ahead, when to try again (over HTTP in the header as well).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from head import parser_of, print_json
from http_latency import Client, route_and_example, serving, started
from mixed_device import Studies, metrics
from rich.console import Console
from rich.table import Table

from plinth.engine import Call, DeadlineRefused, Engine, Flow, ModelStore, Sla, Tiling
from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance.settings import STORE as FINANCE
from plinth.verticals.medical.vertical import STORE as MEDICAL

PROMISE = 0.002  # seconds
FACTS = ("predicted_seconds", "deadline_seconds", "rows_ahead", "retry_after_seconds")
CONFIG = "[engine]\nthreads = 1\n[verticals.finance]\n[verticals.medical]\nnodules = true\n"


@dataclass
class Seen:
    """What one place gave.

    Args:
        place: where.
        seconds: from offer to refusal, one each.
        improper: refusals that lack a fact, and answers that are no refusal.
        busy: share of the time that the device was busy.
    """

    place: str
    seconds: list[float] = field(default_factory=list)
    improper: int = 0
    busy: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds by quantile, counts and shares."""
        times = sorted(self.seconds)
        at = {
            f"p{share:g}_ms": times[int(len(times) * share / 100)] * 1e3 for share in (50, 95, 99)
        }
        within = sum(spent <= PROMISE for spent in times) / len(times)
        return {
            "place": self.place,
            "requests": len(times),
            **{name: round(value, 3) for name, value in at.items()},
            "max_ms": round(times[-1] * 1e3, 3),
            "within_2_ms": round(within, 4),
            "improper": self.improper,
            "device_busy": round(self.busy, 3),
        }


def collect(place: str, ask: Callable[[], bool], given: argparse.Namespace) -> Seen:
    """Ask at Poisson times; ``ask`` tells whether the refusal had all its facts."""
    seen, pause, times = Seen(place), threading.Event(), random.Random(7)
    for number in range(given.warm_up + given.requests):
        pause.wait(times.expovariate(given.rate))
        begun = time.perf_counter()
        proper = ask()
        spent = time.perf_counter() - begun
        if number >= given.warm_up:
            seen.seconds.append(spent)
            seen.improper += not proper
    return seen


# -- in this process -------------------------------------------------------------------------
def in_process(given: argparse.Namespace) -> list[Seen]:
    """Refusals of an engine, idle and then busy."""
    with Engine(threads=1) as engine:
        engine.add(ModelStore(FINANCE).load("fraud"), sla=Sla(deadline_ms=150))
        engine.add(ModelStore(MEDICAL).load("nodules"))
        rows = ModelStore(FINANCE).load("fraud").spec.example(1)
        sla = Sla(deadline_ms=given.deadline_ms)

        def flow() -> Flow[None]:
            yield Call("fraud", rows)

        def ask() -> bool:
            try:
                engine.run(flow(), sla)
            except DeadlineRefused as error:
                told = error.as_dict()
                return told["reason"] == "deadline" and all(told[name] >= 0 for name in FACTS)
            return False

        idle = collect("engine, idle", ask, given)
        with volumes(engine):
            before = _busy_seconds(engine), time.perf_counter()
            busy = collect("engine, busy", ask, given)
            after = _busy_seconds(engine), time.perf_counter()
        busy.busy = (after[0] - before[0]) / (after[1] - before[1])
    return [idle, busy]


@contextlib.contextmanager
def volumes(engine: Engine) -> Iterator[None]:
    """Two CT volumes always in work, until the end."""
    over = threading.Event()
    volume = torch.zeros(1, 96, 192, 192)

    def feed() -> None:
        while not over.is_set():
            future = engine.submit(Call("nodules", volume, Tiling((32, 48, 48), overlap=0.5)))
            while not over.wait(0.05) and not future.done():
                pass
            future.cancel()

    threads = [threading.Thread(target=feed) for _ in range(2)]
    for thread in threads:
        thread.start()
    pause = threading.Event()
    pause.wait(2.0)  # the first windows teach the engine what they cost
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _busy_seconds(engine: Engine) -> float:
    labels = {"device": str(engine.device)}
    return REGISTRY.get_sample_value("plinth_device_busy_seconds_total", labels) or 0.0


# -- over HTTP -------------------------------------------------------------------------------
def over_http(given: argparse.Namespace) -> list[Seen]:
    """Refusals of a server with background windows, and of one that analyses CT studies."""
    with started([sys.executable, __file__, "--serve"]) as (url, _):
        busy = ask_server("http, busy", url, given)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "plinth.toml"
        config.write_text(CONFIG)
        with (
            serving("finance medical", config) as (url, _),
            Studies(url, 2, 1.0) as studies,
        ):
            threading.Event().wait(5.0)  # both uploads are in work
            whole = ask_server("http, CT uploads", url, given)
        if studies.failed:
            raise SystemExit(f"a study failed: {studies.failed[0]}")
    return [busy, whole]


def ask_server(place: str, url: str, given: argparse.Namespace) -> Seen:
    """Refusals on one connection."""
    route, body = route_and_example(url, "finance")
    client = Client(url)
    head = f"POST {route} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
    head += f"x-slo-deadline-ms: {given.deadline_ms:g}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def ask() -> bool:
        status, said = client.ask(request)
        return status == 503 and b"\r\nretry-after: " in said

    before = _served_busy(url)
    seen = collect(place, ask, given)
    after = _served_busy(url)
    seen.busy = (after[0] - before[0]) / (after[1] - before[1])
    seen.improper += not _has_facts(url, route, body, given.deadline_ms)
    client.close()
    return seen


def serve() -> None:
    """A server of finance whose engine also has CT windows to run, always."""
    from plinth.pipelines.assembly import build_engine, load_verticals
    from plinth.pipelines.config.settings import Config
    from plinth.pipelines.http.server import Server, bind, create_app

    config = Config.model_validate({"engine": {"threads": 1}, "serve": {"port": 0}})
    bound = bind(config.serve.host, config.serve.port)
    verticals = load_verticals(config, ["finance"])
    engine = build_engine(config, verticals)
    engine.add(ModelStore(MEDICAL).load("nodules"))
    with engine, volumes(engine):
        server = Server(create_app(verticals, engine, config), config, bound)
        print(f"serving finance on {server.url}", file=sys.stderr, flush=True)
        server.run()


def _has_facts(url: str, route: str, body: bytes, deadline: float) -> bool:
    headers = {"content-type": "application/json", "x-slo-deadline-ms": f"{deadline:g}"}
    try:
        urlopen(Request(f"{url}{route}", body, headers)).close()  # noqa: S310 - our own server
    except HTTPError as error:
        told = json.load(error)["error"]
        return told["reason"] == "deadline" and all(told[name] >= 0 for name in FACTS)
    return False


def _served_busy(url: str) -> tuple[float, float]:
    found = metrics(url)
    busy = sum(value for name, value in found.items() if "device_busy_seconds_total" in name)
    return busy, time.perf_counter()


# -- the report ------------------------------------------------------------------------------
def show(found: list[dict[str, Any]], deadline: float) -> None:
    """Print a line for each place."""
    table = Table(
        *("place", "refusals", "p50, ms", "p95, ms", "p99, ms", "max, ms", "within 2 ms"),
        *("improper", "device busy"),
        title=f"from the offer to the refusal, deadline {deadline:g} ms",
    )
    for one in found:
        table.add_row(
            *(one["place"], f"{one['requests']:,}", f"{one['p50_ms']:.2f}", f"{one['p95_ms']:.2f}"),
            *(f"{one['p99_ms']:.2f}", f"{one['max_ms']:.1f}", f"{one['within_2_ms']:.1%}"),
            *(f"{one['improper']}", f"{one['device_busy']:.0%}"),
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="of each place")
    parser.add_argument("--warm-up", type=int, default=100, help="requests that do not count")
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second, at most")
    parser.add_argument("--deadline-ms", type=float, default=0.001)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    found = [seen.as_dict() for seen in (*in_process(given), *over_http(given))]
    if given.json:
        print_json({"deadline_ms": given.deadline_ms, "places": found})
        return
    show(found, given.deadline_ms)


if __name__ == "__main__":
    main()
