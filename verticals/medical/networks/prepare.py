"""A volume as a network takes it, step by step, and the way back to the native grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from plinth.engine import InputError
from plinth.engine.tiling import Onto
from plinth.verticals.medical.networks.recipe import (
    Affine,
    Clip,
    Conform,
    Crop,
    Cut,
    Normalise,
    Orient,
    Pad,
    Recipe,
    Resize,
    Scale,
    Space,
    Transpose,
    Triple,
)
from plinth.verticals.medical.volumes.resample import Grid, resample
from plinth.verticals.medical.volumes.volume import Array, Volume

ANISOTROPIC = 3.0  # coarsest over finest spacing from which nnU-Net resamples planes
MOST_VOXELS = 1 << 30
TINY = 1e-9

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Axis:
    """Where one axis of the prepared array lies on the native grid.

    Index t lies at native index ``first`` + t * ``scale`` of axis ``native``.

    Args:
        native: axis of the native array (z, y, x).
        voxels: of the native array along it.
        size: voxels of the prepared array.
        first: native index of its first voxel.
        scale: native voxels per voxel; below 0 where it runs the other way.
        inside: native indices (from, to) that the crops left.
        nearest: outputs come back along it by the nearest voxel.
    """

    native: int
    voxels: int
    size: int
    first: float
    scale: float
    inside: tuple[int, int]
    nearest: bool = False

    def moved(self, start: float, size: int, scale: float = 1.0) -> Axis:
        """The axis whose voxel t is this one's voxel ``start`` + t * ``scale``."""
        return replace(
            self, size=size, first=self.first + start * self.scale, scale=self.scale * scale
        )

    def cropped(self, start: int, stop: int) -> Axis:
        """The axis cut to ``start``..``stop``; what was cut off is background on the way back."""
        ends = sorted(self.first + (at - 0.5) * self.scale for at in (start, stop))
        low = max(self.inside[0], math.ceil(ends[0] - 1e-6))
        high = min(self.inside[1], math.ceil(ends[1] - 1e-6))
        return replace(self.moved(start, stop - start), inside=(low, max(low, high)))

    @property
    def onto(self) -> tuple[int, float, float]:
        """Size, first index and step, on this axis, of the native voxels inside it, in its sense.

        The arguments of :class:`plinth.engine.tiling.Onto`.
        """
        low, high = self.inside
        start = low if self.scale > 0 else high - 1
        return high - low, (start - self.first) / self.scale, 1 / abs(self.scale)


@dataclass(eq=False)
class Prepared:
    """A volume as a network takes it.

    Args:
        rows: (1, a, b, c) float32, axes in the network's order.
        axes: where they lie.
        native: (z, y, x) voxels of the native volume.
    """

    rows: Tensor
    axes: tuple[Axis, Axis, Axis]
    native: Triple

    @property
    def shape(self) -> Triple:
        """Voxels along each axis."""
        a, b, c = (axis.size for axis in self.axes)
        return a, b, c

    @property
    def onto(self) -> Onto | None:
        """The native voxels as a grid on this one, or ``None`` where they are the same."""
        found = [axis.onto for axis in self.axes]
        size, first, scale = zip(*found, strict=True)
        same = all(abs(at) < TINY for at in first) and all(abs(s - 1) < TINY for s in scale)
        if same and size == self.shape:
            return None
        a, b, c = (axis.nearest for axis in self.axes)
        return Onto(size, first, scale, (a, b, c))

    def nearest(self, labels: Labels) -> Labels:
        """Labels on the prepared grid, by nearest neighbour on :attr:`onto`."""
        onto = self.onto
        if onto is None:
            return labels
        at = [
            np.clip(np.floor(first + np.arange(size) * scale + 0.5), 0, n - 1).astype(np.intp)
            for size, first, scale, n in zip(
                onto.size, onto.first, onto.scale, labels.shape, strict=True
            )
        ]
        near: Labels = labels[at[0]][:, at[1]][:, :, at[2]]
        return near

    def to_native(self, values: Labels) -> Labels:
        """Values on :attr:`onto` (or on the prepared grid, where that is ``None``) as (z, y, x)."""
        turned = values[tuple(slice(None, None, 1 if a.scale > 0 else -1) for a in self.axes)]
        turned = turned.transpose([[a.native for a in self.axes].index(axis) for axis in range(3)])
        if turned.shape == self.native:
            return np.ascontiguousarray(turned)
        whole = np.zeros(self.native, values.dtype)
        inside = {axis.native: slice(*axis.inside) for axis in self.axes}
        whole[inside[0], inside[1], inside[2]] = turned
        return whole


@dataclass(eq=False)
class _State:
    values: Tensor
    axes: list[Axis]
    volume: Volume
    outside: npt.NDArray[np.bool_] | None = None

    def mm(self) -> list[float]:
        """Spacing along each axis."""
        x, y, z = self.volume.spacing
        return [(z, y, x)[axis.native] * abs(axis.scale) for axis in self.axes]


def prepare(volume: Volume, recipe: Recipe) -> Prepared:
    """Do the steps of a recipe.

    Args:
        volume: modality units.
        recipe: whose steps; a window is padded for at the end, as both MONAI and nnU-Net do.

    Raises:
        InputError: nothing is left, or the grid asked for is far too large.
    """
    order = (0, 1, 2) if recipe.axes == "zyx" else (2, 1, 0)
    axes = [
        Axis(
            native, volume.shape[native], volume.shape[native], 0.0, 1.0, (0, volume.shape[native])
        )
        for native in order
    ]
    values = torch.from_numpy(np.ascontiguousarray(volume.voxels.transpose(order)))
    state = _State(values, axes, volume)
    steps = list(recipe.steps)
    if recipe.window.size is not None:
        window = recipe.window
        steps.append(Pad(least=recipe.window.size, mode=window.beyond, value=window.beyond_value))
    for step in steps:
        _STEPS[type(step)](state, step)
        if min(state.values.shape) < 1:
            raise InputError(
                f"series {volume.series.id}: nothing is left of the volume after {step.op}",
                reason="empty",
            )
    rows = state.values.float().contiguous().unsqueeze(0)
    a, b, c = state.axes
    return Prepared(rows, (a, b, c), volume.shape)


def _orient(state: _State, step: Orient) -> None:
    """To the nearest patient axes; nibabel's codes name where an axis points, in RAS."""
    direction = state.volume.affine[:3, :3] / np.linalg.norm(state.volume.affine[:3, :3], axis=0)
    along = np.stack(
        [direction[:, 2 - axis.native] * math.copysign(1, axis.scale) for axis in state.axes]
    )  # (axis of the array, LPS)
    left = [0, 1, 2]
    taken: list[int] = [-1, -1, -1]
    for axis, lps in sorted(
        ((a, p) for a in range(3) for p in range(3)), key=lambda pair: -abs(along[pair])
    ):
        if axis in left and lps not in taken:
            taken[axis] = lps
            left.remove(axis)
    places = [("RL", 0), ("AP", 1), ("IS", 2)]  # LPS: left, posterior and superior ascend
    order, flips = [], []
    for code in step.codes:
        pair, lps = next(place for place in places if code in place[0])
        axis = taken.index(lps)
        order.append(axis)
        flips.append((along[axis, lps] > 0) != (pair.index(code) == 1))
    state.values = state.values.permute(order)
    state.axes = [
        state.axes[axis].moved(state.axes[axis].size - 1, state.axes[axis].size, -1.0)
        if flip
        else state.axes[axis]
        for axis, flip in zip(order, flips, strict=True)
    ]
    state.values = state.values.flip([n for n, flip in enumerate(flips) if flip])
    _reshape_mask(
        state,
        lambda mask: np.flip(
            mask.transpose(order), tuple(n for n, flip in enumerate(flips) if flip)
        ),
    )


def _transpose(state: _State, step: Transpose) -> None:
    state.values = state.values.permute(step.order)
    state.axes = [state.axes[axis] for axis in step.order]
    _reshape_mask(state, lambda mask: mask.transpose(step.order))


def _space(state: _State, step: Space) -> None:
    mm, shape = state.mm(), tuple(state.values.shape)
    wanted = [want if want > 0 else have for want, have in zip(step.mm, mm, strict=True)]
    if step.keep == "first":
        sizes = [  # a half goes to the even size, as MONAI's compute_shape_offset has it
            round((n - 1) * (have / want) + 1)
            for n, have, want in zip(shape, mm, wanted, strict=True)
        ]
        scale = [want / have for have, want in zip(mm, wanted, strict=True)]
        first = [0.0, 0.0, 0.0]
    else:
        sizes = [round(have / want * n) for n, have, want in zip(shape, mm, wanted, strict=True)]
        scale = [n / max(1, m) for n, m in zip(shape, sizes, strict=True)]
        first = [(s - 1) / 2 for s in scale]
    _check_size(state, sizes)
    if tuple(sizes) != shape or any(abs(s - 1) > TINY for s in scale):
        coarse = _coarse(step, mm, wanted)
        orders: list[int] = [step.order] * 3
        if coarse is not None and step.coarse_order is not None:
            orders[coarse] = step.coarse_order
        state.values = _resampled(state.values, sizes, first, scale, orders, coarse)
    _reshape_mask(
        state,
        lambda mask: Grid(
            (sizes[0], sizes[1], sizes[2]),
            (shape[0], shape[1], shape[2]),
            (1 / scale[0], 1 / scale[1], 1 / scale[2]),
        ).to_native(mask),
    )
    back = _coarse(step, wanted, mm) if step.coarse_order == 0 else None
    state.axes = [
        replace(axis.moved(at, n, s), nearest=axis.nearest or number == back)
        for number, (axis, at, n, s) in enumerate(zip(state.axes, first, sizes, scale, strict=True))
    ]


def _coarse(step: Space, mm: list[float], wanted: list[float]) -> int | None:
    """The coarse axis that nnU-Net takes by itself when it goes from one spacing to another."""
    if step.coarse_order is None:
        return None
    for spacing in (mm, wanted):
        if max(spacing) / min(spacing) > ANISOTROPIC:
            coarse = [axis for axis in range(3) if spacing[axis] == max(spacing)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def _resampled(
    values: Tensor,
    sizes: list[int],
    first: list[float],
    scale: list[float],
    orders: list[int],
    coarse: int | None = None,
) -> Tensor:
    """Separably, the ``coarse`` axis last: what lies in its planes is resampled plane by plane."""
    if orders == [1, 1, 1]:
        grid = Grid(
            (values.shape[0], values.shape[1], values.shape[2]),
            (sizes[0], sizes[1], sizes[2]),
            (scale[0], scale[1], scale[2]),
            (first[0], first[1], first[2]),
        )
        return resample(values.numpy(), grid)
    array = values.float().numpy()
    fine = [axis for axis in range(3) if axis != coarse]
    over = tuple(fine)  # a cubic spline overshoots; the originals clip it (skimage's resize)
    low, high = array.min(over, keepdims=True), array.max(over, keepdims=True)
    for axis in fine:
        array = _along(array, axis, _places(sizes[axis], first[axis], scale[axis]), orders[axis])
    if 3 in [orders[axis] for axis in fine]:
        array = np.clip(array, low, high)
    if coarse is not None:
        places = _places(sizes[coarse], first[coarse], scale[coarse])
        array = _along(array, coarse, places, orders[coarse])
    return torch.from_numpy(np.ascontiguousarray(array))


def _places(size: int, first: float, scale: float) -> npt.NDArray[np.float64]:
    """Where each voxel of a new grid lies; rounded as the originals do where edges stay."""
    along = np.arange(size, dtype=np.float64)
    if first == (scale - 1) / 2:
        return scale * (along + 0.5) - 0.5
    return along * scale + first


def _along(array: Array, axis: int, places: npt.NDArray[np.float64], order: int) -> Array:
    """Values at fractional places along one axis, by a spline whose ends are mirrored."""
    if np.array_equal(places, np.arange(array.shape[axis])):
        return array
    if order < 3:
        places = np.clip(places, 0, array.shape[axis] - 1)
    if order == 0 or array.shape[axis] == 1:
        at = np.clip(np.floor(places + 0.5), 0, array.shape[axis] - 1)
        return array.take(at.astype(np.intp), axis)
    edge = 12 if order == 3 else 0  # voxels repeated at the ends, as nearest ends have it
    padded = np.pad(array, [(edge, edge) if n == axis else (0, 0) for n in range(3)], mode="edge")
    if order == 3:
        padded = ndimage.spline_filter1d(padded, 3, axis, output=np.float32, mode="mirror")
    low = np.floor(places).astype(np.intp)
    t: Array = (places - low).astype(np.float32)
    if order == 1:
        shares: list[Array] = [1 - t, t]
        offsets = [0, 1]
    else:
        shares = [
            (1 - t) ** 3 / 6,
            (4 - 6 * t**2 + 3 * t**3) / 6,
            (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6,
            t**3 / 6,
        ]
        offsets = [-1, 0, 1, 2]
    shape = [1, 1, 1]
    shape[axis] = -1
    total = np.zeros(
        [len(places) if n == axis else size for n, size in enumerate(array.shape)], np.float32
    )
    for offset, share in zip(offsets, shares, strict=True):
        index = np.clip(low + offset + edge, 0, padded.shape[axis] - 1)
        total += padded.take(index, axis) * share.reshape(shape)
    return total


def _resize(state: _State, step: Resize) -> None:
    _check_size(state, list(step.size))
    scale = [n / m for n, m in zip(state.values.shape, step.size, strict=True)]
    whole = state.values.float()[None, None]
    state.values = F.interpolate(whole, step.size, mode="nearest-exact")[0, 0]
    state.outside = None
    state.axes = [
        axis.moved((s - 1) / 2, m, s)
        for axis, m, s in zip(state.axes, step.size, scale, strict=True)
    ]


def _cut(state: _State, step: Cut) -> None:
    spans = [
        (min(start, n), min(stop, n))
        for start, stop, n in zip(step.start, step.stop, state.values.shape, strict=True)
    ]
    box = tuple(slice(*span) for span in spans)
    state.values = state.values[box]
    _reshape_mask(state, lambda mask: mask[box])
    state.axes = [axis.cropped(*span) for axis, span in zip(state.axes, spans, strict=True)]


def _conform(state: _State, step: Conform) -> None:
    mm, shape = state.mm(), state.values.shape
    scale = [want / have for want, have in zip(step.mm, mm, strict=True)]
    first = [(n - 1) / 2 - (m - 1) / 2 * s for n, m, s in zip(shape, step.size, scale, strict=True)]
    low = [max(0, math.ceil((-0.5 - at) / s)) for at, s in zip(first, scale, strict=True)]
    high = [
        min(m, math.floor((n - 0.5 - at) / s) + 1)
        for n, m, at, s in zip(shape, step.size, first, scale, strict=True)
    ]
    inner = [at + start * s for at, start, s in zip(first, low, scale, strict=True)]
    sizes = [stop - start for start, stop in zip(low, high, strict=True)]
    values = _resampled(state.values, sizes, inner, scale, [1, 1, 1])
    whole = torch.zeros(step.size)
    whole[tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))] = values
    state.values = whole
    state.outside = None
    state.axes = [
        axis.moved(at, n, s)
        for axis, at, n, s in zip(state.axes, first, step.size, scale, strict=True)
    ]


def _crop(state: _State, step: Crop) -> None:
    values = state.values
    inside = values > 0 if step.above else values != 0
    if not step.above:  # nnU-Net counts holes as inside, and remembers what is not
        filled = ndimage.binary_fill_holes(inside.numpy())
        inside = torch.from_numpy(filled)
    spans = []
    for axis in range(3):
        dims = [n for n in range(3) if n != axis]
        found = inside.any(dims[1]).any(dims[0]).nonzero().flatten()
        if not len(found):
            raise InputError(
                f"series {state.volume.series.id}: no voxel is {'above' if step.above else 'un'}"
                f"{' ' if step.above else 'equal '}0, so there is nothing to crop to",
                reason="empty",
            )
        spans.append(_span(step, axis, (int(found[0]), int(found[-1]) + 1), values.shape[axis]))
    there = [(max(0, a), min(n, b)) for (a, b), n in zip(spans, values.shape, strict=True)]
    box = tuple(slice(*span) for span in there)
    state.values = values[box]
    if not step.above:
        state.outside = ~inside.numpy()[box]
    else:
        _reshape_mask(state, lambda mask: mask[box])
    state.axes = [axis.cropped(*span) for axis, span in zip(state.axes, there, strict=True)]
    _widen(
        state,
        [a - low for (low, _), (a, _) in zip(spans, there, strict=True)],
        [high - b for (_, high), (_, b) in zip(spans, there, strict=True)],
    )


def _span(step: Crop, axis: int, found: tuple[int, int], size: int) -> tuple[int, int]:
    """First index and the one after the last that a crop asks for; they may lie outside."""
    low, high = found[0] - step.margin[axis], found[1] + step.margin[axis]
    if not step.beyond:
        low, high = max(0, low), min(size, high)
    wanted = -(-(high - low) // step.multiple[axis]) * step.multiple[axis]
    low -= (wanted - (high - low)) // 2
    return low, low + wanted


def _pad(state: _State, step: Pad) -> None:
    before, behind = [], []
    for size, least, multiple in zip(state.values.shape, step.least, step.multiple, strict=True):
        wanted = -(-max(size, least) // multiple) * multiple
        before.append((wanted - size) // 2)
        behind.append(wanted - size - (wanted - size) // 2)
    _widen(state, before, behind, step.value, step.mode)


def _widen(
    state: _State, before: list[int], behind: list[int], value: float = 0.0, mode: str = "constant"
) -> None:
    """Add voxels around the volume."""
    if not any(before) and not any(behind):
        return
    _check_size(
        state, [a + n + b for a, n, b in zip(before, state.values.shape, behind, strict=True)]
    )
    widths = [w for pair in zip(before[::-1], behind[::-1], strict=True) for w in pair]
    values = state.values.float()[None, None]
    if mode == "replicate":
        state.values = F.pad(values, widths, mode="replicate")[0, 0]
    else:
        state.values = F.pad(values, widths, value=value)[0, 0]
    _reshape_mask(
        state,
        lambda mask: np.pad(mask, list(zip(before, behind, strict=True)), constant_values=True),
    )
    state.axes = [
        axis.moved(-a, axis.size + a + b)
        for axis, a, b in zip(state.axes, before, behind, strict=True)
    ]


def _reshape_mask(
    state: _State, change: Callable[[npt.NDArray[np.bool_]], npt.NDArray[Any]]
) -> None:
    if state.outside is not None:
        state.outside = change(state.outside).astype(bool)


def _clip(state: _State, step: Clip) -> None:
    state.values = state.values.float().clamp(step.low, step.high)


def _scale(state: _State, step: Scale) -> None:
    values = state.values.float()
    if step.low is None or step.high is None:
        low, high = float(values.min()), float(values.max())
    elif step.percentiles:
        low, high = (float(v) for v in np.percentile(values.numpy(), [step.low, step.high]))
    else:
        low, high = step.low, step.high
    start, stop = step.to
    if high - low == 0:
        state.values = values - low + start
    else:
        state.values = values.sub(low).div_(high - low).mul_(stop - start).add_(start)
    if step.clip:
        state.values = state.values.clamp_(min(start, stop), max(start, stop))


def _normalise(state: _State, step: Normalise) -> None:
    values = state.values.float()
    if step.nonzero:
        if step.filled and state.outside is not None:
            chosen = torch.from_numpy(~state.outside)
        else:
            chosen = values != 0
        if not bool(chosen.any()):
            return
        picked = values[chosen]
    else:
        chosen, picked = None, values
    mean = float(picked.double().mean()) if step.mean is None else step.mean
    deviation = (
        float(picked.double().std(correction=0)) if step.deviation is None else step.deviation
    )
    done = (picked - mean) / (deviation or 1.0)
    if chosen is None:
        state.values = done
    else:
        state.values = values.masked_scatter(chosen, done)


def _affine(state: _State, step: Affine) -> None:
    state.values = state.values.float() * step.factor + step.offset


def _check_size(state: _State, sizes: list[int]) -> None:
    if min(sizes) < 1 or math.prod(sizes) > MOST_VOXELS:
        raise InputError(
            f"series {state.volume.series.id} would have {' x '.join(map(str, sizes))} voxels as "
            f"the network takes it, expected 1 to {MOST_VOXELS}",
            reason="size",
        )


_STEPS: dict[type[Any], Callable[[_State, Any], None]] = {
    Orient: _orient,
    Transpose: _transpose,
    Space: _space,
    Resize: _resize,
    Cut: _cut,
    Conform: _conform,
    Crop: _crop,
    Pad: _pad,
    Clip: _clip,
    Scale: _scale,
    Normalise: _normalise,
    Affine: _affine,
}
