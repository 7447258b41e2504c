"""Lung that is too dense to be found: where a lung ends well before the ribs beside it.

Above the diaphragm a lung reaches the ribs at its side and its back to within the pleura and the
chest wall's muscle. What lies between is pleural effusion, a mass or consolidation at the wall. A
mass beside the mediastinum cannot be told from it by its shape, and is not found here.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float64]

ANGLES = np.radians(np.arange(-45, 106, 5))
"""Directions from a lung's middle: 0 to the side, 90 to the back."""

REACH_MM, RIB_PITCH_MM = 160.0, 16.0
"""Length of a ray; ribs this far above or below bound the lung in a plane as well."""

WALL_MM, GAP_MM, MIN_ML = 8.0, 25.0, 5.0
"""Usual tissue between lung and rib; beyond which gap it is unusual; least volume that is told."""

APEX_MM, WIDE = 30.0, 0.8
"""A lung leaves the ribs near its top, and below the planes of this share of its largest area."""


def opaque_ml(lung: Bool, bone: Bool, spacing: float, *, right: bool) -> float:
    """Volume between a lung and the ribs that ought to be lung, in mL; 0 where it is ordinary.

    Args:
        lung: (superior, posterior, left) on an isotropic grid, one lung.
        bone: ribs and other bone, on the same grid.
        spacing: mm per voxel.
        right: the lung is the right one.
    """
    area = lung.sum(axis=(1, 2)).astype(float)
    if not area.any():
        return 0.0
    wide = int(np.flatnonzero(area >= WIDE * area.max())[0])
    top = int(np.flatnonzero(area > 0.1 * area.max())[-1])
    planes = np.arange(wide, top + 1 - round(APEX_MM / spacing))
    planes = planes[area[planes] > 0]
    if len(planes) < 3:
        return 0.0
    radii = np.arange(0.0, REACH_MM, spacing)
    ends = np.stack([_ends(lung[z], bone, z, radii / spacing, right) for z in planes])
    lung_mm, rib_mm = ends[..., 0] * spacing, ends[..., 1] * spacing
    reach = max(1, round(RIB_PITCH_MM / spacing))
    rib_mm = ndimage.minimum_filter1d(rib_mm, 2 * reach + 1, axis=0, mode="nearest")
    inner = np.maximum(lung_mm, rib_mm - WALL_MM)
    wide_gap: Bool = np.isfinite(rib_mm) & (rib_mm - lung_mm > GAP_MM)
    gap: Bool = ndimage.binary_opening(wide_gap, np.ones((3, 3), bool))
    wedge = np.where(gap, inner**2 - lung_mm**2, 0.0) / 2 * np.radians(5) * spacing
    volume = float(wedge.sum()) / 1000
    return volume if volume >= MIN_ML else 0.0


def _ends(lung: Bool, bone: Bool, z: int, steps: Float, right: bool) -> Float:
    """(angles, 2) voxels from the lung's middle to its last voxel, and on to the first bone."""
    row, column = (float(index.mean()) for index in np.nonzero(lung))
    side = -1.0 if right else 1.0
    rows = np.rint(row + np.sin(ANGLES)[:, None] * steps).astype(int)
    columns = np.rint(column + side * np.cos(ANGLES)[:, None] * steps).astype(int)
    inside = (rows >= 0) & (rows < lung.shape[0]) & (columns >= 0) & (columns < lung.shape[1])
    rows, columns = np.where(inside, rows, 0), np.where(inside, columns, 0)
    in_lung = lung[rows, columns] & inside
    last = np.where(in_lung, steps, 0.0).max(axis=1)
    hit = bone[z][rows, columns] & inside & (steps > last[:, None])
    first = np.where(hit.any(axis=1), steps[hit.argmax(axis=1)], np.inf)
    return cast(Float, np.stack([last, first], axis=1))
