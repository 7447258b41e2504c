"""Sizes of regions, against the published baseline of pyradiomics and against formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage, stats
from scipy.spatial.distance import cdist, pdist

from plinth.verticals.medical.volumes.shape import shape_of, values_of

PUBLISHED = {
    "volume_mm3": 16412.658691406243,
    "mesh_volume_mm3": 16149.4954427,
    "surface_mm2": 6433.7343171,
    "sphericity": 0.480242186182,
    "diameter_mm": 69.6009903059,
    "diameter_slice_mm": 53.5939777692,
    "diameter_column_mm": 49.4908549791,
    "diameter_row_mm": 65.8890595172,
    "mean": 825.2354363065023,
    "standard_deviation": 24527.07920837261**0.5,
    "minimum": 468.0,
    "percentile_10": 632.0,
    "median": 812.0,
    "percentile_90": 1044.4,
    "maximum": 1266.0,
    "interquartile_range": 253.0,
    "mean_absolute_deviation": 133.44726195252767,
    "skewness": 0.27565085908587594,
    "kurtosis": 2.1807729393860265,
    "entropy": 4.601935553903797,
    "uniformity": 0.045156963555862184,
}
"""Of the region brain1, data/baseline of AIM-Harvard/pyradiomics."""

MESH = ("mesh_volume_mm3", "surface_mm2", "sphericity")
"""These were published before the last change of pyradiomics' own table of triangles."""


def test_a_real_region_has_the_published_values(real: Callable[[str], Path]) -> None:
    """25 slices of 6.5 mm, pixels of 0.78 mm."""
    sitk = pytest.importorskip("SimpleITK")
    folder = real("mr-brain1") / "mr-brain1"
    label = sitk.ReadImage(str(folder / "brain1_label.nrrd"))
    inside = sitk.GetArrayFromImage(label) > 0
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "brain1_image.nrrd")))[inside]
    found = asdict(shape_of(inside, label.GetSpacing())) | asdict(values_of(values))
    for name, value in PUBLISHED.items():
        assert found[name] == pytest.approx(value, rel=1e-3 if name in MESH else 1e-9), name


def test_one_voxel_is_an_octahedron() -> None:
    x, y, z = 0.7, 0.8, 5.0
    shape = shape_of(np.ones((1, 1, 1), bool), (x, y, z))
    assert shape.mesh_volume_mm3 == pytest.approx(x * y * z / 6)
    assert shape.surface_mm2 == pytest.approx(np.sqrt((x * y) ** 2 + (y * z) ** 2 + (z * x) ** 2))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_block_has_its_formulas_however_it_lies(axes: tuple[int, ...]) -> None:
    """Faces lie half a voxel out; edges are bevelled between the middles of the border voxels."""
    inside = np.pad(np.ones((4, 5, 6), bool), ((3, 0), (0, 2), (1, 1))).transpose(axes)
    shape = shape_of(inside, (1.0, 1.0, 1.0))
    bevels, corners = 4 * (3 + 4 + 5), 8
    assert shape.mesh_volume_mm3 == pytest.approx(4 * 5 * 6 - bevels / 8 - corners * 5 / 48)
    faces = 2 * (3 * 4 + 4 * 5 + 5 * 3)
    area = faces + bevels * 0.5**0.5 + corners * 3**0.5 / 8
    assert shape.surface_mm2 == pytest.approx(area)


def test_a_ball_has_its_formulas() -> None:
    z, y, x = np.mgrid[:60, :60, :30]
    inside = (z - 29.5) ** 2 + (y - 29.5) ** 2 + (2 * (x - 14.5)) ** 2 < 25**2
    shape = shape_of(inside, (2.0, 1.0, 1.0))
    assert shape.volume_mm3 == pytest.approx(4 / 3 * math.pi * 25**3, rel=0.01)
    assert shape.mesh_volume_mm3 == pytest.approx(shape.volume_mm3, rel=0.01)
    for name in ("diameter_mm", "diameter_slice_mm", "diameter_column_mm", "diameter_row_mm"):
        assert asdict(shape)[name] == pytest.approx(50, abs=2), "a voxel's longer side"


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
    corners = np.concatenate(points) * step
    shape = shape_of(inside, (1.0, 0.5, 3.0))
    assert shape.diameter_mm == pytest.approx(pdist(corners).max())
    in_planes = (shape.diameter_slice_mm, shape.diameter_column_mm, shape.diameter_row_mm)
    for axis, found in enumerate(in_planes):
        planes = [corners[corners[:, axis] == at] for at in np.unique(corners[:, axis])]
        longest = max(pdist(plane).max() for plane in planes if len(plane) > 1)
        assert found == pytest.approx(longest)


def test_a_rough_region_loses_no_end_to_the_choice_of_corners() -> None:
    rough = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(22, 26, 30)), 1.5)
    inside, step = rough > rough.std(), np.array([1.5, 0.7, 0.9])
    corners = [
        np.argwhere(np.diff(np.pad(inside, 1).astype(int), axis=axis)) + 0.5 * np.eye(3)[axis]
        for axis in range(3)
    ]
    every = np.concatenate(corners) * step
    assert shape_of(inside, (0.9, 0.7, 1.5)).diameter_mm == cdist(every, every).max()


@given(
    st.one_of(
        arrays(np.int16, st.integers(1, 60), elements=st.integers(-32768, 32767)),
        arrays(np.int16, st.integers(1, 60), elements=st.integers(-60, 60)),
        arrays(
            np.float32, st.integers(1, 60), elements=st.integers(-999, 999).map(lambda v: v / 8)
        ),
    )
)
def test_statistics_are_those_of_numpy_and_scipy(values: np.ndarray) -> None:
    found, wide = values_of(values), values.astype(np.float64)
    percentiles = np.percentile(wide, [10, 25, 50, 75, 90])
    assert found.mean == pytest.approx(wide.mean(), abs=1e-9)
    assert found.standard_deviation == pytest.approx(wide.std(), abs=1e-9)
    assert (found.minimum, found.maximum) == (wide.min(), wide.max())
    told = (found.percentile_10, found.median, found.percentile_90, found.interquartile_range)
    p10, p25, p50, p75, p90 = percentiles
    assert told == pytest.approx((p10, p50, p90, p75 - p25), abs=1e-6)
    if wide.min() < wide.max():
        assert found.skewness == pytest.approx(stats.skew(wide), abs=1e-6)
        assert found.kurtosis == pytest.approx(stats.kurtosis(wide, fisher=False), abs=1e-6)
    _, counts = np.unique(np.floor(wide / 25), return_counts=True)
    assert found.entropy == pytest.approx(stats.entropy(counts, base=2), abs=1e-9)
    assert found.uniformity == pytest.approx(((counts / len(wide)) ** 2).sum())
