"""What a change of the model costs the payments that come meanwhile.

    python benchmarks/model_swap.py [--rate 5000] [--seconds 15] [--rounds 6] [--json]

Open loop: a chunk of payments is due every ``--chunk-ms``, whether or not the one before was
answered, as a stream's door takes them: parse, the vertical's flow on the engine, encode. Beside it
runs what follows the store in ``plinth serve`` and ``plinth stream``. Every pass sends the same
payments to the same state, so that features, alerts and their reasons are the same; passes without
changes and passes in which the champion changes about every two seconds (promoted and rolled back
by hand, as ``plinth finance`` does it) go in turns, in random order within a round. A payment's
latency counts from when it was due. Every payment must be answered, by a version that is named.

What changes add is told three ways: the 99th percentile of the passes of a round, one less the
other; how much later each chunk was than the median of the same chunk in the passes without changes
(99th percentile, and the same of those passes themselves, which is the noise); and how many chunks
were later by 10 ms and more.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from head import parser_of, print_json

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from plinth.engine import Engine, ModelStore, Sla
from plinth.engine.compression.training import Compressed
from plinth.pipelines.assembly import running
from plinth.pipelines.config.settings import Config
from plinth.pipelines.interpreter import set_for_serving
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.succession.champion import Champion
from plinth.verticals.finance.training.derived import scorer
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json

CHANGE_S = 2.0
BEFORE = 50_000
"""Payments that make the state, before anything is timed."""
WARM_S = 150.0
SECOND = "2.0.0"


@dataclass(slots=True)
class Pass:
    """Latencies in milliseconds, one for each chunk, and who answered."""

    latencies: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    alerts: int = 0
    sent: int = 0
    changes: int = 0

    @property
    def answered(self) -> int:
        """Payments with a decision that names its version."""
        return self.versions.total() - self.versions["None"]


def two_versions(folder: Path) -> Path:
    """The model that comes with Plinth, twice, the second hardly other: it has the same alerts."""
    for name in ("fraud", "fraud-lite"):
        shutil.copytree(STORE / name, folder / name)
        shipped = ModelStore(STORE)
        stored, spec = shipped.network(name), shipped.verify(name)
        with torch.no_grad():
            scorer(stored).calibration.shift += 1e-6
        now = stored.as_now() if isinstance(stored, Compressed) else stored
        other = spec.model_copy(update={"version": SECOND})
        ModelStore(folder).save(other, now, facts=shipped.facts(name))
    Champion(folder).promote(spec.version, by="hand", champion=None)
    return folder


@contextmanager
def changing(store: Path, found: Pass) -> Iterator[None]:
    """Let another version answer every two seconds."""
    stop = threading.Event()

    def work() -> None:
        champion = Champion(store)
        first = ModelStore(store).versions("fraud")[0]
        while not stop.wait(CHANGE_S):
            now = champion.version()
            champion.promote(first if now == SECOND else SECOND, by="hand", champion=now)
            found.changes += 1

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def drive(
    vertical: FraudScoring, engine: Engine, raws: list[bytes], chunk: int, gap: float
) -> Pass:
    """Send all records, a chunk every ``gap`` seconds."""
    found = Pass()
    begun = time.perf_counter() + gap
    for number, start in enumerate(range(0, len(raws), chunk)):
        due = begun + number * gap
        time.sleep(max(0.0, due - time.perf_counter()))
        part = raws[start : start + chunk]
        found.sent += len(part)
        requests = [vertical.parse(raw) for raw in part]
        decisions: Any = engine.run(vertical.infer(requests), Sla()).value
        for decision in decisions:
            vertical.encode(decision)
        found.latencies.append((time.perf_counter() - due) * 1e3)
        found.alerts += sum(one.decision != "approve" for one in decisions)
        found.versions.update(str(getattr(one, "model_version", None)) for one in decisions)
    return found


def settle(vertical: FraudScoring, engine: Engine, store: Path, raws: list[bytes]) -> None:
    """Let what was promoted last take over, so that it does so within no pass.

    Raises:
        RuntimeError: it does not.
    """
    wanted, until = Champion(store).version(), time.monotonic() + WARM_S
    serving = vertical.versions.serving
    while serving.version != wanted or serving.name != "fraud":
        if time.monotonic() > until:
            raise RuntimeError(f"{wanted} does not answer within {WARM_S:g} s")
        drive(vertical, engine, raws[:100], 50, 0.05)
        serving = vertical.versions.serving


def warm_up(vertical: FraudScoring, engine: Engine, store: Path, raws: list[bytes]) -> None:
    """Let each version answer once: no first export and no first measurement is timed."""
    champion, first = Champion(store), ModelStore(store).versions("fraud")[0]
    for _ in range(2):
        now = champion.version()
        champion.promote(first if now == SECOND else SECOND, by="hand", champion=now)
        settle(vertical, engine, store, raws)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rate", type=int, default=5_000, help="payments a second")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a pass")
    parser.add_argument("--rounds", type=int, default=6, help="a pass of each kind in each")
    parser.add_argument("--chunk-ms", type=float, default=10.0)
    given = parser.parse_args()
    gap = given.chunk_ms / 1e3
    each, chunk = round(given.rate * given.seconds), round(given.rate * gap)
    people = Population(days=5 + (each + BEFORE) // 9_000)
    raws = list(transactions_json(simulate(people, seed=1)))
    before, part = raws[:BEFORE], raws[BEFORE : BEFORE + each]
    found: dict[str, list[Pass]] = {"plain": [], "changing": []}
    with tempfile.TemporaryDirectory() as folder:
        store = two_versions(Path(folder))
        settings = FraudSettings(store=store, max_ahead_seconds=None)
        vertical = FraudScoring(settings)
        with running(Config(), {"finance": vertical}, follow=True) as engine, set_for_serving():
            drive(vertical, engine, before, chunk, 0.0)
            warm_up(vertical, engine, store, before)
            state = vertical.snapshot()
            assert state is not None
            for _ in range(given.rounds):
                for kind in random.sample(list(found), len(found)):
                    settle(vertical, engine, store, before)
                    vertical.restore(state)
                    gc.collect()
                    counted = Pass()
                    with changing(store, counted) if kind == "changing" else nullcontext():
                        found[kind].append(drive(vertical, engine, part, chunk, gap))
                    found[kind][-1].changes = counted.changes
    print_json({kind: summary(passes) for kind, passes in found.items()} | added(found))


def summary(passes: list[Pass]) -> dict[str, Any]:
    """Figures of passes together."""
    values = np.concatenate([one.latencies for one in passes])
    return {
        "payments": sum(one.sent for one in passes),
        "dropped": sum(one.sent - one.answered for one in passes),
        "changes": sum(one.changes for one in passes),
        "alerts_of_each": [one.alerts for one in passes],
        "by_version": dict(sum((one.versions for one in passes), Counter())),
        **{f"p{q:g}_ms": round(float(np.percentile(values, q)), 2) for q in (50, 99, 99.9)},
        "max_ms": round(float(values.max()), 2),
        "p99_ms_of_each": [round(float(np.percentile(one.latencies, 99)), 2) for one in passes],
    }


def added(found: dict[str, list[Pass]]) -> dict[str, Any]:
    """What changes add, round by round and chunk by chunk."""
    tables = {kind: np.array([one.latencies for one in passes]) for kind, passes in found.items()}
    ends = {kind: np.percentile(table, 99, axis=1) for kind, table in tables.items()}
    rounds = np.sort(ends["changing"] - ends["plain"])
    usual = np.median(tables["plain"], axis=0)
    later = {kind: table - usual for kind, table in tables.items()}
    return {
        "added_p99_ms": {
            name: round(float(value), 2)
            for name, value in (
                ("median", np.median(rounds)),
                ("least", rounds[0]),
                ("most", rounds[-1]),
            )
        },
        "later_than_usual_p99_ms": {
            kind: round(float(np.percentile(table, 99)), 2) for kind, table in later.items()
        },
        "share_later_by_10_ms": {
            kind: round(float((table > 10).mean()), 5) for kind, table in later.items()
        },
    }


if __name__ == "__main__":
    main()
