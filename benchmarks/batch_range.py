"""Does ``batch_range = "auto"`` find the best batch? Against an exhaustive search over sizes.

    python benchmarks/batch_range.py [--rounds 7] [--json]

Each model is added to the device twice with an empty cache: the first time ``auto`` measures, the
second time it remembers. Then every size (1, 2, 3, 4, 6, 8, 12 ... and what auto chose) is run,
all in turn in each round, each for at least ``--sample-ms``; the best has the highest median over
rounds. The search ends at ``--largest`` rows, at the memory budget, or where one batch takes 2 s.
Of many noisy medians the highest was also the luckiest, so auto's choice and the best then run
against each other, by turns; the share is the median of the rounds' ratios.

On one thread of a CPU, seconds are those of this process on its core, so that what else the
machine does stays out of the comparison; otherwise, and for what auto took, those of the wall.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from plinth.engine import ConfigError, LatencyModel, Model, ModelSpec, ModelStore, Sla, TensorSpec
from plinth.engine.backends.base import Executable
from plinth.engine.devices.device import Device, pick
from plinth.engine.runtime.loaded_model import LoadedModel, load_model
from plinth.verticals.finance.settings import STORE as FINANCE
from plinth.verticals.medical.vertical import STORE as MEDICAL

BACKENDS = ("eager", "onnxruntime")
WINDOW = (32, 48, 48)  # voxels (z, y, x) of the packaged CT analysis
SLOWEST = 2.0  # seconds of one batch
Rates = dict[int, list[float]]


# -- the models ------------------------------------------------------------------------------
def fraud() -> Model:
    """The packaged fraud model: rows of features."""
    return ModelStore(FINANCE).load("fraud")


def nodules() -> Model:
    """The packaged 3D network on windows of the size that CT analysis uses."""
    model = ModelStore(MEDICAL).load("nodules")

    def fixed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            tensor.model_copy(update={"shape": (tensor.shape[0], *WINDOW)}) for tensor in tensors
        )

    spec = model.spec
    sizes = {"inputs": fixed(spec.inputs), "outputs": fixed(spec.outputs)}
    return Model(spec.model_copy(update=sizes), model.module)


def mlp(name: str, features: int, width: int, layers: int, outputs: int) -> Model:
    """Linear layers with ReLU between them."""
    sizes = [features, *[width] * layers]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    module = nn.Sequential(*parts, nn.Linear(sizes[-1], outputs))
    return Model(_spec(name, (features,), (outputs,)), module.eval())


def convolutions() -> Model:
    """A small image classifier: 3 × 32 × 32 to 10 classes."""
    module = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 8 * 8, 10)),
    )
    return Model(_spec("conv", (3, 32, 32), (10,)), module.eval())


def _spec(name: str, takes: tuple[int, ...], gives: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(
        name=name,
        inputs=(TensorSpec(name="x", shape=takes),),
        outputs=(TensorSpec(name="y", shape=gives),),
    )


MODELS: dict[str, Callable[[], Model]] = {
    "fraud": fraud,
    "nodules": nodules,
    "mlp-64-256x3-1": lambda: mlp("mlp-64-256x3-1", 64, 256, 3, 1),
    "mlp-1024x5": lambda: mlp("mlp-1024x5", 1024, 1024, 4, 1024),
    "conv": convolutions,
}


# -- one model on one backend ----------------------------------------------------------------
@dataclass(frozen=True)
class Compared:
    """What auto chose, and what exhaustive search found.

    Args:
        auto: rows of the largest batch that auto chose; ``best``: of the fastest size.
        auto_rate: rows per second at auto's choice; ``best_rate``: at the fastest size.
        one_rate: rows per second one by one.
        share: auto's rate over the best's, median of rounds; ``least`` to ``most``: the range.
        seconds: to add the model while auto measures; ``again``: with what it remembered.
        fits: rows inside the memory budget.
        rates: rows per second by size.
    """

    model: str
    backend: str
    auto: int
    best: int
    auto_rate: float
    best_rate: float
    one_rate: float
    share: float
    least: float
    most: float
    seconds: float
    again: float
    fits: int
    rates: dict[int, float]


def compare(name: str, backend: str, given: argparse.Namespace) -> Compared:
    """Add a model with ``auto``, then search.

    Raises:
        ConfigError: the backend cannot run it.
    """
    device = pick("auto")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PLINTH_CACHE"] = cache
        model = MODELS[name]()
        first, seconds = _added(model, device, backend, given.threads)
        again, remembered = _added(model, device, backend, given.threads)
    if again.most != first.most or first.plan is None:
        raise SystemExit(f"{name}: auto chose {first.most} rows, then {again.most}")
    clock = time.process_time if (device.kind, given.threads) == ("cpu", 1) else time.perf_counter
    largest = min(given.largest, first.plan.max_rows)
    sample = given.sample_ms / 1e3
    tried = sorted({*sizes(largest), first.most})
    middle = medians(search(first, tried, given.rounds, sample, clock))
    best = max(middle, key=lambda rows: middle[rows])
    final = search(first, [first.most, best], given.final_rounds, 2 * sample, clock)
    shares = [mine / top for mine, top in zip(final[first.most], final[best], strict=True)]
    last = medians(final)
    return Compared(
        model=name,
        backend=backend,
        auto=first.most,
        best=best,
        auto_rate=last[first.most],
        best_rate=last[best],
        one_rate=middle[1],
        share=statistics.median(shares),
        least=min(shares),
        most=max(shares),
        seconds=seconds,
        again=remembered,
        fits=first.plan.max_rows,
        rates=middle,
    )


def _added(model: Model, device: Device, backend: str, threads: int) -> tuple[LoadedModel, float]:
    begun = time.perf_counter()
    loaded = load_model(
        *(model, Sla(), device, LatencyModel()),
        backend=backend,
        threads=threads,
        batch_range="auto",
    )
    return loaded, time.perf_counter() - begun


def sizes(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on: two for each doubling."""
    found = {1, 2}
    while max(found) < largest:
        found |= {3 * max(found) // 2, 2 * max(found)}
    return sorted(size for size in found if size <= largest)


def search(
    loaded: LoadedModel, sizes: list[int], rounds: int, sample: float, clock: Callable[[], float]
) -> Rates:
    """Rows per second of every size, one figure for each round."""
    executable, chosen = loaded.executable, loaded.most
    inputs = loaded.spec.example(max(sizes))
    rates: Rates = {}
    repeats: dict[int, int] = {}
    for size in sorted(set(sizes)):
        rows = _first(inputs, size)
        executable.run(rows)
        seconds = _seconds(executable, rows, 1, clock)
        if seconds > SLOWEST and size > chosen:
            break
        rates[size], repeats[size] = [], max(1, round(sample / max(seconds, 1e-6)))
    order = random.Random(7)
    for _ in range(rounds):
        for size in order.sample(list(rates), len(rates)):
            spent = _seconds(executable, _first(inputs, size), repeats[size], clock)
            rates[size].append(size * repeats[size] / spent)
    return rates


def medians(rates: Rates) -> dict[int, float]:
    """The middle figure of each size."""
    return {rows: statistics.median(seen) for rows, seen in rates.items()}


def _first(inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: tensor[:rows] for name, tensor in inputs.items()}


def _seconds(
    executable: Executable, rows: Mapping[str, Tensor], times: int, clock: Callable[[], float]
) -> float:
    begun = clock()
    for _ in range(times):
        executable.run(rows)
    executable.device.synchronize()
    return max(clock() - begun, 1e-9)


# -- the report ------------------------------------------------------------------------------
def show(found: list[Compared], refused: list[str], rounds: int) -> None:
    """Print a line for each model and backend."""
    table = Table(
        *("model", "backend", "auto, rows", "best, rows", "rows/s one by one", "at auto"),
        *("at best", "auto / best (range)", "fits, rows", "found in, s", "again, s"),
        title=f"auto against exhaustive search, median of {rounds} rounds",
    )
    for one in found:
        table.add_row(
            *(one.model, one.backend, f"{one.auto:,}", f"{one.best:,}", f"{one.one_rate:,.0f}"),
            *(f"{one.auto_rate:,.0f}", f"{one.best_rate:,.0f}"),
            f"{one.share:.1%} ({one.least:.1%} to {one.most:.1%})",
            *(f"{one.fits:,}", f"{one.seconds:.1f}", f"{one.again:.2f}"),
        )
    console = Console(width=150)
    for line in refused:
        console.print(line)
    console.print(table)


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one forward")
    parser.add_argument("--largest", type=int, default=1024, help="rows that the search ends at")
    parser.add_argument("--rounds", type=int, default=7, help="of the search over all sizes")
    parser.add_argument("--final-rounds", type=int, default=21, help="of auto against the best")
    parser.add_argument("--sample-ms", type=float, default=20.0, help="of one size in a round")
    given = parser.parse_args()
    torch.manual_seed(0)
    found: list[Compared] = []
    refused: list[str] = []
    for name in given.models:
        for backend in given.backends:
            try:
                found.append(compare(name, backend, given))
            except ConfigError as error:
                refused.append(error.message)
    if given.json:
        print_json({"found": [asdict(one) for one in found], "refused": refused})
        return
    show(found, refused, given.final_rounds)


if __name__ == "__main__":
    main()
