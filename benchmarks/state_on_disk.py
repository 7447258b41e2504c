"""What a state on disk costs beside one in memory: throughput, pauses, restore; features equal.

    python benchmarks/state_on_disk.py [--events 1000000] [--cards 200000] [--in-memory 20000]
    python benchmarks/state_on_disk.py --events 10000000 --cards 4000000 --in-memory 200000 \\
        --arms disk --folder build/state [--seconds 240]
    python benchmarks/state_on_disk.py --events 10100000 --cards 4000000 --in-memory 200000 \\
        --arms disk --folder build/state --rate 3000 --chunk 60 [--cold] [--alone]

The same payments go in chunks of 512 to a state that is all in memory and to one of which at most
``--in-memory`` cards, terminals, customers and devices are, in turns, each with checkpoints every
``--interval`` seconds of its own time; their rows must be equal, bit for bit. Half of the payments
are of a tenth of the cards. Told are CPU time a payment (of all threads; of the process that writes
by itself), how long each chunk was held up by the checkpoints, what the snapshot of the whole takes
instead, and how long a new process needs until it has answered its first chunk from either.

With ``--folder`` the state on disk is kept, and the same command goes on where its last checkpoint
was, until there are ``--events`` or ``--seconds`` have passed. With ``--rate`` a chunk is due at
its time, as payments come; told is how much later than that it was answered. With ``--cold``
nothing of the folder is in the system's caches at first. What a chunk will ask for is read ahead of
it, as a worker does; with ``--alone`` each part is read when it is needed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

from plinth.pipelines.interpreter import STREAM_THRESHOLDS, set_for_serving
from plinth.pipelines.state.snapshots import read_snapshot, write_snapshot
from plinth.pipelines.state.store import BEGIN_AT, FULL_AT, DiskStore, KeptState
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features import parts
from plinth.verticals.finance.features.online import Batch, Event

CHUNK = 512
TURN = 40
"""Chunks of a turn: long enough to fill caches, short enough that both arms see the same load."""
ORIGIN = {"vertical": "finance"}
BUILD = Path(__file__).resolve().parent.parent / "build"
"""On a disk: a folder for temporary files may be in memory."""
START = 1_700_000_000_000
PER_SECOND = 500
TABLES = ("cards", "terminals", "customers", "devices")
ASKED: dict[str, Callable[[Event], str | None]] = {
    "cards": attrgetter("card"),
    "customers": attrgetter("customer"),
    "terminals": attrgetter("terminal"),
    "devices": attrgetter("device"),
}
"""What an event is of, by table."""


def payments(
    count: int, cards: int, seed: int = 0, *, start: int = 0, chunk: int = CHUNK
) -> Iterator[list[Event]]:
    """Payments in chunks: half of them of a tenth of the cards, ten cards to a terminal."""
    for first in range(start, count, chunk):
        draw = np.random.default_rng((seed, first))
        size = min(chunk, count - first)
        busy = draw.random(size) < 0.5
        number = np.where(busy, draw.integers(0, cards // 10, size), draw.integers(0, cards, size))
        place = draw.integers(0, max(cards // 10, 8), size)
        amount = np.round(draw.gamma(2.0, 30.0, size), 2)
        yield [
            Event(
                f"x{first + at}",
                START + (first + at) * 1000 // PER_SECOND,
                float(amount[at]),
                f"tok_{number[at]:016x}",
                f"c{number[at]}",
                f"t{place[at]}",
                f"d{number[at]}" if at % 2 else None,
            )
            for at in range(size)
        ]


class Arm:
    """A state, and what it took."""

    def __init__(
        self, folder: Path | None, limit: int, interval: float, *, alone: bool = False
    ) -> None:
        limits: dict[str, Any] = {f"max_{table}": limit for table in TABLES}
        self.vertical = FraudScoring(FraudSettings(max_events=1_000_000_000, **limits))
        self.kept: KeptState | None = None
        self.taken = 0
        self._alone = alone
        if folder is not None:
            self.kept = KeptState(self.vertical, DiskStore(folder, ORIGIN))
            self.taken = self.kept.load().get("events", 0)
        self.before = self.taken
        self.late: list[float] = []
        self.cpu = 0.0
        self.pauses: list[float] = []
        self.steps: list[float] = []
        self.waits = 0
        self.checkpoints: list[float] = []
        self._interval = interval
        self._since = self._began = 0.0

    def take(self, events: list[Event]) -> Batch:
        """Take a chunk in, and go on with the checkpoint as a worker does between chunks."""
        began = time.perf_counter()
        if self.kept is not None and not self._alone:
            names = {table: map(asked, events) for table, asked in ASKED.items()}
            parts.foresee(self.vertical.state, self.kept.store, names)
        batch = self.vertical.state.update(events)
        self._since += time.perf_counter() - began
        self.taken += len(events)
        if self.kept is not None:
            self._look_after(self.kept)
        return batch

    def _look_after(self, kept: KeptState) -> None:
        began, cpu, unsaved = time.perf_counter(), time.thread_time(), self.vertical.unsaved()
        if not kept.busy and (self._since >= self._interval or unsaved >= BEGIN_AT):
            self._since, self._began = 0.0, began
            kept.begin({"events": self.taken})
        busy = kept.busy
        self.waits += unsaved >= FULL_AT
        if not kept.step() and busy:
            self.checkpoints.append(time.perf_counter() - self._began)
        self.pauses.append(time.perf_counter() - began)
        self.steps.append(time.thread_time() - cpu)


class Collections:
    """How long the interpreter stood still to look for garbage, seconds of CPU."""

    def __init__(self) -> None:
        self.longest = self._began = 0.0
        gc.callbacks.append(self._told)

    def _told(self, phase: str, info: dict[str, int]) -> None:
        now = time.thread_time()
        if phase == "stop":
            self.longest = max(self.longest, now - self._began)
        self._began = now


def forget_pages(path: Path) -> None:
    """Have a file in no cache, as after a start of the machine; no process may have it mapped."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Note seconds."""
    began = time.perf_counter()
    yield
    into[name] = time.perf_counter() - began


def flood(arms: Sequence[Arm], chunks: Iterator[list[Event]], seconds: float) -> int:
    """Chunks to all arms, in turns, as fast as they go; how many turns had other features."""
    until, unequal = time.monotonic() + seconds, 0
    while time.monotonic() < until and (turn := list(islice(chunks, TURN))):
        rows: set[bytes] = set()
        for arm in random.sample(arms, len(arms)):
            began = time.process_time()
            taken = [arm.take(chunk) for chunk in turn]
            arm.cpu += time.process_time() - began
            rows.add(b"".join(one.rows.tobytes() + one.flags.tobytes() for one in taken))
        unequal += len(rows) > 1
    return unequal


def pace(arm: Arm, chunks: Iterator[list[Event]], rate: float, seconds: float) -> None:
    """Chunks when they are due; notes by how many seconds later than that each was answered."""
    due = time.perf_counter()
    until, cpu = due + seconds, time.process_time()
    for chunk in chunks:
        due += len(chunk) / rate
        if due > until:
            break
        time.sleep(max(0.0, due - time.perf_counter()))
        arm.take(chunk)
        arm.late.append(time.perf_counter() - due)
    arm.cpu = time.process_time() - cpu


def told(name: str, arm: Arm) -> dict[str, float]:
    """Figures of an arm."""
    figures = {f"{name}: CPU us a payment": arm.cpu / max(1, arm.taken - arm.before) * 1e6}
    if arm.late:
        late = np.sort(arm.late) * 1e3
        for share in (0.5, 0.99, 0.999, 1.0):
            place = min(int(len(late) * share), len(late) - 1)
            figures[f"answered after it was due, ms p{share * 100:g}"] = float(late[place])
    if arm.kept is not None and arm.pauses:
        pauses = np.sort(arm.pauses) * 1e3
        figures["payments in the state"] = arm.taken
        figures["held up ms a chunk p99"] = float(pauses[int(len(pauses) * 0.99)])
        figures["held up ms a chunk max"] = float(pauses[-1])
        figures["of CPU ms a chunk max"] = max(arm.steps) * 1e3
        figures["chunks that waited for the disk"] = arm.waits
        figures["checkpoints"] = len(arm.checkpoints)
        figures["checkpoint s max"] = max(arm.checkpoints, default=0.0)
    return figures


def restored(figures: dict[str, float], folder: Path, arms: dict[str, Arm], given: Any) -> None:
    """How long a snapshot takes, and how long until a new state has answered a chunk."""
    chunk = next(payments(CHUNK, given.cards, seed=1))
    chunk = [one._replace(transaction=f"y{n}", time=START * 2) for n, one in enumerate(chunk)]
    if (memory := arms.get("memory")) is not None:
        with timed(figures, "snapshot pause s"):
            write_snapshot(folder / "snapshot", ORIGIN, memory.vertical.snapshot())
        expected = memory.take(chunk)
        memory.vertical = FraudScoring(memory.vertical.settings)
        with timed(figures, "restore of the snapshot s"):
            memory.vertical.restore(read_snapshot(folder / "snapshot", ORIGIN)[1])
            assert memory.take(chunk).rows.tobytes() == expected.rows.tobytes()
    if (disk := arms.get("disk")) is not None and disk.kept is not None:
        with timed(figures, "last checkpoint s"):
            disk.kept.finish()
            disk.kept.begin({"events": disk.taken})
            disk.kept.finish()
        figures["disk MiB"] = disk.kept.store.bytes_on_disk / (1 << 20)
        disk.kept.store.close()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        writing = (used.ru_utime + used.ru_stime) / max(1, disk.taken - disk.before)
        figures["disk: CPU us a payment, process that writes"] = writing * 1e6
        with timed(figures, "restore from disk s"):
            again = Arm(folder / "state", given.in_memory, given.interval)
            rows = again.take(chunk).rows.tobytes()
        assert memory is None or rows == expected.rows.tobytes()
        assert again.kept is not None
        again.kept.store.close()


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--cards", type=int, default=200_000)
    parser.add_argument("--in-memory", type=int, default=20_000)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between checkpoints")
    parser.add_argument("--arms", nargs="+", default=["memory", "disk"], choices=["memory", "disk"])
    parser.add_argument("--chunk", type=int, default=CHUNK, help="payments of a chunk")
    parser.add_argument("--rate", type=float, default=0, help="payments a second; 0: at once")
    parser.add_argument("--cold", action="store_true", help="begin with none of it in caches")
    parser.add_argument("--alone", action="store_true", help="read each part when it is needed")
    parser.add_argument("--folder", type=Path, help="keeps the state on disk, to go on with it")
    parser.add_argument("--seconds", type=float, default=1e9, help="of this run at most")
    given = parser.parse_args()
    if (given.folder is not None or given.rate) and given.arms != ["disk"]:
        parser.error("--folder and --rate are for the state on disk alone: --arms disk")
    figures: dict[str, float] = {}
    BUILD.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=BUILD) as name,
        set_for_serving(STREAM_THRESHOLDS),
    ):
        folder, garbage = given.folder or Path(name), Collections()
        places = {"memory": (None, 100_000_000), "disk": (folder / "state", given.in_memory)}
        if given.cold:
            forget_pages(folder / "state" / "parts.lmdb")
        arms = {one: Arm(*places[one], given.interval, alone=given.alone) for one in given.arms}
        start, unequal = max(arm.taken for arm in arms.values()), 0
        chunks = payments(given.events, given.cards, start=start, chunk=given.chunk)
        if given.rate:
            pace(arms["disk"], chunks, given.rate, given.seconds)
        else:
            unequal = flood(list(arms.values()), chunks, given.seconds)
        for one, arm in arms.items():
            figures |= told(one, arm)
        figures["of CPU ms a look for garbage max"] = garbage.longest * 1e3
        if len(arms) == 2:
            figures["turns with other features"] = unequal
        restored(figures, folder, arms, given)
    figures["RSS MiB of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if given.json:
        print_json(figures)
        return
    table = Table(title=f"{given.events:,} payments of {given.cards:,} cards")
    table.add_column("")
    table.add_column("", justify="right")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,.2f}")
    Console().print(table)
    if unequal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
