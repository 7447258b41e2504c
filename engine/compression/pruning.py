"""Pruning: weights that are 0, and channels that are gone.

*Sparsity* is reached by magnitude, over all layers at once, along a cubic schedule (Zhu, Gupta:
arXiv:1710.01878, 2017). Magnitudes are compared by their LAMP score, which keeps a layer from
being emptied (Lee et al., ICLR 2021). A *dynamic* mask follows the gradient: what is masked goes on
being trained, and comes back when it has become large (Lin et al., ICLR 2020). *Channels* are
removed from the module itself, which makes it faster on any hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from plinth.engine.compression.graph import LINEAR, NORMS, Chain, chains
from plinth.engine.compression.registry import Transform, Weight, register
from plinth.engine.errors import ConfigError

_LOOKS = 64  # at the magnitudes, in the whole of training
_RISE = (0.0, 0.5)  # of training, in which sparsity rises
_SETTLED = 0.85  # of training, from which the mask stays
_ENDS = 0.05  # of all weights: a first or last layer below that stays dense
_LEAST = 4  # channels of a layer that stay
_MULTIPLE = 4  # of which the number of channels is


@register("pruning")
class Pruning(Transform):
    """Magnitude pruning.

    Args:
        sparsity: share of the weights that become 0.
        channels: share of the channels between two layers that are removed.
        dynamic: whether what is masked is trained on and may come back.
    """

    def __init__(self, sparsity: float = 0.0, channels: float = 0.0, dynamic: bool = True) -> None:
        for name, share in (("sparsity", sparsity), ("channels", channels)):
            if not 0 <= share < 1:
                raise ConfigError(f"pruning: {name} is {share}", hint="a share from 0 to below 1")
        self.sparsity, self.channels, self.dynamic = sparsity, channels, dynamic
        self._weights: list[Weight] = []
        self._masks: dict[str, Tensor] = {}
        self._looks = -1

    def reshape(self, module: nn.Module, say: Callable[[str], None]) -> None:
        """Remove channels; says where a module has none that can be."""
        if not self.channels:
            return
        found = [chain for chain in chains(module) if chain.consumer is not None]
        if not found:
            raise ConfigError(
                "no two layers of this module are known to read each other alone, so that no "
                "channel can be removed",
                hint="leave channels out; sparsity works on any module",
            )
        for chain in found:
            say(_thin(module, chain, self.channels))

    def begin(self, weights: list[Weight]) -> None:
        """See :class:`Transform`."""
        total = sum(weight.value.numel() for weight in weights)
        self._weights = [
            each for each in weights if not each.ends or each.value.numel() > _ENDS * total
        ]

    def at(self, progress: float) -> None:
        """See :class:`Transform`."""
        look = int(progress * _LOOKS)
        if not self.sparsity or look == self._looks or (self._masks and progress > _SETTLED):
            return
        self._looks = look
        start, end = _RISE
        ramp = min(1.0, max(0.0, (progress - start) / (end - start)))
        self._masks = masks(self._weights, self.sparsity * (1 - (1 - ramp) ** 3))

    def forward(self, weight: Weight, value: Tensor) -> Tensor:
        """The masked weight; its gradient masked too, unless the mask is dynamic."""
        mask = self._masks.get(weight.name)
        if mask is None:
            return value
        masked = value * mask
        return value + (masked - value).detach() if self.dynamic else masked


def masks(weights: list[Weight], sparsity: float) -> dict[str, Tensor]:
    """1 for each weight that stays and 0 for each that goes, by name.

    Args:
        weights: of all layers.
        sparsity: share that goes, of all together.
    """
    with torch.no_grad():
        scores = {weight.name: _lamp(weight.value) for weight in weights}
        every = torch.cat([score.flatten() for score in scores.values()])
        count = int(sparsity * every.numel())
        if count == 0:
            return {name: torch.ones_like(score).float() for name, score in scores.items()}
        cut = every.kthvalue(count).values
        return {name: (score > cut).float() for name, score in scores.items()}


def _lamp(value: Tensor) -> Tensor:
    """Each square over the sum of those that are not smaller, in its layer."""
    squares = value.detach().double().flatten() ** 2
    ordered, order = squares.sort(descending=True)
    score = torch.empty_like(squares)
    score[order] = ordered / ordered.cumsum(0).clamp_min(1e-300)
    return score.reshape(value.shape)


def _thin(module: nn.Module, chain: Chain, share: float) -> str:
    """Remove the channels between two layers whose weights are smallest, on both sides."""
    producer, consumer = (_linear(module, name) for name in (chain.producer, chain.consumer or ""))
    made, read = producer.weight.data, consumer.weight.data
    size = made.flatten(1).norm(dim=1) * read.transpose(0, 1).flatten(1).norm(dim=1)
    wanted = max(_LEAST, int(len(size) * (1 - share) + 0.5))
    count = min(len(size), -(-wanted // _MULTIPLE) * _MULTIPLE)
    kept = size.topk(count).indices.sort().values
    _set(producer, "weight", made[kept])
    if producer.bias is not None:
        _set(producer, "bias", producer.bias.data[kept])
    _set(consumer, "weight", read[:, kept])
    if chain.norm is not None:
        norm = module.get_submodule(chain.norm)
        for name, value in [*norm._parameters.items(), *norm._buffers.items()]:
            if value is not None and value.ndim:
                _set(norm, name, value.data[kept])
    for layer in (producer, consumer, *([module.get_submodule(chain.norm)] if chain.norm else [])):
        _count(layer)
    return f"{chain.producer}: {count} of {len(size)} channels stay"


def _linear(module: nn.Module, name: str) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
    layer = module.get_submodule(name)
    assert isinstance(layer, LINEAR)
    return layer


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    if name in layer._parameters:
        layer._parameters[name] = nn.Parameter(value.clone())
    else:
        layer._buffers[name] = value.clone()


def _count(layer: nn.Module) -> None:
    """Let a layer's own numbers of channels be those of its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, LINEAR):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    elif isinstance(layer, NORMS):
        size = layer.running_mean if layer.running_mean is not None else layer.weight
        layer.num_features = len(size) if size is not None else layer.num_features


def narrow(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a module's layers the smaller shapes that channels were removed to.

    Only layers of this room's algorithm change, and none grows; what does not fit is left for
    the loader to refuse.

    Args:
        module: as its code builds it.
        shapes: of the stored tensors, by name.
    """
    for path, layer in module.named_modules():
        if not isinstance(layer, (*LINEAR, *NORMS)):
            continue
        for name, value in [*layer._parameters.items(), *layer._buffers.items()]:
            shape = shapes.get(f"{path}.{name}" if path else name)
            if value is None or shape is None or shape == value.shape or len(shape) != value.ndim:
                continue
            if all(0 < new <= old for new, old in zip(shape, value.shape, strict=True)):
                _set(layer, name, value.data[tuple(slice(size) for size in shape)])
        _count(layer)
