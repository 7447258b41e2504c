"""The batch range of a model, found by measuring: how many rows at once pay, and how many fit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from engine.backends.base import Executable
from engine.cache import cache_folder
from engine.model import Model

LARGEST = 1024
NEAR_BEST = 0.98  # of the best throughput: beyond it more rows cost latency and give nothing
_SECONDS = 10.0
_SLOWEST = 2.0  # seconds; a batch that takes longer ends the search
_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Largest batch that pays, and what batches cost.

    Args:
        most: rows of the largest batch.
        seconds: measured cost by rows, up to ``most``.
    """

    most: int
    seconds: dict[int, float]


def find(
    executable: Executable,
    make_rows: Callable[[int], Mapping[str, Tensor]],
    fits: int,
    *,
    budget: float = _SECONDS,
) -> BatchRange:
    """Measure the throughput curve and take its knee.

    Sizes double from 1 to what fits, at most 1,024 rows; all sizes are run in turn, so that
    what else the machine does hits all alike. The knee is the smallest size with 98 % of the
    best throughput.

    Args:
        executable: the model, compiled.
        make_rows: inputs for so many rows.
        fits: most rows inside the memory budget.
        budget: seconds to spend, about.
    """
    sizes: list[int] = []
    times: dict[int, list[float]] = {}
    size = 1
    while size <= min(fits, LARGEST):
        example = make_rows(size)
        executable.run(example)
        sizes.append(size)
        times[size] = [_timed(executable, example)]
        if times[size][0] > _SLOWEST:
            break
        size *= 2
    until = time.perf_counter() + budget
    for _ in range(_ROUNDS):
        for size in sizes:
            times[size].append(_timed(executable, make_rows(size)))
        if time.perf_counter() > until:
            break
    cost = {size: median(times[size]) for size in sizes}
    best = max(size / cost[size] for size in sizes)
    most = next(size for size in sizes if size / cost[size] >= NEAR_BEST * best)
    return BatchRange(most, {size: cost[size] for size in sizes if size <= most})


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


def _timed(executable: Executable, inputs: Mapping[str, Tensor]) -> float:
    begun = time.perf_counter()
    executable.run(inputs)
    executable.device.synchronize()
    return time.perf_counter() - begun


def _file(model: Model, executable: Executable) -> Path:
    device = executable.device
    facts = (
        *(model.digest(), str(device), device.name, executable.backend, executable.precision),
        *(torch.__version__, str(executable.report.get("threads"))),
    )
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return cache_folder("batch-ranges") / f"{digest}.json"
