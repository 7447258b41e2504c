"""Resample volumes slice by slice, separably: no float copy of the whole volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plinth.engine.parallel import spread
from plinth.verticals.medical.volumes.volume import Affine, Array

Interpolation = Literal["linear", "area"]
Indices = npt.NDArray[np.intp]
TOGETHER = 32
"""Planes that one thread makes before it takes others."""


@dataclass(frozen=True)
class Grid:
    """A resampled grid beside a native one, axis by axis.

    Index t of the grid lies at native index first + t * scale.

    Args:
        native: (z, y, x) voxels of the native grid.
        size: (z, y, x) voxels of this grid.
        scale: (z, y, x) native voxels per voxel of this grid.
        first: (z, y, x) native index of this grid's first voxel; by default the centres of both
            grids are the same, (native - 1) / 2 - (size - 1) / 2 * scale.
    """

    native: tuple[int, int, int]
    size: tuple[int, int, int]
    scale: tuple[float, float, float]
    first: tuple[float, float, float] | None = None

    def origin(self, axis: int) -> float:
        """Native index of the first voxel along an axis."""
        if self.first is not None:
            return self.first[axis]
        return (self.native[axis] - 1) / 2 - (self.size[axis] - 1) / 2 * self.scale[axis]

    def affine(self, native: Affine) -> Affine:
        """(4, 4) voxel index (i, j, k) of this grid to LPS mm, from the native affine."""
        step = np.eye(4)
        for axis in range(3):
            row = 2 - axis
            step[row, row] = self.scale[axis]
            step[row, 3] = self.origin(axis)
        placed: Affine = native @ step
        return placed

    def nearest(self) -> tuple[Indices, Indices, Indices]:
        """Index of this grid nearest to each native one, by axis (z, y, x)."""
        at = []
        for axis, (n, m, scale) in enumerate(zip(self.native, self.size, self.scale, strict=True)):
            if self.first is None:
                place = (np.arange(n) - (n - 1) / 2) / scale + (m - 1) / 2
            else:
                place = (np.arange(n) - self.first[axis]) / scale
            at.append(np.clip(np.rint(place), 0, m - 1).astype(np.intp))
        return at[0], at[1], at[2]

    def to_native(
        self, labels: npt.NDArray[np.generic], box: tuple[slice, slice, slice] | None = None
    ) -> Array:
        """Nearest-neighbour values of this grid at native voxels.

        Args:
            labels: (z, y, x) on this grid, any dtype.
            box: the part of the native grid that is wanted; all of it by default.

        Returns:
            (z, y, x) on that part, same dtype.
        """
        z, y, x = self.nearest()
        if box is not None:
            z, y, x = z[box[0]], y[box[1]], x[box[2]]
        native: Array = labels[z][:, y][:, :, x]
        return native


def fit_size(native: tuple[int, int, int], size: tuple[int, int, int]) -> Grid:
    """A grid of (z, y, x) ``size`` voxels whose outer edges are the native grid's."""
    z, y, x = (n / m for n, m in zip(native, size, strict=True))
    return Grid(native, size, (z, y, x))


def fit_spacing(
    native: tuple[int, int, int],
    spacing: tuple[float, float, float],
    wanted: tuple[float, float, float],
) -> Grid:
    """A grid of exactly ``wanted`` (z, y, x) mm, as many voxels as best fill the native extent."""
    sizes = [max(1, round(n * s / w)) for n, s, w in zip(native, spacing, wanted, strict=True)]
    z, y, x = (w / s for s, w in zip(spacing, wanted, strict=True))
    return Grid(native, (sizes[0], sizes[1], sizes[2]), (z, y, x))


def taps(
    native: int, size: int, scale: float, mode: Interpolation, first: float | None = None
) -> tuple[Tensor, Tensor]:
    """Which native samples make each new one, and how much of each.

    New sample t lies at native index ``first`` + t * ``scale``; see :class:`Grid`.

    ``"linear"`` takes the two neighbours; ``"area"`` averages over the new voxel's extent when
    ``scale`` > 1 (no aliasing), and is linear otherwise. Edges are clamped.

    Returns:
        (size, k) int64 native indices and (size, k) float32 weights that sum to 1.
    """
    steps = torch.arange(size, dtype=torch.float64)
    if first is None:
        centre = (steps - (size - 1) / 2) * scale + (native - 1) / 2
    else:
        centre = steps * scale + first
    if mode == "linear" or scale <= 1:
        low = centre.floor()
        index = torch.stack([low, low + 1], 1)
        weight = torch.stack([1 - (centre - low), centre - low], 1)
    else:
        lowest = (centre - scale / 2 + 0.5).floor()
        index = lowest[:, None] + torch.arange(int(np.ceil(scale)) + 1, dtype=torch.float64)
        right = torch.minimum(index + 0.5, (centre + scale / 2)[:, None])
        left = torch.maximum(index - 0.5, (centre - scale / 2)[:, None])
        weight = (right - left).clamp_(min=0) / scale
    return index.clamp_(0, native - 1).long(), weight.float()


def _along(image: Tensor, dim: int, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of gathered rows (dim 0) or columns (dim 1): float32."""
    shape = (-1, 1) if dim == 0 else (1, -1)
    total = image.index_select(dim, index[:, 0]).float().mul_(weight[:, 0].view(shape))
    for tap in range(1, index.shape[1]):
        if not bool(weight[:, tap].any()):
            continue
        part = image.index_select(dim, index[:, tap])
        total.addcmul_(part.float(), weight[:, tap].view(shape))
    return total


def resample(voxels: Array, grid: Grid, mode: Interpolation = "linear") -> Tensor:
    """Resample (z, y, x) voxels onto a grid.

    Each thread holds two or a few reduced planes at a time besides the result.

    Args:
        voxels: (z, y, x) int16 or float32, modality units.
        grid: where to.
        mode: see :func:`taps`.

    Returns:
        (z, y, x) float32 of ``grid.size``.
    """
    z, y, x = (
        taps(n, m, scale, mode, None if grid.first is None else grid.first[axis])
        for axis, (n, m, scale) in enumerate(zip(grid.native, grid.size, grid.scale, strict=True))
    )
    if any(step < 0 for step in voxels.strides):
        voxels = np.ascontiguousarray(voxels)
    source = torch.from_numpy(voxels)
    out = torch.empty(grid.size, dtype=torch.float32)

    def fill(ks: range) -> None:
        planes: dict[int, Tensor] = {}
        for k in ks:
            used = _merge(z[0][k], z[1][k])
            planes = {n: plane for n, plane in planes.items() if n in used}
            target = out[k].zero_()
            for n, share in used.items():
                if n not in planes:
                    planes[n] = _along(_along(source[n], 0, *y), 1, *x)
                target.add_(planes[n], alpha=share)

    depth = grid.size[0]
    spread(fill, [range(k, min(k + TOGETHER, depth)) for k in range(0, depth, TOGETHER)])
    return out


def _merge(index: Tensor, weight: Tensor) -> dict[int, float]:
    """Weights by native index, clamped repeats added up, zeros left out."""
    merged: dict[int, float] = {}
    for n, share in zip(index.tolist(), weight.tolist(), strict=True):
        if share:
            merged[n] = merged.get(n, 0.0) + share
    return merged
