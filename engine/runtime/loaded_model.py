"""A model ready on a device: compiled, measured, with its batch range and its memory plan."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as numbers
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from plinth.engine.backends import registry
from plinth.engine.backends.base import Executable, OneAtATime, another, cpu_threads
from plinth.engine.backends.blocks import Blocks
from plinth.engine.backends.choice import Turns, prepare
from plinth.engine.backends.eager import TorchExecutable, held_tensors
from plinth.engine.backends.planner import Planned
from plinth.engine.backends.variants import best_variant, load_variant
from plinth.engine.devices.device import Device
from plinth.engine.devices.staging import Launched, Staging
from plinth.engine.errors import ConfigError, ModelError, OutOfMemory, PlinthError
from plinth.engine.flow import Sla
from plinth.engine.mapped import Pages
from plinth.engine.memory.foresight import SizePlans, leaner, outgrows
from plinth.engine.memory.likeness import Measured, likeness
from plinth.engine.memory.plan import MemoryPlan, Room, measure
from plinth.engine.memory.plan import budget as budget_of
from plinth.engine.memory.residency import Evictable, seats_status
from plinth.engine.memory.streaming import streamed
from plinth.engine.models.store import Model, ModelSpec
from plinth.engine.precision.policy import PrecisionPolicy, resolve
from plinth.engine.rows import cat_rows
from plinth.engine.runtime import batch_range as ranges
from plinth.engine.runtime import graphs as captured
from plinth.engine.runtime.graphs import Graphed
from plinth.engine.runtime.padding import Padding
from plinth.engine.runtime.padding import found as find_padding
from plinth.engine.runtime.recent import Recent
from plinth.engine.runtime.recipe import Recipe, Sent, send
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.tiling import Size, Tiling, WindowGrid

Range = tuple[int, int] | Literal["auto"]
Precision = PrecisionPolicy | str | Mapping[str, Any]
"""A policy, the name of a preset, a table, or ``"variant:NAME"`` of a stored model."""
_BY_RULE = ("onnxruntime", "eager")  # the first that supports a model in blocks is its "auto"
VARIANT = "variant:"
_MOST = 128
_MEASURED_ROWS = 16
_SAMPLE_SECONDS = 2.0  # of the rows whose memory is measured, about
_COST_SECONDS = 5.0  # of measuring what batches cost, about
_TURNS, _TURNS_SECONDS = 9, 0.6  # of measuring them once more, all sizes in turn; at most
_REPEAT_SECONDS = 0.1  # batches that take longer are run once
_NO_MEMORY = ("can't allocate memory", "Failed to allocate memory", "_STATUS_ALLOC_FAILED")
"""What the host's allocator, ONNX Runtime, and NVIDIA's libraries say where torch does not."""
_NUMBERS = numbers()


@dataclass(slots=True, weakref_slot=True, eq=False)
class LoadedModel:
    """One model on the device.

    Args:
        model: what it is.
        sla: the promise for calls that bring none.
        executable: what runs it.
        most: rows of its largest batch.
        room: what its calls may hold between batches.
        plan: its memory; ``None`` where sizes of its inputs are free.
        free: some size of its inputs is free, so that calls fall into shape buckets.
        padding: how rows of different lengths share batches; ``None`` where they do not.
        sizes: the memory of each size of rows where sizes are free.
        key: prefix of its batch keys.
        id: the name that lanes know it by; no other has it.
        elsewhere: the same on other devices, by their names.
        asked: what it was loaded from and how, so that the same is not loaded twice.
        how: the batch range, backend and precision it was asked for with.
        default: its default variant in the store when it was loaded.
        follows: another default in the store is to take its place.
        refused: why the default in the store did not take its place.
        recent: rows that it answered lately, for the check of what is to take its place.
        policy: what it was asked for in; ``None``: in a variant.
        degraded: a faster variant of it, which answers what would be late otherwise.
        halvings: batches that did not fit into memory and were run in halves, so far.
        fits: rows of its largest batch if it had the device's memory to itself.
        measured: its memory and its cost; ``None`` where sizes of its inputs are free.
    """

    model: Model
    sla: Sla
    executable: Executable
    most: int
    room: Room
    plan: MemoryPlan | None = None
    padding: Padding | None = None
    sizes: SizePlans | None = None
    free: bool = field(init=False)
    key: str = field(init=False)
    id: str = field(init=False)
    elsewhere: dict[str, LoadedModel] = field(init=False, default_factory=dict)
    halvings: int = field(init=False, default=0)
    asked: object = field(init=False, default=None)
    how: tuple[Range, str | None, Precision | None] = field(
        init=False, default=((1, 1), None, None)
    )
    default: str | None = field(init=False, default=None)
    follows: bool = field(init=False, default=False)
    refused: str | None = field(init=False, default=None)
    recent: Recent | None = field(init=False, default=None)
    measured: Measured | None = field(init=False, default=None)
    policy: PrecisionPolicy | None = field(init=False, default=None)
    degraded: LoadedModel | None = field(init=False, default=None)
    fits: int = field(init=False)
    _others: list[Executable] = field(init=False, default_factory=list)
    _sent: Sent | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.fits = self.most
        self.free = self.spec.free
        runs = self.executable
        self.key = f"{self.spec.name}@{self.spec.version}#{self.model.digest()[:12]}"
        self.key += f"/{runs.device}/{runs.backend}/{runs.precision}"
        if self.spec.block is not None:
            self.key += f"/{self.spec.block} rows"
        self.id = f"{self.key}~{next(_NUMBERS)}"

    @property
    def spec(self) -> ModelSpec:
        """The model's contract."""
        return self.model.spec

    @property
    def precision(self) -> str:
        """Backend and precision that answers are computed in, such as ``"eager/fp32"``."""
        return f"{self.executable.backend}/{self.executable.precision}"

    @property
    def convolves(self) -> bool:
        """Whether it has convolutions, for which libraries look for a plan at each size."""
        return any(isinstance(each, _ConvNd) for each in self.model.module.modules())

    @property
    def exact(self) -> str:
        """What :attr:`precision` is in precision ``"exact"``."""
        return "onnxruntime/fp32" if self.model.onnx else "eager/fp32"

    @property
    def keys(self) -> tuple[str, ...]:
        """The prefixes of all its batch keys."""
        return (self.key,) if self.degraded is None else (self.key, self.degraded.key)

    @property
    def weights(self) -> int:
        """Bytes of the weights of all that it runs."""
        return self.executable.weights + (self.degraded.weights if self.degraded else 0)

    @property
    def resident_weights(self) -> int:
        """Bytes of them, without those that have left memory for other models."""
        runs = self.executable
        gone = runs.seat.bytes if isinstance(runs, Evictable) and not runs.seat.resident else 0
        return self.weights - gone

    def bucket(self, rows: Mapping[str, Tensor]) -> str:
        """The batch key of rows: one for each model, and shape or range of lengths."""
        if not self.free:
            return self.key
        if self.padding is not None and (longest := self.padding.bucket(rows)) is not None:
            return f"{self.key}[up to {longest}]"
        shapes = (
            f"{tensor.name}={'x'.join(map(str, rows[tensor.name].shape[1:]))}"
            for tensor in self.spec.inputs
        )
        return f"{self.key}[{','.join(shapes)}]"

    def joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of the calls of one batch in one piece."""
        if self.padding is None or len(parts) == 1:
            return cat_rows(parts)
        return self.padding.joined(parts)

    def see(self, parts: list[dict[str, Tensor]]) -> None:
        """Rows of calls that were answered."""
        if self.recent is not None:
            for part in parts:
                self.recent.see(part)

    def own(
        self, outputs: Mapping[str, Tensor], span: slice, rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What belongs to one call of a batch's outputs: its rows, without padding."""
        found = {name: tensor[span] for name, tensor in outputs.items()}
        if self.padding is None or self.padding.bucket(rows) is None:
            return found
        return self.padding.cut(found, self.padding.length(rows))

    def on(self, device: Device) -> LoadedModel:
        """The same on another device; itself where it was not loaded there by itself."""
        return self.elsewhere.get(str(device), self) if self.elsewhere else self

    def share(self, lanes: int) -> None:
        """Let so many lanes of its device run it at the same time.

        Where its backend has no second one over the same weights, they take turns.
        """
        while len(self._others) < lanes - 1:
            other = another(self.executable)
            if other is None:
                if not isinstance(self.executable, OneAtATime):
                    self.executable = OneAtATime(self.executable, threading.Lock())
                other = self.executable
            self._others.append(other)

    def _at(self, place: int) -> Executable:
        return self.executable if place == 0 else self._others[place - 1]

    def run(self, rows: dict[str, Tensor], place: int = 0) -> dict[str, Tensor]:
        """Run rows; what does not fit into memory is run in parts. Outputs lie on the host.

        Args:
            rows: (n, ...) by input name.
            place: which lane of the device asks.

        Raises:
            OutOfMemory: not even one row fits.
            BaseException: whatever the model raises.
        """
        executable, count = self._at(place), len(next(iter(rows.values())))
        fit = self._fitting(rows, place)
        if fit < count:
            return self._in_parts(rows, fit, place)
        try:
            outputs = executable.run(rows)
            if executable.device.kind == "cpu":
                return outputs
            return {name: tensor.cpu() for name, tensor in outputs.items()}
        except Exception as error:
            if isinstance(error, PlinthError) or not _is_out_of_memory(error):
                raise
            if count == 1:
                raise self._too_large(error) from error
        if executable.device.kind != "cpu":
            executable.release()
            executable.device.give_back_memory()
        self.halvings += 1
        self.fits = self.most = min(self.most, max(1, count // 2))
        return self._in_parts(rows, -(-count // 2), place)

    def _fitting(self, rows: Mapping[str, Tensor], place: int) -> int:
        """How many of some rows may run at once beside what calls hold.

        Raises:
            OutOfMemory: not even one of rows of a free size; names the bytes.
        """
        count = len(next(iter(rows.values())))
        if self.plan is not None:
            return self.room.rows(self.plan, count)
        return count if self.sizes is None else self.sizes.most(rows, self.room, self._at(place))

    def _in_parts(self, rows: dict[str, Tensor], size: int, place: int) -> dict[str, Tensor]:
        """Run rows, so many at once."""
        spans = {name: torch.split(tensor, size) for name, tensor in rows.items()}
        parts = [
            self.run(dict(zip(spans, each, strict=True)), place)
            for each in zip(*spans.values(), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def launch(
        self, staging: Staging, parts: Sequence[dict[str, Tensor]], place: int = 0
    ) -> Launched:
        """Send rows of several calls to an accelerator as one batch.

        What does not fit into memory waits until what is on its way has come back, and runs alone,
        in halves if it must.

        Raises:
            OutOfMemory: not even one row fits.
            BaseException: whatever the model raises while it is launched.
        """
        if self.padding is not None:
            parts = [self.joined(list(parts))]
        try:
            return staging.launch(self._at(place).run, parts)
        except Exception as error:
            if isinstance(error, PlinthError) or not _is_out_of_memory(error):
                raise
        staging.drain()
        return staging.launch(lambda rows: self.run(rows, place), [cat_rows(list(parts))])

    def recipe(self) -> Recipe:
        """What another process makes the same of.

        Raises:
            ModelError: it cannot be sent.
        """
        if self._sent is None:
            self._sent = send(self.model, self.executable, self.policy, self.most)
        return self._sent.recipe

    def check(self, found: dict[str, Tensor] | None) -> None:
        """Hold what another process made of the rows in the recipe against one's own answers.

        Raises:
            ModelError: they are others.
        """
        if self._sent is not None:
            self._sent.check(found)

    def check_outputs(self, outputs: dict[str, Tensor], rows: int) -> None:
        """Hold what came from elsewhere against the contract; see :class:`Held`.

        Raises:
            ModelError: an output is missing, or has another shape or kind of numbers.
        """
        for want in self.spec.outputs:
            got = want.unlike(outputs.get(want.name), rows)
            if got is None:
                continue
            raise ModelError(
                f"model {self.spec.name}: a lane gave {got} as {want.name} of {rows} rows, "
                f"expected {(rows, *want.shape)} {want.dtype}",
                hint="do the lane's process and this one run the same version of Plinth?",
            )

    def windows(self, tiling: Tiling, shape: Size) -> WindowGrid:
        """The windows of a volume, in as many pieces as its logits need to fit into memory.

        Raises:
            OutOfMemory: they never would, as far as the contract tells; names the bytes.
        """
        grid = WindowGrid(tiling, shape)
        channels = self.spec.outputs[0].shape[0] if self.spec.outputs[0].shape else None
        if channels is None:
            return grid
        grid = grid.within(self.room.free, channels)
        self.room.check(grid.bytes(channels), self._volume(grid))
        return grid

    def reserve_windows(self, holder: object, grid: WindowGrid, needed: int) -> None:
        """Set aside the logits of a volume for as long as the holder lives.

        Raises:
            OutOfMemory: they do not fit beside those of other volumes.
        """
        self.room.take(needed, self._volume(grid), holder)

    def _volume(self, grid: WindowGrid) -> str:
        return f"model {self.spec.name}: a volume of {'x'.join(map(str, grid.shape))} voxels"

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
            "variant": self.executable.report.get("variant"),
            "checked_on_recent": self.executable.report.get("recent"),
            "default": self.default,
            "default_refused": self.refused,
            "degraded": None if self.degraded is None else self.degraded.precision,
            "plan": self.executable.report.get("plan"),
            "weights_bytes": self.executable.weights,
            "row_bytes": plan.per_row if plan else None,
            "size_plans": None if self.sizes is None else self.sizes.status(),
            "memory": self.executable.report.get("memory"),
            **seats_status(self.executable),
            "padding": None if self.padding is None else self.padding.status(),
        }


def load_model(
    model: Model,
    sla: Sla,
    device: Device,
    latency: LatencyModel,
    *,
    precision: Precision = "fp32",
    backend: str = "eager",
    threads: int | None = None,
    batch_range: Range = (1, _MOST),
    budget: int | str = "auto",
    graphs: bool | None = None,
    depth: int = 1,
    lanes: int = 1,
    compile_room: int | None = None,
    beside: Sequence[LoadedModel] = (),
) -> LoadedModel:
    """Compile a model, measure its memory and its cost, and seed the latency model.

    A model whose inputs have free sizes is tried on example rows if it takes them; the memory of
    each size is planned when it first comes, and its cost is learned from its first batches.
    Whatever a row costs, what is measured stays within half a minute, in fp32 or ``"auto"``: one
    whose row takes more than 4 s is served untried, row by row. Compiling and exporting for the
    first time come on top: at most 15 s with ``"auto"``, which leaves out what is late.

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
        graphs: capture and replay forwards on an accelerator where that is faster; ``None``: with
            backend ``"auto"``. Not for models whose inputs have free sizes.
        depth: batches on their way at once to and from each lane; each holds its rows and outputs.
        lanes: lanes of the device that run it at the same time.
        compile_room: bytes that compiling may take at its peak; ``None``: whatever there is.
        beside: loaded before; of one that is like this model memory and cost are taken over.

    Raises:
        ConfigError: an impossible range, backend or precision.
        InputError: the example rows are not what the spec says.
        ModelError: nothing can run the model.
        OutOfMemory: not even one row fits into the budget, or compiling does not.
    """
    low, high = (1, _MOST) if batch_range == "auto" else batch_range
    if not 1 <= low <= high:
        raise ConfigError(f"batch_range is {batch_range}, expected 1 <= smallest <= largest")
    with cpu_threads(threads):
        sizes = min(_MEASURED_ROWS, high), high
        slim = backend == "eager" and device.kind == "cpu"
        slim = slim and outgrows(model, budget_of(device, budget))
        executable = _made(model, device, (precision, backend), threads, sizes, compile_room, slim)
        module = executable.module if isinstance(executable, TorchExecutable) else None
        executable = _fitted(executable, budget_of(device, budget))
        if model.spec.block is not None:
            executable = Blocks(executable, model.spec.block).widened(model.spec)
        if executable.report.get("untried"):  # a batch of several rows was never seen to be right
            room = Room(max(0, budget_of(device, budget) - executable.weights))
            return LoadedModel(model, sla, executable, 1, room)
        if model.spec.free:
            room = Room(max(0, budget_of(device, budget) - executable.weights))
            padding = None
            if high > 1 and model.spec.block is None and not _is_exact(precision):
                padding = find_padding(model, executable)
            known = None if model.onnx is not None or device.kind != "cpu" else SizePlans(model)
            return LoadedModel(model, sla, executable, high, room, padding=padding, sizes=known)
        like = likeness(model, executable, sizes, batch_range)
        twin = next((each for each in beside if like and _likeness_of(each) == like), None)
        plan = _plan(executable, model, sizes, budget, twin)
        own = plan
        if plan.max_rows < low:
            like = None
            executable, plan = _smaller(executable, plan, model, sizes, budget)
        if device.kind != "cpu":
            plan = _in_flight(plan, executable, model, depth)
        plan = replace(plan, fixed=plan.fixed * lanes, per_row=plan.per_row * lanes)
        plan.check(low)
        if backend == "auto" if graphs is None else graphs:
            executable, plan = _graphed(executable, model, plan, high)
        tried = high if batch_range != "auto" else None
        most, cost = _range(executable, model, plan, tried, _costs_of(twin, latency))
    room = Room(plan.budget - plan.peak(1), plan.fixed + plan.per_row)
    loaded = LoadedModel(model, sla, executable, most, room, plan)
    loaded.measured = Measured(like, own, most, cost)
    for rows, seconds in cost.items():
        latency.seed(loaded.key, rows, seconds)
    if module is None:  # the backend has weights of its own
        Pages(held_tensors(model.module)).give_back()
    if module is not None:  # in bf16, say: the float32 weights can go
        loaded.model = replace(model, module=module)
    return loaded


def _made(
    model: Model,
    device: Device,
    how: tuple[Precision, str],
    threads: int | None,
    sizes: tuple[int, int],
    room: int | None,
    slim: bool,
) -> Executable:
    """A stored variant, or the model prepared for ``sizes``: rows to compare, and at most.

    ``slim``: layer by layer from the first run on, where it can be.
    """
    precision, backend = how
    found = _variant(model, device, precision, backend, threads)
    if found is not None:
        return found
    if (block := model.spec.block) is not None:
        sizes = block, block
        precision, backend = _one_way(model, device, precision, backend)
    tried, most = sizes
    auto = resolve(precision).auto and device.native("bf16")
    lean = leaner(model, auto) if backend == "auto" and device.kind == "cpu" else None
    executable = prepare(
        *(model, device, precision, backend, threads),
        rows=tried,
        most=most,
        room=room,
        smaller=streamed if slim else None,
        alone=None if lean is None else lean.reason,
    )
    spared = lean is not None and lean.reads_only and executable.report.get("untried")
    if spared and isinstance(executable, TorchExecutable):
        executable.lend_inputs()
    return executable


def _fitted(executable: Executable, budget: int) -> Executable:
    """The executable, layer by layer if its weights do not fit otherwise.

    Raises:
        OutOfMemory: they do not fit at all.
    """
    if executable.weights > budget and not isinstance(executable, Planned):  # see _smaller
        # A trial that was given up may still run, on a module of its own.
        inner = executable.inner if isinstance(executable, Turns) else executable
        executable = streamed(inner) or executable
        MemoryPlan(executable.weights, 0, 0, budget).check(1)
    return executable


def _smaller(
    executable: Executable,
    plan: MemoryPlan,
    model: Model,
    rows: tuple[int, int],
    budget: int | str,
) -> tuple[Executable, MemoryPlan]:
    """What takes less memory than an executable that does not fit, and its plan."""
    if isinstance(executable, Planned):
        executable = executable.smallest()
        plan = _plan(executable, model, rows, budget)
    if plan.max_rows < 1 and (small := streamed(executable)) is not None:
        return small, _plan(small, model, rows, budget)
    return executable, plan


def _one_way(
    model: Model, device: Device, precision: Precision, backend: str
) -> tuple[Precision, str]:
    """What ``"auto"`` means where bits matter: by rule, for two processes may measure otherwise."""
    policy = resolve(precision)
    if policy.exact:
        return precision, backend
    if policy.auto:
        precision, policy = "fp32", resolve("fp32")
    if backend == "auto":
        runs = [each for each in registry.automatic()[0] if each.name in _BY_RULE]
        runs = [each for each in runs if each.supports(model, device, policy) is None]
        backend = min((each.name for each in runs), key=_BY_RULE.index, default="eager")
    return precision, backend


def _is_exact(precision: Precision) -> bool:
    named = isinstance(precision, str) and precision.startswith(VARIANT)
    return not named and resolve(precision).exact


def _in_flight(plan: MemoryPlan, executable: Executable, model: Model, depth: int) -> MemoryPlan:
    """The plan with the rows and outputs of the other batches on their way to and from a device."""
    one = model.rows(1)
    moved = [*one.values(), *executable.run(one).values()]
    extra = (depth - 1) * sum(tensor.nbytes for tensor in moved)
    return replace(plan, per_row=plan.per_row + extra)


def _graphed(
    executable: Executable, model: Model, plan: MemoryPlan, high: int
) -> tuple[Executable, MemoryPlan]:
    """The executable with graphs of its forwards where they are faster, and what they take."""
    most = min(high, plan.max_rows)
    if executable.device.kind == "cpu" or most < 1 or executable.device.graph() is None:
        return executable, plan
    graphed = Graphed(executable)
    graphed.capture(model.rows, most, int(captured.SHARE * plan.budget))
    return graphed, replace(plan, fixed=plan.fixed + graphed.bytes)


def _variant(
    model: Model, device: Device, precision: Precision, backend: str, threads: int | None
) -> Executable | None:
    """The variant that is asked for by name, or in ``"auto"`` the best that runs here."""
    if isinstance(precision, str) and precision.startswith(VARIANT):
        return load_variant(model, device, threads, precision.removeprefix(VARIANT))
    if backend != "auto" or not resolve(precision).auto:
        return None
    return best_variant(model, device, threads)


def _likeness_of(loaded: LoadedModel) -> str | None:
    return None if loaded.measured is None else loaded.measured.likeness


def _costs_of(known: LoadedModel | None, latency: LatencyModel) -> tuple[int, dict[int, float]]:
    """Rows of the largest batch of a model that is known, and what its batches cost by now."""
    if known is None or known.measured is None:
        return 0, {}
    return known.measured.most, latency.learned(known.key) or dict(known.measured.cost)


def _plan(
    executable: Executable,
    model: Model,
    rows: tuple[int, int],
    budget: int | str,
    known: LoadedModel | None = None,
) -> MemoryPlan:
    """The memory of up to ``rows[0]`` rows, fewer where they would take seconds.

    Of up to ``rows[1]``, the largest batch, where those take little time and much memory is left.
    What is ``known`` of one like it holds for this one: it was measured when less else ran.
    """
    if known is not None and known.measured is not None:
        limit = budget_of(executable.device, budget)
        return replace(known.measured.plan, weights=executable.weights, budget=limit)
    probe, high = rows
    one = model.rows(1)
    seconds = executable.report.get("row_seconds") or _seconds(executable, one)
    if seconds < _SAMPLE_SECONDS:
        seconds = max(_seconds(executable, one), 1e-9)  # the first may have been slow for once
    affordable = int(_SAMPLE_SECONDS / seconds)
    large = min(max(2, probe), affordable)
    plan = _measured(executable, model, large, budget)
    if large < high // 2 and high <= affordable and 2 * plan.peak(high) < plan.budget:
        plan = _measured(executable, model, high, budget)  # rather than eight times what was seen
    return plan


def _measured(executable: Executable, model: Model, rows: int, budget: int | str) -> MemoryPlan:
    """The memory of an executable by one row and by so many."""
    sizes = (1, rows) if rows > 1 else (1, 1)
    plans = [
        measure(member, model.rows, sizes, weights=executable.weights, limit=budget)
        for member in (executable.members if isinstance(executable, Planned) else (executable,))
    ]
    fixed, per_row = (max(getattr(p, name) for p in plans) for name in ("fixed", "per_row"))
    return replace(plans[0], fixed=fixed, per_row=per_row)


def _range(
    executable: Executable,
    model: Model,
    plan: MemoryPlan,
    high: int | None,
    known: tuple[int, dict[int, float]],
) -> tuple[int, dict[int, float]]:
    """Rows of the largest batch, and what batches cost; ``high`` is None to find it."""
    found_most, cost = known
    if cost and (high is not None or found_most <= plan.max_rows):
        return min(high or found_most, plan.max_rows), cost
    if high is not None:
        most = min(high, plan.max_rows)
        if (slow := executable.report.get("row_seconds", 0.0)) > _SAMPLE_SECONDS:
            again = _seconds(executable, model.rows(1))  # the first may have been slow for once
            if again > _SAMPLE_SECONDS:
                return most, {1: min(slow, again)}
        return most, _costs(executable, model, most)
    found = ranges.remembered(model, executable)
    if found is None or found.most > plan.max_rows:
        found = ranges.find(executable, model.rows, plan.max_rows)
        ranges.remember(model, executable, found)
    return found.most, found.seconds


def _costs(executable: Executable, model: Model, most: int) -> dict[int, float]:
    """Seconds by rows, from one row upwards by doubling for as long as time allows.

    Then once more in turns, where that is soon done: the smallest batches come first, while all is
    slow, and seem to cost more a row than they do, so that slices would have more rows than pays.
    """
    costs: dict[int, float] = {}
    until = perf_counter() + _COST_SECONDS
    rows = 1
    while True:
        example = model.rows(rows)
        times = [_seconds(executable, example)]
        while len(times) < 4 and times[-1] < _REPEAT_SECONDS:
            times.append(_seconds(executable, example))
        costs[rows] = median(times[1:] or times)
        if rows == most or perf_counter() + 2 * costs[rows] > until:
            break
        rows = min(2 * rows, most)
    sizes = {size: {name: each[:size] for name, each in example.items()} for size in costs}
    turns = min(_TURNS, int(_TURNS_SECONDS / sum(costs.values())))
    if len(sizes) < 2 or turns < 3:
        return costs
    seen = [
        {size: _seconds(executable, each) for size, each in sizes.items()} for _ in range(turns)
    ]
    return {size: median(turn[size] for turn in seen) for size in sizes}


def _seconds(executable: Executable, rows: Mapping[str, Tensor]) -> float:
    begun = perf_counter()
    executable.run(rows)
    executable.device.synchronize()
    return perf_counter() - begun


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return any(words in said for words in _NO_MEMORY)
