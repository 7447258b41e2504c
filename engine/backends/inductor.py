"""``torch.compile`` with a dynamic batch; needs a C++ compiler on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plinth.engine.backends.base import Availability
from plinth.engine.backends.eager import TorchExecutable, realised
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy
from plinth.engine.precision.registry import missing


class Inductor:
    """Compiles the module at the first batch. Slow to start, so only used when asked for."""

    name = "inductor"
    automatic = False

    def available(self) -> Availability:
        """torch's version; on a machine without accelerator where a C++ compiler is installed."""
        reason = None if torch.accelerator.is_available() else compiler()[1]
        return Availability(None if reason else torch.__version__, reason)

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """Torch modules; on the CPU where a C++ compiler is installed."""
        if model.onnx:
            return "the model is an ONNX file, not a torch module"
        if device.kind == "cpu" and (reason := compiler()[1]):
            return reason
        return missing("torch", policy)

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> TorchExecutable:
        """Compile, and run two batches so that nothing is left to compile.

        Raises:
            ModelError: torch cannot compile it; the hint names the backend that runs it.
        """
        executable = realised(self.name, model, device, policy, _compiled)
        try:
            for rows in (1, 2, 3):
                executable.run(model.rows(rows))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, OSError) as error:
            reason = str(error).strip().partition("\n")[0][:300]
            raise ModelError(
                f"model {model.spec.name}: torch.compile failed: {reason}",
                hint="use backend eager or onnxruntime",
            ) from error
        return executable


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """The module compiled under code of its own.

    torch counts what it compiles by code, and from the ninth on runs it as it is: modules of one
    class would share that number (``torch._dynamo.config.recompile_limit``).
    """

    def forward(*inputs: Any, **named: Any) -> Any:
        return module(*inputs, **named)

    forward.__code__ = forward.__code__.replace()
    compiled: Callable[..., Any] = torch.compile(forward, dynamic=True)
    return compiled


def compiler() -> tuple[str | None, str | None]:
    """The path of a C++ compiler, or why there is none."""
    found = next((path for name in ("g++", "clang++") if (path := shutil.which(name))), None)
    missing = "torch.compile needs a C++ compiler, and neither g++ nor clang++ is installed"
    return found, None if found else missing
