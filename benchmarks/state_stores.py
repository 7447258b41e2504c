"""Which embedded key-value store suits the state of a stream: a bank's cards, on disk.

    python benchmarks/state_stores.py [--entities 500000] [--rounds 10] [--changed 20000] [--json]

Each store is filled with so many entities of 200 to 3,000 bytes, as packed cards are. Then, as a
worker does, every round writes the entities that changed since the last one, in parts of 256, and
makes them durable together with a mark that says which round they belong to, all on a thread beside
one that scores without a rest. Told are how long that one was kept from going on at most and
how much slower it was (the interpreter's lock), how long a round and its commit took, the
time to read an entity that is not in memory, and what it takes: CPU, disk, memory.

Stores whose package is not installed are left out: ``pip install rocksdict``.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

PART = 256
MARK = b"mark"
BUILD = Path(__file__).resolve().parent.parent / "build"
"""On a disk: a folder for temporary files may be in memory."""
PUT = "INSERT INTO state VALUES (?, ?) ON CONFLICT DO UPDATE SET v = excluded.v"
NOISE = random.Random(0).randbytes(1 << 16)


class Store(Protocol):
    """What the measurement asks of a store."""

    def put(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Add to what the next commit makes durable."""

    def commit(self, mark: bytes) -> None:
        """Make all that was put durable, with a mark, or none of it."""

    def get(self, key: bytes) -> bytes | None:
        """A committed value."""

    def close(self) -> None:
        """Close it."""


class Sqlite:
    """SQLite with its log written ahead, synced at every commit."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "state.db", isolation_level=None)
        for pragma in (
            "page_size=8192",
            "journal_mode=WAL",
            "synchronous=FULL",
            "cache_size=-32768",
            "wal_autocheckpoint=4096",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE IF NOT EXISTS state (k BLOB PRIMARY KEY, v BLOB)")

    def put(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """See :class:`Store`."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        rows = ", ".join(["(?, ?)"] * len(pairs))
        self._db.execute(PUT.replace("(?, ?)", rows), [one for pair in pairs for one in pair])

    def commit(self, mark: bytes) -> None:
        """See :class:`Store`."""
        self.put([(MARK, mark)])
        self._db.execute("COMMIT")

    def get(self, key: bytes) -> bytes | None:
        """See :class:`Store`."""
        found = self._db.execute("SELECT v FROM state WHERE k = ?", (key,)).fetchone()
        return found[0] if found else None

    def close(self) -> None:
        """See :class:`Store`."""
        self._db.close()


class Lmdb:
    """LMDB: a mapped B+ tree, pages copied on write, synced at every commit."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self._env = lmdb.open(str(folder), map_size=1 << 36, readahead=False)
        self._open: Any = None

    def put(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """See :class:`Store`."""
        if self._open is None:
            self._open = self._env.begin(write=True)
        with self._open.cursor() as cursor:
            cursor.putmulti(pairs)

    def commit(self, mark: bytes) -> None:
        """See :class:`Store`."""
        self.put([(MARK, mark)])
        self._open.commit()
        self._open = None

    def get(self, key: bytes) -> bytes | None:
        """See :class:`Store`."""
        with self._env.begin() as reading:
            found: bytes | None = reading.get(key)
        return found

    def close(self) -> None:
        """See :class:`Store`."""
        self._env.close()


class RocksDb:
    """RocksDB by rocksdict: log and sorted files, one batch a commit, synced."""

    def __init__(self, folder: Path) -> None:
        from rocksdict import BlockBasedOptions, Cache, Options, Rdict, WriteBatch, WriteOptions

        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(32 << 20)
        options.set_max_write_buffer_number(2)
        blocks = BlockBasedOptions()
        blocks.set_block_cache(Cache(64 << 20))
        blocks.set_bloom_filter(10, False)
        options.set_block_based_table_factory(blocks)
        self._db = Rdict(str(folder), options)
        self._new_batch: Any = partial(WriteBatch, raw_mode=True)
        self._batch: Any = self._new_batch()
        self._synced = WriteOptions()
        self._synced.sync = True

    def put(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """See :class:`Store`."""
        put = self._batch.put
        for key, value in pairs:
            put(key, value)

    def commit(self, mark: bytes) -> None:
        """See :class:`Store`."""
        self._batch.put(MARK, mark)
        self._db.write(self._batch, self._synced)
        self._batch = self._new_batch()

    def get(self, key: bytes) -> bytes | None:
        """See :class:`Store`."""
        found: bytes | None = self._db.get(key)
        return found

    def close(self) -> None:
        """See :class:`Store`."""
        self._db.close()


STORES: dict[str, tuple[Any, str | None]] = {
    "sqlite": (Sqlite, None),
    "lmdb": (Lmdb, "lmdb"),
    "rocksdb": (RocksDb, "rocksdict"),
}


def value(number: int, turn: int) -> bytes:
    """An entity as it is in a round: 200 to 3,000 bytes, mostly few."""
    size = 200 + (number * 2_654_435_761 % 2_800) * (number * 40_503 % 1_000) // 1_000
    at = (number * 31 + turn * 7) % (len(NOISE) - 4_000)
    return b"%08d" % turn + NOISE[at : at + size]


def key(number: int) -> bytes:
    """Tokens come in no order."""
    return b"c%016x" % (number * 0x9E3779B97F4A7C15 % (1 << 64))


@contextlib.contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Note how long it took, milliseconds."""
    began = time.perf_counter()
    yield
    times.append((time.perf_counter() - began) * 1e3)


def write(store: Store, numbers: list[int], turn: int, commits: list[float]) -> float:
    """Write a round and commit it; seconds of CPU."""
    began = time.thread_time()
    for first in range(0, len(numbers), PART):
        store.put([(key(n), value(n, turn)) for n in numbers[first : first + PART]])
    with timed(commits):
        store.commit(b"%08d" % turn)
    return time.thread_time() - began


def scored(work: Callable[[], bool]) -> tuple[int, float, float]:
    """Score while there is work: steps, the longest from one to the next, seconds in all."""
    steps, stall = 0, 0.0
    began = last = time.perf_counter()
    while work():
        sum(range(1_000))
        now = time.perf_counter()
        steps, stall, last = steps + 1, max(stall, now - last), now
    return steps, stall, last - began


def _runs(work: Future[Any]) -> bool:
    return not work.done()


def rounds(
    store: Store, given: Any, pool: ThreadPoolExecutor, commits: list[float]
) -> dict[str, float]:
    """Write what changes in each round, beside a thread that scores."""
    draw, stalls, cpu, slower, took = random.Random(1), [0.0], 0.0, [1.0], [0.0]
    until = time.perf_counter() + 1.0
    steps, _, seconds = scored(lambda: time.perf_counter() < until)
    alone = steps / seconds
    for turn in range(1, given.rounds + 1):
        changed = draw.sample(range(given.entities), given.changed)
        writing = pool.submit(write, store, changed, turn, commits)
        steps, stall, seconds = scored(partial(_runs, writing))
        cpu += writing.result()
        stalls.append(stall)
        took.append(seconds)
        slower.append(alone * seconds / max(steps, 1))
    return {
        "stall_ms_max": max(stalls) * 1e3,
        "scoring_slower": statistics.median(slower),
        "round_s_max": max(took),
        "write_us": cpu / given.rounds / given.changed * 1e6,
    }


def measure(name: str, given: Any, folder: Path) -> dict[str, float]:
    """One store; milliseconds, microseconds of CPU, mebibytes."""
    made = STORES[name][0]
    commits: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        store: Store = pool.submit(made, folder).result()
        for first in range(0, given.entities, 20_000):
            numbers = list(range(first, min(given.entities, first + 20_000)))
            pool.submit(write, store, numbers, 0, []).result()
        figures = rounds(store, given, pool, commits)
        pool.submit(store.close).result()
    opening: list[float] = []
    with timed(opening):
        store = made(folder)
        assert store.get(MARK) == b"%08d" % given.rounds
    reads: list[float] = []
    draw = random.Random(2)
    for number in draw.sample(range(given.entities), min(20_000, given.entities)):
        with timed(reads):
            found = store.get(key(number))
        assert found is not None
    store.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        **figures,
        "commit_ms_p50": statistics.median(commits),
        "commit_ms_max": max(commits),
        "read_us_p50": statistics.median(reads) * 1e3,
        "read_us_p99": statistics.quantiles(reads, n=100)[98] * 1e3,
        "open_ms": opening[0],
        "disk_mib": size / (1 << 20),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--entities", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--changed", type=int, default=20_000, help="entities in a round")
    parser.add_argument("--store", nargs="+", default=list(STORES), choices=list(STORES))
    parser.add_argument("--one", choices=list(STORES), help="used by itself")
    given = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    if given.one:
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            print(json.dumps(measure(given.one, given, Path(folder))))
        return
    report = {}
    for name in given.store:
        module = STORES[name][1]
        if module is not None and find_spec(module) is None:
            continue
        sizes = "entities", "rounds", "changed"
        asked = [word for size in sizes for word in (f"--{size}", str(getattr(given, size)))]
        told = subprocess.run(  # each has a process of its own, and so its own memory
            [sys.executable, __file__, *asked, "--one", name], capture_output=True, check=True
        )
        report[name] = json.loads(told.stdout)
    if given.json:
        print_json(report)
        return
    table = Table(title=f"{given.entities:,} entities, {given.changed:,} changed in a round")
    table.add_column("")
    for name in report:
        table.add_column(name, justify="right")
    for figure in next(iter(report.values()), {}):
        table.add_row(figure, *(f"{found[figure]:,.2f}" for found in report.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
