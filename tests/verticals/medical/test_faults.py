"""Values and places under generated faults, against pydicom and SimpleITK; 500 as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
)
from scipy import ndimage

from plinth.engine import InputError
from plinth.verticals.medical.dicom.alternating import unlike_neighbours
from plinth.verticals.medical.dicom.discover import discover, scan
from plinth.verticals.medical.dicom.kinds import derived_kind
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.volumes.volume import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from dicom_faults import check_series
from dicom_mutations import Work, check, dicomdir
from dicom_streams import counts

Write = Callable[..., Path]
Edit = Callable[..., None]


def test_every_generated_fault_is_read_as_others_read_it_or_refused_for_its_reason() -> None:
    told = check_series(100, seed=11)
    assert told["wrong"] == []
    assert told["loaded"] > told["refused"] > 0


def test_a_usual_step_beside_tiny_ones_is_no_gap(write: Write) -> None:
    """Steps of 5 mm of which every second is 1 mm: nothing is missing."""
    volume = load_volume(write(steps=(5.0, 1.0, 5.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0)))
    assert volume.verdict.status == "resampled_spacing"


def test_mosaics_of_several_times_are_refused_for_what_they_are(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "ImageType", ["ORIGINAL", "PRIMARY", "MOSAIC"]))
    with pytest.raises(InputError, match="all slices of a volume side by side") as refusal:
        load_volume(folder)
    assert refusal.value.reason == "not_a_volume"


def test_the_units_of_pet_are_told(write: Write, edit: Edit) -> None:
    def pet(image: pydicom.Dataset, k: int) -> None:
        image.Modality, image.Units = "PT", "BQML"
        image.RescaleIntercept = 0
        del image.RescaleType

    folder = write()
    edit(folder, pet)
    assert load_volume(folder).series.units == "BQML"


# -- damaged bytes -----------------------------------------------------------------------------
def test_changed_files_neither_crash_hang_nor_lie() -> None:
    """With limits of memory and time; 10,000 as a command, in a child process."""
    told = check(Work(first=0, count=2000, seed=5), here=True)
    assert told["wrong"] == []
    assert told["files"] == 2000
    assert min(told["loaded"], told["damaged"], told["damaged_pixels"], told["truncated"]) > 5


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_bytes_lost_or_doubled_inside_a_code_stream_are_found(tmp_path: Path, syntax: UID) -> None:
    """End mark in place; of lossless JPEG a few leave the count of bits as it was."""
    for how, found in counts(syntax, tmp_path, 60, seed=3):
        if how in ("bytes lost", "bytes doubled"):
            assert found["found"] >= 0.9 * (found["found"] + found["silent"]), how
            assert found["found"] > 30


def test_a_run_length_stream_that_a_decoder_panics_on_is_refused(write: Write) -> None:
    """One row too few in the header: a decoder in Rust ends its thread where it can."""
    folder = write(compression="rle", shape=(36, 30, 1))
    path = folder / "slice_0001.dcm"
    image = pydicom.dcmread(path)
    image.Rows -= 7
    image.save_as(path)
    with pytest.raises(InputError) as refusal:
        load_volume(path)
    assert refusal.value.reason == "damaged_pixels"


@pytest.mark.filterwarnings("ignore")  # pydicom's own, at what it writes here
@pytest.mark.parametrize("name", ["IM\0AGE", "x" * 5000], ids=["null byte", "too long"])
def test_a_dicomdir_that_names_what_cannot_be_a_file_is_told(write: Write, name: str) -> None:
    folder = write(shape=(12, 10, 3))
    dicomdir([pydicom.dcmread(path) for path in folder.glob("*.dcm")], folder / "media")
    place = folder / "media" / "DICOMDIR"
    index = pydicom.dcmread(place)
    records = [one for one in index.DirectoryRecordSequence if "ReferencedFileID" in one]
    tag = records[0]["ReferencedFileID"].tag
    records[0][tag] = DataElement(tag, "CS", ["A", name], validation_mode=pydicom.config.IGNORE)
    index.save_as(place, enforce_file_format=False)
    found = scan(place)
    assert [len(series.frames) for series in found.series] == [2]
    assert "names what no file is called" in found.ignored[0].reason


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


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ImageType", (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "AXIAL"])),
        ("FilterType", ("HEAD FILTER", "BODY FILTER")),
        ("ReconstructionDiameter", ("320", "360.0")),
        ("SliceThickness", ("5.0", "2.50")),
        ("ScanOptions", ("HELICAL MODE", "AXIAL MODE")),
        ("SeriesTime", ("120000", "121500")),
        ("SeriesDescription", ("arterial", "venous")),
    ],
)
def test_stacks_at_half_steps_are_told_apart_by_whatever_differs(
    write: Write, edit: Edit, expected: Any, name: str, values: tuple[Any, Any]
) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, name, values[k % 2]))
    found = sorted(discover(folder), key=lambda one: one.part or "")
    assert len(found) == 2
    stacks = [load_volume(one).voxels for one in found]
    assert {stack.tobytes() for stack in stacks} == {expected()[n::2].tobytes() for n in (0, 1)}


@pytest.mark.parametrize("by", ["InstanceNumber", "ContentTime"])
def test_numbers_or_times_that_pass_twice_over_a_volume_part_it(
    write: Write, edit: Edit, expected: Any, by: str
) -> None:
    def second_pass(image: pydicom.Dataset, k: int) -> None:
        at = k // 2 + 5 * (k % 2)
        image.InstanceNumber = 1 + at if by == "InstanceNumber" else k
        image.ContentTime = f"1200{at:02d}.5" if by == "ContentTime" else "120000"

    folder = write()
    edit(folder, second_pass)
    first, second = sorted(discover(folder), key=lambda one: one.part or "")
    assert first.part == f"part 1 of 2 by the passes of {by}"
    assert np.array_equal(load_volume(first).voxels, expected()[0::2])
    assert np.array_equal(load_volume(second).voxels, expected()[1::2])


def test_mr_numbered_in_the_order_of_its_excitation_is_one_volume(write: Write, edit: Edit) -> None:
    def excited(image: pydicom.Dataset, k: int) -> None:
        image.Modality = "MR"
        image.InstanceNumber = 1 + k // 2 + 5 * (k % 2)

    folder = write()
    edit(folder, excited)
    assert load_volume(folder).verdict.ok


def test_attributes_of_ranges_that_follow_one_another_part_nothing(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "ImageType", ["ORIGINAL", "PRIMARY", "AB"[k > 4]]))
    assert np.array_equal(load_volume(folder, strict=True).voxels, expected())


def smoother(image: Array) -> Array:
    return ndimage.gaussian_filter(image, 0.6)


def enhanced(image: Array) -> Array:
    return image + 30.0 * ((image > -100) & (image < 200))


def moved(image: Array) -> Array:
    return np.roll(image, 8, axis=1)


@pytest.mark.parametrize("change", [smoother, enhanced, moved])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_slices_of_two_kinds_in_turn_are_never_ok(
    write: Write, edit: Edit, change: Callable[[Array], Array], modality: str
) -> None:
    """Two kernels, phases or patients at half steps, and not one attribute that says so."""

    def every_second(image: pydicom.Dataset, k: int) -> None:
        image.Modality = modality
        if k % 2:
            hu = image.pixel_array.astype(np.float32) - 1024
            stored = np.clip(np.rint(change(hu)) + 1024, 0, 4095).astype(np.uint16)
            image.PixelData = stored.tobytes()

    folder = write(shape=(72, 60, 16), spacing=(4.5, 4.0, 3.0), noise_hu=20.0)
    assert load_volume(folder).verdict.ok
    edit(folder, every_second)
    if modality == "MR" and change is not enhanced:
        assert load_volume(folder).verdict.status == "unlike_neighbours"
    if modality == "CT":
        with pytest.raises(InputError, match="odd and even slices are of two kinds") as caught:
            load_volume(folder)
        assert caught.value.reason == "geometry_alternating"


@pytest.mark.parametrize(("raised", "found"), [(0.0, False), (10.0, True)])
def test_organs_that_alternate_by_chance_are_not_two_kinds(raised: float, found: bool) -> None:
    """Slices 20 mm apart: every second one holds more bone, as it may be."""
    chance = np.random.default_rng(5)
    voxels = np.full((9, 64, 64), 40.0) + chance.normal(0, 12, (9, 64, 64))
    for k, columns in enumerate((2, 8, 3, 9, 2, 8, 3, 8, 2)):
        here = chance.integers(64) + np.arange(columns)
        voxels[k, :, here % 64] += 160
    voxels[1::2] += raised
    told, _ = unlike_neighbours(np.rint(voxels).astype(np.int16), hounsfield=True)
    assert (told is not None) == found
    assert not found or "soft tissue differs by" in str(told)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Thorax 1.5 Br40 3", None),
        ("Thorax post CPR 120 kV", None),
        ("Monitoring", None),
        ("Lung MIPs 8mm", "projection"),
        ("VRT Thorax", "projection or rendering"),
        ("70 keV", "virtual monoenergetic"),
        ("DE_Mono+_070keV", "virtual monoenergetic"),
        ("MonoE 50", "virtual monoenergetic"),
        ("DE Lung PBV 1.5", "material map"),
        ("CaSupp 25", "material map"),
        ("Virtual Non-Contrast", "material map"),
        ("Rho/Z", "electron density"),
        ("CTA Subtraction", "subtraction"),
        ("CTA bone removed", "subtraction"),
    ],
)
def test_what_a_description_says_is_no_attenuation_is_not_analysed(
    said: str, kind: str | None
) -> None:
    found = derived_kind(("ORIGINAL", "PRIMARY", "AXIAL"), said, CTImageStorage)
    assert (found is None) == (kind is None)
    assert kind is None or kind in str(found)


def test_a_curved_reformat_is_no_stack_of_slices() -> None:
    kinds = ("DERIVED", "SECONDARY", "MPR", "CURVED")
    assert derived_kind(kinds, "", CTImageStorage) == "a curved reformat"


def other_rescale(image: pydicom.Dataset) -> None:
    image.RescaleIntercept = int(image.RescaleIntercept) + 1000


def other_patient(image: pydicom.Dataset) -> None:
    image.PixelData = np.roll(image.pixel_array, 20, axis=1).tobytes()


@pytest.mark.parametrize("change", [other_rescale, other_patient])
def test_a_slice_that_is_not_of_the_stack_is_named(
    write: Write, edit: Edit, change: Callable[[pydicom.Dataset], None]
) -> None:
    folder = write(shape=(72, 60, 16), spacing=(4.5, 4.0, 3.0), noise_hu=20.0)
    fifth = sorted(folder.glob("*.dcm"))[4]
    edit(fifth, lambda image, k: change(image))
    verdict = load_volume(folder).verdict
    assert verdict.status == "unlike_neighbours"
    assert verdict.issues[0].slices == (4,)
    assert fifth.name in verdict.issues[0].message
    with pytest.raises(InputError) as caught:
        load_volume(folder, strict=True)
    assert caught.value.reason == "geometry_unlike"


def test_values_that_a_compression_changed_are_said_to_be(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "LossyImageCompression", "01" if k < 4 else "00"))
    (note,) = load_volume(folder, strict=True).verdict.issues
    assert note.kind == "lossy"
    assert "4 of 10 images were compressed with loss" in note.message
