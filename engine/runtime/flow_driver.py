"""A flow under way: driven by its caller, call by call."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Generic, TypeVar

from plinth.engine.flow import Answer, Call, Compute, Flow, Pause, Sla, Tensors, Timing, Told
from plinth.engine.models.spec import ModelSpec

T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one call: its output, where the time went, the model that ran, and how."""

    value: Tensors
    timing: Timing
    ran: ModelSpec
    late: bool
    precision: str
    variant: str | None = None
    """The variant that ran though another one was asked for."""
    mode: str = "async"
    """How it was given to the lanes: whole, or ``"sync"``: in shares that were awaited together."""
    exact: bool = False
    """Precision and backend are those of ``"exact"``."""
    foreseen: Any = None
    """The call that comes next by what was foreseen: a :class:`Foreseen` of the engine."""


class FlowDriver(Generic[T]):
    """A flow under way: the call it waits for, and what its answer will tell.

    Args:
        flow: what is driven.
        clock: seconds, monotonic.
        pauses: whether it stops at a :class:`Pause`, until :meth:`computed`.

    Raises:
        TypeError: the flow was begun before, or yields what is no call.

    Attributes:
        call: what it waits for; ``None``: it is over, or paused.
        paused: it has stopped for others.
        foreseen: what was asked for the flow before it did, with its last answer.
        answered: when it had that; ``None``: it has none, or nobody counts.
    """

    def __init__(self, flow: Flow[T], clock: Clock, *, pauses: bool = False) -> None:
        if isinstance(flow, GeneratorType) and _is_begun(flow):
            raise TypeError("the flow was begun, or is over: make a new one for each run")
        self._flow = flow
        self._clock = clock
        self._pauses = pauses
        self.paused = False
        self.foreseen: Any = None
        self.answered: float | None = None
        self._begun = clock()
        self._timing = Timing()
        self._models: dict[str, str] = {}
        self._degraded: dict[str, str] = {}
        self._precision: dict[str, str] = {}
        self._modes: dict[str, str] = {}
        self._late = False
        self._value: list[T] = []
        self.call: Call | Compute | None = None
        self._step(lambda: next(flow))

    def send(self, result: Result) -> None:
        """Give the flow the result of its call."""
        call = self.call if isinstance(self.call, Call) else None
        asked = "" if call is None else call.model
        self.foreseen = result.foreseen
        ran = result.ran
        self._models[ran.name] = ran.version
        self._precision[ran.name] = result.precision
        if ran.name != asked or result.variant:
            self._degraded[asked] = result.variant or ran.name
        if result.mode != "async":
            self._modes[ran.name] = result.mode
        self._late |= result.late
        timing, added = self._timing, result.timing
        timing.queue += added.queue
        timing.device += added.device
        timing.co_batched += added.co_batched
        timing.batch_rows = max(timing.batch_rows, added.batch_rows)
        value: Tensors | Told = result.value
        if call is not None and call.told:
            value = Told(value, result.precision, result.exact)
        self._step(lambda: self._flow.send(value))

    def computed(self, value: object) -> None:
        """Give the flow what the function of its step returned; ``None`` after a pause."""
        self._step(lambda: self._flow.send(value))

    def since(self, sla: Sla | None) -> float | None:
        """From when the promise of its calls counts; ``None``: each has its model's own."""
        return None if sla is None else self._begun

    def left(self, sla: Sla | None) -> float | None:
        """Seconds until the promise of the flow ends; ``None``: it has none that is kept so."""
        if sla is None or sla.deadline_ms is None or sla.on_overload == "late":
            return None
        return max(self._begun + sla.deadline_ms / 1e3 - self._clock(), 0.0)

    def throw(self, error: BaseException) -> None:
        """Tell the flow that its call failed; raises what the flow does not handle."""
        self._step(lambda: self._flow.throw(error))

    def answer(self, sla: Sla | None) -> Answer[T]:
        """The answer of the finished flow, which had this promise."""
        self._timing.total = self._clock() - self._begun
        if sla is not None and sla.deadline_ms is not None:
            self._late |= self._timing.total > sla.deadline_ms / 1e3
        told = (self._models, self._degraded, self._late, self._precision, self._modes)
        return Answer(self._value[0], self._timing, *told)

    def _step(self, advance: Callable[[], Call | Compute | Pause]) -> None:
        self.call, self.paused = None, False
        try:
            call = advance()
            while isinstance(call, Pause):
                if self._pauses:
                    self.paused = True
                    return
                call = next(self._flow)
        except StopIteration as stop:
            self._value.append(stop.value)
            return
        except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError):
            raise
        except BaseException as error:  # whoever waits for the flow would never be told
            raise RuntimeError(f"a flow raised {type(error).__name__}") from error
        if not isinstance(call, Call | Compute):
            raise TypeError(
                f"a flow yielded a value of type {type(call).__name__}, expected one Call or "
                "Compute at a time"
            )
        self.call = call


def _is_begun(flow: GeneratorType[Any, Any, Any]) -> bool:
    return flow.gi_frame is None or flow.gi_suspended or flow.gi_running
