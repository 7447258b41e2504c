"""The engine: lanes that run batches, many callers that wait for them.

Callers drive their own flows; each :class:`Call` becomes work in the :class:`Batcher`. Each lane
has a thread that asks the batcher for a batch whenever the lane has room, and gives it the batch.
On an accelerator up to ``pipeline_depth`` are in flight, and the lane's second thread takes the
outputs apart.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor

from plinth.engine.errors import (
    Cancelled,
    Closed,
    ConfigError,
    EngineFailed,
    InputError,
    ModelError,
    OutOfMemory,
    PlinthError,
    nearest,
)
from plinth.engine.flow import Answer, Call, Compute, Flow, Sla
from plinth.engine.lanes.base import Lane, LaneDied, Ran, Unit
from plinth.engine.lanes.cluster.settings import Cluster
from plinth.engine.lanes.compute_pool import NICENESS, ComputePool
from plinth.engine.lanes.deadline_watch import DeadlineWatch
from plinth.engine.lanes.load_thread import LoadThread
from plinth.engine.lanes.process import HUNG_SECONDS, HUNG_TIMES, UNKNOWN_SECONDS
from plinth.engine.lanes.thread import LaneThread, StoppedFromOutside
from plinth.engine.lanes.window_thread import WindowThread
from plinth.engine.mapped import trim
from plinth.engine.metrics import EngineMetrics
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model
from plinth.engine.models.variants import Variants
from plinth.engine.runtime.flow_driver import Clock, FlowDriver, Result
from plinth.engine.runtime.lane_set import LaneSet
from plinth.engine.runtime.loaded_model import LoadedModel, Precision, Range
from plinth.engine.runtime.model_table import Execution, ModelTable
from plinth.engine.runtime.modes import Modes
from plinth.engine.runtime.request import (
    CallerWaiter,
    Foreseen,
    ForeseenWaiter,
    LoopWaiter,
    Mailbox,
    Request,
    ThreadWaiter,
    Waiter,
    request_of,
)
from plinth.engine.scheduler.batcher import Batcher, Patience
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.loads import Loads
from plinth.engine.scheduler.work import Batch, BatchKey, BatchSlice, Refusal, Shares, Work

T = TypeVar("T")
State = Literal["new", "running", "closing", "closed", "failed"]
Outcomes = list[tuple[Request, Result | PlinthError]]

DIRECT_SECONDS = 0.001
"""A call that is expected to take no longer, and that nothing else waits beside, is run by its
caller: two changes of thread would take as long."""
_LOOK = 1.0
"""Seconds after which a caller that still waits looks whether the device thread lives."""
_RESTART = 3.0
"""Seconds in which a lane that died is likely to be well again, before one was."""
_LOOK_SECONDS = 0.1
"""Between two looks whether what an engine that ends waits for has hung."""
_LEFT = 0.005
"""Seconds after which a lane looks again at work that it left to a faster one."""
_log = logging.getLogger("plinth.engine")


class Engine:
    """Runs flows on its lanes under deadlines; use it as a context manager.

    Args:
        batcher: the policy; by default one with a latency model of its own.
        clock: seconds, monotonic.
        device: ``"auto"``, or a name; see :func:`plinth.engine.devices.device.pick`.
        devices: a lane for each name, in the place of ``device``; a name may come twice. Weights
            are loaded once for each device. Lanes of the CPU share its threads out. A lane
            ``"process:cpu"`` is a worker process, with weights of its own, and ``"ray:cpu"`` an
            actor on a machine of a cluster; ``"gang:cpu:tensor=2"`` are worker processes that hold
            a share of each model.
        lanes: further lanes, made elsewhere.
        precision: for models that name none: a preset, a policy, or its table; see
            :class:`plinth.engine.precision.policy.PrecisionPolicy`.
        backend: for models that name none: a name, ``"auto"`` for the fastest right one, or
            ``None`` for torch eager (ONNX Runtime for ONNX files).
        threads: CPU threads of one forward; ``None`` as torch has it.
        max_queue: rows of urgent work that may wait (without a batcher of your own).
        memory_budget: bytes all models may take together on each device; ``None``: a share of
            what is available when the first is added.
        evict_idle: let models that are idle leave the memory of the CPU while others need it; the
            next call brings them back.
        latency_file: where learned costs are kept between runs; ``None`` forgets them.
        pipeline_depth: batches that an accelerator is given before the first is done, so that the
            host prepares one while the device runs another; ``None``: 1. The CPU has 1, a worker
            process up to 16.
        modes: how several lanes share work, as :class:`plinth.engine.runtime.modes.Modes` or its
            table; ``None``: as in its defaults.
        graphs: capture forwards and replay them on an accelerator where that is faster, which does
            not run a model's Python again; ``None``: of models with backend ``"auto"``.
        compute_workers: processes for the heavy steps of flows (:class:`Compute`), which start with
            the first of them; 0: the thread that drives a flow runs its steps.
        compute_seconds: in which a step in a process has to be done, unless it says other.
        hung_seconds: a batch in a worker process is never taken for hung before; in mode sync a
            round waits no longer for a lane that is late: it tells what it has, the other lanes run
            what that one was given, and it takes part again when it is back.
        cluster: where lanes ``"ray:cpu"`` are placed, as
            :class:`plinth.engine.lanes.cluster.settings.Cluster` or its table.

    Attributes:
        device: what it runs on; the first, where there are several.
        metrics: this engine's own; ``plinth.engine.metrics.REGISTRY`` adds all engines up.

    Raises:
        ConfigError, DeviceError: there is no such device.
    """

    def __init__(
        self,
        batcher: Batcher | None = None,
        clock: Clock = time.monotonic,
        *,
        device: str = "auto",
        devices: Sequence[str] | None = None,
        lanes: Sequence[Lane] = (),
        precision: Precision = "fp32",
        backend: str | None = None,
        threads: int | None = None,
        max_queue: int = 4096,
        memory_budget: int | None = None,
        evict_idle: bool = False,
        latency_file: Path | None = None,
        pipeline_depth: int | None = None,
        modes: Modes | Mapping[str, Any] | None = None,
        graphs: bool | None = None,
        compute_workers: int = 0,
        compute_seconds: float = 900.0,
        hung_seconds: float = HUNG_SECONDS,
        cluster: Cluster | Mapping[str, Any] | None = None,
    ) -> None:
        self._modes, depth = _modes_of(modes, pipeline_depth)
        if batcher is None:
            costs, rounds = LatencyModel(latency_file), self._modes.mode == "sync"
            batcher = Batcher(costs, max_queue=max_queue, rounds=rounds)
        elif self._modes.in_rounds and batcher.rounds is None:
            raise ConfigError("mode sync needs a batcher that forms rounds", hint="rounds=True")
        self._batcher = batcher
        self._round: list[tuple[Request, Result]] = []
        self._clock = clock
        self._lock = threading.RLock()
        self._deadlines = DeadlineWatch(self._lock, self._past_deadlines)
        self._lanes = LaneSet(
            self._batcher,
            Execution(
                precision,
                backend,
                threads,
                graphs,
                depth,
                hung_seconds=hung_seconds,
                evict_idle=evict_idle,
                cluster=Cluster.of(cluster),
                communication=self._modes.communication_backend,
            ),
            "auto" if memory_budget is None else memory_budget,
            clock,
            self._thread_of,
        )
        self._lanes.windows = WindowThread(
            self._lock, lambda: self._lanes.cpu_threads, self._break, self._windows_done
        )
        self._lanes.loads = LoadThread(
            self._lock,
            self._batcher,
            clock,
            lambda: self._lanes.cpu_threads,
            self._lanes.wake_all,
            self._not_loaded,
            self._break,
        )
        if devices is None:
            devices = () if lanes and device == "auto" else (device,)
        self._lanes.open(devices, lanes)
        self.device = self._lanes.device
        self._modes.backend(self._lanes.talks_on)  # refused now, not when somebody looks
        self._requests: set[Request] = set()
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._state: State = "new"
        self._failure: str | None = None
        self._broken: BaseException | None = None  # what all lanes have to end of
        self._numbers = count()
        self._restart = _RESTART
        self._started = clock()
        self.metrics = EngineMetrics(self.device, self._waiting)
        self._steps = (
            ComputePool(compute_workers, compute_seconds, self.metrics.count_step)
            if compute_workers
            else None
        )

    def _thread_of(self, lane: Lane, threads: int | None) -> LaneThread:
        thread = LaneThread(lane, self._lock, self._step, self._ended, self._is_back, threads)
        lane.lost = lambda error: self._lost_idle(thread, error)
        return thread

    @property
    def _models(self) -> ModelTable:
        return self._lanes.models

    # -- models ------------------------------------------------------------------------------
    def add(
        self,
        model: Model,
        *,
        sla: Sla | None = None,
        batch_range: Range = (1, 128),
        backend: str | None = None,
        precision: Precision | None = None,
        example: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make a model callable by its name: compiled, and measured before it serves.

        A model of that name is replaced between two batches: calls accepted before are still
        answered by the old one, whose memory is freed with the last of them.

        Args:
            model: the model; one whose inputs have free sizes is measured as it runs.
            sla: the promise for calls that bring none.
            batch_range: smallest and largest batch, rows; ``"auto"``: found by measuring.
            backend: execution backend; ``None``: the engine's.
            precision: policy; ``None``: the engine's.
            example: valid rows (n, ...) by input name to try and measure the model on;
                ``None``: the model's own, else rows made up from its spec.

        Raises:
            ConfigError: an impossible range, backend or precision.
            InputError: the example rows are not what the model's spec says.
            ModelError: nothing can run the model.
            OutOfMemory: it does not fit into the budget beside the other models.
            Closed: the engine was closed.
        """
        if self._state in ("closing", "closed"):
            raise self._not_running()
        promise = sla or Sla()
        model = model if example is None else replace(model, example=example)
        with self._lanes.changing:
            loaded = self._lanes.load(model, promise, batch_range, backend, precision)
            self._lanes.await_rehearsals()
            self._put(loaded, promise)
        trim()  # what trying and measuring held

    def _put(self, loaded: LoadedModel, promise: Sla) -> None:
        """Let a model answer to its name, and the batcher know of it."""
        with self._lock:
            self._batcher.register_sla(promise)
            due = promise.deadline_ms
            self.metrics.promise(loaded.spec.name, None if due is None else due / 1e3)
            before = self._lanes.put(loaded)
            self.metrics.weights(loaded.spec.name, partial(_weights_in_memory, ref(loaded)))
            for key in () if before is None else before.keys:
                if key not in loaded.keys:
                    self._batcher.forget(key)
            self._register_models()

    def renew(self) -> list[str]:
        """Load stored models again whose default in the store has changed since; their names.

        Only those in precision ``"auto"`` with backend ``"auto"`` follow it. Work goes on
        meanwhile, as in :meth:`add`. What cannot be loaded changes nothing: it is logged, counted,
        told in :meth:`status`, and not tried again before the default changes once more.

        Raises:
            Closed: the engine was closed.
        """
        taken = []
        for loaded, model in self._models.outdated():
            name = loaded.spec.name
            range_, backend, precision = loaded.how
            options: dict[str, Any] = {"backend": backend, "precision": precision}
            try:
                self.add(model, sla=loaded.sla, batch_range=range_, **options)
            except Closed:
                raise
            except PlinthError as error:
                loaded.refused = error.message
                self.metrics.variant_switches.labels(name, "refused").inc()
                _log.error("model %s: what serves stays: %s", name, error)
            else:
                self.metrics.variant_switches.labels(name, "taken").inc()
                taken.append(name)
        return taken

    def _register_models(self) -> None:
        for each in self._models.all():
            if not each.free:
                other = self._models.cheaper(each)
                cheaper = None if other is None else other.key
                if other is not None and other is each.degraded:
                    self._batcher.register(other.key, other.most, pinned=True)
                self._batcher.register(each.key, each.most, cheaper, pinned=True)

    def remove(self, name: str) -> None:
        """Let no model answer to a name any more.

        Calls accepted before are still answered; its memory is freed with the last of them.

        Raises:
            ModelError: there is no such model.
        """
        with self._lock:
            for key in self._lanes.pop(name).keys:
                self._batcher.forget(key)
            self.metrics.removed(name)
            self._register_models()

    # -- life --------------------------------------------------------------------------------
    def start(self) -> Engine:
        """Start the lanes; again after :meth:`close`, after it failed, and those that died.

        Raises:
            ConfigError: an engine of this process runs with another number of threads.
            DeviceError: no device does anything any more in this process, or a batch hangs there.
        """
        self._refuse_fork()
        if self._state == "running":
            self._lanes.warm()
        with self._lock:
            if self._state == "running" and self._lanes.alive:
                self._lanes.start()
                return self
        if self._lanes.is_current:
            raise ConfigError(
                "the device thread cannot wait for its own end", hint="start it from another"
            )
        self._await_lanes({})
        self._lanes.warm()
        if self._steps is not None:
            self._steps.open()
        with self._lock:
            if not self._lanes.alive:
                self._broken = None
                self._lanes.windows.open()
                self._lanes.loads.open()
                self._lanes.start()
                self._deadlines.start()
                self._state, self._failure = "running", None
        self._lanes.await_rehearsals()
        return self

    def add_lane(self, lane: str | Lane) -> str:
        """Let one more lane take batches: its name, as :meth:`status` has it.

        What is loaded is loaded there first, while the other lanes go on.

        Args:
            lane: the name of a device of this process, or a lane that was made elsewhere.

        Raises:
            ConfigError, DeviceError: there is no such device, or it cannot be started.
            ModelError, OutOfMemory: a model cannot be run there.
            Closed: the engine was closed.
        """
        if self._state in ("closing", "closed"):
            raise self._not_running()
        with self._lanes.changing:
            made = self._lanes.make(lane) if isinstance(lane, str) else lane
            thread = self._lanes.prepare(made)
            if made.revives:
                made.start()  # takes seconds, for which the lock is not held
            with self._lock:
                if self._state in ("closing", "closed"):  # while it was made
                    over = self._not_running()
                else:
                    over = None
                    if self._state == "running":
                        thread.start()
                    self._lanes.join_in(thread)
                    self._register_models()
                    self._wake_one()
            if over is not None:
                made.close()
                raise over
        return thread.name

    def drain_lane(self, name: str) -> None:
        """Give a lane nothing any more, and wait until it has done what it was given.

        Raises:
            ConfigError: there is no such lane, or no other one is well.
        """
        if self._lanes.is_current:
            raise ConfigError(
                "a lane's thread cannot wait for the end of a lane", hint="drain it from another"
            )
        with self._lock:
            found = next((each for each in self._lanes if each.name == name), None)
            if found is None:
                known = [each.name for each in self._lanes]
                raise ConfigError(f"there is no lane {name}", hint=nearest(name, known))
            if not any(not each.draining for each in self._lanes.others(found)):
                raise ConfigError(
                    f"{name} is the only lane that is well", hint="add another one before"
                )
            found.draining = True
            self._batcher.drop_lane(found.number)
            found.wake.notify_all()
            self._wake_one()
        found.join()
        with self._lanes.changing, self._lock:
            self._lanes.leave(found)

    def close(self, drain: bool = True) -> None:
        """Take no new work, stop the device thread, keep what was learned of costs.

        Any thread may call it, and several at once: each returns when the engine has ended.
        In the device thread itself, as in a callback of :meth:`submit`'s future, it returns at
        once and the engine ends after it.

        Args:
            drain: finish what was accepted first; otherwise it fails with :class:`Closed`.

        Raises:
            EngineFailed: a batch hangs: it runs for more than ``hung_seconds`` and 20 times what
                it should, or for two minutes where nobody knows. Whoever waits is told the same.
        """
        outcomes: Outcomes = []
        if self._lanes.is_forked:
            return  # its lanes are the other process's, which goes on with them
        with self._lock:
            if self._state in ("new", "running"):
                self._state = "closing" if self._lanes.alive else "closed"
            due: dict[int, float] = {}
            if not drain:
                due = self._batcher.hung_at(self._patience)  # nobody knows once all is forgotten
                waiting = {work.owner for work in self._batcher.clear()}
                outcomes = self._fail(waiting, Closed("the engine was closed"))
            self._lanes.wake_all()
        self._settle(outcomes)
        if self._steps is not None:
            self._steps.close(drain, wait=not self._lanes.is_current)
        if self._lanes.is_current:
            return
        self._await_lanes(due)
        self._lanes.close()
        with self._lock:
            self._deadlines.stop()
            self._lanes.save_costs()
        self._deadlines.join()

    def _await_lanes(self, due: Mapping[int, float]) -> None:
        """Wait until all lanes have ended.

        Args:
            due: when some of them count as hung, by their numbers.

        Raises:
            EngineFailed: none goes on, for those that run something hang; names them.
        """
        while not self._lanes.join(_LOOK_SECONDS):
            self._refuse_hung(due)

    def _refuse_hung(self, due: Mapping[int, float]) -> None:
        """Let nobody wait for lanes of which none goes on; raises as :meth:`_await_lanes`."""
        with self._lock:
            now, known = self._clock(), {**due, **self._batcher.hung_at(self._patience)}
            hung = {number for number, when in known.items() if when <= now}
            living = [thread for thread in self._lanes if thread.alive]
            goes_on = [
                thread
                for thread in living
                if thread.number not in hung and (thread.in_flight or self._batcher)
            ]
            names = [each.name for each in living if each.number in hung and each.in_flight]
            told = self._broken
        if isinstance(told, EngineFailed):  # who closed before was told
            raise EngineFailed(told.message, hint=told.hint)
        if not names or goes_on:
            return
        error = EngineFailed(
            f"the batch on {', '.join(names)} does not end",
            hint="end the process: a thread cannot be stopped; does the model wait for something?",
        )
        self._fail_all(error)
        raise error

    @property
    def _patience(self) -> Patience:
        return Patience(self._lanes.hung_seconds, HUNG_TIMES, UNKNOWN_SECONDS)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> State:
        """What the engine does: it answers calls only while it is ``"running"``.

        ``"failed"``: its device thread ended. Everybody who waited was told with
        :class:`EngineFailed`; :meth:`start` starts it anew.
        """
        if self._state in ("running", "closing") and not self._lanes.alive:
            self._fail_all(StoppedFromOutside())
        return self._state

    @property
    def failure(self) -> str | None:
        """Why the device thread ended, for the log and for health checks; None while it is well."""
        return self._failure if self.state == "failed" else None

    def contracts(self) -> dict[str, tuple[ModelSpec, Sla]]:
        """What every model takes and gives, and its own promise, by its name."""
        return {each.spec.name: (each.spec, each.sla) for each in self._models.all()}

    def status(self) -> dict[str, Any]:
        """Device, lanes, models, what waits, and the share of time the lanes were busy so far."""
        state = self.state
        with self._lock:
            lanes = self._lanes.status(self._clock() - self._started)
            return {
                "running": state == "running",
                "state": state,
                "failure": self._failure,
                "device": str(self.device),
                "models": self._models.status(),
                "urgent_rows": self._batcher.urgent_rows,
                "background_rows": self._batcher.background_rows,
                "utilisation": sum(lane["utilisation"] for lane in lanes) / len(lanes),
                "lanes": lanes,
                "mode": self._modes.mode,
                "sync_threshold": self._modes.sync_threshold,
                "communication_backend": self._modes.backend(self._lanes.talks_on),
            }

    def costs(self) -> dict[str, dict[int, float]]:
        """Seconds that a batch of so many rows takes, by model: what is planned with.

        Of a model whose inputs have several shapes, the shape of which most is known.
        """
        learned = self._batcher.latency.learned
        with self._lock:
            known = {m.spec.name: [learned(key) for key in m.keys] for m in self._models.all()}
        return {name: max(curves, key=len, default={}) for name, curves in known.items()}

    def variants(self, name: str) -> Variants | None:
        """The variants of a model that came from a store; ``None``: it did not.

        Raises:
            ModelError: there is no such model.
        """
        return self._models.get(name).model.variants

    # -- flows -------------------------------------------------------------------------------
    def run(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the calling thread until it returns.

        Raises:
            Refused: a call was refused; the flow was told and did not handle it.
            ConfigError: the caller is the device thread, which would wait for itself.
        """
        if self._lanes.is_current:
            raise ConfigError(
                "run() in the device thread would wait for itself", hint="use submit()"
            )
        driver = FlowDriver(flow, self._clock)
        try:
            while (call := driver.call) is not None:
                if isinstance(call, Compute):
                    self._compute(driver, call, sla)
                    continue
                try:
                    waiter = CallerWaiter()
                    if self._foreseen(driver, waiter) is None:
                        self._ask(self._flow_request(driver, call, waiter, sla), sla)
                    driver.send(waiter.wait(self._look, _LOOK))
                except PlinthError as error:
                    driver.throw(error)
            return driver.answer(sla)
        finally:
            self._forget_foreseen(driver)

    def _foreseen(self, driver: FlowDriver[T], waiter: Waiter) -> Request | None:
        """The request of the call that a flow yields, if it was foreseen: the waiter waits for it.

        What was foreseen in vain is cancelled.
        """
        found: Foreseen | None = driver.foreseen
        if found is None or found.call is not driver.call:
            self._forget_foreseen(driver)
            return None
        driver.foreseen = None
        found.waiter.pass_on(waiter)
        return found.request

    def _forget_foreseen(self, driver: FlowDriver[T]) -> None:
        """Nobody will ask what was foreseen."""
        found: Foreseen | None = driver.foreseen
        if found is not None:
            driver.foreseen = None
            self._cancel(found.request)

    def compute(self, step: Compute, within: float | None = None) -> Future[Any]:
        """Run a heavy step: in a worker process, or here and now where the engine has none.

        Cancelling the future ends the step.

        Args:
            step: what is to run.
            within: seconds until the promise of its flow ends, which a worker process keeps.

        Returns:
            What the function returns; the future also carries what it raised.

        Raises:
            QueueFull: too many steps wait.
            Closed: the engine was closed.
            ConfigError: no process can import the function.
        """
        if self._steps is not None:
            return self._steps.submit(step, within)
        future: Future[Any] = Future()
        try:
            future.set_result(step.run())
        except Exception as error:  # noqa: BLE001 - the flow's own, raised where it waits
            future.set_exception(error)
        return future

    def prepare_steps(self, *modules: str, niceness: int = NICENESS) -> None:
        """Let a process import modules now that forks the workers of heavy steps (Linux).

        Otherwise each is started with its first step, and imports what that takes.

        Args:
            modules: those that import what the steps do.
            niceness: how far others go first where the machine is short of CPU; 0 where nothing
                urgent runs beside the steps.
        """
        if self._steps is not None:
            self._steps.niceness = niceness
            self._steps.prepare(*modules)

    def end_steps(self, why: PlinthError) -> None:
        """Fail the steps that wait for a worker process or run in one; new ones are taken.

        Args:
            why: what their flows are told.
        """
        if self._steps is not None:
            self._steps.end_all(why)

    def _compute(self, driver: FlowDriver[T], step: Compute, sla: Sla | None) -> None:
        """Run a flow's step, and wait for it in the calling thread."""
        future: Future[Any] | None = None
        try:
            future = self.compute(step, driver.left(sla))
            value = future.result()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the flow is
            if future is not None:
                future.cancel()
            driver.throw(error)
        else:
            driver.computed(value)

    def _look(self) -> None:
        """Find out whether there is anybody left who could answer."""
        _ = self.state  # a thread that is gone without a word is found out here

    async def run_async(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the running event loop; cancelling the task cancels its work."""
        driver = FlowDriver(flow, self._clock, pauses=True)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop) or self._new_mailbox(loop)
        try:
            while (call := driver.call) is not None or driver.paused:
                if call is None:
                    if mailbox.crowded:
                        await asyncio.sleep(0)  # the others whom this batch has woken go first
                    driver.computed(None)
                elif isinstance(call, Compute):
                    await self._compute_async(driver, call, sla)
                else:
                    await self._call_async(driver, call, mailbox, sla)
            return driver.answer(sla)
        finally:
            self._forget_foreseen(driver)

    async def _call_async(
        self, driver: FlowDriver[T], call: Call, mailbox: Mailbox, sla: Sla | None
    ) -> None:
        """Ask what a flow asks, and wait for it; cancelling the task cancels its work."""
        loop = asyncio.get_running_loop()
        try:
            future: asyncio.Future[Result] = loop.create_future()
            waiter = LoopWaiter(mailbox, future)
            request = self._foreseen(driver, waiter)
            if request is None:
                request = self._flow_request(driver, call, waiter, sla)
                request.follows = driver.answered
                alone = self._admit(request, sla, direct=True)
                if alone is not None:
                    # Unless more comes in this pass of the loop, and makes a batch with it.
                    loop.call_soon(self._run_alone, request, alone)
            try:
                result = await future
            except asyncio.CancelledError:
                self._cancel(request)
                raise
            driver.answered = request.answered
            driver.send(result)
        except PlinthError as error:
            driver.throw(error)

    def _new_mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        """The mailbox of a loop that asks for the first time; those of closed loops go."""
        for other in list(self._mailboxes):
            if other.is_closed():
                self._mailboxes.pop(other, None)
        mailbox = self._mailboxes[loop] = Mailbox(loop, self._resumed)
        return mailbox

    def _resumed(self) -> None:
        """The callers of an event loop who were answered have asked for more, or will not."""
        if self._batcher.anticipation.is_open:
            with self._lock:
                self._batcher.anticipation.resumed()
                self._wake_one()

    async def _compute_async(self, driver: FlowDriver[T], step: Compute, sla: Sla | None) -> None:
        """Run a flow's step; cancelling the task ends it."""
        try:
            value = await asyncio.wrap_future(self.compute(step, driver.left(sla)))
        except Exception as error:  # noqa: BLE001 - the flow's own
            driver.throw(error)
        else:
            driver.computed(value)

    def submit(
        self, call: Call, sla: Sla | None = None, since: float | None = None
    ) -> Future[Result]:
        """Queue one call; the future also carries refusals. Cancelling it frees its place.

        Args:
            call: what is asked for.
            sla: the promise; ``None``: the model's.
            since: from when the promise counts, by the engine's clock; ``None``: from now.
        """
        future: Future[Result] = Future()
        request = self._request(call, ThreadWaiter(future), since)
        self._admit(request, sla)
        watched = [request]  # given up with the call: the future holds its callbacks for ever

        def done(future: Future[Result]) -> None:
            request = watched.pop()
            if future.cancelled():
                self._cancel(request)

        future.add_done_callback(done)
        return future

    def _refuse_fork(self) -> None:
        """Refuse work in a fork of the process in which it was started.

        Raises:
            EngineFailed: this is one.
        """
        if self._lanes.is_forked:
            raise EngineFailed(
                f"the engine was started in process {self._lanes.process}, of which this is a fork",
                hint="make an engine in each process, or start processes by spawn",
            )

    def _request(self, call: Call, waiter: Waiter, since: float | None) -> Request:
        self._refuse_fork()
        loaded = self._models.get(call.model)
        request = request_of(loaded, call, waiter, self._models.cheaper(loaded))
        request.since = since
        return request

    def _flow_request(
        self, driver: FlowDriver[T], call: Call, waiter: Waiter, sla: Sla | None
    ) -> Request:
        """The request of a flow, which goes on with its answer."""
        request = self._request(call, waiter, driver.since(sla))
        request.then = call.then
        return request

    def _ask(self, request: Request, sla: Sla | None) -> None:
        """Run a call here and now if nothing else waits and it is soon done; else queue it."""
        with self._lock:
            thread = self._lane_for_caller(request)
            batch = None if thread is None else self._alone(request, sla, thread)
        if thread is None or batch is None:
            self._admit(request, sla)
        else:
            self._run_here(batch, thread)

    def _alone(self, request: Request, sla: Sla | None, thread: LaneThread) -> Batch | None:
        """The batch of a request that nothing waits beside, which a lane has then."""
        now = self._clock()
        promise = sla or request.loaded.sla
        work = Work(request.key, request.total, now, promise, request, since=request.since)
        batch = self._batcher.alone(work, now, thread.number)
        if batch is not None:
            request.works.append(work)
            self._requests.add(request)
            thread.in_flight += 1
            self._lanes.pin(thread, request.loaded)
        return batch

    def _admit(
        self, request: Request, sla: Sla | None, *, direct: bool = False
    ) -> LaneThread | None:
        """Queue a request.

        Args:
            request: what is asked for.
            sla: the promise; ``None``: the model's.
            direct: its caller could run it with :meth:`_run_alone`, if it is native code: an event
                loop, where a module that waits for something would stop all it serves.

        Returns:
            The lane on which its caller is to run it: no lane was woken.
        """
        loaded = request.loaded
        request.sla, promise = sla, sla or loaded.sla
        step = loaded.most if promise.deadline_ms is not None else request.total
        if self._modes.mode != "async" and promise.deadline_ms is not None:
            step = min(step, self._share(request))
        alone: LaneThread | None = None
        with self._lock:
            if self._state == "running":
                if direct and loaded.executable.is_native(request.total):
                    alone = self._lane_for_caller(request)
                outcomes = self._enqueue(request, promise, step)
                if outcomes:
                    alone = None
                elif alone is None:
                    self._wake_one()
                self._lanes.loads.wake()
            else:
                outcomes = self._fail((request,), self._not_running())
        for _, outcome in outcomes:
            request.waiter.settle(outcome)
        return alone

    def _share(self, request: Request) -> int:
        """Rows of a request that one lane gets; all of them where it is not shared out."""
        costs, lanes = self._batcher.latency, len(self._batcher.lanes)
        most = request.loaded.most
        parts = self._modes.units(costs, request.key, request.total, lanes, most)
        if parts > 1:
            request.mode = "sync"
        return -(-request.total // parts)

    def _lane_for_caller(self, request: Request) -> LaneThread | None:
        """The lane on which its caller should run it: nothing else waits, and it is soon done."""
        loaded, rows = request.loaded, request.total
        if self._state != "running" or self._batcher or rows > loaded.most:
            return None
        for idle in self._lanes.threads:
            if not idle.in_flight and idle.takes_more:
                break
        else:
            return None
        expected = self._batcher.latency.predict(request.key, rows, 0.5)
        return idle if 0.0 < expected <= DIRECT_SECONDS and idle.runs_alike_here() else None

    def _wake_one(self) -> None:
        """Wake the lane that should take what waits, if one has room; with the lock held."""
        if self._modes.in_rounds:
            self._lanes.wake_all()
            return
        thread = self._lanes.of(self._batcher.free_lane())
        if thread is not None:
            thread.wake.notify()

    def _run_alone(self, request: Request, thread: LaneThread) -> None:
        """Run a call in its caller's thread, if still nothing else waits; else a lane does.

        What breaks the engine's own books here ends the lanes, as it would there.
        """
        with self._lock:
            waiting = self._batcher.urgent_rows + self._batcher.background_rows
            if thread.in_flight or request.over or waiting > request.total:
                return  # whoever came in between has woken a lane
            if not thread.takes_more:
                self._wake_one()
                return
            batch, outcomes = self._next(thread)
        self._settle(outcomes)
        if batch is not None:
            self._run_here(batch, thread)

    def _run_here(self, batch: Batch, thread: LaneThread) -> None:
        """Run a batch that a lane has in the thread of its caller."""
        try:
            interrupt = self._execute(batch, thread)
        except BaseException as error:
            self._break(error)
            if isinstance(error, Exception):
                return  # the lanes' end tells everybody who waits
            raise
        if interrupt is not None:
            raise interrupt

    def _next(self, thread: LaneThread) -> tuple[Batch | None, Outcomes]:
        """The batch to run now on a lane, which has it then; with the lock held."""
        batch, refused = self._batcher.next(self._clock(), thread.number)
        if batch is not None:
            thread.in_flight += 1
            self._lanes.pin(thread, batch.parts[0].work.owner.ran(batch.key))
        return batch, self._refused(refused) if refused else []

    def _enqueue(self, request: Request, promise: Sla, step: int) -> Outcomes:
        """Give a request's rows to the batcher, or say why not."""
        now = self._clock()
        if not self._batcher.knows(request.key):
            self._register(request)
        if request.follows is not None:
            self._batcher.followed(request.key, now - request.follows)
        self._requests.add(request)
        if promise.deadline_ms is not None or self._modes.in_rounds:
            self._deadlines.accepted()
        apart = request.mode == "sync" and not self._modes.in_rounds
        shares = Shares() if apart else None
        if self._modes.in_rounds:
            request.number, request.asked = next(self._numbers), now
            begun = now if request.since is None else request.since
            request.due = begun + (promise.deadline_ms or float("inf")) / 1e3
        for first in range(0, request.total, step):
            rows = min(step, request.total - first)
            work = Work(request.key, rows, now, promise, request, first, request.since)
            work.shares = shares
            request.works.append(work)
            refusal = self._batcher.admit(work, now)
            if refusal is not None:
                return self._fail((request,), refusal.error)
        return []

    def _register(self, request: Request) -> None:
        """Tell the batcher of a batch key it sees for the first time."""
        key = None
        if request.cheaper is not None:
            other, key = request.cheaper
            if not self._batcher.knows(key):
                self._batcher.register(key, other.most)
        self._batcher.register(request.key, request.loaded.most, key)

    def _not_running(self) -> PlinthError:
        if self._state == "failed":
            return EngineFailed(
                f"the device thread of the engine ended: {self._failure}",
                hint="see the log; start() starts the engine anew",
            )
        if self._state == "new":
            return Closed(
                "the engine takes no new work before it is started",
                hint="use it as a context manager, or call start()",
            )
        return Closed("the engine was closed and takes no new work", hint="start() starts it again")

    def _cancel(self, request: Request) -> None:
        with self._lock:
            request.left = True
            ended = [request] if request.foreseen is None else [request, request.foreseen.request]
            outcomes = self._fail(ended, Cancelled("the client went away"))
        self._settle(outcomes)

    def _fail(self, requests: Iterable[Request], error: PlinthError) -> Outcomes:
        """Forget requests, and give what their callers are to be told once the lock is free."""
        outcomes: Outcomes = []
        for request in requests:
            if request.over:
                continue
            request.over = True
            self._requests.discard(request)
            for work in request.works:
                self._batcher.cancel(work)
            request.works.clear()
            name = request.loaded.spec.name
            self.metrics.count(name, error.reason)
            if error.reason in ("deadline", "queue_full"):
                self.metrics.sla_misses.labels(name, error.reason).inc()
            outcomes.append((request, error))
        return outcomes

    def _settle(self, outcomes: Outcomes) -> None:
        """Tell callers, outside of the lock: their callbacks may do what they like."""
        for request, outcome in outcomes:
            request.waiter.settle(outcome)
        if outcomes:
            self._post()

    # -- the lanes' threads ------------------------------------------------------------------
    def _step(self, thread: LaneThread) -> bool:
        """Wait for a batch and give it to a lane; False when the lane is to end."""
        answers, thread.answers = thread.answers, []
        try:
            with self._lock:
                batch, outcomes, goes_on = self._take(thread, waits=not answers)
        finally:
            self._settle(answers)
        self._settle(outcomes)
        if batch is None:
            return goes_on
        if thread.lane.inline:
            self._execute(batch, thread)
        else:
            self._submit(batch, thread)
        return True

    def _take(self, thread: LaneThread, *, waits: bool) -> tuple[Batch | None, Outcomes, bool]:
        """The next batch of a lane, who is refused for it, and whether the lane goes on.

        With the lock held.

        Args:
            thread: the lane's.
            waits: until there is one; otherwise somebody is to be told something first.
        """
        if thread.absent and not thread.given_up:
            self._returns(thread)
        while self._broken is None and thread.died is None and self._is_idle(thread):
            if not waits:
                return None, [], True
            thread.wake.wait()
        if (error := self._broken or thread.died) is not None:
            raise error
        if thread.chores and not (self._batcher and thread.has_room):
            return None, [], True
        if thread.draining or not self._batcher:
            return None, [], False
        batch, outcomes = self._next(thread)
        several = len(self._lanes.threads) > 1
        if several and self._batcher:
            self._wake_one()
        if batch is None and not outcomes and waits:
            self._wait_held(thread, several=several)
        return batch, outcomes, True

    def _wait_held(self, thread: LaneThread, *, several: bool) -> None:
        """Wait while a lane does not begin what waits; with the lock held.

        It is held for a moment, is not to be queued behind what runs, or is left to another lane,
        which is not always the one that is woken first.
        """
        held = self._batcher.held_until - self._clock()
        self._lanes.loads.wake()
        if self._batcher.waits_for_loads:  # no other lane could begin it either
            thread.wake.wait(max(held, 0.0) if held < float("inf") else _LEFT)
            return
        if not (several or thread.in_flight or held < float("inf")):
            return
        for other in self._lanes.others(thread):
            if other.takes_more:
                other.wake.notify()
        longest = None if thread.in_flight else _LEFT
        thread.wake.wait(max(held, 0.0) if held < float("inf") else longest)

    def _is_idle(self, thread: LaneThread) -> bool:
        """Whether a lane has nothing to begin, or no room for it; with the lock held."""
        if thread.chores:
            return False
        if thread.draining:
            return thread.in_flight > 0
        if not thread.has_room:
            return True
        return not self._batcher and (self._state == "running" or self._lanes.in_flight > 0)

    def _ended(self, thread: LaneThread, error: BaseException | None) -> None:
        """The thread of a lane ends: whoever waits for nobody any more is told why."""
        answers, thread.answers = thread.answers, []
        self._settle(answers)
        with self._lock:
            thread.over = True
            others = self._lanes.others(thread) or self._lanes.is_one_reviving
            alone = error is not None and error is thread.died
            if others and (error is None or alone):
                self._lanes.wake_all()
                return
            if self._state != "failed":
                if error is None and self._state == "running":
                    error = StoppedFromOutside()  # drained, and the others died meanwhile
                self._fail_all(error)

    def _fail_all(self, error: BaseException | None) -> None:
        """Nothing is answered any more: whoever still waits is told why."""
        with self._lock:
            self._broken = error
            self._failure = None if error is None else type(error).__name__
            self._state = "closed" if error is None else "failed"
            self._deadlines.stop()
            self._lanes.windows.stop()
            self._lanes.loads.stop()
            self._lanes.wake_all()
            requests, why = list(self._requests), self._not_running()
            self._requests.clear()
            for request in requests:
                request.over = True
                request.works.clear()
            try:
                self._batcher.clear()
            finally:  # whatever state it is in, nobody waits for ever
                self._settle([*self._round_over(), *((request, why) for request in requests)])

    def _post(self) -> None:
        """Wake the event loops that have answers."""
        if self._mailboxes:
            for mailbox in list(self._mailboxes.values()):
                mailbox.post()

    def _waiting(self, kind: str) -> int:
        with self._lock:
            batcher = self._batcher
            return batcher.urgent_rows if kind == "urgent" else batcher.background_rows

    def _execute(self, batch: Batch, thread: LaneThread) -> KeyboardInterrupt | None:
        """Run a batch and hand out its answers; learning and counting come after them.

        Returns:
            What the user stopped the model with, in a thread that is not the lane's.
        """
        loaded: LoadedModel = batch.parts[0].work.owner.ran(batch.key)
        try:
            rows = _rows_of(batch)
            try:
                ran = thread.lane.run(self._unit(batch, loaded, rows, thread))
            finally:
                thread.unpin()
            _check_rows(loaded, ran, batch, thread.lane)
            loaded.see(rows)
        except BaseException as error:  # noqa: BLE001 - a model's failure is its batch's alone
            self._failed(batch, loaded, error, thread)
            if isinstance(error, KeyboardInterrupt) and not thread.is_current:
                return error
            return None
        self._finish(batch, loaded, ran, thread)
        return None

    def _not_loaded(self, loads: Loads, model: BatchKey, error: BaseException) -> None:
        """A model cannot be brought back to memory: whoever waits for it is told."""
        kind, told = type(error).__name__, error
        if not isinstance(told, PlinthError):
            name = model.partition("@")[0]
            told = ModelError(f"model {name} could not be loaded: {kind}", hint="the log says more")
        with self._lock:
            waiting = dict.fromkeys(work.owner for work in self._batcher.lose(loads, model))
            outcomes = self._fail(waiting, told)
        _log.error("model %s could not be loaded again: %s", model, kind, exc_info=error)
        self._settle(outcomes)

    def _unit(self, batch: Batch, loaded: LoadedModel, rows: Any, thread: LaneThread) -> Unit:
        lane = thread.lane
        name = loaded.on(lane.device).id
        here = lane.device == self.device or str(lane.device) in loaded.elsewhere
        if here and not lane.can_run(name):  # replaced before the lane joined, with calls waiting
            self._lanes.hold(lane, loaded)
        return Unit(next(self._numbers), name, rows, batch.predicted)

    def _submit(self, batch: Batch, thread: LaneThread) -> None:
        """Give a batch to a lane; what comes back is handed out by another thread."""
        loaded: LoadedModel = batch.parts[0].work.owner.ran(batch.key)
        try:
            rows = _rows_of(batch)
            future = thread.lane.submit(self._unit(batch, loaded, rows, thread))
            loaded.see(rows)
        except BaseException as error:  # noqa: BLE001 - as in _execute
            self._failed(batch, loaded, error, thread)
            return
        future.add_done_callback(lambda done: self._collect(batch, loaded, done, thread))

    def _collect(
        self, batch: Batch, loaded: LoadedModel, done: Future[Ran], thread: LaneThread
    ) -> None:
        """Hand out the answers of a batch that a lane has done."""
        try:
            try:
                ran = done.result()
                _check_rows(loaded, ran, batch, thread.lane)
            except BaseException as error:  # noqa: BLE001 - as in _execute
                self._failed(batch, loaded, error, thread)
                return
            self._finish(batch, loaded, ran, thread)
        except BaseException as error:  # noqa: BLE001 - the engine's own books: ends the lanes
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Let all lanes end of this."""
        with self._lock:
            self._broken = error
            self._lanes.wake_all()

    def _finish(self, batch: Batch, loaded: LoadedModel, ran: Ran, thread: LaneThread) -> None:
        """Hand out the answers of a batch; learning and counting come after them.

        While work waits the lane's thread forms its next batch first: who is told wakes up and
        wants the interpreter, and the lane would wait for it several times before it begins.
        """
        if self._was_given_up(batch, thread):
            return
        now, seconds = self._clock(), ran.seconds
        outcomes: Outcomes = []
        if not self._puts_apart(batch, loaded, ran):
            outcomes = self._deliver(batch, loaded, ran, now)
        if not self._modes.in_rounds:
            if batch.urgent and self._batcher.background_rows and thread.is_current:
                outcomes = [self._with_next(*each) for each in outcomes]
            if batch.urgent and self._mailboxes and thread.is_current:
                with self._lock:
                    self._batcher.anticipation.answered(thread.number, now)
            if thread.is_own and thread.lane.inline and self._batcher:
                thread.answers += outcomes
            else:
                self._settle(outcomes)
        with self._lock:
            if ran.largest < batch.rows:
                self._batcher.shrink(batch.key, ran.largest)
            thread.busy += seconds
            self._batcher.finished(batch, None if ran.held_up else seconds, now)
            self._give_back(thread)
            if self._modes.in_rounds:
                outcomes = self._at_barrier(outcomes)
        if self._modes.in_rounds:
            self._settle(outcomes)
        self.metrics.busy(thread.lane.device).inc(seconds)
        if ran.halvings:
            self.metrics.halved.labels(loaded.spec.name).inc(ran.halvings)
        meters = self.metrics.of_model(loaded.spec.name)
        meters.batch_rows.observe(batch.rows)
        meters.batch_seconds.observe(seconds)

    def _with_next(
        self, request: Request, outcome: Result | PlinthError
    ) -> tuple[Request, Result | PlinthError]:
        """Ask what a flow is likely to ask next, before a lane begins background work.

        Whatever is wrong with that is told when the flow asks it.
        """
        if request.then is None or not isinstance(outcome, Result):
            return request, outcome
        waiter = ForeseenWaiter()
        try:
            call = request.then(outcome.value)
            if call is None:
                return request, outcome
            following = self._request(call, waiter, request.since)
        except BaseException as error:  # noqa: BLE001 - the flow's own, as in _execute
            _log.debug("what comes after %s: %s", request.loaded.spec.name, type(error).__name__)
            return request, outcome
        with self._lock:
            self._batcher.followed(following.key, 0.0)
        self._admit(following, request.sla)
        with self._lock:
            request.foreseen = Foreseen(call, following, waiter)
        if request.left:  # while it was foreseen
            self._cancel(following)
        return request, replace(outcome, foreseen=request.foreseen)

    def _puts_apart(self, batch: Batch, loaded: LoadedModel, ran: Ran) -> bool:
        """Whether windows are put together beside the lane, where urgent rows may wait for it."""
        if batch.urgent or self._modes.in_rounds or not self._batcher.has_promises:
            return False
        if not any(part.work.owner.merger is not None for part in batch.parts):
            return False

        def put() -> None:
            self._settle(self._deliver(batch, loaded, ran, self._clock()))

        return self._lanes.windows.offer(sum(each.nbytes for each in ran.outputs.values()), put)

    def _windows_done(self) -> None:
        """No window waits to be put together; with the lock held."""
        if self._state != "running":
            self._lanes.wake_all()

    def _at_barrier(self, outcomes: Outcomes) -> Outcomes:
        """Keep what a round has answered until all of it is done; with the lock held."""
        failed: Outcomes = []
        for request, outcome in outcomes:
            if isinstance(outcome, Result):
                self._round.append((request, outcome))
            else:
                failed.append((request, outcome))
        if self._lanes.in_flight or self._batcher.has_unfetched:
            self._deadlines.accepted()  # somebody waits for a lane from now on
            return failed
        return [*failed, *self._round_over()]

    def _round_over(self) -> Outcomes:
        """The answers of a round, as they are at its end; with the lock held."""
        now, done = self._clock(), self._round
        told: Outcomes = []
        self._round = []
        for request, outcome in sorted(done, key=lambda each: each[0].number):
            outcome.timing.total = now - request.asked
            late = now > request.due
            told.append((request, replace(outcome, late=late) if late else outcome))
        return told

    def _give_back(self, thread: LaneThread) -> None:
        """A lane has room again; with the lock held."""
        thread.in_flight -= 1
        thread.answering = False
        if self._state != "running" or self._modes.in_rounds:
            self._lanes.wake_all()
        elif self._batcher or thread.draining or thread.died is not None:
            thread.wake.notify()

    def _failed(
        self, batch: Batch, loaded: LoadedModel, error: BaseException, thread: LaneThread
    ) -> None:
        """A batch raised: search for the callers at fault, and tell those that were found.

        Where its lane died of it, or with it, it waits again for another one.
        """
        died = isinstance(error, LaneDied)
        if self._was_given_up(batch, thread, error if died else None):
            return
        with self._lock:
            if died:
                works = self._lost(batch, error, thread)
            else:
                works = self._batcher.failed(batch, self._clock())
            self._give_back(thread)
            outcomes = self._at_fault(works, batch, loaded, error)
            told = bool(outcomes)
            if died:  # what waits for it to be well again, and would be late, is told at once
                outcomes += self._refused(self._batcher.sweep(self._clock()))
            if self._modes.in_rounds:
                outcomes = self._at_barrier(outcomes)
            if len(self._lanes.threads) > 1 and self._batcher:
                self._wake_one()
        counted = self.metrics.rerun_batches if died else self.metrics.failed_batches
        counted.labels(loaded.spec.name).inc()
        if told:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno} in {place.name}"
            name, kind = loaded.spec.name, type(error).__name__
            _log.warning("model %s failed on %d rows: %s at %s", name, batch.rows, kind, where)
        self._settle(outcomes)

    def _at_fault(
        self, works: list[Work], batch: Batch, loaded: LoadedModel, error: BaseException
    ) -> Outcomes:
        """Fail those whose rows a batch failed of; with the lock held."""
        requests = list(dict.fromkeys(work.owner for work in works))
        outcomes: Outcomes = []
        for request in requests:
            told = _model_error(loaded, batch, error, alone=len(requests) == 1)
            outcomes += self._fail((request,), told)
        return outcomes

    def _lost(self, batch: Batch, error: BaseException, thread: LaneThread) -> list[Work]:
        """A lane died: it gets nothing any more, and its batch waits again; with the lock held."""
        self._is_lost(thread, error)
        return self._batcher.died(batch, self._clock())

    def _lost_idle(self, thread: LaneThread, error: BaseException) -> None:
        """A lane died while it may have had nothing to run."""
        with self._lock:
            self._is_lost(thread, error)
            outcomes = self._refused(self._batcher.sweep(self._clock()))
        self._settle(outcomes)

    def _past_deadlines(self) -> float:
        """Tell those whose deadline went by on a lane that hangs; seconds until the next one."""
        with self._lock:
            now = self._clock()
            refused, again = self._batcher.overdue(now)
            outcomes = self._refused(refused)
            if self._modes.in_rounds:
                late, then = self._give_up_hung(now)
                outcomes, again = outcomes + late, min(again, then)
        self._settle(outcomes)
        return again - now

    def _give_up_hung(self, now: float) -> tuple[Outcomes, float]:
        """Let a round go on without the lanes that it waits for in vain; with the lock held.

        Returns:
            What is to be told, and when the next of them counts as hung.
        """
        numbers, again = self._batcher.hung(now, self._patience)
        outcomes: Outcomes = []
        for thread in self._lanes:
            if thread.number not in numbers or thread.answering:
                continue
            error = LaneDied(f"the lane {thread.name} does not come back")
            thread.absent = True
            for batch in self._batcher.drop_lane(thread.number):
                loaded: LoadedModel = batch.parts[0].work.owner.ran(batch.key)
                thread.given_up.append(batch)
                thread.in_flight -= 1
                works = self._batcher.died(batch, now)
                outcomes += self._at_fault(works, batch, loaded, error)
                self.metrics.rerun_batches.labels(loaded.spec.name).inc()
            self.metrics.lane_deaths.labels(thread.lane.label).inc()
            _log.error("%s: other lanes run what it was given", error.message)
        if numbers:
            outcomes += self._refused(self._batcher.sweep(now))
            outcomes = self._at_barrier(outcomes)
            self._lanes.wake_all()
        return outcomes, again

    def _was_given_up(
        self, batch: Batch, thread: LaneThread, died: BaseException | None = None
    ) -> bool:
        """Whether others run a batch by now, so that what its lane made of it is passed over."""
        if not self._modes.in_rounds:
            return False
        with self._lock:
            left = [each for each in thread.given_up if each is not batch]
            if len(left) == len(thread.given_up):
                thread.answering = True
                return False
            thread.given_up = left
            if died is not None:
                self._is_lost(thread, died)
            elif not left:
                self._returns(thread)
            return True

    def _returns(self, thread: LaneThread) -> None:
        """A lane that was given up is back; with the lock held."""
        thread.absent = False
        if thread.died is None and not thread.draining:
            self._lanes.rejoin(thread)
            self.metrics.lane_restarts.labels(thread.lane.label).inc()
            _log.warning("lane %s is well again", thread.name)
        self._lanes.wake_all()

    def _refused(self, refusals: list[Refusal]) -> Outcomes:
        """Fail what the batcher refused; with the lock held."""
        outcomes: Outcomes = []
        for refusal in refusals:
            outcomes += self._fail((refusal.work.owner,), refusal.error)
        if refusals:
            self._lanes.loads.wake()
        return outcomes

    def _is_lost(self, thread: LaneThread, error: BaseException) -> None:
        """A lane died: it gets nothing any more, before it is well again if it ever is."""
        with self._lock:
            if thread.died is not None or thread.over:
                return
            now = self._clock()
            thread.died, thread.died_at, thread.deaths = error, now, thread.deaths + 1
            thread.reviving = thread.lane.revives and not thread.draining
            self._batcher.drop_lane(thread.number)
            if thread.reviving:
                self._batcher.lanes.expect(now + self._restart)
            thread.wake.notify_all()
            self.metrics.lane_deaths.labels(thread.lane.label).inc()
            _log.error("lane %s died: %s", thread.name, error)

    def _is_back(self, thread: LaneThread) -> bool:
        """A lane that died is well again; False when nobody needs it any more."""
        with self._lock:
            over = self._broken is not None or self._state not in ("running", "closing")
            if over or thread.draining:
                return False
            self._restart = self._clock() - thread.died_at
            self._lanes.rejoin(thread)
            self.metrics.lane_restarts.labels(thread.lane.label).inc()
            _log.warning("lane %s is well again", thread.name)
            return True

    def _deliver(self, batch: Batch, loaded: LoadedModel, ran: Ran, now: float) -> Outcomes:
        """Give every request its rows; what cannot be made of them fails that request alone."""
        outcomes: Outcomes = []
        first = 0
        for part in batch.parts:
            request: Request = part.work.owner
            span = slice(first, first + part.rows)
            first += part.rows
            if request.over:
                continue
            try:
                own = loaded.own(ran.outputs, span, request.rows)
                with request.lock:
                    result = self._result(batch, part, own, ran, now)
            except BaseException as error:  # noqa: BLE001 - as in _execute
                told = _model_error(loaded, batch, error, alone=True)
                if isinstance(error, PlinthError):
                    told = error
                with self._lock:
                    outcomes += self._fail((request,), told)
                continue
            if result is not None:
                outcomes.append((request, result))
        return outcomes

    def _result(
        self, batch: Batch, part: BatchSlice, own: dict[str, Any], ran: Ran, now: float
    ) -> Result | None:
        """What becomes of a request with these rows; None while others are still to come."""
        request: Request = part.work.owner
        seconds, timing, work = ran.seconds, request.timing, part.work
        timing.device += seconds
        timing.co_batched += seconds * (1 - part.rows / batch.rows)
        timing.batch_rows = max(timing.batch_rows, batch.rows)
        if not request.put(own, work.first + part.first, part.rows):
            return None
        timing.queue = max(0.0, now - work.arrival - timing.device)
        timing.total = now - work.arrival
        value = request.value()
        request.over, request.answered = True, now
        self._requests.discard(request)
        request.works.clear()  # a cycle would be left to the garbage collector
        used, late = request.ran(work.key), now > work.deadline
        variant = used.executable.precision if used is request.loaded.degraded else None
        instead = variant or used.spec.name
        begun = now - seconds
        self._count(request, instead, _why_late(work, batch, begun) if late else None)
        exact = ran.precision == used.exact
        ways = (ran.precision, variant, request.mode, exact)
        return Result(value, timing, used.spec, late, *ways)

    def _count(self, request: Request, name: str, cause: str | None) -> None:
        asked = request.loaded.spec.name
        self.metrics.count(asked, "late" if cause else "answered")
        meters = self.metrics.of_model(asked)
        meters.call_seconds.observe(request.timing.total)
        meters.queue_seconds.observe(request.timing.queue)
        if cause:
            self.metrics.sla_misses.labels(asked, cause).inc()
        if request.mode != "async":
            self.metrics.shared.labels(asked).inc()
        if name != asked:
            self.metrics.degraded.labels(asked, name).inc()


def _modes_of(
    table: Modes | Mapping[str, Any] | None, depth: int | None
) -> tuple[Modes, int | None]:
    """The modes, and how many batches each lane is given.

    Raises:
        ConfigError: an impossible value, or the depth is named twice.
    """
    modes = Modes.of(table)
    if depth is not None and modes.pipeline_depth is not None:
        raise ConfigError(
            f"pipeline_depth is {depth}, and {modes.pipeline_depth} in modes", hint="name it once"
        )
    return modes, depth if modes.pipeline_depth is None else modes.pipeline_depth


def _rows_of(batch: Batch) -> list[dict[str, Tensor]]:
    """The rows of each part of a batch, as their callers gave them."""
    return [part.work.owner.take(part.work.first + part.first, part.rows) for part in batch.parts]


def _check_rows(loaded: LoadedModel, ran: Ran, batch: Batch, lane: Lane) -> None:
    """Refuse outputs of another number of rows than were given: they would be others' rows.

    Of a lane that has not held them against the contract, all of it is.

    Raises:
        ModelError: there are more or fewer, or they are not what the contract says.
    """
    if not lane.checked:
        loaded.check_outputs(ran.outputs, batch.rows)
        return
    for name, tensor in ran.outputs.items():
        if tensor.shape[0] != batch.rows:
            raise ModelError(
                f"model {loaded.spec.name}: the lane gave {tensor.shape[0]} rows of {name} for "
                f"{batch.rows}"
            )


def _why_late(work: Work, batch: Batch, begun: float) -> str:
    """The cause of a late answer, as ``plinth_sla_misses_total`` names it."""
    if not batch.urgent:
        return "postponed"
    return "slow_batch" if begun + batch.predicted <= work.deadline else "late_start"


def _model_error(
    loaded: LoadedModel, batch: Batch, error: BaseException, *, alone: bool
) -> PlinthError:
    """What a caller is told: names and kinds only, for a message may hold another's rows.

    Args:
        loaded: the model that raised.
        batch: what it was given.
        error: what it raised.
        alone: all rows of the batch were the caller's own: the error itself is its cause.
    """
    if alone and isinstance(error, OutOfMemory | ModelError | InputError):
        return error
    told = ModelError(
        f"model {loaded.spec.name} failed on {batch.rows} rows: {type(error).__name__}",
        hint="the log says where; are the values in the range that the model takes?",
    )
    told.__cause__ = error if alone else None
    return told


def _weights_in_memory(loaded: ReferenceType[LoadedModel]) -> float:
    model = loaded()
    return 0.0 if model is None else float(model.resident_weights)
