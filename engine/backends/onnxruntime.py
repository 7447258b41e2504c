"""ONNX Runtime on the CPU: the lowest overhead per call of all backends here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends.base import Availability, check_finite, installed, named
from plinth.engine.backends.export import compile_peak, onnx_file, run_peak, why_not_onnx
from plinth.engine.backends.quantised import quantised_file
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models.kept import Kept, kept_graph
from plinth.engine.models.onnx import session
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model
from plinth.engine.precision.onnx_graph import profile
from plinth.engine.precision.policy import PrecisionPolicy
from plinth.engine.precision.registry import missing

BOUND_BYTES = 1 << 18  # of inputs and outputs; above it a plain run costs no more
BOUND_SHAPES = 16
_log = logging.getLogger(__name__)


class _Bound:
    """Inputs and outputs of one shape, bound to a session once: a run then only copies.

    The buffers are torch tensors: every change between torch's code and numpy's costs as much as
    a small layer.
    """

    def __init__(
        self, session: Any, inputs: Mapping[str, Tensor], found: Mapping[str, Tensor]
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs = [(name, _buffer(tensor)) for name, tensor in inputs.items()]
        self._outputs = [(name, _buffer(tensor)) for name, tensor in found.items()]
        for bind, buffers in (
            (self._binding.bind_input, self._inputs),
            (self._binding.bind_output, self._outputs),
        ):
            for name, buffer in buffers:
                dtype = buffer.numpy().dtype.type
                bind(name, "cpu", 0, dtype, tuple(buffer.shape), buffer.data_ptr())

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, buffer in self._inputs:
            given = inputs[name]
            buffer.copy_(given.detach() if given.requires_grad else given)
        self._session.run_with_iobinding(self._binding)
        return {name: buffer.clone() for name, buffer in self._outputs}


def _buffer(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype)


class OrtExecutable:
    """A session and the names of its tensors; see ``base.Executable``.

    Small batches go through buffers that are bound to the session once per shape. The sizes of
    outputs follow from those of inputs for as long as the contract leaves none of them open.

    Args:
        spec: the contract.
        path: the ONNX file.
        device: where rows come from and outputs go; the graph itself runs on the CPU.
        threads: of one run; ``None`` as torch has it.
        precision: what the graph computes in.
        kept: the same graph as it was optimised before, if it was.

    Attributes:
        files: what a store must keep to load it again; none in fp32.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        device: Device,
        threads: int | None,
        precision: str = "fp32",
        kept: Kept | None = None,
    ) -> None:
        self.device = device
        self.precision = precision
        self.weights = path.stat().st_size  # all but a few per mille of it are the weights
        self.report: dict[str, Any] = {"threads": threads or torch.get_num_threads()}
        self.files = {} if precision == "fp32" else {"model.onnx": path}
        self._spec = spec
        self._path = path
        self._kept = kept
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._bound: dict[int, _Bound | None] = {}
        self._session = self._opened()
        free = any(None in tensor.shape for tensor in (*spec.inputs, *spec.outputs))
        # A graph may say one row of an output that gives many; that one cannot be bound.
        wrong = any(not t.shape or isinstance(t.shape[0], int) for t in self._session.get_outputs())
        self._fixed = not free and not wrong

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows on the CPU; those of another device are copied there, and outputs back.

        Raises:
            InputError: floats that are not finite, in less than fp32.
        """
        if self.precision != "fp32":
            given = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
            check_finite(self._spec, given, "ONNX Runtime in int8")
        rows = len(next(iter(inputs.values())))
        bound = self._bound.get(rows) if self._fixed else None
        found = self._plain(inputs, rows) if bound is None else bound.run(inputs)
        if self.device.kind == "cpu":
            return found
        return {name: tensor.to(self.device.torch) for name, tensor in found.items()}

    def _plain(self, inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        feeds = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        arrays = self._session.run(self._outputs, feeds)
        output = dict(zip(self._outputs, map(torch.from_numpy, arrays), strict=True))
        found = named(self._spec, output, rows)
        if self._fixed and rows not in self._bound and len(self._bound) < BOUND_SHAPES:
            size = sum(tensor.nbytes for tensor in (*inputs.values(), *found.values()))
            small = size <= BOUND_BYTES
            self._bound[rows] = _Bound(self._session, inputs, found) if small else None
        return found

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`run`: a session never writes to its inputs, and its outputs are new.

        Where the precision is not fp32, the report says which kernels ran.
        """
        if self.precision != "fp32":
            ran = profile(self._path, inputs, self.report["threads"])
            self.report |= {"kernels": ran.kernels, "flops": ran.flops}
        return self.run(inputs)

    def another(self) -> OrtExecutable:
        """One more for another thread, see ``base.another``: the session, other buffers."""
        other = copy.copy(self)
        other._bound = {}
        return other

    def is_native(self, rows: int) -> bool:
        """A graph is run by the library alone."""
        return True

    def release(self) -> bool:
        """Load the session anew; its arena keeps what the largest batch so far took."""
        self._bound.clear()
        if self._kept is None and not self._path.exists():  # let go of from the cache
            return False
        del self._session
        self._session = self._opened()
        return True

    def again(self) -> Callable[[], OrtExecutable] | None:
        """What reads the same once it has left memory; ``None`` where nothing could be kept."""
        threads = self.report["threads"]
        kept = kept_graph(self._path, threads, self.device)
        if kept is None:
            return None
        facts = (self._spec, self._path, self.device, threads, self.precision, kept)
        return partial(_again, facts, self.report)

    def _opened(self) -> Any:
        threads = self.report["threads"]
        if self._kept is not None:
            try:
                if self._kept.is_same():
                    return session(self._kept.path, threads, optimised=True)
                _log.warning("model %s: %s was written to", self._spec.name, self._kept.path)
            except (ModelError, OSError) as error:
                _log.warning("model %s is compiled anew: %s", self._spec.name, error)
            self._kept = None
        return session(self._path, threads)


def _again(facts: tuple[Any, ...], report: dict[str, Any]) -> OrtExecutable:
    found = OrtExecutable(*facts)
    found.report = report
    return found


class OnnxRuntime:
    """Runs ONNX files, and torch modules that export to one."""

    name = "onnxruntime"
    automatic = True

    def available(self) -> Availability:
        """Its version."""
        return installed("onnx", "onnxruntime")

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """On the CPU, in what ``precision/onnx_graph.py`` realises; weights up to 1 GiB.

        Beside another device it runs what came as an ONNX file, which nothing else can.
        """
        if device.kind != "cpu" and not model.onnx:
            return f"it computes on the CPU, and torch runs this model on {device.kind}"
        if policy.auto:
            return why_not_onnx(model)
        if not policy.plain and (reason := installed("onnx", "onnx").reason):
            return reason
        return missing("onnx", policy) or why_not_onnx(model)

    def compile_peak(self, model: Model) -> int:
        """Bytes that :meth:`compile` takes at its peak, about."""
        return compile_peak(model)

    def run_peak(self, model: Model) -> int | None:
        """Bytes that a forward of one row takes at its peak, about."""
        return run_peak(model)

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> OrtExecutable:
        """Load the model's ONNX file, or export it (seconds; once per weights and policy).

        Raises:
            ConfigError: the policy names a layer that is not there.
            ModelError: it cannot be exported or loaded, or ``int8_static`` has no example rows.
        """
        if policy.plain or policy.auto:
            return OrtExecutable(model.spec, onnx_file(model), device, threads)
        path, plan = quantised_file(model, policy)
        low = any(precision != "fp32" for precision in plan.values())
        executable = self.load(model, path, device, threads, policy.name if low else "fp32")
        executable.report["layers"] = plan
        return executable

    def load(
        self, model: Model, path: Path, device: Device, threads: int | None, precision: str
    ) -> OrtExecutable:
        """A file that this backend made of the model before."""
        return OrtExecutable(model.spec, path, device, threads, precision)
