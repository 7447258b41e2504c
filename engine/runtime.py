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
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.batching import Batcher
from engine.course import Clock, Course, Result
from engine.errors import Cancelled, Closed, ConfigError, InputError, ModelError, PlinthError
from engine.flow import Answer, Call, Flow, Sla, Timing, as_mapping, cat_rows, row_count
from engine.latency import LatencyModel
from engine.model import Model, ModelSpec
from engine.tiling import Canvas, Grid
from engine.work import Batch, Work

T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    model: Model
    sla: Sla
    most: int


@dataclass(slots=True, eq=False)
class _Job:
    """One Call on its way through the engine."""

    entry: _Entry
    rows: dict[str, Tensor]
    bucket: str
    grid: Grid | None = None
    future: Future[Result] = field(default_factory=Future)
    canvas: Canvas | None = field(init=False)
    outputs: list[Tensor] = field(default_factory=list)
    total: int = field(init=False)
    done: int = 0
    timing: Timing = field(default_factory=Timing)
    works: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.canvas = None if self.grid is None else Canvas(self.grid)
        self.total = row_count(self.rows) if self.grid is None else len(self.grid)

    def take(self, first: int, count: int) -> dict[str, Tensor]:
        if self.grid is None:
            return {name: rows[first : first + count] for name, rows in self.rows.items()}
        name, volume = next(iter(self.rows.items()))
        return {name: self.grid.cut(volume, first, first + count)}


class Engine:
    """Runs flows on one device under deadlines; use it as a context manager.

    Args:
        batcher: the policy; by default one with a latency model of its own.
        clock: seconds, monotonic.
    """

    def __init__(self, batcher: Batcher | None = None, clock: Clock = time.monotonic) -> None:
        self._batcher = batcher or Batcher(LatencyModel())
        self._clock = clock
        self._models: dict[str, _Entry] = {}
        self._keys: set[str] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._busy = 0.0
        self._started = clock()

    # -- models and life ---------------------------------------------------------------------
    def add(
        self, model: Model, *, sla: Sla | None = None, batch_range: tuple[int, int] = (1, 128)
    ) -> None:
        """Make a model callable by its name, measured at its smallest and largest batch.

        Args:
            model: the model; its inputs' free sizes are not warmed up.
            sla: the promise for calls that bring none.
            batch_range: smallest and largest batch, rows.
        """
        low, most = batch_range
        if not 1 <= low <= most:
            raise ConfigError(f"batch_range is {batch_range}, expected 1 <= smallest <= largest")
        promise = sla or Sla()
        name = model.spec.name
        self._batcher.expect(promise)
        self._models[name] = _Entry(model, promise, most)
        self._keys.clear()
        if not _is_free(model.spec):
            self._warm_up(model, sorted({1, min(16, most), most}))

    def start(self) -> Engine:
        """Start the device thread."""
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._loop, name="plinth-device", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Take no new work, finish what was accepted, stop the device thread."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """Models, what waits, and the share of time the device was busy since the start."""
        with self._wake:
            return {
                "running": self._thread is not None and not self._closing,
                "models": {name: entry.model.spec.version for name, entry in self._models.items()},
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
        course = Course(flow, self._clock)
        while (call := course.call) is not None:
            try:
                course.send(self.submit(call, sla).result())
            except PlinthError as error:
                course.throw(error)
        return course.answer()

    async def run_async(self, flow: Flow[T], sla: Sla | None = None) -> Answer[T]:
        """Drive a flow in the running event loop; cancelling the task cancels its work."""
        course = Course(flow, self._clock)
        while (call := course.call) is not None:
            try:
                course.send(await asyncio.wrap_future(self.submit(call, sla)))
            except PlinthError as error:
                course.throw(error)
        return course.answer()

    def submit(self, call: Call, sla: Sla | None = None) -> Future[Result]:
        """Queue one call; the future also carries refusals. Cancelling it frees its place."""
        entry = self._models.get(call.model)
        if entry is None:
            raise ModelError(f"no model {call.model}", hint=f"there are {sorted(self._models)}")
        job = self._job(entry, call)
        with self._wake:
            if self._closing or self._thread is None:
                job.future.set_exception(Closed("the engine takes no new work"))
                return job.future
            now, total = self._clock(), job.total
            promise = sla or entry.sla
            urgent = promise.deadline_ms is not None
            step = entry.most if urgent else max(total, 1)
            if total == 0:
                job.future.set_exception(ModelError(f"a call of {call.model} has no rows"))
                return job.future
            key = self._work_class(entry, job.bucket)
            for first in range(0, total, step):
                work = Work(key, min(step, total - first), now, promise, (job, first))
                job.works.append(work)
                refusal = self._batcher.offer(work, now)
                if refusal is not None:
                    self._give_up(job, refusal.error)
                    break
            self._wake.notify()
        job.future.add_done_callback(lambda _: self._forget(job))
        return job.future

    def _job(self, entry: _Entry, call: Call) -> _Job:
        spec = entry.model.spec
        names = tuple(tensor.name for tensor in spec.inputs)
        rows = as_mapping(call.rows, names)
        if call.tiling is None:
            spec.check(rows)
            return _Job(entry, rows, _bucket(spec, rows))
        volume = rows.get(names[0])
        if volume is None or volume.ndim != 4:
            shape = None if volume is None else tuple(volume.shape)
            raise InputError(
                f"a call of {spec.name} with a tiling takes a volume (c, z, y, x), got {shape}",
                field=names[0],
            )
        channels, z, y, x = volume.shape
        window = {names[0]: volume.new_empty((1, channels, *call.tiling.window), device="meta")}
        spec.check(window)
        return _Job(entry, rows, _bucket(spec, window), Grid(call.tiling, (z, y, x)))

    def _work_class(self, entry: _Entry, bucket: str) -> str:
        """The key of a model's work in one shape bucket, known to the batcher."""
        spec = entry.model.spec
        key = spec.name + bucket
        if key not in self._keys:
            self._keys.add(key)
            other, cheaper = self._models.get(spec.cheaper or ""), None
            if other is not None:
                cheaper = self._work_class(other, bucket if _is_free(other.model.spec) else "")
            self._batcher.register(key, entry.most, cheaper)
        return key

    def _model(self, key: str) -> Model:
        return self._models[key.partition("[")[0]].model

    def _forget(self, job: _Job) -> None:
        if job.future.cancelled():
            with self._wake:
                self._give_up(job, Cancelled("the client went away"))

    def _give_up(self, job: _Job, error: PlinthError) -> None:
        for work in job.works:
            self._batcher.cancel(work)
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

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
                    self._give_up(refusal.work.payload[0], refusal.error)
            if batch is not None:
                self._execute(batch)

    def _execute(self, batch: Batch) -> None:
        begun = self._clock()
        model = self._model(batch.key)
        failure: PlinthError | None = None
        output = torch.empty(0)
        try:
            rows = cat_rows(
                [
                    part.work.payload[0].take(part.work.payload[1] + part.first, part.rows)
                    for part in batch.parts
                ]
            )
            output = _forward(model, rows)
        except ModelError as error:
            failure = error
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            failure = ModelError(f"model {batch.key} failed on {batch.rows} rows: {error}")
        now = self._clock()
        self._busy += now - begun
        with self._wake:
            self._batcher.finished(batch, now - begun, now)
        first = 0
        for part in batch.parts:
            job: _Job = part.work.payload[0]
            if failure is not None:
                with self._wake:
                    self._give_up(job, failure)
            elif not job.future.done():
                own = output[first : first + part.rows]
                try:
                    self._deliver(job, batch, own, part.work, begun, now)
                except PlinthError as error:
                    with self._wake:
                        self._give_up(job, error)
            first += part.rows

    def _deliver(
        self, job: _Job, batch: Batch, output: Tensor, work: Work, begun: float, now: float
    ) -> None:
        seconds = now - begun
        timing = job.timing
        timing.device += seconds
        timing.mates += seconds * (1 - len(output) / batch.rows)
        timing.batch_rows = max(timing.batch_rows, batch.rows)
        job.done += len(output)
        if job.canvas is not None:
            job.canvas.put(output)
        else:
            job.outputs.append(output)
        if job.done < job.total:
            return
        timing.queue = max(0.0, now - work.arrival - timing.device)
        timing.total = now - work.arrival
        value = job.canvas.result() if job.canvas else torch.cat(job.outputs)
        result = Result(value, timing, self._model(work.key), now > work.deadline)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(result)

    def _warm_up(self, model: Model, sizes: list[int]) -> None:
        for rows in sizes:
            example = model.spec.example(rows)
            times = []
            for _ in range(4):
                begun = time.perf_counter()
                _forward(model, example)
                times.append(time.perf_counter() - begun)
            self._batcher.latency.seed(model.spec.name, rows, sorted(times[1:])[1])


def _is_free(spec: ModelSpec) -> bool:
    """Whether some size of the inputs is free, so that calls fall into shape buckets."""
    return any(None in tensor.shape for tensor in spec.inputs)


def _bucket(spec: ModelSpec, rows: Mapping[str, Tensor]) -> str:
    """What tells work of one shape from that of another; empty if all sizes are fixed."""
    if not _is_free(spec):
        return ""
    shapes = (
        f"{tensor.name}={'x'.join(map(str, rows[tensor.name].shape[1:]))}" for tensor in spec.inputs
    )
    return f"[{','.join(shapes)}]"


def _forward(model: Model, rows: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        output = model.module(*(rows[spec.name] for spec in model.spec.inputs))
    if not isinstance(output, Tensor) or output.shape[0] != row_count(rows):
        raise ModelError(
            f"model {model.spec.name} gave {getattr(output, 'shape', type(output))} "
            f"for {row_count(rows)} rows, expected one output row for each"
        )
    return output
