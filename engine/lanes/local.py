"""A lane on a device of this process.

On the CPU, and on an accelerator with one batch in flight, a batch runs in the thread that gives
it. With more in flight a second thread waits for what the first has launched.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from weakref import WeakValueDictionary

from plinth.engine.backends.base import cpu_threads
from plinth.engine.devices.device import Device
from plinth.engine.devices.staging import Staging
from plinth.engine.errors import ConfigError
from plinth.engine.lanes.base import Held, Lane, LaneDied, Ran, Rows, Unit
from plinth.engine.memory.residency import HELD_UP

_REHEARSAL_SECONDS = 5.0
"""Of the rehearsals of a model; none is begun later."""
_COLLECT_SECONDS = 60.0
"""For which the end of a lane waits for what its device still runs, at most."""


class LocalLane(Lane):
    """Runs batches on one device of this process.

    Args:
        device: which.
        depth: batches in flight; ``None``: 1. The CPU has 1.
        place: its place among the lanes of this device; each has its own memory to work in.
        threads: CPU threads of a forward; ``None`` as torch has it.
        clock: seconds, monotonic; accelerators have their own.

    Raises:
        ConfigError: an impossible depth.
    """

    checked = True  # by the model itself

    def __init__(
        self,
        device: Device,
        depth: int | None = None,
        place: int = 0,
        threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(device, _depth(device, depth))
        self._clock = clock
        self.place = place
        self.inline = self.depth == 1
        self._threads = threads
        self._models: WeakValueDictionary[str, Held] = WeakValueDictionary()
        self._staging: Staging | None = None
        if device.kind != "cpu":
            device.keep_float32()
        self._later: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._collector: threading.Thread | None = None

    @property
    def kind(self) -> str:
        """See :class:`Lane`."""
        return "local"

    def start(self) -> None:
        """See :class:`Lane`."""
        if self.device.kind != "cpu":
            why = self.device.failure()
            if why is not None:
                raise _lost(self.device, why)
            self._staging = Staging(self.device, self.depth)

    def hold(self, model: Held) -> None:
        """See :class:`Lane`."""
        self._models[model.id] = model

    def can_run(self, model: str) -> bool:
        """See :class:`Lane`."""
        return model in self._models

    def rehearsals(
        self, make_rows: Callable[[int], Rows], model: Held
    ) -> Iterator[Callable[[], None]]:
        """Batches for the lane's thread to run before a model serves here; none on the CPU.

        A thread's first batches are slow on an accelerator: each stream has memory of its own,
        pinned memory grows, and cuDNN keeps the plans of convolutions by thread and number of rows
        (torch, aten/src/ATen/native/cudnn/Conv_v8.cpp). So they are of 1, 2, 4 ... rows, and
        where a model has convolutions of every number of rows.

        Args:
            make_rows: valid rows, so many.
            model: held here.
        """
        if self.device.kind == "cpu":
            return
        most, until = model.most, [0.0]
        doubled = [*(1 << power for power in range(most.bit_length())), most]
        others = range(1, most + 1) if model.convolves else ()
        for count in dict.fromkeys((*doubled, *others)):
            yield partial(self._rehearse, model.id, partial(make_rows, count), until)

    def _rehearse(self, model: str, make_rows: Callable[[], Rows], until: list[float]) -> None:
        now = self._clock()
        until[0] = until[0] or now + _REHEARSAL_SECONDS
        if now < until[0] and self.can_run(model):
            self._launch(Unit(-1, model, [make_rows()]))()

    def submit(self, unit: Unit) -> Future[Ran]:
        """See :class:`Lane`."""
        future: Future[Ran] = Future()
        if self.inline:
            _settle(future, lambda: self.run(unit))
            return future
        try:
            rest = self._launch(unit)
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            future.set_exception(error)
        else:
            self._collect(lambda: _settle(future, rest))
        return future

    def run(self, unit: Unit) -> Ran:
        """See :class:`Lane`."""
        if self.device.kind != "cpu":
            return self._launch(unit)()
        model = self._models[unit.model]
        halvings, times, begun = model.halvings, HELD_UP.times, self._clock()
        outputs = model.run(model.joined(list(unit.parts)), self.place)
        seconds = self._clock() - begun
        halvings, held_up = model.halvings - halvings, HELD_UP.times > times
        return Ran(outputs, seconds, model.most, halvings, model.precision, held_up)

    def _launch(self, unit: Unit) -> Callable[[], Ran]:
        """Send a unit to an accelerator; what is given waits for it."""
        if self._staging is None:
            raise LaneDied(f"the lane of {self.device} was not started")
        model, staging = self._models[unit.model], self._staging
        halvings = model.halvings
        with self._telling(staging):
            launched = model.launch(staging, unit.parts, self.place)

        def wait() -> Ran:
            with self._telling(staging):
                outputs, seconds = launched.wait()
            return Ran(outputs, seconds, model.most, model.halvings - halvings, model.precision)

        return wait

    @contextmanager
    def _telling(self, staging: Staging) -> Iterator[None]:
        """Raise :class:`LaneDied` in the place of what is raised when the device failed.

        Which unit it died of is not known then: one that was launched before may be told later.
        """
        try:
            yield
        except BaseException as error:
            why = self.device.failure()
            if why is None:
                raise
            staging.abandon()
            raise _lost(self.device, why) from error

    def _collect(self, rest: Callable[[], None]) -> None:
        """Do the rest of a unit on the second thread, behind the rests before."""
        if self._collector is None:
            self._collector = threading.Thread(
                target=self._serve, name="plinth-collect", daemon=True
            )
            self._collector.start()
        self._later.put(rest)

    def _serve(self) -> None:
        with cpu_threads(self._threads):
            while (rest := self._later.get()) is not None:
                rest()
                del rest  # it holds a batch, for as long as the next one takes to come

    def is_current(self) -> bool:
        """See :class:`Lane`."""
        return threading.current_thread() is self._collector

    def close(self) -> None:
        """See :class:`Lane`."""
        if self._collector is not None:
            self._later.put(None)
            if self._collector is not threading.current_thread():
                self._collector.join(_COLLECT_SECONDS)
            self._collector = None


def _settle(future: Future[Ran], work: Callable[[], Ran]) -> None:
    try:
        found = work()
    except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
        future.set_exception(error)
    else:
        future.set_result(found)


def _depth(device: Device, depth: int | None) -> int:
    most = 1 if device.kind == "cpu" else 16
    if depth is not None and not 1 <= depth <= most:
        expected = "1" if most == 1 else f"1 to {most}"
        raise ConfigError(f"pipeline_depth is {depth}, expected {expected} on {device}")
    return depth or 1


def _lost(device: Device, why: str) -> LaneDied:
    return LaneDied(
        f"{device} does nothing any more in this process: {why}",
        hint="start the process again; an index outside of a table does this: give integers bounds",
    )
