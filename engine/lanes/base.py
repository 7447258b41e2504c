"""What a lane is: a place where batches run, one behind the other.

The engine plans, a lane runs. What crosses between them is data: a number, the name of a model,
rows in, rows out. So a lane may be a device of this process, another process or another machine.
`tests/engine/test_lanes.py` is the contract that every kind of lane passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from plinth.engine.devices.device import Device
from plinth.engine.devices.staging import Launched, Staging
from plinth.engine.errors import DeviceError
from plinth.engine.scheduler.cost_model import LatencyModel

Rows = Mapping[str, Tensor]
"""Rows (n, ...) by input name."""


class Unit(NamedTuple):
    """What one call of a lane carries.

    Args:
        number: its own, for as long as the engine lives.
        model: the name that the lane knows its model by.
        parts: rows of one or more callers, which run as one batch in this order.
        seconds: what it is predicted to take; 0: nobody knows.
    """

    number: int
    model: str
    parts: Sequence[Rows]
    seconds: float = 0.0


class Ran(NamedTuple):
    """What came of a unit.

    Args:
        outputs: (n, ...) by output name, on the host, in the order of the rows.
        seconds: what it cost the lane; an accelerator counts them itself.
        largest: rows of the largest batch of this model that fits there from now on.
        halvings: how often it did not fit into memory and was run in halves.
        precision: what it was computed in, such as ``"eager/fp32"``.
        held_up: it waited until weights had come back into memory, or until there was room: no
            other batch costs as much because of it.
    """

    outputs: dict[str, Tensor]
    seconds: float
    largest: int
    halvings: int
    precision: str
    held_up: bool = False


class LaneDied(DeviceError):
    """A lane does nothing any more; what it was given has not run, as far as anybody knows."""


class Held(Protocol):
    """A model as the engine holds it.

    Attributes:
        id: the name that units call it by.
        most: rows of its largest batch.
        halvings: batches that did not fit into memory, so far.
    """

    id: str
    most: int
    halvings: int

    @property
    def convolves(self) -> bool:
        """Whether it has convolutions, for which libraries look for a plan at each size."""
        ...

    @property
    def precision(self) -> str:
        """Backend and precision that it computes in."""
        ...

    def joined(self, parts: list[Any]) -> dict[str, Tensor]:
        """Rows of several callers in one piece."""
        ...

    def run(self, rows: dict[str, Tensor], place: int = 0) -> dict[str, Tensor]:
        """Run rows; outputs lie on the host."""
        ...

    def launch(self, staging: Staging, parts: Sequence[Any], place: int = 0) -> Launched:
        """Send rows to an accelerator."""
        ...

    def recipe(self) -> object:
        """What another process makes the same of: data that can be pickled, no code.

        Raises:
            ModelError: it cannot be sent.
        """
        ...

    def check(self, found: dict[str, Tensor] | None) -> None:
        """Hold what another process made of the rows in the recipe against one's own answers.

        Raises:
            ModelError: they are others.
        """
        ...


class Lane(ABC):
    """A place where batches run; one thread at a time gives it units.

    Args:
        device: where they run.
        depth: units that it may be given before the first of them is done.
        costs: what batches cost there, one model for all lanes that are alike; ``None``: as on
            the engine's own lanes on such a device.

    Attributes:
        inline: whether :meth:`run` runs a unit in the thread that calls it.
        checked: whether outputs have been held against the contract where they were made; of
            others the engine holds them against it.
        revives: whether :meth:`start` can help after it died, so that the engine tries at once.
        lost: told when it dies, also while it has nothing to run.
    """

    inline = False
    checked = False
    revives = False
    lost: Callable[[LaneDied], None] | None = None

    def __init__(self, device: Device, depth: int = 1, costs: LatencyModel | None = None) -> None:
        self.device = device
        self.depth = depth
        self.costs = costs

    @property
    @abstractmethod
    def kind(self) -> str:
        """What it is, such as ``"local"``, for status pages."""

    @property
    def label(self) -> str:
        """What status pages call it: its device, or what is told apart from that."""
        return str(self.device)

    @property
    def where(self) -> str | None:
        """The machine that it runs on, where that is not this one."""
        return None

    def facts(self) -> dict[str, Any]:
        """More that status pages tell of it."""
        return {}

    def launch(self) -> None:
        """Begin with what :meth:`start` does, without waiting for it."""
        return

    @abstractmethod
    def start(self) -> None:
        """Make it ready to take units; again after :meth:`close`, and after it died.

        Raises:
            DeviceError: it cannot be.
        """

    @abstractmethod
    def hold(self, model: Held) -> None:
        """Let units name a model, for as long as somebody else holds it too."""

    @abstractmethod
    def can_run(self, model: str) -> bool:
        """Whether units may name this model."""

    @abstractmethod
    def submit(self, unit: Unit) -> Future[Ran]:
        """Run a unit; it may be done before this returns.

        The future holds what the model raised, or :class:`LaneDied` if the lane ended.
        """

    def run(self, unit: Unit) -> Ran:
        """Run a unit, and wait for it.

        Raises:
            LaneDied: the lane ended.
            BaseException: whatever the model raises.
        """
        return self.submit(unit).result()

    def is_current(self) -> bool:
        """Whether the calling thread is one that finishes this lane's futures."""
        return False

    def discard(self) -> None:
        """Let what died end, before :meth:`start`."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Wait for what it was given, and end."""
