"""ONNX files: what they take and give, and how to run one as a torch module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.errors import ModelError

MAX_BYTES = 2 << 30
Contract = tuple[str, tuple[int | None, ...], str]


def read_contract(path: Path) -> tuple[list[Contract], list[Contract]]:
    """Inputs and outputs of an ONNX file: name, shape of one row, dtype.

    Raises:
        ModelError: not there, too large, not valid, weights outside the file, or a fixed
            number of rows.
    """
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [_contract(path, "input", i) for i in graph.input if i.name not in weights]
    outputs = [_contract(path, "output", value) for value in graph.output]
    if not inputs or not outputs:
        raise ModelError(f"{path} has no inputs or no outputs")
    return inputs, outputs


def _graph(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise ModelError(
            "reading ONNX files needs the package onnx", hint="pip install 'plinth-engine[onnx]'"
        ) from error
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path} has more than {MAX_BYTES} bytes, the most an ONNX file can have")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file: {error}") from error
    outside = next((t.name for t in _tensors(onnx, model.graph) if _external(onnx, t)), None)
    if outside is not None:
        raise ModelError(
            f"{path} keeps tensor {outside} in another file",
            hint="write one file: onnx.save_model(model, path, save_as_external_data=False)",
        )
    try:
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path} is not a valid ONNX model: {first}") from error
    return model.graph


def _tensors(onnx: Any, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(onnx, inner)


def _external(onnx: Any, tensor: Any) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _contract(path: Path, kind: str, value: Any) -> Contract:
    import onnx

    where = f"{path}: {kind} {value.name}"
    if not value.type.HasField("tensor_type"):
        raise ModelError(
            f"{where} is not a tensor", hint="export the model without sequences and maps"
        )
    tensor = value.type.tensor_type
    try:
        name = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        name = f"of type {tensor.elem_type}"
    if not tensor.HasField("shape") or not tensor.shape.dim:
        raise ModelError(f"{where} has no shape with a dimension for rows")
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if sizes[0] is not None:
        raise ModelError(
            f"{where} is fixed to {sizes[0]} rows, but batches have any number",
            hint="export it with a dynamic first dimension (dynamic_shapes= or dynamic_axes=)",
        )
    return value.name, tuple(sizes[1:]), name


def session(path: Path, threads: int | None) -> Any:
    """An ONNX Runtime session on the CPU that does not spin while it is idle.

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
    options.log_severity_level = 3
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
    """An ONNX file as a torch module on the CPU: tensors in order in, tensors in order out.

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

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run rows (n, ...) per input; one tensor, or a tuple if there are several outputs."""
        if self._session is None:
            self._session = session(self.path, None)
        feeds = {
            name: tensor.detach().numpy()
            for name, tensor in zip(self._inputs, tensors, strict=True)
        }
        found = [torch.from_numpy(array) for array in self._session.run(self._outputs, feeds)]
        return found[0] if len(found) == 1 else tuple(found)
