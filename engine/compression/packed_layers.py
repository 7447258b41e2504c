"""Layers whose weights stay packed in memory, int8 or two int4 a byte, until a forward uses them.

``layer.weight`` is then computed whenever it is read, by the very product that unpacking takes,
so that answers are the same bits. Codes that lie in a mapped file stay there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plinth.engine.compression import coding
from plinth.engine.compression.packing import Coded, Entry, PackedFile

MIN_BYTES = 64 << 10
"""Weights of fewer bytes (float32) are unpacked: to do it in each forward would not pay."""

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class _PackedWeight(nn.Module):
    """What a layer gets whose ``weight`` is computed from ``codes`` and ``scales``.

    Attributes:
        codes: int8 of the weight's shape, or uint8 with two numbers from -8 to 7 in each.
        scales: float16, one for each index of the first dimension.
        size: shape of the weight.
    """

    codes: Tensor
    scales: Tensor
    size: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """The weight, float32."""
        codes = self.codes
        if codes.dtype == torch.uint8:
            pairs = torch.stack((codes & 15, codes >> 4), -1).reshape(-1)
            codes = pairs[: torch.Size(self.size).numel()].to(torch.int8) - 8
        scales = self.scales.float().reshape(-1, *(1 for _ in self.size[1:]))
        return codes.reshape(self.size).float().mul_(scales)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}codes"], destination[f"{prefix}scales"]
        destination[f"{prefix}weight"] = self.weight


class _PackedTable(_PackedWeight):
    """The same of a look-up table, of which only the rows that are asked for are unpacked."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows by their numbers."""
        return (
            functional.embedding(input, self.codes).float()
            * functional.embedding(input, self.scales[:, None]).float()
        )


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(
        f"Packed{kind.__name__}",
        (_PackedTable if kind is nn.Embedding else _PackedWeight, kind),
        {"__module__": __name__},
    )
    for kind in _KINDS
}
_PLAIN = {packed: plain for plain, packed in _CLASSES.items()}


def pack_layers(module: nn.Module, file: PackedFile) -> set[str]:
    """Let layers keep the codes of a file in the place of their weights.

    Args:
        module: gets them; large weights of linear layers, convolutions and look-up tables alone.
        file: whose tensors have the names of its state.

    Returns:
        The names of the weights that need not be loaded any more.
    """
    uses: dict[int, int] = {}
    for _, value in module.named_parameters(remove_duplicate=False):
        uses[id(value)] = uses.get(id(value), 0) + 1
    taken = set()
    for path, layer in module.named_modules():
        name = f"{path}.weight" if path else "weight"
        kind, entry = _CLASSES.get(type(layer)), file.entries.get(name)
        if kind is None or entry is None or entry.kind != "coded" or entry.axis != 0:
            continue
        renorm = isinstance(layer, nn.Embedding) and layer.max_norm is not None
        if renorm or entry.dense_bytes < MIN_BYTES or uses[id(layer._parameters["weight"])] > 1:
            continue
        coded = file.read(name)
        if not isinstance(coded, Coded):
            continue
        codes = file.nibbles(name) if entry.layout == "i4" else None
        if codes is None:
            codes = _smallest(coded.codes)
        if isinstance(layer, nn.Embedding):
            codes = coded.codes
        del layer._parameters["weight"]
        layer.register_buffer("codes", codes)
        layer.register_buffer("scales", coded.scales)
        layer.size = tuple(coded.codes.shape)
        layer.__class__ = kind
        taken.add(name)
    return taken


def packed_bytes(entry: Entry) -> int:
    """Bytes that a tensor of a packed file takes in memory, in a layer that can keep it packed."""
    if entry.kind == "same":
        return 0
    if entry.kind != "coded" or entry.axis != 0 or entry.dense_bytes < MIN_BYTES:
        return entry.dense_bytes
    return -(-entry.count // 2) if entry.layout[:2] in ("i4", "t5") else entry.count


def _smallest(codes: Tensor) -> Tensor:
    """Two numbers in a byte where all are small enough, and they do not lie in the file as is."""
    small = bool(((codes >= -8) & (codes <= 7)).all())
    if not small:
        return codes
    return torch.frombuffer(
        bytearray(coding.as_plain("i4", codes.numpy().ravel())), dtype=torch.uint8
    )


def has_packed(module: nn.Module) -> bool:
    """Whether any layer keeps its weights packed."""
    return any(type(part) in _PLAIN for part in module.modules())


def unpack_layers(module: nn.Module) -> nn.Module:
    """Give all layers of a module plain weights again; the module itself."""
    for layer in module.modules():
        kind = _PLAIN.get(type(layer))
        if kind is None:
            continue
        weight: Any = layer.weight
        del layer._buffers["codes"], layer._buffers["scales"], layer.size
        layer.__class__ = kind
        own = dict(layer._parameters)
        layer._parameters.clear()
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        layer._parameters.update(own)
    return module
