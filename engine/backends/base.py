"""What an execution backend is: it compiles a model into something that runs rows.

A backend is found through the entry-point group ``plinth.backends``, whoever wrote it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plinth.distribution import version
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, InputError, ModelError
from plinth.engine.models.binding import outputs_by_name
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy


@runtime_checkable
class Executable(Protocol):
    """A model ready to run.

    Attributes:
        backend: name of the backend that made it.
        precision: name of the policy it really runs, such as ``"fp32"``.
        device: where it runs.
        weights: bytes that its parameters and buffers take, tied ones counted once.
        report: what was asked for, what was resolved, and why.
    """

    backend: str
    precision: str
    device: Device
    weights: int
    report: dict[str, Any]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows: tensor (n, ...) by input name to tensor (n, ...) by output name.

        The inputs may lie on the host and are never written to; the outputs lie on the device.
        """
        ...

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run example rows, and learn from them whether inputs or outputs must be copied."""
        ...

    def release(self) -> bool:
        """Give back the memory that earlier runs keep; whether there may have been some."""
        ...

    def is_native(self, rows: int) -> bool:
        """Whether a run of so many rows calls no Python of the model, which could wait for ever."""
        ...


class OneAtATime:
    """An executable that lanes share because there is no second one: a forward waits for others.

    Args:
        inner: the one.
        lock: of all that share it.
    """

    def __init__(self, inner: Executable, lock: threading.Lock) -> None:
        self._inner = inner
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        with self._lock:
            return self._inner.run(inputs)

    def release(self) -> bool:
        """See :class:`Executable`."""
        with self._lock:
            return self._inner.release()


def another(executable: Executable) -> Executable | None:
    """One more over the same weights, which another thread may run at the same time.

    Returns:
        ``None`` where its backend knows none: an executable without a method ``another``.
    """
    made = getattr(executable, "another", None)
    found: Executable | None = None if made is None else made()
    return found


class Wrapped:
    """An :class:`Executable` around another one, which does all that is not done otherwise.

    Args:
        inner: the other one.
    """

    def __init__(self, inner: Executable) -> None:
        self.inner = inner
        self.backend = inner.backend
        self.precision = inner.precision
        self.device = inner.device
        self.weights = inner.weights
        self.report = inner.report

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        return self.inner.run(inputs)

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        return self.inner.probe(inputs)

    def release(self) -> bool:
        """See :class:`Executable`."""
        return self.inner.release()

    def is_native(self, rows: int) -> bool:
        """See :class:`Executable`."""
        return self.inner.is_native(rows)


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can be used in this process: its version, or the reason why not."""

    version: str | None
    reason: str | None = None


def installed(extra: str, *modules: str) -> Availability:
    """Of a backend made of packages: the first one's version, or which are not installed.

    Args:
        extra: the extra of ``plinth-engine`` that brings them.
        modules: what is imported, each named as its distribution.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        why = f"not installed: {', '.join(missing)} (pip install 'plinth-engine[{extra}]')"
        return Availability(None, why)
    return Availability(version(modules[0]))


@runtime_checkable
class Backend(Protocol):
    """A way to run models; made without arguments, and cheap to make.

    Attributes:
        name: that of its entry point, and of the setting.
        automatic: ``"auto"`` tries it; False where compiling takes minutes.
    """

    name: str
    automatic: bool

    def available(self) -> Availability:
        """Its version, or why it cannot be used here; imports nothing heavy."""
        ...

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """``None`` if it can run the model so, else the reason why not."""
        ...

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> Executable:
        """Make it ready.

        Raises:
            ModelError: the model cannot be made to run here.
        """
        ...


def named(spec: ModelSpec, output: Any, rows: int) -> dict[str, Tensor]:
    """What a forward gave, by the names of the contract.

    Raises:
        ModelError: an output is missing, has another shape or kind of numbers than the contract
            says, or rows were lost.
    """
    found = outputs_by_name(spec, output)
    for want in spec.outputs:
        got = want.unlike(found[want.name], rows)
        if got is None:
            continue
        raise ModelError(
            f"model {spec.name}: output {want.name} is {got} for {rows} rows, expected "
            f"{(rows, *want.shape)} {want.dtype}",
            hint="one output row for each input row, as the outputs of the spec say",
        )
    return found


def check_finite(spec: ModelSpec, given: Mapping[str, npt.NDArray[Any]], library: str) -> None:
    """Refuse what a library's kernels would make numbers of where torch gives NaN.

    Raises:
        InputError: an input holds NaN or infinity.
    """
    for name, values in given.items():
        if values.dtype.kind != "f":
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            total = values.sum()  # many times as fast as to look at each
        if not np.isfinite(total) and not np.isfinite(values).all():
            raise InputError(
                f"model {spec.name}: input {name} holds NaN or infinity, which {library} would "
                "hide",
                field=name,
                hint="send numbers, or use backend eager",
            )


_LOCK = threading.Lock()
_HELD: list[int] = []


def thread_state() -> tuple[object, ...]:
    """What of torch's settings belongs to the calling thread and changes what a model computes.

    CPU threads, autocast, and modes such as ``with torch.device(...)`` or ``FakeTensorMode``.
    """
    return (
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


def check_cpu_threads(threads: int | None) -> None:
    """Whether :func:`cpu_threads` could hold this number now.

    Raises:
        ConfigError: a block elsewhere in the process holds another number.
    """
    if threads is not None and _HELD and _HELD[-1] != threads:
        raise ConfigError(
            f"threads is {threads}, but an engine of this process runs with {_HELD[-1]}",
            hint="give all engines of a process the same threads",
        )


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads in this thread for the length of the block.

    A part of the setting (that of the BLAS library) counts for the whole process. It is set
    when the first block begins and given back when the last one ends.

    Args:
        threads: how many; ``None`` leaves the setting as it is.

    Raises:
        ConfigError: a block elsewhere in the process holds another number.
    """
    if threads is None:
        yield
        return
    with _LOCK:
        check_cpu_threads(threads)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        _HELD.append(threads)
    try:
        yield
    finally:
        with _LOCK:
            _HELD.remove(threads)
            torch.set_num_threads(before)
            if _HELD and before != threads:
                # The process-wide part was given back with ours. A thread of its own sets it
                # again, so that the part that counts for this thread alone stays given back.
                again = threading.Thread(target=torch.set_num_threads, args=(threads,))
                again.start()
                again.join()
