"""OpenVINO on the CPU: fused kernels and blocked layouts, the fastest here for convolutions.

It differs from torch where torch would raise or hold more digits, so that graphs and inputs
for which this could show are refused: integers are 32 bits wide inside, and a look-up beyond
its table gives zeros. The first is looked for in the inputs, the second by an output that is
added to the graph.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.backends.base import Availability, check_finite, installed, named
from plinth.engine.backends.export import (
    CHANNEL_BLOCK,
    compile_peak,
    onnx_file,
    run_peak,
    why_not_onnx,
)
from plinth.engine.backends.normalised import exact_norms
from plinth.engine.backends.quantised import openvino_file
from plinth.engine.cache import cache_folder, keep_bound
from plinth.engine.devices.device import Device
from plinth.engine.errors import InputError, ModelError
from plinth.engine.models.kept import Kept, graph_facts, kept_files
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import CLASSES, PrecisionPolicy
from plinth.engine.precision.registry import missing, register

_log = logging.getLogger(__name__)
FORMAT = "1"
"""Of what is done to a graph before it is kept; another one makes them anew."""

INT32 = np.iinfo(np.int32)
_LOOKUPS = ("Gather", "GatherElements", "GatherND")
_REFUSED = ("ScatterNDUpdate", "ScatterElementsUpdate", "EmbeddingBagOffsetsSum")
_WIDE = ("Multiply", "Power", "ShiftLeft")
_LAID_OUT = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData")


class OpenVinoExecutable:
    """A compiled graph and one request on it; see ``base.Executable``.

    Args:
        spec: the contract.
        graph: an ``openvino.Model`` whose inputs and outputs have the names of the contract.
        device: the CPU.
        threads: of one run; ``None`` as torch has it.
        precision: ``"fp32"``, ``"bf16"``, or what the graph was quantised to.
        bf16: let matrix products and convolutions compute in bfloat16.
        source: where the graph comes from, so that it can be read again.

    Attributes:
        files: what a store must keep to load it again; none where there is nothing but a policy.
    """

    backend = "openvino"

    def __init__(
        self,
        spec: ModelSpec,
        graph: Any,
        device: Device,
        threads: int | None,
        precision: str = "fp32",
        *,
        bf16: bool = False,
        source: Source | None = None,
    ) -> None:
        self.device = device
        self.precision = precision
        self.weights = _weight_bytes(graph)
        self.report: dict[str, Any] = {"threads": threads or torch.get_num_threads()}
        self.files: dict[str, Path] = {}
        self._spec = spec
        self._source = source
        self._checks = _check_lookups(graph)
        self._settings = {
            "INFERENCE_NUM_THREADS": self.report["threads"],
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "KV_CACHE_PRECISION": "f32",
            "ENABLE_CPU_PINNING": False,
            "CACHE_DIR": str(_blobs(device)),
        }
        self._ints = [t.name for t in spec.inputs if t.dtype == "int64"]
        self._open(graph)
        keep_bound()

    def _open(self, graph: Any) -> None:
        """Compile a graph, or the file of one, from which the library reads less."""
        spec = self._spec
        self._compiled = _core().compile_model(graph, "CPU", self._settings)
        self._request = self._compiled.create_infer_request()
        self._inputs = _places(self._compiled.inputs, [t.name for t in spec.inputs])
        self._outputs = _places(self._compiled.outputs, [t.name for t in spec.outputs])

    def again(self) -> Callable[[], OpenVinoExecutable] | None:
        """What reads the same once it has left memory; ``None`` where nothing could be kept."""
        source = self._source
        kept = None if source is None else source.kept()
        if source is None or kept is None:
            return None
        away = copy.copy(self)
        away._compiled = away._request = None
        return partial(_again, away, source, kept)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows on the host.

        Raises:
            InputError: integers beyond 32 bits, or floats that are not finite.
            ModelError: an index lies beyond its table.
        """
        import openvino

        given = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        for name in self._ints:
            _check_range(self._spec.name, name, given[name])
        check_finite(self._spec, given, "OpenVINO")
        held = [np.ascontiguousarray(array) for array in given.values()]
        for name, array in zip(given, held, strict=True):
            tensor = openvino.Tensor(array, shared_memory=True)
            self._request.set_input_tensor(self._inputs[name], tensor)
        self._request.infer()
        if self._checks and bool(self._request.get_tensor(CHECK).data.any()):
            raise ModelError(
                f"model {self._spec.name}: an index is out of range of its table",
                hint="send ids that the model knows; give the input bounds in the spec",
            )
        output = {
            name: torch.from_numpy(self._request.get_output_tensor(index).data.copy())
            for name, index in self._outputs.items()
        }
        return named(self._spec, output, len(held[0]))

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`run`; notes which kernels the graph was compiled to."""
        output = self.run(inputs)
        self.report["kernels"] = self.kernels()
        return output

    def another(self) -> OpenVinoExecutable:
        """One more for another thread, see ``base.another``: the graph, another request."""
        other = copy.copy(self)
        other._request = self._compiled.create_infer_request()
        return other

    def is_native(self, rows: int) -> bool:
        """A graph is run by the library alone."""
        return True

    def kernels(self) -> dict[str, int]:
        """How many nodes run in each kernel, such as ``"MatMul brgemm_avx512_amx_bf16"``."""
        nodes = Counter[str]()
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, kernel = (
                str(info[key].value if hasattr(info[key], "value") else info[key])
                if key in info
                else ""
                for key in ("layerType", "primitiveType")
            )
            if kind not in ("Input", "Output", "Const", "Reorder", ""):
                nodes[f"{kind} {kernel}"] += 1
        return dict(nodes.most_common())

    def release(self) -> bool:
        """Give back the memory of earlier shapes."""
        self._request = self._compiled.create_infer_request()
        self._compiled.release_memory()
        return True


CHECK = "plinth_index_out_of_range"
"""Name of the output that says whether a look-up lay beyond its table."""


@register("openvino", [name for name in CLASSES if name != "last"], ["fp32"])
@register(
    "openvino",
    ["matmul", "conv", "embedding", "attention", "recurrent", "activation"],
    ["bf16"],
)
@register("openvino", ["matmul", "conv"], ["int8_static"])
def _by_plugin() -> None:
    """Realised for the graph as a whole: bf16 by the CPU plugin, int8 by NNCF."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a graph comes from.

    Args:
        files: that it is read from, the graph's own first.
        read: makes the graph of them.
        how: what decides on that beside the files.
    """

    files: tuple[Path, ...]
    read: Callable[[], Any]
    how: str

    def kept(self) -> Kept | None:
        """As OpenVINO keeps graphs, with its checks: of such a file it knows its own cache by name
        and time, and maps the weights.
        """
        import openvino

        def write(new: Path) -> None:
            openvino.save_model(self.whole(), str(new), compress_to_fp16=False)

        facts = (
            *graph_facts(*self.files),
            self.how,
            str(installed("openvino", "openvino").version),
        )
        return kept_files("openvino-graphs", facts, "model.xml", write, self.files[0])

    def whole(self) -> Any:
        """The graph with its checks."""
        graph = self.read()
        _check_lookups(graph)
        return graph


def _again(away: OpenVinoExecutable, source: Source, kept: Kept) -> OpenVinoExecutable:
    found = copy.copy(away)
    try:
        if kept.is_same():
            found._open(str(kept.path))
            return found
        _log.warning("model %s: %s was written to", away._spec.name, kept.path)
    except (OSError, RuntimeError) as error:
        _log.warning("model %s is compiled anew: %s", away._spec.name, error)
    found._open(source.whole())
    return found


class OpenVino:
    """Runs ONNX files, and torch modules that export to one."""

    name = "openvino"
    automatic = True

    def available(self) -> Availability:
        """Its version."""
        return installed("openvino", "openvino")

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """fp32 on the CPU; bf16 where the CPU has it; int8 by NNCF. No float64: it narrows it."""
        if device.kind != "cpu":
            return f"only its CPU plugin is used here, not {device.kind}"
        if any(t.dtype == "float64" for t in (*model.spec.inputs, *model.spec.outputs)):
            return "it computes float64 in float32"
        if "bf16" in policy.used and not device.native("bf16"):
            return f"{device.name or device} has no bf16 instructions, and it emulates none"
        if "int8_static" in policy.used and (why := installed("openvino", "nncf", "onnx").reason):
            return why
        return missing("openvino", policy) or why_not_onnx(model)

    def compile_peak(self, model: Model) -> int:
        """Bytes that :meth:`compile` takes at its peak, about."""
        return compile_peak(model)

    def run_peak(self, model: Model) -> int | None:
        """Bytes that a forward of one row takes at its peak, about, in its blocked layout."""
        return run_peak(model, CHANNEL_BLOCK)

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> OpenVinoExecutable:
        """Read the model's ONNX file, exported if need be, and compile it for any rows.

        Raises:
            ConfigError: the policy names a layer that is not there.
            ModelError: it cannot be exported or read, or holds what is not computed as in torch,
                or ``int8_static`` has no example rows.
        """
        path = onnx_file(model)
        bf16, precision = "bf16" in policy.used, policy.name
        exact = policy.used <= {"fp32"}
        read = partial(_graph_of, path, model.spec, exact)
        graph = read()
        if "int8_static" not in policy.used:
            source = Source((path,), read, f"{FORMAT} exact norms: {exact}")
            return OpenVinoExecutable(
                model.spec, graph, device, threads, precision, bf16=bf16, source=source
            )
        path, plan = openvino_file(model, policy, graph)
        executable = self.load(model, path, device, threads, precision)
        executable.report["layers"] = plan
        return executable

    def load(
        self, model: Model, path: Path, device: Device, threads: int | None, precision: str
    ) -> OpenVinoExecutable:
        """A file that this backend made of the model before, its ``.bin`` beside it."""
        files = (path, path.with_suffix(".bin"))
        source = Source(files, partial(_read_file, path), FORMAT)
        executable = OpenVinoExecutable(
            *(model.spec, source.read(), device, threads, precision),
            bf16="bf16" in precision,
            source=source,
        )
        executable.files = {"model.xml": path, "model.bin": files[1]}
        return executable


def _read_file(path: Path) -> Any:
    return _core().read_model(str(path))


def _graph_of(path: Path, spec: ModelSpec, exact: bool) -> Any:
    """An ONNX file's graph; in float32 with norms as torch computes them.

    In bfloat16 a mean by itself would be rounded.
    """
    graph = read_graph(path, spec)
    if exact:
        exact_norms(graph)
    return graph


def read_graph(path: Path, spec: ModelSpec) -> Any:
    """An ONNX file as an ``openvino.Model``.

    Raises:
        ModelError: it cannot be read, or holds what OpenVINO does not compute as torch does.
    """
    try:
        graph = _core().read_model(str(path))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1][:300]
        raise ModelError(f"OpenVINO cannot read model {spec.name}: {first}") from error
    _refuse_silent_differences(graph, spec)
    return graph


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _blobs(device: Device) -> Path:
    """Where compiled graphs are kept: one folder for each kind of CPU and version."""
    version = installed("openvino", "openvino").version
    facts = "\n".join((device.name, ",".join(device.dtypes), str(version)))
    folder = cache_folder("openvino") / hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def _places(ports: Any, names: list[str]) -> dict[str, int]:
    """Where the ports of these names are.

    Raises:
        ModelError: OpenVINO has none of a name, or several.
    """
    named = [port.get_names() for port in ports]
    found = {name: [at for at, own in enumerate(named) if name in own] for name in names}
    for name, at in found.items():
        if len(at) != 1:
            raise ModelError(
                f"OpenVINO has {len(at)} inputs or outputs by the name {name}, expected one",
                hint="give inputs and outputs of the model names of their own, or name another "
                "backend",
            )
    return {name: at for name, (at,) in found.items()}


def _weight_bytes(graph: Any) -> int:
    """Of all constants; of those that a kernel lays out anew twice, for both stay in memory."""
    total = 0
    for op in graph.get_ops():
        if op.get_type_name() == "Constant":
            readers = [to.get_node() for port in op.outputs() for to in port.get_target_inputs()]
            anew = any(reader.get_type_name() in _LAID_OUT for reader in readers)
            total += op.get_byte_size() * (2 if anew else 1)
    return total


def _check_range(model: str, name: str, array: Any) -> None:
    if not array.size:
        return
    low, high = int(array.min()), int(array.max())
    if low < INT32.min or high > INT32.max:
        raise InputError(
            f"model {model}: input {name} has values from {low} to {high}; OpenVINO holds "
            "integers in 32 bits",
            field=name,
            hint="use backend eager",
        )


def _is_constant(node: Any) -> bool:
    return str(node.get_type_name()) == "Constant"


def _check_lookups(graph: Any) -> bool:
    """Add an output that is true where an index lies beyond its table; whether there is one."""
    from openvino import opset13 as ops

    found: list[Any] = []
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in _LOOKUPS or _is_constant(node.input_value(1).get_node()):
            continue
        index = ops.convert(node.input_value(1), "i32")
        size = _sizes(node)
        wrong = ops.logical_or(ops.greater_equal(index, size), ops.less(index, ops.negative(size)))
        flat = ops.reshape(wrong, ops.constant(np.array([-1], np.int32)), special_zero=False)
        found.append(ops.reduce_logical_or(flat, ops.constant(np.int32(0)), keep_dims=True))
    if not found:
        return False
    whole = ops.reduce_logical_or(ops.concat(found, 0), ops.constant(np.int32(0)), keep_dims=True)
    whole.output(0).get_tensor().set_names({CHECK})
    graph.add_outputs([whole.output(0)])
    return True


def _sizes(node: Any) -> Any:
    """How long the axes are that a look-up's indices run along: one, or as many as an index has."""
    from openvino import opset13 as ops

    shape = ops.shape_of(node.input_value(0), "i32")
    first, count = 0, 1
    if node.get_type_name() == "GatherND":
        width = node.input_value(1).get_partial_shape()[-1]
        if width.is_dynamic:
            raise ModelError("OpenVINO does not check indices of GatherND of unknown width")
        first, count = node.get_batch_dims(), width.get_length()
    elif node.get_type_name() == "GatherElements":
        first = node.get_axis()
    else:
        axis = ops.convert(node.input_value(2), "i32")
        size = ops.gather(shape, axis, ops.constant(np.int32(0)))
        return ops.reshape(size, ops.constant(np.array([1], np.int32)), special_zero=False)
    axes = ops.constant(np.arange(first, first + count, dtype=np.int32))
    return ops.gather(shape, axes, ops.constant(np.int32(0)))


def _refuse_silent_differences(graph: Any, spec: ModelSpec) -> None:
    bounded = all(t.bounds is not None or t.dtype != "int64" for t in spec.inputs)
    from_ids = _reached(graph, {t.name for t in spec.inputs if t.dtype == "int64"})
    for node in graph.get_ops():
        kind, inputs = str(node.get_type_name()), node.input_values()
        if node.get_output_size() and node.get_output_element_type(0).get_type_name() == "f64":
            raise ModelError("OpenVINO would compute its float64 operations in float32")
        if kind in _REFUSED and not _is_constant(inputs[1].get_node()):
            raise ModelError(f"OpenVINO does not check the indices of {kind}")
        wide = kind in _WIDE and node.get_output_element_type(0).get_type_name() == "i64"
        if wide and not bounded and node.get_friendly_name() in from_ids:
            raise ModelError(
                "OpenVINO holds integers in 32 bits, and the model multiplies its inputs",
                hint="give integer inputs bounds in the spec",
            )


def _reached(graph: Any, names: set[str]) -> set[str]:
    """Friendly names of the nodes whose values depend on those of some inputs."""
    reached: set[str] = set()
    for node in graph.get_ordered_ops():
        own = node.get_type_name() == "Parameter" and node.output(0).get_any_name() in names
        before = (value.get_node().get_friendly_name() for value in node.input_values())
        if own or (node.get_type_name() != "ShapeOf" and any(b in reached for b in before)):
            reached.add(node.get_friendly_name())
    return reached
