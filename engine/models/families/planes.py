"""Convolutions one after the other, a few planes at a time, as one pass over the whole volume.

Each convolution holds the planes that its kernel still reaches, so that nothing is computed twice
and nothing is cut: what it costs is what one pass costs, and what it holds grows with the reach of
the kernels and the size of a plane, not with the number of planes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

PLANES = 4
"""Planes that a convolution of a U-Net gives at once."""


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


def cut(volume: Tensor, at_once: int = PLANES) -> Iterator[Tensor]:
    """The planes of a volume (1, c, z, y, x), so many at a time; not copied."""
    yield from torch.split(volume, at_once, 2)


def streamed(
    stages: Sequence[tuple[nn.Conv3d, Callable[[Tensor], Tensor]]], pieces: Iterator[Tensor]
) -> Iterator[Tensor]:
    """What convolutions make of a volume, each followed by a function, plane by plane.

    Args:
        stages: convolutions padded to keep the size, without strides; functions of single voxels.
        pieces: (1, c, n, y, x) float32, the next n planes of the volume.

    Yields:
        (1, k, n, y, x), the next n planes, as many at a time as the pieces have.
    """
    desk = _Desk()
    for layer, function in stages:
        pieces = _convolved(layer, function, pieces, desk)
    return pieces


def held_bytes(layers: Sequence[nn.Conv3d], plane: tuple[int, int]) -> int:
    """What :func:`streamed` holds at its peak, about, one plane at a time; all in bytes.

    Args:
        layers: its convolutions.
        plane: y and x.
    """
    held = sum(2 * _reach(layer) * layer.in_channels for layer in layers)
    desk = max(layer.kernel_size[0] * layer.in_channels for layer in layers)
    made = 2 * max(layer.out_channels for layer in layers)
    return 4 * (held + desk + made) * plane[0] * plane[1]


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


def convolved(layer: nn.Conv3d, planes: Tensor, apart: int | None = None) -> Tensor:
    """One convolution without padding along z that keeps y and x, channels last as its input's.

    ``layer(planes)`` leaves small inputs to a kernel that is ten times slower.

    Args:
        layer: the convolution.
        planes: (1, c, n, y, x) float32.
        apart: planes between two that the kernel reads; ``None``: as the layer has it.
    """
    sizes = zip(layer.dilation[1:], layer.kernel_size[1:], strict=True)
    padding = (0, *(between * (size // 2) for between, size in sizes))
    dilation = (layer.dilation[0] if apart is None else apart, *layer.dilation[1:])
    made: Tensor = torch.mkldnn_convolution(
        planes, layer.weight, layer.bias, padding, layer.stride, dilation, 1
    )
    return made


def _reach(layer: nn.Conv3d) -> int:
    """Planes that its kernel reaches before and behind one."""
    return layer.dilation[0] * (layer.kernel_size[0] // 2)


class _Desk:
    """Memory where planes lie side by side for one convolution, then for the next."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def laid(self, planes: Sequence[Tensor | None]) -> Tensor:
        """Planes (1, c, 1, y, x) as (1, c, n, y, x), channels last; ``None`` is one of zeros."""
        _, channels, _, height, width = next(p for p in planes if p is not None).shape
        size = len(planes) * channels * height * width
        if self._room.numel() < size:
            self._room = torch.empty(size)
        room = self._room[:size].view(1, len(planes), height, width, channels)
        found = room.permute(0, 4, 1, 2, 3)
        for place, plane in zip(torch.split(found, 1, 2), planes, strict=True):
            place.zero_() if plane is None else place.copy_(plane)
        return found


class _Ring:
    """The planes that a kernel still reaches, each in a place that is used again and again.

    Args:
        size: planes at most.
    """

    def __init__(self, size: int) -> None:
        self.planes: list[Tensor | None] = [None] * (size // 2)  # zeros before the first
        self._size = size
        self._free: list[Tensor] | None = None

    def move(self, planes: Sequence[Tensor | None]) -> None:
        """Hold the last of so many planes: those held, and those that follow them."""
        following = planes[len(self.planes) :]
        gone = max(0, len(planes) - self._size)
        places = self._places(following)
        places += [plane for plane in self.planes[:gone] if plane is not None]
        kept = self.planes[gone:]
        for plane in following[max(0, gone - len(self.planes)) :]:
            kept.append(None if plane is None else places.pop().copy_(plane))
        self.planes = kept

    def _places(self, following: Sequence[Tensor | None]) -> list[Tensor]:
        if self._free is None:
            like = next(plane for plane in following if plane is not None)
            _, channels, _, height, width = like.shape
            room = torch.empty(self._size, height, width, channels)
            self._free = [place.permute(2, 0, 1)[None, :, None] for place in room]
        return self._free


def _convolved(
    layer: nn.Conv3d,
    function: Callable[[Tensor], Tensor],
    pieces: Iterator[Tensor],
    desk: _Desk,
) -> Iterator[Tensor]:
    """The planes that one convolution makes of those before, of zeros before and behind them.

    A kernel whose planes lie further apart than there are planes to make is given those alone that
    it reads: as many apart as are made.
    """
    apart, size, reach = layer.dilation[0], layer.kernel_size[0], _reach(layer)
    ring, most = _Ring(2 * reach), 0

    def made(following: Sequence[Tensor | None]) -> Tensor | None:
        planes = [*ring.planes, *following]
        count = len(planes) - 2 * reach
        laid = None
        if count > 0:
            step = min(apart, count)
            read: Sequence[int] = range(len(planes))
            if step < apart:
                read = [n * apart + at for n in range(size) for at in range(count)]
            laid = desk.laid([planes[at] for at in read])
        ring.move(planes)
        return None if laid is None else convolved(layer, laid, step)

    for piece in pieces:
        most = max(most, piece.shape[2])
        found = made(torch.split(piece, 1, 2))
        del piece  # nobody holds it while the next is made
        if found is not None:
            yield function(found)
    for first in range(0, reach, most):
        found = made([None] * min(most, reach - first))
        if found is not None:
            yield function(found)
