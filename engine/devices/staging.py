"""Batches on their way to an accelerator and back, while it computes others.

Rows are gathered in pinned memory that is used again and again, and copied on a stream of their
own in each direction. ``depth`` batches may be on their way at once: the host gathers the next
one, and takes the last one apart, while the device runs another.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from plinth.engine.devices.device import Device
from plinth.engine.errors import DeviceError

Rows = Mapping[str, Tensor]
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Puts a forward into the current stream: rows on the device to outputs on the device."""

LARGEST = 256 << 20
"""Bytes of one pinned buffer; what is larger is copied from where it lies, and waited for."""
_ALIGNED = 64
_ABANDONED: list[object] = []
_DRAIN_SECONDS = 60.0


@dataclass(slots=True)
class _Slot:
    """The pinned memory of one batch on its way."""

    device: Device
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def views(self, way: str, wanted: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> Rows:
        """A tensor for each name, in one buffer that grows by doubling; ordinary ones if large."""
        sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in wanted.items()}
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name], end = end, end + -(-size // _ALIGNED) * _ALIGNED
        if end > LARGEST:
            return {name: torch.empty(*shape, dtype=dt) for name, (dt, shape) in wanted.items()}
        buffer = self.buffers.get(way)
        if buffer is None or len(buffer) < end:
            self.buffers[way] = buffer = self.device.pinned(1 << max(end - 1, 4095).bit_length())
        return {
            name: buffer[starts[name] : starts[name] + sizes[name]].view(dtype).view(*shape)
            for name, (dtype, shape) in wanted.items()
        }


class Launched:
    """A batch on its way; hold it until :meth:`wait` has returned.

    Args:
        outputs: pinned, filled when ``ended`` has happened.
        held: what the device reads and writes until then.
        begun: before the rows were gathered.
        ended: the outputs are on the host.
        before: the end of the batch launched before, which the device had to do first.
        free: gives the pinned memory back.
    """

    def __init__(
        self,
        outputs: Rows,
        held: tuple[object, ...],
        begun: torch.Event,
        ended: torch.Event,
        before: torch.Event | None,
        free: Callable[[], None],
    ) -> None:
        self._outputs = outputs
        self._held = held
        self._begun, self._ended, self._before = begun, ended, before
        self._free = free

    def wait(self) -> tuple[dict[str, Tensor], float]:
        """Its outputs, in memory of the caller's own, and the seconds it cost.

        They are counted by the device, from the gathering of its rows or the end of the batch
        before, whichever was later, until its outputs were on the host.

        Raises:
            RuntimeError: the device failed, for this process for good.
        """
        try:
            self._ended.synchronize()
            taken = self._begun.elapsed_time(self._ended)
            if self._before is not None:
                taken = min(taken, self._before.elapsed_time(self._ended))
            outputs = {name: tensor.clone() for name, tensor in self._outputs.items()}
        finally:
            self._held, self._before = (), None
            self._free()
        return outputs, max(taken / 1e3, 1e-6)


class Staging:
    """Sends batches to one device; one thread launches, any thread waits.

    Args:
        device: an accelerator.
        depth: batches on their way at once, 1 or more; the launch of one more waits.
    """

    def __init__(self, device: Device, depth: int) -> None:
        self.device = device
        self.depth = depth
        self._inward, self._compute, self._outward = (device.stream() for _ in range(3))
        self._slots: queue.LifoQueue[_Slot] = queue.LifoQueue()
        self._last: torch.Event | None = None
        self._all = [_Slot(device) for _ in range(depth)]
        for slot in self._all:
            self._slots.put(slot)

    def launch(self, run: Run, parts: Sequence[Rows]) -> Launched:
        """Send rows of several calls as one batch.

        Args:
            run: the model.
            parts: rows (n, ...) by input name of each call, joined in this order.

        Raises:
            DeviceError: the batches on their way do not come back.
            BaseException: whatever the model raises while it is launched.
        """
        slot = self._take()
        try:
            return self._launch(slot, run, parts)
        except BaseException:
            # What was launched of it may still read its rows: torn ones could stop the device.
            self.device.failure()
            self._slots.put(slot)
            raise

    def abandon(self) -> None:
        """The device failed: keep the pinned memory, for to free it would abort the process."""
        _ABANDONED.append([slot.buffers for slot in self._all])

    def drain(self) -> None:
        """Wait until every batch on its way has come back, and give its memory back.

        Raises:
            DeviceError: they do not come back.
        """
        slots = [self._take() for _ in range(self.depth)]
        for slot in slots:
            self._slots.put(slot)
        self.device.give_back_memory()

    def _take(self) -> _Slot:
        try:
            return self._slots.get(timeout=_DRAIN_SECONDS)
        except queue.Empty:
            raise DeviceError(
                f"{self.device} gave no batch back for {_DRAIN_SECONDS:.0f} s",
                hint="is another process using it, or does a model run for so long?",
            ) from None

    def _launch(self, slot: _Slot, run: Run, parts: Sequence[Rows]) -> Launched:
        begun, arrived, computed, ended = (self.device.event() for _ in range(4))
        begun.record(self._inward)
        rows = _gathered(slot, parts)
        with torch.inference_mode(), self._inward:
            given = {
                name: tensor.to(self.device.torch, non_blocking=True)
                for name, tensor in rows.items()
            }
        arrived.record(self._inward)
        self._compute.wait_event(arrived)
        with self._compute:
            found = run(given)
        computed.record(self._compute)
        self._outward.wait_event(computed)
        wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
        outputs = slot.views("out", wanted)
        with self._outward:
            for name, tensor in found.items():
                outputs[name].copy_(tensor, non_blocking=True)
        ended.record(self._outward)
        before, self._last = self._last, ended
        held = (given, found, rows)
        return Launched(outputs, held, begun, ended, before, lambda: self._slots.put(slot))


def _gathered(slot: _Slot, parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one behind the other, in pinned memory.

    Rows that a caller has on a device already are joined there.
    """
    first = parts[0]
    if any(tensor.device.type != "cpu" for part in parts for tensor in part.values()):
        return {name: torch.cat([part[name] for part in parts]) for name in first}
    count = sum(len(next(iter(part.values()))) for part in parts)
    wanted = {name: (each.dtype, (count, *each.shape[1:])) for name, each in first.items()}
    rows = slot.views("in", wanted)
    with torch.inference_mode():
        for name, whole in rows.items():
            torch.cat([part[name] for part in parts], out=whole)
    return rows
