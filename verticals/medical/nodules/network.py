"""The network that looks for nodules: a small 3D U-Net with additive skips.

After the 3D U-Net of Çiçek et al. (MICCAI 2016), three levels deep; skips are added, not
concatenated, which halves the work at full resolution. Batch norm is folded into the
convolutions once training is over, so that inference is plain convolutions.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from plinth.engine import ModelSpec, TensorSpec, architecture

HU_LOW, HU_HIGH = -1000.0, 400.0
"""Window of the network's input: HU_LOW becomes 0, HU_HIGH becomes 1, beyond is clipped."""

STRIDE = 4
"""Window sizes are multiples of this (two halvings)."""


class Conv3d(nn.Conv3d):
    """A convolution (3, 3, 3) that keeps the size and is as fast for one row as for many.

    Torch runs small 3D convolutions of a lone row through im2col, several times slower than
    the same row among others; here a lone row passes as its two halves, with equal results.
    """

    def __init__(self, taken: int, given: int) -> None:
        super().__init__(taken, given, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        """(n, c, z, y, x) to (n, k, z, y, x)."""
        rows, depth = volume.shape[0], volume.shape[2]
        if rows != 1 or depth % 2 or torch.compiler.is_compiling():
            return super().forward(volume)
        half = depth // 2
        padded = F.pad(volume, (0, 0, 0, 0, 1, 1))
        halves = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])
        output = F.conv3d(halves, self.weight, self.bias, padding=(0, 1, 1))
        return torch.cat([output[:1], output[1:]], dim=2)


class Block(nn.Sequential):
    """Convolution (3, 3, 3), batch norm while training, ReLU."""

    def __init__(self, taken: int, given: int, norm: bool) -> None:
        parts: list[nn.Module] = [Conv3d(taken, given)]
        if norm:
            parts.append(nn.BatchNorm3d(given))
        super().__init__(*parts, nn.ReLU(inplace=True))

    def folded(self) -> Block:
        """The same function of its input in eval mode, without the batch norm."""
        convolution, norm = cast(Conv3d, self[0]), cast(nn.BatchNorm3d, self[1])
        block = Block(convolution.in_channels, convolution.out_channels, norm=False)
        block[0] = fuse_conv_bn_eval(convolution.eval(), norm.eval())
        return block


class NoduleUNet(nn.Module):
    """3D U-Net of three levels.

    Args:
        channels: of the levels, fine to coarse.
        classes: of the output; class 0 is background.
        norm: batch norm after each convolution (training only; see :meth:`folded`).

    The input is (n, 1, z, y, x) float32, HU windowed by :func:`windowed`, sizes multiples of 4;
    the output (n, classes, z, y, x) logits.
    """

    def __init__(
        self, channels: tuple[int, int, int] = (8, 16, 32), classes: int = 2, norm: bool = False
    ) -> None:
        super().__init__()
        a, b, c = channels
        self.fine = nn.Sequential(Block(1, a, norm), Block(a, a, norm))
        self.middle = nn.Sequential(Block(a, b, norm), Block(b, b, norm))
        self.coarse = nn.Sequential(Block(b, c, norm), Block(c, c, norm), Block(c, c, norm))
        self.to_middle = nn.Conv3d(c, b, 1)
        self.up_middle = nn.Sequential(Block(b, b, norm), Block(b, b, norm))
        self.to_fine = nn.Conv3d(b, a, 1)
        self.up_fine = nn.Sequential(Block(a, a, norm))
        self.head = nn.Conv3d(a, classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits (n, classes, z, y, x) of windowed HU (n, 1, z, y, x)."""
        fine = self.fine(volume)
        middle = self.middle(F.max_pool3d(fine, 2))
        coarse = self.coarse(F.max_pool3d(middle, 2))
        middle = self.up_middle(middle + _doubled(self.to_middle(coarse)))
        fine = self.up_fine(fine + _doubled(self.to_fine(middle)))
        return cast(Tensor, self.head(fine))

    def folded(self) -> NoduleUNet:
        """A copy for inference with batch norm folded into the convolutions."""
        net = copy.deepcopy(self).eval()
        for stage in (net.fine, net.middle, net.coarse, net.up_middle, net.up_fine):
            for index, block in enumerate(stage):
                stage[index] = cast(Block, block).folded()
        return net.eval()


def _doubled(volume: Tensor) -> Tensor:
    return F.interpolate(volume, scale_factor=2.0, mode="nearest")


@architecture("nodule-unet3d")
def nodule_unet3d(channels: tuple[int, int, int] = (8, 16, 32), classes: int = 2) -> nn.Module:
    """The network as it is stored: batch norm folded."""
    return NoduleUNet(tuple(channels), classes)  # type: ignore[arg-type]


def windowed(hu: Tensor) -> Tensor:
    """HU, any shape, to the network's input: float32, HU_LOW..HU_HIGH to 0..1, clipped."""
    return hu.to(torch.float32).sub(HU_LOW).div_(HU_HIGH - HU_LOW).clamp_(0.0, 1.0)


def nodule_spec(
    version: str, metrics: dict[str, float], description: str, source: str
) -> ModelSpec:
    """The manifest of a trained nodule network; the window's size is free."""
    return ModelSpec(
        name="nodules",
        version=version,
        architecture="nodule-unet3d",
        config={"channels": [8, 16, 32], "classes": 2},
        inputs=(TensorSpec(name="volume", shape=(1, None, None, None)),),
        outputs=(TensorSpec(name="logits", shape=(2, None, None, None)),),
        description=description,
        licence="Apache-2.0",
        source=source,
        metrics=metrics,
    )
