"""The search of a recipe: how small a model's file can be within an allowed loss.

Recipes stand on a ladder from coarse to fine. What each would take on disk is known without
training: weights are cut and rounded, and packed. With a target, the largest that fits is trained
first, then its neighbours, finer ones as long as the loss allows; without one, down the ladder
until two in a row lose too much. Every fifth row is held out and judges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.backends import registry
from plinth.engine.backends.base import Executable, cpu_threads
from plinth.engine.backends.choice import compiled, difference
from plinth.engine.backends.eager import stored_bytes
from plinth.engine.compression.registry import Recipe
from plinth.engine.compression.training import Compressed, compress
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, PlinthError
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.store import Model
from plinth.engine.models.weights import PACKED
from plinth.engine.optimize.measures import (
    Loss,
    Rows,
    check_labels,
    check_tells,
    digest_of,
    outputs_of,
)
from plinth.engine.precision.policy import PRESETS

MIN_ROWS = 20
HELD_OUT = 5  # every so many rows one
ROUNDS = 5
TIMED_SECONDS = 0.2  # of a round, about
NOISE = 0.1  # of a ratio of CPU times, below which two are as fast
LADDER: tuple[tuple[float, str], ...] = (
    *((0.0, "int8"), (0.0, "even"), (0.0, "int4"), (0.5, "int4"), (0.7, "int4"), (0.8, "int4")),
    *((0.7, "ternary"), (0.85, "int4"), (0.8, "ternary"), (0.9, "int4"), (0.85, "ternary")),
    *((0.9, "ternary"), (0.95, "int4"), (0.95, "ternary"), (0.97, "ternary")),
)
"""Sparsity and bits of the recipes that are tried."""


def ladder(
    settings: Recipe,
    channels: float = 0.0,
    rungs: Sequence[tuple[float, str]] = LADDER,
    energy: float = 0.0,
    feedback: bool = False,
) -> list[Recipe]:
    """Recipes of sparsity and bits, each distilled, with these epochs, batch, rate and seed.

    Args:
        settings: whose epochs, batch, rate and seed they have.
        channels: share of channels that each removes besides.
        rungs: sparsity and bits of each.
        energy: of the singular values that each keeps besides; 0: layers stay one.
        feedback: whether rounding makes good its errors, as it should where nothing is trained.
    """
    found = []
    for sparsity, bits in rungs:
        cut = {"sparsity": sparsity, "channels": channels}
        pruning = {"pruning": {key: share for key, share in cut.items() if share}}
        steps: dict[str, Mapping[str, Any]] = {
            **({"low_rank": {"energy": energy}} if energy else {}),
            **(pruning if pruning["pruning"] else {}),
            "quantization_aware": {"bits": bits} | ({"feedback": True} if feedback else {}),
            "distillation": {},
        }
        found.append(replace(settings, steps=steps))
    return found


@dataclass(frozen=True, slots=True)
class Goal:
    """What is searched.

    Args:
        model: a torch module in float32, of a store.
        rows: rows (n, ...) by input name; every fifth is held out.
        loss: what a smaller model loses; ``max_loss``: how much it may.
        reference_bytes: of the model's file.
        target: bytes that the file may have; ``None``: as few as the loss allows.
        labels: of the rows (n,), for measures that need them, and learned from.
        recipes: what is tried; see :func:`ladder`.
        device: where speed is measured; ``backend``: by what.
        batch: rows of a timed run; ``threads``: of training and runs.
        seconds: after which nothing new is tried; the best so far is what is found.
    """

    model: Model
    rows: Rows
    loss: Loss
    max_loss: float
    reference_bytes: int
    device: Device
    target: int | None = None
    labels: Tensor | None = None
    recipes: Sequence[Recipe] = field(default_factory=lambda: tuple(ladder(Recipe())))
    backend: str = "eager"
    batch: int = 8
    threads: int = 1
    seconds: float = math.inf


@dataclass(slots=True)
class Small:
    """One smaller model, and what was measured of it.

    Args:
        recipe: how it was made; ``path``: its packed file.
        bytes: of the file; ``bits_per_weight``: of it, over all weights.
        sparsity: share of the weights that are 0.
        loss: on the held-out rows, by the measure; ``difference``: largest of its outputs there.
        seconds: CPU seconds of its training.
        speed: times as fast as the reference; ``run_seconds``: of a batch; ``memory``: bytes of
            its weights as they run.
    """

    recipe: Recipe
    path: Path
    bytes: int
    bits_per_weight: float
    sparsity: float
    loss: float
    difference: float
    seconds: float
    speed: float = math.nan
    run_seconds: float = math.nan
    memory: int = 0

    @property
    def label(self) -> str:
        """For people: ``90 % pruned, ternary``."""
        return self.recipe.label


@dataclass(slots=True)
class Frontier:
    """What a search found.

    Args:
        points: every recipe that was trained, in the order in which they were.
        best: with a target, the one within it and the loss that loses least; else the smallest
            within the loss; ``None`` if there is none.
        refused: what was not tried, and why.
        reference_seconds: CPU seconds of the reference for one batch; ``reference_memory``:
            bytes of its weights.
        data_digest: SHA-256 over the rows; ``held_out``: how many judged.
    """

    points: list[Small]
    best: Small | None
    refused: dict[str, str]
    reference_seconds: float
    reference_memory: int
    data_digest: str
    held_out: int

    @property
    def front(self) -> list[Small]:
        """Points that none beats in both bytes and loss, smallest first; not those that fail."""
        front: list[Small] = []
        known = [point for point in self.points if math.isfinite(point.loss)]
        for point in sorted(known, key=lambda p: (p.bytes, p.loss)):
            if all(point.loss < other.loss for other in front):
                front.append(point)
        return front


Say = Callable[[str], None]


def shrink(goal: Goal, folder: Path, say: Say = lambda _: None) -> Frontier:
    """Find a recipe that makes a model small within an allowed loss.

    Args:
        goal: what is searched.
        folder: where packed files are made; those of the points stay there.
        say: is told what goes on, a sentence at a time.

    Raises:
        ConfigError: too few rows, an ONNX file, or a recipe that is not possible.
        InputError: rows that are not what the model takes, or that the measure cannot use.
    """
    goal.model.spec.check(goal.rows)
    count = len(next(iter(goal.rows.values())))
    if count < MIN_ROWS:
        raise ConfigError(f"{count} rows are too few to train on and to judge by", hint="hundreds")
    if goal.model.onnx is not None:
        raise ConfigError(
            f"model {goal.model.spec.name} is an ONNX file, which cannot be trained",
            hint="bring the torch module that it was exported from: Model.from_torch",
        )
    if not goal.recipes:
        raise ConfigError("there is no recipe to try")
    with cpu_threads(goal.threads):
        return _Search(goal, folder, say).run()


class _Search:
    def __init__(self, goal: Goal, folder: Path, say: Say) -> None:
        self.goal, self.folder, self.say = goal, folder, say
        self._until = time.monotonic() + goal.seconds
        count = len(next(iter(goal.rows.values())))
        held = torch.arange(count) % HELD_OUT == HELD_OUT - 1
        self.seen = {name: tensor[~held] for name, tensor in goal.rows.items()}
        self.held = {name: tensor[held] for name, tensor in goal.rows.items()}
        given = goal.labels
        check_labels(given, goal.rows)
        self.labels = (None, None) if given is None else (given[~held], given[held])
        binding, spec = Binding(goal.model.spec, goal.model.module), goal.model.spec
        self.forward = lambda module, rows: outputs_by_name(spec, binding.call(module, rows))
        self.want = self._run(goal.model.module)
        if given is not None:  # what cannot be judged is told before anything is trained
            goal.loss(self.want, self.want, self.labels[1])
        check_tells(goal.loss, self.want, self.labels[1], goal.max_loss)
        self.points: list[Small] = []
        self.refused: dict[str, str] = {}

    def run(self) -> Frontier:
        sizes = [(self._untrained(recipe), recipe) for recipe in self.goal.recipes]
        sizes.sort(key=lambda one: -one[0])
        for recipe in self._order(sizes):
            if self.points and time.monotonic() > self._until:
                self.refused[recipe.label] = f"the {self.goal.seconds:g} s of the search were over"
                continue
            try:
                self.points.append(self._trained(recipe))
            except PlinthError as error:
                self.refused[recipe.label] = error.message
                if not self.points and len(self.refused) == len(self.goal.recipes):
                    raise
        reference = self._executable(self.goal.model)
        seconds = self._time(reference)
        return Frontier(
            self.points,
            self._best(),
            self.refused,
            seconds,
            reference.weights,
            digest_of(self.goal.rows),
            len(next(iter(self.held.values()))),
        )

    def _order(self, sizes: list[tuple[int, Recipe]]) -> Any:
        """Recipes in the order in which they are worth a training; looks at what came of them."""
        target = self.goal.target
        if target is None:
            lost = 0
            for _, recipe in sizes:
                yield recipe
                lost = lost + 1 if self._too_much() else 0
                if lost == 2:
                    return
            return
        fit = [number for number, (size, _) in enumerate(sizes) if size <= target]
        first = fit[0] if fit else len(sizes) - 1
        if not fit:
            self.say(f"no recipe is expected to take {target} bytes; the smallest are tried")
        lost = 0
        for _, recipe in sizes[first:]:
            yield recipe
            lost = lost + 1 if self._too_much() else 0
            if lost == 2 or (self._best() is not None and len(self.points) >= 3):
                break
        for _, recipe in sizes[:first][::-1][:2]:  # what a larger file would bring
            yield recipe

    def _too_much(self) -> bool:
        return not self.points or self.points[-1].loss > self.goal.max_loss

    def _best(self) -> Small | None:
        fit = [point for point in self.points if point.loss <= self.goal.max_loss]
        if self.goal.target is None:
            return min(fit, key=lambda point: point.bytes, default=None)
        fit = [point for point in fit if point.bytes <= (self.goal.target or 0)]
        return min(fit, key=lambda point: (point.loss, point.bytes), default=None)

    def _untrained(self, recipe: Recipe) -> int:
        """About what a recipe takes on disk."""
        few = {name: tensor[: max(2, self.goal.batch)] for name, tensor in self.seen.items()}
        path = self.folder / "untrained.packed"
        compress(self.goal.model.module, few, replace(recipe, epochs=0), self.forward).write(path)
        return path.stat().st_size

    def _trained(self, recipe: Recipe) -> Small:
        begun = time.process_time()
        self.say(f"{recipe.label}: training")
        found = compress(
            self.goal.model.module, self.seen, recipe, self.forward, self.labels[0], self.say
        )
        folder = self.folder / f"{len(self.points)}"
        folder.mkdir(exist_ok=True)
        path = folder / PACKED.name
        found.write(path)
        point = self._measured(found, recipe, path)
        point.seconds = time.process_time() - begun
        self.say(
            f"{point.label}: {point.bytes} bytes, {point.bits_per_weight:.2f} bits a weight, "
            f"loses {point.loss:.5f} on held-out rows"
        )
        self._time_point(point, found.module)
        return point

    def _measured(self, found: Compressed, recipe: Recipe, path: Path) -> Small:
        got = self._run(found.module)
        size = path.stat().st_size
        apart = max(
            difference(got[name], want)
            for name, want in self.want.items()
            if want.is_floating_point()
        )
        loss = self.goal.loss(got, self.want, self.labels[1])
        bits = 8 * size / found.weights
        return Small(
            recipe, path, size, bits, found.zeros / found.weights, max(0.0, loss), apart, 0.0
        )

    def _time_point(self, point: Small, module: nn.Module) -> None:
        """CPU seconds of a batch, in turns with the reference."""
        reference = self._executable(self.goal.model)
        own = self._executable(replace(self.goal.model, module=module, made_from=None))
        ratios, spent = [], []
        for _ in range(ROUNDS):
            before, seconds = self._time(reference), self._time(own)
            ratios.append(before / seconds)
            spent.append(seconds)
        ratio = median(ratios)
        point.speed = 1.0 if abs(ratio - 1) < NOISE else ratio
        point.run_seconds, point.memory = median(spent), own.weights or stored_bytes(module)

    def _executable(self, model: Model) -> Executable:
        plain = replace(model, variants=None, example={n: t[:2] for n, t in self.seen.items()})
        kind = registry.find(self.goal.backend)
        return compiled(kind, plain, self.goal.device, PRESETS["fp32"], self.goal.threads)

    def _time(self, executable: Executable) -> float:
        rows = {name: tensor[: self.goal.batch] for name, tensor in self.held.items()}
        executable.run(rows)
        runs, begun, spent = 0, time.process_time(), 0.0
        while spent < TIMED_SECONDS:
            executable.run(rows)
            runs, spent = runs + 1, time.process_time() - begun
        return spent / runs

    def _run(self, module: nn.Module) -> dict[str, Tensor]:
        with torch.inference_mode():
            return outputs_of(partial(self.forward, module), self.held, max(64, self.goal.batch))
