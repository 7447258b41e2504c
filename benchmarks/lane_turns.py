"""What a lane takes from one batch to the next, and how soon callers ask again, in turns.

    python benchmarks/lane_turns.py [--rate 300] [--seconds 20] [--alerts 0.12] [--json]

One process, as a server has it: callers in an event loop ask for a small model at a Poisson rate,
and every answer takes the loop 0.2 ms of CPU; some ask a second time (alerts). Beside them windows
without end. By turns of half a second callers go on at once, pause before those 0.2 ms, or also
say what an alert will ask. Printed: milliseconds from the end of a batch until the next has begun
while work waited, after urgent batches and after windows; and for each way how long an answer was
away until its caller asked again, the latency of all and of alerts, and windows per second.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import uvloop  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from plinth.engine import (  # noqa: E402
    Batch,
    Batcher,
    Call,
    Engine,
    Flow,
    LatencyModel,
    Model,
    ModelSpec,
    Pause,
    Sla,
    TensorSpec,
)
from plinth.pipelines.interpreter import set_for_serving  # noqa: E402

BEFORE, CHECK, AFTER = 85e-6, 20e-6, 190e-6
"""CPU seconds of a caller: before it asks, to see whether it is an alert, to write its answer."""
WINDOWS, AGAIN = 10, 64
"""Windows of a study, and rows of a second question."""
HALF = 0.5
WAYS = ("at once", "paused", "foreseen")
QUANTILES = (0.1, 0.5, 0.9, 0.99)


class Layers(nn.Module):
    """Some milliseconds of matrix products beside rows that pass through."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.linear = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        """Rows twice."""
        state = torch.ones(256, 512)
        for _ in range(self.times):
            state = self.linear(state)
        return x * 2


def model(name: str, width: int, times: int) -> Model:
    """A model of one input of this width."""
    spec = ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=(width,)),),
        outputs=(TensorSpec(name="y", shape=(width,)),),
    )
    return Model(spec, Layers(times).eval())


class Noting(Batcher):
    """Keeps when callers asked again, and counts windows, by what callers do."""

    way = WAYS[0]

    def __init__(self, latency: LatencyModel) -> None:
        super().__init__(latency)
        self.again: dict[str, list[float]] = defaultdict(list)
        self.windows: dict[str, int] = defaultdict(int)

    def followed(self, key: str, seconds: float) -> None:
        """See :class:`Batcher`."""
        self.again[self.way].append(seconds)
        super().followed(key, seconds)

    def finished(self, batch: Batch, seconds: float | None, now: float) -> None:
        """See :class:`Batcher`."""
        self.windows[self.way] += 0 if batch.urgent else batch.rows
        super().finished(batch, seconds, now)


def spend(seconds: float) -> None:
    """Use the CPU."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def payment(way: str, *, alert: bool) -> Flow[Tensor]:
    """One question, or two."""
    spend(BEFORE)
    asked: list[Call] = []

    def ahead(_: Tensor) -> Call | None:
        if not alert:
            return None
        asked.append(Call("urgent", torch.ones(AGAIN, 24)))
        return asked[0]

    then = ahead if way == "foreseen" else None
    found: Tensor = yield Call("urgent", torch.ones(1, 24), then=then)
    spend(CHECK)
    if alert:
        yield asked[0] if asked else Call("urgent", torch.ones(AGAIN, 24))
    elif way != "at once":
        yield Pause()
    spend(AFTER)
    return found


def study() -> Flow[Tensor]:
    """Windows that wait for nobody."""
    found: Tensor = yield Call("windows", torch.ones(WINDOWS, 64))
    return found


async def load(engine: Engine, batcher: Noting, given: Any) -> dict[tuple[str, bool], list[float]]:
    """Latencies by (way, alert)."""
    seen: dict[tuple[str, bool], list[float]] = defaultdict(list)
    over = asyncio.Event()
    draw = random.Random(given.seed)

    async def pay(kind: tuple[str, bool], due: float) -> None:
        await engine.run_async(payment(kind[0], alert=kind[1]), Sla(deadline_ms=5000))
        seen[kind].append(time.monotonic() - due)

    async def read() -> None:
        while not over.is_set():
            await engine.run_async(study(), Sla())

    readers = [asyncio.ensure_future(read()) for _ in range(2)]
    begun = due = time.monotonic()
    calls = []
    while due < begun + given.seconds:
        due += draw.expovariate(given.rate)
        batcher.way = WAYS[int((due - begun) / HALF) % len(WAYS)]
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        kind = batcher.way, draw.random() < given.alerts
        calls.append(asyncio.ensure_future(pay(kind, due)))
    await asyncio.gather(*calls)
    over.set()
    await asyncio.gather(*readers)
    return seen


def ms(values: list[float]) -> list[float]:
    """Quantiles in milliseconds."""
    return [round(1e3 * float(each), 2) for each in np.quantile(values, QUANTILES)]


def measured(given: Any) -> dict[str, list[float]]:
    """Quantiles of all that is printed, by what it is."""
    with tempfile.TemporaryDirectory() as folder:
        costs = LatencyModel(Path(folder) / "costs.json")
        batcher = Noting(costs)
        with set_for_serving(), Engine(batcher, threads=1, backend="eager") as engine:
            engine.add(model("urgent", 24, 1), batch_range=(1, 256), sla=Sla(deadline_ms=150))
            engine.add(model("windows", 64, 8), batch_range=(1, 1))
            seen = uvloop.run(load(engine, batcher, given))
        costs.save()
        turns = json.loads((Path(folder) / "costs.json").read_text())["turns"]
    found = {f"a batch after one of {key.split('@')[0]}": ms(turns[key]) for key in sorted(turns)}
    for way in WAYS:
        found[f"{way}: asked again after"] = ms(batcher.again[way])
        found[f"{way}: latency of alerts"] = ms(seen[way, True])
        found[f"{way}: latency of all"] = ms(seen[way, True] + seen[way, False])
        found[f"{way}: windows/s"] = [batcher.windows[way] / given.seconds * len(WAYS)]
    return found


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--rate", type=float, default=300.0, help="payments per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--alerts", type=float, default=0.12, help="share that asks again")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = measured(given)
    if given.json:
        print_json(found)
        return
    table = Table("milliseconds", *(f"{100 * each:g} %" for each in QUANTILES))
    for name, values in found.items():
        table.add_row(name, *(f"{each:.4g}" for each in values))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
