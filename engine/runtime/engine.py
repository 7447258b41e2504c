"""The engine: one lane that runs batches on a device, many callers that wait for it.

Callers drive their own flows; each :class:`Call` becomes work in the :class:`Batcher`, whose
batches the lane's thread runs one after the other. On an accelerator it launches them, up to
``pipeline_depth`` at once, and a second thread of the lane takes the outputs apart.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from plinth.engine.devices.device import Device, pick
from plinth.engine.devices.staging import Launched, Staging
from plinth.engine.errors import (
    Cancelled,
    Closed,
    ConfigError,
    DeviceError,
    EngineFailed,
    ModelError,
    OutOfMemory,
    PlinthError,
)
from plinth.engine.flow import Answer, Call, Compute, Flow, Sla
from plinth.engine.lanes.compute_pool import ComputePool
from plinth.engine.lanes.local import LocalLane
from plinth.engine.metrics import EngineMetrics
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model
from plinth.engine.models.variants import Variants
from plinth.engine.runtime.flow_driver import Clock, FlowDriver, Result
from plinth.engine.runtime.loaded_model import LoadedModel, Precision, Range
from plinth.engine.runtime.model_table import Execution, ModelTable
from plinth.engine.runtime.request import (
    LoopWaiter,
    Mailbox,
    Request,
    ThreadWaiter,
    Waiter,
    request_of,
)
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.cost_model import LatencyModel
from plinth.engine.scheduler.work import Batch, BatchSlice, Work

T = TypeVar("T")
State = Literal["new", "running", "closing", "closed", "failed"]
Outcomes = list[tuple[Request, Result | PlinthError]]
Direct = Literal["none", "native", "any"]
"""Calls whose batch a caller could run itself. An event loop takes those of native code alone: a
module that waits for something would stop all it serves."""

DIRECT_SECONDS = 0.001
"""A call that is expected to take no longer, and that nothing else waits beside, is run by its
caller: two changes of thread would take as long."""
_LOOK = 1.0
"""Seconds after which a caller that still waits looks whether the device thread lives."""
_log = logging.getLogger("plinth.engine")


class Engine:
    """Runs flows on one device under deadlines; use it as a context manager.

    Args:
        batcher: the policy; by default one with a latency model of its own.
        clock: seconds, monotonic.
        device: ``"auto"``, or a name; see :func:`plinth.engine.devices.device.pick`.
        precision: for models that name none: a preset, a policy, or its table; see
            :class:`plinth.engine.precision.policy.PrecisionPolicy`.
        backend: for models that name none: a name, ``"auto"`` for the fastest right one, or
            ``None`` for torch eager (ONNX Runtime for ONNX files).
        threads: CPU threads of one forward; ``None`` as torch has it.
        max_queue: rows of urgent work that may wait (without a batcher of your own).
        memory_budget: bytes all models may take together; ``None``: a share of what is
            available when the first is added.
        latency_file: where learned costs are kept between runs; ``None`` forgets them.
        pipeline_depth: batches that an accelerator is given before the first is done, so that the
            host prepares one while the device runs another; ``None``: 1. The CPU has 1.
        graphs: capture forwards and replay them on an accelerator where that is faster, which does
            not run a model's Python again; ``None``: of models with backend ``"auto"``.
        compute_workers: processes for the heavy steps of flows (:class:`Compute`), which start with
            the first of them; 0: the thread that drives a flow runs its steps.
        compute_seconds: in which a step in a process has to be done, unless it says other.

    Attributes:
        device: what it runs on.
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
        precision: Precision = "fp32",
        backend: str | None = None,
        threads: int | None = None,
        max_queue: int = 4096,
        memory_budget: int | None = None,
        latency_file: Path | None = None,
        pipeline_depth: int | None = None,
        graphs: bool | None = None,
        compute_workers: int = 0,
        compute_seconds: float = 900.0,
    ) -> None:
        self.device = pick(device)
        self._staging = _staging(self.device, pipeline_depth)
        self._batcher = (
            Batcher(LatencyModel(latency_file), max_queue=max_queue) if batcher is None else batcher
        )
        self._batcher.latency.restore()
        depth = self._batcher.pipeline_depth = 1 if self._staging is None else self._staging.depth
        self._clock = clock
        self._models = ModelTable(
            self.device,
            self._batcher.latency,
            Execution(precision, backend, threads, graphs, depth),
            "auto" if memory_budget is None else memory_budget,
        )
        self._requests: set[Request] = set()
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()
        self._wake = threading.Condition()
        self._state: State = "new"
        self._failure: str | None = None
        self._lane = LocalLane(self.device, self._step, self._ended, threads)
        self._in_flight = 0  # batches on the device: of the lane, or of a caller
        self._broken: BaseException | None = None  # what the lane has to end of
        self._busy = 0.0
        self._started = clock()
        self.metrics = EngineMetrics(self.device, self._waiting)
        self._steps = (
            ComputePool(compute_workers, compute_seconds, self.metrics.count_step)
            if compute_workers
            else None
        )

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
        loaded = self._models.load(model, promise, batch_range, backend, precision)
        with self._wake:
            self._batcher.register_sla(promise)
            due = promise.deadline_ms
            self.metrics.promise(model.spec.name, None if due is None else due / 1e3)
            before = self._models.put(loaded)
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
        with self._wake:
            for key in self._models.pop(name).keys:
                self._batcher.forget(key)
            self._register_models()

    # -- life --------------------------------------------------------------------------------
    def start(self) -> Engine:
        """Start the device thread; again after :meth:`close`, and after it failed.

        Raises:
            ConfigError: an engine of this process runs with another number of threads.
            DeviceError: the device does nothing any more in this process.
        """
        with self._wake:
            if self._state == "running" and self._lane.alive:
                return self
        if self._lane.is_current:
            raise ConfigError(
                "the device thread cannot wait for its own end", hint="start it from another"
            )
        self._lane.join()
        if self._steps is not None:
            self._steps.open()
        with self._wake:
            if not self._lane.alive:
                if self._staging is not None:
                    _refuse_lost(self.device)
                    self._staging = Staging(self.device, self._staging.depth)
                self._in_flight, self._broken = 0, None
                self._lane.start()
                self._state, self._failure = "running", None
        return self

    def close(self, drain: bool = True) -> None:
        """Take no new work, stop the device thread, keep what was learned of costs.

        Any thread may call it, and several at once: each returns when the engine has ended.
        In the device thread itself, as in a callback of :meth:`submit`'s future, it returns at
        once and the engine ends after it.

        Args:
            drain: finish what was accepted first; otherwise it fails with :class:`Closed`.
        """
        outcomes: Outcomes = []
        with self._wake:
            if self._state in ("new", "running"):
                self._state = "closing" if self._lane.alive else "closed"
            if not drain:
                waiting = {work.owner for work in self._batcher.clear()}
                outcomes = self._fail(waiting, Closed("the engine was closed"))
            self._wake.notify_all()
        self._settle(outcomes)
        if self._steps is not None:
            self._steps.close(drain, wait=not self._lane.is_current)
        if self._lane.is_current:
            return
        self._lane.join()
        with self._wake:
            self._batcher.latency.save()

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
        if self._state in ("running", "closing") and not self._lane.alive:
            self._ended("its device thread is gone")
        return self._state

    @property
    def failure(self) -> str | None:
        """Why the device thread ended, for the log and for health checks; None while it is well."""
        return self._failure if self.state == "failed" else None

    def contracts(self) -> dict[str, tuple[ModelSpec, Sla]]:
        """What every model takes and gives, and its own promise, by its name."""
        return {each.spec.name: (each.spec, each.sla) for each in self._models.all()}

    def status(self) -> dict[str, Any]:
        """Device, models, what waits, and the share of time the device was busy so far."""
        state = self.state
        with self._wake:
            return {
                "running": state == "running",
                "state": state,
                "failure": self._failure,
                "device": str(self.device),
                "models": self._models.status(),
                "urgent_rows": self._batcher.urgent_rows,
                "background_rows": self._batcher.background_rows,
                "utilisation": self._busy / max(self._clock() - self._started, 1e-9),
            }

    def costs(self) -> dict[str, dict[int, float]]:
        """Seconds that a batch of so many rows takes, by model: what is planned with.

        Of a model whose inputs have several shapes, the shape of which most is known.
        """
        learned = self._batcher.latency.learned
        with self._wake:
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
        if self._lane.is_current:
            raise ConfigError(
                "run() in the device thread would wait for itself", hint="use submit()"
            )
        driver = FlowDriver(flow, self._clock)
        while (call := driver.call) is not None:
            if isinstance(call, Compute):
                self._compute(driver, call, sla)
                continue
            try:
                future: Future[Result] = Future()
                request, alone = self._admit(call, sla, ThreadWaiter(future), direct="any")
                if alone:
                    self._run_alone(request)
                driver.send(self._wait(future))
            except PlinthError as error:
                driver.throw(error)
        return driver.answer()

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

    def _wait(self, future: Future[Result]) -> Result:
        """The future's result; looks now and then whether there is anybody left to give it."""
        while True:
            try:
                return future.result(_LOOK)
            except TimeoutError:
                _ = self.state  # a thread that is gone without a word is found out here

    async def run_async(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the running event loop; cancelling the task cancels its work."""
        driver = FlowDriver(flow, self._clock)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = Mailbox(loop)
        while (call := driver.call) is not None:
            if isinstance(call, Compute):
                await self._compute_async(driver, call, sla)
                continue
            try:
                future: asyncio.Future[Result] = loop.create_future()
                waiter = LoopWaiter(mailbox, future)
                request, alone = self._admit(call, sla, waiter, direct="native")
                if alone:  # unless more comes in this pass of the loop, and makes a batch with it
                    loop.call_soon(self._run_alone, request)
                try:
                    result = await future
                except asyncio.CancelledError:
                    self._cancel(request)
                    raise
                driver.send(result)
            except PlinthError as error:
                driver.throw(error)
        return driver.answer()

    async def _compute_async(self, driver: FlowDriver[T], step: Compute, sla: Sla | None) -> None:
        """Run a flow's step; cancelling the task ends it."""
        try:
            value = await asyncio.wrap_future(self.compute(step, driver.left(sla)))
        except Exception as error:  # noqa: BLE001 - the flow's own
            driver.throw(error)
        else:
            driver.computed(value)

    def submit(self, call: Call, sla: Sla | None = None) -> Future[Result]:
        """Queue one call; the future also carries refusals. Cancelling it frees its place."""
        future: Future[Result] = Future()
        request, _ = self._admit(call, sla, ThreadWaiter(future))
        future.add_done_callback(lambda done: self._cancel(request) if done.cancelled() else None)
        return future

    def _admit(
        self, call: Call, sla: Sla | None, waiter: Waiter, *, direct: Direct = "none"
    ) -> tuple[Request, bool]:
        """Queue a call.

        Args:
            call: what is asked for.
            sla: the promise; ``None``: the model's.
            waiter: who is told.
            direct: calls whose batch the caller could run with :meth:`_run_alone`.

        Returns:
            The request, and whether its caller is to call it: the lane was not woken.
        """
        loaded = self._models.get(call.model)
        request = request_of(loaded, call, waiter, self._models.cheaper(loaded))
        promise = sla or loaded.sla
        step = loaded.most if promise.deadline_ms is not None else request.total
        alone = False
        with self._wake:
            if self._state == "running":
                alone = direct != "none" and self._is_small(request, direct)
                outcomes = self._enqueue(request, promise, step)
                alone = alone and not outcomes
                if not alone:
                    self._wake.notify()
            else:
                outcomes = self._fail((request,), self._not_running())
        for _, outcome in outcomes:
            waiter.settle(outcome)
        return request, alone

    def _is_small(self, request: Request, direct: Direct) -> bool:
        """Whether its caller should run it: nothing else is there to do, and it is soon done."""
        loaded, rows = request.loaded, request.total
        if self._in_flight or self._batcher or rows > loaded.most:
            return False
        if direct == "native" and not loaded.executable.is_native(rows):
            return False
        expected = self._batcher.latency.predict(request.key, rows, 0.5)
        return 0.0 < expected <= DIRECT_SECONDS and self._lane.runs_alike_here()

    def _run_alone(self, request: Request) -> None:
        """Run a call in its caller's thread, if still nothing else waits; else the lane does.

        What breaks the engine's own books here ends the lane, as it would there.
        """
        with self._wake:
            waiting = self._batcher.urgent_rows + self._batcher.background_rows
            if self._in_flight or request.over or waiting > request.total:
                return  # whoever came in between has woken the lane
            batch, outcomes = self._next()
        self._settle(outcomes)
        if batch is None:
            return
        try:
            interrupt = self._execute(batch)
        except BaseException as error:
            with self._wake:
                self._broken = error
                self._wake.notify()
            if isinstance(error, Exception):
                return  # the lane's end tells everybody who waits
            raise
        if interrupt is not None:
            raise interrupt

    def _next(self) -> tuple[Batch | None, Outcomes]:
        """The batch to run now, which has the device then; with the lock held."""
        batch, refused = self._batcher.next(self._clock())
        self._in_flight += batch is not None
        outcomes: Outcomes = []
        for refusal in refused:
            outcomes += self._fail((refusal.work.owner,), refusal.error)
        return batch, outcomes

    def _enqueue(self, request: Request, promise: Sla, step: int) -> Outcomes:
        """Give a request's rows to the batcher, or say why not."""
        now = self._clock()
        if not self._batcher.knows(request.key):
            self._register(request)
        self._requests.add(request)
        for first in range(0, request.total, step):
            rows = min(step, request.total - first)
            work = Work(request.key, rows, now, promise, request, first)
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
        with self._wake:
            outcomes = self._fail((request,), Cancelled("the client went away"))
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

    # -- the lane's thread -------------------------------------------------------------------
    def _step(self) -> bool:
        """Wait for a batch and run it; False when the engine is closed and nothing waits."""
        with self._wake:
            while self._broken is None and self._is_idle():
                self._wake.wait()
            if self._broken is not None:
                raise self._broken
            if not self._batcher:
                return False
            batch, outcomes = self._next()
            if batch is None and not outcomes and self._in_flight:
                self._wake.wait()  # what waits is not to be queued behind what runs
        self._settle(outcomes)
        if batch is None:
            return True
        if self._staging is None:
            self._execute(batch)
        else:
            self._launch(batch, self._staging)
        return True

    def _is_idle(self) -> bool:
        """Whether the lane has nothing to begin, or no room for it; with the lock held."""
        if self._in_flight >= self._batcher.pipeline_depth:
            return True
        return not self._batcher and (self._state == "running" or self._in_flight > 0)

    def _ended(self, error: str | None) -> None:
        """The lane's thread ends: whoever still waits is told why."""
        with self._wake:
            self._failure = error
            self._state = "closed" if error is None else "failed"
            requests, why = list(self._requests), self._not_running()
            self._requests.clear()
            for request in requests:
                request.over = True
                request.works.clear()
            try:
                self._batcher.clear()
            finally:  # whatever state it is in, nobody waits for ever
                self._settle([(request, why) for request in requests])

    def _post(self) -> None:
        """Wake the event loops that have answers."""
        for mailbox in list(self._mailboxes.values()):
            mailbox.post()

    def _waiting(self, kind: str) -> int:
        with self._wake:
            batcher = self._batcher
            return batcher.urgent_rows if kind == "urgent" else batcher.background_rows

    def _execute(self, batch: Batch) -> KeyboardInterrupt | None:
        """Run a batch and hand out its answers; learning and counting come after them.

        Returns:
            What the user stopped the model with, in a thread that is not the lane's.
        """
        begun = self._clock()
        loaded: LoadedModel = batch.parts[0].work.owner.ran(batch.key)
        halvings = loaded.halvings
        try:
            rows = _rows_of(batch)
            output = loaded.run(loaded.joined(rows))
            loaded.see(rows)
        except BaseException as error:  # noqa: BLE001 - a model's failure is its batch's alone
            self._failed(batch, loaded, error)
            if isinstance(error, KeyboardInterrupt) and not self._lane.is_current:
                return error
            return None
        self._finish(batch, loaded, output, begun, self._clock(), halvings)
        return None

    def _launch(self, batch: Batch, staging: Staging) -> None:
        """Send a batch to an accelerator; what comes back is handed out by another thread."""
        loaded: LoadedModel = batch.parts[0].work.owner.ran(batch.key)
        halvings = loaded.halvings
        try:
            rows = _rows_of(batch)
            launched = loaded.launch(staging, rows)
            loaded.see(rows)
        except BaseException as error:  # noqa: BLE001 - as in _execute
            self._failed_there(batch, loaded, error, staging)
            return
        if staging.depth == 1:
            self._collect(batch, loaded, launched, halvings, staging)
        else:
            self._lane.later(lambda: self._collect(batch, loaded, launched, halvings, staging))

    def _collect(
        self,
        batch: Batch,
        loaded: LoadedModel,
        launched: Launched,
        halvings: int,
        staging: Staging,
    ) -> None:
        """Wait for a batch that was launched, and hand out its answers."""
        try:
            try:
                output, seconds = launched.wait()
            except BaseException as error:  # noqa: BLE001 - as in _execute
                self._failed_there(batch, loaded, error, staging)
                return
            now = self._clock()
            self._finish(batch, loaded, output, now - seconds, now, halvings)
        except BaseException as error:  # noqa: BLE001 - the engine's own books: ends the lane
            self._break(error)

    def _failed_there(
        self, batch: Batch, loaded: LoadedModel, error: BaseException, staging: Staging
    ) -> None:
        """A batch raised on an accelerator: see :meth:`_failed`; end the lane if the device died.

        Which batch it died of is not known then: one that was launched before may be told later.
        """
        why = self.device.failure()
        if why is None:
            self._failed(batch, loaded, error)
            return
        staging.abandon()
        self._break(_lost(self.device, why), error)

    def _break(self, error: BaseException, cause: BaseException | None = None) -> None:
        """Let the lane end of this."""
        error.__cause__ = cause
        with self._wake:
            self._broken = error
            self._wake.notify()

    def _finish(
        self,
        batch: Batch,
        loaded: LoadedModel,
        output: dict[str, Any],
        begun: float,
        now: float,
        halvings: int,
    ) -> None:
        """Hand out the answers of a batch; learning and counting come after them."""
        outcomes = self._deliver(batch, loaded, output, begun, now)
        self._settle(outcomes)
        with self._wake:
            if loaded.most < batch.rows:
                self._batcher.shrink(batch.key, loaded.most)
            self._busy += now - begun
            self._batcher.finished(batch, now - begun, now)
            self._give_back()
        self.metrics.busy_seconds.inc(now - begun)
        if loaded.halvings > halvings:
            self.metrics.halved.labels(loaded.spec.name).inc(loaded.halvings - halvings)
        meters = self.metrics.of_model(loaded.spec.name)
        meters.batch_rows.observe(batch.rows)
        meters.batch_seconds.observe(now - begun)

    def _give_back(self) -> None:
        """The device is free; with the lock held."""
        self._in_flight -= 1
        if self._batcher or self._state != "running":
            self._wake.notify()

    def _failed(self, batch: Batch, loaded: LoadedModel, error: BaseException) -> None:
        """A batch raised: search for the callers at fault, and tell those that were found."""
        self.metrics.failed_batches.labels(loaded.spec.name).inc()
        with self._wake:
            works = self._batcher.failed(batch, self._clock())
            self._give_back()
            requests = list(dict.fromkeys(work.owner for work in works))
            outcomes: Outcomes = []
            for request in requests:
                alone = len(requests) == 1
                outcomes += self._fail((request,), _model_error(loaded, batch, error, alone=alone))
        if outcomes:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno} in {place.name}"
            name, kind = loaded.spec.name, type(error).__name__
            _log.warning("model %s failed on %d rows: %s at %s", name, batch.rows, kind, where)
        self._settle(outcomes)

    def _deliver(
        self,
        batch: Batch,
        loaded: LoadedModel,
        output: dict[str, Any],
        begun: float,
        now: float,
    ) -> Outcomes:
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
                own = loaded.own(output, span, request.rows)
                result = self._result(batch, part, own, begun, now)
            except BaseException as error:  # noqa: BLE001 - as in _execute
                told = _model_error(loaded, batch, error, alone=True)
                if isinstance(error, PlinthError):
                    told = error
                with self._wake:
                    outcomes += self._fail((request,), told)
                continue
            if result is not None:
                outcomes.append((request, result))
        return outcomes

    def _result(
        self, batch: Batch, part: BatchSlice, own: dict[str, Any], begun: float, now: float
    ) -> Result | None:
        """What becomes of a request with these rows; None while others are still to come."""
        request: Request = part.work.owner
        seconds, timing, work = now - begun, request.timing, part.work
        timing.device += seconds
        timing.co_batched += seconds * (1 - part.rows / batch.rows)
        timing.batch_rows = max(timing.batch_rows, batch.rows)
        if not request.put(own, part.rows):
            return None
        timing.queue = max(0.0, now - work.arrival - timing.device)
        timing.total = now - work.arrival
        value = request.value()
        request.over = True
        self._requests.discard(request)
        request.works.clear()  # a cycle would be left to the garbage collector
        ran, late = request.ran(work.key), now > work.deadline
        variant = ran.executable.precision if ran is request.loaded.degraded else None
        instead = variant or ran.spec.name
        self._count(request, instead, _why_late(work, batch, begun) if late else None)
        return Result(value, timing, ran.model, late, ran.precision, variant)

    def _count(self, request: Request, name: str, cause: str | None) -> None:
        asked = request.loaded.spec.name
        self.metrics.count(asked, "late" if cause else "answered")
        meters = self.metrics.of_model(asked)
        meters.call_seconds.observe(request.timing.total)
        meters.queue_seconds.observe(request.timing.queue)
        if cause:
            self.metrics.sla_misses.labels(asked, cause).inc()
        if name != asked:
            self.metrics.degraded.labels(asked, name).inc()


def _staging(device: Device, depth: int | None) -> Staging | None:
    """What carries batches to a device and back; ``None`` on the CPU, whose rows are there.

    Raises:
        ConfigError: an impossible depth.
    """
    most = 1 if device.kind == "cpu" else 16
    if depth is not None and not 1 <= depth <= most:
        expected = "1" if most == 1 else f"1 to {most}"
        raise ConfigError(f"pipeline_depth is {depth}, expected {expected} on {device}")
    if device.kind == "cpu":
        return None
    device.keep_float32()
    return Staging(device, depth or 1)


def _lost(device: Device, why: str) -> DeviceError:
    return DeviceError(
        f"{device} does nothing any more in this process: {why}",
        hint="start the process again; an index outside of a table does this: give integers bounds",
    )


def _refuse_lost(device: Device) -> None:
    """Raises DeviceError if a device failed in this process."""
    if (why := device.failure()) is not None:
        raise _lost(device, why)


def _rows_of(batch: Batch) -> list[dict[str, Tensor]]:
    """The rows of each part of a batch, as their callers gave them."""
    return [part.work.owner.take(part.work.first + part.first, part.rows) for part in batch.parts]


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
    if alone and isinstance(error, OutOfMemory | ModelError):
        return error
    told = ModelError(
        f"model {loaded.spec.name} failed on {batch.rows} rows: {type(error).__name__}",
        hint="the log says where; are the values in the range that the model takes?",
    )
    told.__cause__ = error if alone else None
    return told
