"""ONNX files: what they take and give, and how to run one as a torch module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plinth.engine.errors import ModelError

MAX_BYTES = 2 << 30
Contract = tuple[str, tuple[int | None, ...], str]


def read_contract(
    path: Path, only: Sequence[str] | None = None, *, one_by_one: bool = False
) -> tuple[list[Contract], list[Contract]]:
    """Inputs and outputs of an ONNX file: name, shape of one row, dtype.

    Args:
        path: the file.
        only: names of the outputs to keep; by default all of them.
        one_by_one: rows are given one by one, so that a file fixed to one row will do.

    Raises:
        ModelError: not there, too large, not valid, weights outside the file, an output that is
            no tensor or is not there, or a fixed number of rows.
    """
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}
    given = [value for value in graph.input if value.name not in weights]
    made = {value.name: value for value in graph.output}
    if not given or not made:
        raise ModelError(f"{path} has no inputs or no outputs")
    if absent := [name for name in only or () if name not in made]:
        raise ModelError(f"{path} has no output {absent[0]}", hint=f"it has {sorted(made)}")
    kept = [made[name] for name in only] if only else list(made.values())
    for value in kept:
        _need_numbers(path, value, made)
    lone = {v.name for v in (*given, *kept) if one_by_one and _fixed_rows(v) == 1}
    inputs = [_contract(path, "input", value, value.name in lone) for value in given]
    fixed = {value.name for value in kept if _fixed_rows(value) is not None} - lone
    free = _rows_follow(path, inputs, fixed) if fixed else frozenset()
    outputs = [_contract(path, "output", value, value.name in free | lone) for value in kept]
    return inputs, outputs


def _need_numbers(path: Path, value: Any, made: Mapping[str, Any]) -> None:
    """Refuse what a classifier may be exported with: a list of maps (ZipMap), labels in words."""
    if _is_numbers(value):
        return
    tensors = [name for name, other in made.items() if _is_numbers(other)]
    keep = f"keep only {', '.join(tensors)}: --output {tensors[0]}" if tensors else ""
    if value.type.HasField("tensor_type"):
        raise ModelError(
            f"{path}: output {value.name} is text, not numbers",
            hint=keep or "train it on numbered classes",
        )
    raise ModelError(
        f"{path}: output {value.name} is a sequence or a map, not a tensor",
        hint="export it with plain tensors: skl2onnx.to_onnx(model, X, options={'zipmap': False}), "
        "onnxmltools.convert_lightgbm(model, ..., zipmap=False)" + (f"; or {keep}" if keep else ""),
    )


def _is_numbers(value: Any) -> bool:
    import onnx

    kind, text = value.type, onnx.TensorProto.STRING
    return bool(kind.HasField("tensor_type") and kind.tensor_type.elem_type != text)


def _fixed_rows(value: Any) -> int | None:
    shape = value.type.tensor_type.shape
    fixed = shape.dim and shape.dim[0].HasField("dim_value")
    return int(shape.dim[0].dim_value) if fixed else None


def _rows_follow(path: Path, inputs: list[Contract], fixed: set[str]) -> frozenset[str]:
    """Which outputs have as many rows as the inputs, whatever the graph says of them.

    onnxmltools writes the label of a classifier as one row; what runs gives one for each.
    """
    ran = session(path, 1)
    found = set(fixed)
    names = sorted(fixed)
    for rows in (2, 3):
        feeds = {
            name: np.zeros([rows, *(32 if size is None else size for size in shape)], dtype)
            for name, shape, dtype in inputs
        }
        try:
            arrays = ran.run(names, feeds)
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            return frozenset()
        for name, array in zip(names, arrays, strict=True):
            if array.ndim == 0 or len(array) != rows:
                found.discard(name)
    return frozenset(found)


def _graph(path: Path) -> Any:
    import onnx

    model = parse(path)
    outside = next((t.name for t in tensors(model.graph) if _external(onnx, t)), None)
    if outside is not None:
        raise ModelError(
            f"{path} keeps tensor {outside} in another file",
            hint="plinth convert brings it in; or write one file: "
            "onnx.save_model(model, path, save_as_external_data=False)",
        )
    return check_graph(path, model)


def parse(path: Path) -> Any:
    """The ModelProto in a file, unchecked.

    Raises:
        ModelError: not a file, another kind of file, too large, or damaged.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModelError(
            "reading ONNX files needs the package onnx", hint="pip install 'plinth-engine[onnx]'"
        ) from error
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    refuse_other_formats(path)
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path} has more than {MAX_BYTES} bytes, the most an ONNX file can have")
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file, or was cut off: {error}") from error


def check_graph(path: Path, model: Any) -> Any:
    """The graph of a ModelProto with shapes inferred; raises ModelError where it is not valid."""
    import onnx

    try:
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path} is not a valid ONNX model: {first}") from error
    return model.graph


_SKLEARN = (
    "load it where it was trained and give it to Model.from_sklearn, or export it to ONNX: "
    "skl2onnx.to_onnx(model, X, options={'zipmap': False}), or onnxmltools for LightGBM and XGBoost"
)
_TORCH = (
    "load it where it was trained and give the module to Model.from_torch, or torch.export.save it"
)
_OTHER_FORMATS: tuple[tuple[tuple[str, ...], tuple[bytes, ...], str, str], ...] = (
    (
        (".pkl", ".pickle", ".joblib", ".dill"),
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "is a pickle, and loading a pickle runs whatever code is in it",
        _SKLEARN,
    ),
    (
        (".pt", ".pth", ".ckpt", ".bin"),
        (b"PK\x03\x04",),
        "is a checkpoint of torch, whose pickle could run code",
        _TORCH,
    ),
    ((".safetensors",), (), "holds weights without a graph", _TORCH),
    (
        (".h5", ".keras", ".tflite", ".pb"),
        (b"\x89HDF",),
        "is a model of TensorFlow",
        "convert it where it was trained: python -m tf2onnx.convert",
    ),
)
"""Suffixes and first bytes of model files that are not ONNX, why not, and what instead."""


def refuse_other_formats(path: Path) -> None:
    """Raises ModelError for a model file of a kind that is not ONNX: why, and what instead."""
    with path.open("rb") as file:
        start = file.read(8)
    for suffixes, magics, why, instead in _OTHER_FORMATS:
        if path.suffix.lower() in suffixes or start.startswith(magics):
            raise ModelError(f"{path} {why}", hint=instead)


def tensors(graph: Any) -> Iterator[Any]:
    """Weights of a graph and of all graphs within it."""
    for inner in graphs(graph):
        yield from inner.initializer
        for sparse in inner.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in inner.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and all graphs within it, such as the branches of an If."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from graphs(inner)


def _external(onnx: Any, tensor: Any) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _contract(path: Path, kind: str, value: Any, free: bool = False) -> Contract:
    """One tensor of the graph; ``free``: whatever number of rows it says, it will do."""
    import onnx

    where = f"{path}: {kind} {value.name}"
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{where} is not a tensor", hint="export the model without maps")
    tensor = value.type.tensor_type
    try:
        name = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        name = f"of type {tensor.elem_type}"
    if not tensor.HasField("shape") or not tensor.shape.dim:
        raise ModelError(f"{where} has no shape with a dimension for rows")
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if sizes[0] is not None and not free:
        raise ModelError(
            f"{where} is fixed to {sizes[0]} rows, but batches have any number",
            hint="export it with a dynamic first dimension (dynamic_shapes= or dynamic_axes=)",
        )
    return value.name, tuple(sizes[1:]), name


def session(
    path: Path,
    threads: int | None,
    profile: Path | None = None,
    *,
    write: Path | None = None,
    optimised: bool = False,
) -> Any:
    """An ONNX Runtime session on the CPU that does not spin while it is idle.

    Args:
        path: the file.
        threads: of one run; ``None`` as torch has it.
        profile: where a profile of every kernel that runs is written, if at all.
        write: where the optimised graph is written, if at all, its constants beside it.
        optimised: the file is such a graph, which is taken as it is.

    Raises:
        ModelError: ONNX Runtime is missing or cannot load the file.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ModelError(
            "running ONNX files needs the package onnxruntime",
            hint="pip install 'plinth-engine[onnx]'",
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; the log would only say it again
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if write is not None:
        options.optimized_model_filepath = str(write)
        places = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{places}file_name", "constants.bin")
        options.add_session_config_entry(f"{places}min_size_in_bytes", "1024")
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # A pattern is kept for each number of rows and doubles the arena; it is no faster here.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"ONNX Runtime cannot load {path}: {first}") from error


class OnnxModule(nn.Module):
    """An ONNX file as a torch module: tensors by name or in order in, in order out.

    It computes on the CPU; rows of another device are copied there, and outputs back.

    Args:
        path: the file; loaded at the first forward.
        inputs: input names in the order of ``forward``.
        outputs: output names in the order of what it returns.
    """

    def __init__(self, path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.path = path
        self._inputs = inputs
        self._outputs = outputs
        self._session: Any = None

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run rows (n, ...) per input; one tensor, or a tuple if there are several outputs."""
        if self._session is None:
            self._session = session(self.path, None)
        given = named or dict(zip(self._inputs, tensors, strict=True))
        device = next(iter(given.values())).device
        feeds = {name: tensor.numpy(force=True) for name, tensor in given.items()}
        arrays = self._session.run(self._outputs, feeds)
        found = [torch.from_numpy(array).to(device) for array in arrays]
        return found[0] if len(found) == 1 else tuple(found)
