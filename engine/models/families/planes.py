"""Convolutions one after the other, a few planes at a time, as one pass over the whole volume.

Each convolution holds the planes that its kernel still reaches, so that nothing is computed twice
and nothing is cut: what it costs is what one pass costs, and what it holds grows with the reach of
the kernels and the size of a plane, not with the number of planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

PLANES = 4
"""Planes that a convolution gives at once: more are a little faster, and held by each of them."""


def can_stream(layers: Sequence[nn.Module], volume: Tensor) -> bool:
    """Whether convolutions can be run here by :func:`streamed`: float32 on a CPU, nothing traced.

    Args:
        layers: the convolutions.
        volume: (n, c, z, y, x).
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return (
        not (traced or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and volume.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(type(layer) is nn.Conv3d and _plain(layer) for layer in layers)
        and volume.dtype == torch.float32
    )


def _plain(layer: nn.Conv3d) -> bool:
    return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def cut(volume: Tensor) -> Iterator[Tensor]:
    """The planes of a volume (1, c, z, y, x), some at a time."""
    for first in range(0, volume.shape[2], PLANES):
        yield volume[:, :, first : first + PLANES]


def streamed(
    stages: Sequence[tuple[nn.Conv3d, Callable[[Tensor], Tensor]]],
    pieces: Iterator[Tensor],
    plane: tuple[int, int],
) -> Iterator[Tensor]:
    """What convolutions make of a volume, each followed by a function, plane by plane.

    Args:
        stages: convolutions padded to keep the size, without strides; functions of single voxels.
        pieces: (1, c, n, y, x) float32, the next n planes of the volume, at most :data:`PLANES`.
        plane: y and x.

    Yields:
        (1, k, n, y, x), the next n planes.
    """
    for layer, function in stages:
        pieces = _convolved(layer, function, pieces, plane)
    return pieces


def gathered(pieces: Iterator[Tensor], depth: int) -> Tensor:
    """The volume (1, k, depth, y, x) that pieces (1, k, n, y, x) are of."""
    (whole,) = in_parts(pieces, depth, depth)
    return whole


def in_parts(pieces: Iterator[Tensor], depth: int, most: int) -> list[Tensor]:
    """The same in parts of at most so many planes, each of which can be freed by itself."""
    parts: list[Tensor] = []
    room = 0  # planes of the last part that are still to come
    for piece in pieces:
        while piece.shape[2]:
            if not room:
                room = min(most, depth - sum(part.shape[2] for part in parts))
                parts.append(piece.new_empty((*piece.shape[:2], room, *piece.shape[3:])))
            count, first = min(room, piece.shape[2]), parts[-1].shape[2] - room
            parts[-1][:, :, first : first + count] = piece[:, :, :count]
            piece, room = piece[:, :, count:], room - count
    return parts


def convolved(layer: nn.Conv3d, planes: Tensor, reach: int = 0) -> Tensor:
    """One convolution without padding along z, channels last where its input's are.

    ``layer(planes)`` leaves small inputs to a kernel that is ten times slower.

    Args:
        layer: the convolution.
        planes: (1, c, n, y, x) float32.
        reach: voxels that its kernel reaches in y and x.
    """
    padding = (0, reach, reach)
    made: Tensor = torch.mkldnn_convolution(
        planes, layer.weight, layer.bias, padding, layer.stride, layer.dilation, 1
    )
    return made


def _convolved(
    layer: nn.Conv3d,
    function: Callable[[Tensor], Tensor],
    pieces: Iterator[Tensor],
    plane: tuple[int, int],
) -> Iterator[Tensor]:
    """The planes that one convolution makes of those before, of zeros before and behind them."""
    reach = layer.dilation[0] * (layer.kernel_size[0] // 2)
    room = (1, layer.in_channels, 2 * reach + PLANES, *plane)
    held = torch.empty(room, memory_format=torch.channels_last_3d)
    held[:, :, :reach] = 0
    filled = reach
    behind = (
        torch.zeros(1, 1, min(PLANES, reach - n), 1, 1).expand(-1, layer.in_channels, -1, *plane)
        for n in range(0, reach, PLANES)
    )
    for piece in chain(pieces, behind):
        count = piece.shape[2]
        held[:, :, filled : filled + count] = piece
        del piece  # nobody holds it while the next is made
        filled += count
        ready = filled - 2 * reach
        if ready > 0:
            yield function(convolved(layer, held[:, :, :filled], reach))
            for first in range(0, 2 * reach, ready):  # in parts that do not overlap
                last = min(first + ready, 2 * reach)
                held[:, :, first:last] = held[:, :, first + ready : last + ready]
            filled -= ready
