"""Algorithms that make weights smaller, by name; a recipe says which, and with what settings.

An algorithm is a class under :func:`register`. It is made with its settings and follows a module
through its training: it sees each weight on its way into the forward and may change it there, and
says at the end how the weight is stored. Algorithms compose: a weight passes through those of a
recipe in the order in which the recipe names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from plinth.engine.compression.packing import Coded
from plinth.engine.errors import ConfigError, nearest

SETTINGS = "plinth compress --help shows what a recipe may hold"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that algorithms work on.

    Args:
        name: in the module's state; ``axis``: the dimension of its channels.
        value: its shadow in float32, which is trained.
        ends: whether it is the first or the last of the module.
    """

    name: str
    value: nn.Parameter
    axis: int
    ends: bool


class Transform:
    """An algorithm at work on one module; each hook does nothing by default."""

    def reshape(self, module: nn.Module, say: Callable[[str], None]) -> None:
        """Change the module itself, before anything is trained."""

    def begin(self, weights: list[Weight]) -> None:
        """See the weights before the first step."""

    def at(self, progress: float) -> None:
        """Get ready for a step; ``progress`` runs from 0 to 1."""

    def forward(self, weight: Weight, value: Tensor) -> Tensor:
        """What the forward uses in a weight's place; gradients flow through it."""
        return value

    def loss(self, output: Tensor, teacher: Tensor) -> Tensor | None:
        """What it costs to answer otherwise than the model that is compressed."""
        return None

    @property
    def asks_moments(self) -> bool:
        """Whether :meth:`see` is to be called."""
        return False

    def see(self, moments: Mapping[str, Tensor]) -> None:
        """How the inputs of each weight's layer go together, before weights are stored.

        Args:
            moments: by name of a weight; see :func:`plinth.engine.compression.feedback.moments`.
        """

    def coded(self, weight: Weight, value: Tensor) -> Coded | None:
        """How a weight is stored once training is over; ``None``: as it is."""
        return None


Kind = TypeVar("Kind", bound=type[Transform])
_KNOWN: dict[str, type[Transform]] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Register an algorithm; its parameters are the settings that a recipe may give."""

    def add(kind: Kind) -> Kind:
        _KNOWN[name] = kind
        return kind

    return add


def known() -> list[str]:
    """Names of all algorithms."""
    return sorted(_KNOWN)


def build(name: str, settings: Mapping[str, Any]) -> Transform:
    """An algorithm with its settings.

    Raises:
        ConfigError: there is none of the name, or a setting is unknown or impossible.
    """
    kind = _KNOWN.get(name)
    if kind is None:
        raise ConfigError(f"there is no compression {name!r}", hint=nearest(name, known()))
    allowed = list(inspect.signature(kind).parameters)
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"compression {name} has no setting {key!r}", hint=nearest(key, allowed)
            )
    return kind(**settings)


@dataclass(frozen=True)
class Recipe:
    """What is done to a model.

    Args:
        steps: settings by the name of the algorithm, in the order in which they work.
        epochs: how often the rows are seen; 0 trains nothing.
        batch: rows of a step.
        rate: of Adam, at its highest.
        seed: of the order of rows.
    """

    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: int = 6
    batch: int = 64
    rate: float = 1e-3
    seed: int = 0

    def build(self) -> list[Transform]:
        """The algorithms, ready for one module.

        Raises:
            ConfigError: as :func:`build`.
        """
        return [build(name, settings) for name, settings in self.steps.items()]

    @property
    def label(self) -> str:
        """For people: ``90 % pruned, ternary``."""
        words = []
        for name, settings in self.steps.items():
            if name == "pruning":
                words += [f"{share:.0%} {what}" for what, share in _shares(settings)]
            elif name == "low_rank":
                words.append(f"rank of {settings.get('energy', 0.9):.0%}")
            elif name == "quantization_aware":
                words.append(str(settings.get("bits", "int8")))
                words += ["error feedback"] if settings.get("feedback") else []
            elif name != "distillation":
                words.append(name)
        return ", ".join(words) or "as it is"


def _shares(settings: Mapping[str, Any]) -> list[tuple[str, float]]:
    named = (("of channels", "channels"), ("pruned", "sparsity"))
    return [(what, settings[key]) for what, key in named if settings.get(key)]
