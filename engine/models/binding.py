"""Inputs reach ``forward`` by name, and outputs come back by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from plinth.engine.errors import ModelError
from plinth.engine.models.spec import ModelSpec

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Binding:
    """How rows of a contract are passed to a module's ``forward``.

    Each input goes to the parameter of its name. The only input of a contract may also go to
    the only parameter that must be given, whatever its name: there is nothing to confuse.

    Args:
        spec: the contract.
        module: whose ``forward`` is called.

    Raises:
        ModelError: inputs and parameters do not match; names both.
    """

    def __init__(self, spec: ModelSpec, module: nn.Module) -> None:
        self.names = tuple(tensor.name for tensor in spec.inputs)
        parameters = _parameters(module)
        self._by_name = self._matches(parameters)
        if not self._by_name and not (len(self.names) == 1 and _takes_one(parameters)):
            known = [p.name for p in parameters]
            raise ModelError(
                f"model {spec.name} has the inputs {list(self.names)}, but its forward takes "
                f"{known}",
                hint="give the inputs of the spec the names of forward's parameters",
            )

    def _matches(self, parameters: list[inspect.Parameter]) -> bool:
        """Whether every input has a parameter of its name, and no other one must be given."""
        named = {p.name for p in parameters if p.kind in _BY_NAME}
        needed = {p.name for p in parameters if _is_needed(p)}
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return needed <= set(self.names) and (anything or named >= set(self.names))

    def call(self, module: Any, rows: Mapping[str, Tensor]) -> Any:
        """``module(...)`` on rows (n, ...) by input name."""
        if self._by_name:
            return module(**{name: rows[name] for name in self.names})
        return module(rows[self.names[0]])


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (ValueError, TypeError):  # compiled code without a signature
        return [inspect.Parameter("input", inspect.Parameter.POSITIONAL_ONLY)]


def _is_needed(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


def _takes_one(parameters: list[inspect.Parameter]) -> bool:
    """Whether one tensor given by place can only mean one thing."""
    needed = [p for p in parameters if _is_needed(p)]
    if needed:
        return len(needed) == 1 and parameters[0] is needed[0] and needed[0].kind in _BY_PLACE
    return len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY


def outputs_by_name(spec: ModelSpec, output: Any) -> dict[str, Tensor]:
    """What a forward gave, by the names of the contract.

    A mapping or a named tuple is read by name and may hold more than the contract names; a
    tensor, tuple or list is read in the contract's order.

    Raises:
        ModelError: an output is missing, or there are more or fewer tensors than outputs.
    """
    names = [tensor.name for tensor in spec.outputs]
    fields = getattr(output, "_fields", None)
    if isinstance(fields, tuple) and set(names) <= set(fields):
        output = dict(zip(fields, output, strict=True))
    if isinstance(output, Mapping):
        missing = [name for name in names if name not in output]
        if missing:
            raise ModelError(
                f"model {spec.name} gave no output {missing[0]}, only {sorted(map(str, output))}",
                hint="name the outputs of the spec as the model does",
            )
        return {name: output[name] for name in names}
    parts = list(output) if isinstance(output, tuple | list) else [output]
    if len(parts) != len(names):
        raise ModelError(f"model {spec.name} gave {len(parts)} tensors for {names}")
    return dict(zip(names, parts, strict=True))
