"""What an execution backend is: it compiles a model into something that runs rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy


@runtime_checkable
class Executable(Protocol):
    """A model ready to run.

    Attributes:
        backend: name of the backend that made it.
        precision: name of the policy it really runs, such as ``"fp32"``.
        device: where it runs.
        report: what was asked for, what was resolved, and why.
    """

    backend: str
    precision: str
    device: Device
    report: dict[str, Any]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows: tensor (n, ...) by input name to tensor (n, ...) by output name."""
        ...


class Backend(Protocol):
    """A way to run models."""

    name: str

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


def named(model: Model, output: Any, rows: int) -> dict[str, Tensor]:
    """What a forward gave, by the names of the contract.

    Raises:
        ModelError: not as many tensors as the contract has outputs, or rows were lost.
    """
    names = [spec.name for spec in model.spec.outputs]
    if isinstance(output, Mapping):
        found = dict(output)
    else:
        parts = list(output) if isinstance(output, tuple | list) else [output]
        found = dict(zip(names, parts, strict=len(parts) == len(names)))
        if len(parts) != len(names):
            raise ModelError(f"model {model.spec.name} gave {len(parts)} tensors for {names}")
    for name in names:
        tensor = found.get(name)
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.shape[0] != rows:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelError(
                f"model {model.spec.name}: output {name} is {shape} for {rows} rows, expected "
                "one output row for each"
            )
    return {name: found[name] for name in names}


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; ``None`` leaves it as it is."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
