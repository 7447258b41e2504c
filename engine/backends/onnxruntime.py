"""ONNX Runtime on the CPU: the lowest overhead per call of all backends here.

Torch modules are exported once and kept in a cache by the digest of their weights and code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends.base import named
from plinth.engine.cache import cache_folder
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.onnx import session
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy

MAX_WEIGHTS = 1 << 30
EXAMPLE_ROWS = 2


class OrtExecutable:
    """A session and the order of its tensors; see ``base.Executable``."""

    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self, model: Model, path: Path, device: Device, threads: int | None) -> None:
        self.device = device
        self.report: dict[str, Any] = {"threads": threads or torch.get_num_threads()}
        self._model = model
        # A plain run is faster than IOBinding for small tensors and equal for large ones.
        self._run = session(path, threads).run
        self._outputs = [spec.name for spec in model.spec.outputs]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows on the host."""
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        found = [torch.from_numpy(array) for array in self._run(self._outputs, feeds)]
        return named(self._model, found, len(next(iter(feeds.values()))))


class OnnxRuntime:
    """Runs ONNX files, and torch modules that export to one."""

    name = "onnxruntime"

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """fp32 on the CPU, weights up to 1 GiB, no bfloat16 tensors in the contract."""
        need = ["onnxruntime"] if model.onnx else ["onnxruntime", "onnx", "onnxscript"]
        missing = [name for name in need if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)} (pip install 'plinth-engine[onnx]')"
        if device.kind != "cpu":
            return f"only its CPU provider is used here, not {device.kind}"
        if not policy.plain and not policy.auto:
            return "its CPU kernels compute in fp32 only"
        if any(spec.dtype == "bfloat16" for spec in (*model.spec.inputs, *model.spec.outputs)):
            return "it takes no bfloat16 tensors"
        size = sum(tensor.nbytes for tensor in model.module.state_dict().values())
        if size > MAX_WEIGHTS:
            return f"the weights have {size} bytes, at most {MAX_WEIGHTS} fit into one ONNX file"
        return None

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> OrtExecutable:
        """Load the model's ONNX file, or export it (seconds; once per weights).

        Raises:
            ModelError: it cannot be exported or loaded; says why.
        """
        return OrtExecutable(model, model.onnx or _exported(model), device, threads)


def _exported(model: Model) -> Path:
    contract = model.spec.model_dump_json(include={"inputs", "outputs"})
    key = f"{model.digest()} {torch.__version__} {contract}"
    path = cache_folder("onnx") / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
    if path.is_file():
        return path
    example = model.spec.example(EXAMPLE_ROWS)
    shapes = tuple(
        {0: torch.export.Dim.DYNAMIC}
        | {i: torch.export.Dim.AUTO for i, size in enumerate(spec.shape, 1) if size is None}
        for spec in model.spec.inputs
    )
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
        new = Path(folder) / "model.onnx"
        _export(model, tuple(example[spec.name] for spec in model.spec.inputs), shapes, new)
        new.replace(path)
    return path


def _export(model: Model, example: tuple[Tensor, ...], shapes: Any, path: Path) -> None:
    errors = torch.onnx.errors.OnnxExporterError
    try:
        with _quiet():
            program = torch.onnx.export(
                model.module,
                example,
                dynamo=True,
                dynamic_shapes=shapes if len(shapes) > 1 else (shapes[0],),
                input_names=[spec.name for spec in model.spec.inputs],
                output_names=[spec.name for spec in model.spec.outputs],
                verbose=False,
            )
            if program is None:
                raise ModelError(f"model {model.spec.name}: the export gave nothing")
            program.save(str(path), external_data=False)
    except (errors, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        raise ModelError(
            f"model {model.spec.name} cannot be exported to ONNX: {reason}",
            hint="use backend eager",
        ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
