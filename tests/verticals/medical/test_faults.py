"""Values and places under generated faults, against pydicom and SimpleITK; 500 as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage

from plinth.engine import InputError
from plinth.verticals.medical.dicom.discover import discover
from plinth.verticals.medical.dicom.loader import load_volume

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from dicom_faults import FAULTS, check_series

Write = Callable[..., Path]
Edit = Callable[..., None]


def test_every_generated_fault_is_read_as_others_read_it_or_refused_for_its_reason() -> None:
    told = check_series(4 * len(FAULTS), seed=11)
    assert told["wrong"] == []
    assert told["loaded"] > 2 * told["refused"] - 20 > 0


def test_a_rescale_that_is_missing_in_some_slices_names_the_first(write: Write, edit: Edit) -> None:
    folder = write()

    def drop(image: pydicom.Dataset, k: int) -> None:
        if k in (4, 5):
            del image.RescaleSlope, image.RescaleIntercept, image.RescaleType

    edit(folder, drop)
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    assert refusal.value.reason == "bad_rescale"
    assert "slice_0005.dcm" in str(refusal.value)
    assert "2 of 10 images" in str(refusal.value)


def item(**values: Any) -> Dataset:
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_private_sequences_never_override_the_standards(write: Write, tmp_path: Path) -> None:
    """Real enhanced files repeat position and rescale, half a pixel off, in private groups."""
    slices = [pydicom.dcmread(path) for path in sorted(write().glob("*.dcm"))]
    pixels = np.stack([image.pixel_array for image in slices])
    whole, frames = slices[0], []
    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=list(whole.PixelSpacing))]),
        PixelValueTransformationSequence=Sequence(
            [item(RescaleIntercept=-1024, RescaleSlope=1, RescaleType="HU")]
        ),
    )
    for image in slices:
        place = [float(value) for value in image.ImagePositionPatient]
        group = item(PlanePositionSequence=Sequence([item(ImagePositionPatient=place)]))
        private = group.private_block(0x2005, "Philips MR Imaging DD 005", create=True)
        shifted = [value - 4.5 for value in place]
        other = item(ImagePositionPatient=shifted, RescaleSlope=3, RescaleIntercept=0)
        private.add_new(0x0F, "SQ", Sequence([other]))
        frames.append(group)
    true = [float(value) for value in whole.ImagePositionPatient]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(whole, name)
    del whole.RescaleSlope, whole.RescaleIntercept, whole.RescaleType
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(slices)
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    whole.PixelData = pixels.tobytes()
    whole.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    volume = load_volume(tmp_path / "enhanced.dcm", strict=True)
    assert volume.origin == pytest.approx(true)
    assert np.array_equal(volume.voxels, pixels.astype(int) - 1024)


# -- completeness ------------------------------------------------------------------------------
def test_the_end_of_a_series_that_is_missing_is_told_by_the_count(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "ImagesInAcquisition", 10))
    assert load_volume(folder).verdict.ok
    for k in (8, 9, 10):
        (folder / f"slice_{k:04d}.dcm").unlink()
    verdict = load_volume(folder).verdict
    assert verdict.status == "partial"
    assert "7 of the 10 images" in verdict.issues[0].message


def test_every_second_slice_that_is_lost_is_told_by_its_number(write: Write) -> None:
    """What is left lies evenly: only the numbers tell."""
    folder = write(shape=(36, 30, 11))
    for k in range(2, 11, 2):
        (folder / f"slice_{k:04d}.dcm").unlink()
    verdict = load_volume(folder).verdict
    assert verdict.status == "partial"
    assert "5 of the Instance Numbers from 1 to 11 are absent" in verdict.issues[0].message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("KVP", ("80", "140")),
        ("ConvolutionKernel", ("B30f", "B70f")),
        ("EchoNumbers", (1, 2)),
        ("TemporalPositionIdentifier", (1, 2)),
        ("AcquisitionNumber", (1, 2)),
    ],
)
def test_interleaved_stacks_are_told_apart(
    write: Write, edit: Edit, expected: Any, name: str, values: tuple[Any, Any]
) -> None:
    """Even and odd slices are of two energies, kernels, echoes, phases or acquisitions."""
    folder = write()
    edit(folder, lambda image, k: setattr(image, name, values[k % 2]))
    first, second = sorted(discover(folder), key=lambda one: one.part or "")
    assert first.part == f"part 1 of 2 by {name}"
    assert np.array_equal(load_volume(first).voxels, expected()[0::2])
    assert np.array_equal(load_volume(second).voxels, expected()[1::2])
