"""Exported programs of torch (``.pt2``) on disk: written, and read without running what they say.

``torch.export.load`` unpickles, evaluates expressions and imports the modules that a file names.
Here a file is first made harmless: no pickle in it is opened, its graph may name operators of
``aten`` and ``prims`` and arithmetic alone, its expressions are arithmetic of sizes, and it
unpacks to no more bytes than it has.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plinth.engine.errors import ModelError
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.spec import ModelSpec

MAX_BYTES = 32 << 30
MAX_GRAPH_BYTES = 256 << 20
_EXPORT = "export it with torch 2.9 or newer: torch.export.save(program, path)"

_GRAPH = "models/model.json"
_TABLES = (
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_SAMPLE = "data/sample_inputs/model.pt"
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.[a-z_0-9]+\.\w+")
_FORBIDDEN = re.compile(r"torch\.ops\.aten\.(from_file|_print|save|.*script).*")
_REGIONS = {
    f"torch.ops.higher_order.{name}"
    for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond")
}
_PYTHON = (
    *("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv"),
    *("mod", "pow", "truediv", "and_", "or_", "getitem"),
)
_ARITHMETIC = {
    *(f"_operator.{name}" for name in _PYTHON),
    *("math.trunc", "torch.sym_not", "torch.sym_int", "torch.sym_float", "torch.sym_ite"),
    *("torch.sym_max", "torch.sym_min", "torch.sym_sqrt"),
}
_FUNCTIONS = {
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt"),
    *("FloorToInt", "CeilDiv", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv"),
    *("TruncToFloat", "TruncToInt", "RoundToInt", "ToFloat", "Identity", "Max", "Min"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not"),
    *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow"),
}
_ASSUMPTIONS = {"positive", "integer", "nonnegative", "real"}
_MAX_POWER = 16
_ARITHMETIC_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.Load),
    *(ast.operator, ast.unaryop, ast.cmpop),
)
_TREES = {
    None,
    *("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"),
}


class ProgramModule(nn.Module):
    """An exported program as a module: tensors by name in, by name out.

    Args:
        program: what runs; takes tensors in the order of ``inputs``, gives those of ``outputs``.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    def __init__(
        self, program: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.program = program
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, **rows: Tensor) -> dict[str, Tensor]:
        """Rows (n, ...) by input name to rows by output name."""
        found = self.program(*(rows[name] for name in self.inputs))
        return dict(zip(self.outputs, found, strict=True))

    def train(self, mode: bool = True) -> ProgramModule:
        """An exported program has one mode, in which it was exported."""
        self.training = False
        return self


M = TypeVar("M", bound=nn.Module)


def in_one_mode(module: M) -> M:
    """A module that holds a program, whose ``train`` and ``eval`` torch refuses."""
    for part in module.modules():
        part.training = False
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


class _InOrder(nn.Module):
    """A module with its inputs and outputs in the order of the contract."""

    def __init__(self, spec: ModelSpec, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._spec = spec
        self._binding = Binding(spec, module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Clones, so that a module that writes to its input does not turn it into an output.
        rows = {n: tensor.clone() for n, tensor in zip(self._binding.names, tensors, strict=True)}
        found = outputs_by_name(self._spec, self._binding.call(self.module, rows))
        return tuple(found[tensor.name] for tensor in self._spec.outputs)


def write(spec: ModelSpec, module: nn.Module, rows: Mapping[str, Tensor], path: Path) -> None:
    """Export a module, with free rows and free sizes, to a file.

    Args:
        spec: its contract.
        module: in eval mode.
        rows: valid rows (n, ...) by input name, at least two.
        path: the file.

    Raises:
        ModelError: it cannot be exported; says why.
    """
    shapes = tuple(
        {0: torch.export.Dim.DYNAMIC}
        | {i: torch.export.Dim.DYNAMIC for i, size in enumerate(tensor.shape, 1) if size is None}
        for tensor in spec.inputs
    )
    inputs = tuple(rows[tensor.name] for tensor in spec.inputs)
    whole = _InOrder(spec, module)
    whole.training = False
    with refusing(f"model {spec.name} cannot be exported", _UNEXPORTED), torch.no_grad():
        program = torch.export.export(whole, inputs, dynamic_shapes=(shapes,))
        program.example_inputs = None
        with path.open("wb") as file:
            torch.export.save(program, file)


_UNEXPORTED = (
    "register the code that builds it with @architecture and use ModelStore.save, or make it "
    "a graph: no control flow that depends on values"
)


def read(path: Path) -> torch.export.ExportedProgram:
    """An exported program from a file that may be anybody's.

    Raises:
        ModelError: not an exported program, damaged, too large, or one that holds pickles,
            operators or expressions that are not arithmetic of tensors; says which.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    harmless = _harmless(path)
    with refusing(f"{path} cannot be read", _EXPORT):
        return torch.export.load(harmless)


def load(path: Path, spec: ModelSpec) -> ProgramModule:
    """A file that :func:`write` wrote, as a module.

    Raises:
        ModelError: as :func:`read`.
    """
    return as_module(read(path), spec, path)


def as_module(program: torch.export.ExportedProgram, spec: ModelSpec, path: Path) -> ProgramModule:
    """A program whose inputs and outputs are those of the contract, in its order."""
    with refusing(f"{path} cannot be made to run", _EXPORT):
        module = program.module(check_guards=False)
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    return in_one_mode(ProgramModule(module, *names))


def _harmless(path: Path) -> io.BytesIO:
    """The archive again, with nothing in it that would be unpickled, evaluated or imported."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = _checked_archive(path, archive)
            graph = _json(path, archive, root + _GRAPH)
            _check_graph(path, graph)
            tables = {name: _json(path, archive, root + name) for name in _TABLES}
            sizes = {i.filename: i.file_size for i in archive.infolist()}
            payloads = _payloads(path, root, tables, sizes)
            made = io.BytesIO()
            with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as clean:
                _put(clean, _GRAPH, json.dumps(graph).encode())
                for name, table in tables.items():
                    _put(clean, name, json.dumps(table).encode())
                for name in payloads:
                    _put(clean, name, archive.read(root + name))
                _put(clean, _SAMPLE, b"")
                for name, said in (("archive_format", b"pt2"), ("archive_version", b"0")):
                    _put(clean, name, said)
                _put(clean, "byteorder", b"little")
                _put(clean, ".data/version", b"3\n")
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{path} is not an exported program, or was cut off: {error}", hint=_EXPORT
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is not an exported program as torch writes it: {error!r}"[:500], hint=_EXPORT
        ) from error
    made.seek(0)
    return made


def _put(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Torch reads tensors where they lie, aligned to 64 bytes."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    header = archive.fp.tell() + 30 + len(info.filename.encode())
    room = -(header + 4) % 64
    info.extra = b"FB" + room.to_bytes(2, "little") + b"\0" * room
    archive.writestr(info, data)


def _checked_archive(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder all entries lie in; entries are plain, unpacked bytes in a bounded sum."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or len(names) != len(set(names)) or len(names) > 100_000:
        raise ModelError(f"{path} is not an exported program: its entries are not in one folder")
    packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ModelError(
            f"{path}: {packed.filename} is compressed, which exported programs are not",
            hint=_EXPORT,
        )
    total = sum(entry.file_size for entry in entries)
    if total > min(MAX_BYTES, path.stat().st_size):
        raise ModelError(f"{path} says it has {total} bytes, more than the file or {MAX_BYTES}")
    root = f"{roots.pop()}/"
    if any(name.startswith(f"{root}data/aotinductor") for name in names):
        raise ModelError(f"{path} holds compiled code, which is never run", hint=_EXPORT)
    if root + _GRAPH not in names:
        raise ModelError(f"{path} has no {_GRAPH}, so it is no exported program", hint=_EXPORT)
    return root


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > MAX_GRAPH_BYTES:
        raise ModelError(f"{path}: {name} has more than {MAX_GRAPH_BYTES} bytes")
    return json.loads(archive.read(name))


def _payloads(
    path: Path, root: str, tables: Mapping[str, Any], sizes: Mapping[str, int]
) -> list[str]:
    """Entries with the bytes of tensors; each tensor lies inside its entry."""
    found: dict[str, None] = {}
    for table, content in tables.items():
        folder = table.rpartition("/")[0]
        for tensor, facts in content["config"].items():
            if facts["use_pickle"] or facts["tensor_meta"] is None:
                raise ModelError(
                    f"{path}: {tensor} is a pickle, which is never opened",
                    hint="export a module whose weights are plain tensors",
                )
            if not re.fullmatch(r"(weight|tensor)_\d+", facts["path_name"]):
                raise ModelError(f"{path}: {tensor} lies in {facts['path_name']!r}")
            name = f"{folder}/{facts['path_name']}"
            extent = _extent(facts["tensor_meta"])
            if extent > sizes[root + name] and extent > 0:
                raise ModelError(
                    f"{path}: {tensor} takes {extent} bytes, {name} has {sizes[root + name]}"
                )
            facts["tensor_meta"]["device"] = {"type": "cpu", "index": None}
            found[name] = None
    return list(found)


_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2}
"""Bytes of an element by the number that the format has for its dtype."""


def _extent(meta: Mapping[str, Any]) -> int:
    """Bytes from the start of its storage to the end of a tensor."""
    sizes = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    if min((*sizes, *strides, offset, 0)) < 0 or len(sizes) != len(strides):
        raise ValueError("negative sizes of a tensor")
    if 0 in sizes:
        if max(sizes) > 1 << 32:
            raise ValueError("absurd sizes of an empty tensor")
        return 0
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return (last + 1) * _WIDTHS.get(meta["dtype"], 1)


def _check_graph(path: Path, graph: Any) -> None:
    """Refuse what is no arithmetic; drop what is evaluated and says nothing of the result."""
    graph["guards_code"] = []
    graph["verifiers"] = ["TRAINING"]  # of graphs as export makes them: they may write in place
    for part in _dicts(graph):
        if "target" in part and "inputs" in part:
            _check_operator(path, part["target"])
            part["metadata"] = {}
        for key in ("expr_str", "as_expr"):
            if isinstance(part.get(key), str):
                _check_expression(path, part[key])
        if "as_operator" in part or "as_custom_obj" in part or part.get("custom_obj_values"):
            raise ModelError(f"{path} holds an object of custom code, which is never run")
        for key in ("in_spec", "out_spec"):
            if isinstance(part.get(key), str):
                _check_tree(path, json.loads(part[key])[1])
    for name in graph["range_constraints"]:
        _check_expression(path, name)
    graph["graph_module"]["metadata"] = {}
    graph["graph_module"]["treespec_namedtuple_fields"] = {}


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _dicts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _dicts(part)


def _check_operator(path: Path, target: Any) -> None:
    known = isinstance(target, str) and (
        _OPERATOR.fullmatch(target) or target in _ARITHMETIC or target in _REGIONS
    )
    if not known or _FORBIDDEN.fullmatch(target):
        raise ModelError(
            f"{path} calls {str(target)[:100]!r}, which is not an operator of aten or prims",
            hint="run program.run_decompositions() before torch.export.save, or export it to ONNX",
        )


def _check_expression(path: Path, text: str) -> None:
    """Sizes are evaluated by sympy, which runs what they say: arithmetic alone may pass."""
    try:
        nodes = [] if len(text) > 10_000 else list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        nodes = []
    if not nodes or not all(map(_is_arithmetic, nodes)):
        raise ModelError(f"{path} has a size {text[:80]!r}, which is not arithmetic of sizes")


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or node.id == "int_oo" or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        text = isinstance(node.value, str) and _SYMBOL.fullmatch(node.value)
        return bool(text) or (isinstance(node.value, int | float) and abs(node.value) < 1 << 63)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return name in _FUNCTIONS and (
            not name.startswith(("Pow", "FloatPow")) or _is_low(node.args[1:])
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return _is_low([node.right])
    if isinstance(node, ast.keyword):
        return node.arg in _ASSUMPTIONS
    return isinstance(node, _ARITHMETIC_NODES)


_SYMBOL = re.compile(r"z?[suf]\d+|zuf\d+")


def _is_low(exponents: list[ast.expr]) -> bool:
    """Whether a power is small: 9 ** 9 ** 9 would be worked out for ever."""
    (exponent,) = exponents if len(exponents) == 1 else (None,)
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1:  # Integer(2)
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    return isinstance(value, int | float) and abs(value) <= _MAX_POWER


def _check_tree(path: Path, tree: Any) -> None:
    """Inputs and outputs nest in tuples, lists and dicts of names; others are imported by name."""
    context = json.loads(tree["context"]) if isinstance(tree["context"], str) else tree["context"]
    names = context if isinstance(context, list) else [context]
    plain = all(isinstance(name, str | int | None) for name in names)
    if tree["type"] not in _TREES or not plain:
        raise ModelError(
            f"{path}: its inputs or outputs nest in {tree['type']}",
            hint="export a module that takes and gives tensors in tuples, lists and dicts",
        )
    for child in tree["children_spec"]:
        _check_tree(path, child)


@contextmanager
def refusing(what: str, hint: str) -> Iterator[None]:
    """Turn what torch's exporter and reader raise into a sentence, and keep them quiet."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:  # of any kind
        reason = str(error.__cause__ or error).strip().partition("\n")[0][:300]
        if "Constraints violated" in str(error):
            reason = (
                "a size that should be free is fixed in it, as recurrent layers fix their steps"
            )
        if "data-dependent" in str(error):
            reason = f"its control flow depends on values, which a graph cannot hold ({reason})"
        raise ModelError(f"{what}: {reason or type(error).__name__}", hint=hint) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
