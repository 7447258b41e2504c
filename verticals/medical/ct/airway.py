"""The trachea and main bronchi, followed from above, plane by plane."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]

SEED_MM2 = (40.0, 900.0)
LARGEST_MM2 = 1200.0
FROM_MIDDLE_MM = 45.0
SHORTEST_MM = 25.0
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))])


def labels_in_plane(mask: Bool) -> tuple[Labels, int]:
    """Connected components within each plane z of (z, y, x), and their number."""
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, IN_PLANE, output=labels)
    return labels, int(count)


def voxels_of(labels: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Voxels of each label from 0 to ``count``, plane by plane: counting copies what it counts."""
    found = np.zeros(count + 1, np.int64)
    for plane in labels:
        found += np.bincount(plane.ravel(), minlength=count + 1)
    return found


def airway(air: Bool, spacing: float) -> Bool:
    """Air of the trachea and main bronchi.

    A round region of air near the middle is followed from above through overlapping regions of
    the next planes, branches included, until a region is as large as a lung's section.

    Args:
        air: (superior, posterior, left) air inside the body.
        spacing: mm, isotropic.

    Returns:
        Mask of the same shape; empty when nothing is followed for SHORTEST_MM.
    """
    labels, count = labels_in_plane(air)
    none = np.zeros_like(air)
    if count == 0:
        return none
    area = voxels_of(labels, count) * spacing**2
    filled = np.flatnonzero(air.any(axis=(1, 2)))
    x = np.nonzero(air.any(axis=(0, 1)))[0]
    middle = (x[0] + x[-1]) / 2
    tried: set[int] = set()
    for plane in filled[::-1]:
        for seed in np.unique(labels[plane]):
            if seed == 0 or seed in tried:
                continue
            if not _is_seed(labels[plane] == seed, float(area[seed]), float(middle), spacing):
                continue
            chain = _follow(labels, area, int(plane), int(seed))
            tried.update(part for level in chain for part in level)
            if len(chain) * spacing >= SHORTEST_MM:
                followed = np.zeros(count + 1, bool)
                followed[[part for level in chain for part in level]] = True
                return cast(Bool, followed[labels])
    return none


def _is_seed(region: Bool, area: float, middle: float, spacing: float) -> bool:
    """Whether a region (y, x) has the size, place and form of a trachea."""
    if not SEED_MM2[0] <= area <= SEED_MM2[1]:
        return False
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    height, width = (float(hit[-1] - hit[0] + 1) for hit in (rows, columns))
    centre = (columns[0] + columns[-1]) / 2
    round_enough = max(height, width) <= 2.5 * min(height, width)
    full_enough = area / spacing**2 >= 0.5 * height * width
    return bool(round_enough and full_enough and abs(centre - middle) * spacing <= FROM_MIDDLE_MM)


def _follow(
    labels: Labels, area: npt.NDArray[np.floating[Any]], plane: int, seed: int
) -> list[list[int]]:
    """Labels of the regions by plane, downwards from a seed."""
    chain = [[seed]]
    for below in range(plane - 1, -1, -1):
        before = np.isin(labels[below + 1], chain[-1])
        limit = min(LARGEST_MM2, 1.6 * float(area[chain[-1]].sum()) + 100)
        touched = np.unique(labels[below][before])
        level = [int(part) for part in touched if part and area[part] <= limit]
        if not level:
            break
        chain.append(level)
    return chain
