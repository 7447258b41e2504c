"""Families of images (n, channels, height, width): ViT, ResNet, MobileNetV2, ConvNeXt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plinth.engine.models.families.layers import Residual, convolved


class Vit(nn.Module):
    """Patches as tokens, classified by a token of their own (Dosovitskiy et al., 2020)."""

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        inner: int = 3072,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(
            Residual(width, heads, inner, 1e-12, pre=True, activation=nn.GELU())
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.head = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes)."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x)[:, 0])
        return found


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, beside a shortcut (ResNet v1.5)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        inner = outside // 4
        straight = inside == outside and stride == 1
        self.shortcut = (
            nn.Identity() if straight else convolved(2, inside, outside, 1, stride=stride)
        )
        self.body = nn.Sequential(
            convolved(2, inside, inner, 1, relu=nn.ReLU()),
            convolved(2, inner, inner, 3, stride=stride, relu=nn.ReLU()),
            convolved(2, inner, outside, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Channels (n, c, h, w) to channels."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Resnet(nn.Module):
    """A residual network of bottlenecks (He et al., 2015); the defaults are ResNet-50."""

    def __init__(
        self,
        channels: int = 3,
        stem: int = 64,
        widths: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = convolved(2, channels, stem, 7, stride=2, relu=nn.ReLU())
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        inside = stem
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                blocks.append(Bottleneck(inside, width, 2 if stage and not number else 1))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes)."""
        found: Tensor = self.head(self.blocks(self.pool(self.stem(pixels))).mean((2, 3)))
        return found


class Inverted(nn.Module):
    """Wider, convolved by channel, narrower; added to its input where sizes allow."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inside * expand
        options = {"eps": 1e-3}
        self.adds = stride == 1 and inside == outside
        wider = [convolved(2, inside, inner, 1, relu=nn.ReLU6(), **options)] if expand > 1 else []
        self.body = nn.Sequential(
            *wider,
            convolved(2, inner, inner, 3, stride=stride, groups=inner, relu=nn.ReLU6(), **options),
            convolved(2, inner, outside, 1, **options),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Channels (n, c, h, w) to channels."""
        found: Tensor = x + self.body(x) if self.adds else self.body(x)
        return found


class Mobilenet(nn.Module):
    """Inverted residuals with linear bottlenecks: MobileNetV2 (Sandler et al., 2018)."""

    def __init__(
        self,
        channels: int = 3,
        stem: int = 32,
        widths: Sequence[int] = (16, 24, 32, 64, 96, 160, 320),
        depths: Sequence[int] = (1, 2, 3, 4, 3, 3, 1),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        last: int = 1280,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            convolved(2, channels, stem, 3, stride=2, relu=nn.ReLU6(), eps=1e-3)
        ]
        inside = stem
        for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            for number in range(depth):
                step = stride if number == 0 else 1
                blocks.append(Inverted(inside, width, step, 6 if stage else 1))
                inside = width
        blocks.append(convolved(2, inside, last, 1, relu=nn.ReLU6(), eps=1e-3))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(last, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes)."""
        found: Tensor = self.head(self.blocks(pixels).mean((2, 3)))
        return found


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (n, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Channels (n, c, h, w) to channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvnextBlock(nn.Module):
    """7x7 by channel, a norm, and two layers at every place, scaled by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1e-6 * torch.ones(width))
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Channels (n, c, h, w) to channels."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.activation(self.up(y)))
        found: Tensor = x + y.permute(0, 3, 1, 2)
        return found


class Convnext(nn.Module):
    """A convolutional network in the manner of a transformer (Liu et al., 2022)."""

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        classes: int = 1000,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 4, stride=4),
            ChannelNorm(widths[0], eps=1e-6),
        ]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                before = widths[stage - 1]
                parts += [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2)]
            parts += [ConvnextBlock(width) for _ in range(depth)]
        self.parts = nn.Sequential(*parts)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-12)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, classes)."""
        found: Tensor = self.head(self.norm(self.parts(pixels).mean((2, 3))))
        return found
