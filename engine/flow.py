"""The words in which a vertical speaks to the engine: Flow, Call, Compute, Sla, Answer.

A vertical describes inference as a generator without I/O that yields :class:`Call` and is
sent tensors, or :class:`Compute` and is sent what a function gave. It never sees a device, a batch
size, a thread, a process or a socket.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from plinth.engine.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from plinth.engine.tiling import Tiling

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Tensors: TypeAlias = "Tensor | Mapping[str, Tensor]"
"""Rows of one input, or of several inputs by name; dimension 0 counts rows."""


@dataclass(frozen=True, slots=True)
class Sla:
    """A promise about time.

    Args:
        deadline_ms: allowed milliseconds from arrival to answer; ``None`` is background
            work that takes what the urgent work leaves.
        quantile: share of answers the promise covers; predictions use this quantile.
        on_overload: what happens to work that would miss: ``"reject"`` at once,
            ``"degrade"`` to the model's cheaper variant, or run ``"late"``.
        weight: share of the left-over device time among background work, a millionth to a
            million.
    """

    deadline_ms: float | None = None
    quantile: float = 0.99
    on_overload: Literal["reject", "degrade", "late"] = "reject"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.deadline_ms is not None and not 0 < self.deadline_ms < 86_400_000:
            raise ConfigError(
                f"Sla.deadline_ms is {self.deadline_ms}, expected 0 < deadline_ms < 1 day",
                hint="leave it out for background work",
            )
        if not 0.5 <= self.quantile < 1:
            raise ConfigError(f"Sla.quantile is {self.quantile}, expected 0.5 <= quantile < 1")
        if self.on_overload not in ("reject", "degrade", "late"):
            raise ConfigError(
                f"Sla.on_overload is {self.on_overload!r}, expected 'reject', 'degrade' or 'late'"
            )
        if not 1e-6 <= self.weight <= 1e6:  # service / weight is to stay a number
            raise ConfigError(f"Sla.weight is {self.weight}, expected 1e-6 <= weight <= 1e6")


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a model inside a flow.

    Args:
        model: name of a model known to the engine.
        rows: tensor (n, ...) or mapping of input name to tensor (n, ...), host memory, dtypes
            as the model's inputs say. With ``tiling``: one tensor (c, z, y, x), the volume. They
            are not copied: leave them as they are until the answer comes.
        tiling: cut the volume into windows, run each as a row, blend the results back.
        told: the flow is also told how it was computed: it is sent a :class:`Told`.
        then: what the flow is likely to ask next, foreseen from what it will be sent (without
            ``told``), or ``None``. Where background work could begin before the flow goes on, an
            engine calls it as soon as there is an answer and queues its call at once; the flow
            that yields that very call next waits for it, and one that does not has it cancelled.
            A lane waits for this function: it takes a part of a millisecond and changes nothing.

    The flow is sent back a tensor (n, ...) (or a mapping when the model has several outputs);
    with ``tiling``, the blended and reduced volume (see :class:`plinth.engine.Tiling`).
    """

    model: str
    rows: Tensors
    tiling: Tiling | None = None
    told: bool = False
    then: Callable[[Any], Call | None] | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What a flow is sent for a :class:`Call` that asks how it was computed.

    Args:
        value: what it would have been sent.
        precision: backend and precision of the model, such as ``"openvino/fp32"``.
        exact: they are those of precision ``"exact"``, which others are held against.
    """

    value: Any
    precision: str
    exact: bool


@dataclass(frozen=True, init=False, slots=True)
class Compute:
    """A heavy step of a flow (much NumPy or SciPy) that would hold the interpreter's lock.

    An engine with worker processes runs it in one of them, otherwise the thread that drives the
    flow does. The flow is sent what the function returns; what it raises is raised in the flow.

    Args:
        function: of a module, so that another process finds it by its name. It keeps nothing
            outside of its arguments and changes none of them: what it made is what it returns.
        arguments: whatever can be pickled. Arrays and tensors in them, and in what is returned,
            go through shared memory with dtype, shape, order and bits.
        seconds: in which it has to be done in a worker process; ``None``: the engine's limit.

    Raises:
        ConfigError: no function of a module, or an impossible limit.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float | None

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None
    ) -> None:
        if not _is_of_module(function):
            raise ConfigError(
                f"Compute was given {_name_of(function)}, expected a function of a module",
                hint="another process imports it by name: no lambda, closure, method or partial",
            )
        if seconds is not None and not 0 < seconds < 86_400:
            raise ConfigError(f"Compute.seconds is {seconds}, expected 0 < seconds < 1 day")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "seconds", seconds)

    @property
    def name(self) -> str:
        """Module and name of the function."""
        return _name_of(self.function)

    def run(self) -> Any:
        """Call the function here."""
        return self.function(*self.arguments)


@dataclass(frozen=True, slots=True)
class Pause:
    """A moment in a flow at which others go first: what follows needs no device, and may take long.

    Where the answers of one batch are told together in an event loop, a flow that goes on here at
    once keeps those behind it from asking for more, and a slice of background work begins before
    them. Elsewhere nobody waits at it. The flow is sent ``None``.
    """


def _name_of(function: object) -> str:
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None) or repr(type(function).__qualname__)
    return f"{module}.{name}" if module else str(name)


def _is_of_module(function: object) -> bool:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    found = getattr(module, getattr(function, "__qualname__", None) or "", None)
    return callable(function) and found is function


Flow = Generator[Call | Compute | Pause, Any, T]
"""A generator that yields Calls, Computes and Pauses, is sent their results and returns T."""


@dataclass(slots=True)
class Timing:
    """Where the time of one answer went; all in seconds.

    Args:
        decode: reading and checking the request (filled in by the door).
        queue: waiting for the device.
        device: the device's time for the batches this request was part of.
        co_batched: the part of ``device`` spent on other requests' rows in those batches.
        encode: writing the answer (filled in by the door).
        total: arrival to answer.
        batch_rows: rows of the largest batch the request was part of (a count).
    """

    decode: float = 0.0
    queue: float = 0.0
    device: float = 0.0
    co_batched: float = 0.0
    encode: float = 0.0
    total: float = 0.0
    batch_rows: int = 0

    def as_dict(self) -> dict[str, float]:
        """Milliseconds by name, rounded to the microsecond, and ``batch_rows``."""
        names = ("decode", "queue", "device", "co_batched", "encode", "total")
        parts: dict[str, float] = {
            f"{name}_ms": round(getattr(self, name) * 1e3, 3) for name in names
        }
        parts["batch_rows"] = self.batch_rows
        return parts


@dataclass(slots=True)
class Answer(Generic[T_co]):
    """What the engine gives back for a flow.

    Args:
        value: what the flow returned.
        timing: where the time went.
        models: version by name of every model that ran.
        degraded: the model or variant that ran instead, by the name of the one that was asked for.
        late: the deadline had passed when the answer was ready.
        precision: backend and precision, such as ``"eager/fp32"``, of every model that ran: the
            same request may be answered in another one on another machine, unless the engine
            runs in ``"exact"``.
        modes: ``"sync"`` for every model of which a call was given to several lanes in shares;
            other calls went whole to whichever lane was free first.
    """

    value: T_co
    timing: Timing
    models: dict[str, str] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)
    late: bool = False
    precision: dict[str, str] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
