"""Slices lie where their positions say, and what is odd is said in millimetres."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.discover import discover
from plinth.verticals.medical.dicom.geometry import stack
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.phantom.chest import Phantom, rotation_matrix
from plinth.verticals.medical.phantom.dicom import datasets
from plinth.verticals.medical.volumes.orientation import Orientation
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

angles = st.tuples(*[st.floats(-180, 180)] * 3)
steps = st.tuples(*[st.floats(0.1, 10)] * 3)
places = st.tuples(*[st.floats(-2000, 2000)] * 3)
indices = st.lists(st.tuples(*[st.floats(-5, 600)] * 3), min_size=1, max_size=20)


def volume_with(affine: np.ndarray) -> Volume:
    facts = SeriesFacts("x", "CT", "", 1, 1, (1.0, 1.0, 1.0), 1)
    return Volume(np.zeros((1, 1, 1), np.int16), affine, Verdict(), facts)


@given(angles, steps, places, indices)
def test_index_to_lps_and_back(
    turn: tuple[float, ...],
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    points: list[tuple[float, ...]],
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation_matrix(*turn) * np.array(spacing)
    affine[:3, 3] = origin
    volume = volume_with(affine)
    assert volume.lps_to_index(volume.index_to_lps(points)) == pytest.approx(
        np.array(points), abs=1e-6
    )
    assert volume.spacing == pytest.approx(spacing)
    assert volume.voxel_volume_mm3 == pytest.approx(np.prod(spacing))
    assert volume.direction @ volume.direction.T == pytest.approx(np.eye(3), abs=1e-9)


@settings(max_examples=6, deadline=None)
@given(turn=angles, numbers=st.permutations(range(6)))
def test_an_oblique_series_has_its_true_affine_in_any_order(
    turn: tuple[float, float, float],
    numbers: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("oblique")
    phantom = Phantom(shape=(9, 7, 6), spacing=(20.0, 30.0, 25.0), rotation=turn, noise_hu=3)
    for k, image in enumerate(datasets(phantom)):
        image.InstanceNumber = numbers[k]
        image.save_as(folder / f"{numbers[k]}.dcm", enforce_file_format=True)
    volume = load_volume(folder, strict=True)
    row, column, travel = phantom.axes.T
    assert volume.affine[:3, 0] == pytest.approx(row * 20, abs=1e-9)
    assert volume.affine[:3, 1] == pytest.approx(column * 30, abs=1e-9)
    assert volume.affine[:3, 2] == pytest.approx(travel * 25, abs=1e-9)
    assert volume.origin == pytest.approx(phantom.position(0), abs=1e-9)
    for k in range(6):
        assert np.array_equal(volume.voxels[k], np.clip(np.rint(phantom.slice_hu(k)), -1024, 3071))


def test_pixel_spacing_is_row_step_then_column_step(write: Callable[..., Path]) -> None:
    volume = load_volume(write(spacing=(9.0, 8.0, 5.0)))
    assert volume.spacing == pytest.approx((9.0, 8.0, 5.0))
    assert volume.shape == (10, 30, 36)


def test_slices_ascend_along_the_normal_so_the_affine_is_right_handed(
    write: Callable[..., Path],
) -> None:
    volume = load_volume(write(rotation=(180.0, 0.0, 0.0)))
    assert np.linalg.det(volume.affine[:3, :3]) > 0


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (
            lambda image, _: setattr(image, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
            "bad_orientation",
        ),
        (
            lambda image, _: setattr(image, "ImageOrientationPatient", [2, 0, 0, 0, 1, 0]),
            "bad_orientation",
        ),
        (lambda image, _: setattr(image, "PixelSpacing", [0, 1]), "bad_spacing"),
    ],
)
def test_impossible_geometry_is_refused(
    write: Callable[..., Path],
    edit: Callable[..., None],
    spoil: Callable[..., None],
    field: str,
) -> None:
    folder = write()
    edit(folder, spoil)
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    assert refusal.value.reason == field


def steps_of(write: Callable[..., Path], steps: tuple[float, ...]) -> list[tuple[str, str]]:
    folder = write(shape=(8, 8, len(steps) + 1), spacing=(40.0, 40.0, 5.0), steps=steps)
    found = stack(discover(folder)[0].frames)
    return [(issue.kind, issue.message) for issue in found.issues]


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        ((5.0,) * 9, []),
        ((5.0, 5.02, 4.98, 5.0, 5.04), []),
        ((5.0, 5.0, 10.0, 5.0), ["gap"]),
        ((10.0, 5.0, 5.0, 5.0), ["gap"]),
        ((5.0, 5.0, 10.0, 10.0, 5.0), ["gap", "gap"]),
        ((5.0, 5.0, 5.0, 2.5, 2.5, 2.5), ["spacing"]),
        ((4.0, 4.0, 4.0, 1.08, 7.0, 7.0, 7.0), ["spacing"]),
        ((5.0, 5.1, 5.0, 5.0, 15.0, 5.3, 5.0), ["gap", "spacing"]),
    ],
)
def test_missing_slices_are_told_from_another_spacing(
    write: Callable[..., Path], steps: tuple[float, ...], kinds: list[str]
) -> None:
    assert [kind for kind, _ in steps_of(write, steps)] == kinds


def test_a_gap_names_its_place_its_width_and_the_slices_missing(
    write: Callable[..., Path],
) -> None:
    ((kind, message),) = steps_of(write, (5.0, 5.0, 15.0, 5.0))
    assert kind == "gap"
    assert message == "2 slices missing between slices 2 and 3: 15.000 mm where 5.000 mm is usual"


signed_axes = [
    (order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), signed_axes)
def test_any_of_the_48_ways_to_cut_is_turned_to_patient_axes(
    order: tuple[int, int, int], signs: tuple[int, int, int]
) -> None:
    """Each voxel holds a number made of its place in the patient; turned, all ascend."""
    spacing = np.array([1.0, 2.0, 3.0])
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs * spacing
    k, j, i = np.indices((4, 3, 2))
    places = np.stack([i, j, k], -1) @ affine[:3, :3].T
    voxels = places @ [1, 100, 10_000]
    orientation = Orientation.of(affine)
    turned = orientation.to_patient(voxels)
    for axis, step in enumerate((10_000, 100, 1)):
        mm = orientation.spacing((1.0, 2.0, 3.0))[axis]
        assert np.diff(turned, axis=axis) == pytest.approx(mm * step)
    assert np.array_equal(orientation.from_patient(turned), voxels)
    assert orientation.lean == pytest.approx(0, abs=1e-5)
