"""Torch as it is: the reference that every other backend is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.backends.base import named, torch_threads
from plinth.engine.devices.device import Device
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy, apply, report


class TorchExecutable:
    """A torch callable on a device; see :class:`plinth.engine.backends.base.Executable`."""

    def __init__(
        self,
        backend: str,
        model: Model,
        module: Callable[..., Any],
        device: Device,
        policy: PrecisionPolicy,
        threads: int | None,
    ) -> None:
        self.backend = backend
        self.precision = policy.name
        self.device = device
        self.report: dict[str, Any] = {
            "threads": threads or torch.get_num_threads(),
            "layers": {layer.name: layer.precision for layer in report(model.module, policy)},
        }
        self._model = model
        self._module = module
        self._threads = threads
        self._names = tuple(spec.name for spec in model.spec.inputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows; they may lie on the host or on the device, and come back on the device."""
        with torch.inference_mode(), torch_threads(self._threads):
            if self.device.kind != "cpu":
                target = self.device.torch
                inputs = {
                    name: tensor.to(target, non_blocking=True) for name, tensor in inputs.items()
                }
            output = self._module(*(inputs[name] for name in self._names))
        return named(self._model, output, int(inputs[self._names[0]].shape[0]))


class Eager:
    """Runs the module as torch does, layer by layer, in the precision of each layer."""

    name = "eager"

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """Everything but ONNX files."""
        return "the model is an ONNX file, not a torch module" if model.onnx else None

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> TorchExecutable:
        """Put the module, in its precisions, on the device."""
        module = placed(model, device, policy)
        return TorchExecutable(self.name, model, module, device, policy, threads)


def placed(model: Model, device: Device, policy: PrecisionPolicy) -> nn.Module:
    """The model's module in the policy's precisions on the device; the model keeps its own."""
    module = apply(model.module, policy)
    if device.kind == "cpu":
        return module
    if module is model.module:
        module = copy.deepcopy(module)
    return module.to(device.torch)
