"""Low rank: a layer's weight as the product of two smaller ones, by its largest singular values.

A linear layer of n by m numbers becomes one to r and one from r, a convolution one to r channels
and one of size 1 from there (Denton et al., NeurIPS 2014): fewer numbers and less work wherever
r (n + m) < n m. Which r is best differs by layer; one share of the singular values' squares is
kept in all (Xue et al., Interspeech 2013).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from plinth.engine.compression.registry import Transform, register
from plinth.engine.errors import ConfigError

_KINDS: dict[type[nn.Module], type[Any]] = {
    nn.Linear: nn.Linear,
    nn.Conv1d: nn.Conv1d,
    nn.Conv2d: nn.Conv2d,
    nn.Conv3d: nn.Conv3d,
}
_HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LEAST = 4  # of a rank
_PAYS = 0.9  # of the numbers of a layer: more are not worth two layers


class LowRank(nn.Module):
    """Two layers in the place of one.

    Args:
        layer: a linear layer or convolution of one group.
        rank: of the product.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        kind, one = _KINDS[type(layer)], _facts(layer)
        extra = {"bias": layer.bias is not None}
        if kind is nn.Linear:
            self.down = kind(one["inside"], rank, bias=False)
            self.up = kind(rank, one["outside"], **extra)
        else:
            self.down = kind(one["inside"], rank, bias=False, **one["window"])
            self.up = kind(rank, one["outside"], 1, **extra)

    @property
    def weight(self) -> Tensor:
        """The product, of the shape of the weight that it stands for."""
        up, down = self.up.weight.flatten(1), self.down.weight
        found: Tensor = (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        return found

    @property
    def bias(self) -> Tensor | None:
        """That of the layer."""
        found: Tensor | None = self.up.bias
        return found

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of x, by the product."""
        found: Tensor = self.up(self.down(x))
        return found


@register("low_rank")
class Factors(Transform):
    """Layers as products of two.

    Args:
        energy: share of the squares of a layer's singular values that is kept, 0 to 1.
    """

    def __init__(self, energy: float = 0.9) -> None:
        if not 0 < energy < 1:
            raise ConfigError(f"low_rank: energy is {energy}", hint="a share between 0 and 1")
        self.energy = energy

    def reshape(self, module: nn.Module, say: Callable[[str], None]) -> None:
        """Replace what becomes smaller by it; says which.

        Raises:
            ConfigError: nothing does.
        """
        found = 0
        for path, layer in list(_layers(module)):
            if cast(Tensor, layer.weight).dtype != torch.float32:
                continue
            made = _factored(layer, self.energy)
            if made is not None:
                _put(module, path, made)
                say(f"{path}: rank {made.down.weight.shape[0]} of {min(_matrix(layer).shape)}")
                found += 1
        if not found:
            raise ConfigError(
                f"no layer becomes smaller as a product that keeps {self.energy:.0%}",
                hint="a smaller energy, or leave low_rank out",
            )


def factor(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a module the products in place of layers that stored tensors have.

    Args:
        module: as its code builds it.
        shapes: of the stored tensors, by name.
    """
    for path, layer in list(_layers(module)):
        shape = shapes.get(f"{path}.down.weight")
        rank = shape[0] if shape else 0
        if rank and f"{path}.weight" not in shapes and rank <= min(_matrix(layer).shape):
            _put(module, path, LowRank(layer, rank).to(layer.weight.dtype))  # type: ignore[arg-type]


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions that nobody but their own forward reads."""
    uses = Counter(id(value) for _, value in module.named_parameters(remove_duplicate=False))
    for path, layer in module.named_modules():
        if type(layer) not in _KINDS or not path or getattr(layer, "groups", 1) != 1:
            continue
        parent = module.get_submodule(path.rpartition(".")[0])
        own = type(parent).__module__.startswith("torch.nn") and not isinstance(parent, _HOLDERS)
        if not own and all(uses[id(each)] == 1 for each in layer.parameters()):
            yield path, layer


def _matrix(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.detach().flatten(1)


def _factored(layer: nn.Module, energy: float) -> LowRank | None:
    """The product that keeps a share of a layer; ``None`` where it would not be smaller."""
    matrix = _matrix(layer).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    squares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
    rank = max(_LEAST, int((squares < energy).sum()) + 1)
    rows, columns = matrix.shape
    if rank * (rows + columns) > _PAYS * rows * columns:
        return None
    made = LowRank(layer, rank)
    root = values[:rank].sqrt()
    with torch.no_grad():
        made.up.weight.copy_((left[:, :rank] * root).reshape(made.up.weight.shape))
        made.down.weight.copy_((root[:, None] * right[:rank]).reshape(made.down.weight.shape))
        if layer.bias is not None:
            made.up.bias.copy_(layer.bias)
    return made.train(layer.training)


def _facts(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"inside": layer.in_features, "outside": layer.out_features}
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    window = {name: getattr(layer, name) for name in names}
    return {"inside": layer.in_channels, "outside": layer.out_channels, "window": window}


def _put(module: nn.Module, path: str, made: nn.Module) -> None:
    parent, _, own = path.rpartition(".")
    setattr(module.get_submodule(parent), own, made)
