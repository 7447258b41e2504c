"""Somebody else's backend: runs the program that ``torch.export`` traced."""

from __future__ import annotations

import torch

from plinth.engine.backends import Availability, Executable
from plinth.engine.backends.eager import TorchExecutable
from plinth.engine.devices.device import Device
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy


class Traced:
    """Slower than eager, so only used when asked for."""

    name = "traced"
    automatic = False

    def available(self) -> Availability:
        """torch's version."""
        return Availability(torch.__version__)

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """Torch modules in fp32."""
        if model.onnx:
            return "the model is an ONNX file, not a torch module"
        return None if policy.plain else "it runs what was traced, in fp32"

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> Executable:
        """Trace it for any number of rows."""
        rows = model.rows(2)
        shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in rows}
        program = torch.export.export(model.module, (), rows, dynamic_shapes=shapes)
        return TorchExecutable(self.name, model, model.module, device, compiled=program.module())
