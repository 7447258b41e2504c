"""A tensor too big for one row, as windows and back.

:class:`Tiling` says how a volume is cut. :class:`WindowGrid` is the cut of one volume.
:class:`WindowMerger` puts window outputs together again and finishes planes as the windows pass,
so that memory for logits is flat in the depth of the volume: windows with a ``halo`` are finished
one by one, blended ones as soon as no later window touches a plane. Planes that do not fit into
memory are made in *pieces*, strips of their rows one after the other; windows that reach into two
strips run once for each, and every voxel gets the same sums.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from plinth.engine.errors import ConfigError, InputError, OutOfMemory

_SIGMA = 0.125  # of the window; the value nnU-Net made usual
_FLOOR = 1e-3  # smallest weight, so that lone corners are not divided by almost nothing
_TIE = 1e-9  # voxels: a place between two planes goes to the upper one, whatever its rounding
_ROWS = 16  # planes or rows that are reduced at once: bounds what is allocated on the way

Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Onto:
    """Another grid, onto which outputs are interpolated linearly before they are reduced.

    Its voxel t lies at index first + t * scale of the windows' volume, axis by axis; places
    outside take the nearest value.

    Args:
        size: (z, y, x) voxels.
        first: (z, y, x) index of its first voxel.
        scale: (z, y, x) voxels of the windows' volume per voxel, above 0.
        nearest: (z, y, x) axes along which the nearest plane is taken instead.
    """

    size: Size
    first: tuple[float, float, float]
    scale: tuple[float, float, float]
    nearest: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.size) or any(not scale > 0 for scale in self.scale):
            raise ConfigError(f"Onto has size {self.size} and scale {self.scale}, expected above 0")

    def neighbours(self, axis: int, native: int) -> tuple[Tensor, Tensor]:
        """Index below each place, clamped to ``native`` voxels, and the share of the one above."""
        along = torch.arange(self.size[axis], dtype=torch.float64)
        place = (along * self.scale[axis] + self.first[axis]).clamp_(0, native - 1)
        if self.nearest[axis]:
            place = (place + 0.5 + _TIE).floor_().clamp_(max=native - 1)
        low = place.floor().clamp_(max=max(0, native - 2))
        return low.long(), (place - low).float()


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a volume is cut into windows and put together again.

    Args:
        window: (z, y, x) voxels of one window, as the model takes it.
        overlap: share of the window shared with its neighbour, 0 <= overlap < 1.
        blend: weights inside a window: ``"gaussian"`` (sigma = window / 8), ``"constant"``, or
            ``"floored"``, gaussian but never below 1e-3 (MONAI).
        reduce: ``"none"`` gives outputs (k, Z, Y, X) float32; ``"argmax"`` gives labels (Z, Y, X)
            uint8 and never holds all logits; ``"threshold"`` gives labels (Z, Y, X) uint8, the
            last channel above 0.5 counted from 1, or 0; ``"labels"`` takes outputs
            (n, 1, z, y, x) that are labels already, with a ``halo``.
        pad_value: value of voxels beyond the volume where it is smaller than the window.
        halo: (z, y, x) voxels at each inner face of a window that are thrown away instead of
            blended. At least the receptive radius of a purely convolutional network makes the
            answer the same as that of one pass over the whole volume.
        even: spread the windows evenly instead of letting the last one overlap more.
        activation: what is made of blended outputs before anything else.
        interpolate: what goes ``onto`` another grid: the ``"activated"`` outputs (MONAI), or
            the ``"raw"`` ones (nnU-Net).
        onto: another grid to interpolate onto.
        uncertainty: give ``{"labels": ..., "uncertainty": ...}``, the second (Z, Y, X) uint8:
            255 * (1 - the largest probability) / (1 - 1 / k), for a threshold
            255 * (1 - |2 p - 1|) of the least certain channel.
        hidden: for a threshold, give ``{"labels": ..., "hidden": ...}``, the second (k,) int64:
            voxels of each channel above 0.5 whose label is a later channel's.
    """

    window: Size
    overlap: float = 0.25
    blend: Literal["gaussian", "constant", "floored"] = "gaussian"
    reduce: Literal["none", "argmax", "threshold", "labels"] = "none"
    pad_value: float = 0.0
    halo: Size = (0, 0, 0)
    even: bool = False
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    onto: Onto | None = None
    interpolate: Literal["activated", "raw"] = "activated"
    uncertainty: bool = False
    hidden: bool = False

    def __post_init__(self) -> None:
        if len(self.window) != 3 or any(size < 1 for size in self.window):
            raise ConfigError(f"Tiling.window is {self.window}, expected three sizes >= 1")
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"Tiling.overlap is {self.overlap}, expected 0 <= overlap < 1")
        if len(self.halo) != 3 or any(size < 0 for size in self.halo):
            raise ConfigError(f"Tiling.halo is {self.halo}, expected three sizes >= 0")
        if self.reduce == "labels" and (self.onto or self.uncertainty or not self.exact):
            raise ConfigError(
                "Tiling.reduce is 'labels', expected a halo and nothing to interpolate"
            )
        if self.uncertainty and self.reduce == "none":
            raise ConfigError("Tiling.uncertainty is of labels, but reduce is 'none'")
        if self.hidden and self.reduce != "threshold":
            raise ConfigError(f"Tiling.hidden is of a threshold, but reduce is {self.reduce!r}")

    @property
    def exact(self) -> bool:
        """Whether windows are cut at their halo instead of blended."""
        return any(self.halo)


@lru_cache(maxsize=256)
def _starts(size: int, window: int, step: float, even: bool = False) -> tuple[int, ...]:
    """First voxel of each window along one axis; the last window ends with the volume."""
    if size <= window:
        return (0,)
    count = math.ceil((size - window) / step) + 1
    if even:
        return tuple(round(i * (size - window) / (count - 1)) for i in range(count))
    return tuple(min(int(i * step), size - window) for i in range(count))


@lru_cache(maxsize=64)
def _profile(window: int, blend: str) -> Tensor:
    """Weight along one axis of a window, float32, largest value 1."""
    if blend == "constant":
        return torch.ones(window)
    at = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    weight = torch.exp(-0.5 * (at / (window * _SIGMA)) ** 2)
    return weight if blend == "floored" else weight.clamp_min(_FLOOR)


@dataclass(frozen=True, slots=True)
class Strip:
    """Some rows (y) of all planes, which are finished before the next strip begins.

    Args:
        out: the rows of the result.
        rows: the rows of the windows' volume that they are made of.
        windows: which windows along y reach into these.
        first: number of the first window of the strip.
    """

    out: slice
    rows: slice
    windows: range
    first: int

    @property
    def height(self) -> int:
        """Rows of the windows' volume."""
        return int(self.rows.stop - self.rows.start)


class WindowGrid:
    """The windows of one volume: strip by strip, in each by z, then y, then x.

    Args:
        tiling: how to cut.
        shape: (Z, Y, X) voxels of the volume.
        pieces: strips of rows that planes are made in, at most as many as there are windows along
            y; more take less memory, and the windows that reach into two of them run twice.

    Raises:
        InputError: the volume has no voxels.
        ConfigError: the halo leaves nothing of a window that the volume needs several of.
    """

    def __init__(self, tiling: Tiling, shape: Size, pieces: int = 1) -> None:
        if any(size < 1 for size in shape):
            raise InputError(f"a volume of shape {shape} has no voxels", field="rows")
        self.tiling = tiling
        self.shape = shape
        starts = []
        for size, window, halo in zip(shape, tiling.window, tiling.halo, strict=True):
            step: float = window - 2 * halo
            if not tiling.exact:
                share = window * (1 - tiling.overlap)
                step = share if tiling.even else max(1, int(share))
            if step < 1 and size > window:
                raise ConfigError(
                    f"a halo of {tiling.halo} leaves nothing of windows of {tiling.window}",
                    hint="use windows more than twice as wide as the halo",
                )
            starts.append(_starts(size, window, step, tiling.even))
        self.starts = tuple(starts)
        self.strips = tuple(self._strips(min(pieces, self.max_pieces)))
        self._firsts = [strip.first for strip in self.strips]

    @property
    def max_pieces(self) -> int:
        """Most strips that planes can be made in; 1 where planes are never held."""
        return 1 if self.direct else len(self.starts[1])

    def _strips(self, pieces: int) -> Iterator[Strip]:
        onto, height = self.tiling.onto, self.shape[1]
        total, first = height if onto is None else onto.size[1], 0
        pieces = min(pieces, total)
        for number in range(pieces):
            out = slice(number * total // pieces, (number + 1) * total // pieces)
            rows = out
            if onto is not None:  # each row lies between two of the windows' volume
                low, _ = onto.neighbours(1, height)
                last = int(low[out.stop - 1]) + 2
                rows = slice(int(low[out.start]), min(last, height))
            if pieces == 1:
                rows = slice(0, height)
            spans = [self._span(at) for at in range(len(self.starts[1]))]
            reach = [at for at, (a, b) in enumerate(spans) if a < rows.stop and b > rows.start]
            windows = range(reach[0], reach[-1] + 1)
            yield Strip(out, rows, windows, first)
            first += len(self.starts[0]) * len(windows) * len(self.starts[2])

    def _span(self, at: int) -> tuple[int, int]:
        """Rows that a window along y answers for: with a halo its core."""
        if self.tiling.exact:
            core = self._core(1, at)
            return core.start, core.stop
        start = self.starts[1][at]
        return start, start + self.tiling.window[1]

    def __len__(self) -> int:
        last = self.strips[-1]
        return last.first + len(self.starts[0]) * len(last.windows) * len(self.starts[2])

    def within(self, limit: int, channels: int) -> WindowGrid:
        """The same in 1, 2, 4 ... pieces, so that the merger fits into bytes; else in the most."""
        found, before = self, 0
        while found.bytes(channels) > limit and len(found.strips) > before:
            before = len(found.strips)
            found = WindowGrid(self.tiling, self.shape, 2 * before)
        return found

    def strip(self, number: int) -> Strip:
        """The strip that window ``number`` is of."""
        return self.strips[bisect_right(self._firsts, number) - 1]

    def index(self, number: int) -> Size:
        """Which window along each axis (z, y, x) window ``number`` is."""
        strip = self.strip(number)
        number, x = divmod(number - strip.first, len(self.starts[2]))
        z, y = divmod(number, len(strip.windows))
        return z, strip.windows[y], x

    def corner(self, number: int) -> Size:
        """First voxel (z, y, x) of window ``number``."""
        z, y, x = self.index(number)
        return self.starts[0][z], self.starts[1][y], self.starts[2][x]

    def core(self, number: int) -> tuple[slice, slice, slice]:
        """The voxels of the volume that window ``number`` alone answers for, with a halo."""
        z, y, x = (self._core(axis, at) for axis, at in enumerate(self.index(number)))
        return z, y, x

    def _core(self, axis: int, at: int) -> slice:
        starts, halo = self.starts[axis], self.tiling.halo[axis]
        last = at + 1 == len(starts)
        return slice(
            starts[at] + halo if at else 0,
            self.shape[axis] if last else starts[at + 1] + halo,
        )

    @property
    def direct(self) -> bool:
        """Whether a window's outputs are reduced as they come: none is added to another's."""
        alone = math.prod(map(len, self.starts)) == 1
        return (self.tiling.exact or alone) and self.tiling.onto is None

    def bytes(self, channels: int) -> int:
        """What a merger takes for outputs of so many channels: planes not done, and the result."""
        depth, height, width = self.shape
        tiling = self.tiling
        rows = max(strip.height for strip in self.strips)
        plane = (channels + (tiling.blend == "floored")) * rows * width * 4
        slab = plane * min(tiling.window[0], depth)
        if self.direct:
            slab = 0
        size = self.shape if tiling.onto is None else tiling.onto.size
        if tiling.onto is not None:
            most = max(strip.out.stop - strip.out.start for strip in self.strips)
            slab += 3 * channels * most * size[2] * 4
        result = math.prod(size) * (4 * channels if tiling.reduce == "none" else 1)
        if tiling.uncertainty:
            result += math.prod(size)
        return slab + result + height * width * 8

    def cut(self, volume: Tensor, first: int, last: int) -> Tensor:
        """Windows ``first`` to ``last`` (exclusive) of a volume (c, Z, Y, X) as (n, c, z, y, x).

        A window that is the whole volume is that itself, not a copy.
        """
        wz, wy, wx = self.tiling.window
        if (wz, wy, wx) == tuple(volume.shape[1:]):
            return volume[None]
        rows = volume.new_full((last - first, volume.shape[0], wz, wy, wx), self.tiling.pad_value)
        for row, number in zip(rows, range(first, last), strict=True):
            z, y, x = self.corner(number)
            piece = volume[:, z : z + wz, y : y + wy, x : x + wx]
            row[:, : piece.shape[1], : piece.shape[2], : piece.shape[3]] = piece
        return rows


class _Reducer:
    """Turns outputs that are done into the result, and holds it.

    Args:
        tiling: how to reduce.
        size: (Z, Y, X) of the result.
        channels: of the outputs.
    """

    def __init__(self, tiling: Tiling, size: Size, channels: int) -> None:
        self.tiling = tiling
        kind = np.float32 if tiling.reduce == "none" else np.uint8
        shape = (channels, *size) if tiling.reduce == "none" else size
        self.result = torch.from_numpy(np.zeros(shape, kind))  # takes memory where it is written
        self.doubt = torch.zeros(size if tiling.uncertainty else 0, dtype=torch.uint8)
        self.hidden = torch.zeros(channels, dtype=torch.int64)

    def take(self, output: Tensor) -> bool:
        """Take labels (1, Z, Y, X) of the whole volume as they are; whether they are that."""
        if self.tiling.reduce != "labels" or output.dtype != torch.uint8:
            return False
        alone = output.untyped_storage().nbytes() == output.nbytes and output.is_contiguous()
        if not alone or tuple(output.shape) != (1, *self.result.shape):
            return False
        self.result = output[0]
        return True

    def put(self, values: Tensor, at: tuple[int | slice, slice, slice]) -> None:
        """Reduce activated outputs (k, ...) and write them to a place (z, y, x)."""
        reduce = self.tiling.reduce
        if reduce == "none":
            self.result[(slice(None), *at)] = values
            return
        if reduce == "labels":
            self.result[at] = values[0].to(torch.uint8)
        elif reduce == "argmax":
            best, which = values.max(0)  # NaN is larger than all else
            _check_numbers(best)
            self.result[at] = which
        else:
            _check_numbers(values)
            self.result[at] = self._above(values)
        if self.tiling.uncertainty:
            self.doubt[at] = self._doubt(values)

    def _above(self, values: Tensor) -> Tensor:
        """The last channel above 0.5, counted from 1, or 0."""
        order = torch.arange(1, len(values) + 1, dtype=torch.uint8)
        order = order.view(-1, *(1 for _ in values.shape[1:]))
        above = values > 0.5
        last = (above * order).amax(0)
        if self.tiling.hidden:
            self.hidden += (above & (last > order)).flatten(1).sum(1)
        return last

    def _doubt(self, values: Tensor) -> Tensor:
        if self.tiling.reduce == "threshold":
            share = 1 - (2 * values - 1).abs().amin(0)
        else:
            if self.tiling.activation != "softmax":
                values = values.softmax(0)
            share = (1 - values.amax(0)) * (len(values) / max(1, len(values) - 1))
        return (255 * share).round_().clamp_(0, 255).to(torch.uint8)


def _check_numbers(values: Tensor) -> None:
    """Outputs that a label can be told from.

    Raises:
        InputError: NaN, of which the largest channel would be the first that has it.
    """
    if bool(values.isnan().any()):
        raise InputError(
            "the model's outputs for this volume are no numbers (NaN), so they have no labels",
            hint="look for NaN in its weights and in the volume, and for sums beyond float16",
            reason="not_a_number",
        )


class _Between:
    """Interpolates planes that come in order onto another grid, two of them at a time."""

    def __init__(self, onto: Onto, shape: Size, strip: Strip) -> None:
        self._out = strip.out
        self._taps = [onto.neighbours(axis, n) for axis, n in enumerate(shape)]
        low, share = self._taps[1]
        self._taps[1] = low[strip.out] - strip.rows.start, share[strip.out]
        self._before = torch.empty(0)
        self._next = 0

    def put(self, number: int, plane: Tensor, reducer: _Reducer, activation: str = "none") -> None:
        """Take in plane ``number`` (k, Y, X); planes that lie between two are reduced."""
        plane = _lerp(_lerp(plane, 1, *self._taps[1]), 2, *self._taps[2])
        low, share = self._taps[0]
        whole = slice(None)
        while self._next < len(low):
            at, part = int(low[self._next]), float(share[self._next])
            if at + (part > 0) > number:
                break
            value = plane if at == number else self._before
            if part > 0:
                value = torch.lerp(self._before, plane, part)
            reducer.put(_activated(value, activation), (self._next, self._out, whole))
            self._next += 1
        self._before = plane.clone()  # the slab it may lie in moves on


def _lerp(values: Tensor, dim: int, low: Tensor, share: Tensor) -> Tensor:
    size = values.shape[dim]
    if len(low) == size and torch.equal(low + share, torch.arange(size, dtype=torch.float32)):
        return values
    shape = [1] * values.ndim
    shape[dim] = -1
    below = values.index_select(dim, low)
    above = values.index_select(dim, (low + 1).clamp_(max=size - 1))
    return below.lerp_(above, share.view(shape))


class _Holder:
    """Lives as long as the planes that are not done."""


class WindowMerger:
    """Puts window outputs, given in order, together to one volume.

    Args:
        grid: the windows.
        reserve: told, before anything is allocated, of an object that lives as long as the
            planes that are not done, of the windows and of the bytes
            (:meth:`WindowGrid.bytes`); raises if they are not there.
    """

    def __init__(
        self, grid: WindowGrid, reserve: Callable[[object, WindowGrid, int], None] | None = None
    ) -> None:
        self.grid = grid
        self._reserve = reserve
        self._holder: _Holder | None = None
        self._reducer: _Reducer | None = None
        self._between: _Between | None = None
        self._strip = grid.strips[0]
        self._next = 0
        self._base = 0
        self._slab = torch.empty(0)

    def put(self, outputs: Tensor) -> None:
        """Add the outputs (n, k, z, y, x) of the next n windows.

        Raises:
            InputError: the model changed the spatial size of its windows.
            OutOfMemory: the planes that are not done do not fit.
        """
        window = self.grid.tiling.window
        if tuple(outputs.shape[2:]) != window:
            raise InputError(
                f"the model turned windows of {window} into {tuple(outputs.shape[2:])}",
                hint="tiling needs outputs of the window's size, (n, k, z, y, x)",
            )
        reducer = self._reducer or self._allocate(outputs.shape[1])
        for output in outputs:
            if not self._slab.numel():
                self._cut(output, reducer)
            else:
                if self._next == self._strip.first + self._windows:
                    self._finish(self.grid.shape[0], reducer)
                    self._begin(self.grid.strip(self._next))
                self._finish(self.grid.corner(self._next)[0], reducer)
                self._add(output)
            self._next += 1
        if self._next == len(self.grid):
            if self._slab.numel():
                self._finish(self.grid.shape[0], reducer)
            self._slab, self._holder = torch.empty(0), None

    def result(self) -> Tensor | dict[str, Tensor]:
        """The volume: (k, Z, Y, X) float32, or (Z, Y, X) uint8 labels and what goes with them."""
        if self._reducer is None:
            return torch.empty(0)
        found = {"labels": self._reducer.result}
        if self.grid.tiling.uncertainty:
            found["uncertainty"] = self._reducer.doubt
        if self.grid.tiling.hidden:
            found["hidden"] = self._reducer.hidden
        return found if len(found) > 1 else self._reducer.result

    @property
    def _windows(self) -> int:
        """Windows of the strip."""
        zs, _, xs = self.grid.starts
        return len(zs) * len(self._strip.windows) * len(xs)

    def _begin(self, strip: Strip) -> None:
        """Take up a strip: nothing of it is done."""
        shape, self._slab = self._slab.shape, torch.empty(0)
        self._slab = torch.zeros(*shape[:2], strip.height, shape[3])
        self._strip, self._base = strip, 0
        onto = self.grid.tiling.onto
        self._between = None if onto is None else _Between(onto, self.grid.shape, strip)

    def _allocate(self, channels: int) -> _Reducer:
        grid, tiling = self.grid, self.grid.tiling
        depth, _, width = grid.shape
        most = 255 if tiling.reduce == "threshold" else 256
        if tiling.reduce in ("argmax", "threshold") and channels > most:
            raise InputError(f"{channels} classes do not fit labels of 8 bits")
        if tiling.reduce == "argmax" and channels == 1:
            raise InputError(
                "the model gives one channel, whose largest is always itself: every label would "
                "be 0",
                hint='for what is above 0.5 take reduce "threshold", with a sigmoid for logits',
            )
        needed = grid.bytes(channels)
        if self._reserve is not None:
            self._holder = _Holder()
            self._reserve(self._holder, grid, needed)
        try:
            if not grid.direct:
                planes = min(tiling.window[0], depth)
                more = tiling.blend == "floored" and not tiling.exact  # sums of the weights
                self._slab = torch.empty(channels + more, planes, 0, width)
                self._begin(self._strip)
            size = grid.shape if tiling.onto is None else tiling.onto.size
            self._reducer = _Reducer(tiling, size, channels)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"the logits of a volume of {grid.shape} voxels and {channels} classes take "
                f"{needed} bytes, which cannot be allocated",
                needed=needed,
                available=0,
                hint="send a smaller volume",
            ) from error
        return self._reducer

    def _cut(self, output: Tensor, reducer: _Reducer) -> None:
        """Reduce what a window alone answers for, a few planes at a time.

        Labels of a window that is the whole volume are the result, in their own memory.
        """
        if reducer.take(output):
            return
        corner, core = self.grid.corner(self._next), self.grid.core(self._next)
        z, y, x = (
            slice(span.start - at, span.stop - at) for span, at in zip(core, corner, strict=True)
        )
        for first in range(z.start, z.stop, _ROWS):
            last = min(first + _ROWS, z.stop)
            place = slice(first + corner[0], last + corner[0])
            values = _activated(output[:, first:last, y, x].float(), self.grid.tiling.activation)
            reducer.put(values, (place, core[1], core[2]))

    def _add(self, output: Tensor) -> None:
        """Add a window to the slab: weighted, or with a halo the part it answers for."""
        tiling, (z, y, x) = self.grid.tiling, self.grid.corner(self._next)
        top = self._strip.rows.start
        if tiling.exact:
            core_z, core_y, core_x = self.grid.core(self._next)
            low, high = max(core_y.start, top), min(core_y.stop, self._strip.rows.stop)
            inside = (
                slice(core_z.start - z, core_z.stop - z),
                slice(low - y, high - y),
                slice(core_x.start - x, core_x.stop - x),
            )
            place = (slice(None), inside[0], slice(low - top, high - top), core_x)
            self._slab[place] = output[(slice(None), *inside)].float()
            return
        window = tiling.window
        low = max(y, top)
        part = self._slab[
            :, : self.grid.shape[0] - z, low - top : y + window[1] - top, x : x + window[2]
        ]
        size = part.shape[1:]
        crop = (slice(0, size[0]), slice(low - y, low - y + size[1]), slice(0, size[2]))
        weights = _weights(window, tiling.blend)[crop]
        part[: len(output)].addcmul_(output[(slice(None), *crop)].float(), weights)
        if len(part) > len(output):
            part[-1].add_(weights)

    def _finish(self, upto: int, reducer: _Reducer) -> None:
        """Reduce the planes below ``upto`` and move the slab there."""
        done = min(upto, self.grid.shape[0]) - self._base
        if done <= 0:
            return
        tiling = self.grid.tiling
        bare = tiling.reduce == "argmax" and tiling.activation == "none"
        raw = tiling.exact or (bare and tiling.onto is None and not tiling.uncertainty)
        floored = tiling.blend == "floored" and not tiling.exact
        sz, sy, sx = _totals(self.grid) if not raw and not floored else (torch.empty(0),) * 3
        sy, whole = sy[self._strip.rows], slice(None)
        for number in range(done):  # one by one: what is allocated on the way is one plane
            target = self._base + number
            plane = self._slab[:, number]
            if floored:
                plane = plane[:-1] / plane[-1]
            elif not raw:
                plane = plane / (sz[target] * sy[:, None] * sx)
            if self._between is None:
                plane = _activated(plane, tiling.activation)
                reducer.put(plane, (target, self._strip.out, whole))
            elif tiling.interpolate == "raw":
                self._between.put(target, plane, reducer, tiling.activation)
            else:
                self._between.put(target, _activated(plane, tiling.activation), reducer)
        keep = max(self._slab.shape[1] - done, 0)
        for number in range(keep):
            self._slab[:, number] = self._slab[:, number + done]
        self._slab[:, keep:] = 0
        self._base += done


def _activated(values: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return values.softmax(0)
    return values.sigmoid() if activation == "sigmoid" else values


@lru_cache(maxsize=4)
def _weights(window: Size, blend: str) -> Tensor:
    z, y, x = (_profile(size, blend) for size in window)
    weights = z[:, None, None] * y[:, None] * x
    return weights.clamp_min(_FLOOR) if blend == "floored" else weights


def _totals(grid: WindowGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of all windows' weights along each axis; separable, as the grid is a product."""
    sums = []
    for size, starts, window in zip(grid.shape, grid.starts, grid.tiling.window, strict=True):
        profile = _profile(window, grid.tiling.blend)
        total = torch.zeros(size)
        for start in starts:
            part = total[start : start + window]
            part += profile[: len(part)]
        sums.append(total)
    return sums[0], sums[1], sums[2]
