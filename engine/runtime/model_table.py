"""The models of one engine by name, and the memory that they share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from plinth.engine.backends import choice, registry
from plinth.engine.backends.base import Executable
from plinth.engine.backends.choice import compiled
from plinth.engine.backends.eager import TorchExecutable, held_tensors, stored_bytes
from plinth.engine.backends.planner import Planned
from plinth.engine.backends.variants import check_on, degraded_variant, load_variant
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError, OutOfMemory, PlinthError, nearest
from plinth.engine.flow import Sla
from plinth.engine.lanes.cluster.settings import Cluster
from plinth.engine.lanes.process import HUNG_SECONDS
from plinth.engine.mapped import Pages
from plinth.engine.memory.plan import Room, budget
from plinth.engine.memory.residency import Evictable, Residency, evictable
from plinth.engine.models.store import Model, ModelStore
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve
from plinth.engine.runtime.loaded_model import (
    VARIANT,
    LoadedModel,
    Precision,
    Range,
    load_model,
)
from plinth.engine.runtime.recent import Recent
from plinth.engine.scheduler.cost_model import LatencyModel

_log = logging.getLogger(__name__)
MAX_THREADS, MAX_HUNG = 1024, 3600


@dataclass(frozen=True, slots=True)
class Execution:
    """How models run unless they say otherwise; see :class:`plinth.engine.Engine`.

    Args:
        depth: batches that a lane of the device is given at once; ``None``: as the device has it.
        lanes: lanes of the device.
        hung_seconds: a batch in a worker process is never taken for hung before.
        evict_idle: let models that are idle leave memory while others need it.
        cluster: where lanes on other machines are placed; ``None``: as it is by default.
        communication: what the ranks of a gang talk by; ``"auto"``: what torch names.
    """

    precision: Precision = "fp32"
    backend: str | None = None
    threads: int | None = None
    graphs: bool | None = None
    depth: int | None = None
    lanes: int = 1
    hung_seconds: float = HUNG_SECONDS
    evict_idle: bool = False
    cluster: Cluster | None = None
    communication: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what no lane could run with.

        Raises:
            ConfigError: an impossible value.
        """
        for name, value in (("threads", self.threads), ("pipeline_depth", self.depth)):
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_THREADS):
                raise ConfigError(
                    f"{name} is {value!r}, expected a whole number, 1 to {MAX_THREADS}"
                )
        if not 0 < self.hung_seconds <= MAX_HUNG:
            raise ConfigError(
                f"hung_seconds is {self.hung_seconds!r}, expected 0 < hung_seconds <= {MAX_HUNG}"
            )


class ModelTable:
    """Loads models one at a time, and keeps them inside one budget.

    The device runs one batch at a time, so models add up by their weights, and share the room
    that is left: ``sum(weights) + max(fixed + per_row * rows) + held <= budget``, where calls hold
    the logits of volumes between their batches.

    Args:
        device: where they run.
        latency: learns what their batches cost.
        execution: how they run unless they say otherwise.
        setting: bytes of all models together, or ``"auto"``: a share of what is available when
            the first is loaded.
    """

    def __init__(
        self, device: Device, latency: LatencyModel, execution: Execution, setting: int | str
    ) -> None:
        self.device = device
        self._latency = latency
        self._execution = execution
        self._setting = setting
        self._budget: int | None = None
        self._models: dict[str, LoadedModel] = {}
        self._room = Room(0)
        self._stays = 0  # bytes of the weights that never leave
        self._residency = Residency(lambda: (self._budget or 0) - self._stays - self._room.held)
        self._one_at_a_time = threading.Lock()

    def get(self, name: str) -> LoadedModel:
        """The model that answers to a name now.

        Raises:
            ModelError: there is none.
        """
        loaded = self._models.get(name)
        if loaded is None:
            known = list(self._models)
            hint = nearest(name, known) if known else "add it to the engine"
            raise ModelError(f"there is no model {name}", hint=hint)
        return loaded

    def cheaper(self, loaded: LoadedModel) -> LoadedModel | None:
        """The model that answers in place of another when time is short, or a variant of it.

        One that takes other inputs never does.
        """
        if loaded.spec.cheaper is None:
            return loaded.degraded
        other = self._models.get(loaded.spec.cheaper)
        return other if other is not None and other.spec.inputs == loaded.spec.inputs else None

    def all(self) -> list[LoadedModel]:
        """All of them."""
        return list(self._models.values())

    def load(
        self,
        model: Model,
        sla: Sla,
        batch_range: Range,
        backend: str | None,
        precision: Precision | None,
    ) -> LoadedModel:
        """Make a model ready; it answers to its name from :meth:`put` on.

        The same model, asked for in the same way, is not loaded again.

        Raises:
            OutOfMemory: it does not fit beside the others.
        """
        execution = self._execution
        usual = execution.backend or ("onnxruntime" if model.onnx else "eager")
        wanted = execution.precision if precision is None else precision
        if model.exact:
            wanted, usual = "exact", "auto"
        chosen = isinstance(wanted, str) and wanted.startswith(VARIANT)
        with self._one_at_a_time:
            model = model.pinned()
            default = model.variants.default if model.variants else None
            how = (batch_range, backend, precision)
            asked = (model.spec, model.digest(), default, *map(repr, how), sla.on_overload)
            if (known := self._models.get(model.spec.name)) and known.asked == asked:
                known.sla, known.default, known.refused = sla, default, None
                return known
            if self._budget is None:
                self._budget = budget(self.device, self._setting)
            runs = backend or usual
            held = self._staying(model.module if runs == "eager" else None)
            if self._check(model, held, runs in ("auto", "eager")):
                runs, wanted = "eager", "fp32" if resolve(wanted).auto else wanted
            self._residency.let_leave(choice.compile_peak(model, runs))
            loaded = load_model(
                model,
                sla,
                self.device,
                self._latency,
                precision=wanted,
                backend=runs,
                threads=execution.threads,
                batch_range=batch_range,
                budget=self._budget - held,
                graphs=execution.graphs,
                depth=execution.depth or 1,
                lanes=execution.lanes,
                compile_room=self._compile_room(held),
                beside=self.all(),
            )
            loaded.asked, loaded.how, loaded.default = asked, how, default
            loaded.policy = None if chosen else resolve(wanted)
            if execution.evict_idle and self.device.kind == "cpu":
                self._let_leave(loaded, model, wanted)
            loaded.follows = not chosen and (backend or usual) == "auto" and resolve(wanted).auto
            if known and known.recent and known.spec.inputs == model.spec.inputs:
                check_on(model, loaded.executable, known.recent.rows())
                loaded.recent = known.recent
            elif loaded.follows and model.variants is not None:
                loaded.recent = Recent()
            if sla.on_overload == "degrade" and (chosen or loaded.follows):
                loaded.degraded = self._coarser(loaded, model, self._budget - held)
            return loaded

    def _compile_room(self, held: int) -> int | None:
        """Bytes that compiling may take on the host; ``None``: no bound is known.

        A budget in bytes bounds it as it does what runs, without models that may leave. Where the
        budget is a share of what was free, the rest of that is there for it.
        """
        if self.device.kind != "cpu":
            return None
        if self._setting == "auto":
            return self.device.memory().available
        return max(0, (self._budget or 0) - held - self._room.held)

    def _let_leave(self, loaded: LoadedModel, model: Model, wanted: Precision) -> None:
        """Let a model leave memory while it is idle, if it can come back."""
        chosen = isinstance(wanted, str) and wanted.startswith(VARIANT)
        policy = None if chosen else resolve(wanted)
        make = None
        if model.spec.block is None:
            make = made_again(loaded.executable, model, policy, self._execution.threads)
        seat = evictable(loaded.executable, self._residency, loaded.plan, make, model.module)
        loaded.executable = loaded.executable if seat is None else seat

    def _staying(self, beside: nn.Module | None = None) -> int:
        """Bytes of the weights that never leave; tensors that models share count once.

        Args:
            beside: a module that is to run on the host; what it shares is not counted.
        """
        total, shared = 0, dict[int, int]()
        for each in self.all():
            runs = each.executable
            if isinstance(runs, Evictable):
                total += each.weights - runs.seat.bytes
            elif isinstance(runs, TorchExecutable) and self.device.kind == "cpu":
                here = _places(runs.module) if not runs.report.get("memory") else {}
                total += each.weights - min(runs.weights, sum(here.values()))
                shared |= here
            else:
                total += each.weights
        own = _places(beside) if beside is not None and self.device.kind == "cpu" else {}
        return total + sum(size for place, size in shared.items() if place not in own)

    def _coarser(self, loaded: LoadedModel, model: Model, budget: int) -> LoadedModel | None:
        """A faster variant of a model, for work that would rather be coarse than late."""
        name = degraded_variant(model, self.device, loaded.executable.report.get("variant"))
        if name is None or loaded.spec.cheaper is not None:
            return None
        try:
            return load_model(
                model,
                loaded.sla,
                self.device,
                self._latency,
                precision=f"{VARIANT}{name}",
                threads=self._execution.threads,
                batch_range=(1, loaded.most),
                budget=budget - loaded.executable.weights,
                graphs=self._execution.graphs,
                depth=self._execution.depth or 1,
                lanes=self._execution.lanes,
            )
        except PlinthError as error:
            _log.warning("model %s: variant %s: %s", loaded.spec.name, name, error.message)
            return None

    def outdated(self) -> Iterator[tuple[LoadedModel, Model]]:
        """Models whose default in the store is another than the one they follow, read again.

        Each one is given once for each default.
        """
        for loaded in self.all():
            model = loaded.model
            if not loaded.follows or model.variants is None:
                continue
            try:
                default = model.variants.default
                if default == loaded.default:
                    continue
                loaded.default = default
                version, name, root = model.variants.folder.parents[:3]
                fresh = ModelStore(root).load(name.name, version.name)
            except PlinthError as error:
                if loaded.refused != error.message:
                    _log.error("model %s: %s", loaded.spec.name, error)
                loaded.refused = error.message
                continue
            yield loaded, replace(fresh, spec=model.spec, example=model.example)

    def _check(self, model: Model, held: int, streams: bool) -> bool:
        """Refuse a model whose weights do not fit, or leave another no room for one row.

        Returns:
            Whether it fits only layer by layer, which ``streams`` allows.
        """
        total, own = self._budget or 0, weight_bytes(model)
        by_layers = streams and own > total - held and self.device.kind == "cpu"
        if by_layers:
            own -= Pages(held_tensors(model.module)).bytes
        room = total - held - own
        plans = {loaded.spec.name: loaded.plan for loaded in self.all() if loaded.plan}
        tight = [name for name, plan in plans.items() if plan.peak(1) - plan.weights > room]
        if room > 0 and not tight:
            return by_layers
        beside = f", of which {', '.join(sorted(self._models))} hold {held}" if held else ""
        raise OutOfMemory(
            f"model {model.spec.name} has {own} bytes of weights, the budget is {total}{beside}"
            + (f"; {', '.join(tight)} would have no room to run" if room > 0 else ""),
            needed=own,
            available=max(0, total - held),
            hint="raise memory_budget, or remove a model",
        )

    def put(self, loaded: LoadedModel) -> LoadedModel | None:
        """Let a model answer to its name; returns the one that did so far."""
        name = loaded.spec.name
        before, self._models = self._models.get(name), {**self._models, name: loaded}
        if before is not loaded:
            self._part(before)
            if isinstance(loaded.executable, Evictable):
                self._residency.join(loaded.executable.seat)
        self._share_room()
        return before

    def _share_room(self) -> None:
        """Cut the largest batches of all to the room that the weights leave, or widen them."""
        self._stays = self._staying()
        room = (self._budget or 0) - self._stays - self._residency.largest
        plans = [each.plan for each in self.all() if each.plan]
        self._room.forward = max((plan.fixed + plan.per_row for plan in plans), default=0)
        self._room.limit = max(0, room - self._room.forward)
        for each in self.all():
            each.room = self._room
            plan = each.plan
            if plan is not None and plan.per_row:
                each.most = min(each.fits, max(1, (room - plan.fixed) // plan.per_row))

    def pop(self, name: str) -> LoadedModel:
        """Let no model answer to a name; returns the one that did.

        Raises:
            ModelError: there is none.
        """
        loaded = self.get(name)
        self._models = {key: each for key, each in self._models.items() if key != name}
        self._part(loaded)
        self._share_room()
        return loaded

    def _part(self, gone: LoadedModel | None) -> None:
        if gone is not None and isinstance(gone.executable, Evictable):
            self._residency.part(gone.executable.seat)

    def status(self) -> dict[str, Any]:
        """Every model's status by name."""
        return {name: loaded.status() for name, loaded in self._models.items()}


def made_again(
    runs: Executable, model: Model, policy: PrecisionPolicy | None, threads: int | None
) -> Callable[[], Executable] | None:
    """What makes an executable once more, from caches; ``None`` where that is not known.

    Args:
        runs: the executable.
        model: what it was made of.
        policy: what it was asked for in; ``None``: a variant.
        threads: CPU threads of a forward.
    """
    again: Callable[[], Callable[[], Executable] | None] | None = getattr(runs, "again", None)
    anew = _made_anew(runs, model, policy, threads)
    read = None if again is None else again()
    return anew if read is None else partial(_read, read, anew)


def _made_anew(
    runs: Executable, model: Model, policy: PrecisionPolicy | None, threads: int | None
) -> Callable[[], Executable] | None:
    device = runs.device
    if (variant := runs.report.get("variant")) is not None:
        return partial(load_variant, model, device, threads, variant)
    if isinstance(runs, Planned):
        makes = {id(part): made_again(part, model, policy, threads) for part in runs.members}
        known = {place: make for place, make in makes.items() if make is not None}
        places = [(first, id(part)) for first, part in runs.parts]
        return partial(_planned, places, known) if len(known) == len(makes) else None
    if policy is None or policy.auto:
        policy = PRESETS.get(runs.precision)
    if policy is None:
        return None
    return partial(compiled, registry.find(runs.backend), model, device, policy, threads)


def _read(read: Callable[[], Executable], anew: Callable[[], Executable] | None) -> Executable:
    """Read once more; made anew where its files were let go of from the cache."""
    try:
        return read()
    except (ModelError, OSError):
        if anew is None:
            raise
        return anew()


def _planned(places: list[tuple[int, int]], makes: dict[int, Callable[[], Executable]]) -> Planned:
    made = {place: make() for place, make in makes.items()}
    return Planned([(first, made[place]) for first, place in places])


def weight_bytes(model: Model) -> int:
    """Bytes of a model's weights in float32; tied ones count once."""
    return model.onnx.stat().st_size if model.onnx else stored_bytes(model.module)


def _places(module: nn.Module) -> dict[int, int]:
    """Bytes of a module's tensors on the host by their place."""
    storages = [tensor.untyped_storage() for tensor in held_tensors(module)]
    return {one.data_ptr(): one.nbytes() for one in storages}
