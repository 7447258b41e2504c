"""The batch range of a model, found by measuring: how many rows at once pay, and how many fit."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable
from plinth.engine.cache import cache_folder
from plinth.engine.models.store import Model

Clock = Callable[[], float]
LARGEST = 1024
NEAR_BEST = 0.98  # of the best throughput: beyond it more rows cost latency and give nothing
_SECONDS = 8.0
_CLIMB_SECONDS = 10.0  # of trying each size once
_LONG = 0.25  # seconds; the first run of so long a batch counts
_SLOWEST = 2.0  # seconds; a batch that takes longer ends the climb, as two far from the best do
_FAR = 0.7  # of the best throughput
_HOPE = 0.9  # of the best throughput; what is below it after a few rounds is not run again
_SAMPLE = 0.02  # seconds, at least, of one size in a round, the same for all: so are delays
_LONGEST = 0.1  # seconds; larger batches are run once a round
_ROUNDS = 21
_LOOKS = 3  # runs of a row that tell whether a model waits or was only delayed
_OWN = 0.1  # of its time, at least, that a model computes which does not mostly wait
_FORMAT = "2"  # of what is remembered


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Largest batch that pays, and what batches cost.

    Args:
        most: rows of the largest batch.
        seconds: measured cost by rows, up to ``most``.
    """

    most: int
    seconds: dict[int, float]


@dataclass(slots=True)
class _Size:
    """What was measured at one size: seconds of the wall a batch, and rows per second."""

    rows: int
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The upper quartile: what delays a round takes from it, and nothing gives."""
        return sorted(self.rates)[3 * len(self.rates) // 4]

    @property
    def cost(self) -> float:
        """Seconds a batch takes, as ``rate`` counts them."""
        return self.rows / self.rate

    def run(
        self, executable: Executable, inputs: Mapping[str, Tensor], clock: Clock, times: int
    ) -> None:
        """Run it so many times in a row."""
        rows = {name: tensor[: self.rows] for name, tensor in inputs.items()}
        begun, spent = time.perf_counter(), clock()
        for _ in range(times):
            executable.run(rows)
        executable.device.synchronize()
        spent, seconds = max(clock() - spent, 1e-9), time.perf_counter() - begun
        self.rates.append(self.rows * times / spent)
        self.seconds.append(seconds / times)


def find(
    executable: Executable,
    make_rows: Callable[[int], Mapping[str, Tensor]],
    fits: int,
    *,
    budget: float = _SECONDS,
) -> BatchRange:
    """Measure the throughput curve and take its knee.

    Sizes are 1, 2, 3, 4, 6, 8, 12 and so on, and what fits, at most 1,024 rows. They are run in
    turn, each for as long, so that what else the machine does hits all alike; those far from
    the best are left out after a few rounds. The knee is the smallest size with 98 % of the
    best throughput.

    Args:
        executable: the model, compiled.
        make_rows: inputs for so many rows.
        fits: most rows inside the memory budget.
        budget: seconds to spend, about, after each size has been run once, which takes about
            10 s at most.
    """
    clock = _clock(executable, make_rows(1))
    sizes, inputs = _climb(executable, make_rows, min(fits, LARGEST), clock)
    until = time.perf_counter() + budget
    hopeful = sizes
    for turn in range(_ROUNDS if len(sizes) > 1 else 0):
        sample = min(max(_SAMPLE, *(size.cost for size in hopeful)), _LONGEST)
        for size in hopeful:
            if turn and time.perf_counter() > until:
                break
            size.run(executable, inputs, clock, max(1, round(sample / size.cost)))
        if turn >= 2:
            best = max(size.rate for size in hopeful)
            hopeful = [size for size in hopeful if size.rate >= _HOPE * best]
    best = max(size.rate for size in hopeful)
    most = next(size.rows for size in hopeful if size.rate >= NEAR_BEST * best)
    return BatchRange(most, {s.rows: median(s.seconds) for s in sizes if s.rows <= most})


def _climb(
    executable: Executable,
    make_rows: Callable[[int], Mapping[str, Tensor]],
    largest: int,
    clock: Clock,
) -> tuple[list[_Size], Mapping[str, Tensor]]:
    """The sizes worth measuring, each run once, and inputs for the largest of them."""
    sizes: list[_Size] = []
    rows, best, far = 1, 0.0, 0
    until = time.perf_counter() + _CLIMB_SECONDS
    while rows <= largest:
        inputs = make_rows(rows)
        size = _Size(rows)
        size.run(executable, inputs, clock, 1)
        if size.seconds[0] < _LONG:
            size = _Size(rows)
            size.run(executable, inputs, clock, 1)
        for _ in range(2 if size.seconds[0] < _LONG else 0):
            if size.rate < _FAR * best:  # or only delayed
                size.run(executable, inputs, clock, 1)
        sizes.append(size)
        best = max(best, size.rate)
        far = far + 1 if size.rate < _FAR * best else 0
        if far > 1 or size.seconds[0] > _SLOWEST or time.perf_counter() > until:
            break
        step = rows * 3 // 2 if rows > 1 and rows & (rows - 1) == 0 else -(-rows * 4 // 3)
        rows = step if rows == largest else min(step, largest)
    return sizes, inputs


def _clock(executable: Executable, row: Mapping[str, Tensor]) -> Clock:
    """Seconds by which sizes are compared: this thread's own, where it does all the work.

    They leave out what other processes take of a core, and what a model waits for: one that
    mostly waits, for another process say, goes by the wall.
    """
    if executable.device.kind != "cpu" or executable.report.get("threads") != 1:
        return time.perf_counter
    for _ in range(_LOOKS):
        begun, spent = time.perf_counter(), time.thread_time()
        executable.run(row)
        seconds, own = time.perf_counter() - begun, time.thread_time() - spent
        if own >= _OWN * seconds:
            return time.thread_time
        if seconds >= _LONG:
            break
    return time.perf_counter


def remembered(model: Model, executable: Executable) -> BatchRange | None:
    """What :func:`find` found in an earlier run for this model, device, backend and precision."""
    path = _file(model, executable)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        cost = {int(size): float(seconds) for size, seconds in data["seconds"].items()}
        return BatchRange(int(data["most"]), cost) if int(data["most"]) in cost else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged or of another version: it is measured again and written anew


def remember(model: Model, executable: Executable, found: BatchRange) -> None:
    """Keep what was found for the next run."""
    path = _file(model, executable)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"most": found.most, "seconds": found.seconds}))
    part.replace(path)


def _file(model: Model, executable: Executable) -> Path:
    device = executable.device
    facts = (
        *(model.digest(), str(device), device.name, executable.backend, executable.precision),
        *(_FORMAT, torch.__version__, str(executable.report.get("threads"))),
        *(platform.python_version(), ",".join(device.dtypes)),
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_folder("batch-ranges") / f"{digest}.json"
