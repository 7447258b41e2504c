"""How much memory work takes, measured, and how much of it fits.

``peak(rows) = weights + fixed + per_row * rows``, held against a budget of bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from weakref import finalize

import psutil
import torch
from torch import Tensor

from plinth.engine.backends.base import Executable
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, OutOfMemory
from plinth.engine.mapped import trim

SHARE = 0.6
MOST_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What work takes and what it may take; all in bytes.

    Args:
        weights: the model's parameters and buffers, loaded before anything runs.
        fixed: what a forward takes whatever the number of rows.
        per_row: what each row adds at the peak of a forward.
        budget: what weights and forward may take together.
        how: how it was measured.
    """

    weights: int
    fixed: int
    per_row: int
    budget: int
    how: str = "given"

    def __post_init__(self) -> None:
        for name in ("weights", "fixed", "per_row", "budget"):
            if getattr(self, name) < 0:
                raise ConfigError(f"MemoryPlan.{name} is {getattr(self, name)}, expected >= 0")

    def peak(self, rows: int) -> int:
        """Bytes at the peak of a forward over so many rows."""
        return self.weights + self.fixed + self.per_row * rows

    @property
    def max_rows(self) -> int:
        """Most rows of one forward inside the budget, at most 2**20; 0 if not even one."""
        spare = self.budget - self.weights - self.fixed
        if spare < 0:
            return 0
        return min(MOST_ROWS, spare // self.per_row) if self.per_row else MOST_ROWS

    def check(self, rows: int) -> None:
        """Refuse work that does not fit.

        Raises:
            OutOfMemory: names the bytes needed and those of the budget.
        """
        needed = self.peak(rows)
        if needed > self.budget:
            most = self.max_rows
            raise OutOfMemory(
                f"{rows} rows need {needed} bytes (weights {self.weights}, fixed {self.fixed}, "
                f"{self.per_row} per row), the budget is {self.budget}",
                needed=needed,
                available=self.budget,
                hint=f"send at most {most} rows at once" if most else "raise the memory budget",
            )


def budget(device: Device, setting: int | str = "auto", *, share: float = SHARE) -> int:
    """Bytes a model may take on a device.

    Args:
        device: whose memory; for the CPU inside the cgroup's limit.
        setting: bytes, or ``"auto"`` for a share of what is available now.
        share: that share, 0 < share <= 1.

    Raises:
        ConfigError: not a number of bytes, or a share out of range.
        OutOfMemory: more bytes than the device has.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share}, expected 0 < share <= 1")
    memory = device.memory()
    if setting == "auto":
        return int(share * memory.available)
    if isinstance(setting, str) or setting < 1:
        raise ConfigError(f"memory budget is {setting!r}, expected bytes above 0 or 'auto'")
    if setting > memory.total:
        raise OutOfMemory(
            f"a budget of {setting} bytes was asked for, {device} has {memory.total}",
            needed=setting,
            available=memory.total,
        )
    return setting


class Room:
    """Bytes for what calls hold between their batches, such as the logits of a volume.

    The models of a device share one: what calls of one hold, calls and batches of another do not
    have.

    Args:
        limit: bytes that all calls may hold together.
        forward: bytes kept for the forward of one row, beside these.
    """

    def __init__(self, limit: int, forward: int = 0) -> None:
        self.limit = limit
        self.forward = forward
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that calls hold now."""
        return self._held

    @property
    def free(self) -> int:
        """Bytes of the limit that no call holds now."""
        return max(0, self.limit - self._held)

    def rows(self, plan: MemoryPlan, rows: int) -> int:
        """How many of so many rows may run at once beside what calls hold now; at least one."""
        if not self._held or not plan.per_row:
            return rows
        spare = self.free + self.forward - plan.fixed
        return max(1, min(rows, spare // plan.per_row))

    def check(self, needed: int, what: str) -> None:
        """Refuse what would not fit even if it were alone.

        Raises:
            OutOfMemory: names the bytes needed and those of the budget.
        """
        if needed > self.limit:
            raise OutOfMemory(
                f"{what} takes {needed} bytes, the memory budget leaves {self.limit}",
                needed=needed,
                available=self.limit,
                hint="raise memory_budget, or send a smaller volume",
            )

    def take(self, needed: int, what: str, holder: object) -> None:
        """Set bytes aside for as long as ``holder`` lives.

        Raises:
            OutOfMemory: they are not there; names the bytes.
        """
        self.check(needed, what)
        with self._lock:
            if self._held + needed > self.limit:
                raise OutOfMemory(
                    f"{what} takes {needed} bytes; of {self.limit} in the memory budget "
                    f"{self._held} are held by other calls",
                    needed=needed,
                    available=self.limit - self._held,
                    hint="send fewer volumes at once, or raise memory_budget",
                )
            self._held += needed
        finalize(holder, self._give, needed)

    def _give(self, returned: int) -> None:
        with self._lock:
            self._held -= returned


Rows = Mapping[str, Tensor]


_RUNS = 3  # of each size: what an allocator keeps in pieces grows with the first ones
_STRETCHES = 3  # of such runs, as long as they are short: other threads' memory is not in all
_STRETCH_SECONDS = 0.5  # in which another is begun


def measure(
    executable: Executable,
    make_rows: Callable[[int], Rows],
    rows: tuple[int, int] = (1, 16),
    *,
    weights: int = 0,
    limit: int | str = "auto",
) -> MemoryPlan:
    """Run a model at two sizes and fit the plan.

    On Linux the peak of loaded memory is read from the kernel, elsewhere sampled; on
    accelerators torch's allocator tells it. Memory that other threads take meanwhile counts
    too, so measure before serving; of short runs the least of three counts, so that what another
    took for a moment does not, and what others gave back is not taken off. A row never counts as
    less than its input and output. A backend that keeps memory between runs gives it back before
    each size.

    Args:
        executable: the compiled model.
        make_rows: inputs for so many rows.
        rows: the small and the large size, small < large; or 1 and 1 where a second row would
            take too long: then all memory counts as the row's.
        weights: bytes the model's weights take.
        limit: the budget, see :func:`budget`.

    Raises:
        ConfigError: the sizes are not in order.
        OutOfMemory: the large size does not fit on the device.
    """
    small, large = rows
    if not 1 <= small < large and rows != (1, 1):
        raise ConfigError(f"rows is {rows}, expected 1 <= small < large")
    meter = _meter(executable.device)
    first, floor = _peak(executable, make_rows(small), meter, 1 if large == 1 else _RUNS)
    if large == 1:
        return MemoryPlan(weights, 0, first, budget(executable.device, limit), meter.how)
    second, floor = _peak(executable, make_rows(large), meter, _RUNS)
    per_row = max(-(-(second - first) // (large - small)), -(-floor // large), 0)
    fixed = max(first - per_row * small, second - per_row * large, 0)
    return MemoryPlan(weights, fixed, per_row, budget(executable.device, limit), meter.how)


def peak_of(executable: Executable, inputs: Rows) -> int:
    """Bytes that a forward over some rows adds at its peak, its inputs among them.

    Raises:
        OutOfMemory: it does not fit on the device.
    """
    return _peak(executable, inputs, _meter(executable.device), 1)[0]


def _peak(executable: Executable, inputs: Rows, meter: _Meter, runs: int) -> tuple[int, int]:
    """Growth at the peak of so many forwards, and the bytes of the inputs and outputs of one."""
    begun = perf_counter()
    growth, moved = _stretch(executable, inputs, meter, runs)
    for _ in range(1, _STRETCHES):
        if perf_counter() - begun > _STRETCH_SECONDS:
            break
        growth = min(growth, _stretch(executable, inputs, meter, runs)[0])
    return max(growth, moved), moved


def _stretch(executable: Executable, inputs: Rows, meter: _Meter, runs: int) -> tuple[int, int]:
    """As :func:`_peak`, once.

    One that gave its memory back runs twice at least: then it shows what the first left in pieces.
    """
    held = sum(tensor.nbytes for tensor in inputs.values())
    released = executable.release()
    meter.start(anew=released)
    try:
        for _ in range(max(runs, 1 + released)):
            outputs: dict[str, Tensor] = {}
            outputs = executable.run(inputs)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        available = executable.device.memory().available
        raise OutOfMemory(
            f"the device ran out of memory while {executable.backend} was measured",
            needed=available + 1,
            available=available,
            hint="measure with fewer rows",
        ) from error
    finally:
        growth = meter.stop()
    return growth + held, held + sum(tensor.nbytes for tensor in outputs.values())


# -- meters ------------------------------------------------------------------------------------
class _Meter:
    """Bytes a stretch of work added at its peak."""

    how = ""

    def start(self, *, anew: bool) -> None:
        raise NotImplementedError

    def stop(self) -> int:
        raise NotImplementedError


class _Kernel(_Meter):
    """Peak loaded memory as Linux counts it.

    The least that a start found is the base until one anew: what the work keeps counts each time.
    """

    how = "peak loaded memory of the kernel"

    def __init__(self) -> None:
        self._base: int | None = None

    def start(self, *, anew: bool) -> None:
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        now = _status("VmRSS")
        self._base = now if self._base is None or anew else min(self._base, now)

    def stop(self) -> int:
        return max(0, _status("VmHWM") - (self._base or 0))


class _Sampled(_Meter):
    """Loaded memory looked at every millisecond by a thread."""

    how = "loaded memory, sampled"

    def __init__(self) -> None:
        self._base: int | None = None

    def start(self, *, anew: bool) -> None:
        self._process = psutil.Process()
        self._most = self._process.memory_info().rss
        now = self._most
        self._base = now if self._base is None or anew else min(self._base, now)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._most = max(self._most, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        self._most = max(self._most, self._process.memory_info().rss)
        return max(0, self._most - (self._base or 0))


class _Allocator(_Meter):
    how = "torch's allocator"

    def __init__(self, device: Device) -> None:
        self._device = device

    def start(self, *, anew: bool) -> None:
        self._device.synchronize()
        torch.accelerator.reset_peak_memory_stats(self._device.torch)
        self._base = torch.accelerator.memory_allocated(self._device.torch)

    def stop(self) -> int:
        self._device.synchronize()
        return max(0, torch.accelerator.max_memory_allocated(self._device.torch) - self._base)


def _meter(device: Device) -> _Meter:
    if device.kind != "cpu":
        return _Allocator(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status("VmHWM")
    except (OSError, LookupError):
        return _Sampled()
    return _Kernel()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
