"""What each way to realise a model makes of an operation class in a precision.

A *realisation* is how a precision comes into a model: ``"torch"`` changes layers of a module,
``"onnx"`` nodes of an ONNX graph. Backends name theirs. A new pair of class and precision is one
function under :func:`register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from plinth.engine.errors import ConfigError
from plinth.engine.precision.policy import CLASSES, PRECISIONS, PrecisionPolicy

Handler = TypeVar("Handler", bound=Callable[..., Any])
_HANDLERS: dict[tuple[str, str, str], Callable[..., Any]] = {}


def register(
    realisation: str, op_classes: Iterable[str], precisions: Iterable[str]
) -> Callable[[Handler], Handler]:
    """Register a function that makes layers of some classes compute in some precisions."""

    def add(function: Handler) -> Handler:
        for op_class in op_classes:
            for precision in precisions:
                _HANDLERS[realisation, op_class, precision] = function
        return function

    return add


def handler(realisation: str, op_class: str, precision: str) -> Callable[..., Any]:
    """The function for a class in a precision.

    Raises:
        ConfigError: there is none; names the precisions that there are.
    """
    found = _HANDLERS.get((realisation, op_class, precision))
    if found is None:
        raise ConfigError(
            f"{realisation} has no {op_class} in {precision}",
            hint=f"it has {', '.join(realised(realisation, op_class)) or 'none'}",
        )
    return found


def realised(realisation: str, op_class: str) -> list[str]:
    """The precisions that a realisation has for a class."""
    return [each for each in PRECISIONS if (realisation, op_class, each) in _HANDLERS]


def missing(realisation: str, policy: PrecisionPolicy) -> str | None:
    """Why a realisation cannot do what a policy says, or ``None``."""
    for op_class in CLASSES:
        wanted = getattr(policy, op_class)
        if op_class == "last" or wanted == "fp32":
            continue
        have = realised(realisation, op_class)
        if wanted not in have:
            return f"it computes {op_class} in {', '.join(have) or 'fp32 only'}, not in {wanted}"
    known = {each for op_class in CLASSES for each in realised(realisation, op_class)}
    for layer, wanted in policy.layers.items():
        if wanted not in known | {"fp32"}:
            return f"it has no {wanted}, which layer {layer} is to be in"
    return None
