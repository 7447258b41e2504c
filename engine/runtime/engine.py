"""The engine: one thread that touches the device, many callers that wait for it.

Callers drive their own flows; each :class:`Call` becomes work in the :class:`Batcher`, whose
batches the device thread runs one after the other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from plinth.engine import metrics
from plinth.engine.devices.device import pick
from plinth.engine.errors import Cancelled, Closed, ModelError, PlinthError, nearest
from plinth.engine.flow import Answer, Call, Flow, Sla, cat_rows
from plinth.engine.models.store import Model
from plinth.engine.runtime.flow_driver import Clock, FlowDriver, Result
from plinth.engine.runtime.loaded_model import LoadedModel, Range, load_model
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


class Engine:
    """Runs flows on one device under deadlines; use it as a context manager.

    Args:
        batcher: the policy; by default one with a latency model of its own.
        clock: seconds, monotonic.
        device: ``"auto"``, or a name; see :func:`plinth.engine.devices.device.pick`.
        precision: for models that name none: a preset, or operation class to precision.
        backend: for models that name none: a name, ``"auto"`` for the fastest right one, or
            ``None`` for torch eager (ONNX Runtime for ONNX files).
        threads: CPU threads of one forward; ``None`` as torch has it.
        max_queue: rows of urgent work that may wait (without a batcher of your own).
        memory_budget: bytes one model may take; ``None``: a share of what is available.
        latency_file: where learned costs are kept between runs; ``None`` forgets them.

    Raises:
        ConfigError, DeviceError: there is no such device.
    """

    def __init__(
        self,
        batcher: Batcher | None = None,
        clock: Clock = time.monotonic,
        *,
        device: str = "auto",
        precision: str | Mapping[str, str] = "fp32",
        backend: str | None = None,
        threads: int | None = None,
        max_queue: int = 4096,
        memory_budget: int | None = None,
        latency_file: Path | None = None,
    ) -> None:
        self.device = pick(device)
        self._batcher = batcher or Batcher(LatencyModel(latency_file), max_queue=max_queue)
        self._batcher.latency.restore()
        self._clock = clock
        self._precision = precision
        self._backend = backend
        self._threads = threads
        self._budget: int | str = "auto" if memory_budget is None else memory_budget
        self._models: dict[str, LoadedModel] = {}
        self._keys: dict[str, LoadedModel] = {}
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()
        self._wake = threading.Condition()
        self._ending = threading.Lock()  # one thread at a time ends the engine; others wait for it
        self._closing = False
        self._thread: threading.Thread | None = None
        self._busy = 0.0
        self._started = clock()
        self._busy_seconds = metrics.DEVICE_SECONDS.labels(str(self.device))
        metrics.show_memory(self.device)
        metrics.show_queue(self._waiting)

    # -- models and life ---------------------------------------------------------------------
    def add(
        self,
        model: Model,
        *,
        sla: Sla | None = None,
        batch_range: Range = (1, 128),
        backend: str | None = None,
        precision: str | Mapping[str, str] | None = None,
    ) -> None:
        """Make a model callable by its name: compiled, and measured before it serves.

        Args:
            model: the model; one whose inputs have free sizes is measured as it runs.
            sla: the promise for calls that bring none.
            batch_range: smallest and largest batch, rows; ``"auto"``: found by measuring.
            backend: execution backend; ``None``: the engine's.
            precision: policy; ``None``: the engine's.

        Raises:
            ConfigError: an impossible range, backend or precision.
            ModelError: nothing can run the model.
            OutOfMemory: not even one row fits into the budget.
            Closed: the engine was closed.
        """
        if self._closing:
            raise self._takes_nothing()
        promise = sla or Sla()
        loaded = load_model(
            model,
            promise,
            self.device,
            self._batcher.latency,
            precision=self._precision if precision is None else precision,
            backend=backend or self._backend or ("onnxruntime" if model.onnx else "eager"),
            threads=self._threads,
            batch_range=batch_range,
            budget=self._budget,
        )
        with self._wake:
            self._batcher.register_sla(promise)
            self._models[model.spec.name] = loaded
            known, self._keys = self._keys, {}
            for key, old in known.items():
                self._register_key(key, old)

    def start(self) -> Engine:
        """Start the device thread; after :meth:`close`, again."""
        with self._wake:
            if self._thread is None:
                self._closing = False
                self._thread = threading.Thread(
                    target=self._loop, name="plinth-device", daemon=True
                )
                self._thread.start()
        return self

    def close(self, drain: bool = True) -> None:
        """Take no new work, stop the device thread, keep what was learned of costs.

        Any thread may call it, and several at once: each returns when the engine has ended.
        In the device thread itself, as in a callback of :meth:`submit`'s future, it returns at
        once and the engine ends after it.

        Args:
            drain: finish what was accepted first; otherwise it fails with :class:`Closed`.
        """
        with self._wake:
            self._closing = True
            if not drain:
                for work in self._batcher.clear():
                    self._fail(work.payload[0], Closed("the engine was closed"))
            self._wake.notify_all()
            thread = self._thread
        if thread is threading.current_thread():
            return
        with self._ending:
            if thread is not None:
                thread.join()
                with self._wake:
                    if self._thread is thread:
                        self._thread = None
            self._batcher.latency.save()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """Device, models, what waits, and the share of time the device was busy so far."""
        with self._wake:
            return {
                "running": self._thread is not None and not self._closing,
                "device": str(self.device),
                "models": {name: loaded.status() for name, loaded in self._models.items()},
                "urgent_rows": self._batcher.urgent_rows,
                "background_rows": self._batcher.background_rows,
                "utilisation": self._busy / max(self._clock() - self._started, 1e-9),
            }

    # -- flows -------------------------------------------------------------------------------
    def run(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the calling thread until it returns.

        Raises:
            Refused: a call was refused; the flow was told and did not handle it.
        """
        driver = FlowDriver(flow, self._clock)
        while (call := driver.call) is not None:
            try:
                driver.send(self.submit(call, sla).result())
            except PlinthError as error:
                driver.throw(error)
        return driver.answer()

    async def run_async(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the running event loop; cancelling the task cancels its work."""
        driver = FlowDriver(flow, self._clock)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = Mailbox(loop)
        while (call := driver.call) is not None:
            try:
                future: asyncio.Future[Result] = loop.create_future()
                request = self._admit(call, sla, LoopWaiter(mailbox, future))
                try:
                    result = await future
                except asyncio.CancelledError:
                    self._cancel(request)
                    raise
                driver.send(result)
            except PlinthError as error:
                driver.throw(error)
        return driver.answer()

    def submit(self, call: Call, sla: Sla | None = None) -> Future[Result]:
        """Queue one call; the future also carries refusals. Cancelling it frees its place."""
        future: Future[Result] = Future()
        request = self._admit(call, sla, ThreadWaiter(future))
        future.add_done_callback(lambda done: self._cancel(request) if done.cancelled() else None)
        return future

    def _admit(self, call: Call, sla: Sla | None, waiter: Waiter) -> Request:
        loaded = self._models.get(call.model)
        if loaded is None:
            raise ModelError(
                f"there is no model {call.model}", hint=nearest(call.model, self._models)
            )
        request = request_of(loaded, call, waiter)
        promise = sla or loaded.sla
        step = loaded.most if promise.deadline_ms is not None else request.total
        with self._wake:
            if self._closing or self._thread is None:
                self._fail(request, self._takes_nothing())
                return request
            now = self._clock()
            self._register_key(request.key, loaded)
            for first in range(0, request.total, step):
                work = Work(
                    request.key, min(step, request.total - first), now, promise, (request, first)
                )
                request.works.append(work)
                refusal = self._batcher.admit(work, now)
                if refusal is not None:
                    self._fail(request, refusal.error)
                    break
            self._wake.notify()
        return request

    def _takes_nothing(self) -> Closed:
        if self._closing:
            return Closed("the engine was closed and takes no new work", hint="make another")
        return Closed(
            "the engine takes no new work before it is started",
            hint="use it as a context manager, or call start()",
        )

    def _register_key(self, key: str, loaded: LoadedModel) -> None:
        """Tell the batcher of a batch key it may see for the first time."""
        if key in self._keys:
            return
        self._keys[key] = loaded
        other, cheaper = self._models.get(loaded.spec.cheaper or ""), None
        if other is not None:
            cheaper = other.key + (key.removeprefix(loaded.key) if other.free else "")
            self._register_key(cheaper, other)
        self._batcher.register(key, loaded.most, cheaper)

    def _cancel(self, request: Request) -> None:
        with self._wake:
            self._fail(request, Cancelled("the client went away"))

    def _fail(self, request: Request, error: PlinthError) -> None:
        if request.over:
            return
        request.over = True
        for work in request.works:
            self._batcher.cancel(work)
        request.works.clear()
        name = request.loaded.spec.name
        metrics.CALLS.labels(name, error.reason).inc()
        if error.reason in ("deadline", "queue_full"):
            metrics.SLA_MISSES.labels(name, error.reason).inc()
        request.waiter.settle(error)

    # -- the device thread -------------------------------------------------------------------
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._batcher and not self._closing:
                    self._wake.wait()
                if not self._batcher:
                    return
                batch, refused = self._batcher.next(self._clock())
                for refusal in refused:
                    self._fail(refusal.work.payload[0], refusal.error)
            if batch is not None:
                self._execute(batch)
            else:
                self._post()

    def _post(self) -> None:
        """Wake the event loops that have answers."""
        for mailbox in list(self._mailboxes.values()):
            mailbox.post()

    def _waiting(self, kind: str) -> int:
        with self._wake:
            batcher = self._batcher
            return batcher.urgent_rows if kind == "urgent" else batcher.background_rows

    def _execute(self, batch: Batch) -> None:
        """Run a batch and hand out its answers; learning and counting come after them."""
        begun = self._clock()
        loaded = self._keys[batch.key]
        output: dict[str, Any] | PlinthError
        try:
            rows = [
                part.work.payload[0].take(part.work.payload[1] + part.first, part.rows)
                for part in batch.parts
            ]
            output = loaded.run(cat_rows(rows))
        except PlinthError as error:
            output = error
        now = self._clock()
        first = 0
        for part in batch.parts:
            request: Request = part.work.payload[0]
            span = slice(first, first + part.rows)
            first += part.rows
            try:
                if isinstance(output, PlinthError):
                    raise output
                if not request.over:
                    own = {key: rows[span] for key, rows in output.items()}
                    self._deliver(request, batch, part, own, begun, now)
            except PlinthError as error:
                with self._wake:
                    self._fail(request, error)
        self._post()
        with self._wake:
            if loaded.most < batch.rows:
                self._batcher.shrink(batch.key, loaded.most)
            self._busy += now - begun
            self._batcher.finished(batch, now - begun, now)
        self._busy_seconds.inc(now - begun)
        meters = metrics.of_model(loaded.spec.name)
        meters.batch_rows.observe(batch.rows)
        meters.batch_seconds.observe(now - begun)

    def _deliver(
        self,
        request: Request,
        batch: Batch,
        part: BatchSlice,
        output: dict[str, Any],
        begun: float,
        now: float,
    ) -> None:
        seconds, timing, work = now - begun, request.timing, part.work
        timing.device += seconds
        timing.co_batched += seconds * (1 - part.rows / batch.rows)
        timing.batch_rows = max(timing.batch_rows, batch.rows)
        if not request.put(output, part.rows):
            return
        timing.queue = max(0.0, now - work.arrival - timing.device)
        timing.total = now - work.arrival
        value, request.over = request.value(), True
        request.works.clear()  # a cycle would be left to the garbage collector
        ran, late = self._keys[work.key], now > work.deadline
        self._count(request, ran, _why_late(work, batch, begun) if late else None)
        request.waiter.settle(Result(value, timing, ran.model, late))

    def _count(self, request: Request, ran: LoadedModel, cause: str | None) -> None:
        asked, name = request.loaded.spec.name, ran.spec.name
        metrics.CALLS.labels(asked, "late" if cause else "answered").inc()
        meters = metrics.of_model(asked)
        meters.call_seconds.observe(request.timing.total)
        meters.queue_seconds.observe(request.timing.queue)
        if cause:
            metrics.SLA_MISSES.labels(asked, cause).inc()
        if name != asked:
            metrics.DEGRADED.labels(asked, name).inc()


def _why_late(work: Work, batch: Batch, begun: float) -> str:
    """The cause of a late answer, as ``plinth_sla_misses_total`` names it."""
    if not batch.urgent:
        return "postponed"
    return "slow_batch" if begun + batch.predicted <= work.deadline else "late_start"
