"""Weights on disk: safetensors with a bounded header or packed; shared tensors stored once.

Files are mapped into memory: weights take memory as they are read, and clean pages, which the
system may drop. Tensors that are equal to those of another model that is loaded lie in its file.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plinth.engine.compression import low_rank, pruning
from plinth.engine.compression.packed_layers import pack_layers, packed_bytes, unpack_layers
from plinth.engine.compression.packing import Coded, PackedFile
from plinth.engine.compression.training import Compressed
from plinth.engine.errors import ModelError
from plinth.engine.mapped import Mapping, Pages, map_file

PACKED = Path("weights.packed")
"""The name of packed weights, in a version or a variant."""

MAX_HEADER_BYTES = 16 << 20
SHARED_BYTES = 64 << 10
"""Tensors of so many bytes are looked for among those of other models."""
_READ_BYTES = 8 << 20  # of a file in memory while its tensors are read to be compared

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_RANDOM = frozenset(("uniform_", "normal_"))
_LOCK = threading.Lock()
_LOADED: WeakValueDictionary[tuple[Any, ...], Mapping] = WeakValueDictionary()
_PLACES: dict[tuple[Any, ...], int] = {}
M = TypeVar("M")


def write(module: nn.Module, path: Path) -> dict[str, str]:
    """Write a module's state; returns alias -> name for tensors that are one in memory."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, value in module.state_dict().items():
        host = value.detach().cpu()
        storage = host.untyped_storage().data_ptr()
        place = (storage, host.storage_offset(), tuple(host.shape), host.stride(), host.dtype)
        if host.numel() and place in first:
            shared[name] = first[place]
            continue
        first[place] = name
        tensors[name] = host.clone().contiguous() if storage in storages else host.contiguous()
        storages.add(storage)
    save_file(tensors, path)
    return shared


def fill(module: nn.Module, path: Path, name: str, shared: dict[str, str]) -> None:
    """Load a file, safetensors or packed, into a module.

    Args:
        module: gets the weights; from a packed file its layers may become the smaller ones, or the
            products, that the file has.
        path: the file; packed if it ends in ``.packed``.
        name: the model's, for errors.
        shared: what :func:`write` returned; a packed file says it itself.

    Raises:
        ModelError: not such a file, or names the first tensor that does not fit.
    """
    if path.suffix == PACKED.suffix:
        with PackedFile(path) as file:
            facts = {key: file.facts(key) for key in file.entries}
            shapes = {key: shape for key, (shape, _) in facts.items()}
            low_rank.factor(module, shapes)
            pruning.narrow(module, shapes)
            _hold(module, {key: _said(*fact) for key, fact in facts.items()}, name)
            packed = pack_layers(module, file)
            rest = {key: file.dense(key) for key in facts if key not in packed}
            _assign(module, rest)
            Pages(module.buffers()).give_back()  # they were read to be checked
        return
    weights = _read(path)
    for alias, stored in shared.items():
        if alias in weights and stored in weights and not weights[alias].equal(weights[stored]):
            raise ModelError(
                f"{name}: {alias} and {stored} are one tensor in the code, and two in the file",
                hint="build the module that the weights were saved from",
            )
    weights |= {alias: weights[stored] for alias, stored in shared.items() if stored in weights}
    _hold(module, {key: _facts(value) for key, value in weights.items()}, name)
    _assign(module, weights)
    Pages(weights.values()).give_back()  # the ends of those that were read to be compared


def read_packed(module: nn.Module, path: Path, name: str) -> Compressed:
    """A packed file as it was written: a module that has its weights, and their codes.

    Args:
        module: gets the weights, as :func:`fill` says; all of its layers have plain ones.
        path: the file.
        name: the model's, for errors.

    Raises:
        ModelError: as :func:`fill`.
    """
    fill(module, path, name, {})
    unpack_layers(module).eval()
    with PackedFile(path) as file:
        own = [key for key, entry in file.entries.items() if entry.kind != "same"]
        tensors = {key: file.read(key) for key in own}
        shared = {key: file.entries[key].layout for key in file.entries.keys() - set(own)}
    codes = [value.codes for value in tensors.values() if isinstance(value, Coded)]
    zeros = sum(int((each == 0).sum()) for each in codes)
    return Compressed(module, tensors, shared, sum(each.numel() for each in codes), zeros)


def held_bytes(path: Path) -> int:
    """Bytes of the weights in memory while torch runs them, by the file alone.

    Raises:
        ModelError: its head is damaged.
    """
    size = path.stat().st_size
    if path.suffix == PACKED.suffix:
        with PackedFile(path) as file:
            return sum(packed_bytes(entry) for entry in file.entries.values())
    if path.suffix != ".safetensors":
        return size
    with path.open("rb") as opened:
        return size - 8 - int.from_bytes(opened.read(8), "little")


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Let a module's state be these tensors themselves; parameters that were one stay one."""
    before = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    module.load_state_dict(tensors, assign=True, strict=False)  # names were held before
    for name, old in before.items():
        kept = first.setdefault(id(old), name)
        if kept != name:
            path, _, own = name.rpartition(".")
            setattr(module.get_submodule(path), own, module.get_parameter(kept))


class _Uninitialised(TorchFunctionMode):
    """Leaves parameters as they are allocated, for what they are filled from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        initialises = getattr(func, "__module__", "") == "torch.nn.init"
        if initialises or getattr(func, "__name__", "") in _RANDOM:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, nn.Parameter):
                return target
        return func(*args, **kwargs)


def uninitialised(build: Callable[[], M]) -> M:
    """What builds a module, its parameters without values, so that they take no memory yet.

    Code that needs values in them to build it gets them.
    """
    try:
        with _Uninitialised():
            return build()
    except Exception:  # noqa: BLE001 - what is wrong however it is built is raised below
        return build()


def _hold(module: nn.Module, theirs: dict[str, str], name: str) -> None:
    """Raises ModelError, naming the first tensor that is another in the code than in the file."""
    wanted = {key: _facts(value) for key, value in module.state_dict().items()}
    for key in sorted(wanted.keys() | theirs.keys()):
        if wanted.get(key) != theirs.get(key):
            raise ModelError(
                f"{name}: tensor {key} is {theirs.get(key, 'absent')} in the file, "
                f"{wanted.get(key, 'absent')} in the code",
                hint="the architecture or its config changed since the model was saved",
            )


def _facts(tensor: Tensor) -> str:
    return _said(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _said(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} {dtype}"


def _read(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: its header has {header} bytes, at most {MAX_HEADER_BYTES}")
    try:
        with safe_open(path, "pt") as file:  # checks that sizes and places fit
            count = len(file.keys())
        table = _table(path, header)
        if count != len(table) or any(kind not in _DTYPES for kind, _, _ in table.values()):
            return load_file(path)
        return _mapped(map_file(path), 8 + header, table)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error


def _table(path: Path, header: int) -> dict[str, tuple[str, list[int], int]]:
    """Dtype, shape and place behind the header of each tensor."""
    with path.open("rb") as file:
        lines = json.loads(file.read(8 + header)[8:])
    return {
        name: (line["dtype"], line["shape"], line["data_offsets"][0])
        for name, line in lines.items()
        if name != "__metadata__"
    }


def _mapped(
    mapping: Mapping, start: int, table: dict[str, tuple[str, list[int], int]]
) -> dict[str, Tensor]:
    found = {}
    for name, (kind, shape, at) in table.items():
        tensor = _at(mapping, start + at, _DTYPES[kind], tuple(shape))
        found[name] = tensor if tensor.nbytes < SHARED_BYTES else _shared(tensor, mapping)
    return found


def _at(mapping: Mapping, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if place % dtype.itemsize:
        data = bytearray(mapping[place : place + count * dtype.itemsize])
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=place).reshape(shape)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether bytes are the same; no more than a piece of each is in memory for it."""
    for pair in zip(*(torch.split(each, _READ_BYTES) for each in (one, other)), strict=True):
        same = torch.equal(*pair)
        Pages(pair).give_back()
        if not same:
            return False
    return True


def _shared(tensor: Tensor, mapping: Mapping) -> Tensor:
    """The same tensor where another model has it already, bit for bit; else itself."""
    own, crc = tensor.reshape(-1).view(torch.uint8), 0
    for piece in torch.split(own, _READ_BYTES):
        crc = zlib.crc32(piece.numpy().data, crc)
        Pages([piece]).give_back()  # it was read to be compared
    key = (crc, str(tensor.dtype), tuple(tensor.shape))
    with _LOCK:
        there, place = _LOADED.get(key), _PLACES.get(key, 0)
    if there is not None:
        other = _at(there, place, tensor.dtype, tuple(tensor.shape))
        if _equal(other.reshape(-1).view(torch.uint8), own):
            return other
    with _LOCK:
        _LOADED[key], _PLACES[key] = mapping, tensor.data_ptr() - mapping.address
        for gone in [known for known in _PLACES if known not in _LOADED]:
            del _PLACES[gone]
    return tensor
