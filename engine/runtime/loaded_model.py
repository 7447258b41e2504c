"""A model ready on a device: compiled, measured, with its batch range and its memory plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable
from plinth.engine.backends.choice import BACKENDS, compiled, prepare
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, OutOfMemory, PlinthError
from plinth.engine.flow import Sla
from plinth.engine.models.store import Model, ModelSpec
from plinth.engine.precision.policy import PRESETS, resolve
from plinth.engine.runtime import batch_range as ranges
from plinth.engine.runtime.memory_plan import MemoryPlan, measure
from plinth.engine.scheduler.cost_model import LatencyModel

Range = tuple[int, int] | Literal["auto"]
_MOST = 128
_MEASURED_ROWS = 16


@dataclass(slots=True)
class LoadedModel:
    """One model on the device.

    Args:
        model: what it is.
        sla: the promise for calls that bring none.
        executable: what runs it.
        most: rows of its largest batch.
        plan: its memory; ``None`` where sizes of its inputs are free.
        free: some size of its inputs is free, so that calls fall into shape buckets.
        key: prefix of its batch keys.
        asked: what it was loaded from and how, so that the same is not loaded twice.
        halvings: batches that did not fit into memory and were run in halves, so far.
    """

    model: Model
    sla: Sla
    executable: Executable
    most: int
    plan: MemoryPlan | None = None
    free: bool = field(init=False)
    key: str = field(init=False)
    halvings: int = field(init=False, default=0)
    asked: object = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.free = is_free(self.spec)
        runs = self.executable
        self.key = f"{self.spec.name}@{self.spec.version}#{self.model.digest()[:12]}"
        self.key += f"/{runs.device}/{runs.backend}/{runs.precision}"

    @property
    def spec(self) -> ModelSpec:
        """The model's contract."""
        return self.model.spec

    def bucket(self, rows: Mapping[str, Tensor]) -> str:
        """The batch key of rows: one for each model and shape."""
        if not self.free:
            return self.key
        shapes = (
            f"{tensor.name}={'x'.join(map(str, rows[tensor.name].shape[1:]))}"
            for tensor in self.spec.inputs
        )
        return f"{self.key}[{','.join(shapes)}]"

    def run(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run rows; what does not fit into memory is run in halves.

        Raises:
            OutOfMemory: not even one row fits.
            BaseException: whatever the model raises.
        """
        try:
            return self.executable.run(rows)
        except Exception as error:
            if isinstance(error, PlinthError) or not _is_out_of_memory(error):
                raise
            count = len(next(iter(rows.values())))
            if count == 1:
                raise self._too_large(error) from error
        self.halvings += 1
        self.most = min(self.most, max(1, count // 2))
        halves = [
            self.run({name: part[span] for name, part in rows.items()})
            for span in (slice(0, count // 2), slice(count // 2, count))
        ]
        return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}

    def _too_large(self, error: BaseException) -> OutOfMemory:
        available = self.executable.device.memory().available
        needed = self.plan.peak(1) if self.plan else available + 1
        return OutOfMemory(
            f"model {self.spec.name}: one row does not fit into memory",
            needed=max(needed, available + 1),
            available=available,
            hint="free memory, or use smaller inputs",
        )

    def status(self) -> dict[str, Any]:
        """What runs, for ``status`` pages: version, backend, precision, batch range, bytes."""
        plan = self.plan
        return {
            "version": self.spec.version,
            "backend": self.executable.backend,
            "precision": self.executable.precision,
            "largest_batch": self.most,
            "reason": self.executable.report.get("reason"),
            "weights_bytes": plan.weights if plan else None,
            "row_bytes": plan.per_row if plan else None,
        }


def load_model(
    model: Model,
    sla: Sla,
    device: Device,
    latency: LatencyModel,
    *,
    precision: str | Mapping[str, str] = "fp32",
    backend: str = "eager",
    threads: int | None = None,
    batch_range: Range = (1, _MOST),
    budget: int | str = "auto",
) -> LoadedModel:
    """Compile a model, measure its memory and its cost, and seed the latency model.

    Models whose inputs have free sizes run unprobed, on the eager backend unless another is
    named, and are measured by their first batches.

    Args:
        model: the model.
        sla: the promise for calls that bring none.
        device: where.
        latency: learns what batches cost.
        precision: a preset or a table; see :func:`plinth.engine.precision.policy.resolve`.
        backend: a name or ``"auto"``.
        threads: CPU threads; ``None`` as torch has it.
        batch_range: smallest and largest batch, or ``"auto"``: found by measuring.
        budget: bytes the model may take, or ``"auto"``.

    Raises:
        ConfigError: an impossible range, backend or precision.
        ModelError: nothing can run the model.
        OutOfMemory: not even one row fits into the budget.
    """
    low, high = (1, _MOST) if batch_range == "auto" else batch_range
    if not 1 <= low <= high:
        raise ConfigError(f"batch_range is {batch_range}, expected 1 <= smallest <= largest")
    spec = model.spec
    if is_free(spec):
        policy = resolve(precision)
        name = ("onnxruntime" if model.onnx else "eager") if backend == "auto" else backend
        if name not in BACKENDS:
            raise ConfigError(f"there is no backend {name!r}", hint=f"use {', '.join(BACKENDS)}")
        plain = PRESETS["fp32"] if policy.auto else policy
        executable = compiled(BACKENDS[name], model, device, plain, threads)
        return LoadedModel(model, sla, executable, high)
    probe = min(_MEASURED_ROWS, high)
    executable = prepare(model, device, precision, backend, threads, rows=probe)
    weights = sum(tensor.nbytes for tensor in model.module.state_dict().values())
    sizes = (1, max(2, probe))
    plan = measure(executable, spec.example, sizes, weights=weights, limit=budget)
    plan.check(low)
    if batch_range == "auto":
        found = ranges.remembered(model, executable)
        if found is None or found.most > plan.max_rows:
            found = ranges.find(executable, spec.example, plan.max_rows)
            ranges.remember(model, executable, found)
        most, cost = found.most, found.seconds
    else:
        most = min(high, plan.max_rows)
        sizes_tried = sorted({rows for rows in (1, 2, 4, 16, most) if rows <= most})
        cost = {rows: _cost(executable, spec, rows) for rows in sizes_tried}
    loaded = LoadedModel(model, sla, executable, most, plan)
    for rows, seconds in cost.items():
        latency.seed(loaded.key, rows, seconds)
    return loaded


def is_free(spec: ModelSpec) -> bool:
    """Whether some size of the inputs is free."""
    return any(None in tensor.shape for tensor in spec.inputs)


def _cost(executable: Executable, spec: ModelSpec, rows: int) -> float:
    example, times = spec.example(rows), []
    for _ in range(4):
        begun = perf_counter()
        executable.run(example)
        executable.device.synchronize()
        times.append(perf_counter() - begun)
    return median(times[1:])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return "can't allocate memory" in said or "Failed to allocate memory" in said
