"""The series that hospitals send: each is repaired and said so, or refused with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.discover import discover
from plinth.verticals.medical.dicom.loader import load_volume

Write = Callable[..., Path]
Edit = Callable[..., None]


def kinds(volume: Any) -> list[str]:
    return [issue.kind for issue in volume.verdict.issues]


def refusal(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_volume(path, **options)
    return caught.value


# -- order: nothing but positions counts -----------------------------------------------------
def test_shuffled_names_and_numbers_change_nothing(write: Write, expected: Any) -> None:
    volume = load_volume(write(shuffled=True), strict=True)
    assert volume.verdict.ok
    assert np.array_equal(volume.voxels, expected())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image, k: setattr(image, "InstanceNumber", 1), id="equal numbers"),
        pytest.param(lambda image, k: delattr(image, "InstanceNumber"), id="no numbers"),
        pytest.param(lambda image, k: setattr(image, "SliceLocation", -k * 7), id="false location"),
        pytest.param(lambda image, k: setattr(image, "SliceThickness", 99), id="false thickness"),
        pytest.param(lambda image, k: setattr(image, "SpacingBetweenSlices", 1), id="false step"),
        pytest.param(lambda image, k: setattr(image, "GantryDetectorTilt", 20), id="false tilt"),
    ],
)
def test_untrustworthy_attributes_are_not_trusted(
    write: Write, edit: Edit, expected: Any, change: Callable[..., None]
) -> None:
    folder = write()
    edit(folder, change)
    volume = load_volume(folder, strict=True)
    assert np.array_equal(volume.voxels, expected())
    assert volume.spacing == pytest.approx((9.0, 8.0, 5.0))


@pytest.mark.parametrize(
    ("change", "said", "thickness"),
    [
        (lambda image, k: setattr(image, "SliceThickness", "1" if k < 4 else "5"), "1 to 5", None),
        (lambda image, _: setattr(image, "SliceThickness", "50"), "5 mm apart", 50.0),
    ],
)
def test_thicknesses_that_do_not_go_together_are_said(
    write: Write, edit: Edit, expected: Any, change: Any, said: str, thickness: float | None
) -> None:
    folder = write()
    edit(folder, change)
    volume = load_volume(folder, strict=True)
    (issue,) = volume.verdict.issues
    assert issue.kind == "thickness"
    assert said in issue.message
    assert volume.series.slice_thickness == thickness
    assert np.array_equal(volume.voxels, expected())


def test_uids_follow_the_slices(write: Write) -> None:
    volume = load_volume(write(shuffled=True))
    for source, uid, position in zip(
        volume.series.sources, volume.series.sop_instance_uids, volume.series.positions, strict=True
    ):
        image = source.dataset(pixels=False)
        assert image.SOPInstanceUID == uid
        assert [float(value) for value in image.ImagePositionPatient] == pytest.approx(position)
    assert volume.slice_uids == volume.series.sop_instance_uids


# -- repaired, or refused when strict --------------------------------------------------------
def test_a_tilted_stack_is_resampled_from_its_true_places(write: Write) -> None:
    folder = write(tilt=18.0)
    volume = load_volume(folder)
    assert volume.verdict.status == "resampled_tilt"
    (issue,) = volume.verdict.issues
    assert issue.mm == pytest.approx(9 * 5.0 * np.sin(np.radians(18)), abs=0.01)
    assert volume.direction.T @ volume.direction == pytest.approx(np.eye(3), abs=1e-6)
    assert volume.spacing[2] == pytest.approx(5.0 * np.cos(np.radians(18)), abs=1e-6)
    assert volume.slice_uids is None
    assert refusal(folder, strict=True).reason == "geometry_tilt"


def test_every_voxel_of_a_tilted_slice_is_where_it_was(write: Write) -> None:
    """Values sampled at the true places of the source pixels are the source's values."""
    folder = write(tilt=18.0, noise_hu=0.0)
    volume = load_volume(folder)
    for k in (0, 4, 9):
        image = volume.series.sources[k].dataset()
        stored = image.pixel_array.astype(int) - 1024
        row, column = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
        j, i = np.mgrid[2:28:5, 2:34:5]
        place = np.array(volume.series.positions[k]) + np.multiply.outer(i * 9.0, row)
        index = volume.lps_to_index(place + np.multiply.outer(j * 8.0, column))
        assert index[..., 2] == pytest.approx(k, abs=1e-3)
        at = index[..., 1]
        low = np.floor(at + 1e-6).astype(int)
        plane, across = volume.voxels[k].astype(float), np.rint(index[..., 0]).astype(int)
        upper = np.minimum(low + 1, plane.shape[0] - 1)
        value = plane[low, across] * (1 - at + low) + plane[upper, across] * (at - low)
        smooth = _flat(stored)[j, i]
        assert np.abs(value - stored[j, i])[smooth].max() <= 1.01


def _flat(image: np.ndarray) -> np.ndarray:
    """Pixels whose neighbours along y are equal: interpolation cannot change them."""
    wide = np.pad(image, ((2, 2), (0, 0)), mode="edge")
    same = [wide[2 + d : wide.shape[0] - 2 + d] == image for d in (-2, -1, 1, 2)]
    flat: np.ndarray = np.logical_and.reduce(same)
    return flat


def test_a_drift_of_less_than_a_tenth_of_a_millimetre_is_rounding(write: Write, edit: Edit) -> None:
    def nudge(image: pydicom.Dataset, k: int) -> None:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [x, round(float(y) + 0.005 * k, 3), z]

    folder = write()
    edit(folder, nudge)
    volume = load_volume(folder, strict=True)
    last = volume.index_to_lps([0, 0, 9])
    assert last == pytest.approx(volume.series.positions[-1], abs=1e-9)


def test_slices_displaced_at_random_are_put_back(write: Write, edit: Edit) -> None:
    def shift(image: pydicom.Dataset, k: int) -> None:
        x, y, z = image.ImagePositionPatient
        image.ImagePositionPatient = [float(x) + 9.0 * (k == 4), y, z]

    folder = write(noise_hu=0.0)
    edit(folder, shift)
    volume = load_volume(folder)
    assert "not along a line" in volume.verdict.issues[0].message
    source = volume.series.sources[4].dataset().pixel_array.astype(int) - 1024
    assert np.array_equal(volume.voxels[4][:, 1:], source)
    source = volume.series.sources[3].dataset().pixel_array.astype(int) - 1024
    assert np.array_equal(volume.voxels[3][:, :-1], source)


def test_two_spacings_become_one(write: Write, expected: Any) -> None:
    steps = (5.0,) * 5 + (2.5,) * 4
    volume = load_volume(write(steps=steps))
    assert volume.verdict.status == "resampled_spacing"
    assert volume.spacing[2] == pytest.approx(2.5)
    assert volume.shape[0] == 15
    native = expected(steps=steps)
    assert np.array_equal(volume.voxels[[0, 2, 4, 6, 8, 10, 11, 12, 13, 14]], native)
    between = np.rint((native[0].astype(float) + native[1]) / 2)
    assert np.array_equal(volume.voxels[1], between)


def test_a_missing_slice_is_refused_unless_filling_is_asked_for(
    write: Write, expected: Any
) -> None:
    folder = write(missing=(3, 4))
    error = refusal(folder)
    assert error.reason == "geometry_gap"
    assert "2 slices missing between slices 2 and 3: 15.000 mm" in str(error)
    assert 'gaps="fill"' in str(error)
    assert refusal(folder, strict=True, gaps="fill").reason == "geometry_gap"

    volume = load_volume(folder, gaps="fill")
    assert volume.verdict.status == "gaps_filled"
    assert volume.verdict.issues[0].mm == pytest.approx(15.0)
    assert volume.shape == (10, 30, 36)
    native = expected()
    assert np.array_equal(volume.voxels[[0, 1, 2, 5, 9]], native[[0, 1, 2, 5, 9]])
    third = native[2] + (native[5].astype(float) - native[2]) / 3
    assert np.abs(volume.voxels[3] - third).max() <= 0.51
    assert volume.filled == (3, 4)


def test_a_wide_gap_is_not_invented(write: Write) -> None:
    error = refusal(write(missing=(3, 4, 5, 6)), gaps="fill")
    assert error.reason == "geometry_gap"
    assert "at most 3 in a row" in str(error)


def test_copies_of_a_slice_are_dropped(write: Write, expected: Any) -> None:
    folder = write(duplicated=(2, 7))
    volume = load_volume(folder)
    assert volume.verdict.status == "duplicates_dropped"
    assert volume.verdict.issues[0].slices == (2, 7)
    assert np.array_equal(volume.voxels, expected())
    assert refusal(folder, strict=True).reason == "geometry_duplicate"


def test_a_folder_copied_into_itself_is_still_one_volume(write: Write, expected: Any) -> None:
    folder = write()
    shutil.copytree(folder, folder / "again")
    volume = load_volume(folder)
    assert volume.verdict.status == "duplicates_dropped"
    assert np.array_equal(volume.voxels, expected())


def test_different_images_at_one_position_are_refused(write: Write, edit: Edit) -> None:
    def alter(image: pydicom.Dataset, k: int) -> None:
        if k == 10:
            image.PixelData = bytes(len(image.PixelData))

    folder = write(duplicated=(2,))
    edit(folder, alter)
    error = refusal(folder)
    assert error.reason == "ambiguous_repeats"
    assert "slice_0003.dcm" in str(error)
    assert "slice_0011.dcm" in str(error)


def test_a_localiser_inside_the_series_is_left_out(write: Write, edit: Edit, expected: Any) -> None:
    folder = write()
    scout = folder / "scout.dcm"
    shutil.copy(folder / "slice_0001.dcm", scout)

    def turn(image: pydicom.Dataset, _: int) -> None:
        image.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        image.SOPInstanceUID = generate_uid()

    edit(scout, turn)
    volume = load_volume(folder)
    assert volume.verdict.status == "mixed_split"
    assert np.array_equal(volume.voxels, expected())
    assert refusal(folder, strict=True).reason == "geometry_mixed"


def test_a_slice_without_position_makes_the_volume_partial(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder / "slice_0010.dcm", lambda image, _: delattr(image, "ImagePositionPatient"))
    volume = load_volume(folder)
    assert volume.verdict.status == "partial"
    assert volume.shape[0] == 9
    edit(folder / "slice_0005.dcm", lambda image, _: delattr(image, "ImagePositionPatient"))
    assert refusal(folder).reason == "geometry_gap"


def test_a_thickness_that_is_rounded_in_some_slices_is_one(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "SliceThickness", "5" if k < 4 else "5.00001"))
    volume = load_volume(folder, strict=True)
    assert volume.verdict.ok
    assert volume.series.slice_thickness == pytest.approx(5, rel=1e-4)


def test_one_slice_uses_its_thickness_and_says_so(write: Write) -> None:
    volume = load_volume(write() / "slice_0003.dcm")
    assert volume.verdict.status == "single_slice"
    assert volume.spacing[2] == 5.0


# -- files -----------------------------------------------------------------------------------
def test_a_truncated_file_is_named_with_its_bytes(write: Write) -> None:
    folder = write()
    path = folder / "slice_0004.dcm"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    error = refusal(folder)
    assert error.reason == "truncated"
    assert f"slice_0004.dcm is truncated: {len(whole) - 500} bytes" in str(error)
    assert str(len(whole)) in str(error)


@pytest.mark.parametrize("compression", ["rle", "jpegls"])
def test_a_truncated_compressed_file_is_never_half_an_image(write: Write, compression: str) -> None:
    folder = write(compression=compression)
    path = folder / "slice_0004.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    error = refusal(folder)
    assert error.reason in ("truncated", "damaged_pixels")
    assert "slice_0004.dcm" in str(error)


def test_a_file_cut_in_its_header_makes_the_volume_partial(write: Write) -> None:
    folder = write()
    path = folder / "slice_0010.dcm"
    path.write_bytes(path.read_bytes()[:500])
    volume = load_volume(folder)
    assert volume.verdict.status == "partial"
    assert "slice_0010.dcm" in volume.verdict.issues[0].message
    assert refusal(folder, strict=True).reason == "geometry_damaged"


def test_an_empty_file_of_an_image_is_a_lost_image(write: Write) -> None:
    """A copy that was cut off at its first byte; at the end of a series no gap would show it."""
    folder = write()
    last = sorted(folder.glob("*.dcm"))[-1]
    last.write_bytes(b"")
    (folder / "done").write_bytes(b"")
    volume = load_volume(folder)
    assert volume.verdict.status == "partial"
    assert [issue.kind for issue in volume.verdict.issues] == ["damaged"]
    assert f"{last} is not DICOM: it is empty" in volume.verdict.issues[0].message


def test_a_refusal_for_a_gap_tells_of_the_image_that_was_left_out(write: Write, edit: Edit) -> None:
    def halve(image: pydicom.Dataset, k: int) -> None:
        image.Rows //= 2
        image.PixelData = image.PixelData[: image.Rows * image.Columns * 2]

    folder = write()
    edit(sorted(folder.glob("*.dcm"))[4], halve)
    refused = refusal(folder)
    assert refused.reason == "geometry_gap"
    assert "of another orientation, size or kind, left out: 1 image of 36 x 15" in refused.message


def test_junk_beside_the_slices_is_ignored(write: Write, expected: Any) -> None:
    folder = write()
    (folder / "notes.txt").write_text("hello")
    (folder / "empty").touch()
    (folder / "random.dcm").write_bytes(np.random.default_rng(1).bytes(5000))
    volume = load_volume(folder, strict=True)
    assert np.array_equal(volume.voxels, expected())


# -- repeats: phases, echoes -----------------------------------------------------------------
def echoes(write: Write, edit: Edit, change: Callable[[pydicom.Dataset, int], None]) -> Path:
    """Two acquisitions of different noise in one series."""
    folder = write("both", seed=1)
    other = write("other", seed=2)
    first = pydicom.dcmread(folder / "slice_0001.dcm")

    def join(image: pydicom.Dataset, k: int) -> None:
        image.PatientID, image.StudyInstanceUID = first.PatientID, first.StudyInstanceUID
        image.SeriesInstanceUID = first.SeriesInstanceUID
        image.FrameOfReferenceUID = first.FrameOfReferenceUID

    edit(other, join)
    for path in other.glob("*.dcm"):
        shutil.move(path, folder / f"x_{path.name}")
    edit(folder, change)
    return folder


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("TemporalPositionIdentifier", (1, 2)),
        ("TriggerTime", ("82.5", "410")),
        ("AcquisitionTime", ("120000.25", "120002")),
    ],
)
def test_phases_are_split_by_what_tells_them_apart(
    write: Write, edit: Edit, expected: Any, name: str, values: tuple[Any, Any]
) -> None:
    folder = echoes(write, edit, lambda image, k: setattr(image, name, values[k // 10]))
    first, second = sorted(discover(folder), key=lambda one: one.part or "")
    assert first.part == f"part 1 of 2 by {name}"
    assert first.id != second.id
    assert np.array_equal(load_volume(first, strict=True).voxels, expected(seed=1))
    volume = load_volume(second, strict=True)
    assert np.array_equal(volume.voxels, expected(seed=2))
    assert volume.verdict.ok
    told = [issue.message for issue in volume.verdict.issues if issue.kind == "part"]
    assert told == [f"one series holds several volumes: this is part 2 of 2 by {name}"]
    error = refusal(folder)
    assert error.reason == "several_series"
    assert first.id in str(error)


def test_echo_times_are_ordered_as_numbers(write: Write, edit: Edit, expected: Any) -> None:
    def mark(image: pydicom.Dataset, k: int) -> None:
        image.EchoTime = "10.1" if k < 10 else "2.4"

    first, _ = sorted(discover(echoes(write, edit, mark)), key=lambda one: one.part or "")
    assert np.array_equal(load_volume(first).voxels, expected(seed=2))


def test_one_number_written_in_two_ways_splits_nothing(
    write: Write, edit: Edit, expected: Any
) -> None:
    def spell(image: pydicom.Dataset, k: int) -> None:
        image.KVP, image.EchoTime = ("120", "2.10") if k % 2 else ("120.0", "2.1")

    folder = write()
    edit(folder, spell)
    assert np.array_equal(load_volume(folder, strict=True).voxels, expected())


def test_a_copy_whose_pixels_differ_is_called_changed(write: Write, edit: Edit) -> None:
    def invert(image: pydicom.Dataset, k: int) -> None:
        image.PixelData = np.frombuffer(image.PixelData, "<u2")[::-1].tobytes()

    folder = write()
    copy = folder / "zz.dcm"
    shutil.copy(sorted(folder.glob("*.dcm"))[4], copy)
    edit(copy, invert)
    refused = refusal(folder)
    assert refused.reason == "changed_copy"
    assert "carry one SOP Instance UID" in refused.message
    assert copy.name in refused.message


def test_phases_that_nothing_tells_apart_are_refused(write: Write, edit: Edit) -> None:
    folder = echoes(write, edit, lambda image, k: None)
    assert refusal(folder).reason == "ambiguous_repeats"


def test_a_phase_that_is_cut_short_is_partial(write: Write, edit: Edit) -> None:
    def mark(image: pydicom.Dataset, k: int) -> None:
        image.AcquisitionNumber = 1 + k // 10

    folder = echoes(write, edit, mark)
    (folder / "x_slice_0010.dcm").unlink()
    whole, short = sorted(discover(folder), key=lambda one: one.part or "")
    assert load_volume(whole).verdict.ok
    assert load_volume(short).verdict.status == "partial"


def test_acquisition_numbers_split_nothing_when_positions_do_not_repeat(
    write: Write, edit: Edit
) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "AcquisitionNumber", k))
    assert load_volume(folder, strict=True).shape[0] == 10
