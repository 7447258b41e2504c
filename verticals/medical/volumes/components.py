"""Connected components of masks, numbered in two bytes a voxel where that is enough."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Bool = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.integer[Any]]


def components(mask: Bool, structure: npt.NDArray[Any] | None = None) -> tuple[Numbers, int]:
    """Number the connected components of a mask.

    Args:
        mask: of any shape.
        structure: which neighbours of a voxel belong to it, 3 along each axis; those that share a
            face by default.

    Returns:
        The number of each voxel's component, from 1, or 0 outside of the mask; and how many there
        are.
    """
    numbers = np.empty(mask.shape, np.uint16)
    try:
        count = ndimage.label(mask, structure, output=cast(npt.NDArray[np.int32], numbers))
        return numbers, int(count)
    except RuntimeError:  # SciPy's word for more components than the output can count
        labels, many = ndimage.label(mask, structure)
        return labels, int(many)
