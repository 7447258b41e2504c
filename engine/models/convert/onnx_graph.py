"""ONNX files of any exporter, made usable: rows first and free, tensors alone, one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.errors import ModelError
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.onnx import (
    OnnxModule,
    check_graph,
    graphs,
    parse,
    read_contract,
    session,
    tensors,
)
from plinth.engine.models.signature import ROWS, Rows, check_rows, given_rows
from plinth.engine.models.spec import spec_of
from plinth.engine.models.store import Model

MAX_EXTERNAL_BYTES = 2 << 30
_FREE = "export it with a dynamic first dimension (dynamic_shapes= or dynamic_axes=)"
_INNER = "plinth_inner_"


def read(path: Path, request: Request) -> Source:
    """An ONNX file with free rows, whatever its exporter made of them.

    Weights in other files are brought in, lists of maps (ZipMap) become tensors, rows in another
    dimension come first, and a fixed number of rows becomes free where every row still gets the
    answer that the file as it was gives.

    Raises:
        ModelError: it cannot be made usable; says why and which option to set.
    """
    model = parse(path)
    _bring_in(path, model)
    check_graph(path, model)
    whole = _write(model, request.folder / "whole.onnx", path)
    facts: dict[str, Any] = {"kind": "onnx", "opset": _opset(model)}
    if classes := _without_maps(model):
        facts["classes"] = classes
    kept = list(request.options.outputs or ())
    _keep(path, model, kept)
    _rows_first(path, model, request.options.rows_dim)
    fixed = _free_rows(path, model)
    usable = _write(model, request.folder / "model.onnx", path)
    if fixed > 1 or (fixed == 1 and not _runs(usable)):
        _free_reshapes(model, fixed)
        usable = _write(model, request.folder / "model.onnx", path)
    spec = spec_of(path, read_contract(usable), request.name, request.version)
    rows = given_rows(request.name, spec.inputs, request.example) or spec.example(ROWS)
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    made = Model(spec, OnnxModule(usable, *names).eval(), usable, rows)
    check_rows(_failing(made, path, fixed), rows, request.name)
    source = _Original(whole, request.options.rows_dim, names[1], fixed, classes)
    return Source(made, run=source.run, facts=facts, libraries=("onnx", "onnxruntime"))


def _opset(model: Any) -> dict[str, int]:
    return {entry.domain or "ai.onnx": int(entry.version) for entry in model.opset_import}


def _bring_in(path: Path, model: Any) -> None:
    """Weights in other files; each must lie beside the model, and be as long as is said.

    Raises:
        ModelError: a path that leads elsewhere, a file that is not there or too short.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

    folder = path.resolve().parent
    total = 0
    for tensor in tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        place = folder / info.location
        inside = place.resolve().parent == folder or folder in place.resolve().parents
        if Path(info.location).is_absolute() or not inside or ".." in Path(info.location).parts:
            raise ModelError(
                f"{path}: the weights of {tensor.name} lie at {info.location!r}, outside the "
                "folder of the model",
                hint="put the file beside the model and export again",
            )
        if not place.is_file():
            raise ModelError(
                f"{path}: the weights of {tensor.name} lie in {info.location}, which is not there",
                hint="copy it beside the model",
            )
        offset, length = int(info.offset or 0), int(info.length or place.stat().st_size)
        if min(offset, length) < 0 or offset + length > place.stat().st_size:
            raise ModelError(
                f"{path}: {tensor.name} takes bytes {offset} to {offset + length} of "
                f"{info.location}, which has {place.stat().st_size}",
                hint="copy the file again",
            )
        total += length
        if total > MAX_EXTERNAL_BYTES:
            raise ModelError(
                f"{path} has more than {MAX_EXTERNAL_BYTES} bytes of weights in other files, "
                "which do not fit into one ONNX file",
                hint="convert it where it was trained, with Model.from_torch",
            )
    if total:
        try:
            load_external_data_for_model(model, str(folder))
        except (ValueError, OSError, RuntimeError) as error:
            raise ModelError(f"{path}: its weights cannot be read: {error}") from error
        for tensor in tensors(model.graph):
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def _write(model: Any, path: Path, origin: Path) -> Path:
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:  # more than protobuf can hold
        raise ModelError(f"{origin} does not fit into one ONNX file: {error}") from error
    return path


def _without_maps(model: Any) -> dict[str, list[Any]]:
    """Outputs that are lists of maps become the tensors they were made of; their keys by output."""
    import onnx

    found: dict[str, list[Any]] = {}
    for node in list(model.graph.node):
        outputs = [value for value in model.graph.output if value.name in node.output]
        if node.op_type != "ZipMap" or not outputs:
            continue
        keys = next(iter(node.attribute))
        names = [text.decode() for text in keys.strings] or list(keys.ints)
        (value,) = outputs
        place = list(model.graph.node).index(node)
        plain = onnx.helper.make_node("Identity", [node.input[0]], [value.name])
        model.graph.node.remove(node)
        model.graph.node.insert(place, plain)
        kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None, len(names)])
        value.type.CopyFrom(kind)
        found[value.name] = names
    return found


def _keep(path: Path, model: Any, kept: list[str]) -> None:
    if not kept:
        return
    known = {value.name: value for value in model.graph.output}
    for name in kept:
        if name not in known:
            raise ModelError(f"{path} has no output {name}", hint=f"it has {sorted(known)}")
    del model.graph.output[:]
    model.graph.output.extend(known[name] for name in kept)


def _inputs(model: Any) -> list[Any]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _rows_first(path: Path, model: Any, dims: Mapping[str, int]) -> None:
    """Put transpositions around a graph whose rows lie in other dimensions."""
    import onnx

    inputs = {value.name: value for value in _inputs(model)}
    outputs = {value.name: value for value in model.graph.output}
    for name, dim in dims.items():
        value = inputs.get(name) or outputs.get(name)
        if value is None:
            raise ModelError(f"{path} has no tensor {name}", hint=f"it has {[*inputs, *outputs]}")
        rank = len(value.type.tensor_type.shape.dim)
        if not 0 <= dim < rank:
            raise ModelError(f"{path}: {name} has {rank} dimensions, so no dimension {dim}")
        if dim == 0:
            continue
        rest = [i for i in range(rank) if i != dim]
        _rename(model.graph, name, _INNER + name)
        sizes = [onnx.TensorShapeProto.Dimension() for _ in range(rank)]
        for size, place in zip(sizes, [dim, *rest], strict=True):
            size.CopyFrom(value.type.tensor_type.shape.dim[place])
        del value.type.tensor_type.shape.dim[:]
        value.type.tensor_type.shape.dim.extend(sizes)
        if name in inputs:
            back = [rest.index(i) + 1 if i != dim else 0 for i in range(rank)]
            node = onnx.helper.make_node("Transpose", [name], [_INNER + name], perm=back)
            model.graph.node.insert(0, node)
        else:
            node = onnx.helper.make_node("Transpose", [_INNER + name], [name], perm=[dim, *rest])
            model.graph.node.append(node)


def _rename(graph: Any, old: str, new: str) -> None:
    """Let all nodes read and write a tensor under another name."""
    for inner in graphs(graph):
        for node in inner.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]


def _free_rows(path: Path, model: Any) -> int:
    """Let the first dimension of inputs and outputs be free; how many rows it was, 0 for any."""
    fixed: set[int] = set()
    for value in _inputs(model):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            fixed.add(int(dims[0].dim_value))
    if not fixed:
        return 0
    if len(fixed) > 1 or 0 in fixed:
        raise ModelError(
            f"{path}: the inputs have {sorted(fixed)} rows, so they are not all rows",
            hint="say where rows are: --rows-dim input=dimension; or " + _FREE,
        )
    for value in (*_inputs(model), *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()
            dims[0].dim_param = "rows"
    del model.graph.value_info[:]
    return fixed.pop()


def _runs(path: Path) -> bool:
    """Whether it takes two rows."""
    try:
        contract = read_contract(path)
        spec = spec_of(path, contract, "try", "1")
        found = session(path, 1).run(None, {k: t.numpy() for k, t in spec.example(2).items()})
    except ModelError:
        return False
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return False
    return all(array.ndim and len(array) == 2 for array in found)


def _free_reshapes(model: Any, fixed: int) -> None:
    """Shapes that begin with the fixed number of rows begin with that of what is reshaped."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    for number, node in enumerate(list(graph.node)):
        if node.op_type != "Reshape":
            continue
        shape = weights.get(node.input[1])
        if shape is None and node.input[1] in constants:
            shape = next(
                (a.t for a in constants[node.input[1]].attribute if a.name == "value"), None
            )
        if shape is None:
            continue
        sizes = numpy_helper.to_array(shape).copy()
        if sizes.ndim != 1 or not len(sizes) or sizes[0] != fixed:
            continue
        sizes[0] = 0 if -1 in sizes or not _allows_zero(node) else -1
        name = f"{_INNER}shape_{number}"
        graph.initializer.append(numpy_helper.from_array(sizes, name))
        node.input[1] = name


def _allows_zero(node: Any) -> bool:
    """Whether 0 is a size of its own here, and not that of the input."""
    return any(a.name == "allowzero" and a.i for a in node.attribute)


def _failing(model: Model, path: Path, fixed: int) -> Any:
    """The model's run, whose errors say what to do about a fixed number of rows."""

    def run(rows: Rows) -> Mapping[str, Tensor]:
        try:
            return model.run(rows)
        except ModelError:
            raise
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            first = str(error).strip().partition("\n")[0][:300]
            if fixed:
                raise ModelError(
                    f"{path} is fixed to {fixed} rows, and fails with others: {first}", hint=_FREE
                ) from error
            raise ModelError(
                f"{path} fails on example rows: {first}",
                hint="give valid rows: --example rows.npz",
            ) from error

    return run


class _Original:
    """The file as it was: its number of rows at a time, rows where it has them."""

    def __init__(
        self,
        path: Path,
        dims: Mapping[str, int],
        outputs: tuple[str, ...],
        fixed: int,
        classes: Mapping[str, list[Any]],
    ) -> None:
        self._session = session(path, 1)
        self._dims = dims
        self._outputs = list(outputs)
        self._fixed = fixed
        self._classes = classes

    def run(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows (n, ...) by input name to rows by output name."""
        count = len(next(iter(rows.values())))
        step = self._fixed or count
        parts = []
        for start in range(0, count, step):
            places = [min(row, count - 1) for row in range(start, start + step)]
            parts.append(self._part({k: tensor[places] for k, tensor in rows.items()}))
        return {name: torch.cat([part[name] for part in parts])[:count] for name in self._outputs}

    def _part(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {
            name: np.ascontiguousarray(np.moveaxis(tensor.numpy(), 0, self._dims.get(name, 0)))
            for name, tensor in rows.items()
        }
        found = self._session.run(self._outputs, feeds)
        return {
            name: self._tensor(name, value)
            for name, value in zip(self._outputs, found, strict=True)
        }

    def _tensor(self, name: str, value: Any) -> Tensor:
        if name in self._classes:  # a list of maps
            keys = self._classes[name]
            return torch.tensor([[float(row[key]) for key in keys] for row in value])
        return torch.from_numpy(np.ascontiguousarray(value)).movedim(self._dims.get(name, 0), 0)
