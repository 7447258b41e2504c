"""Chaos on lanes in other processes: what is lost, what is answered twice, and who recovers when.

    python benchmarks/chaos_lanes.py [--lane ray:cpu] [--seconds 600] [--lanes 3] [--seed 7]
        [--every 4] [--json]

Callers ask an engine of so many worker processes for rows of their own, urgent ones with a deadline
and patient ones without, while a seeded list of blows falls on it: kill -9, a segmentation fault
and SIGSTOP of a process, a row that crashes whichever process runs it, a lane added, one drained,
and the model replaced under load. With ``--lane ray:cpu`` they are actors on two nodes of a cluster
on this machine, and one more blow is kill -9 of a node's raylet, after which another node joins.
Every answer is held against its row and the versions that may have given it. Lost: a call that was
never told anything. Duplicated: one that was told twice.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plinth.engine import Call, Engine, ModelError, Refused, Sla  # noqa: E402
from plinth.engine.lanes.cluster.lane import RayLane  # noqa: E402
from plinth.engine.lanes.fork_server import NAME  # noqa: E402
from tests.engine.cluster_nodes import Nodes, cluster  # noqa: E402
from tests.engine.lane_models import SEGFAULT, doubles  # noqa: E402

URGENT, PATIENT = Sla(deadline_ms=500), Sla()
POISON_SLA = Sla(deadline_ms=600_000)
TELL_SECONDS = 120.0
HUNG_SECONDS = 2.0
IN_FLIGHT = 64
BLOWS = ("kill", "segfault", "stop", "poison", "add", "drain", "swap")


class Ledger:
    """What became of every call, told by its callbacks."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.told: Counter[int] = Counter()
        self.asked = 0
        self.late = 0
        self._lock = threading.Lock()
        self._room = threading.Semaphore(IN_FLIGHT)

    def ask(self, engine: Engine, rows: torch.Tensor, sla: Sla, factors: set[float]) -> Future[Any]:
        """Ask for rows; ``factors``: those of the versions that may answer, as they come."""
        self._room.acquire()
        with self._lock:
            number, self.asked = self.asked, self.asked + 1
        begun = time.monotonic()
        future = engine.submit(Call("net", rows), sla)

        def told(done: Future[Any]) -> None:
            try:
                outcome = self._outcome(done, rows, factors)
            except Exception as error:  # noqa: BLE001 - a fault of this check is no lost call
                outcome = f"failed wrongly: the check met {type(error).__name__}"
            limit = sla.deadline_ms
            with self._lock:
                self.told[number] += 1
                self.outcomes[outcome] += 1
                self.late += limit is not None and time.monotonic() - begun > limit / 1e3 + 0.05
            self._room.release()

        future.add_done_callback(told)
        return future

    def _outcome(self, done: Future[Any], rows: torch.Tensor, factors: set[float]) -> str:
        error = done.exception()
        if isinstance(error, Refused):
            return f"refused: {error.reason}"
        if isinstance(error, ModelError):
            return "failed alone" if bool((rows == SEGFAULT).any()) else "failed wrongly"
        if error is not None:
            return f"failed wrongly: {type(error).__name__}"
        value = done.result().value
        return "answered" if any(torch.equal(value, f * rows) for f in tuple(factors)) else "wrong"

    def settled(self, seconds: float) -> bool:
        """Whether everything is told within so many seconds."""
        until = time.monotonic() + seconds
        taken = 0
        while taken < IN_FLIGHT and self._room.acquire(timeout=max(0.0, until - time.monotonic())):
            taken += 1
        for _ in range(taken):
            self._room.release()
        return taken == IN_FLIGHT


def workers() -> set[int]:
    """The worker processes of this one."""
    children = psutil.Process().children(recursive=True)
    return {each.pid for each in children if each.name() == NAME}


class Chaos:
    """An engine under load, and the blows that fall on it.

    Args:
        lanes: worker processes.
        seed: of the blows and of the rows.
        store: a folder for the versions of the model.
        nodes: a cluster that the lanes are in; ``None``: they are worker processes.
    """

    def __init__(self, lanes: int, seed: int, store: Path, nodes: Nodes | None = None) -> None:
        self.ledger = Ledger()
        self.blows: Counter[str] = Counter()
        self.recoveries: dict[str, list[float]] = {}
        self._random = random.Random(seed)
        self._lanes = lanes
        self._store = store
        self._factors = {2.0}
        self._version = 1
        self._over = threading.Event()
        self._others = workers()  # of other engines of this process
        self._nodes = nodes
        self._device = "process:cpu" if nodes is None else "ray:cpu"
        self.engine = Engine(
            devices=[self._device] * lanes,
            threads=1,
            hung_seconds=HUNG_SECONDS,
            cluster=None if nodes is None else nodes.settings(),
        )
        self.engine.add(doubles(store, "1", 2.0), batch_range=(1, 8), sla=URGENT)

    def run(self, seconds: float, every: float) -> None:
        """Load and blows for so long; then everybody is to be told, and every lane well."""
        with self.engine:
            callers = [threading.Thread(target=self._call, args=(n,)) for n in range(2)]
            for caller in callers:
                caller.start()
            until = time.monotonic() + seconds
            for blow in self._plan():
                if time.monotonic() > until or self._over.wait(every * self._random.random()):
                    break
                self._strike(blow)
            self._over.set()
            for caller in callers:
                caller.join()
            self.is_settled = self.ledger.settled(TELL_SECONDS)
            self.is_well = self._well(self._lanes)

    def _plan(self) -> Iterator[str]:
        while True:
            blows = BLOWS if self._nodes is None else (*BLOWS, "node")
            yield from self._random.sample(blows, len(blows))

    def _call(self, number: int) -> None:
        choose = random.Random(number)
        while not self._over.is_set():
            rows = torch.full((choose.randint(1, 12), 4), float(choose.randint(0, 1 << 20)))
            self.ledger.ask(
                self.engine, rows, URGENT if choose.random() < 0.8 else PATIENT, self._factors
            )

    def _strike(self, blow: str) -> None:
        self.blows[blow] += 1
        deaths = self._deaths()
        begun = time.monotonic()
        hurts = blow in ("kill", "segfault", "stop") or (blow == "node" and self._is_used())
        getattr(self, f"_{blow}")()
        until = begun + TELL_SECONDS
        while time.monotonic() < until:
            if self._well(self._lanes) and (not hurts or self._deaths() > deaths):
                break
            self._over.wait(0.02)
        self.recoveries.setdefault(blow, []).append(time.monotonic() - begun)

    def _deaths(self) -> int:
        labels = {"device": self._device}  # also of lanes that were drained since
        registry = self.engine.metrics.registry
        return int(registry.get_sample_value("plinth_lane_deaths_total", labels) or 0)

    def _well(self, lanes: int) -> bool:
        states = [lane["state"] for lane in self.engine.status()["lanes"]]
        return states == ["running"] * lanes

    # -- blows ---------------------------------------------------------------------------------
    def _signal(self, number: int) -> None:
        os.kill(self._random.choice(self._pids()), number)

    def _pids(self) -> list[int]:
        if self._nodes is None:
            return sorted(workers() - self._others)
        well = [each for each in self.engine._lanes.threads if each.is_well]
        lanes = [each.lane for each in well if isinstance(each.lane, RayLane)]
        return sorted(lane.about["pid"] for lane in lanes)

    def _is_used(self) -> bool:
        """Whether the node that is killed next has a lane."""
        lanes = [each.lane for each in self.engine._lanes.threads]
        last = self._nodes.all[-1].node if self._nodes is not None else None
        return any(isinstance(lane, RayLane) and lane.about["node"] == last for lane in lanes)

    def _node(self) -> None:
        """Kill the raylet of a node, never the head's; another node takes its place."""
        nodes = self._nodes
        assert nodes is not None
        node = nodes.all.pop()
        for process in psutil.Process(node.pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()
        nodes.add()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _segfault(self) -> None:
        self._signal(signal.SIGSEGV)

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _poison(self) -> None:
        rows = torch.full((1, 4), SEGFAULT)
        self.ledger.ask(self.engine, rows, POISON_SLA, self._factors).exception(TELL_SECONDS)

    def _add(self) -> None:
        self._lanes += 1
        self.engine.add_lane(self._device)

    def _drain(self) -> None:
        names = [lane["name"] for lane in self.engine.status()["lanes"]]
        if len(names) > 2:
            self.engine.drain_lane(self._random.choice(names))
            self._lanes -= 1

    def _swap(self) -> None:
        self._version += 1
        factor = float(self._version + 1)
        self._factors.add(factor)
        model = doubles(self._store, str(self._version), factor)
        self.engine.add(model, batch_range=(1, 8), sla=URGENT)

    def result(self) -> dict[str, Any]:
        """The figures."""
        ledger = self.ledger
        return {
            "asked": ledger.asked,
            "outcomes": dict(ledger.outcomes),
            "lost": sum(not ledger.told[n] for n in range(ledger.asked)),
            "duplicated": sum(ledger.told[n] > 1 for n in range(ledger.asked)),
            "told_after_their_deadline": ledger.late,
            "all_lanes_well_at_the_end": self.is_settled and self.is_well,
            "deaths": self._deaths(),
            "blows": dict(self.blows),
            "recovery_seconds": {
                blow: {"median": sorted(times)[len(times) // 2], "longest": max(times)}
                for blow, times in self.recoveries.items()
            },
        }


def is_right(result: dict[str, Any]) -> bool:
    """Whether nothing was lost, told twice or wrong, and all lanes were well at the end."""
    bad = {each for each in result["outcomes"] if each.startswith(("wrong", "failed wrongly"))}
    lost = result["lost"] + result["duplicated"]
    return not lost and not bad and bool(result["all_lanes_well_at_the_end"])


def chaos(
    seconds: float, lanes: int, seed: int, every: float, lane: str = "process:cpu"
) -> dict[str, Any]:
    """One run; see :meth:`Chaos.result`."""
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory(prefix="plc"))
        nodes = None
        if lane == "ray:cpu":
            nodes = stack.enter_context(cluster(Path(store), 2))
        made = Chaos(lanes, seed, Path(store) / "models", nodes)
        made.run(seconds, every)
        return made.result()


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--lane", choices=("process:cpu", "ray:cpu"), default="process:cpu")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between blows, at most")
    given = parser.parse_args()
    result = chaos(given.seconds, given.lanes, given.seed, given.every, given.lane)
    if given.json:
        print_json(result)
    else:
        show(result, Console(width=100).print)
    sys.exit(0 if is_right(result) else 1)


def show(result: dict[str, Any], tell: Callable[[Any], None]) -> None:
    """The figures as tables."""
    table = Table("blow", "how often", "median, s", "longest, s", title="until all lanes are well")
    for blow, times in result["recovery_seconds"].items():
        cells = (f"{times['median']:.2f}", f"{times['longest']:.2f}")
        table.add_row(blow, str(result["blows"][blow]), *cells)
    tell(table)
    facts = Table("what", "how many")
    for name in ("asked", "lost", "duplicated", "deaths", "told_after_their_deadline"):
        facts.add_row(name.replace("_", " "), f"{result[name]:,}")
    for name, many in sorted(result["outcomes"].items()):
        facts.add_row(name, f"{many:,}")
    tell(facts)


if __name__ == "__main__":
    main()
