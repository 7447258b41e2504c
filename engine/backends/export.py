"""A torch module as an ONNX file: made once, kept in a cache by the program that was traced."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import logging
import platform
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from plinth.distribution import version
from plinth.engine.backends.base import installed
from plinth.engine.backends.eager import in_eval_mode, stored_bytes, unpacked_copy
from plinth.engine.cache import cache_folder, keep_bound, used
from plinth.engine.errors import ModelError
from plinth.engine.models.activations import live_bytes
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.digest import digest, lasting_digest
from plinth.engine.models.other_sizes import Place, free_places, resized, sizes_of
from plinth.engine.models.store import Model

MAX_WEIGHTS = 1 << 30
EXAMPLE_ROWS = 2
FORMAT = "5"  # of what is kept in the cache
_EDGE = 1 << 14  # sizes above are not tried: it would take too long
KNOWN_MODULES = 64
_LASTING: dict[str, str | None] = {}  # lasting digests by digest
_TRANSLATIONS: dict[tuple[tuple[str, Any], ...], Any] = {}  # torch's table by what was asked for
_KNOWN_TORCH = ("2.13",)  # whose private table of translations is what it is taken for here
_PEAKS: WeakKeyDictionary[nn.Module, dict[tuple[object, int], int | None]] = WeakKeyDictionary()
CHANNEL_BLOCK = 16
"""Channels that lie side by side in blocked layouts."""
_EXPORTING = threading.RLock()  # torch's tracer keeps what it does in the process
_log = logging.getLogger(__name__)


def why_not_onnx(model: Model) -> str | None:
    """Why a model has no ONNX file and cannot be made one here; ``None`` if it can."""
    if not model.onnx and (reason := installed("onnx", "onnx", "onnxscript").reason):
        return reason
    if any(spec.dtype == "bfloat16" for spec in (*model.spec.inputs, *model.spec.outputs)):
        return "it takes no bfloat16 tensors"
    size = stored_bytes(model.module)
    if size > MAX_WEIGHTS:
        return f"the weights have {size} bytes, at most {MAX_WEIGHTS} fit into one ONNX file"
    return None


def compile_peak(model: Model) -> int:
    """Bytes that are taken at most while a graph of a model is made and loaded, about.

    Of a module a graph with all weights is made, written, and read into what runs; measured by
    ``benchmarks/memory.py plan``.
    """
    return 2 * model.onnx.stat().st_size if model.onnx else 3 * stored_bytes(model.module)


def run_peak(model: Model, aligned: int = 1) -> int | None:
    """Bytes of activations that a graph of a model holds at its peak for one row, about.

    A module is traced once for each size of its rows, whichever backends and precisions ask.

    Args:
        model: the model.
        aligned: channels are held in multiples of so many.

    Returns:
        ``None`` where nothing is known: an ONNX file, or what cannot be traced.
    """
    if model.onnx:
        return None
    known = _PEAKS.setdefault(model.module, {})
    contract = model.spec.model_dump_json(include={"inputs", "outputs"})
    sizes = contract, *(tuple(each.shape[1:]) for each in (model.example or {}).values())
    if (sizes, aligned) not in known:
        for each, found in _peaks(model, {1, CHANNEL_BLOCK, aligned}).items():
            known[sizes, each] = found
    return known[sizes, aligned]


def _peaks(model: Model, alignments: set[int]) -> dict[int, int | None]:
    """As :func:`run_peak`, for several alignments."""
    try:
        program = Traced(model).program
    except ModelError as error:
        _log.debug("model %s: %s", model.spec.name, error)
        return dict.fromkeys(alignments)
    return {aligned: live_bytes(program, EXAMPLE_ROWS, aligned) for aligned in alignments}


class _Positional(nn.Module):
    """A module with its inputs and outputs in the order of the contract, as ONNX labels them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = unpacked_copy(in_eval_mode(model))
        self.eval()
        self._spec = model.spec
        self._binding = Binding(model.spec, model.module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Clones, so that a module that writes to its input does not turn it into an output.
        rows = {
            name: tensor.clone() for name, tensor in zip(self._binding.names, tensors, strict=True)
        }
        found = outputs_by_name(self._spec, self._binding.call(self.module, rows))
        return tuple(found[tensor.name] for tensor in self._spec.outputs)


def onnx_file(model: Model) -> Path:
    """The model's ONNX file: its own, or exported (seconds; once per program and weights).

    Raises:
        ModelError: it cannot be exported; says why.
    """
    if model.onnx:
        return model.onnx
    made = Traced(model)
    path = cache_folder("onnx") / f"{made.key}.onnx"
    if path.is_file():
        used(path)
        return path
    with _EXPORTING:
        return path if path.is_file() else _exported(model, made.program, path)


def onnx_place(model: Model) -> Path | None:
    """Where :func:`onnx_file` keeps what it makes; ``None`` where only a trace can tell."""
    if model.onnx:
        return model.onnx
    key = Traced(model).known_key
    return None if key is None else cache_folder("onnx") / f"{key}.onnx"


def _exported(model: Model, program: torch.export.ExportedProgram, path: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
        new = Path(folder) / "model.onnx"
        with refusing(model, "exported to ONNX"), quiet(), _translations_kept():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[tensor.name for tensor in model.spec.inputs],
                output_names=[tensor.name for tensor in model.spec.outputs],
                verbose=False,
            )
            if converted is None:
                raise ModelError(f"model {model.spec.name}: the export gave nothing")
            proto = converted.model_proto  # made anew each time it is asked for
            tidy_recurrent(proto)
            _refuse_negative_ids(proto, new)
        new.replace(path)
    del converted, proto
    _forget_graph()
    keep_bound()
    return path


@contextlib.contextmanager
def _translations_kept() -> Iterator[None]:
    """Within, torch's table of translations to ONNX is made once in the process, then copied.

    torch makes it for each export from the source text of 500 functions, which takes a second:
    half of what the export of a small model takes. There is no public way to hand it a table; a
    torch whose private one was not looked at here exports as ever.
    """
    if ".".join(torch.__version__.split(".")[:2]) not in _KNOWN_TORCH:
        yield
        return
    from torch.onnx._internal.exporter import _registration

    table: Any = _registration.ONNXRegistry
    before = vars(table)["from_torchlib"]

    def kept(**wanted: Any) -> Any:
        key = tuple(sorted(wanted.items()))
        if key not in _TRANSLATIONS:
            _TRANSLATIONS.clear()
            _TRANSLATIONS[key] = before.__get__(None, table)(**wanted)
        found = copy.copy(_TRANSLATIONS[key])
        found.functions = {name: list(made) for name, made in found.functions.items()}
        return found

    table.from_torchlib = staticmethod(kept)
    try:
        yield
    finally:
        table.from_torchlib = before


def _forget_graph() -> None:
    """Free the graph that was optimised last.

    Each rule of onnxscript's optimiser keeps the graph it was tried on last, with the weights that
    were folded (``SimplePatternMatcher`` of onnxscript/rewriter/_matcher.py); a graph of one node
    takes its place.
    """
    import onnxscript.optimizer
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Sqrt", ["x"], ["y"])], "one", [x], [y])
    onnxscript.optimizer.optimize(helper.make_model(graph))
    _forget_sizes()
    gc.collect()


def _forget_sizes() -> None:
    """Free what torch keeps of each operation on tensors whose sizes are symbols.

    It is kept for the process by the symbols of one trace, which no other trace has: about 5 kB
    an operation that nobody asks for again.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.cache_clear()


class Traced:
    """The program that a model runs, and a key of what is made from it."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """For any number of rows and any size that the spec leaves free; seconds.

        Raises:
            ModelError: it cannot be traced; says why.
        """
        spec = self._model.spec
        shapes = tuple(
            {0: torch.export.Dim.DYNAMIC}
            | {i: torch.export.Dim.AUTO for i, size in enumerate(each.shape, 1) if size is None}
            for each in spec.inputs
        )
        rows = self._model.rows(EXAMPLE_ROWS)
        inputs = tuple(rows[each.name] for each in spec.inputs)
        module = _Positional(self._model)
        with _EXPORTING, refusing(self._model, "exported to ONNX"), quiet():
            try:
                program = torch.export.export(module, inputs, dynamic_shapes=(shapes,))
                _refuse_narrow(self._model, module, program, rows)
            finally:
                _forget_sizes()
        return program

    @cached_property
    def key(self) -> str:
        """Of the contract, of versions, and of the module's code and state.

        Where something of the module cannot be read, of the traced program with all its
        constants: whatever decides what the module computes has left its mark there.
        """
        return self._key_of(self._lasting or self._of_program())

    @property
    def known_key(self) -> str | None:
        """The same, where it can be told without a trace."""
        return None if self._lasting is None else self._key_of(self._lasting)

    @cached_property
    def _lasting(self) -> str | None:
        """Of the module, or of an earlier one that was pinned at the same digest."""
        pinned, module = self._model.made_from, self._model.module
        if pinned is None:
            return lasting_digest(module)
        if pinned not in _LASTING:
            if len(_LASTING) >= KNOWN_MODULES:
                _LASTING.clear()
            _LASTING[pinned] = lasting_digest(module)
        return _LASTING[pinned]

    def _key_of(self, module: str) -> str:
        versions = [version(name) for name in ("torch", "onnx", "onnxscript", "numpy")]
        contract = self._model.spec.model_dump_json(include={"inputs", "outputs"})
        facts = (FORMAT, *versions, platform.python_version(), contract, module)
        return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()

    def _of_program(self) -> str:
        graph, ranges = self.program.graph, self.program.range_constraints
        key = hashlib.sha256(f"{graph}\n{ranges}".encode())
        for name, value in sorted({**self.program.state_dict, **self.program.constants}.items()):
            key.update(f"{name}\n{digest(value)}".encode())
        return key.hexdigest()


def _refuse_narrow(
    model: Model, module: nn.Module, program: torch.export.ExportedProgram, rows: Mapping[str, Any]
) -> None:
    """Refuse a program that holds for fewer sizes than its module: others would be wrong.

    Tracing follows one side of a branch on a size and notes for which sizes it holds. Just outside
    of those the module must refuse too, as where a table of positions ends.

    Raises:
        ModelError: names the sizes.
    """
    names = dict(zip(program.graph_signature.user_inputs, model.spec.inputs, strict=True))
    sizes = {
        (names[node.name].name, dim): size
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in names
        for dim, size in enumerate(node.meta["val"].shape)
    }
    for place in ((model.spec.inputs[0].name, 0), *free_places(model.spec)):
        symbol = _symbol(sizes[place])
        if symbol is None:
            raise _narrow(model, place, f"{int(sizes[place])}")
        held = program.range_constraints.get(symbol)
        if held is None:
            continue
        low, high = (int(end) if end.is_Integer else None for end in (held.lower, held.upper))
        for outside in (None if low is None else low - 1, None if high is None else high + 1):
            if outside is None or not 1 < outside <= _EDGE:
                continue  # 1 is tried with what was compiled
            alike = {other: outside for other, size in sizes.items() if _symbol(size) == symbol}
            if _takes(module, model, resized(rows, alike)):
                raise _narrow(model, place, f"{low} to {high}")


def _symbol(size: Any) -> Any:
    """What a size is called in a program's constraints; ``None``: it is a number."""
    if isinstance(size, int):
        return None
    return None if size.node.expr.is_number else size.node.expr


def _takes(module: nn.Module, model: Model, rows: Mapping[str, Tensor]) -> bool:
    try:
        with torch.inference_mode():
            module(*(rows[each.name] for each in model.spec.inputs))
    except Exception as error:  # noqa: BLE001 - a module raises anything at sizes it does not take
        _log.debug("model %s refuses %s: %s", model.spec.name, sizes_of(rows), error)
        return False
    return True


def _narrow(model: Model, place: Place, held: str) -> ModelError:
    name, dim = place
    return ModelError(
        f"model {model.spec.name} cannot be exported for all sizes: its graph holds for {name} "
        f"with {held} in dimension {dim} alone, the model takes more",
        hint="use backend eager, or fix the size in the spec",
    )


def tidy_recurrent(proto: Any) -> None:
    """Take out what the exporter puts around a recurrent layer of one direction.

    It begins with states of zeros, which ONNX has by itself, and joins the directions of the
    output by sizes that the graph computes, where there is one direction to be dropped: fifteen
    nodes that take a third of the time of a small layer.
    """
    import onnx

    made_by = {name: node for node in proto.graph.node for name in node.output}
    constants = {t.name: t for t in proto.graph.initializer}
    axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "plinth_direction")
    for node in list(proto.graph.node):
        if node.op_type not in ("GRU", "LSTM", "RNN"):
            continue
        for place in (5, 6):  # initial_h, initial_c
            if len(node.input) > place and _is_zero(node.input[place], made_by, constants):
                node.input[place] = ""
        if any(a.name == "direction" and a.s == b"bidirectional" for a in node.attribute):
            continue
        for swapped in _readers(proto, node.output[0], "Transpose"):
            for joined in _readers(proto, swapped.output[0], "Reshape"):
                if _origin(joined) == _origin(node) == _origin(swapped):
                    joined.op_type = "Squeeze"
                    joined.input[:] = [node.output[0], axis.name]
                    del joined.attribute[:]
    proto.graph.initializer.append(axis)
    _drop_unread(proto)


def _readers(proto: Any, name: str, kind: str) -> list[Any]:
    return [n for n in proto.graph.node if n.op_type == kind and n.input[0] == name]


def _origin(node: Any) -> str:
    """The operation of the traced program that a node was made for."""
    return next((m.value for m in node.metadata_props if m.key.endswith("fx_node")), "")


def _is_zero(name: str, made_by: dict[str, Any], constants: dict[str, Any]) -> bool:
    """Whether a tensor is a constant 0, or copies of one."""
    import onnx

    while name in made_by and made_by[name].op_type in ("Slice", "Expand"):
        name = made_by[name].input[0]
    return name in constants and not onnx.numpy_helper.to_array(constants[name]).any()


def _drop_unread(proto: Any) -> None:
    """Remove nodes and constants that no output depends on, where no node has a graph inside."""
    if any(a.HasField("g") for node in proto.graph.node for a in node.attribute):
        return
    read = {value.name for value in proto.graph.output}
    kept = []
    for node in reversed(proto.graph.node):
        if read & set(node.output):
            kept.append(node)
            read |= set(node.input)
    constants = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(reversed(kept))
    proto.graph.initializer.extend(constants)


def _refuse_negative_ids(proto: Any, path: Path) -> None:
    """Save an exported model in which look-ups fail on ids below 0, as they do in torch.

    ONNX counts them from the end. They are turned into a number beyond every table, at which
    ONNX Runtime raises.
    """
    import onnx

    nodes = []
    for number, node in enumerate(proto.graph.node):
        lookup = any(f"aten.{op}." in _origin(node) for op in ("embedding", "index_select"))
        if node.op_type == "Gather" and lookup:
            ids, zero, far, below, safe = node.input[1], *(f"plinth_{number}_{i}" for i in range(4))
            kind = onnx.TensorProto.INT64
            for name, value in ((zero, 0), (far, (1 << 31) - 1)):
                constant = onnx.helper.make_tensor(name, kind, [], [value])
                proto.graph.initializer.append(constant)
            wide = f"{safe}_wide"
            nodes += [
                onnx.helper.make_node("Cast", [ids], [wide], to=kind),
                onnx.helper.make_node("Less", [wide, zero], [below]),
                onnx.helper.make_node("Where", [below, far, wide], [safe]),
            ]
            node.input[1] = safe
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.save_model(proto, str(path))


@contextlib.contextmanager
def refusing(model: Model, how: str) -> Iterator[None]:
    """Turn what an exporter raises into a sentence: the model cannot be ``how``.

    Raises:
        ModelError: what cannot be exported, and why.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # exporters raise errors of many kinds
        reason = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        if "data-dependent" in str(error):
            reason = f"its control flow depends on values, which a graph cannot hold ({reason})"
        raise ModelError(
            f"model {model.spec.name} cannot be {how}: {reason}",
            hint="use backend eager",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters log and warn of."""
    names = ("torch.onnx", "torch.fx", "torch.export", "torch._export.non_strict_utils")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
