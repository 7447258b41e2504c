"""Size of a region of voxels, by the definitions of IBSI and pyradiomics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

Mask = npt.NDArray[np.bool_]

PARTS = 16
"""Parts in which distances are taken, so that not all pairs are held at once."""


@dataclass(frozen=True)
class Shape:
    """Size of a region.

    Args:
        voxels: how many it has.
        volume_mm3: of its voxels (IBSI YEKZ).
        diameter_mm: largest distance between two points of its surface, which runs midway between
            voxels inside and outside (IBSI L0JK "maximum 3D diameter").
    """

    voxels: int
    volume_mm3: float
    diameter_mm: float


def shape_of(mask: Mask, spacing: tuple[float, float, float]) -> Shape:
    """Measure a region.

    Args:
        mask: (z, y, x) of an orthogonal grid, with at least one voxel inside.
        spacing: (x, y, z) mm.
    """
    count = int(np.count_nonzero(mask))
    step = np.array(spacing[::-1], float)
    return Shape(count, count * float(step.prod()), _diameter(mask, step))


def _diameter(mask: Mask, step: npt.NDArray[np.float64]) -> float:
    """Of the outermost midpoints on each line of voxels: all others lie between two of these."""
    points = []
    for axis in range(3):
        lines = np.moveaxis(mask, axis, -1)
        hit = lines.any(axis=-1)
        first = lines.argmax(axis=-1)[hit] - 0.5
        last = lines.shape[-1] - lines[..., ::-1].argmax(axis=-1)[hit] - 0.5
        across = np.argwhere(hit).astype(float)
        points += [np.insert(across, axis, along, axis=1) for along in (first, last)]
    vertices = np.concatenate(points) * step
    outer = vertices[ConvexHull(vertices).vertices]
    return max(
        float(cdist(part, outer).max()) for part in np.array_split(outer, PARTS) if len(part)
    )
