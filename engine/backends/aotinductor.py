"""AOTInductor: a torch module compiled once to a library, which later runs load in a moment."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends.base import Availability, Wrapped
from plinth.engine.backends.eager import TorchExecutable, in_eval_mode
from plinth.engine.backends.export import Traced, quiet, refusing
from plinth.engine.backends.inductor import compiler
from plinth.engine.cache import cache_folder, keep_bound, used
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy

FORMAT = "1"  # of what is kept in the cache


class Library(Wrapped):
    """A library; its weights lie in its file, which is mapped, and once more as they are computed.

    Args:
        inner: what calls it. The module beside it is not read any more.
    """

    def __init__(self, inner: TorchExecutable) -> None:
        super().__init__(inner)
        self.weights = 2 * inner.weights


class AotInductor:
    """Compiles ahead of time, for half a minute or more; kept by program, CPU and threads."""

    name = "aotinductor"
    automatic = False

    def available(self) -> Availability:
        """torch's version, where a C++ compiler is installed."""
        reason = compiler()[1]
        return Availability(None if reason else torch.__version__, reason)

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """Torch modules in fp32 on the CPU."""
        if model.onnx:
            return "the model is an ONNX file, not a torch module"
        if device.kind != "cpu":
            return f"it has been used on the CPU only, not on {device.kind}"
        if not policy.plain and not policy.auto:
            return "it compiles fp32 only; use inductor for bf16"
        return None

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> Library:
        """Compile it for any rows, or load what was compiled before.

        Raises:
            ModelError: it cannot be exported or compiled; says why.
        """
        library = _library(model, device, threads or torch.get_num_threads())
        with refusing(model, "compiled ahead of time"), quiet():
            loaded: Any = torch._inductor.aoti_load_package(str(library), run_single_threaded=True)
        names = [tensor.name for tensor in model.spec.inputs]
        outputs = [tensor.name for tensor in model.spec.outputs]
        call = _call(loaded.loader.boxed_run, names, outputs)
        return Library(
            TorchExecutable(self.name, model, in_eval_mode(model), device, compiled=call)
        )


def _call(
    run: Callable[[list[Tensor]], list[Tensor]], names: list[str], outputs: list[str]
) -> Callable[..., dict[str, Tensor]]:
    """The library as a function of the contract's inputs, by name or the only one by place."""

    def call(*alone: Tensor, **rows: Tensor) -> dict[str, Tensor]:
        given = list(alone) or [rows[name] for name in names]
        found = run([tensor.contiguous() for tensor in given])
        return dict(zip(outputs, found, strict=True))

    return call


def _library(model: Model, device: Device, threads: int) -> Path:
    made = Traced(model)
    cpu = (device.name, ",".join(device.dtypes), torch.backends.cpu.get_cpu_capability())
    facts = (FORMAT, *cpu, str(threads), made.key)
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    path = cache_folder("aotinductor") / f"{key}.pt2"
    if path.is_file():
        used(path)
        return path
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
        new = Path(folder) / "model.pt2"
        with refusing(model, "compiled ahead of time"), quiet():
            torch._inductor.aoti_compile_and_package(made.program, package_path=str(new))
        if not new.is_file():
            raise ModelError(f"model {model.spec.name}: the compiler gave no library")
        new.replace(path)
    keep_bound()
    return path
