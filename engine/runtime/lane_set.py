"""The lanes of one engine: the devices they run on, the models there, and what batches cost."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from plinth.engine.devices.device import Device, pick
from plinth.engine.errors import ConfigError, DeviceError
from plinth.engine.flow import Sla
from plinth.engine.gang.plan import GANG, parse
from plinth.engine.lanes.base import Lane
from plinth.engine.lanes.cluster.lane import RayLane
from plinth.engine.lanes.cluster.settings import Cluster
from plinth.engine.lanes.gang import GangLane
from plinth.engine.lanes.load_thread import LoadThread
from plinth.engine.lanes.local import LocalLane
from plinth.engine.lanes.process import ProcessLane, RemoteLane
from plinth.engine.lanes.thread import LaneThread
from plinth.engine.lanes.window_thread import WindowThread
from plinth.engine.memory.plan import SHARE, budget
from plinth.engine.memory.residency import Evictable
from plinth.engine.models.store import Model
from plinth.engine.runtime.flow_driver import Clock
from plinth.engine.runtime.lane_worker import serve, serve_rank
from plinth.engine.runtime.loaded_model import LoadedModel, Precision, Range
from plinth.engine.runtime.model_table import Execution, ModelTable
from plinth.engine.runtime.modes import Modes
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel

_log = logging.getLogger("plinth.engine")
_REHEARSED_SECONDS, _REHEARSAL_SECONDS = 30.0, 2.0
PROCESS, RAY = "process:", "ray:"
"""Before the name of a device: its lane is a worker process, or one on a machine of a cluster."""
MAX_LANES = 1024
"""Of one engine; each has a thread."""
MakeThread = Callable[[Lane, "int | None"], LaneThread]
"""The thread of a lane: the lane, CPU threads of a forward."""


class LaneSet:
    """The lanes of an engine; weights are loaded once for each device, however many lanes it has.

    Args:
        batcher: is told of every lane.
        execution: how models run unless they say otherwise.
        limit: bytes of all models on each device, or ``"auto"``.
        clock: the engine's.
        make_thread: the thread of a lane.

    Attributes:
        models: those of the first device, which stand for all.
        threads: one for each lane.
        windows: puts windows together beside the lanes; given by the engine.
        loads: brings weights back that left memory, beside the lanes; given by the engine.
        changing: held while lanes or models change, so that every lane has every model.
        process: the number of the process in which they were started.
    """

    def __init__(
        self,
        batcher: Batcher,
        execution: Execution,
        limit: int | str,
        clock: Clock,
        make_thread: MakeThread,
    ) -> None:
        self.models: ModelTable
        self.windows: WindowThread
        self.loads: LoadThread
        self.threads: list[LaneThread] = []
        self.changing = threading.RLock()
        self._batcher = batcher
        self._execution = execution
        self._budget = limit
        self._clock = clock
        self._make_thread = make_thread
        self.process: int | None = None
        self._processes = 0
        self._tables: dict[str, ModelTable] = {}
        self._costs: dict[tuple[str, str], LatencyModel] = {}
        self._rehearsals: list[Future[None]] = []

    def __iter__(self) -> Iterator[LaneThread]:
        return iter(self.threads)

    @property
    def device(self) -> Device:
        """The first device."""
        return self.threads[0].lane.device

    @property
    def hung_seconds(self) -> float:
        """A batch is never taken for hung before."""
        return self._execution.hung_seconds

    @property
    def cpu_threads(self) -> int | None:
        """CPU threads of the first lane; ``None`` as torch has it."""
        return self.threads[0].cpu_threads

    @property
    def talks_on(self) -> Device:
        """The device whose lanes talk to each other: of the first gang, else the first."""
        gangs = (each.lane for each in self.threads)
        return next((lane.devices[0] for lane in gangs if isinstance(lane, GangLane)), self.device)

    # -- made --------------------------------------------------------------------------------
    def open(self, names: Sequence[str], lanes: Sequence[Lane]) -> None:
        """Make a lane on a device for each name, and take in others that were made elsewhere.

        Raises:
            ConfigError, DeviceError: there is no such device, or none is named.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"devices is {names!r}, expected a list of names", hint='such as ["cpu", "cpu"]'
            )
        if len(names) > MAX_LANES:
            raise ConfigError(f"devices names {len(names)} lanes, expected {MAX_LANES} at most")
        devices = [pick(device_of(name)) for name in names]
        devices = devices or [lane.device for lane in lanes[:1]]
        if not devices:
            raise ConfigError("an engine has no lane", hint="name a device, such as cpu")
        many = Counter(map(str, devices))
        many["cpu"] += sum(_ranks(name) - 1 for name in names)
        own = self._execution.threads
        if own is None and many["cpu"] > 1:
            share = max(1, torch.get_num_threads() // many["cpu"])
            self._execution = replace(self._execution, threads=share)
        apart = (PROCESS, RAY, GANG)
        here = Counter(str(pick(name)) for name in names if not name.startswith(apart))
        if names and not here:
            self._batcher.latency.restore()
            self._costs[_alike(names[0])] = self._batcher.latency
        self._processes = sum(name.startswith((PROCESS, GANG)) for name in names)
        for device in devices:
            self._table(device, max(1, here[str(device)]))
        for name in names:
            self.join_in(self.prepare(self.make(name)))
        for lane in lanes:
            self.join_in(self.prepare(lane))

    def make(self, name: str) -> Lane:
        """A lane on a device of this process, in a worker process or a gang, or in a cluster.

        Raises:
            ConfigError, DeviceError: there is no such device, or an impossible depth.
        """
        execution, device = self._execution, pick(device_of(name))
        threads = execution.threads or torch.get_num_threads()
        if name.startswith(GANG):
            return self._gang(name, execution)
        if name.startswith(PROCESS):
            costs = self._costs_by(_alike(name))
            return ProcessLane(
                device,
                serve,
                threads,
                depth=execution.depth,
                costs=costs,
                hung_seconds=execution.hung_seconds,
            )
        if name.startswith(RAY):
            cluster, costs = Cluster.of(execution.cluster), self._costs_by(_alike(name))
            depth, hung = execution.depth, execution.hung_seconds
            return RayLane(device, cluster, threads, depth, costs, hung)
        lanes = (each.lane for each in self.threads)
        taken = {
            each.place for each in lanes if isinstance(each, LocalLane) and each.device == device
        }
        place = next(number for number in count() if number not in taken)
        return LocalLane(device, execution.depth, place, execution.threads, self._clock)

    def _gang(self, name: str, execution: Execution) -> GangLane:
        return GangLane(
            name,
            serve_rank,
            execution.threads or max(1, torch.get_num_threads() // _ranks(name)),
            _talks_by(execution.communication, name),
            self._budget if isinstance(self._budget, int) else None,
            depth=execution.depth,
            costs=self._costs_by(_alike(name)),
            hung_seconds=execution.hung_seconds,
        )

    def prepare(self, lane: Lane) -> LaneThread:
        """Load on a lane what is loaded on the others; it takes no batches before it joins.

        Raises:
            ModelError, OutOfMemory: a model cannot be run there.
        """
        if self.models.all():
            lane.launch()
        for loaded in self.models.all():
            for other in self._replicate(loaded, lane.device):
                self._tables[str(lane.device)].put(other)
            self.hold(lane, loaded)
        thread = self._make_thread(lane, self._execution.threads)
        for loaded in self.models.all():
            self._rehearse(thread, loaded)
        return thread

    def join_in(self, thread: LaneThread) -> None:
        """Let a lane take batches; with the engine's lock held."""
        self._number(thread)
        self.threads.append(thread)
        for loaded in self.models.all():
            self._watch(loaded)

    def rejoin(self, thread: LaneThread) -> None:
        """Let a lane that died or was given up take batches again; with the engine's lock held."""
        costs = self._costs_on(thread.lane)
        self._batcher.lanes.add(costs, thread.lane.depth, thread.number)
        thread.died, thread.reviving = None, False
        thread.given_up, thread.absent = [], False

    def leave(self, thread: LaneThread) -> None:
        """Forget a lane whose thread has ended, and what is loaded for it alone."""
        if thread in self.threads:
            self.threads.remove(thread)
        device = thread.lane.device
        first = next(iter(self._tables))
        if str(device) == first or any(each.lane.device == device for each in self.threads):
            return
        self._tables.pop(str(device), None)
        for loaded in self.models.all():
            for each in (loaded, loaded.degraded):
                if each is not None:
                    each.elsewhere.pop(str(device), None)

    def _number(self, thread: LaneThread) -> None:
        lane = thread.lane
        if not self.threads and self._batcher.lanes.get(0) is not None:
            if not isinstance(lane, RemoteLane) or lane.costs is self._batcher.latency:
                thread.number = 0  # the batcher has one from the start
                self._batcher.pipeline_depth = lane.depth
                return
            self._batcher.drop_lane(0)
        costs = self._costs_on(lane)
        thread.number = self._batcher.add_lane(costs, lane.depth)

    def _table(self, device: Device, lanes: int) -> ModelTable:
        table = self._tables.get(str(device))
        if table is None:
            depth = self._execution.depth or 1 if device.kind != "cpu" else 1
            execution = replace(self._execution, depth=depth, lanes=lanes)
            costs = self._costs_of(device)
            setting = self._budget
            if setting == "auto" and device.kind == "cpu" and self._processes:
                setting = budget(device, share=SHARE / (1 + self._processes))
            table = ModelTable(device, costs, execution, setting)
            self._tables[str(device)] = table
            if len(self._tables) == 1:
                self.models = table
        return table

    def _costs_on(self, lane: Lane) -> LatencyModel:
        """What batches cost on a lane; a model that has learned nothing yet is one too."""
        return self._costs_of(lane.device) if lane.costs is None else lane.costs

    def _costs_of(self, device: Device) -> LatencyModel:
        """What batches cost on devices of this kind and name."""
        return self._costs_by((device.kind, device.name))

    def _costs_by(self, kind: tuple[str, str]) -> LatencyModel:
        if kind not in self._costs:
            first = self._batcher.latency
            costs = first
            if self._costs:
                path = first.path
                word = re.sub(r"\W+", "-", "-".join(kind)).strip("-").lower()
                costs = LatencyModel(path and path.with_stem(f"{path.stem}-{word}"))
            costs.restore()
            self._costs[kind] = costs
        return self._costs[kind]

    # -- models ------------------------------------------------------------------------------
    def load(
        self,
        model: Model,
        sla: Sla,
        batch_range: Range,
        backend: str | None,
        precision: Precision | None,
    ) -> LoadedModel:
        """Make a model ready on every device; see :meth:`ModelTable.load`."""
        loaded = self.models.load(model, sla, batch_range, backend, precision)
        for thread in self.threads:
            thread.lane.launch()  # processes start side by side
        for thread in self.threads:
            self._replicate(loaded, thread.lane.device)
            self.hold(thread.lane, loaded)
            self._rehearse(thread, loaded)
        return loaded

    def _replicate(self, loaded: LoadedModel, device: Device) -> list[LoadedModel]:
        """Make a model of the first device ready on another one, in the same way; what was made."""
        if loaded.on(device) is not loaded or device == self.models.device:
            return []
        table = self._table(device, 1)
        other = table.load(loaded.model, loaded.sla, *loaded.how)
        pairs = [(loaded, other)]
        if loaded.degraded is not None:
            pairs.append((loaded.degraded, other.degraded or other))
        for first, there in pairs:
            first.elsewhere[str(device)] = there
            there.padding = first.padding
            first.fits, first.most = min(first.fits, there.fits), min(first.most, there.most)
            self._costs_of(device).move(there.key, first.key)
        return [other]

    def hold(self, lane: Lane, loaded: LoadedModel) -> None:
        """Let a lane run a model, also one that was replaced before the lane joined."""
        if isinstance(lane, RemoteLane):
            self._send(lane, loaded)
            return
        lanes = sum(
            each.lane.device == lane.device and not isinstance(each.lane, RemoteLane)
            for each in self.threads
        )
        for first in (loaded, loaded.degraded):
            if first is not None:
                held = first.on(lane.device)
                place = lane.place if isinstance(lane, LocalLane) else 0
                held.share(max(lanes, place + 1))
                lane.hold(held)

    def _rehearse(self, thread: LaneThread, loaded: LoadedModel) -> None:
        """Have a lane run each size of batch once in its own thread; see :class:`LocalLane`."""
        lane = thread.lane
        if not isinstance(lane, LocalLane) or lane.device.kind == "cpu":
            return
        for first in (loaded, loaded.degraded):
            if first is not None and not first.free and first.plan is not None:
                held = first.on(lane.device)
                self._rehearsals += thread.do(lane.rehearsals(held.model.rows, held))

    def await_rehearsals(self) -> None:
        """Wait for what lanes that run rehearse, without the engine's lock.

        For 30 s at most, and no longer than one takes: a lane may be busy, and rehearses later.
        """
        if not self.alive or self.is_current:
            return
        pending, self._rehearsals = set(self._rehearsals), []
        until = self._clock() + _REHEARSED_SECONDS
        while pending and self._clock() < until:
            done, pending = wait(pending, _REHEARSAL_SECONDS, FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                error = None if future.cancelled() else future.exception()
                if error is not None:
                    name = type(error).__name__
                    _log.warning("a batch that was tried before it serves: %s", name)

    def _send(self, lane: RemoteLane, loaded: LoadedModel) -> None:
        """Let a worker process hold a model; it is planned with what was measured here at first."""
        measured = self._costs_of(lane.device)
        costs = self._costs_on(lane)
        for first in (loaded, loaded.degraded):
            if first is None:
                continue
            held = first.on(lane.device)
            lane.hold(held)
            if costs is not measured and not costs.learned(first.key):
                for rows, seconds in measured.learned(held.key).items():
                    costs.seed(first.key, rows, seconds)

    def put(self, loaded: LoadedModel) -> LoadedModel | None:
        """Let a model answer to its name on every device; returns the one that did so far."""
        before = self.models.put(loaded)
        for name, other in loaded.elsewhere.items():
            self._tables[name].put(other)
        if before is not None and before.key != loaded.key:
            self._forget_loads(before)
        self._watch(loaded)
        return before

    def _watch(self, loaded: LoadedModel) -> None:
        """Load a model beside the lanes where its weights leave; with the engine's lock held."""
        for table in self._tables.values():
            runs = loaded.on(table.device).executable
            if isinstance(runs, Evictable) and runs.device == table.device:
                self.loads.watch(self._costs_of(table.device).loads, loaded.key, runs)

    def _forget_loads(self, gone: LoadedModel) -> None:
        for table in self._tables.values():
            self.loads.forget(self._costs_of(table.device).loads, gone.key)

    def pin(self, thread: LaneThread, loaded: LoadedModel) -> None:
        """Let a model stay in memory for the batch that a lane is given."""
        runs = loaded.on(thread.lane.device).executable if thread.lane.inline else None
        if isinstance(runs, Evictable) and runs.pin():
            thread.pinned = runs

    def pop(self, name: str) -> LoadedModel:
        """Let no model answer to a name; returns the one that did.

        Raises:
            ModelError: there is none.
        """
        loaded = self.models.pop(name)
        for device in loaded.elsewhere:
            self._tables[device].pop(name)
        self._forget_loads(loaded)
        return loaded

    def save_costs(self) -> None:
        """Keep what was learned of costs."""
        for costs in self._costs.values():
            costs.save()

    # -- life --------------------------------------------------------------------------------
    def warm(self) -> None:
        """Start the worker processes that do not run; without the engine's lock, for it takes time.

        What cannot be started is told by :meth:`start`.
        """
        lanes = [thread.lane for thread in self.threads if not thread.alive]
        processes = [lane for lane in lanes if isinstance(lane, RemoteLane)]
        for lane in processes:
            lane.launch()
        for lane in processes:
            with suppress(DeviceError):
                lane.start()

    @property
    def alive(self) -> bool:
        """Whether the thread of any lane runs."""
        return any(thread.alive for thread in self.threads)

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one in which they were started: without threads."""
        return self.process is not None and self.process != os.getpid()

    @property
    def is_current(self) -> bool:
        """Whether the caller is a thread of a lane, or one that works beside them."""
        beside = self.windows.is_current or self.loads.is_current
        return beside or any(thread.is_current for thread in self.threads)

    @property
    def in_flight(self) -> int:
        """Batches that lanes have, or whose windows are being put together."""
        return self.windows.count + sum(thread.in_flight for thread in self.threads)

    def start(self) -> None:
        """Start every lane whose thread does not run; with the engine's lock held.

        Raises:
            ConfigError: a lane of this process runs with another number of threads.
            DeviceError: none of them can be started.
        """
        failed: DeviceError | None = None
        self.process = os.getpid()
        for thread in self.threads:
            if thread.alive:
                continue
            if self._batcher.lanes.get(thread.number) is None:
                self._number(thread)
            thread.draining = False
            try:
                thread.start()
            except DeviceError as error:
                self._batcher.drop_lane(thread.number)
                thread.died, thread.over, failed = error, True, error
        if failed is not None and not self.alive:
            raise failed

    def join(self, seconds: float = -1) -> bool:
        """Wait until all threads have ended, or so long for each; whether they have."""
        ended = [thread.join(seconds) for thread in list(self.threads)]
        return all(ended)

    def close(self) -> None:
        """End what lanes hold; their threads have ended."""
        self.windows.join()
        self.loads.join()
        for thread in self.threads:
            if not thread.alive:
                thread.lane.close()  # of one that was never started, a process may run

    def of(self, number: int | None) -> LaneThread | None:
        """The thread of a lane by its number in the batcher."""
        return next((each for each in self.threads if each.number == number), None)

    def others(self, thread: LaneThread) -> list[LaneThread]:
        """Lanes beside one that are well, those that are drained included."""
        return [each for each in self.threads if each is not thread and each.is_well]

    @property
    def is_one_reviving(self) -> bool:
        """Whether a lane that died is being started again."""
        return any(each.reviving for each in self.threads)

    def wake_all(self) -> None:
        """Let every thread look what there is to do; with the lock held."""
        for thread in self.threads:
            thread.wake.notify_all()

    def status(self, elapsed: float) -> list[dict[str, Any]]:
        """Each lane: what it is, whether it is well, what it has, its busy share."""
        return [thread.status(elapsed) for thread in self.threads]


def device_of(name: str) -> str:
    """The name of a lane's device, without the kind of lane before it.

    That of a gang is the host, on which the engine itself has what the ranks take shares of.
    """
    if name.startswith(GANG):
        return "cpu"
    return name.removeprefix(PROCESS).removeprefix(RAY)


def _ranks(name: str) -> int:
    """Processes of a lane that compute on the CPU, or 1."""
    if not name.startswith(GANG):
        return 1
    kind, plan = parse(name)
    return plan.ranks if kind == "cpu" else 1


def _alike(name: str) -> tuple[str, str]:
    """Whose costs are learned together: worker processes, gangs of one plan, or a cluster."""
    if name.startswith(GANG):
        return GANG, name
    return (PROCESS if name.startswith(PROCESS) else RAY), ""


def _talks_by(wanted: str, name: str) -> str:
    """What the ranks of a gang talk by.

    Raises:
        ConfigError: torch has nothing for the device, or not what is wanted.
    """
    device = pick(parse(name)[0])
    found = Modes(communication_backend=wanted).backend(device)
    if found is None:
        raise ConfigError(f"torch.distributed has no backend for {device}, so there is no {name}")
    return found
