"""Sensitivity search: what each layer costs in fidelity and brings in time, and what to lower.

For each backend and each precision it has: the damage of every layer alone, measured on one
half of the rows; then layers go back to float32, greatest damage per second saved first, until
the whole loses no more than is allowed on the other half, which took no part in the choice.
What is timed is timed in turns with the reference, in CPU time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends import Executable, registry
from plinth.engine.backends.base import cpu_threads
from plinth.engine.backends.choice import compiled
from plinth.engine.backends.export import onnx_file
from plinth.engine.backends.quantised import TORCH_BACKENDS, NamedLayer, layers_of, scratch
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, PlinthError
from plinth.engine.models.store import Model
from plinth.engine.optimize.measures import Loss, Rows
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve

MIN_ROWS = 8
TIMED_SECONDS = 3.0  # of one candidate, about
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Task:
    """What is searched.

    Args:
        model: the model, whose float32 eager outputs (an ONNX file: ONNX Runtime's) are right.
        rows: rows (n, ...) by input name; every other one is held out.
        loss: what a faster way loses.
        max_loss: how much may be lost.
        labels: of the rows (n,), for measures that need them.
        device: where it runs.
        backends: names of those to try.
        batch: rows of a timed run.
        threads: of a run.
    """

    model: Model
    rows: Rows
    loss: Loss
    max_loss: float
    device: Device
    labels: Tensor | None = None
    backends: tuple[str, ...] = ("eager", "onnxruntime", "openvino")
    batch: int = 8
    threads: int = 1


@dataclass(slots=True)
class Point:
    """One candidate, and what was measured of it."""

    backend: str
    policy: PrecisionPolicy
    loss: float
    kept: int
    """Layers that stay float32 though their class was lowered."""
    speed: float = math.nan
    seconds: float = math.nan
    memory: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    executable: Executable | None = None

    @property
    def label(self) -> str:
        """Backend, precisions and how many layers were kept, for people."""
        used = "+".join(sorted(self.policy.used)) or "fp32"
        kept = f", {self.kept} layers fp32" if self.kept else ""
        return f"{self.backend} {used}{kept}"


@dataclass(slots=True)
class Found:
    """What a search found.

    Args:
        points: every candidate that was timed, in the order in which they were.
        best: the fastest within the allowed loss; ``None`` if none is faster than the reference.
        damage: loss of each layer alone, by backend and precision.
        refused: what could not be tried, and why.
        reference_seconds: CPU seconds of the reference for one batch.
        reference_memory: bytes of its weights.
        data_digest: SHA-256 over the rows.
        held_out: rows that losses of points were measured on.
    """

    points: list[Point]
    best: Point | None
    damage: dict[str, dict[str, float]]
    refused: dict[str, str]
    reference_seconds: float
    reference_memory: int
    data_digest: str
    held_out: int

    @property
    def front(self) -> list[Point]:
        """Points that none beats in both speed and loss, fastest first."""
        ordered = sorted(self.points, key=lambda p: (-p.speed, p.loss))
        front: list[Point] = []
        for point in ordered:
            if point.speed > 1 and all(point.loss < other.loss for other in front):
                front.append(point)
        return front


Say = Callable[[str], None]


def search(task: Task, folder: Path, say: Say = lambda _: None) -> Found:
    """Find the fastest way to compute a model within an allowed loss.

    Args:
        task: what is searched.
        folder: where the files of candidates are made; those of the points stay there.
        say: is told what goes on, a sentence at a time.

    Raises:
        ConfigError: too few rows, or no backend can run the model.
        InputError: rows that are not what the model takes, or that the measure cannot use.
    """
    task.model.spec.check(task.rows)
    count = len(next(iter(task.rows.values())))
    if count < MIN_ROWS:
        raise ConfigError(
            f"{count} rows are too few: half of them choose, half of them check",
            hint=f"give at least {MIN_ROWS}, better hundreds",
        )
    with cpu_threads(task.threads), scratch(folder):
        return _Search(task, say).run()


class _Search:
    def __init__(self, task: Task, say: Say) -> None:
        self.task, self.say = task, say
        model = task.model
        self.seen, self.held = (
            {name: tensor[first::2] for name, tensor in task.rows.items()} for first in (0, 1)
        )
        self.labels = (None, None) if task.labels is None else (task.labels[::2], task.labels[1::2])
        self.model = replace(model, example=self.seen, variants=None)
        self._exported: Model | None = None
        name = "onnxruntime" if model.onnx else "eager"
        self.reference = compiled(
            registry.find(name), self.model, task.device, PRESETS["exact"], task.threads
        )
        self.want = _outputs(self.reference, self.seen, task.batch)
        self.want_held = _outputs(self.reference, self.held, task.batch)
        self.refused: dict[str, str] = {}
        self.damage: dict[str, dict[str, float]] = {}

    def run(self) -> Found:
        points = [point for road in self._roads() for point in self._along(*road)]
        self.say(f"timing {len(points)} candidates in turns with the reference")
        self._time(points)
        fit = [p for p in points if p.loss <= self.task.max_loss and p.speed > 1]
        return Found(
            points,
            max(fit, key=lambda p: p.speed, default=None),
            self.damage,
            self.refused,
            self.reference_seconds,
            self.reference.weights,
            _digest(self.task.rows),
            len(next(iter(self.held.values()))),
        )

    def _for(self, backend: str) -> Model:
        """The model, exported once for the backends that take ONNX files."""
        if backend in TORCH_BACKENDS:
            return self.model
        if self._exported is None:
            self._exported = replace(self.model, onnx=onnx_file(self.model))
        return self._exported

    def _roads(self) -> Iterator[tuple[str, str]]:
        """Backends, each with a precision to lower layers to; fp32 first."""
        for backend in self.task.backends:
            try:
                registry.find(backend)
            except PlinthError as error:
                self.refused[backend] = error.message
                continue
            for precision in ("fp32", "bf16", "fp16", "int8", "int8_static", "int4"):
                low = precision in ("bf16", "fp16")
                if low and not self.task.device.native(precision):
                    self.refused[f"{backend} {precision}"] = (
                        f"{self.task.device.name or self.task.device} has no {precision} "
                        "instructions"
                    )
                    continue
                yield backend, precision

    def _along(self, backend: str, precision: str) -> list[Point]:
        """The points of one backend and precision: all layers low, and fewer and fewer."""
        label = f"{backend} {precision}"
        try:
            if precision == "fp32":
                return [self._point(backend, PRESETS["fp32"], 0)]
            whole = self._policy(backend, precision)
            first = self._point(backend, whole, 0)
        except PlinthError as error:
            self.refused[label] = error.message
            return []
        self.say(f"{label}: all layers lose {first.loss:.5f} on held-out rows")
        if first.loss <= self.task.max_loss:
            return [first]
        try:
            return [first, *self._kept(backend, precision, whole)]
        except PlinthError as error:
            self.refused[f"{label}, layer by layer"] = error.message
            return [first]

    def _policy(self, backend: str, precision: str) -> PrecisionPolicy:
        """All classes low that the backend has in this precision and that hold most weights."""
        have = registry.find(backend)
        classes = [
            name
            for name in ("matmul", "conv", "embedding", "attention", "recurrent", "activation")
            if have.supports(self._for(backend), self.task.device, resolve({precision: [name]}))
            is None
        ]
        if not classes:
            first = resolve({precision: ["matmul"]})
            reason = have.supports(self._for(backend), self.task.device, first)
            raise ConfigError(reason or f"it has nothing in {precision}")
        return resolve({precision: classes})

    def _kept(self, backend: str, precision: str, whole: PrecisionPolicy) -> Iterator[Point]:
        """Layers back to float32, greatest damage per second saved first, by bisection."""
        order = self._order(backend, precision, whole)
        low, high = 0, len(order)  # too much is lost at low; high loses nothing but time
        while high - low > 1:
            middle = (low + high) // 2
            point = self._point(backend, _keeping(whole, order[:middle]), middle)
            self.say(f"{backend} {precision}: {middle} layers fp32 lose {point.loss:.5f}")
            yield point
            if point.loss <= self.task.max_loss:
                high = middle
            else:
                low = middle

    def _order(self, backend: str, precision: str, whole: PrecisionPolicy) -> list[str]:
        layers = [
            layer
            for layer in layers_of(backend, self._for(backend), self.task.threads)
            if whole.of(layer.name, layer.op_class) == precision
        ]
        damage: dict[str, float] = {}
        for number, layer in enumerate(layers):
            alone = PrecisionPolicy(layers={layer.name: precision})  # type: ignore[dict-item]
            executable = self._compiled(backend, alone)
            got = _outputs(executable, self.seen, self.task.batch)
            for path in getattr(executable, "files", {}).values():
                path.unlink()
            damage[layer.name] = max(0.0, self.task.loss(got, self.want, self.labels[0]))
            self.say(
                f"{backend} {precision}: layer {number + 1} of {len(layers)}, {layer.name}, "
                f"alone loses {damage[layer.name]:.6f}"
            )
        self.damage[f"{backend} {precision}"] = damage
        return [layer.name for layer in sorted(layers, key=lambda one: -_rate(one, damage))]

    def _point(self, backend: str, policy: PrecisionPolicy, kept: int) -> Point:
        executable = self._compiled(backend, policy)
        executable.probe({name: tensor[: self.task.batch] for name, tensor in self.held.items()})
        got = _outputs(executable, self.held, self.task.batch)
        loss = self.task.loss(got, self.want_held, self.labels[1])
        return Point(
            backend,
            policy,
            max(0.0, loss),
            kept,
            memory=executable.weights,
            report=executable.report,
            executable=executable,
        )

    def _compiled(self, backend: str, policy: PrecisionPolicy) -> Executable:
        task = self.task
        executable = compiled(registry.find(backend), self.model, task.device, policy, task.threads)
        return executable

    def _time(self, points: list[Point]) -> None:
        """CPU seconds of a batch, in turns, each one against the reference of its round."""
        batch = {name: tensor[: self.task.batch] for name, tensor in self.held.items()}
        ratios: list[list[float]] = [[] for _ in points]
        spent: list[list[float]] = [[] for _ in points]
        base: list[float] = []
        self.reference.run(batch)
        seconds = max(_cpu_seconds(self.reference, batch, 1), 1e-6)
        repeats = max(1, min(200, int(TIMED_SECONDS / ROUNDS / seconds / 2)))
        rounds = ROUNDS if seconds * ROUNDS < 2 * TIMED_SECONDS else 3
        for _ in range(rounds):
            reference = _cpu_seconds(self.reference, batch, repeats)
            base.append(reference)
            for number, point in enumerate(points):
                assert point.executable is not None
                own = _cpu_seconds(point.executable, batch, repeats)
                ratios[number].append(reference / own)
                spent[number].append(own)
        self.reference_seconds = median(base)
        for point, ratio, own_seconds in zip(points, ratios, spent, strict=True):
            point.speed, point.seconds = median(ratio), median(own_seconds)


def _keeping(policy: PrecisionPolicy, layers: list[str]) -> PrecisionPolicy:
    return replace(policy, layers=dict.fromkeys(layers, "fp32"), name="")


def _rate(layer: NamedLayer, damage: Mapping[str, float]) -> float:
    return damage[layer.name] / max(layer.seconds, 1e-9)


def _outputs(executable: Executable, rows: Rows, batch: int) -> dict[str, Tensor]:
    count = len(next(iter(rows.values())))
    parts = [
        executable.run({name: tensor[first : first + batch] for name, tensor in rows.items()})
        for first in range(0, count, batch)
    ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _cpu_seconds(executable: Executable, rows: Rows, repeats: int) -> float:
    """CPU seconds of a run; on an accelerator those of the clock."""
    on_cpu = executable.device.kind == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    begun = clock()
    for _ in range(repeats):
        executable.run(rows)
    executable.device.synchronize()
    return max((clock() - begun) / repeats, 1e-9)


def _digest(rows: Rows) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(rows.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes())
    return sha.hexdigest()
