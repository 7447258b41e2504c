"""What is measured of each labelled structure of a volume, and what it is told as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy import ndimage

from plinth.verticals.medical.volumes.shape import ValueStatistics, shape_of, values_of
from plinth.verticals.medical.volumes.volume import Volume

DIGITS = 7
"""Significant digits of what is told."""


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


def measured(
    volume: Volume, labels: npt.NDArray[np.uint8], titles: Mapping[int, tuple[str, str]]
) -> dict[str, Measured]:
    """Measure the labelled structures of a volume; those without voxels are left out.

    Args:
        volume: whose values they have.
        labels: (z, y, x) on its grid; slices that were interpolated hold none.
        titles: key and title of a structure by its label.

    Returns:
        By key, in the order of ``titles``.
    """
    boxes = ndimage.find_objects(labels, max_label=max(titles, default=0))
    found = {}
    for label, (key, title) in titles.items():
        box = boxes[label - 1] if boxes else None
        if box is not None:
            inside = labels[box] == label
            found[key] = _measured(title, volume, inside, volume.voxels[box][inside])
    return found


def _measured(
    title: str, volume: Volume, inside: npt.NDArray[np.bool_], values: npt.NDArray[np.generic]
) -> Measured:
    shape = shape_of(inside, volume.spacing)
    statistics = {name: _rounded(value) for name, value in asdict(values_of(values)).items()}
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
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
