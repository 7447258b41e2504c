"""What is measured in a chest, held against a phantom whose truth comes from formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medical.chests import chest, refilled, turned, values

from plinth.engine import InputError
from plinth.verticals.medical.ct.analysis import (
    BONE_LABEL,
    LUNG_LEFT,
    LUNG_RIGHT,
    Analysis,
    analyse,
    check_ct,
)
from plinth.verticals.medical.ct.findings import density, withheld
from plinth.verticals.medical.phantom.chest import FAT, LUNG, MUSCLE, OUTER, Phantom
from plinth.verticals.medical.vertical import phantom_volume
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

TRUTH = Phantom().truth()
SCANS = {
    "fine": {"shape": (250, 180, 108), "spacing": (1.44, 1.44, 2.0)},
    "thick": {"shape": (200, 160, 44), "spacing": (1.8, 1.8, 5.0)},
    "noisy": {"shape": (180, 150, 108), "spacing": (2.0, 1.9, 2.0), "noise_hu": 40.0},
    "oblique": {"shape": (130, 110, 84), "rotation": (14.0, 9.0, 7.0)},
    "coronal": {"shape": (120, 72, 96), "rotation": (90.0, 0.0, 0.0)},
}


@pytest.fixture(scope="module")
def plain() -> tuple[Volume, Analysis]:
    """One chest and what was found in it."""
    volume = chest()
    return volume, analyse(volume)


def refusal(volume: Volume) -> InputError:
    with pytest.raises(InputError) as caught:
        analyse(volume)
    return caught.value


# -- numbers against the truth ---------------------------------------------------------------
@pytest.mark.parametrize("scan", SCANS)
def test_lung_volume_is_true_within_two_percent(scan: str) -> None:
    found = values(analyse(chest(**SCANS[scan])))
    for side in ("right", "left"):
        true = TRUTH["lungs"][side]["volume_mm3"] / 1000
        assert found[f"lung_{side}_volume"] == pytest.approx(true, rel=0.02), side


def test_body_volume_is_true_within_two_percent(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    length = volume.shape[0] * volume.spacing[2]
    true = math.pi * OUTER[0] * OUTER[1] * length / 1000
    assert values(analysis)["body_volume"] == pytest.approx(true, rel=0.02)


def test_trachea_is_true_within_five_percent() -> None:
    phantom = Phantom(shape=(200, 160, 108), spacing=(1.8, 1.8, 2.0))
    above = phantom.truth()["length_mm"] / 2 - 10  # the trachea ends 10 mm above the middle
    found = values(analyse(phantom_volume(phantom)))
    assert found["airway_volume"] == pytest.approx(math.pi * 9**2 * above / 1000, rel=0.05)


@pytest.mark.parametrize("noise", [20.0, 40.0])
def test_densitometry_agrees_with_the_noise_it_was_given(noise: float) -> None:
    """Lung of one density under Gaussian noise: Perc15 and LAA-950 follow from its quantiles."""
    found = values(analyse(chest(noise_hu=noise, nodules=())))
    below = 0.5 * (1 + math.erf((-950 - 0.5 - LUNG) / noise / math.sqrt(2)))
    # A tenth of the voxels, at 3 mm, hold some of the chest wall and are never that low.
    assert found["lungs_laa950"] == pytest.approx(0.9 * 100 * below, rel=0.05, abs=0.02)
    assert found["lungs_perc15"] == pytest.approx(LUNG - 1.0364 * noise, abs=0.15 * noise)


def test_mean_lung_density_counts_vessels_and_edges_in(plain: tuple[Volume, Analysis]) -> None:
    mean = values(plain[1])["lungs_density"]
    assert mean is not None
    assert LUNG < mean < LUNG + 40


def test_right_is_the_patients_right(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    for label, side in ((LUNG_RIGHT, -1), (LUNG_LEFT, 1)):
        middle = np.argwhere(analysis.labels == label).mean(axis=0)[::-1]
        x = volume.index_to_lps(middle)[0] - TRUTH["body_centre_lps_mm"][0]
        assert x * side == pytest.approx(82, abs=1)


def test_bone_is_dense_and_inside_the_body(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    assert volume.voxels[analysis.labels == BONE_LABEL].min() >= 226
    assert values(analysis)["bone_volume"] == pytest.approx(400, rel=0.2)  # spine and ribs


@pytest.fixture(scope="module")
def small() -> tuple[Volume, Analysis]:
    """A chest at the coarsest that still shows an airway, and what was found in it."""
    volume = chest(shape=(96, 76, 58), spacing=(3.7, 3.7, 3.7))
    return volume, analyse(volume)


@settings(max_examples=3)
@given(
    axes=st.sampled_from(list(permutations(range(3)))),
    flips=st.sampled_from(list(product((False, True), repeat=3))),
)
@pytest.mark.soak
def test_numbers_do_not_depend_on_how_the_array_lies(
    small: tuple[Volume, Analysis], axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    volume, found = small
    plain, other = values(found), values(analyse(turned(volume, axes, flips)))
    for key in ("lung_right_volume", "lung_left_volume", "airway_volume", "lungs_perc15"):
        assert other[key] == pytest.approx(plain[key], rel=2e-3), key


# -- densitometry by itself ------------------------------------------------------------------
@given(
    hu=st.lists(st.integers(-1090, -500), min_size=1, max_size=300),
    shift=st.integers(-9, 9),
)
def test_density_moves_with_the_values(hu: list[int], shift: int) -> None:
    def told(numbers: np.ndarray) -> tuple[float, float, float]:
        counts = np.bincount(numbers + 1100, minlength=700)
        mean, low, perc = (one.value for one in density("x", "x", counts, -1100))
        assert mean is not None
        assert low is not None
        assert perc is not None
        return mean, low, perc

    numbers = np.asarray(hu)
    mean, low, perc = told(numbers)
    assert mean == pytest.approx(numbers.mean(), abs=0.01)
    assert low == pytest.approx(100 * (numbers < -950).mean(), abs=0.01)
    assert numbers.min() - 0.5 <= perc <= numbers.max() + 0.5
    assert (numbers <= perc + 0.5).mean() >= 0.15 - 1e-9
    moved = told(numbers + shift)
    assert moved[0] == pytest.approx(mean + shift, abs=0.02)
    assert moved[2] == pytest.approx(perc + shift, abs=0.02)


def test_no_lung_has_no_density() -> None:
    assert [one.value for one in density("x", "x", np.zeros(700, np.int64), -1100)] == [None] * 3


# -- what is unlike a healthy chest ----------------------------------------------------------
def test_a_body_without_lungs_is_measured_with_a_warning(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    lungs = np.isin(analysis.labels, (LUNG_RIGHT, LUNG_LEFT))
    trachea = (volume.voxels < -400) & (analysis.labels == 0)
    trachea[:, :20] = trachea[:, 70:] = trachea[:, :, :40] = trachea[:, :, 80:] = False
    found = analyse(refilled(volume, lungs | trachea, MUSCLE))
    told = values(found)
    assert told["lungs_volume"] is told["lungs_density"] is told["lungs_laa950"] is None
    assert told["body_volume"] == pytest.approx(values(analysis)["body_volume"], rel=0.01)
    assert any("no lungs of at least 100 mL" in warning for warning in found.warnings)


def test_a_collapsed_lung_is_said_to_be_missing(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    found = analyse(refilled(volume, analysis.labels == LUNG_LEFT, MUSCLE))
    told = values(found)
    assert told["lung_left_volume"] is None
    assert told["lung_right_volume"] == pytest.approx(
        values(analysis)["lung_right_volume"], rel=0.01
    )
    assert any("no left lung" in warning for warning in found.warnings)


def test_lungs_that_touch_are_told_apart(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    bridge = np.zeros(volume.shape, bool)
    bridge[30:42, 34:42, 45:76] = True  # air from lung to lung, in front of the heart
    found = analyse(refilled(volume, bridge, LUNG))
    told, before = values(found), values(analysis)
    assert found.regions.split == "erosion"
    assert told["lung_right_volume"] == pytest.approx(before["lung_right_volume"], rel=0.04)
    assert told["lung_left_volume"] == pytest.approx(before["lung_left_volume"], rel=0.04)


def test_half_a_chest_is_said_to_be_partial() -> None:
    found = analyse(chest(shape=(120, 96, 24)))
    assert any("partial" in warning for warning in found.warnings)


def bowel(volume: Volume, analysis: Analysis, hu: float, spread: float, radius: float) -> Analysis:
    """The body without lungs or airway, with a tube of other air in its middle."""
    lungs = np.isin(analysis.labels, (LUNG_RIGHT, LUNG_LEFT))
    trachea = (volume.voxels < -400) & (analysis.labels == 0)
    trachea[:, :20] = trachea[:, 70:] = trachea[:, :, :40] = trachea[:, :, 80:] = False
    solid = refilled(volume, lungs | trachea, MUSCLE)
    z, y, x = (np.arange(n) - (n - 1) / 2 for n in volume.shape)
    across = (y[:, None] ** 2 + (x[None, :] - 12) ** 2) * 9 < radius**2
    tube = (np.abs(z) * 3 < 80)[:, None, None] & across
    voxels = solid.voxels.copy()
    noise = np.random.default_rng(2).normal(hu, spread, int(tube.sum()))
    voxels[tube] = noise.astype(voxels.dtype)
    return analyse(replace(solid, voxels=voxels))


@pytest.mark.parametrize(
    ("hu", "spread", "radius"),
    [
        pytest.param(-1000, 10, 45, id="gas"),
        pytest.param(-700, 200, 21, id="stool and gas"),
        pytest.param(-700, 200, 35, id="a wide bowel"),
    ],
)
def test_bowel_is_no_lung(
    plain: tuple[Volume, Analysis], hu: float, spread: float, radius: float
) -> None:
    found = bowel(*plain, hu, spread, radius)
    assert values(found)["lungs_volume"] is None
    assert any("no lungs of at least 100 mL" in warning for warning in found.warnings)


def round_view(volume: Volume, radius: float, aside: float) -> Volume:
    """The volume in a round field of view, all in voxels; what is outside is padding."""
    y, x = (np.arange(n) - (n - 1) / 2 for n in volume.shape[1:])
    outside = y[:, None] ** 2 + (x[None, :] - aside) ** 2 > radius**2
    return refilled(volume, np.broadcast_to(outside, volume.shape), -1024)


def cropped(volume: Volume, axis: int, start: int, stop: int) -> Volume:
    index = [slice(None)] * 3
    index[axis] = slice(start, stop)
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 2 - axis] * start
    return replace(volume, voxels=np.ascontiguousarray(volume.voxels[tuple(index)]), affine=affine)


VIEWS: dict[str, Callable[[Volume], Volume]] = {
    "round": lambda volume: round_view(volume, 36, 0),
    "wide round": lambda volume: round_view(volume, 42, 0),
    "round and aside": lambda volume: round_view(volume, 46, 14),
    "from the right": lambda volume: cropped(volume, 2, 24, 120),
    "from the left": lambda volume: cropped(volume, 2, 0, 92),
    "from the front": lambda volume: cropped(volume, 1, 28, 96),
    "from the back": lambda volume: cropped(volume, 1, 0, 66),
    "from below": lambda volume: cropped(volume, 0, 14, 72),
    "from above": lambda volume: cropped(volume, 0, 0, 60),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_field_of_view_that_cuts_a_lung_is_said(
    plain: tuple[Volume, Analysis], name: str
) -> None:
    volume, analysis = plain
    assert not any("field of view" in warning for warning in analysis.warnings)
    found = analyse(VIEWS[name](volume))
    lost = 1 - (values(found)["lungs_volume"] or 0) / (values(analysis)["lungs_volume"] or 1)
    assert lost > 0.005, "this view cuts a lung"
    assert any("field of view" in warning for warning in found.warnings)


def test_an_opaque_part_of_a_lung_is_said_to_be_missing(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    low = analysis.labels == LUNG_LEFT
    low[: volume.shape[0] // 2] = False
    found = analyse(refilled(volume, low, MUSCLE))
    assert any("parts of the left lung" in warning for warning in found.warnings)
    assert not any("parts of the" in warning for warning in analysis.warnings)


def test_a_dense_mass_at_the_wall_is_said_to_be_missing(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    z, y, x = np.nonzero(analysis.labels == LUNG_LEFT)
    at = np.array([np.median(z) + 4, np.median(y), x.max() - 6])
    away = np.linalg.norm(np.indices(volume.shape) - at[:, None, None, None], axis=0) * 3
    found = analyse(refilled(volume, (away < 25) & (volume.voxels < 0), MUSCLE))
    (warning,) = [one for one in found.warnings if "ribs" in one]
    assert "between the left lung and its ribs" in warning
    assert not any("ribs" in one for one in analysis.warnings)


def test_a_mass_amid_a_lung_is_part_of_it(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    z, y, x = np.nonzero(analysis.labels == LUNG_RIGHT)
    at = np.array([np.median(z), np.median(y), np.median(x)])
    away = np.linalg.norm(np.indices(volume.shape) - at[:, None, None, None], axis=0) * 3
    found = analyse(refilled(volume, away < 21, MUSCLE))
    before, after = (values(one)["lung_right_volume"] for one in (analysis, found))
    assert after == pytest.approx(before, rel=0.01)


def test_lungs_of_a_real_slice_are_those_of_a_trained_network(real: Callable[[str], Path]) -> None:
    """A slice, stacked, against the counts that lungmask's own tests hold its R231 to.

    They are of two equal slices: 64,752 voxels of right lung, 36,536 of left. The slice has dense
    dependent lung and a faint nodule.
    """
    folder = real("chest-2-slices")
    image = pydicom.dcmread(next(folder.rglob("0.dcm")))
    hu = (image.pixel_array * image.RescaleSlope + image.RescaleIntercept).astype(np.int16)
    facts = SeriesFacts("slice", "CT", "", *hu.shape, (0.625, 0.625, 5.0), 12, units="HU")
    affine = np.diag([0.625, 0.625, 5.0, 1.0])
    found = analyse(Volume(np.stack([hu] * 12), affine, Verdict(), facts))
    right, left = (np.count_nonzero(found.labels[6] == side) for side in (LUNG_RIGHT, LUNG_LEFT))
    assert right == pytest.approx(64_752 / 2, rel=0.02)
    assert left == pytest.approx(36_536 / 2, rel=0.02)


@pytest.mark.parametrize(
    "kernel", ["B70f", "Br59d\\3", "Bl57", "L", "YB", "LUNG", "BONEPLUS", "FC51", "FC30"]
)
def test_indices_of_a_sharp_kernel_are_withheld(
    plain: tuple[Volume, Analysis], kernel: str
) -> None:
    assert withheld(kernel, 10.0) is not None
    for soft in ("B30f", "Br38f\\3", "I31f", "STANDARD", "SOFT", "FC08", "B", "C", "NONE", None):
        assert withheld(soft, 10.0) is None


def test_withheld_indices_are_null_and_say_why(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    sharp = replace(volume, series=replace(volume.series, kernel="B70f"))
    found = {one.key: one for one in analyse(sharp).findings}
    assert found["lungs_laa950"].value is found["lungs_perc15"].value is None
    assert "the kernel B70f is sharp" in found["lungs_laa950"].method
    assert found["lungs_density"].value is not None


def test_noise_is_measured(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    noise = np.random.default_rng(1).normal(0, 60, volume.shape)
    found = values(analyse(replace(volume, voxels=np.rint(volume.voxels + noise).astype(np.int16))))
    assert found["tissue_noise"] == pytest.approx(61, rel=0.1)
    assert found["lungs_laa950"] is None


def test_slices_that_were_filled_in_count_nowhere(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    found = analyse(replace(volume, filled=(30, 31)))
    assert not found.labels[30:32].any()
    planes = np.isin(analysis.labels, (LUNG_RIGHT, LUNG_LEFT)).sum(axis=(1, 2))
    lost = planes[30:32].sum() * volume.voxel_volume_mm3 / 1000
    before, after = (values(one)["lungs_volume"] for one in (analysis, found))
    assert before is not None
    assert after == pytest.approx(before - lost, abs=0.02)
    assert any("missing and were filled in" in warning for warning in found.warnings)


def test_thick_slices_draw_a_warning() -> None:
    found = analyse(chest(shape=(120, 96, 44), spacing=(3.0, 3.0, 5.0)))
    assert any("slices are 5 mm apart (more than 3 mm)" in warning for warning in found.warnings)


def test_slices_that_round_to_the_limit_draw_none() -> None:
    found = analyse(chest(shape=(120, 96, 71), spacing=(3.0, 3.0, 3.04)))
    assert not any("mm apart" in warning for warning in found.warnings)


def test_the_couch_is_not_the_body(plain: tuple[Volume, Analysis]) -> None:
    volume, analysis = plain
    assert (volume.voxels[:, -8:] > -400).any(), "the phantom lies on a couch"
    assert not analysis.labels[:, -8:].any()
    assert FAT < MUSCLE


# -- what is refused -------------------------------------------------------------------------
def test_other_modalities_are_refused(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    error = refusal(replace(volume, series=replace(volume.series, modality="MR")))
    assert (error.reason, error.field) == ("not_ct", "Modality")


def test_a_few_slices_are_refused() -> None:
    assert refusal(chest(shape=(60, 60, 7), spacing=(6.0, 6.0, 5.0))).reason == "too_thin"
    assert refusal(chest(shape=(60, 60, 12), spacing=(6.0, 6.0, 1.0))).reason == "too_thin"


def test_an_unspecified_unit_is_called_so(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    error = refusal(replace(volume, series=replace(volume.series, units="US")))
    assert error.reason == "not_hu"
    assert "Rescale Type US, unspecified" in error.message
    assert "set Rescale Type (0028,1054) to HU" in str(error)


def test_values_that_are_not_hu_are_refused(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    error = refusal(replace(volume, voxels=(volume.voxels.astype(np.int16) + 1024)))
    assert error.reason == "not_hu"
    assert "Rescale" in str(error)


@pytest.mark.parametrize(("corners", "reason"), [(0, "not_hu"), (100, "not_hu"), (-2000, None)])
def test_a_frame_of_tissue_around_a_round_field_of_view_is_refused(
    plain: tuple[Volume, Analysis], corners: int, reason: str | None
) -> None:
    """The air inside it would be air inside the body: lungs of 5.9 litres in place of 3.1."""
    volume = plain[0]
    y, x = np.mgrid[-1 : 1 : volume.shape[1] * 1j, -1 : 1 : volume.shape[2] * 1j]
    framed = refilled(volume, np.broadcast_to(x**2 + y**2 > 1.05, volume.shape), corners)
    if reason is None:
        check_ct(framed)
        return
    error = refusal(framed)
    assert error.reason == reason
    assert f"filled with {corners} HU at the corners of 72 of 72 slices" in error.message


def test_air_alone_is_refused(plain: tuple[Volume, Analysis]) -> None:
    volume = plain[0]
    assert refusal(replace(volume, voxels=np.full_like(volume.voxels, -1000))).reason == "not_hu"
