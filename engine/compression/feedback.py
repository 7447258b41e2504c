"""Rounding that knows what a layer reads: the error of one weight is made good by the next ones.

What a layer answers is off by its errors times its inputs. Inputs go together, as neighbouring
voxels do, so that the error of a weight can be taken back by weights not yet rounded (Frantar et
al., OPTQ, ICLR 2023; Hassibi and Stork, 1993). Nothing is trained; a few rows say how inputs go
together.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MAX_INPUTS = 4096
"""Numbers of a channel beyond which the products take too much memory."""
_PLACES = 2048  # of a convolution's input that count, of each batch
_DAMPED = 0.01  # of the mean square of the inputs, added to each: they are a sample


def moments(module: nn.Module, runs: Iterable[object], names: set[str]) -> dict[str, Tensor]:
    """How the inputs of layers go together.

    Args:
        module: whose linear layers and convolutions are looked at.
        runs: each step of it runs the module on some rows.
        names: of the weights that are wanted; those of other layers are left out.

    Returns:
        By name of a weight (channels, ...): the sum (numbers, numbers) of the products of what
        each of a channel's numbers is multiplied with, in float64.
    """
    found: dict[str, Tensor] = {}
    noise = torch.Generator().manual_seed(0)
    hooks = [
        layer.register_forward_pre_hook(partial(_count, found, f"{path}.weight", noise))
        for path, layer in module.named_modules()
        if f"{path}.weight" in names and _is_plain(layer)
    ]
    try:
        with torch.no_grad():
            for _ in runs:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_plain(layer: Any) -> bool:
    if type(layer) is nn.Linear:
        return bool(layer.in_features <= MAX_INPUTS)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.groups != 1:
        return False
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return zeros and layer.weight[0].numel() <= MAX_INPUTS


def _count(
    found: dict[str, Tensor], name: str, noise: torch.Generator, layer: Any, given: tuple[Any, ...]
) -> None:
    x = given[0]
    read = x.reshape(-1, x.shape[-1]) if type(layer) is nn.Linear else _places(layer, x, noise)
    read = read.double()
    products = read.T @ read / max(1, len(read))
    found[name] = found[name] + products if name in found else products


def _places(layer: Any, x: Tensor, noise: torch.Generator) -> Tensor:
    """What a convolution reads at some places: (places, numbers of a channel)."""
    padding = [side for size in reversed(layer.padding) for side in (size, size)]
    seen = nn.functional.pad(x, padding)
    dims = range(len(layer.kernel_size))
    for dim in dims:
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        seen = seen.unfold(2 + dim, reach, layer.stride[dim])
    holes = (slice(None, None, step) for step in layer.dilation)
    seen = seen[(..., *holes)]  # type: ignore[index]
    sizes = (seen.shape[0], *seen.shape[2 : 2 + len(dims)])
    total = torch.Size(sizes).numel()
    chosen = torch.arange(total)
    if total > _PLACES:
        chosen = torch.randint(0, total, (_PLACES,), generator=noise)
    rows, *places = torch.unravel_index(chosen, sizes)
    read: Tensor = seen[(rows, slice(None), *places)]  # type: ignore[index]
    return read.reshape(len(chosen), -1)


def rounded(value: Tensor, products: Tensor, scales: Tensor, high: int) -> Tensor:
    """Codes of a weight whose channels come first; zeros stay zeros.

    Args:
        value: (channels, numbers).
        products: (numbers, numbers), of :func:`moments`.
        scales: (channels,), size of a step.
        high: the largest code.

    Returns:
        (channels, numbers) whole numbers in float32.
    """
    left, steps = value.double(), scales.double()
    damped = products + torch.eye(len(products), dtype=torch.float64) * max(
        _DAMPED * float(products.diagonal().mean()), 1e-12
    )
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    left = left[:, order].clone()
    whole = torch.linalg.cholesky(damped[order][:, order])
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(whole), upper=True)
    gone = left == 0
    codes = torch.zeros_like(left)
    for place in range(left.shape[1]):
        now = torch.where(gone[:, place], 0.0, left[:, place])
        codes[:, place] = (now / steps).round().clamp(-high, high)
        error = (left[:, place] - codes[:, place] * steps) / inverse[place, place]
        left[:, place + 1 :] -= error[:, None] * inverse[place, place + 1 :]
    return codes[:, torch.argsort(order)].float()
