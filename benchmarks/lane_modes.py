"""The modes of several lanes on emulated device time: small requests, and studies of 200 items.

    python benchmarks/lane_modes.py [--lanes 4] [--seconds 10] [--rate 60] [--repeats 3] [--json]

A batch of n rows holds its lane 5 ms + 1 ms x n and does nothing else, so that lanes of one machine
are as independent as devices. Requests of one row come at random (Poisson) times, due in 500 ms; a
study of 200 items is asked for as soon as the last one is back, due in 5 s. Each figure is the
median of the repeats, which go through the modes in turns. Answers are the same bits in all modes.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Mapping
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
MODES: Mapping[str, Mapping[str, Any]] = {
    "async": {"mode": "async"},
    "sync": {"mode": "sync"},
    "hybrid": {"mode": "hybrid", "sync_threshold": 64},
}


class Emulated(nn.Module):
    """A forward that takes the time of a device, and none of the host's."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows (n, 4), doubled after 5 ms + 1 ms x n."""
        time.sleep(0.005 + 0.001 * len(x))
        return 2 * x


def emulated() -> Model:
    """The model."""
    spec = ModelSpec(
        name="net",
        inputs=(TensorSpec(name="x", shape=(4,)),),
        outputs=(TensorSpec(name="y", shape=(4,)),),
    )
    return Model(spec, Emulated().eval())


def measured(
    mode: str, lanes: int, seconds: float, rate: float, *, studies: bool
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

    def told(due: float, done: Any) -> None:
        if isinstance(done.exception(), PlinthError):
            refused.append(done.exception().reason)
        else:
            small.append(time.monotonic() - due)

    with Engine(devices=["cpu"] * lanes, threads=1, modes=MODES[mode]) as engine:
        engine.add(emulated(), batch_range=(1, 256), sla=SMALL)
        thread = threading.Thread(target=ask_studies, args=(engine,))
        if studies:
            thread.start()
        choose, due = random.Random(7), time.monotonic()
        until = due + seconds
        while due < until:
            due += choose.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            future = engine.submit(Call("net", torch.ones(1, 4)))
            future.add_done_callback(partial(told, due))
        over.set()
        if studies:
            thread.join()
    return {"mode": mode, "small": small, "large": large, "refused": len(refused)}


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
    for studies in (False, True):
        runs = [
            measured(mode, given.lanes, given.seconds, given.rate, studies=studies)
            for _ in range(given.repeats)
            for mode in MODES
        ]
        for mode in MODES:
            own = [run for run in runs if run["mode"] == mode]
            results[f"{mode}, {'beside studies' if studies else 'alone'}"] = figures(own)
    if given.json:
        print_json(results)
        return
    columns = ("small_p50", "small_p99", "refused", "study_p50", "study_p99", "studies")
    table = Table("mode", *(name.replace("_", " ") for name in columns))
    for name, each in results.items():
        table.add_row(name, *(f"{each[c]:.1f}" if c in each else "" for c in columns))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
