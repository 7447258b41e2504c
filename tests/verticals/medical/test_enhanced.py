"""Multi-frame objects (enhanced CT, PS3.3 C.7.6.16): geometry and rescale of each frame."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from medical.test_seg_frames import segment

from plinth.engine import InputError
from plinth.verticals.medical.dicom.discover import Series, discover
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.output.derived import made_by
from plinth.verticals.medical.output.dicom_seg import save_seg
from plinth.verticals.medical.output.report import Origin
from plinth.verticals.medical.output.rtstruct import Structure, write_rtstruct

Write = Callable[..., Path]
Files = Callable[[str], Path]


def test_enhanced_ct_has_its_geometry_per_frame(pydicom_data: Files) -> None:
    path = pydicom_data("eCT_Supplemental.dcm")
    volume = load_volume(path)
    image = pydicom.dcmread(path)
    groups = image.PerFrameFunctionalGroupsSequence
    shared = image.SharedFunctionalGroupsSequence[0]
    assert sorted(volume.series.frame_numbers) == [1, 2]
    for k, number in enumerate(volume.series.frame_numbers):
        group = groups[number - 1]
        place = group.PlanePositionSequence[0].ImagePositionPatient
        assert volume.index_to_lps([0, 0, k]) == pytest.approx([float(v) for v in place])
        values = shared.PixelValueTransformationSequence[0]
        exact = image.pixel_array[number - 1].astype(float) * float(values.RescaleSlope)
        assert np.array_equal(volume.voxels[k], exact + float(values.RescaleIntercept))


def enhanced(path: Path, phantom_files: list[Path], order: list[int]) -> None:
    """One enhanced CT object of single slices, frames in the given order."""
    images = [pydicom.dcmread(phantom_files[k]) for k in order]
    whole = pydicom.Dataset()
    whole.update(
        {
            e.tag: e
            for e in images[0]
            if e.keyword
            not in (
                "ImagePositionPatient",
                "ImageOrientationPatient",
                "PixelSpacing",
                "RescaleSlope",
                "RescaleIntercept",
            )
        }
    )
    whole.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    whole.NumberOfFrames = len(images)
    whole.PixelData = b"".join(image.PixelData for image in images)
    shared, measures, orientation = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = images[0].PixelSpacing
    orientation.ImageOrientationPatient = images[0].ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    whole.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for image in images:
        group, plane, values = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        plane.ImagePositionPatient = image.ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept = 1, image.RescaleIntercept
        group.PlanePositionSequence = [plane]
        group.PixelValueTransformationSequence = [values]
        groups.append(group)
    whole.PerFrameFunctionalGroupsSequence = groups
    whole.file_meta = images[0].file_meta
    whole.file_meta.MediaStorageSOPClassUID = whole.SOPClassUID
    whole.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("compression", ["none", "rle"])
def test_frames_in_any_order_make_the_same_volume(
    write: Write, tmp_path: Path, expected: Any, compression: str
) -> None:
    files = sorted(write().glob("*.dcm"))
    path = tmp_path / "enhanced.dcm"
    enhanced(path, files, [3, 1, 9, 0, 8, 2, 7, 4, 6, 5])
    if compression == "rle":
        image = pydicom.dcmread(path)
        image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        image.save_as(path)
    volume = load_volume(path, strict=True)
    assert np.array_equal(volume.voxels, expected())
    assert volume.series.frame_numbers == (4, 2, 6, 1, 8, 10, 9, 7, 5, 3)
    assert len(volume.series.headers()) == 1


Change = Callable[[pydicom.Dataset], None]


@pytest.fixture
def series_of(write: Write, tmp_path: Path) -> Callable[..., list[Series]]:
    """The series in changed enhanced objects of 10 slices, each given by its changes."""

    def series_of(*changes: Change) -> list[Series]:
        files, folder = sorted(write().glob("*.dcm")), tmp_path / "objects"
        folder.mkdir()
        for number, change in enumerate(changes):
            path = folder / f"{number}.dcm"
            enhanced(path, files, list(range(10)))
            image = pydicom.dcmread(path)
            image.SOPInstanceUID += f".{number}"
            image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
            change(image)
            image.save_as(path)
        return discover(folder)

    return series_of


def with_macro(sequence: str, **values: Any) -> pydicom.Dataset:
    """A functional group, or item of one, of one macro."""
    group, item = pydicom.Dataset(), pydicom.Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    setattr(group, sequence, [item])
    return group


def to_frames(sequence: str, *items: dict[str, Any]) -> Change:
    """A macro in each frame's functional groups, its items in turn."""

    def change(image: pydicom.Dataset) -> None:
        for number, group in enumerate(image.PerFrameFunctionalGroupsSequence):
            group.update(with_macro(sequence, **items[number % len(items)]))

    return change


def to_all(sequence: str, **values: Any) -> Change:
    """A macro in the shared functional groups."""
    return lambda image: image.SharedFunctionalGroupsSequence[0].update(
        with_macro(sequence, **values)
    )


def test_stacks_are_never_one_volume_wherever_they_lie(
    series_of: Callable[..., list[Series]],
) -> None:
    def change(image: pydicom.Dataset) -> None:
        to_frames("FrameContentSequence", {"StackID": "1"}, {"StackID": "2"})(image)

    found = series_of(change)
    assert [len(one.frames) for one in found] == [5, 5]
    assert all("StackID" in str(one.part) for one in found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            to_all("PixelValueTransformationSequence", RescaleSlope="2", RescaleIntercept="0"),
            "the slope of frame 1 is not that of the shared functional groups",
        ),
        (
            to_frames("PixelMeasuresSequence", {"PixelSpacing": ["4", "4"]}),
            "the spacing of frame 1 is not that of the shared functional groups",
        ),
        (
            lambda image: image.SharedFunctionalGroupsSequence.append(pydicom.Dataset()),
            "2 items of shared functional groups",
        ),
        (
            lambda image: image.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence.append(
                pydicom.Dataset()
            ),
            "2 items of PlanePositionSequence",
        ),
    ],
)
def test_functional_groups_that_contradict_one_another_are_refused(
    write: Write, tmp_path: Path, change: Change, why: str
) -> None:
    path = tmp_path / "enhanced.dcm"
    enhanced(path, sorted(write().glob("*.dcm")), list(range(10)))
    image = pydicom.dcmread(path)
    change(image)
    image.save_as(path)
    with pytest.raises(InputError, match=why):
        load_volume(path)


def test_a_frames_slope_never_goes_with_an_intercept_from_elsewhere(
    series_of: Callable[..., list[Series]],
) -> None:
    def change(image: pydicom.Dataset) -> None:
        image.RescaleIntercept = "-1024"
        to_frames("PixelValueTransformationSequence", {"RescaleSlope": "2"})(image)

    (found,) = series_of(change)
    with pytest.raises(InputError, match="one of Rescale Slope and Rescale Intercept is missing"):
        load_volume(found)


@pytest.mark.parametrize("place", [to_all, to_frames])
def test_what_functional_groups_say_of_an_image_is_known(
    series_of: Callable[..., list[Series]], place: Any
) -> None:
    def told(image: pydicom.Dataset, sequence: str, **values: Any) -> None:
        (to_all(sequence, **values) if place is to_all else to_frames(sequence, values))(image)

    def change(image: pydicom.Dataset) -> None:
        for keyword in ("ConvolutionKernel", "SliceThickness"):
            if keyword in image:
                delattr(image, keyword)
        spacing = image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
        told(image, "CTReconstructionSequence", ConvolutionKernel="B70f")
        told(image, "PixelMeasuresSequence", SliceThickness="5", PixelSpacing=spacing)
        image.ContrastBolusAgentSequence = [pydicom.Dataset()]

    facts = load_volume(series_of(change)[0]).series
    assert (facts.kernel, facts.slice_thickness, facts.contrast) == ("B70f", 5.0, True)


@pytest.mark.parametrize("place", [to_all, to_frames])
def test_a_frame_type_names_what_is_no_attenuation(
    series_of: Callable[..., list[Series]], place: Any
) -> None:
    kind = ["DERIVED", "PRIMARY", "VOLUME", "MONOENERGETIC"]
    name = "CTImageFrameTypeSequence"
    change = (
        to_all(name, FrameType=kind) if place is to_all else to_frames(name, {"FrameType": kind})
    )
    (found,) = series_of(change)
    assert load_volume(found).series.kind == "a virtual monoenergetic image"


def test_a_file_of_a_parted_image_that_is_not_there_is_said(
    series_of: Callable[..., list[Series]],
) -> None:
    def part(number: int) -> Change:
        def change(image: pydicom.Dataset) -> None:
            image.ConcatenationUID, image.InConcatenationNumber = "1.2.3", number
            image.InConcatenationTotalNumber = 3
            for group in image.PerFrameFunctionalGroupsSequence:
                place = group.PlanePositionSequence[0]
                x, y, z = place.ImagePositionPatient
                place.ImagePositionPatient = [x, y, float(z) + 50 * number]

        return change

    (found,) = series_of(part(1), part(2))
    assert load_volume(found).verdict.status == "partial"
    assert found.notes[-1].message == "2 of the 3 files of a parted image are here"


def test_contours_refer_to_the_frame_that_they_are_drawn_on(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "enhanced.dcm"
    enhanced(path, sorted(write().glob("*.dcm")), [3, 1, 9, 0, 8, 2, 7, 4, 6, 5])
    volume = load_volume(path)
    labels = np.ones(volume.shape, np.uint8)
    made = Origin(("Research use only.",), "research use only")
    write_rtstruct(volume, labels, [Structure(1, "all")], "test", made, tmp_path / "rt.dcm")
    contours = pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ContourSequence
    frames = [one.ContourImageSequence[0].ReferencedFrameNumber for one in contours]
    assert frames == [4, 2, 6, 1, 8, 10, 9, 7, 5, 3]


def test_segments_of_frames_without_thickness_lie_where_the_labels_are(
    write: Write, tmp_path: Path
) -> None:
    """Pixel Measures of the source may leave out Slice Thickness; those of a SEG may not."""
    highdicom = pytest.importorskip("highdicom")
    path = tmp_path / "enhanced.dcm"
    enhanced(path, sorted(write().glob("*.dcm")), [3, 1, 9, 0, 8, 2, 7, 4, 6, 5])
    volume = load_volume(path)
    labels = (volume.voxels > -500).astype(np.uint8)
    labels[volume.voxels > 100] = 2
    about = made_by("test", 900, "test")
    save_seg(
        volume, labels, np.array([1, 2], np.uint8), [segment(1), segment(2)], about,
        tmp_path / "seg.dcm", "binary",
    )  # fmt: skip
    read = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    index = np.argwhere(labels)
    place = volume.index_to_lps(index[:, ::-1])
    there = np.rint((place - read.affine[:3, 3]) @ np.linalg.inv(read.affine[:3, :3]).T)
    assert np.array_equal(read.array[tuple(there.astype(int).T)], labels[tuple(index.T)])


def test_a_stack_for_each_slice_is_none_and_rounding_no_contradiction(
    series_of: Callable[..., list[Series]],
) -> None:
    def change(image: pydicom.Dataset) -> None:
        spacing = [float(v) + 1e-5 for v in (8, 9)]
        to_frames("PixelMeasuresSequence", {"PixelSpacing": spacing})(image)
        for group in image.PerFrameFunctionalGroupsSequence:
            place = group.PlanePositionSequence[0].ImagePositionPatient
            group.update(with_macro("FrameContentSequence", StackID=f"{float(place[2]):.0f}"))
        twice = [copy.deepcopy(one) for one in image.PerFrameFunctionalGroupsSequence]
        for time, group in enumerate([*image.PerFrameFunctionalGroupsSequence, *twice]):
            group.FrameContentSequence[0].TemporalPositionIndex = 1 + time // 10
        image.PerFrameFunctionalGroupsSequence.extend(twice)
        image.NumberOfFrames, image.PixelData = 20, image.PixelData * 2

    found = series_of(change)
    assert [len(one.frames) for one in found] == [10, 10]
    assert all(load_volume(one).verdict.ok for one in found)
