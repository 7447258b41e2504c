"""Multi-frame objects (enhanced CT, PS3.3 C.7.6.16): geometry and rescale of each frame."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from plinth.verticals.medical.dicom.loader import load_volume

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
