"""The modes of several lanes on emulated device time: small requests, studies, and a flood.

    python benchmarks/lane_modes.py [--lanes 4] [--seconds 10] [--rate 60] [--repeats 3] [--json]

A batch of n rows holds its lane 5 ms + 1 ms x n and does nothing else, so that lanes of one machine
are as independent as devices. Requests of one row come at random (Poisson) times, due in 500 ms; a
study of 200 items is due in 5 s, and asked for once a second, or as soon as the last one is back.
A flood are requests of 96 items, due in 1 s, at 1.2 times what the lanes can do in full batches.
Each figure is the median of the repeats, which go through the modes in turns. Answers are the same
bits in all modes.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Mapping
from concurrent.futures import wait
from functools import partial
from typing import Any

import numpy as np
import torch
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from plinth.engine import Call, Engine, Model, ModelSpec, PlinthError, Sla, TensorSpec

SMALL, STUDY, ITEMS = Sla(deadline_ms=500), Sla(deadline_ms=5_000), 200
FLOOD, FLOOD_ITEMS, OVERLOAD = Sla(deadline_ms=1_000), 96, 1.2
MOST = 256
MODES: Mapping[str, Mapping[str, Any]] = {
    "async": {"mode": "async"},
    "sync": {"mode": "sync"},
    "hybrid": {"mode": "hybrid"},
}
SCENES: Mapping[str, float | None] = {
    "alone": None,
    "a study a second": 1.0,
    "studies without a pause": 0.0,
}
"""Seconds from one study to the next at least; ``None``: there are none."""


class Emulated(nn.Module):
    """A forward that takes the time of a device, and none of the host's."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows (n, 4), doubled after 5 ms + 1 ms x n."""
        time.sleep(seconds_of(len(x)))
        return 2 * x


def emulated() -> Model:
    """The model."""
    spec = ModelSpec(
        name="net",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    return Model(spec, Emulated().eval())


def seconds_of(rows: int) -> float:
    """What a batch takes."""
    return 0.005 + 0.001 * rows


def measured(
    mode: str, lanes: int, seconds: float, rate: float, apart: float | None
) -> dict[str, Any]:
    """One run: milliseconds of small requests and of studies, and what was refused."""
    small: list[float] = []
    large: list[float] = []
    refused: list[str] = []
    over = threading.Event()
    study = torch.arange(ITEMS * 4.0).reshape(ITEMS, 4)

    def ask_studies(engine: Engine) -> None:
        while not over.is_set():
            begun = time.monotonic()
            value = engine.submit(Call("net", study), STUDY).result(60).value
            assert torch.equal(value, 2 * study)  # type: ignore[arg-type]
            large.append(time.monotonic() - begun)
            over.wait(max(0.0, begun + (apart or 0.0) - time.monotonic()))

    def told(due: float, done: Any) -> None:
        if isinstance(done.exception(), PlinthError):
            refused.append(done.exception().reason)
        else:
            small.append(time.monotonic() - due)

    with Engine(devices=["cpu"] * lanes, threads=1, modes=MODES[mode]) as engine:
        engine.add(emulated(), batch_range=(1, MOST), sla=SMALL)
        thread = threading.Thread(target=ask_studies, args=(engine,))
        if apart is not None:
            thread.start()
        choose, due = random.Random(7), time.monotonic()
        until = due + seconds
        while due < until:
            due += choose.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            future = engine.submit(Call("net", torch.ones(1, 4)))
            future.add_done_callback(partial(told, due))
        over.set()
        if apart is not None:
            thread.join()
    return {"mode": mode, "small": small, "large": large, "refused": len(refused)}


def flooded(mode: str, lanes: int, seconds: float) -> dict[str, Any]:
    """One run with more requests than the lanes can do: the share of that which was in time."""
    capacity = lanes * MOST / seconds_of(MOST) / FLOOD_ITEMS
    body, done = torch.ones(FLOOD_ITEMS, 4), list[float]()
    with Engine(devices=["cpu"] * lanes, threads=1, modes=MODES[mode]) as engine:
        engine.add(emulated(), batch_range=(1, MOST), sla=FLOOD)
        futures = []
        choose, begun = random.Random(7), time.monotonic()
        due = begun
        while due < begun + seconds:
            due += choose.expovariate(OVERLOAD * capacity)
            time.sleep(max(0.0, due - time.monotonic()))
            futures.append(engine.submit(Call("net", body)))
            futures[-1].add_done_callback(partial(_in_time, due, done))
        wait(futures, 60)
    return {"mode": mode, "flood": sum(at < begun + seconds for at in done) / seconds / capacity}


def _in_time(due: float, done: list[float], future: Any) -> None:
    now = time.monotonic()
    if future.exception() is None and now - due <= (FLOOD.deadline_ms or 0.0) / 1e3:
        done.append(now)


def figures(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The medians of the repeats of one mode."""

    def of(kind: str, share: float) -> float:
        return statistics.median(1e3 * float(np.percentile(run[kind], share)) for run in runs)

    found = {"small_p50": of("small", 50), "small_p99": of("small", 99)}
    found["refused"] = statistics.median(run["refused"] for run in runs)
    if all(run["large"] for run in runs):
        found |= {"study_p50": of("large", 50), "study_p99": of("large", 99)}
        found["studies"] = statistics.median(len(run["large"]) for run in runs)
    return found


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=60.0, help="small requests per second")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for scene, apart in SCENES.items():
        runs = [
            measured(mode, given.lanes, given.seconds, given.rate, apart)
            for _ in range(given.repeats)
            for mode in MODES
        ]
        for mode in MODES:
            results[f"{mode}, {scene}"] = figures([run for run in runs if run["mode"] == mode])
    floods = [
        flooded(mode, given.lanes, given.seconds) for _ in range(given.repeats) for mode in MODES
    ]
    for mode in MODES:
        shares = [run["flood"] for run in floods if run["mode"] == mode]
        results[f"{mode}, flood"] = {"flood": statistics.median(shares)}
    if given.json:
        print_json(results)
        return
    columns = ("small_p50", "small_p99", "refused", "study_p50", "study_p99", "studies", "flood")
    table = Table("mode", *(name.replace("_", " ") for name in columns))
    for name, each in results.items():
        table.add_row(name, *(f"{each[c]:.4g}" if c in each else "" for c in columns))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
