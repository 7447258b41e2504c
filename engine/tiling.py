"""A tensor too big for one row, as windows and back.

:class:`Tiling` says how a volume is cut. :class:`WindowGrid` is the cut of one volume.
:class:`WindowMerger` blends window outputs back and finishes z-slabs as the windows pass, so that
memory for logits is flat in the depth of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from plinth.engine.errors import ConfigError, InputError, OutOfMemory

_SIGMA = 0.125  # of the window; the value nnU-Net made usual
_FLOOR = 1e-3  # smallest weight, so that lone corners are not divided by almost nothing


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a volume is cut into windows and put together again.

    Args:
        window: (z, y, x) voxels of one window, as the model takes it.
        overlap: share of the window shared with its neighbour, 0 <= overlap < 1.
        blend: weights inside a window: ``"gaussian"`` (sigma = window / 8) or ``"constant"``.
        reduce: ``"none"`` gives blended outputs (k, Z, Y, X) float32; ``"argmax"`` gives
            labels (Z, Y, X) uint8 and never holds all logits.
        pad_value: value of voxels beyond the volume where it is smaller than the window.
    """

    window: tuple[int, int, int]
    overlap: float = 0.25
    blend: Literal["gaussian", "constant"] = "gaussian"
    reduce: Literal["none", "argmax"] = "none"
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        if len(self.window) != 3 or any(size < 1 for size in self.window):
            raise ConfigError(f"Tiling.window is {self.window}, expected three sizes >= 1")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"Tiling.overlap is {self.overlap}, expected 0 <= overlap < 1")


@lru_cache(maxsize=256)
def _starts(size: int, window: int, overlap: float) -> tuple[int, ...]:
    """First voxel of each window along one axis; the last window ends with the volume."""
    if size <= window:
        return (0,)
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return tuple(min(i * step, size - window) for i in range(count))


@lru_cache(maxsize=64)
def _profile(window: int, blend: str) -> Tensor:
    """Weight along one axis of a window, float32, largest value 1."""
    if blend == "constant":
        return torch.ones(window)
    at = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    return torch.exp(-0.5 * (at / (window * _SIGMA)) ** 2).clamp_min(_FLOOR)


class WindowGrid:
    """The windows of one volume, ordered by z, then y, then x.

    Args:
        tiling: how to cut.
        shape: (Z, Y, X) voxels of the volume.
    """

    def __init__(self, tiling: Tiling, shape: tuple[int, int, int]) -> None:
        if any(size < 1 for size in shape):
            raise InputError(f"a volume of shape {shape} has no voxels", field="rows")
        self.tiling = tiling
        self.shape = shape
        axes = zip(shape, tiling.window, strict=True)
        self.starts = tuple(_starts(size, win, tiling.overlap) for size, win in axes)

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    def corner(self, index: int) -> tuple[int, int, int]:
        """First voxel (z, y, x) of window ``index``."""
        zs, ys, xs = self.starts
        index, x = divmod(index, len(xs))
        z, y = divmod(index, len(ys))
        return zs[z], ys[y], xs[x]

    def bytes(self, channels: int) -> int:
        """What a merger takes for outputs of so many channels: a window's depth, and the result."""
        depth, height, width = self.shape
        plane = channels * height * width * 4
        slab = plane * min(self.tiling.window[0], depth)
        result = depth * height * width if self.tiling.reduce == "argmax" else plane * depth
        return slab + result + height * width * 8

    def cut(self, volume: Tensor, first: int, last: int) -> Tensor:
        """Windows ``first`` to ``last`` (exclusive) of a volume (c, Z, Y, X) as (n, c, z, y, x)."""
        wz, wy, wx = self.tiling.window
        rows = volume.new_full((last - first, volume.shape[0], wz, wy, wx), self.tiling.pad_value)
        for row, index in zip(rows, range(first, last), strict=True):
            z, y, x = self.corner(index)
            piece = volume[:, z : z + wz, y : y + wy, x : x + wx]
            row[:, : piece.shape[1], : piece.shape[2], : piece.shape[3]] = piece
        return rows


class _Holder:
    """Lives as long as a slab does."""


class WindowMerger:
    """Blends window outputs, given in order, into one volume.

    Only one window's depth of logits is held: planes that no later window touches are
    normalised, reduced and written to the result.

    Args:
        grid: the windows.
        reserve: told, before anything is allocated, of an object that lives as long as the
            slab, of the windows and of the bytes (:meth:`WindowGrid.bytes`); raises if they
            are not there.
    """

    def __init__(
        self, grid: WindowGrid, reserve: Callable[[object, WindowGrid, int], None] | None = None
    ) -> None:
        self.grid = grid
        self._reserve = reserve
        self._holder: _Holder | None = None
        window, blend = grid.tiling.window, grid.tiling.blend
        self._profiles = tuple(_profile(size, blend) for size in window)
        pz, py, px = self._profiles
        self._weight = pz[:, None, None] * py[:, None] * px
        self._sums = self._total()
        self._next = 0
        self._base = 0
        self._slab = torch.empty(0)
        self._result = torch.empty(0)

    def put(self, outputs: Tensor) -> None:
        """Add the outputs (n, k, z, y, x) of the next n windows.

        Raises:
            InputError: the model changed the spatial size of its windows.
            OutOfMemory: the logits of a window's depth do not fit.
        """
        window = self.grid.tiling.window
        if tuple(outputs.shape[2:]) != window:
            raise InputError(
                f"the model turned windows of {window} into {tuple(outputs.shape[2:])}",
                hint="tiling needs outputs of the window's size, (n, k, z, y, x)",
            )
        if not self._slab.numel():
            self._allocate(outputs.shape[1])
        depth = self.grid.shape[0]
        for output in outputs:
            z, y, x = self.grid.corner(self._next)
            self._finish(z)
            part = self._slab[:, : depth - z, y : y + window[1], x : x + window[2]]
            size = part.shape[1:]
            crop = (slice(0, size[0]), slice(0, size[1]), slice(0, size[2]))
            part.addcmul_(output[(slice(None), *crop)].float(), self._weight[crop])
            self._next += 1
        if self._next == len(self.grid):
            self._finish(depth)
            self._slab, self._holder = torch.empty(0), None

    def result(self) -> Tensor:
        """The blended volume: (k, Z, Y, X) float32, or (Z, Y, X) uint8 labels."""
        return self._result

    def _allocate(self, channels: int) -> None:
        depth, height, width = self.grid.shape
        argmax = self.grid.tiling.reduce == "argmax"
        if argmax and channels > 256:
            raise InputError(f"{channels} classes do not fit labels of 8 bits")
        rows = min(self.grid.tiling.window[0], depth)
        needed = self.grid.bytes(channels)
        if self._reserve is not None:
            self._holder = _Holder()
            self._reserve(self._holder, self.grid, needed)
        try:
            self._slab = torch.zeros(channels, rows, height, width)
            self._result = (
                torch.zeros(depth, height, width, dtype=torch.uint8)
                if argmax
                else torch.zeros(channels, depth, height, width)
            )
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"the logits of a volume of {self.grid.shape} voxels and {channels} classes take "
                f"{needed} bytes, which cannot be allocated",
                needed=needed,
                available=0,
                hint="send a smaller volume",
            ) from error

    def _finish(self, upto: int) -> None:
        """Write the planes below ``upto`` and move the slab there."""
        done = min(upto, self.grid.shape[0]) - self._base
        if done <= 0:
            return
        sz, sy, sx = self._sums
        for plane in range(done):  # one by one: what is allocated on the way is one plane
            target = self._base + plane
            if self.grid.tiling.reduce == "argmax":
                self._result[target] = self._slab[:, plane].argmax(0)
            else:
                weight = sz[target] * sy[:, None] * sx
                torch.div(self._slab[:, plane], weight, out=self._result[:, target])
        keep = max(self._slab.shape[1] - done, 0)
        for plane in range(keep):
            self._slab[:, plane] = self._slab[:, plane + done]
        self._slab[:, keep:] = 0
        self._base += done

    def _total(self) -> list[Tensor]:
        """Sum of all windows' weights along each axis; separable, as the grid is a product."""
        sums = []
        for size, starts, profile in zip(
            self.grid.shape, self.grid.starts, self._profiles, strict=True
        ):
            total = torch.zeros(size)
            for start in starts:
                part = total[start : start + len(profile)]
                part += profile[: len(part)]
            sums.append(total)
        return sums
