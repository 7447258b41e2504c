"""Families of volumes (n, channels, depth, height, width): 3D U-Net and 3D ResNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from plinth.engine.models.families import planes
from plinth.engine.models.families.layers import convolved

PART = 32 << 20
"""Bytes of features that are freed at once: of so many the C library keeps none for later."""
LARGE = 256 << 20
"""Bytes of the finest features of a volume above which a U-Net makes a few planes at a time."""


def _twice(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        convolved(3, inside, outside, 3, relu=nn.ReLU(inplace=True)),
        convolved(3, outside, outside, 3, relu=nn.ReLU(inplace=True)),
    )


class Unet3d(nn.Module):
    """Classes for every voxel (Çiçek et al., 2016); sizes are multiples of 2 ** (levels - 1)."""

    def __init__(
        self, channels: int = 1, widths: Sequence[int] = (16, 32, 64, 128), classes: int = 2
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _twice(inside, width)
            for inside, width in zip((channels, *widths), widths, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.widen = nn.ModuleList(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_twice(2 * b, b) for _, b in pairs)
        self.head = nn.Conv3d(widths[0], classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits (n, classes, depth, height, width)."""
        if self._is_large(volume):
            return torch.cat([self._by_planes(row[None]) for row in volume])
        kept: list[Tensor] = []
        x = volume
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            kept.append(x)
        kept.pop()
        for widen, block in zip(self.widen, self.up, strict=True):
            # The last reference to what is beside: it is freed before the convolutions.
            x = block(torch.cat([widen(x), kept.pop()], 1))
        found: Tensor = self.head(x)
        return found

    def _is_large(self, volume: Tensor) -> bool:
        if torch.compiler.is_compiling() or self.training or not self.up:
            return False
        if 4 * self.head.in_channels * volume[0, 0].numel() < LARGE:
            return False
        blocks = [*self.down, *self.up]
        layers = [conv for block in blocks for conv, _ in _stages(block)]
        return planes.can_stream([*layers, self.head], volume)

    def _by_planes(self, volume: Tensor) -> Tensor:
        """The logits of one volume; what lies beside is freed as it is used."""
        kept, x = list[list[Tensor]](), volume
        for level, block in enumerate(self.down):
            x = torch.cat([self.pool(part) for part in kept[-1]], 2) if level else x
            plane, depth = (x.shape[3], x.shape[4]), x.shape[2]
            pieces = planes.streamed(_stages(block), planes.cut(x))
            if level == len(self.down) - 1:
                x = planes.gathered(pieces, depth)
            else:
                bytes_each = 4 * _stages(block)[-1][0].out_channels * plane[0] * plane[1]
                most = planes.PLANES * -(-PART // (planes.PLANES * bytes_each))
                kept.append(planes.in_parts(pieces, depth, most))
        for widen, block in zip(self.widen, self.up, strict=True):
            parts, depth = kept.pop(), 2 * x.shape[2]
            pieces = planes.streamed(_stages(block), _joined(widen, x, parts))
            if not kept:
                pieces = (planes.convolved(self.head, piece) for piece in pieces)
            x = planes.gathered(pieces, depth)
        return x


def _stages(block: nn.Module) -> list[tuple[nn.Conv3d, Callable[[Tensor], Tensor]]]:
    """The convolutions of :func:`_twice`, each with what follows it."""
    return [(part[0], part[1:]) for part in block]  # type: ignore[attr-defined]


def _joined(widen: nn.Module, coarse: Tensor, parts: list[Tensor]) -> Iterator[Tensor]:
    """Some planes at a time: coarse features made twice as wide, and what lies beside them."""
    done = 0
    while parts:
        for near in planes.cut(parts.pop(0)):
            half = coarse[:, :, done // 2 : (done + near.shape[2]) // 2]
            done += near.shape[2]
            yield torch.cat([widen(half), near], 1)


class Basic3d(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        straight = inside == outside and stride == 1
        self.shortcut = (
            nn.Identity() if straight else convolved(3, inside, outside, 1, stride=stride)
        )
        self.body = nn.Sequential(
            convolved(3, inside, outside, 3, stride=stride, relu=nn.ReLU()),
            convolved(3, outside, outside, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Channels (n, c, d, h, w) to channels."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Resnet3d(nn.Module):
    """A residual network of volumes or clips (Hara et al., 2017); the defaults are ResNet3D-18."""

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.stem = convolved(3, channels, widths[0], 7, stride=2, relu=nn.ReLU())
        self.pool = nn.MaxPool3d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        inside = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                blocks.append(Basic3d(inside, width, 2 if stage and not number else 1))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits (n, classes)."""
        found: Tensor = self.head(self.blocks(self.pool(self.stem(volume))).mean((2, 3, 4)))
        return found
