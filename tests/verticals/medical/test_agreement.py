"""A faster plan for a user's network is used only where it labels the study as fp32 does."""

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medical import own_networks
from medical.own_networks import write_beside
from PIL import Image
from torch import nn

from plinth import __version__
from plinth.engine import Engine
from plinth.verticals.medical import CtAnalysis, CtSettings
from plinth.verticals.medical.networks.agreement import MIN_DICE, WINDOWS, chosen, voxels_by_label
from plinth.verticals.medical.networks.prepare import Axis, Prepared
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series

pytest.importorskip("onnxruntime")


class Knife(nn.Module):
    """Labels that part in the midst of soft tissue, where one step of int8 moves the edge."""

    def __init__(self) -> None:
        super().__init__()
        same, head = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 3, 1)
        with torch.no_grad():
            same.weight.fill_(1.0)
            same.bias.fill_(0.0)
            head.weight.copy_(torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1))
            head.bias.copy_(torch.tensor([0.2, 0.0, -0.742]))
        self.body = nn.Sequential(same, nn.ReLU(), head)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """(n, 1, z, y, x) to (n, 3, z, y, x)."""
        return self.body(volume)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small chests, as DICOM."""
    folders = [tmp_path_factory.mktemp("study") for _ in range(2)]
    for folder in folders:
        write_series(Phantom(shape=(72, 64, 20), spacing=(5.0, 5.0, 8.0)), folder)
    return folders


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as torch.export wrote it, with its JSON."""
    path = write_beside(tmp_path_factory.mktemp("network") / "knife.pt2")
    example = torch.rand(2, 1, *own_networks.PATCH)
    rows = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(Knife().eval(), (example,), dynamic_shapes=({0: rows},))
    torch.export.save(program, path)
    return path


ALL = {"contours": True, "captures": True, "volume": True}


def labelled(
    studies: list[Path], network: Path, out: Path, **engine: str
) -> tuple[list[dict], list[np.ndarray]]:
    """Reports and labels of the studies, one after the other, as one vertical makes them."""
    vertical = CtAnalysis(CtSettings(network={"model": network}, **ALL))
    reports, labels = [], []
    with Engine(device="cpu", threads=1, **engine) as running:
        for model in vertical.models():
            running.add(model, batch_range=vertical.batch_range)
        for number, folder in enumerate(studies):
            (item,) = vertical.discover(folder)
            result = running.run(vertical.infer([vertical.load(item)])).value[0]
            if isinstance(result, Exception):
                raise result
            (out / str(number)).mkdir(parents=True)
            vertical.write(result, out / str(number))
            reports.append(json.loads((out / str(number) / "report.json").read_text()))
            labels.append(result.artefacts.labels)
    return reports, labels


@pytest.fixture(scope="module")
def by_reference(studies, network, tmp_path_factory) -> np.ndarray:
    """The labels of the first study in fp32 as torch has it."""
    out = tmp_path_factory.mktemp("reference")
    (report,), (labels,) = labelled(studies[:1], network, out, backend="eager")
    assert report["plan"]["computed"] == "eager/fp32, the reference itself"
    assert "agreement" not in report["plan"]
    return labels


def test_a_plan_that_agrees_is_used_and_every_output_says_how_well(
    studies, network, by_reference, tmp_path
):
    reports, labels = labelled(studies, network, tmp_path, backend="onnxruntime")
    first, second = (report["plan"] for report in reports)
    assert first["computed_in"] == "onnxruntime/fp32"
    gate = first["agreement"]
    assert gate["passed"]
    assert gate["worst"] >= MIN_DICE == gate["needed"]
    assert gate["reference"] == "eager/fp32"
    assert 1 <= len(gate["corners"]) <= WINDOWS
    assert set(gate["seconds"]) == {"plan", "reference"}
    assert second["agreement"] == gate, "it is asked once, on the first study"
    assert "agreement" not in reports[1]["seconds"]
    assert (labels[0] == by_reference).mean() > 0.9999
    said = first["computed"]
    assert f"{gate['worst']:.4f}" in said
    files = tmp_path / "0"
    told = everything_said(files)
    assert set(told) == {
        *("segmentation.dcm", "measurements.dcm", "structures.dcm", "volumes.csv"),
        *("axial.dcm", "coronal.dcm", "sagittal.dcm", "axial.png", "coronal.png", "sagittal.png"),
        *("report.json", "report.html", "segmentation.nii.gz"),
    }
    network = first_network(files)
    for name, text in told.items():
        assert "research use only" in text.lower(), name
        assert network["digest"][:12] in text, name
        assert str(gate["worst"]) in text or f"{gate['worst']:.4f}" in text, name
        assert "onnxruntime/fp32" in text, name
        if name != "segmentation.nii.gz":  # its header has 79 characters
            assert f"{network['name']}" in text, name
            assert network["digest"] in text, name
        if name not in ("segmentation.nii.gz", "volumes.csv"):
            assert said in text, name
            assert "blended" in text, f"{name} names no plan"
            assert __version__ in text, name
    assert f",onnxruntime/fp32,{gate['worst']}" in told["volumes.csv"]


def first_network(files: Path) -> dict:
    """The network that the report names."""
    return json.loads((files / "report.json").read_text())["network"]


def everything_said(files: Path) -> dict[str, str]:
    """The words in every output but the volume itself, whose voxels are the source's."""
    told = {}
    for path in sorted(files.iterdir()):
        if path.suffix == ".dcm":
            image = pydicom.dcmread(path, stop_before_pixels=True)
            told[path.name] = "\n".join(str(e.value) for e in image.iterall() if e.VR != "SQ")
            assert told[path.name].isascii(), "whatever the character set of the source is"
        elif path.suffix == ".png":
            told[path.name] = Image.open(path).text["Description"]
        elif path.name.endswith("segmentation.nii.gz"):
            told[path.name] = sitk.ReadImage(str(path)).GetMetaData("ITK_FileNotes")
        elif path.suffix != ".gz":
            told[path.name] = path.read_text()
    return told


def test_a_plan_that_does_not_agree_is_not_used_and_the_report_says_so(
    studies, network, by_reference, tmp_path
):
    way = {"backend": "onnxruntime", "precision": "int8_static"}
    reports, labels = labelled(studies, network, tmp_path, **way)
    gate = reports[0]["plan"]["agreement"]
    assert gate["plan"] == "onnxruntime/int8_static"
    assert not gate["passed"]
    assert gate["worst"] < MIN_DICE
    for report, found in zip(reports, labels, strict=True):
        assert report["plan"]["computed_in"] == "eager/fp32"
        assert any("was used instead" in warning for warning in report["warnings"])
        assert np.array_equal(found, by_reference)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_windows_lie_inside_the_study_and_hold_the_commonest_label(seed, classes):
    rng = np.random.default_rng(seed)
    native = tuple(int(n) for n in rng.integers(4, 40, 3))
    labels = rng.integers(0, classes + 1, native).astype(np.uint8)
    sizes = tuple(int(n) for n in rng.integers(4, 40, 3))
    order = [int(n) for n in rng.permutation(3)]
    axes = []
    for axis, size in zip(order, sizes, strict=True):
        scale = native[axis] / size * rng.choice([-1, 1])
        first = 0.0 if scale > 0 else native[axis] - 1.0
        axes.append(Axis(axis, native[axis], size, first, float(scale), (0, native[axis])))
    ready = Prepared(torch.rand(1, *sizes), (axes[0], axes[1], axes[2]), native)
    window = tuple(int(min(n, w)) for n, w in zip(sizes, rng.integers(4, 40, 3), strict=True))
    corners = list(chosen(ready, window, labels))
    assert 1 <= len(corners) == len(set(corners)) <= WINDOWS
    for corner in corners:
        for at, w, n in zip(corner, window, sizes, strict=True):
            assert 0 <= at <= n - w


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_voxels_are_counted_as_sets(seed):
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.integers(0, 5, (3, 4, 5)).astype(np.uint8)) for _ in range(2))
    ours, theirs, both = voxels_by_label(a, b)
    for label in range(5):
        assert ours[label] == int((a == label).sum())
        assert theirs[label] == int((b == label).sum())
        assert both[label] == int(((a == label) & (b == label)).sum())
