"""Weights on disk: safetensors with a bounded header, shared tensors stored once."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plinth.engine.errors import ModelError

MAX_HEADER_BYTES = 16 << 20


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
    """Load a file into a module.

    Args:
        module: gets the weights.
        path: the file.
        name: the model's, for errors.
        shared: what :func:`write` returned.

    Raises:
        ModelError: not a safetensors file, or names the first tensor that does not fit.
    """
    weights = _read(path)
    for alias, stored in shared.items():
        if alias in weights and stored in weights and not weights[alias].equal(weights[stored]):
            raise ModelError(
                f"{name}: {alias} and {stored} are one tensor in the code, and two in the file",
                hint="build the module that the weights were saved from",
            )
    weights |= {alias: weights[stored] for alias, stored in shared.items() if stored in weights}
    wanted = module.state_dict()
    for key in sorted(wanted.keys() | weights.keys()):
        ours, theirs = _facts(wanted.get(key)), _facts(weights.get(key))
        if ours != theirs:
            raise ModelError(
                f"{name}: tensor {key} is {theirs} in the file, {ours} in the code",
                hint="the architecture or its config changed since the model was saved",
            )
    module.load_state_dict(weights)


def _facts(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _read(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise ModelError(f"{path}: its header has {header} bytes, at most {MAX_HEADER_BYTES}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
