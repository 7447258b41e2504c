"""Sizes of regions, against the published baseline of pyradiomics and against formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from plinth.verticals.medical.volumes.shape import shape_of


def test_a_real_region_has_the_published_volume_and_diameter(real: Callable[[str], Path]) -> None:
    """25 slices of 6.5 mm, pixels of 0.78 mm; values of the same project's baseline."""
    sitk = pytest.importorskip("SimpleITK")
    label = sitk.ReadImage(str(next(real("mr-brain1").rglob("brain1_label.nrrd"))))
    shape = shape_of(sitk.GetArrayFromImage(label) > 0, label.GetSpacing())
    assert shape.volume_mm3 == pytest.approx(16412.658691406243, rel=1e-9)
    assert shape.diameter_mm == pytest.approx(69.6009903059, rel=1e-9)


def test_a_ball_has_its_formulas() -> None:
    z, y, x = np.mgrid[:60, :60, :30]
    inside = (z - 29.5) ** 2 + (y - 29.5) ** 2 + (2 * (x - 14.5)) ** 2 < 25**2
    shape = shape_of(inside, (2.0, 1.0, 1.0))
    assert shape.volume_mm3 == pytest.approx(4 / 3 * math.pi * 25**3, rel=0.01)
    assert shape.diameter_mm == pytest.approx(50, abs=2)  # a voxel's longer side


def test_one_voxel_is_as_long_as_its_longest_side() -> None:
    shape = shape_of(np.ones((1, 1, 1), bool), (0.7, 0.8, 5.0))
    assert (shape.voxels, shape.diameter_mm) == (1, pytest.approx(5.0))


@given(bits=st.lists(st.booleans(), min_size=36, max_size=36).filter(any))
def test_the_diameter_is_the_longest_of_all_pairs(bits: list[bool]) -> None:
    """Of all midpoints between a voxel inside and one outside."""
    inside, step = np.array(bits).reshape(3, 4, 3), np.array([3.0, 0.5, 1.0])
    padded, points = np.pad(inside, 1), []
    for axis in range(3):
        turned = np.diff(padded.astype(int), axis=axis) != 0
        points.append(np.argwhere(turned) + 0.5 * np.eye(3)[axis])
    longest = pdist(np.concatenate(points) * step).max()
    assert shape_of(inside, (1.0, 0.5, 3.0)).diameter_mm == pytest.approx(longest)
