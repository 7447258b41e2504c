"""Tensor parallelism of the families' transformers (Shoeybi et al., 2019).

Heads of attention and the inner width of fully connected layers are shared out; their outputs are
summed over the ranks, twice a block. The table of words and the layer that gives a number for each
word are cut along the vocabulary.

Shares are plain tensors in plain layers, not torch's DTensor: that copies rows which can stay in
their mapped file, and in inference mode finds the layout of each operation anew, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from plinth.engine.errors import ModelError
from plinth.engine.gang.exchange import Exchange
from plinth.engine.mapped import Pages
from plinth.engine.models.families.layers import Attention, Residual
from plinth.engine.models.families.text import Bert, Gpt2, Llama, LlamaBlock, Step


class _Summed(nn.Module):
    """A layer of which each rank has some inputs: what they give is summed."""

    def __init__(self, layer: nn.Linear, mesh: DeviceMesh, exchange: Exchange) -> None:
        super().__init__()
        self.weight = _share(layer.weight, mesh, 1)
        self.bias = layer.bias
        self._exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """Shares (..., inputs of this rank) to (..., outputs)."""
        found = self._exchange.sum(functional.linear(x, self.weight))
        return found if self.bias is None else found.add_(self.bias)


class _Words(nn.Module):
    """Some rows of a table of words; each rank looks up those that it has."""

    def __init__(self, weight: Tensor, shard: int, exchange: Exchange) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._first = shard
        self._exchange = exchange

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (..., width) of words."""
        place = ids - self._first
        own = (place >= 0) & (place < len(self.weight))
        found = functional.embedding(place.clamp(0, len(self.weight) - 1), self.weight)
        return self._exchange.sum(found * own[..., None])


class _Scores(nn.Module):
    """Numbers for some words; the first rank puts those of all ranks together."""

    def __init__(self, weight: Tensor, words: int, exchange: Exchange) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._words = words
        self._exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """(..., words); what other ranks than the first have is nobody's answer."""
        part = functional.linear(x, self.weight)
        size = -(-self._words // self._exchange.ranks)
        pieces = self._exchange.gather(functional.pad(part, (0, size - part.shape[-1])))
        if pieces is None:
            return part.new_zeros(()).expand(*part.shape[:-1], self._words)
        return torch.cat(pieces, -1)[..., : self._words]


def check(module: nn.Module, shares: int, name: str) -> None:
    """Hold a model against the number of its shares.

    Raises:
        ModelError: it has no layers that can be shared out, or numbers that do not divide.
    """
    parts = [
        each for each in module.modules() if isinstance(each, Attention | Residual | LlamaBlock)
    ]
    if not parts:
        raise ModelError(
            f"model {name} has no layers that tensor={shares} could share out",
            hint="tensor is for transformers of the families; use pipeline for other models",
        )
    for label, number in _numbers(parts):
        if number % shares:
            raise ModelError(
                f"model {name} has {number} {label}, which tensor={shares} does not divide",
                hint=f"use a factor of {number}, or pipeline",
            )


def _numbers(parts: list[Any]) -> Iterator[tuple[str, int]]:
    for each in parts:
        if isinstance(each, Attention):
            yield "heads", each.heads
            yield "heads of keys", each.key_heads
        else:
            yield "inner width", each.up.out_features


def shard(module: nn.Module, mesh: DeviceMesh, exchange: Exchange) -> None:
    """Keep one share of a model's wide layers, that of this rank, and sum what they give.

    Args:
        module: is changed; what it loses is given back.
        mesh: the ranks of the group, one dimension.
        exchange: of the same ranks.
    """
    for each in list(module.modules()):
        if isinstance(each, Attention):
            each.heads //= mesh.size()
            each.key_heads //= mesh.size()
            for wide in (each.query, each.key, each.value):
                _widen(wide, mesh)
            setattr(each, "out", _Summed(each.out, mesh, exchange))  # noqa: B010
        elif isinstance(each, Residual | LlamaBlock):
            for wide in (each.gate, each.up) if isinstance(each, LlamaBlock) else (each.up,):
                _widen(wide, mesh)
            setattr(each, "down", _Summed(each.down, mesh, exchange))  # noqa: B010
        elif isinstance(each, Bert | Gpt2 | Llama | Step):
            _shard_vocabulary(each, mesh, exchange)


def _widen(layer: nn.Linear, mesh: DeviceMesh) -> None:
    """Keep the outputs of this rank."""
    layer.weight = _share(layer.weight, mesh, 0)
    if layer.bias is not None:
        layer.bias = _share(layer.bias, mesh, 0)
    layer.out_features = len(layer.weight)


def _share(whole: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """This rank's part of a weight that every rank can read; rows stay in their file."""
    size = whole.shape[dim] // mesh.size()
    part = whole.detach().narrow(dim, mesh.get_local_rank() * size, size)
    if not part.is_contiguous():
        part = part.contiguous()
        Pages([whole]).give_back()  # they were read to be copied
    return nn.Parameter(part, requires_grad=False)


def _shard_vocabulary(model: Any, mesh: DeviceMesh, exchange: Exchange) -> None:
    """Cut the table of words and the layer of scores, of which a step has one at most."""
    words, head = getattr(model, "words", None), getattr(model, "head", None)
    number = mesh.get_local_rank()
    for layer in (words, head):
        if layer is None:
            continue
        whole = layer.weight
        size = -(-len(whole) // mesh.size())
        own = slice(min(number * size, len(whole)), (number + 1) * size)
        if layer is words:
            model.words = _Words(whole[own], own.start, exchange)
        else:
            model.head = _Scores(whole[own], len(whole), exchange)
