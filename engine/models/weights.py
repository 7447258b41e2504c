"""Weights on disk: safetensors with a bounded header or packed; shared tensors stored once."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plinth.engine.compression import pruning
from plinth.engine.compression.packing import PackedFile
from plinth.engine.errors import ModelError

PACKED = Path("weights.packed")
"""The name of packed weights, in a version or a variant."""

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


def fill(
    module: nn.Module, path: Path, name: str, shared: dict[str, str], *, narrow: bool = False
) -> None:
    """Load a file, safetensors or packed, into a module.

    Args:
        module: gets the weights.
        path: the file; packed if it ends in ``.packed``.
        name: the model's, for errors.
        shared: what :func:`write` returned; a packed file says it itself.
        narrow: whether layers may lose the channels that the file does not have.

    Raises:
        ModelError: not such a file, or names the first tensor that does not fit.
    """
    if path.suffix == PACKED.suffix:
        with PackedFile(path) as file:
            facts = {key: file.facts(key) for key in file.entries}
            if narrow:
                pruning.narrow(module, {key: shape for key, (shape, _) in facts.items()})
            _hold(module, {key: _said(*fact) for key, fact in facts.items()}, name)
            module.load_state_dict({key: file.dense(key) for key in facts})
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
    module.load_state_dict(weights)


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
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
