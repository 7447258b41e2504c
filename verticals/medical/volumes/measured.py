"""What is measured of each labelled structure of a volume, and what it is told as."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from plinth.engine.parallel import spread
from plinth.verticals.medical.volumes.labelled import Box, Patch, boxes_of, mask_of
from plinth.verticals.medical.volumes.shape import (
    Mask,
    Shape,
    ValueStatistics,
    shape_of,
    statistics_of,
    values_within,
)
from plinth.verticals.medical.volumes.volume import Volume

Voxels = npt.NDArray[np.generic]

DIGITS = 7
"""Significant digits of what is told."""


class Range(BaseModel):
    """How far a measured value may be off, in its own unit.

    Args:
        lower: below it.
        upper: above it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lower: float
    upper: float


class Measured(BaseModel):
    """Size and values of one structure; see :class:`plinth.verticals.medical.volumes.shape.Shape`.

    Args:
        title: the structure, as its segment is called.
        unit: of the values, such as ``"HU"``; empty where it is not known.
        voxels: how many it has.
        volume_ml: of its voxels.
        mesh_volume_ml: inside its surface.
        surface_cm2: area of its surface.
        sphericity: 1 for a ball.
        diameter_mm: the largest distance in it.
        diameter_slice_mm: the largest in one slice.
        diameter_column_mm: the largest at one row index.
        diameter_row_mm: the largest at one column index.
        values: statistics of its voxels' values, in ``unit``.
        uncertainty: by name, of volumes, diameters and the mean: what half a voxel at the surface
            makes. Whether a voxel at the surface belongs to the structure is known to half of it:
            volumes lose or gain half of the voxels that have a face on the other side, the mean
            is taken again with these counted half, and a diameter ends half a voxel away at
            either end. It says nothing of whether the structure is the right one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    unit: str
    voxels: int
    volume_ml: float
    mesh_volume_ml: float
    surface_cm2: float
    sphericity: float
    diameter_mm: float
    diameter_slice_mm: float
    diameter_column_mm: float
    diameter_row_mm: float
    values: ValueStatistics
    uncertainty: dict[str, Range]


def measured(
    volume: Volume,
    labels: npt.NDArray[np.uint8],
    titles: Mapping[int, tuple[str, str]],
    patches: Sequence[Patch] = (),
) -> dict[str, Measured]:
    """Measure the labelled structures of a volume; those without voxels are left out.

    Args:
        volume: whose values they have.
        labels: (z, y, x) on its grid; slices that were interpolated hold none.
        titles: key and title of a structure by its label.
        patches: structures over the labels, each of a label that they do not hold.

    Returns:
        By key, in the order of ``titles``.
    """
    boxes = boxes_of(labels, list(titles)) | {patch.label: patch.box for patch in patches}

    def one_of(label: int) -> Measured | None:
        box = boxes[label]
        inside = mask_of(label, labels, box, patches)
        title = titles[label][1]
        return _measured(title, volume, inside, box) if inside.any() else None

    present = [label for label in titles if label in boxes]
    found = zip(present, spread(one_of, present), strict=True)
    return {titles[label][0]: one for label, one in found if one is not None}


def _measured(title: str, volume: Volume, inside: Mask, box: Box) -> Measured:
    """Measure a structure.

    Args:
        title: of it.
        volume: whose values it has.
        inside: (z, y, x), its box with a margin of one voxel on all sides.
        box: of the volume.
    """
    shape = shape_of(inside, volume.spacing)
    found, counts = values_within(volume.voxels[box], inside[1:-1, 1:-1, 1:-1])
    statistics = {
        name: _rounded(value) for name, value in asdict(statistics_of(found, counts)).items()
    }
    total = float((found * counts).sum())
    near, around = zip(*map(_margin, box, volume.shape), strict=True)
    return Measured(
        title=title,
        unit=volume.series.units,
        voxels=shape.voxels,
        volume_ml=_rounded(shape.volume_mm3 / 1000),
        mesh_volume_ml=_rounded(shape.mesh_volume_mm3 / 1000),
        surface_cm2=_rounded(shape.surface_mm2 / 100),
        sphericity=_rounded(shape.sphericity),
        diameter_mm=_rounded(shape.diameter_mm),
        diameter_slice_mm=_rounded(shape.diameter_slice_mm),
        diameter_column_mm=_rounded(shape.diameter_column_mm),
        diameter_row_mm=_rounded(shape.diameter_row_mm),
        values=ValueStatistics(**statistics),
        uncertainty={
            name: Range(lower=_rounded(lower), upper=_rounded(upper))
            for name, (lower, upper) in _uncertain(
                shape, total, volume, _at_surface(inside[near], volume.voxels[around])
            ).items()
        },
    )


def _margin(span: slice, size: int) -> tuple[slice, slice]:
    """A span and the voxels beside it that the volume has: in an array with a margin of one
    voxel on both sides, and in the volume."""
    low, high = min(1, span.start), min(1, size - span.stop)
    ours = slice(1 - low, 1 + span.stop - span.start + high)
    return ours, slice(span.start - low, span.stop + high)


def _uncertain(
    shape: Shape,
    total: float,
    volume: Volume,
    surface: tuple[tuple[int, float], tuple[int, float]],
) -> dict[str, tuple[float, float]]:
    """Below and above each value that depends on where the surface lies: half a voxel.

    Args:
        shape: of the region.
        total: sum of its values.
        volume: whose grid it is on.
        surface: of :func:`_at_surface`.
    """
    (inner, inner_sum), (outer, outer_sum) = surface
    x, y, z = volume.spacing
    ml = x * y * z / 1000
    mean = total / shape.voxels
    less = (total - inner_sum / 2) / (shape.voxels - inner / 2)
    more = (total + outer_sum / 2) / (shape.voxels + outer / 2)
    ends = {
        "diameter_mm": math.hypot(x, y, z),
        "diameter_slice_mm": math.hypot(x, y),
        "diameter_column_mm": math.hypot(x, z),
        "diameter_row_mm": math.hypot(y, z),
    }
    return {
        "volume_ml": (inner / 2 * ml, outer / 2 * ml),
        "mesh_volume_ml": (min(inner / 2 * ml, shape.mesh_volume_mm3 / 1000), outer / 2 * ml),
        **{name: (min(end, getattr(shape, name)), end) for name, end in ends.items()},
        "mean": (mean - min(mean, less, more), max(mean, less, more) - mean),
    }


def _at_surface(inside: Mask, voxels: Voxels) -> tuple[tuple[int, float], tuple[int, float]]:
    """Voxels with a face on the surface, inside and outside of it: how many, and their sum.

    Beyond the array everything goes on as at its border: where the images end is no surface.
    """
    counts, sums = [0, 0], [0.0, 0.0]
    for z, plane in enumerate(inside):
        above, below = inside[max(0, z - 1)], inside[min(len(inside) - 1, z + 1)]
        near, full = plane.copy(), plane.copy()
        for to, of in _STEPS:
            near[to] |= plane[of]
            full[to] &= plane[of]
        near |= above | below
        full &= above & below
        for side, shell in enumerate((plane & ~full, near & ~plane)):
            counts[side] += int(np.count_nonzero(shell))
            sums[side] += float(voxels[z][shell].sum(dtype=np.float64))
    return (counts[0], sums[0]), (counts[1], sums[1])


_BEFORE, _AFTER, _ALL = slice(None, -1), slice(1, None), slice(None)
_STEPS = (
    *((_BEFORE, _AFTER), (_AFTER, _BEFORE)),
    *(((_ALL, _BEFORE), (_ALL, _AFTER)), ((_ALL, _AFTER), (_ALL, _BEFORE))),
)
"""Rows and columns of a plane, and those beside them."""


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
