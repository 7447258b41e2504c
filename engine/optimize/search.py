"""Sensitivity search: what each layer costs in fidelity and brings in time, and what to lower.

Each backend first computes everything in each precision that it has. Where that loses too much
and is faster than whatever is within the loss, layers are looked at: the damage of each alone,
measured on one half of the rows; then layers go back to float32, greatest damage per second
saved first, until no more is lost than is allowed, and the other half checks. What is timed is
timed in turns with the reference, in CPU time.

For ONNX Runtime one graph computes every layer either way, as each run says, so that trying
other layers costs a run. Where even runs are too many for the time that is left, like layers
(whose names differ in numbers only) are tried together.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from plinth.engine.backends import Executable, registry
from plinth.engine.backends.base import cpu_threads
from plinth.engine.backends.choice import compiled
from plinth.engine.backends.export import onnx_file
from plinth.engine.backends.quantised import (
    TORCH_BACKENDS,
    NamedLayer,
    layers_of,
    scratch,
    switched,
)
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, PlinthError
from plinth.engine.models.store import Model
from plinth.engine.optimize.measures import (
    Loss,
    Rows,
    check_labels,
    check_tells,
    digest_of,
    outputs_of,
)
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve

MIN_ROWS = 8
TIMED_SECONDS = 3.0  # of one candidate, about
ROUNDS = 7
TRIED_ROWS = 128  # of those that choose, for the damage of layers


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
        seconds: after which nothing new is tried; the best so far is what is found.
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
    seconds: float = math.inf


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
    files: dict[str, Path] = field(default_factory=dict)
    executable: Executable | None = None
    """Until it was timed."""

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
        damage: loss of each layer alone, by backend and precision; where like layers were tried
            together, each has an equal share of theirs.
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
            fails = not math.isfinite(point.loss)
            if point.speed > 1 and not fails and all(point.loss < p.loss for p in front):
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


class _TimeOverError(Exception):
    """The time of the search is over."""


class _Search:
    def __init__(self, task: Task, say: Say) -> None:
        self.task, self.say = task, say
        self._until = time.monotonic() + task.seconds
        model = task.model
        check_labels(task.labels, task.rows)
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
        begun = time.monotonic()
        self.want = outputs_of(self.reference.run, self.seen, task.batch)
        self.pass_seconds = time.monotonic() - begun
        self.want_held = outputs_of(self.reference.run, self.held, task.batch)
        check_tells(task.loss, self.want_held, self.labels[1], task.max_loss)
        self.reference_seconds: list[float] = []
        self.making: dict[str, float] = {}
        self.step = 0.0
        self.refused: dict[str, str] = {}
        self.damage: dict[str, dict[str, float]] = {}

    def run(self) -> Found:
        points: list[Point] = []
        for backend, precision in self._roads():
            if self._is_late(f"{backend} {precision}"):
                continue
            try:
                points.append(self._whole(backend, precision))
            except PlinthError as error:
                self.refused[f"{backend} {precision}"] = error.message
        self._time(points)
        for whole in sorted(points, key=lambda point: -point.speed):
            best = self._best(points)
            road = f"{_road(whole)}, layer by layer"
            if whole.loss <= self.task.max_loss or self._is_late(road):
                continue
            if whole.speed <= max(1.0, best.speed if best else 1.0):
                self.refused[road] = (
                    f"{whole.speed:.2f} times as fast as the reference in all layers, no faster "
                    f"than {best.label if best else 'that'}, which is within the loss"
                )
                continue
            found: list[Point] = []
            try:
                self._some(whole, found)
            except PlinthError as error:
                self.refused[road] = error.message
            except _TimeOverError:
                self._is_late(road)
            self._time(found)
            points += found
        return Found(
            points,
            self._best(points),
            self.damage,
            self.refused,
            median(self.reference_seconds),
            self.reference.weights,
            digest_of(self.task.rows),
            len(next(iter(self.held.values()))),
        )

    def _best(self, points: Sequence[Point]) -> Point | None:
        fit = [p for p in points if p.loss <= self.task.max_loss and p.speed > 1]
        return max(fit, key=lambda p: p.speed, default=None)

    def _is_late(self, what: str) -> bool:
        if self._left() > 0:
            return False
        self.refused[what] = f"the {self.task.seconds:g} s of the search were over"
        return True

    def _left(self) -> float:
        return self._until - time.monotonic()

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

    def _whole(self, backend: str, precision: str) -> Point:
        """The point of one backend and precision with all layers low."""
        policy = PRESETS["fp32"] if precision == "fp32" else self._policy(backend, precision)
        point = self._point(backend, policy, 0)
        self.say(f"{point.label}: all layers lose {point.loss:.5f} on held-out rows")
        return point

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

    def _some(self, whole: Point, points: list[Point]) -> None:
        """Add points in which layers are float32 again, greatest damage per second saved first.

        Raises:
            _TimeOverError: before the search for the fewest such layers was at its end.
        """
        trials = self._trials(whole)
        order = self._order(whole, trials)
        names = [name for group in order for name in group]
        ends = [0]
        for group in order:
            ends.append(ends[-1] + len(group))

        def loses(count: int) -> float:
            lost = trials(names[ends[count] :])
            self.say(f"{_road(whole)}: {ends[count]} layers fp32 lose {lost:.5f}")
            return lost

        low, high = 0, len(order)  # too much is lost at low; high loses nothing but time
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if loses(middle) <= self.task.max_loss else (middle, high)
        for count in range(high, len(order)):
            self._point_of(whole, names[: ends[count]], points)
            if points[-1].loss <= self.task.max_loss:
                break
        if high > 2:  # between all and as many as it takes, for work that may be coarser
            self._point_of(whole, names[: ends[high // 2]], points)

    def _point_of(self, whole: Point, kept: list[str], points: list[Point]) -> None:
        if self._left() <= 0:
            raise _TimeOverError
        points.append(self._point(whole.backend, _keeping(whole.policy, kept), len(kept)))
        label, loss = points[-1].label, points[-1].loss
        self.say(f"{label}: loses {loss:.5f} on held-out rows")

    def _trials(self, whole: Point) -> Callable[[Sequence[str]], float]:
        """What is lost on the rows that choose with these layers low and no others."""
        backend, precision = whole.backend, next(iter(whole.policy.used))
        count = len(next(iter(self.seen.values())))
        rows = {name: tensor[:TRIED_ROWS] for name, tensor in self.seen.items()}
        want = {name: tensor[:TRIED_ROWS] for name, tensor in self.want.items()}
        labels = None if self.labels[0] is None else self.labels[0][:TRIED_ROWS]
        either = switched(backend, self._for(backend), whole.policy, self.task.threads)
        self.step = self.pass_seconds * min(1.0, TRIED_ROWS / count)
        self.step += 0.0 if either else self.making[_road(whole)]

        def lost(low: Sequence[str]) -> float:
            if self._left() <= 0:
                raise _TimeOverError
            if either is not None:
                got = outputs_of(either.taking(low), rows, self.task.batch)
            else:
                alone = PrecisionPolicy(layers=dict.fromkeys(low, precision))  # type: ignore[arg-type]
                executable = self._compiled(backend, alone)
                got = outputs_of(executable.run, rows, self.task.batch)
                for path in getattr(executable, "files", {}).values():
                    path.unlink()
            return max(0.0, self.task.loss(got, want, labels))

        return lost

    def _order(self, whole: Point, trials: Callable[[Sequence[str]], float]) -> list[list[str]]:
        """Layers, those that go back to float32 together in one list, the first to go first."""
        precision = next(iter(whole.policy.used))
        layers = [
            layer
            for layer in layers_of(whole.backend, self._for(whole.backend), self.task.threads)
            if whole.policy.of(layer.name, layer.op_class) == precision
        ]
        few = len(layers) * self.step <= self._left() / 2
        groups = [[layer] for layer in layers] if few else alike(layers)
        damage: dict[str, float] = {}
        rates: list[tuple[float, list[str]]] = []
        for number, group in enumerate(groups):
            names = [layer.name for layer in group]
            lost = trials(names)
            damage |= dict.fromkeys(names, lost / len(names))
            rates.append((lost / max(sum(layer.seconds for layer in group), 1e-9), names))
            self.say(
                f"{_road(whole)}: layer {number + 1} of {len(groups)}, {names[0]}"
                f"{f' and {len(names) - 1} like it' if len(names) > 1 else ''}, "
                f"alone loses {lost:.6f}"
            )
        self.damage[_road(whole)] = damage
        return [names for _, names in sorted(rates, key=lambda one: -one[0])]

    def _point(self, backend: str, policy: PrecisionPolicy, kept: int) -> Point:
        begun = time.monotonic()
        executable = self._compiled(backend, policy)
        made = time.monotonic() - begun
        executable.probe({name: tensor[: self.task.batch] for name, tensor in self.held.items()})
        got = outputs_of(executable.run, self.held, self.task.batch)
        loss = self.task.loss(got, self.want_held, self.labels[1])
        point = Point(
            backend,
            policy,
            max(0.0, loss),
            kept,
            memory=executable.weights,
            report=executable.report,
            files=getattr(executable, "files", {}),
            executable=executable,
        )
        self.making[_road(point)] = made
        return point

    def _compiled(self, backend: str, policy: PrecisionPolicy) -> Executable:
        task, model = self.task, self._for(backend)
        return compiled(registry.find(backend), model, task.device, policy, task.threads)

    def _time(self, points: list[Point]) -> None:
        """CPU seconds of a batch, in turns, each one against the reference of its round."""
        self.say(f"timing {len(points)} candidates in turns with the reference")
        batch = {name: tensor[: self.task.batch] for name, tensor in self.held.items()}
        ratios: list[list[float]] = [[] for _ in points]
        spent: list[list[float]] = [[] for _ in points]
        self.reference.run(batch)
        seconds = max(_cpu_seconds(self.reference, batch, 1), 1e-6)
        repeats = max(1, min(200, int(TIMED_SECONDS / ROUNDS / seconds / 2)))
        rounds = ROUNDS if seconds * ROUNDS < 2 * TIMED_SECONDS else 3
        for _ in range(rounds):
            reference = _cpu_seconds(self.reference, batch, repeats)
            self.reference_seconds.append(reference)
            for number, point in enumerate(points):
                assert point.executable is not None
                own = _cpu_seconds(point.executable, batch, repeats)
                ratios[number].append(reference / own)
                spent[number].append(own)
        for point, ratio, own_seconds in zip(points, ratios, spent, strict=True):
            point.speed, point.seconds = median(ratio), median(own_seconds)
            point.executable = None


def _keeping(policy: PrecisionPolicy, layers: list[str]) -> PrecisionPolicy:
    return replace(policy, layers=dict.fromkeys(layers, "fp32"), name="")


def _road(point: Point) -> str:
    """Backend and precision that layers were lowered to."""
    return f"{point.backend} {next(iter(point.policy.used), 'fp32')}"


def alike(layers: Sequence[NamedLayer]) -> list[list[NamedLayer]]:
    """Layers of one class whose names differ in numbers only, in one list."""
    groups: dict[tuple[str, str], list[NamedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.op_class, re.sub(r"\d+", "", layer.name)), []).append(layer)
    return list(groups.values())


def _cpu_seconds(executable: Executable, rows: Rows, repeats: int) -> float:
    """CPU seconds of a run; on an accelerator those of the clock."""
    on_cpu = executable.device.kind == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    begun = clock()
    for _ in range(repeats):
        executable.run(rows)
    executable.device.synchronize()
    return max((clock() - begun) / repeats, 1e-9)
