"""Graphs and weights from files of others, read so that nothing in them is executed by Python.

TorchScript files hold programs for torch's own interpreter. Their operators are checked against
what networks are made of before torch opens them, since some of torch's operators read and write
files.
"""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plinth.engine import ModelError
from plinth.engine.backends.export import quiet
from plinth.engine.mapped import forget
from plinth.engine.models import program
from plinth.engine.models.onnx import OnnxModule, read_contract
from plinth.verticals.medical.networks.recipe import Recipe, Window

TRACED = 64  # voxels along each axis of what a graph is made on, at most
MOST_TEXT = 64 << 20  # bytes of code or graph that are looked through
SCRIPT_CALL = re.compile(r"\b(torch|ops)\.([A-Za-z_][\w.]*)")
SCRIPT_NAMES = re.compile(r"(aten|prim|quantized)\.\w+|nn\.[\w.]+|jit\.[\w.]+|\w+")
FORBIDDEN = re.compile(
    r"from_file|save|load|fopen|_?shared_filename|dist(ributed)?|rpc|c10d|classes|cuda|PythonOp"
    r"|_pickle\w*|open_registration\w*"
)


_log = logging.getLogger(__name__)


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint (``.pt``, ``.pth``, ``.safetensors``) holds, without running a pickle.

    Raises:
        ModelError: it is not there, or would need to run code.
    """
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    scalars = [np._core.multiarray.scalar, np.dtype, *_scalar_types()]  # type: ignore[attr-defined]
    try:
        with torch.serialization.safe_globals(scalars), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol
            mapped = zipfile.is_zipfile(path)  # the bytes stay in the file until they are used
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"{path.name} cannot be read as weights: {_first(error)}") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ModelError(
            f"{path.name} holds more than weights, and opening it would run code: {_first(error)}",
            hint="save the weights alone: torch.save(model.state_dict(), ...), or safetensors",
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} holds a {type(found).__name__}, expected weights by name")
    return found


def _scalar_types() -> list[type[Any]]:
    names = ("Float64DType", "Float32DType", "Int64DType", "Int32DType", "BoolDType")
    return [getattr(np.dtypes, name) for name in names]


def tensors_of(state: Mapping[str, Any], *keys: str) -> dict[str, Tensor]:
    """The weights in a checkpoint: itself, or what lies under one of the keys."""
    for key in keys:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def fill(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a network, all of them and no others.

    Raises:
        ModelError: names what is missing or left over.
    """
    prefixes = ("module.", "_orig_mod.")
    clean = {_without(name, prefixes): value for name, value in state.items()}
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in clean]
    over = [name for name in clean if name not in wanted]
    bad = [n for n in wanted if n in clean and wanted[n].shape != clean[n].shape]
    if missing or over or bad:
        what = f"{len(missing)} missing, {len(over)} left over, {len(bad)} of another shape"
        first = (missing + over + bad)[0]
        raise ModelError(
            f"{path.name} does not hold this network's weights ({what}; the first is {first})",
            hint="check that the configuration and the checkpoint belong together",
        )
    found = {name: _like(value, wanted[name]) for name, value in clean.items()}
    network.load_state_dict(found, strict=True, assign=True)  # no second copy of them


def _like(value: Tensor, wanted: Tensor) -> Tensor:
    """The value in the kind of numbers that is wanted; what it was made from leaves memory."""
    if value.dtype == wanted.dtype:
        return value
    made = value.to(wanted.dtype)
    forget(value)
    return made


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def read_script(path: Path) -> nn.Module:
    """A TorchScript file in eval mode on the host, after its operators were checked.

    Raises:
        ModelError: not TorchScript, or it holds an operator that is no arithmetic.
    """
    with _archive(path) as archive:
        code = [name for name in archive.namelist() if name.endswith(".py")]
        if not code:
            raise ModelError(f"{path.name} is not TorchScript: it holds no code")
        for name in code:
            text = _text(archive, name, path)
            _check_script(path, text)
            _check_mode(path, _calls(text))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which files still are
        try:
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ModelError(f"torch cannot load {path.name}: {_first(error)}") from error
        return cast(nn.Module, module.eval())


def graph_of(
    script: torch.jit.ScriptModule, window: tuple[int, int, int] | None
) -> nn.Module | None:
    """A TorchScript network as a graph of torch's operators, which more backends can run.

    It is to be held against the original on real windows before it is used.

    Args:
        script: in eval mode.
        window: voxels that it takes; ``None``: any.

    Returns:
        ``None`` where torch cannot make one.
    """
    size = [min(TRACED, n) for n in window or (TRACED,) * 3]
    try:
        from torch._export.converter import TS2EPConverter  # of torch's own migration guide

        with torch.inference_mode(False), torch.no_grad(), quiet():
            converter = TS2EPConverter(script, (torch.rand(2, 1, *size),))
            program = converter.convert()
            return _Exported(program.module(check_guards=False))
    except Exception as error:  # noqa: BLE001 - a converter raises errors of many kinds
        _log.info("TorchScript runs as it is: %s", _first(error))
        return None


def _check_script(path: Path, text: str) -> None:
    if "open(" in text or "__import__" in text:
        raise ModelError(f"{path.name} holds code that is no network")
    for root, name in SCRIPT_CALL.findall(text):
        plain = SCRIPT_NAMES.fullmatch(name) if root == "torch" else None
        known = root == "ops" and re.fullmatch(r"(aten|prim|quantized)\.\w+", name)
        parts = name.split(".")
        if not (plain or known) or any(FORBIDDEN.fullmatch(part) for part in parts):
            raise ModelError(
                f"{path.name} uses {root}.{name}, which is not part of a network",
                hint="trace the network alone: torch.jit.trace(model.eval(), example)",
            )


def _calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of the calls of torch's operators in TorchScript's code."""
    for found in re.finditer(r"\btorch\.(\w+)\(", text):
        given, depth = [""], 1
        for letter in text[found.end() :]:
            depth += (letter in "([") - (letter in ")]")
            if not depth:
                break
            if letter == "," and depth == 1:
                given.append("")
            else:
                given[-1] += letter
        yield found[1], [one.strip() for one in given]


def _check_mode(path: Path, calls: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Refuse a network that was traced or exported in training mode, which is then part of it.

    Raises:
        ModelError: it drops values at random, or normalises a batch by its own mean although it has
            learned one.
    """
    for name, given in calls:
        drops = "dropout" in name and given[2:3] == ["True"]
        forgets = name == "batch_norm" and given[5:6] == ["True"] and given[3] != "None"
        if drops or forgets:
            why = "drops values at random" if drops else "does not use the means it has learned"
            raise ModelError(
                f"{path.name} was made in training mode, and {why} ({name})",
                hint="call model.eval() before it is traced or exported",
            )


def check_onnx_mode(path: Path) -> None:
    """The same for an ONNX file.

    Raises:
        ModelError: see :func:`_check_mode`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path, load_external_data=False).graph
    known = {one.name: one for one in graph.initializer}
    known |= {
        node.output[0]: node.attribute[0].t
        for node in graph.node
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"
    }
    for node in graph.node:
        told = {one.name: one.i for one in node.attribute}
        mode = known.get(node.input[2]) if len(node.input) > 2 else None
        drops = node.op_type == "Dropout" and mode is not None and numpy_helper.to_array(mode).any()
        _check_mode(path, [("dropout", ["", "", str(bool(drops))])])
        if node.op_type == "BatchNormalization":
            training = str(bool(told.get("training_mode")))
            _check_mode(path, [("batch_norm", ["", "", "", "mean", "", training])])


def read_export(path: Path, window: Window) -> nn.Module:
    """A torch.export file (``.pt2``) as a module on the host.

    Args:
        path: the file.
        window: how volumes go through it.

    Raises:
        ModelError: see :func:`plinth.engine.models.program.read` and :func:`_check_input`.
    """
    found = program.read(path)
    calls = ((str(n.target), [str(a) for a in n.args]) for n in found.graph.nodes)
    _check_mode(path, ((name.split(".")[1], given) for name, given in calls if "." in name))
    given = [n.meta.get("val") for n in found.graph.nodes if n.name in _user_inputs(found)]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        raise ModelError(f"{path.name} takes {len(given)} inputs, expected one volume")
    shape = [n if isinstance(n, int) else None for n in given[0].shape]
    _check_input(path, shape[1:], str(given[0].dtype).removeprefix("torch."), window)
    if shape[0] not in (1, None):
        raise ModelError(
            f"{path.name} takes {shape[0]} rows at once, expected 1 or any number",
            hint="export it with one row, or with a dynamic first dimension (dynamic_shapes=)",
        )
    module: nn.Module = _Exported(found.module(check_guards=False))
    return module if shape[0] is None else OneByOne(module)


def _user_inputs(found: torch.export.ExportedProgram) -> set[str]:
    return {str(name) for name in found.graph_signature.user_inputs}


def read_onnx(path: Path, recipe: Recipe) -> nn.Module:
    """An ONNX file as a module on the host; which of its outputs is taken, the recipe says.

    Raises:
        ModelError: see :func:`plinth.engine.models.onnx.read_contract` and :func:`_check_input`.
    """
    inputs, outputs = read_contract(path, one_by_one=True)
    if len(inputs) != 1:
        raise ModelError(f"{path.name} takes {len(inputs)} inputs, expected one volume")
    name, shape, dtype = inputs[0]
    _check_input(path, shape, dtype, recipe.window)
    check_onnx_mode(path)
    names = [output[0] for output in outputs]
    if recipe.output is None and recipe.channels is None and len(names) > 1:
        raise ModelError(
            f"{path.name} gives {', '.join(names)}, and which of them has the classes is not said",
            hint=f'write "output": 0 for {names[0]}, or "channels", into its JSON',
        )
    if (recipe.output or 0) >= len(names):
        raise ModelError(f"{path.name} has no output {recipe.output}, it gives {', '.join(names)}")
    return OneByOne(OnnxModule(path, (name,), (names[recipe.output or 0],)))


def _check_input(path: Path, shape: Sequence[int | None], dtype: str, window: Window) -> None:
    """What a file says of its input is what it will be given.

    Args:
        path: the file.
        shape: of one row; ``None`` where a size is free.
        dtype: of the values.
        window: how volumes go through it.

    Raises:
        ModelError: another order of the axes, several images, other windows, other numbers.
    """
    told = f"{path.name} takes ({', '.join('?' if n is None else str(n) for n in shape)}) {dtype}"
    if len(shape) != 4 or shape[0] not in (1, None):
        last = len(shape) == 4 and shape[3] == 1
        raise ModelError(
            f"{told}, expected one channel and three axes (1, a, b, c)",
            hint="export it with the channel before the axes"
            if last
            else "one series is one image here",
        )
    if dtype != "float32":
        raise ModelError(
            f"{told}, expected float32", hint="export it with an input of float32, cast inside"
        )
    wanted, fixed = window.size or (None,) * 3, [n for n in shape[1:] if n is not None]
    if any(n not in (None, want) for n, want in zip(shape[1:], wanted, strict=True)):
        asked = "whole volumes" if window.size is None else f"windows of {list(window.size)}"
        raise ModelError(
            f"{told}, and its JSON asks for {asked}",
            hint=f'write "window": {{"size": {fixed}, ...}}' if len(fixed) == 3 else None,
        )
    if fixed and window.halo is not None:
        raise ModelError(
            f"{told}, and with a halo windows have any size",
            hint="export it with free sizes, or leave the halo out",
        )


class OneByOne(nn.Module):
    """A network that takes one row, for any number of them.

    Args:
        module: takes (1, 1, a, b, c).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, volume: Tensor) -> Any:
        """What the network makes of each of (n, 1, a, b, c), together."""
        if len(volume) == 1:
            return self.module(volume)
        found = [self.module(row) for row in torch.split(volume, 1)]
        return tree_map(lambda *rows: torch.cat(rows), *found)


class _Exported(nn.Module):
    """An exported program, whose mode was fixed when it was exported."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, volume: Tensor) -> Any:
        """What the program makes of (n, 1, a, b, c)."""
        return self.module(volume)

    def train(self, mode: bool = True) -> _Exported:
        """Stays as it is."""
        self.training = False
        return self


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path.name} cannot be read as an archive of torch: {_first(error)}"
        ) from error


def _text(archive: zipfile.ZipFile, name: str, path: Path) -> str:
    if archive.getinfo(name).file_size > MOST_TEXT:
        raise ModelError(f"{path.name}: {name} is longer than {MOST_TEXT} bytes")
    return archive.read(name).decode("utf-8", "replace")


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
